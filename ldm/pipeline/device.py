"""On which device a model runs, in which dtype each of its parts, and whether there was memory for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.errors import LdmError
from ldm.models.presets import Family
from ldm.weights.io import printable

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip

MEMORY = Path("/proc/meminfo")
"""Where Linux tells of the machine's memory."""


@dataclass(frozen=True)
class Precision:
    """The dtype of each part."""

    unet: torch.dtype
    text: torch.dtype
    autoencoder: torch.dtype

    def __str__(self) -> str:
        names = (str(dtype).removeprefix("torch.") for dtype in (self.unet, self.text, self.autoencoder))
        return "U-Net {}, text {}, autoencoder {}".format(*names)


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device that is meant. Raises LdmError where this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LdmError(f"device {printable(str(name))}: not known; expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found == 0:
            raise LdmError(f"device {name}: no CUDA GPU was found; use --device cpu")
        if (device.index or 0) >= found:
            raise LdmError(f"device {name}: this machine has {found} CUDA GPUs; use cuda:0 to cuda:{found - 1}")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise LdmError("device mps: this machine has none; use --device cpu")
    elif device.type != "cpu":
        raise LdmError(f"device {name}: not supported; expected auto, cpu, cuda, cuda:N or mps")
    return device


def check_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype that is named, None for "auto". Raises LdmError for one that is not known or that the device lacks."""
    if dtype == "auto":
        return None
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in DTYPES.values():
        raise LdmError(f"dtype {printable(str(dtype))}: not known; expected auto, float32, bfloat16 or float16")
    if wanted is torch.float16 and device.type == "cpu":
        raise LdmError("dtype float16: not supported on a CPU; use bfloat16 or float32")
    return wanted


def choose_precision(dtype: str | torch.dtype, device: torch.device, family: Family) -> Precision:
    """The dtype of every part for a named one, or for "auto": float16 on a GPU; on a CPU bfloat16 where it multiplies
    that natively, else float32.

    The name is the U-Net's. The autoencoder and, on a GPU, the text towers follow it, but for SDXL's autoencoder, which
    overflows in float16 and gets bfloat16 or float32. On a CPU text towers stay in float32: they take hardly any time.
    """
    wanted = check_dtype(dtype, device)
    if device.type == "cpu":
        wanted = wanted or (torch.bfloat16 if multiplies_bfloat16(device) else torch.float32)
        return Precision(wanted, torch.float32, wanted)
    wanted = wanted or torch.float16
    if wanted is torch.float16 and family in ("sdxl", "sdxl-refiner"):
        return Precision(wanted, wanted, torch.bfloat16 if multiplies_bfloat16(device) else torch.float32)
    return Precision(wanted, wanted, wanted)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; one that has not computes in it all the same, but slowly.

    A GPU that is not there, and only planned for, is taken for one of today.
    """
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def available_memory(device: torch.device) -> int | None:
    """How many bytes of its memory are free, on a CPU without swapping; None where the system does not tell.

    What PyTorch keeps of a GPU's for itself is free to it, up to the share that it may have.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free + torch.cuda.memory_reserved(device), allowed) - used
    if device.type == "cpu" and MEMORY.exists():
        found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMORY.read_text(), re.MULTILINE)
        return None if found is None else int(found[1]) * 1024
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine has no memory left."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
