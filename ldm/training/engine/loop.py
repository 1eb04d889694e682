"""The training loop. It knows no objective, no data set and no network: only steps.

Micro-batch n draws everything random from a generator seeded by (seed, n), so a run that was stopped and resumed takes
the very same steps as one that was not, and nothing about data position needs saving.

Under `accelerate launch` every process (a rank) runs this loop: the micro-batches of a step are dealt out to the ranks
and gradients are averaged over them, the first one alone evaluates, logs and saves, and a signal to any of them stops
all at the same step. Two ranks take the steps that one does that accumulates twice as much.
Where weights are split over the ranks (split.py), all evaluate together and lend their parts to what is saved.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ldm.errors import LdmError
from ldm.training.engine.ema import EMA
from ldm.training.engine.figures import Figures, append_figures, cut_figures, in_words, mean
from ldm.training.engine.looking import evaluate, was_evaluated
from ldm.training.engine.loop_config import LoopConfig, learning_rate
from ldm.training.engine.objective import Batch, Draw, Objective, learning, step_generator
from ldm.training.engine.optimizers import optimizer_for, set_rate
from ldm.training.engine.precision import mixed, resolved
from ldm.training.engine.prefetch import ahead
from ldm.training.engine.ranks import join
from ldm.training.engine.run import Run, resume, save
from ldm.training.engine.split import is_split
from ldm.training.engine.stopping import stop_signal
from ldm.weights.io import printable
from ldm.weights.lock import locked

log = logging.getLogger(__name__)
BAD_STEPS_ALLOWED = 10


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, of how many; the last step's figures; rows a second; and how long it will take."""

    step: int
    steps: int
    figures: dict[str, float]
    rows_per_second: float
    seconds_left: float


def train(
    objective: Objective,
    config: LoopConfig,
    output: Path,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
) -> EMA:
    """Run or resume training in the folder `output`; returns the averaged weights.

    progress: called after every step, in the first process; device: as for `join`

    The first SIGINT or SIGTERM lets the step end and saves; then KeyboardInterrupt or SystemExit(143) is raised. A
    step whose loss or gradient is not finite is skipped and counted; ten in a row raise LdmError, the last save
    untouched. Raises LdmError where `output` holds a run of another kind or one that is under way, where it cannot be
    written to, and where memory or the disk run out.
    """
    device = join(device)
    config = resolved(config, device)
    accelerator = _accelerator(config, device)
    alone = held(output) if accelerator.is_main_process else nullcontext()
    with alone, stop_signal() as stop, learning(objective):
        run = _run(objective, config, output, accelerator)
        start = resume(run)
        if run.first:
            cut_figures(output, start)
        if run.looks_at(start) and run.agreed(not was_evaluated(output, start)):
            evaluate(run, start)  # it was not reached, or not finished, before the run was stopped
        with closing(_batches(run, start)) as batches:
            _steps(run, start, batches, stop, progress)
    return run.average


def _steps(
    run: Run,
    start: int,
    batches: Iterator[tuple[Draw, Batch]],
    stop: Callable[[], int],
    progress: Callable[[Progress], None] | None,
) -> None:
    """All steps from `start` on, and what is done now and then between them."""
    config, begun = run.config, time.perf_counter()
    bad, since_logged, skipped = 0, list[dict[str, float]](), 0
    for step in range(start, config.steps):
        set_rate(run.optimizer, learning_rate(config, step))
        figures = _step(run, step, batches)
        done = step + 1
        if math.isfinite(figures["loss"]) and math.isfinite(figures["gradient"]):
            bad = 0
            since_logged.append(figures)
            run.update_average(step)
        else:
            bad, skipped = bad + 1, skipped + 1
            if bad == BAD_STEPS_ALLOWED:
                raise LdmError(f"step {step}: the loss was not finite {bad} times in a row; lower the rate and resume")
        seconds = (time.perf_counter() - begun) / (done - start)
        speed = config.batch * run.batches / seconds
        if run.first and run.due(done, config.log_every):
            means = mean(since_logged) | ({"skipped": float(skipped)} if skipped else {})
            append_figures(run.output, Figures(done, "training", means))
            log.info("step %d/%d  %s  %.1f/s", done, config.steps, in_words(means), speed)
            since_logged, skipped = [], 0
        saved = run.due(done, config.save_every)
        if saved:
            save(run, done)
        if run.looks_at(done) and run.agreed(not stop()):
            evaluate(run, done)
        if run.first and progress is not None:
            progress(Progress(done, config.steps, figures, speed, seconds * (config.steps - done)))
        if signalled := _greatest(run.accelerator, stop()):
            if not saved:
                save(run, done)
            if run.first:
                log.info("stopped at step %d, saved in %s", done, run.output)
            run.accelerator.wait_for_everyone()  # a launcher kills the others as soon as one has left
            raise KeyboardInterrupt if signalled == signal.SIGINT else SystemExit(128 + signalled)
    run.update_average()
    run.accelerator.wait_for_everyone()


def held(output: Path) -> AbstractContextManager[None]:
    """The output folder, there and locked, so that no two runs write into it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise LdmError(f"{printable(str(output))}: cannot be written ({reason}); give another --output") from None
    return locked(output, "--output")


def _accelerator(config: LoopConfig, device: torch.device) -> Accelerator:
    """It has one precision for all of a process, so layers are run in a run's own by `mixed`, and not by it."""
    accelerator = Accelerator(
        mixed_precision="no", gradient_accumulation_steps=config.accumulate, cpu=device.type == "cpu"
    )
    if config.precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler(device.type)
    return accelerator


def _run(objective: Objective, config: LoopConfig, output: Path, accelerator: Accelerator) -> Run:
    if parted := is_split(objective):
        _check_split(objective, config)
    else:
        objective.to(accelerator.device)
    if config.compile:
        objective.compile()
    optimizer = optimizer_for(objective.groups(), config)
    model = objective if parted else accelerator.prepare(objective)
    stepper = accelerator.prepare(optimizer)
    return Run(objective, config, output, accelerator, model, optimizer, stepper, EMA(objective, config.ema), parted)


def _check_split(objective: Objective, config: LoopConfig) -> None:
    """Raise LdmError where weights that are split cannot be trained so."""
    for name, found, expected in (
        ("optimizer", config.optimizer, "adamw"),
        ("precision", config.precision if config.precision == "fp16" else "", ""),
        ("compile", config.compile, False),
        ("best", config.best, None),
    ):
        if found != expected:
            raise LdmError(f"{name}: found {found} with weights that are split over processes, expected {expected}")
    trained = [p for p in objective.parameters() if p.requires_grad]
    if not all(isinstance(p, DTensor) for p in trained):
        raise LdmError("split: some trained weights are split over processes and others are not; split all, or none")


def _batches(run: Run, start: int) -> Generator[tuple[Draw, Batch]]:
    """This rank's micro-batches from step `start` on."""

    def made(number: int) -> tuple[Draw, Batch]:
        draw = Draw(run.config.batch, number, step_generator(run.config.seed, number))
        return draw, run.objective.batch(draw)

    first, last = start * run.batches, run.config.steps * run.batches
    ranks, rank = run.accelerator.num_processes, run.accelerator.process_index
    return ahead(made, range(first + rank, last, ranks), run.config.workers)


def _step(run: Run, step: int, batches: Iterator[tuple[Draw, Batch]]) -> dict[str, float]:
    """As `_gradient_step`. Raises LdmError with advice where memory runs out."""
    try:
        return _gradient_step(run, batches)
    except (RuntimeError, MemoryError) as error:
        told = "DefaultCPUAllocator: can't allocate" in str(error)
        if not (told or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        raise LdmError(
            f"step {step}: out of memory with a batch of {run.config.batch}; give a smaller batch and accumulate more, "
            "or use gradient checkpointing or a lighter optimizer, and resume: what was saved is untouched"
        ) from error


def _gradient_step(run: Run, batches: Iterator[tuple[Draw, Batch]]) -> dict[str, float]:
    """One optimizer step over `accumulate` micro-batches; the weights stay as they are if it is not finite.

    Returns the mean over ranks of what the objective said, so that all ranks judge it alike.
    """
    accelerator, config = run.accelerator, run.config
    totals: dict[str, float] = {}
    norm: Any = 0.0
    for _ in range(config.accumulate):
        draw, batch = next(batches)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        torch.manual_seed(draw.generator.initial_seed())  # for networks with dropout, which draw from torch's own
        with accelerator.accumulate(run.model):
            with mixed(accelerator.device, config.precision):
                scalars = run.model(batch)
            accelerator.backward(scalars["loss"].float())
            if accelerator.sync_gradients:
                if accelerator.scaler is not None:
                    accelerator.scaler.unscale_(run.optimizer)
                norm = accelerator.clip_grad_norm_(run.trained, config.clip)
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                if not math.isfinite(float(norm)):
                    run.stepper.zero_grad()
            run.stepper.step()
            run.stepper.zero_grad()
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / config.accumulate
    totals["gradient"] = float(norm)
    means: Any = accelerator.reduce(torch.tensor(list(totals.values()), device=accelerator.device), "mean")
    return dict(zip(totals, means.tolist(), strict=True))


def _greatest(accelerator: Accelerator, number: int) -> int:
    """The greatest of all ranks' numbers, on each of them."""
    all_of_them: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(all_of_them.max())
