"""What is left of a run when it has ended: its verdict, whether its pictures are copies, and a page about both.

The file that was written is read back as anybody would read it, so the samples of the page are what a user will get.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ldm.data.buckets import cut
from ldm.errors import LdmError
from ldm.evaluation.copies import CopyCheck, Places, check_copies
from ldm.evaluation.verdict import Verdict, verdict
from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.clip.model import CLIP
from ldm.pipeline.device import is_out_of_memory
from ldm.pipeline.images import LARGE_BYTES, read_picture, read_shrunk
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load
from ldm.pipeline.request import GenerateRequest
from ldm.training.tune.measure import load_measured, mark_of
from ldm.training.tune.pictures import Prepared
from ldm.training.tune.plan import Plan, duration, peak_memory
from ldm.training.tune.report import Pair, Report, Samples, write_report
from ldm.training.tune.results import result_path
from ldm.training.tune.run import Run, curves_of
from ldm.training.tune.samples import control_of
from ldm.training.tune.trained import CONTROL
from ldm.weights.adapters.read import read_adapter
from ldm.weights.embeddings import read_embeddings

Found = TypeVar("Found")

COPIED = 16
"""So many samples are drawn from training captions and looked up among the training pictures."""

PAIRS = 6
"""Of which so many are shown, the nearest ones."""


@dataclass(frozen=True, eq=False)
class Finished:
    """A run's end.

    file: what was written; report: the page
    copies: None where too few pictures are of one size, or the check failed
    notes: what the check found, in sentences, and what could not be looked at, and why
    """

    file: Path
    verdict: Verdict
    copies: CopyCheck | None
    notes: tuple[str, ...]
    report: Path


def finish(run: Run, planned: Plan, seconds: float) -> Finished:
    """Judge the run by all that it measured, look for copies among what its file draws, and write the page.

    seconds: what the training took
    """
    missed: list[str] = []
    clip, similarity = _tried("What CLIP says of captions", lambda: _by_clip(run), missed) or (None, None)
    measured = load_measured(run.tuning.output, mark_of(run.objective), run.loop.steps)
    curves = replace(curves_of(run, measured), similarity=similarity)
    judged = verdict(curves)
    found = _tried("Whether samples are copies", lambda: _copies(run, tuned_model(run), clip), missed)
    check = None if found is None else found.check
    pairs = () if found is None else _tried("The pictures nearest to samples", lambda: _pairs(found), missed) or ()
    notes = (*(() if check is None else check.sentences), *missed)
    page = run.tuning.output / "report.html"
    last = measured[-1].step
    steps = sorted({0, judged.best_step or last, last})
    report = Report(
        title=f"{run.tuning.output.resolve().name}: {run.tuning.method} on {run.tuning.pictures.name}",
        verdict=judged,
        curves=curves,
        stages=tuple("before" if step == 0 else f"step {step}" for step in steps),
        samples=_stages(run, steps),
        notes=notes,
        pairs=pairs,
        settings=_settings(run),
        costs={"time": duration(seconds), "memory": f"{peak_memory(run.base.device) / 2**30:.1f} GiB at the peak",
               "planned": planned.lines()[-1]},
        left_out=run.left_out,
    )  # fmt: skip
    write_report(page, report)
    return Finished(result_path(run.tuning), judged, check, notes, page)


def _tried(what: str, look: Callable[[], Found], missed: list[str]) -> Found | None:
    """What is found; None where that fails or memory runs out, and then `missed` is told why: the verdict of a run of
    hours does not hang on it."""
    try:
        return look()
    except (LdmError, RuntimeError, MemoryError) as error:
        if not isinstance(error, LdmError) and not is_out_of_memory(error):
            raise
        why = str(error) if isinstance(error, LdmError) else "memory ran out"
        missed.append(f"{what} could not be looked at: {why}")
        return None


def _stages(run: Run, steps: Sequence[int]) -> tuple[Samples, ...]:
    """What was drawn of each prompt at these steps."""
    by_step = [run.samples.paths(run.tuning.output, step) for step in steps]
    rows = []
    for number, request in enumerate(run.samples.requests):
        paths = [paths[number] for paths in by_step]
        rows.append(Samples(request.prompt, tuple(_opened(path) for path in paths)))
    return tuple(rows)


def _opened(path: Path) -> Image.Image | None:
    """A sample that was drawn on the way; None where it is gone, or damaged."""
    try:
        return read_picture(path.read_bytes())
    except (OSError, LdmError):
        return None


def _pairs(found: _Copies) -> tuple[Pair, ...]:
    """The samples that are nearest to training pictures, beside them."""
    if found.check is None:
        return ()
    nearest = sorted(found.check.nearest, key=lambda copy: copy.distance)[:PAIRS]
    return tuple(
        Pair(
            f"{found.train[copy.picture].example.name}: {copy.distance:.0%} of the usual distance"
            + ("" if copy.cosine is None else f", cosine {copy.cosine:.2f}") + (", a near copy" if copy.near else ""),
            found.samples[copy.sample], _shown(found.train[copy.picture]),
        )
        for copy in nearest
    )  # fmt: skip


def _settings(run: Run) -> dict[str, str]:
    """What the run was told, a line each."""
    tuning, loop = run.tuning, run.loop
    base = run.base.origin.path
    told = {
        "base": "a model in memory" if base is None else base.name,
        "method": tuning.method,
        "pictures": f"{len(run.kept)} to train on, {len(run.held_out)} held out",
        "steps": f"{loop.steps} of {loop.batch * loop.accumulate} pictures",
        "rate": f"{loop.rate:g}, {loop.optimizer}, {loop.schedule}",
        "precision": loop.precision,
        "seed": str(tuning.seed),
        "noising": str(tuning.noising),
        "loss": f"min-SNR {tuning.min_snr}, huber {tuning.huber}",
    }
    return told | ({"adapter": str(tuning.adapter)} if tuning.by_adapter else {})


def tuned_model(run: Run) -> LatentDiffusion:
    """The base model with what was written."""
    path, base = result_path(run.tuning), run.base
    if run.tuning.by_adapter:
        return base.with_adapters([(read_adapter(path), 1.0)])
    if run.tuning.method == "embedding":
        return base.with_embeddings([*base.embeddings, *read_embeddings(path)])
    if run.tuning.method == "controlnet":
        return base.with_controls({CONTROL: path})
    return load(path, device=base.device, dtype=base.dtype, offload=base.offload)


def _by_clip(run: Run) -> tuple[CLIP, Tensor] | None:
    """The CLIP in the base model's file, where there is one, and its cosines of pictures (rows) with captions
    (columns), of as many as tell something."""
    path = run.base.origin.path
    if path is None:
        return None
    try:
        clip = load_clip(path, device=run.base.device)
    except LdmError:
        return None
    pictures = [p for p in run.objective.pictures if not p.example.regular][:128]
    vectors = clip.image_vectors([_shown(picture) for picture in pictures])
    return clip, (vectors @ clip.text_vectors([picture.caption for picture in pictures]).T).float().cpu()


@dataclass(frozen=True, eq=False)
class _Copies:
    """samples: of training captions, as the file draws them; train: the pictures that they are held against."""

    samples: tuple[Image.Image, ...]
    train: tuple[Prepared, ...]
    check: CopyCheck | None


def _copies(run: Run, model: LatentDiffusion, clip: CLIP | None) -> _Copies:
    """Samples of training captions, and whether they are copies; of the commonest size alone, to be compared."""
    objective = run.objective
    own = [i for i in run.kept if not objective.pictures[i].example.regular]
    (size, _), *_ = Counter(objective.pictures[i].bucket for i in own).most_common()
    train = tuple(objective.pictures[i] for i in own if objective.pictures[i].bucket == size)
    held_out = [objective.pictures[i] for i in run.held_out if objective.pictures[i].bucket == size]
    samples = []
    for number, picture in enumerate(train[:COPIED]):
        request = GenerateRequest(prompt=picture.caption, seed=number, width=size[0], height=size[1])
        if run.trained.control is not None:
            request = request.changed(controls=(control_of(picture),))
        samples.append(model.generate(request)[0].image)
    if len(train) < 3:
        return _Copies(tuple(samples), train, None)
    drawn = Places(
        torch.cat([model.latent_of(image).cpu() for image in samples]),
        None if clip is None else clip.image_vectors(samples).cpu(),
    )
    names = [picture.example.name for picture in train]
    return _Copies(tuple(samples), train, check_copies(drawn, _places(train, clip), _places(held_out, clip), names))


def _places(pictures: Sequence[Prepared], clip: CLIP | None) -> Places:
    if not pictures:
        return Places(torch.zeros(0))
    latents = torch.stack([picture.view(0)["latent"].float() for picture in pictures])
    return Places(latents, None if clip is None else clip.image_vectors([_shown(p) for p in pictures]).cpu())


def _shown(picture: Prepared) -> Image.Image:
    """A picture as it is trained on."""
    return cut(read_shrunk(picture.example.image.read(LARGE_BYTES)), picture.views[0].crop)
