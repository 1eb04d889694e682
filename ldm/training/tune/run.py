"""A tuning run: pictures and a base model in, a file for the best step out, and all that a verdict needs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.data.example import Example, PictureSet
from ldm.errors import LdmError
from ldm.evaluation.curves import Curves, figures
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.training.engine.figures import read_figures
from ldm.training.engine.loop import Progress, held, train
from ldm.training.engine.loop_config import LoopConfig, learning_rate
from ldm.training.engine.memory_saving import checkpointed
from ldm.training.engine.precision import DTYPES, resolved
from ldm.training.engine.ranks import first_rank_first, first_says, rank_and_ranks
from ldm.training.engine.split import is_split, split
from ldm.training.engine.state import check_facts, saved_facts
from ldm.training.tune.cache import Cache
from ldm.training.tune.captions import LiveCaptions, kept_captions, vary
from ldm.training.tune.epochs import epochs_of
from ldm.training.tune.measure import (
    Measured,
    Question,
    load_measured,
    losses,
    mark_of,
    measured_of_others,
    question,
    timesteps,
)
from ldm.training.tune.objective import TuneObjective
from ldm.training.tune.pictures import Prepared, network_mark, prepare
from ldm.training.tune.results import run_facts, step_of_result, write_result
from ldm.training.tune.samples import Samples, samples_for
from ldm.training.tune.settings import Tuning, buckets_for, check_base, held_out_numbers, text_share, weighing
from ldm.training.tune.trained import Trained, put_together, trained_of

log = logging.getLogger(__name__)

PROBES = 16
"""At most so many pictures of each side are asked about at every look."""
DRAWS = 16
"""About so many questions of each timestep a side, however few the pictures."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to begin, or to go on.

    kept, held_out: numbers of the pictures that are trained on, and that are only measured on
    left_out: a line for each picture that could not be used
    """

    tuning: Tuning
    loop: LoopConfig
    base: LatentDiffusion
    trained: Trained
    objective: TuneObjective
    kept: tuple[int, ...]
    held_out: tuple[int, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    samples: Samples


def prepare_run(
    tuning: Tuning,
    found: PictureSet,
    base: LatentDiffusion,
    loop_for: Callable[[int], LoopConfig],
    seen: Callable[[int], None] = lambda number: None,
) -> Run:
    """Encode pictures and captions, or find them in the cache, and set up what is trained.

    loop_for: the loop for so many pictures; seen: told how many pictures are encoded. Where all of a network is trained
    it is the base's own. Raises LdmError where no picture is left, where this process has begun on another device than
    the base's, and for all that does not fit together.
    """
    check_base(tuning, base.config)
    if base.store != "full":
        raise LdmError(f"base: was loaded with store={base.store!r}, whose weights cannot be trained; load it without")
    cache = Cache(tuning.cache or tuning.output / "cache")
    with first_rank_first(base.device):
        if tuning.shard and rank_and_ranks()[1] == 1:
            raise LdmError("shard: found one process, expected several; start it as torchrun --nproc-per-node 2 -m ldm")
        trained = trained_of(base, tuning)
        pictures, left_out = _prepared(tuning, found, base, cache, seen)
        if all(picture.example.regular for picture in pictures):
            why = f", as {left_out[0]}" if left_out else ""
            raise LdmError(f"{tuning.pictures}: no picture is left to train on{why}")
        held_out, notes = _held_out(pictures, tuning)
        kept = tuple(i for i in range(len(pictures)) if i not in held_out)
        examples = [picture.example for picture in pictures]
        with_text = tuning.text or tuning.method == "embedding"
        if with_text or vary(examples):
            captions = LiveCaptions(trained.model, with_text)
        else:
            captions = kept_captions(base, examples, cache)
    loop = resolved(loop_for(len(kept)), base.device)
    chosen = [pictures[i] for i in kept]
    epochs = epochs_of(
        [p.bucket for p in chosen], [p.example.repeats for p in chosen], [p.example.regular for p in chosen],
        loop.batch, loop.seed,
    )  # fmt: skip
    objective = TuneObjective(
        trained.model,
        trained.networks,
        [*chosen, *(pictures[i] for i in held_out)],
        epochs,
        captions,
        noising=tuning.noising,
        weighing=weighing(tuning, base.config),
        control=trained.control,
        text_share=text_share(tuning, loop.rate),
        autocast=None if loop.precision == "no" else DTYPES[loop.precision],
        facts=_facts(tuning, base, pictures, held_out) | {"batch": loop.batch},
    )
    objective.to(base.device)
    if tuning.shard:
        parts = [part for part in trained.networks if any(p.requires_grad for p in part.parameters())]
        split(parts, base.device, DTYPES[loop.precision])
    numbers = tuple(range(len(chosen))), tuple(range(len(chosen), len(pictures)))
    samples = samples_for(tuning, trained, [objective.pictures[i] for i in numbers[1] or numbers[0]])
    return Run(tuning, loop, base, trained, objective, *numbers, left_out, (*found.notes, *notes), samples)


def tune(run: Run, progress: Callable[[Progress], None] | None = None) -> list[Measured]:
    """Train, or go on training; the file of the best step so far is written at every look. Returns all that was seen.

    Raises as `ldm.training.engine.loop.train` does.
    """
    objective, loop, folder = run.objective, run.loop, run.tuning.output
    rank, ranks = rank_and_ranks()
    check_facts(folder, saved_facts(folder), objective.facts())  # before anything of another run is written over
    mark = mark_of(objective)
    if rank == 0 and (others := measured_of_others(folder, mark)):
        log.warning("%s: %d measurements are of other settings, and are passed over", others[0].parent, len(others))
    chosen = [objective.pictures[i] for i in run.kept]
    told = run_facts(run.tuning, loop, run.base, chosen, len(run.held_out), ranks)
    own = [i for i in run.kept if not objective.pictures[i].example.regular]
    asked = question(objective, own[:PROBES]), question(objective, run.held_out[:PROBES])

    def look(folder: Path, step: int) -> dict[str, float]:
        seen, written = _measured(objective, step, *asked), put_together(run.trained, keep=rank == 0)
        if rank == 0:
            seen.save(folder, mark)
            if step and figures(curves_of(run, load_measured(folder, mark, step))).best_step == step:
                write_result(run.tuning, written, run.base, told, step)
        with objective.lower_precision():
            images = run.samples.draw()
        if rank == 0:
            run.samples.save(images, folder, step)
        held_out = {"held_out": float(seen.held_out.mean())} if len(seen.held_out) else {}
        return {"train": float(seen.train.mean()), **held_out}

    objective.look = look
    looking = rank == 0 or is_split(objective)  # what is split is looked at by all processes together
    agreed = first_says if is_split(objective) else bool
    if looking and agreed(not load_measured(folder, mark, 0)):
        with held(folder) if rank == 0 else nullcontext():
            look(folder, 0)
    with checkpointed(run.trained.networks) if run.tuning.checkpointing else nullcontext():
        average = train(objective, loop, folder, progress, run.base.device)
    if looking and agreed(_wants_last(run)):
        average.swap()
        written = put_together(run.trained, keep=rank == 0)
        if rank == 0:
            write_result(run.tuning, written, run.base, told, loop.steps)
        average.swap()
    return load_measured(folder, mark, loop.steps)


def _wants_last(run: Run) -> bool:
    """Whether the last weights are to be the result, rather than none or those of an earlier end.

    They are where no step was better beyond doubt than none at all.
    """
    written = step_of_result(run.tuning)
    if written is None:
        return True
    measured = load_measured(run.tuning.output, mark_of(run.objective), run.loop.steps)
    return written < run.loop.steps and figures(curves_of(run, measured)).best_step == 0


def curves_of(run: Run, measured: Sequence[Measured]) -> Curves:
    """What was measured, as the verdict takes it."""
    steps = torch.tensor([seen.step for seen in measured])
    training = [line for line in read_figures(run.tuning.output) if line.of == "training" and "gradient" in line.values]
    return Curves(
        steps=steps,
        timesteps=timesteps(run.objective),
        train=torch.stack([seen.train for seen in measured]),
        train_swapped=torch.stack([seen.train_swapped for seen in measured]),
        held_out=torch.stack([seen.held_out for seen in measured]),
        held_out_swapped=torch.stack([seen.held_out_swapped for seen in measured]),
        logged=torch.tensor([line.step for line in training]),
        rates=torch.tensor([learning_rate(run.loop, line.step - 1) for line in training]),
        gradients=torch.tensor([line.values["gradient"] for line in training]),
        pictures=len(run.kept),
        epochs=int(steps[-1]) * run.loop.batch * run.loop.accumulate * rank_and_ranks()[1] / run.objective.epochs.shown,
    )


def _prepared(
    tuning: Tuning, found: PictureSet, base: LatentDiffusion, cache: Cache, seen: Callable[[int], None]
) -> tuple[list[Prepared], tuple[str, ...]]:
    """The pictures that can be used, and a line for each that cannot."""
    pictures, left_out = [], list(found.left_out)
    examples: Sequence[Example] = found.examples
    sizes = buckets_for(tuning, base.config)
    for result in prepare(examples, sizes, base.autoencoder, cache, canny=tuning.canny, seed=tuning.seed, seen=seen):
        if isinstance(result, Prepared):
            pictures.append(result)
        else:
            example, error = result
            left_out.append(f"{example.name}: {str(error).removeprefix(f'{example.name}: ')}")
    if tuning.method == "controlnet" and not tuning.canny:
        bare = [p.example.name for p in pictures if p.example.hint is None]
        pictures = [p for p in pictures if p.example.hint is not None]
        left_out += [f"{name}: has no hint, the picture that a control network looks at" for name in bare]
    return pictures, tuple(left_out)


def _held_out(pictures: Sequence[Prepared], tuning: Tuning) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers of the pictures that are only measured on; and a note where a picture is there twice.

    Equal files stay on one side: a picture that is trained on too would tell nothing.
    """
    same: dict[str, list[int]] = {}
    for number, picture in enumerate(pictures):
        if not picture.example.regular:
            same.setdefault(picture.content, []).append(number)
    groups = list(same.values())
    chosen = held_out_numbers(len(groups), tuning.held_out, tuning.seed)
    more = sum(map(len, groups)) - len(groups)
    notes = (f"pictures that are there already, under another name: {more}; ldm check names them",) if more else ()
    return tuple(sorted(number for group in chosen for number in groups[group])), notes


def _facts(
    tuning: Tuning, base: LatentDiffusion, pictures: Sequence[Prepared], held_out: Sequence[int]
) -> dict[str, object]:
    """What a resumed run must have in common with the one that was begun."""
    digest = hashlib.sha256()
    for picture in pictures:
        told = [picture.content, picture.example.captions, repr(picture.example.rules), picture.example.repeats]
        digest.update(json.dumps([*told, repr(picture.views)]).encode())
    return {
        "method": tuning.method,
        "adapter": repr(tuning.adapter) if tuning.by_adapter else None,
        "text": tuning.text,
        "word": [tuning.word, tuning.like, tuning.vectors] if tuning.method == "embedding" else None,
        "noising": repr(tuning.noising),
        "min_snr": tuning.min_snr,
        "huber": tuning.huber,
        "pictures": digest.hexdigest()[:16],
        "masks and hints": _masks_and_hints(pictures),
        "held_out": list(held_out),
        "base": network_mark(base.unet),
    }


def _masks_and_hints(pictures: Sequence[Prepared]) -> str | None:
    """A digest of what the files hold; None where no picture has any."""
    told = [(picture.keys[0]["mask"], picture.keys[0]["hint"]) for picture in pictures]
    if not any(any(pair) for pair in told):
        return None
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _measured(objective: TuneObjective, step: int, train: Question, held_out: Question) -> Measured:
    def asked(of: Question, captions: Sequence[str]) -> torch.Tensor:
        return losses(objective, of.pictures, captions, max(1, DRAWS // max(1, len(of.pictures))))

    return Measured(
        step,
        asked(train, train.own),
        asked(train, train.swapped),
        asked(held_out, held_out.own),
        asked(held_out, held_out.swapped),
    )
