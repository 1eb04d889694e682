"""`ldm tune`: a LoRA, an embedding, a control network or a whole model from a folder of the user's own pictures."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.apps.check import buckets_of, defaults_of
from ldm.apps.flags.tune_checks import check_command, check_packages, check_pictures
from ldm.apps.output.progress import progress_bar, to_stderr
from ldm.data.captions import CaptionRules, whole
from ldm.data.example import PictureSet
from ldm.data.picture_set import read_pictures
from ldm.errors import printable
from ldm.models.tokenizer import split_at_names, word_ids
from ldm.pipeline.device import choose_device
from ldm.pipeline.load import load
from ldm.training.adapter_options import AdapterOptions
from ldm.training.engine.loop import Progress
from ldm.training.engine.loop_config import LoopConfig, Precision
from ldm.training.engine.precision import precision_on, slowness
from ldm.training.engine.ranks import first_rank_first, join, rank_and_ranks
from ldm.training.tune.finish import Finished, finish
from ldm.training.tune.objective import Noising
from ldm.training.tune.plan import Plan, duration, plan
from ldm.training.tune.run import prepare_run
from ldm.training.tune.run import tune as train
from ldm.training.tune.settings import Tuning, check_base, usual_batch, usual_rate, usual_steps
from ldm.training.tune.trained import base_dtype

if TYPE_CHECKING:
    from ldm.apps.flags.commands import Tune
    from ldm.models.presets import SystemConfig
    from ldm.pipeline.latent_diffusion import LatentDiffusion

UNKNOWN_WORD = "sks"
"""The usual name for something new: a token too, but one that means next to nothing."""


def tune(command: Tune) -> None:
    """Tune as the command says: the plan and progress to stderr, the verdict and the written files to stdout.

    Raises LdmError for all that the caller can mend, before anything is trained where it can be known by then.
    """
    check_command(command)
    check_packages(command)
    tuning = tuning_of(command)
    found = read_pictures(command.folder, tuning.defaults)
    check_pictures(command, found)
    tuning, found = with_word(tuning, found)
    device = join(None if command.device == "auto" else choose_device(command.device))
    precision = precision_on(device, command.learning.precision)
    if (note := slowness(device, precision)) is not None:
        found = replace(found, notes=(*found.notes, note))
    dtype = base_dtype(tuning, device, precision)
    base = load(command.base, device=device, dtype=dtype, offload="none", allow_pickle=command.allow_pickle)
    check_base(tuning, base.config)  # before the class is drawn
    tuning = replace(tuning, buckets=buckets_of(command.pictures, base.config.size))
    if tuning.method == "dreambooth" and tuning.defaults.regular is None:
        tuning, found = with_class_pictures(tuning, found, base)
    with progress_bar(len(found.examples)) as bar:
        run = prepare_run(
            tuning, found, base, lambda count: loop_of(command, tuning, base.config, count, precision),
            lambda done: bar.at("encoding pictures", done),
        )  # fmt: skip
    first = rank_and_ranks()[0] == 0
    ranks = rank_and_ranks()[1]
    planned = plan(run.objective, run.loop, run.kept, len(run.held_out), ranks, tuning.checkpointing)
    if first:
        for line in (*run.notes, *(f"left out: {line}" for line in run.left_out)):
            to_stderr(line)
    if command.plan:
        if first:
            print(json.dumps(_plan_object(planned)) if command.json else "\n".join(planned.lines()))
        return
    if first:
        for line in planned.lines():
            to_stderr(line)
    started = time.perf_counter()
    with progress_bar(run.loop.steps) as bar:

        def shown(at: Progress) -> None:
            loss = at.figures.get("loss", 0.0)
            bar.at(f"step {at.step}, loss {loss:.4f}, {duration(at.seconds_left)} left", at.step)

        train(run, shown)
    if first:
        ended = finish(run, planned, time.perf_counter() - started)
        if command.json:
            print(json.dumps(_object(ended)))
        else:
            for line in (*ended.verdict.sentences, *ended.verdict.advice, *ended.notes):
                print(line)
            print(ended.file)
            print(ended.report)


def tuning_of(command: Tune) -> Tuning:
    """What the flags say, yet without the sizes of pictures, which are the model's unless they say so."""
    showing, loss, adapting = command.showing, command.loss, command.adapting
    rules = CaptionRules(
        shuffle=showing.shuffle,
        keep=showing.keep,
        prefix=showing.prefix,
        suffix=showing.suffix,
        drop=showing.drop,
        drop_tags=showing.drop_tags,
        wildcards=command.pictures.wildcards,
    )
    defaults = replace(
        defaults_of(command.pictures),
        rules=rules,
        flip=showing.flip,
        random_crop=showing.random_crop,
        repeats=showing.repeats,
    )
    return Tuning(
        pictures=command.folder,
        output=command.output or Path(f"{command.folder.resolve().stem}-{command.method}"),
        method=command.method,
        adapter=AdapterOptions(
            adapting.kind, adapting.rank, adapting.alpha, adapting.dropout, adapting.conv_rank, adapting.text_rank
        ),
        whole=command.whole,
        text=command.text,
        text_rate=command.learning.text_rate,
        word=command.naming.word,
        like=command.naming.like,
        vectors=command.naming.vectors,
        defaults=defaults,
        held_out=command.held_out,
        canny=command.canny,
        noising=Noising(loss.offset, loss.perturbation, loss.zero_terminal_snr, loss.prior_weight),
        min_snr=None if loss.min_snr == 0 else loss.min_snr,
        huber=loss.huber,
        samples=command.sample,
        seed=command.learning.seed,
        layout=command.layout,
        checkpointing=command.learning.checkpointing,
        shard=command.learning.shard,
        cache=command.cache,
    )


def with_word(tuning: Tuning, found: PictureSet) -> tuple[Tuning, PictureSet]:
    """Captions that hold the word of an embedding, found as prompts' words are: where none does, it is put before each.

    Notes say so, and where captions are without it, or where the word had a meaning, which the new one will hide.
    """
    if tuning.method != "embedding":
        return tuning, found
    word, notes, examples = tuning.word, list(found.notes), found.examples
    own = [e for e in examples if not e.regular]
    without = [e for e in own if not any(has_word(whole(text, e.rules), word) for text in e.captions)]
    if len(without) == len(own):
        named = (replace(e.rules, prefix=" ".join(filter(None, (word, e.rules.prefix)))) for e in examples)
        examples = tuple(e if e.regular else replace(e, rules=rules) for e, rules in zip(examples, named, strict=True))
        notes.append(f"no caption holds the word {word!r}: it is put before each")
    elif without:
        notes.append(f"{len(without)} of {len(own)} pictures have no caption with the word {word!r}, as "
                     f"{printable(without[0].name)}: they teach it nothing")  # fmt: skip
    if word.lower() != UNKNOWN_WORD and len(word_ids(word)) == 1:
        notes.append(f"the model knows a word {word!r}: captions and prompts that say it mean the new one instead, "
                     "wherever its file is loaded; choose a --word of your own to keep both")  # fmt: skip
    return tuning, replace(found, examples=examples, notes=tuple(notes))


def has_word(text: str, word: str) -> bool:
    """Whether a prompt of this text would mean an embedding of this name: "asks" holds no "sks"."""
    return any(name for _, name in split_at_names(text, (word,)))


def with_class_pictures(tuning: Tuning, found: PictureSet, base: LatentDiffusion) -> tuple[Tuning, PictureSet]:
    """Pictures of the subject's class, drawn by the model itself into OUTPUT/class, two for each of the subject.

    Ruiz et al. 2023, section 3.3. Those that are there already stay. Without a caption for them there are none, and a
    note says so.
    """
    caption = tuning.defaults.regular_tokens
    if caption is None:
        note = "no pictures of the class, so the model may forget it; give --class-caption, or --class-pictures too"
        return tuning, replace(found, notes=(*found.notes, note))
    folder, count = tuning.output / "class", min(100, 2 * len(found.examples))
    with first_rank_first(base.device), progress_bar(count) as bar:
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(count):
            if not (path := folder / f"{seed:03}.png").exists():
                base.generate(caption, seed=seed)[0].save(path)
            bar.at("drawing the class", seed + 1)
    tuning = replace(tuning, defaults=replace(tuning.defaults, regular=folder))
    return tuning, read_pictures(tuning.pictures, tuning.defaults)


def loop_of(command: Tune, tuning: Tuning, config: SystemConfig, pictures: int, precision: Precision) -> LoopConfig:
    """The loop for so many pictures, with what the flags leave open filled in."""
    asked = command.learning
    batch = usual_batch(config) if asked.batch is None else asked.batch
    steps = usual_steps(tuning, pictures, batch * asked.accumulate) if asked.steps is None else asked.steps
    own = 1.0 if asked.optimizer == "prodigy" else usual_rate(tuning, config)  # prodigy finds its own
    rate = own if asked.rate is None else asked.rate
    every = max(1, steps // asked.looks)
    return LoopConfig(
        steps=steps,
        batch=batch,
        rate=rate,
        optimizer=asked.optimizer,
        warmup=min(100, steps // 10) if asked.warmup is None else asked.warmup,
        schedule=asked.schedule,
        cooldown=steps // 5 if asked.schedule == "constant" and asked.optimizer != "schedulefree" else 0,
        ema=asked.ema,
        accumulate=asked.accumulate,
        precision=precision,
        seed=asked.seed,
        workers=asked.workers,
        save_every=every if asked.save_every is None else asked.save_every,
        evaluate_every=every,
        log_every=max(1, min(10, steps // 20)),
    )


def _plan_object(planned: Plan) -> dict[str, object]:
    sizes = {f"{width}x{height}": count for (width, height), count in planned.buckets.items()}
    return {**asdict(planned), "buckets": sizes}


def _object(ended: Finished) -> dict[str, object]:
    verdict = ended.verdict
    return {
        "report": str(ended.report),
        "file": str(ended.file),
        "outcome": verdict.outcome,
        "best_step": verdict.best_step,
        "gap_step": verdict.gap_step,
        "captions": verdict.captions,
        "sentences": [*verdict.sentences, *verdict.advice],
        "copies": None if ended.copies is None else len(ended.copies.copies),
        "notes": list(ended.notes),
    }
