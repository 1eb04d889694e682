"""Outpainting: a picture is continued beyond its edges, and stays within them bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.pipeline.images import read_picture
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.masks import mask_of
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.inpaint import redraw


@torch.inference_mode()
def outpaint(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Continue `request.image` by `request.extend` pixels, and redraw what its mask says, if there is one.

    The new part is first filled with the picture's mirror image, which is what it starts from at a strength below 1,
    and what the drawn fades into towards the picture. Raises `LdmError` as `ldm.tasks.inpaint.inpaint` does.
    """
    for name in ("image", "extend"):
        if getattr(request, name) is None:
            raise LdmError(f"{name}: found none, expected a picture and how far to continue it; give {name}")
    assert request.image is not None and request.extend is not None
    picture = read_picture(request.image)
    left, top, right, bottom = request.extend
    margins = (top, bottom), (left, right)
    canvas = Image.fromarray(np.pad(np.asarray(picture), (*margins, (0, 0)), mode="symmetric"))
    inside = np.zeros(picture.size[::-1], dtype=np.float32) if request.mask is None else mask_of(request)
    yield from redraw(model, request, canvas, np.pad(inside, margins, constant_values=1.0))
