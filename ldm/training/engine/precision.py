"""In which precision a run computes: float32, or mixed with halves where the device multiplies these natively.

Micikevicius et al. 2018: weights stay float32, and layers whose result bears it run on copies in a half.
"""

from __future__ import annotations

import platform
from dataclasses import replace

import torch

from ldm.errors import LdmError
from ldm.pipeline.device import multiplies_bfloat16
from ldm.training.engine.loop_config import LoopConfig, Precision

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What layers run in, by the names that flags and files have for it."""


def resolved(config: LoopConfig, device: torch.device) -> LoopConfig:
    """The same config with its precision as it will be on this device, "auto" no more. Raises as `precision_on`."""
    return replace(config, precision=precision_on(device, config.precision))


def precision_on(device: torch.device, asked: Precision = "auto") -> Precision:
    """What is asked for; for "auto" bf16 where the device multiplies that natively, else fp16 on a GPU, no on a CPU.

    Raises LdmError for fp16 without a GPU.
    """
    if asked == "fp16" and device.type != "cuda":
        raise LdmError("precision: found fp16, which needs a GPU; use bf16 or no")
    if asked != "auto":
        return asked
    if multiplies_bfloat16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "no"


def slowness(device: torch.device, asked: Precision) -> str | None:
    """A line about a precision that was asked for and that the device has no instructions for; None where it has them.

    Of Apple's GPUs and of CPUs other than x86 PyTorch does not tell, so that nothing is said of these.
    """
    told = device.type == "cuda" or (device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"))
    if asked != "bf16" or not told or multiplies_bfloat16(device):
        return None
    better = precision_on(device)
    return f"precision: bf16 was asked for, which this {device.type} emulates, many times slower; {better} is faster"


def mixed(device: torch.device, precision: Precision) -> torch.autocast:
    """Layers called within run in this precision, which is not "auto"."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "no")
