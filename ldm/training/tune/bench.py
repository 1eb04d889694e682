"""How fast `ldm tune` learns, against a plain loop over diffusers' U-Net: the same weights and batches, in turns.

Ours is the whole loop of a run, with its averaged weights, its figures and its readers. Theirs is what diffusers'
example script for LoRAs does at each step: peft's LoRA at the same layers, latents and text states worked out
beforehand, AdamW, gradients clipped.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.data.buckets import usual_buckets
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError
from ldm.evaluation import bench_diffusers
from ldm.evaluation.bench import Entry, Subject
from ldm.evaluation.bench_inputs import Dtype, Setting, TuneBatch
from ldm.evaluation.turns import Measured, median_seconds, paired_ratio
from ldm.pipeline.load import load
from ldm.training.engine.loop import Progress, train
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.objective import Draw, step_generator
from ldm.training.engine.precision import precision_on
from ldm.training.tune.run import Run, prepare_run
from ldm.training.tune.settings import Tuning, usual_batch, usual_rate
from ldm.training.tune.trained import base_dtype

Clock = Callable[[], float]
DTYPES: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


@dataclass(frozen=True, eq=False)
class Match:
    """Steps of both sides in turns. setting: theirs; apart: the relative difference of the first losses."""

    setting: Setting | None
    ours: list[Measured]
    theirs: list[Measured]
    apart: float


def bench_tuning(subject: Subject, size: int, runs: int, clock: Clock = time.perf_counter) -> Entry:
    """A LoRA's step, rank 16, at this size in pixels: medians of `runs` steps, after one to warm up.

    `agreement` tells by how much the losses of the first step differ: both sides begin with the same network. Raises
    LdmError for a model that is told more than a text.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as name:
        here = Path(name)
        run = _ready(subject, here, size, runs)
        if subject.folder is None:
            alone = _match(run, here / "alone", None, None, clock)
            settings = {"ours": _ours(run.loop)}
            return Entry("tune", size, runs, "s", median_seconds(alone.ours), settings=settings, note=subject.note)
        batches = [_batch(run, number) for number in range(runs + 1)]
        matches = []
        for number, setting in enumerate(_tried(run.loop)):
            theirs = bench_diffusers.lora_steps(subject.folder, setting, batches, run.loop.rate, run.loop.clip)
            matches.append(_match(_ready(subject, here, size, runs), here / str(number), setting, theirs, clock))
            del theirs  # its network goes, before the next one is read
    default, best = matches[0], min(matches, key=lambda match: median_seconds(match.theirs))
    ours, theirs_best, theirs_default = map(median_seconds, (best.ours, best.theirs, default.theirs))
    return Entry(
        "tune", size, runs, "s", ours, theirs_best, theirs_default, theirs_best / ours,
        theirs_default / median_seconds(default.ours), paired_ratio(best.ours, best.theirs),
        paired_ratio(default.ours, default.theirs), agreement=best.apart,
        settings={"ours": _ours(run.loop), "theirs_best": str(best.setting), "theirs_default": str(default.setting)},
    )  # fmt: skip


def _match(run: Run, output: Path, setting: Setting | None, theirs: Callable[[], float] | None, clock: Clock) -> Match:
    """Train, and let them take a step after each of ours. The first warms up; the last, which saves, is left out."""
    ours: list[Measured] = []
    others: list[Measured] = []
    losses: list[tuple[float, float]] = []
    begun = clock()

    def between(at: Progress) -> None:
        nonlocal begun
        seconds, last = clock() - begun, at.step == at.steps
        if not last and theirs is not None:
            started = clock()
            loss = theirs()
            others.append(Measured(clock() - started))
            losses.append((at.figures["loss"], loss))
        if not last:
            ours.append(Measured(seconds))
        begun = clock()

    train(run.objective, run.loop, output, between, run.base.device)
    apart = max((abs(our - their) / abs(our) for our, their in losses[:1]), default=0.0)
    return Match(setting, ours[1:], others[1:], apart)


def _ready(subject: Subject, here: Path, size: int, runs: int) -> Run:
    """A run on pictures of noise, as many as a batch has."""
    device = torch.device(subject.device)
    tuning = Tuning(here / "pictures", here / "out", held_out=0.0, cache=here / "cache", buckets=usual_buckets(size))
    base = load(subject.file, device=device, dtype=base_dtype(tuning, device, precision_on(device)), offload="none")
    if base.config.sizes_in_vector or base.config.unet.in_channels != base.config.autoencoder.latent_channels:
        raise LdmError("bench: tuning is compared for models that are told a text alone; leave the part tune out")
    batch = usual_batch(base.config)
    _write_pictures(tuning.pictures, batch, size)
    loop = LoopConfig(
        runs + 2, batch, usual_rate(tuning, base.config), warmup=1, ema=0.99, save_every=runs + 2,
        evaluate_every=runs + 2, log_every=10, workers=2,
    )  # fmt: skip
    return prepare_run(tuning, read_pictures(tuning.pictures, tuning.defaults), base, lambda _: loop)


def _write_pictures(folder: Path, count: int, size: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")


def _batch(run: Run, number: int) -> TuneBatch:
    """What our loop is given at this step, as theirs takes it."""
    objective, seed = run.objective, run.loop.seed
    batch = objective.batch(Draw(run.loop.batch, number, step_generator(seed, number)))
    sigma = objective.schedule.sigma(batch["timestep"])
    weight = objective.weighing.level(sigma, objective.model.config.prediction)
    states = objective.captions.cond(batch).cross
    assert states is not None
    tensors = (batch["latents"], batch["noise"], batch["timestep"], weight.float(), states)
    return TuneBatch(*(tensor.to(objective.model.device) for tensor in tensors))


def _tried(loop: LoopConfig) -> Sequence[Setting]:
    """Their script's default, float32, and what else a user may ask of it: our arithmetic, in both memory formats."""
    dtype = DTYPES[loop.precision]
    return tuple(dict.fromkeys((Setting("float32"), Setting(dtype), Setting(dtype, channels_last=True))))


def _ours(loop: LoopConfig) -> str:
    return f"LoRA of rank 16, batch {loop.batch}, {DTYPES[loop.precision]}"
