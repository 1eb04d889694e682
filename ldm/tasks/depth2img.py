"""Depth to image: a picture with the depth of another one, by a U-Net that is shown a depth map (SD 2 depth).

The map stands beside the latent at its size, each one stretched to [-1, 1] (Rombach, 2022: stable-diffusion-2-depth).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.images import fit, read_levels
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import Tell
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress, run
from ldm.tasks.common import refuse
from ldm.tasks.img2img import img2img_job
from ldm.tasks.txt2img import txt2img_job
from ldm.types import Conditioning
from ldm.weights.io import printable

LEVEL = 1.0
"""The smallest difference that a file with 16 bits can hold."""


@torch.inference_mode()
def depth2img(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Redraw `request.image`, or draw from noise where there is none, with the depth of `request.depth`.

    Raises `LdmError` where the model or the request has no depth, and as `ldm.pipeline.sample.run` does.
    """
    refuse(request, ("mask", "extend"), "depth")
    yield from run(model, (txt2img_job if request.image is None else img2img_job)(model, request, depth_shown))


def depth_shown(model: LatentDiffusion, request: GenerateRequest) -> tuple[Tell, tuple[str, ...]]:
    """A `Show`: the depth map of a resolved request. It is scaled and cut to the request's size, as `image` is."""
    if request.depth is None:
        raise LdmError("depth: found none, expected a depth map; give depth, or make one by ldm.models.depth")
    if model.config.unet.in_channels - model.config.autoencoder.latent_channels != 1:
        name = printable(str(model.origin.path or "model"))
        raise LdmError(f"{name}: takes no depth map, expected Stable Diffusion 2 depth; use another one")
    assert request.width is not None and request.height is not None
    levels = fit(read_levels(request.depth), request.width, request.height)
    _, *size = model.latent_shape(request.width, request.height)
    return partial(_with_depth, stretched(levels, size).to(model.device)), ()


def stretched(levels: Image.Image, size: list[int]) -> Tensor:
    """A depth map of mode F -> (1, 1, h, w) for a size (h, w), from -1, the farthest, to 1; zeros if all is one."""
    depth = torch.from_numpy(np.array(levels))[None, None]
    depth = F.interpolate(depth, size, mode="bicubic", align_corners=False)
    low, high = float(depth.min()), float(depth.max())
    return torch.zeros_like(depth) if high - low < LEVEL else 2 * (depth - low) / (high - low) - 1


def _with_depth(depth: Tensor, cond: Conditioning) -> Conditioning:
    return cond.with_(concat=depth)
