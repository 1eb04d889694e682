"""A run under way: what belongs to it, and how it is put on disk and back."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.engine.ema import EMA
from ldm.training.engine.loop_config import FREE_TO_CHANGE, LoopConfig
from ldm.training.engine.objective import Objective
from ldm.training.engine.optimizers import averages_itself, pack, take_average, unpack
from ldm.training.engine.ranks import first_says
from ldm.training.engine.split import put, whole
from ldm.training.engine.state import RunState, check_facts, load_state, save_state

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """What a step needs.

    model:    the objective as the accelerator runs it; stepper: the optimizer as it does
    average:  the averaged weights, see `update_average`
    split:    whether each process has but a part of the weights; then all of them evaluate and save together
    """

    objective: Objective
    config: LoopConfig
    output: Path
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: Any
    average: EMA
    split: bool

    @property
    def first(self) -> bool:
        """Whether this process is the one that evaluates, logs and saves."""
        return self.accelerator.is_main_process

    @property
    def trained(self) -> list[nn.Parameter]:
        """All that the optimizer has: to look through the networks for it would take milliseconds."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def batches(self) -> int:
        """Of a step, over all ranks."""
        return self.config.accumulate * self.accelerator.num_processes

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done now and then is done after so many steps."""
        return step > 0 and (step % every == 0 or step == self.config.steps)

    def looks_at(self, step: int) -> bool:
        """Whether this process evaluates, or helps to, after so many steps."""
        return (self.first or self.split) and self.due(step, self.config.evaluate_every)

    def agreed(self, answer: bool) -> bool:
        """The first process's answer, where several look together; else this one's own."""
        return first_says(answer) if self.split else answer

    def facts(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that was begun."""
        config, processes = self.config, self.accelerator.num_processes
        split = {"batch": config.batch, "accumulate": config.accumulate, "processes": processes}
        kept = {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE | split.keys()}
        whole = split if self.objective.rows_meet() else {" x ".join(split): config.batch * self.batches}
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        return {**whole, **self.objective.facts(), **kept, "parameters in groups": groups}

    def update_average(self, step: int | None = None) -> None:
        """After step number `step`, and without one before the average is looked at: some optimizers keep it."""
        if averages_itself(self.optimizer):
            if step is None:
                take_average(self.optimizer, self.objective, self.average)
        elif step is not None:
            self.average.update(step)


def save(run: Run, step: int) -> None:
    """Save the first rank's state, all ranks' being alike, or what their parts are together: the files are the same.

    Raises LdmError rather than save weights that are lost.
    """
    if not (run.first or run.split):
        return
    run.update_average()
    optimizer, numbers = pack(run.optimizer)
    tensors: dict[str, dict[str, Tensor]] = {
        "weights": dict(_trained(run.objective)),
        "ema": run.average.state_dict(),
        "optimizer": optimizer,
        "buffers": _buffers(run.objective),
    }
    if run.split:
        tensors = {name: whole(held, keep=run.first) for name, held in tensors.items()}
        if not run.first:
            return
    if not all(bool(value.isfinite().all()) for value in tensors["weights"].values()):
        raise LdmError(f"step {step}: the weights are not finite, and were not saved; lower the rate and resume")
    scaler = run.accelerator.scaler  # of fp16
    numbers = {"optimizer": numbers, "scaler": {} if scaler is None else scaler.state_dict()}
    state = RunState(step, run.facts(), {name: held for name, held in tensors.items() if held}, numbers)
    save_state(run.output, state, run.config.keep)


def resume(run: Run) -> int:
    """Put back the newest save, if there is one; returns the number of steps already done."""
    state = load_state(run.output)
    if state is None:
        return 0
    check_facts(run.output, state.facts, run.facts())
    parameters, buffers, weights = _trained(run.objective), _buffers(run.objective), state.tensors["weights"]
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise LdmError(f"{run.output}: holds a run of another network; give another --output")
    with torch.no_grad():
        for name, value in weights.items():
            put(parameters[name], value)
        for name, value in state.tensors.get("buffers", {}).items():
            buffers[name].copy_(value)
    run.average.load_state_dict(state.tensors["ema"])
    optimizer = state.tensors.get("optimizer", {})  # none where no step was ever finite
    unpack(run.optimizer, optimizer, state.numbers.get("optimizer", {}))
    if run.accelerator.scaler is not None and state.numbers.get("scaler"):
        run.accelerator.scaler.load_state_dict(state.numbers["scaler"])
    log.info("resuming %s at step %d", run.output, state.step)
    return state.step


def _trained(objective: Objective) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def _buffers(objective: Objective) -> dict[str, Tensor]:
    """What training changes besides parameters: the running means of batch normalisation."""
    parameters = {name for name, _ in objective.named_parameters()}
    return {name: held for name, held in objective.state_dict().items() if name not in parameters}
