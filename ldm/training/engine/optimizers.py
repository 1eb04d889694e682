"""What takes the steps: six optimizers behind one rate, and their whole state as tensors and numbers.

adamw         Loshchilov & Hutter 2019
muon          `ldm.training.engine.muon`
adamw8bit     AdamW that keeps a byte of each moment (Dettmers et al. 2022), by torchao
adafactor     Shazeer & Stern 2018: rows and columns in place of second moments, and no first; at the rate given
prodigy       Mishchenko & Defazio 2024: finds its own rate; `rate`, usually 1, multiplies it
schedulefree  Defazio et al. 2024: AdamW that averages its own steps, in place of a schedule and of the loop's average
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.errors import LdmError
from ldm.training.engine.ema import EMA
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.muon import Muon
from ldm.training.engine.split import part_of

Groups = list[tuple[list[nn.Parameter], float]]
"""Parameters, and what their rate is to the run's."""

PACKAGES = {
    "adamw8bit": "torchao", "adafactor": "transformers", "prodigy": "prodigyopt", "schedulefree": "schedulefree",
}  # fmt: skip
"""What an optimizer needs besides PyTorch."""

SET_BY_THE_LOOP = {"params", "lr", "factor", "weight_decay"}
"""Entries of an optimizer's groups that are no state of its own."""


def optimizer_for(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names. Raises LdmError where its package is missing, or it cannot do as asked."""
    told, rate, decay = _told(groups, config), config.rate, config.weight_decay
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(told, lr=rate, betas=config.betas, weight_decay=decay, fused=True)
        case "muon":
            return Muon(told, lr=rate, betas=config.betas, weight_decay=decay)
        case "adamw8bit":
            return _adamw8bit(told, config)
        case "adafactor":
            return _adafactor(told, config)
        case "prodigy":
            return _prodigy(told, config)
        case "schedulefree":
            return _schedulefree(told, config)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # as torchao holds it
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


def averages_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer has an average of its own, for `take_average`."""
    return hasattr(optimizer, "eval")


def take_average(optimizer: Any, module: nn.Module, ema: EMA) -> None:
    """Set `ema` to the average that a schedule-free optimizer keeps; the weights stay as they are, to the bit."""
    held = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    optimizer.eval()
    ema.swap()
    optimizer.train()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(held[name])


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state: tensors as 'parameter number.name', and numbers, of single parameters and of groups."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for i, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, DTensor):
                tensors[f"{i}.{name}"] = value
            elif hasattr(value, "__tensor_flatten__"):  # torchao's, of 8 bits
                parts, (signed, _) = value.__tensor_flatten__()
                tensors |= {f"{i}.{name}.{part}": getattr(value, part) for part in parts}
                numbers[f"{i}.{name}.signed"] = signed
            elif isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value
            else:
                numbers[f"{i}.{name}"] = value
    groups = [
        {name: value for name, value in group.items() if isinstance(value, int | float) and name not in SET_BY_THE_LOOP}
        for group in optimizer.param_groups
    ]
    own = [{name: value for name, value in group.items() if value != optimizer.defaults.get(name)} for group in groups]
    return tensors, {"state": numbers, "groups": own} if numbers or any(own) else {}


def unpack(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put back what `pack` took, every tensor in the precision that it had."""
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    quantized: dict[tuple[int, str], dict[str, Any]] = defaultdict(dict)
    for key, value in (tensors | numbers.get("state", {})).items():
        match key.split("."):
            case [i, name]:
                state[int(i)][name] = value
            case [i, name, part]:
                quantized[int(i), name][part] = value
    owners = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    for (i, name), parts in quantized.items():
        state[i][name] = _quantized(parts, owners[i][0].dtype)
    for i, values in state.items():
        parameter, group = owners[i]
        optimizer.state[parameter] = {name: _placed(value, parameter, group) for name, value in values.items()}
    for group, own in zip(optimizer.param_groups, numbers.get("groups", []), strict=False):
        group.update(own)


def _told(groups: Groups, config: LoopConfig) -> list[dict[str, Any]]:
    """The groups as an optimizer takes them."""
    told = []
    for parameters, factor in groups:
        common = {"lr": config.rate * factor, "factor": factor}
        if config.decayed == "all":
            told.append({"params": parameters, **common})
        else:
            told.append({"params": [p for p in parameters if p.ndim >= 2], **common})
            told.append({"params": [p for p in parameters if p.ndim < 2], **common, "weight_decay": 0.0})
    return told


def _adamw8bit(told: list[dict[str, Any]], config: LoopConfig) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise _missing(config) from None
    return AdamW8bit(told, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay)


def _adafactor(told: list[dict[str, Any]], config: LoopConfig) -> torch.optim.Optimizer:
    """transformers', since torch's own scales steps by a weight's size: LoRA's, which begin at 0, would stay there."""
    try:
        from transformers.optimization import Adafactor
    except ImportError:
        raise _missing(config) from None
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(told, lr=config.rate, weight_decay=config.weight_decay, **fixed)


def _prodigy(told: list[dict[str, Any]], config: LoopConfig) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise _missing(config) from None
    if len({group["factor"] for group in told}) > 1:
        raise LdmError("rates: optimizer prodigy finds one rate for all; give no separate ones, or another optimizer")
    decay: Any = config.weight_decay  # declared an int
    safe = {"safeguard_warmup": True, "use_bias_correction": True}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return Prodigy(told, lr=config.rate, betas=config.betas, weight_decay=decay, **safe)


def _schedulefree(told: list[dict[str, Any]], config: LoopConfig) -> torch.optim.Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise _missing(config) from None
    if config.schedule != "constant" or config.cooldown:
        raise LdmError("schedule: optimizer schedulefree needs none; leave it constant, with a cooldown of 0")
    optimizer = AdamWScheduleFree(told, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay)
    optimizer.train()
    return optimizer


def _missing(config: LoopConfig) -> LdmError:
    package = PACKAGES[config.optimizer]
    return LdmError(f"optimizer: {config.optimizer} needs {package}; run pip install {package}, or choose adamw")


def _quantized(parts: dict[str, Any], dtype: torch.dtype) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(**parts, dtype=dtype)


def _placed(value: Any, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """A tensor where the parameter is, and as it is split; counters stay on the CPU unless a fused optimizer counts."""
    if not isinstance(value, Tensor) or (value.ndim == 0 and not group.get("fused")):
        return value
    return part_of(value, parameter) if value.ndim else value.to(parameter.device)
