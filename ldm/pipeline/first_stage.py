"""Pictures to latents and back: whole where there is room, in tiles where there is not; the result is the same.

Shapes: B pictures, z latent channels, h and w latent height and width, H and W picture height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.pixel_blocks import FirstStage
from ldm.models.tiled import Store, decode_tiled, in_files, in_memory, posterior_tiled
from ldm.pipeline.device import available_memory, is_out_of_memory

TILE = 256
"""The side of the tiles where nobody asked for them, in positions of a layer."""


def decode(autoencoder: FirstStage, latents: Tensor, tile: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Latents (B, z, h, w) -> pictures (B, 3, H, W) in [-1, 1], and notes about them.

    tile: in tiles of this side; None: only where the memory that is free would not do, or did not

    What is not finite is decoded again in float32 (half precision overflows in some autoencoders). Raises `LdmError`
    where that does not help: there is never a black picture in place of an error.
    """
    dtype = next(autoencoder.parameters()).dtype
    pixels, notes = _decode(autoencoder, latents.to(dtype), tile)
    if not torch.isfinite(pixels).all() and dtype != torch.float32:
        pixels, notes = _decode(copy.deepcopy(autoencoder).float(), latents.float(), tile)
        notes = (*notes, f"decoded in float32, since the autoencoder overflowed in {str(dtype).removeprefix('torch.')}")
    if not torch.isfinite(pixels).all():
        raise LdmError("autoencoder: the decoded picture is not finite; its part of the file is damaged")
    pixels = pixels.clamp(-1, 1)
    if bool((pixels.flatten(2).std(dim=2) < 2 / 255).all(dim=1).any()):
        notes = (*notes, "the picture is of one colour")
    return pixels, notes


def encode(autoencoder: FirstStage, pictures: Tensor, tile: int | None = None) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> the mode of their scaled latents, (B, z, h, w), float32. tile: as above."""
    pictures = pictures.to(next(autoencoder.parameters()))
    if not isinstance(autoencoder, AutoencoderKL):
        return autoencoder.encode(pictures).float()

    def tiled(side: int, short: bool) -> Tensor:
        with _waiting(pictures.device, short) as store:
            mode = posterior_tiled(autoencoder, pictures, side, store).mode()
        return (mode - autoencoder.config.shift_factor) * autoencoder.config.scale_factor

    latents, _ = _by_room(autoencoder, pictures, tile, lambda: autoencoder.encode(pictures), tiled)
    return latents.float()


def _decode(autoencoder: FirstStage, latents: Tensor, tile: int | None) -> tuple[Tensor, tuple[str, ...]]:
    if not isinstance(autoencoder, AutoencoderKL):
        return autoencoder.decode(latents).float(), ()

    def tiled(side: int, short: bool) -> Tensor:
        with _waiting(latents.device, short) as store:
            return decode_tiled(autoencoder, latents, side, store).clone()

    f = autoencoder.config.downsampling
    sized = latents.new_empty((len(latents), 3, latents.shape[2] * f, latents.shape[3] * f), device="meta")
    pixels, notes = _by_room(autoencoder, sized, tile, lambda: autoencoder.decode(latents), tiled)
    return pixels.float(), notes


def _by_room(
    autoencoder: AutoencoderKL,
    pictures: Tensor,
    tile: int | None,
    whole: Callable[[], Tensor],
    tiled: Callable[[int, bool], Tensor],
) -> tuple[Tensor, tuple[str, ...]]:
    """What `whole` gives, or `tiled`, and what to say of that. pictures: (B, 3, H, W), their size and dtype count."""
    device = next(autoencoder.parameters()).device
    free, takes = available_memory(device), whole_takes(autoencoder, pictures)
    if tile is not None:
        return tiled(tile, free is not None and takes > free), ()
    if free is None or takes <= free:
        try:
            return whole(), ()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
    why = f"whole it takes about {takes / 2**30:.1f} GiB, and {(free or 0) / 2**30:.1f} GiB are free"
    return tiled(TILE, True), (f"the autoencoder works in tiles, which changes nothing else: {why}",)


def whole_takes(autoencoder: AutoencoderKL, pictures: Tensor) -> int:
    """About how many bytes encoding or decoding at once holds, pictures (B, 3, H, W): the widest block at full size."""
    batch, _, height, width = pictures.shape
    base, mults = autoencoder.config.base_channels, autoencoder.config.channel_mult
    wide, narrow = base * mults[min(1, len(mults) - 1)], base * mults[0]
    return batch * height * width * (3 * wide + 2 * narrow) * pictures.element_size()


def _waiting(device: torch.device, short: bool) -> AbstractContextManager[Store]:
    """Where activations wait: in the machine's memory, or in files where it is the machine's memory that is short."""
    return in_files() if short and device.type == "cpu" else nullcontext(in_memory)
