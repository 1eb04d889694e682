"""The training loop. It knows no objective, no data set and no network: only steps.

Step k draws everything random from a generator seeded by (seed, k), so a run that was stopped and resumed takes the
very same steps as one that was not, and nothing about data position needs saving.

Under `accelerate launch` every process (a rank) runs this loop: gradients are averaged over ranks, each rank draws its
own batches, the first one alone evaluates, logs and saves, and a signal to any of them stops all at the same step.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.ema import EMA
from ldm.training.muon import Muon
from ldm.training.state import RunState, check_facts, flatten_optimizer, load_state, restore_optimizer, save_state

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class Objective(nn.Module):
    """What is trained: a module that holds the trained networks and knows its data.

    Called with a batch it returns scalars by name, of which "loss" is minimised.
    """

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """One batch on the CPU, all its randomness drawn from the generator."""
        raise NotImplementedError

    def facts(self) -> dict[str, object]:
        """What, besides the LoopConfig, a resumed run must have in common with the one that was begun; plain data."""
        return {}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Figures to log, with the averaged weights in place; pictures may be written into the folder."""
        raise NotImplementedError


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast. `batch` is each rank's.

    optimizer: AdamW (Loshchilov & Hutter 2019), or Muon for the matrices; the rate means the same to both.

    schedule: after `warmup` steps "constant" keeps the rate and lets it fall to nought over the last `cooldown` steps;
    "cosine" lets it fall all the way. The last step of a run is `steps`; a finished run may be given more.
    decayed: which weights decay: all, or matrices alone and no gains, biases or single numbers.
    """

    steps: int
    batch: int
    rate: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: int = 200
    schedule: Literal["constant", "cosine"] = "constant"
    cooldown: int = 0
    weight_decay: float = 0.01
    decayed: Literal["all", "matrices"] = "all"
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1
    precision: Literal["no", "fp16", "bf16"] = "bf16"
    compile: bool = False
    seed: int = 0
    save_every: int = 1000
    evaluate_every: int = 1000
    log_every: int = 50


FREE_TO_CHANGE = {
    *("steps", "cooldown", "rate", "ema"),
    *("save_every", "evaluate_every", "log_every", "compile", "precision"),
}
"""Fields of LoopConfig that a resumed run may have changed."""
BAD_STEPS_ALLOWED = 10


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate at a step, 0-based."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        progress = min(1.0, step / max(1, config.steps))
        return config.rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
    left = (config.steps - step) / config.cooldown if config.cooldown else 1.0
    return config.rate * warm * max(0.0, min(1.0, left))


def step_generator(seed: int, step: int, micro: int = 0, rank: int = 0) -> torch.Generator:
    """The source of all randomness of one micro-batch."""
    return torch.Generator().manual_seed((((seed * 1_000_003 + step) * 1009 + micro) * 10_007 + rank) % 2**63)


def rank_and_ranks() -> tuple[int, int]:
    """Which process this is, and of how many that train together; (0, 1) where there is but one."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks wait, for six hours at most, until the first one has left this block: it may prepare files."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    with state.main_process_first():
        yield


def train(objective: Objective, config: LoopConfig, output: Path) -> EMA:
    """Run or resume training in the folder `output`; returns the averaged weights.

    The first SIGINT or SIGTERM lets the step end and saves; then KeyboardInterrupt or SystemExit(143) is raised. A
    step whose loss or gradient is not finite is skipped and counted; ten in a row raise LdmError, the last save
    untouched. Raises LdmError where `output` holds a run of another kind.
    """
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        cpu=not torch.cuda.is_available(),
    )
    optimizer = _optimizer(objective, config)
    objective.to(accelerator.device)
    if config.compile:
        objective.compile()
    ema = EMA(objective, config.ema)
    facts = {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE}
    facts |= {"processes": accelerator.num_processes, **objective.facts()}
    start = _resume(output, facts, objective, ema, optimizer)
    model, optimizer = accelerator.prepare(objective, optimizer)
    output.mkdir(parents=True, exist_ok=True)

    def save(step: int) -> None:
        if accelerator.is_main_process:
            tensors = {
                "weights": {n: p for n, p in objective.named_parameters() if p.requires_grad},
                "ema": ema.state_dict(),
                "optimizer": flatten_optimizer(optimizer),
                "buffers": _buffers(objective),
            }
            save_state(output, RunState(step, facts, {name: held for name, held in tensors.items() if held}))

    bad, clock, seen = 0, time.perf_counter(), 0
    with _stop_signal() as stop:
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            figures = _step(objective, model, optimizer, accelerator, config, step)
            finite = math.isfinite(figures["loss"]) and math.isfinite(figures["gradient"])
            bad = 0 if finite else bad + 1
            if bad == BAD_STEPS_ALLOWED:
                raise LdmError(f"step {step}: the loss was not finite {bad} times in a row; lower the rate and resume")
            if finite:
                ema.update(objective, step)
            seen += config.batch * config.accumulate * accelerator.num_processes
            done = step + 1
            if done % config.log_every == 0 and accelerator.is_main_process:
                now = time.perf_counter()
                text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
                log.info("step %d/%d  %s  %.1f/s", done, config.steps, text, seen / (now - clock))
                clock, seen = now, 0
            saved = done % config.save_every == 0 or done == config.steps
            if saved:
                save(done)
            due = done % config.evaluate_every == 0 or done == config.steps
            if due and accelerator.is_main_process and not stop():
                _evaluate(objective, ema, output, done)
            if signalled := _greatest(accelerator, stop()):
                if not saved:
                    save(done)
                if accelerator.is_main_process:
                    log.info("stopped at step %d, saved in %s", done, output)
                accelerator.wait_for_everyone()  # a launcher kills the others as soon as one has left
                raise KeyboardInterrupt if signalled == signal.SIGINT else SystemExit(128 + signalled)
    accelerator.wait_for_everyone()
    return ema


def _optimizer(objective: Objective, config: LoopConfig) -> torch.optim.Optimizer:
    groups = _groups(objective, config)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _groups(objective: Objective, config: LoopConfig) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer takes them."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    if config.decayed == "all":
        return [{"params": trained}]
    spared = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return [{"params": [p for p in trained if p.ndim >= 2]}, spared]


def _resume(
    output: Path, facts: dict[str, object], objective: Objective, ema: EMA, optimizer: torch.optim.Optimizer
) -> int:
    """Put back the newest save, if there is one; returns the number of steps already done."""
    state = load_state(output)
    if state is None:
        return 0
    check_facts(output, state.facts, {name: value for name, value in facts.items() if name in state.facts})
    parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    weights = state.tensors["weights"]
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise LdmError(f"{output}: holds a run of another network; give another --output")
    buffers = _buffers(objective)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
        for name, value in state.tensors.get("buffers", {}).items():
            buffers[name].copy_(value)
    ema.load_state_dict(state.tensors["ema"])
    restore_optimizer(optimizer, state.tensors.get("optimizer", {}))  # none where no step was ever finite
    log.info("resuming %s at step %d", output, state.step)
    return state.step


def _buffers(objective: Objective) -> dict[str, Tensor]:
    """What training changes besides parameters: the running means of batch normalisation."""
    parameters = {name for name, _ in objective.named_parameters()}
    return {name: held for name, held in objective.state_dict().items() if name not in parameters}


def _greatest(accelerator: Accelerator, number: int) -> int:
    """The greatest of all ranks' numbers, on each of them."""
    all_of_them: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(all_of_them.max())


def _step(
    objective: Objective,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    config: LoopConfig,
    step: int,
) -> dict[str, float]:
    """One optimizer step over `accumulate` micro-batches; the weights stay as they are if it is not finite.

    Returns the mean over ranks of what the objective said, so that all ranks judge it alike.
    """
    totals: dict[str, float] = {}
    norm: Any = 0.0
    for micro in range(config.accumulate):
        generator = step_generator(config.seed, step, micro, accelerator.process_index)
        batch = {k: v.to(accelerator.device) for k, v in objective.batch(config.batch, generator).items()}
        torch.manual_seed(generator.initial_seed())  # for networks with dropout, which draw from torch's own generator
        with accelerator.accumulate(model):
            scalars = model(batch)
            accelerator.backward(scalars["loss"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
                if not math.isfinite(float(norm)):
                    optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / config.accumulate
    totals["gradient"] = float(norm)
    means: Any = accelerator.reduce(torch.tensor(list(totals.values()), device=accelerator.device), "mean")
    return dict(zip(totals, means.tolist(), strict=True))


def _evaluate(objective: Objective, ema: EMA, output: Path, step: int) -> None:
    """Let the objective look at itself with the averaged weights. A failure is logged: the run outlives it."""
    ema.swap(objective)
    objective.eval()
    try:
        # Compiling the network anew for the few shapes of an evaluation would cost minutes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            figures = objective.evaluate(output, step)
    except Exception:
        log.warning("step %d: its evaluation failed, training goes on", step, exc_info=True)
        return
    finally:
        objective.train()
        ema.swap(objective)
    log.info("step %d  %s", step, " ".join(f"{name} {value:.4f}" for name, value in figures.items()))


@contextmanager
def _stop_signal() -> Iterator[Callable[[], int]]:
    """Turn the first SIGINT or SIGTERM into a number that the loop asks for, 0 before; the second acts as ever."""
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
