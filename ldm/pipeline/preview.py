"""How an unfinished picture looks, in little time: by a tiny autoencoder, or by its colours alone.

Shapes: B pictures, z latent channels, h and w latent height and width, f downsampling factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LdmError
from ldm.layers.convolution import fastest_layout
from ldm.models.tiny_autoencoder import TinyAutoencoder
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.weights.architecture import is_tiny_autoencoder, tiny_autoencoder_config, under
from ldm.weights.find import locate, model_roots
from ldm.weights.io import printable
from ldm.weights.layout import FIRST_STAGE, unfilled
from ldm.weights.source import open_source
from ldm.weights.tiny_autoencoder import check_latents, whole_tiny

Look = Callable[[Tensor], Tensor]
"""Latents (B, z, h, w) -> pictures (B, 3, h f, w f), about [-1, 1]."""

PATCHES = 8
"""Along each side of the latent of patches whose colours a map is fitted to, each 2 x 2 positions large."""


def tiny_look(
    model: LatentDiffusion,
    given: str | Path,
    *,
    allow_pickle: bool = False,
    models: Sequence[str | Path] | None = None,
) -> Look:
    """By the tiny autoencoder in a file, on the model's device. Raises `LdmError` where it holds none that fits."""
    part = open_source(locate("vae", given, model_roots(models)), allow_pickle=allow_pickle)
    shapes = under(whole_tiny(part, allow_pickle=allow_pickle).shapes, FIRST_STAGE)
    try:
        if not is_tiny_autoencoder(shapes):
            raise LdmError("is no tiny autoencoder; expected one, as TAESD, for a preview that takes little time")
        config = tiny_autoencoder_config(shapes)
        check_latents(config, model.config)
    except LdmError as error:
        raise LdmError(f"{printable(str(part.path))}: {error}") from None
    decoder = unfilled(lambda: TinyAutoencoder(config)).decoder
    prefix = f"{FIRST_STAGE}decoder."
    state = {
        name.removeprefix(prefix): fastest_layout(tensor.to(model.device, model.dtype))
        for name, tensor in part.read(prefix + name for name in decoder.state_dict())
    }
    decoder.load_state_dict(state, assign=True)

    @torch.inference_mode()
    def look(latents: Tensor) -> Tensor:
        return decoder(fastest_layout(latents.to(model.dtype))).float() * 2 - 1

    return look


@torch.inference_mode()
def colours_look(model: LatentDiffusion) -> Look:
    """By a linear map from a position's channels to its colour, fitted to what the model's own decoder makes of noise.

    A latent is nearly a small picture in other colours. The noise comes in patches, since a decoder makes texture, and
    not colour, of neighbours that have nothing in common.
    """
    f, z = model.config.autoencoder.downsampling, model.config.autoencoder.latent_channels
    patches = torch.randn(1, z, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(patches, scale_factor=2).to(model.device)
    autoencoder = model.present(model.autoencoder)
    pixels = autoencoder.decode(latents.to(next(autoencoder.parameters()))).float()
    colours = F.avg_pool2d(pixels.clamp(-1, 1), f)
    rows = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0).flatten(2)[0].T  # a last channel of ones, for the offset
    fitted = torch.linalg.lstsq(rows.cpu(), colours.flatten(2)[0].T.cpu()).solution.T.to(model.device)

    @torch.inference_mode()
    def look(latents: Tensor) -> Tensor:
        small = F.conv2d(latents.float(), fitted[:, :z, None, None], fitted[:, z])
        return F.interpolate(small, scale_factor=f, mode="bilinear")

    return look
