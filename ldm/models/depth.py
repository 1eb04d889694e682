"""How far away everything in a picture is, guessed by a depth-estimation model of transformers (Ranftl et al. 2021).

The model is a folder on this machine, as `save_pretrained` writes it: nothing is ever downloaded, and no code that such
a folder may hold is run. Shapes: h and w the height and width that the model answers in.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.errors import LdmError

if TYPE_CHECKING:
    from torch import Tensor

BROKEN = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError)
"""What transformers raises for a folder that is incomplete, damaged, or of a kind that it does not know."""


@torch.inference_mode()
def estimate(path: str | Path, image: Image.Image) -> Image.Image:
    """A picture -> its depth map, 16 bit grey (mode I;16) of the same size: the nearest is white, the farthest black.

    path: a folder with a model for depth estimation (DPT, Depth Anything, ...), or a diffusers pipeline that has one.
    Raises `LdmError`, in one line, where it is none, or says something that is not finite.
    """
    folder, name = Path(path), repr(str(path))
    if (folder / "depth_estimator").is_dir():
        folder = folder / "depth_estimator"
    _check(folder, name)
    processor, network = _load(folder, name)
    answer = network(**processor(images=image.convert("RGB"), return_tensors="pt")).predicted_depth
    if not torch.isfinite(answer).all():
        raise LdmError(f"{name}: its depth map is not finite; the file is damaged")
    return _grey(_nearness(network.config, answer.float()), image.size)


def _check(folder: Path, name: str) -> None:
    """The folder says of itself that it is for depth estimation, and transformers is there to run it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = config["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LdmError(
            f"{name}: found no config.json of a model there, expected a folder with a depth-estimation model of"
            " transformers; download one first"
        ) from None
    if not (isinstance(kinds, list) and any(str(kind).endswith("ForDepthEstimation") for kind in kinds)):
        raise LdmError(f"{name}: its config.json names no depth-estimation model, expected DPT or its kin")
    if importlib.util.find_spec("transformers") is None:
        raise LdmError("depth: needs transformers, which is not installed; pip install transformers")


def _load(folder: Path, name: str) -> tuple[Any, Any]:
    """What brings a picture into the model's form, and the model. In a pipeline of diffusers they lie side by side."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    beside = folder.parent / "feature_extractor"
    home = folder if (folder / "preprocessor_config.json").exists() or not beside.is_dir() else beside
    try:
        processor = AutoImageProcessor.from_pretrained(home, local_files_only=True, trust_remote_code=False)
        network = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except BROKEN as error:
        said = " ".join(str(error).split())[:200]
        raise LdmError(f"{name}: cannot be loaded as a depth-estimation model ({said})") from None
    return processor, network.eval()


def _nearness(config: Any, answer: Tensor) -> Tensor:
    """Most answer how near everything is; metric ones how far, in metres, whose inverse is what the others answer."""
    metric = getattr(config, "depth_estimation_type", None) == "metric" or config.model_type in ("glpn", "zoedepth")
    return 1 / answer.clamp(min=1e-3) if metric else answer


def _grey(nearness: Tensor, size: tuple[int, int]) -> Image.Image:
    """(1, h, w) -> a 16 bit grey image of a (width, height), from black to white; black if all is one."""
    nearness = F.interpolate(nearness[None], size[::-1], mode="bicubic", align_corners=False)[0, 0]
    low, high = nearness.min(), nearness.max()
    share = (nearness - low) / (high - low) if high > low else torch.zeros_like(nearness)
    return Image.fromarray((share * 65535).round().cpu().numpy().astype(np.uint16))
