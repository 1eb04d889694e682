"""The autoencoder tile by tile, and exactly: what is read from the tiles is the whole picture's, to rounding.

Tiles that are cut out, decoded and blended differ from the whole, for each is normalised by itself. Here every layer
runs over all tiles before the next one begins: a convolution reads its tile with the rim of neighbours that it needs,
and GroupNorm takes its mean and variance over the whole picture, merged from the tiles' (Chan, Golub and LeVeque 1983).
The middle, at the lowest resolution, is run whole. The device holds one tile's work; a layer's activations wait in the
machine's memory, or in a file.

Shapes: B pictures, C channels, H and W height and width of the picture, h and w of its latents, G groups of a norm.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.layers.convolution import fastest_layout
from ldm.models.autoencoder import (
    AutoencoderKL,
    Decoder,
    DecoderLevel,
    DiagonalGaussian,
    Downsample,
    Encoder,
    EncoderLevel,
    ResnetBlock,
    Upsample,
)

SMALLEST_TILE = 16


class Store(Protocol):
    """Makes the room where a layer's activations wait."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU of this shape and dtype, to be filled."""
        ...


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room in the machine's memory."""
    return torch.empty(shape, dtype=dtype)


@contextmanager
def in_files(folder: Path | None = None) -> Iterator[Store]:
    """Room in files of a folder, by default the system's own for such; all are gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="ldm-tiles-", dir=folder, ignore_cleanup_errors=True) as name:
        numbers = count()

        def store(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            path, size = Path(name) / str(next(numbers)), prod(shape)
            try:
                with path.open("xb") as file:
                    if hasattr(os, "posix_fallocate"):  # or a disk that is full only later would end the process
                        os.posix_fallocate(file.fileno(), 0, max(1, size * dtype.itemsize))
            except OSError as error:
                raise LdmError(f"{name}: no room for the tiles ({error.strerror}); free some, or set TMPDIR") from None
            room = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
            with suppress(PermissionError):  # Windows keeps a file that is mapped; it goes with the folder
                path.unlink()
            return room

        yield store


@torch.no_grad()
def decode_tiled(autoencoder: AutoencoderKL, latents: Tensor, tile: int, store: Store = in_memory) -> Tensor:
    """`AutoencoderKL.decode`: scaled latents (B, z, h, w) -> pictures (B, 3, h f, w f), on the latents' device.

    tile: side of a tile, in positions of the layer that is run, `SMALLEST_TILE` or more
    """
    check_tile(tile)
    config, decoder = autoencoder.config, autoencoder.decoder
    z = autoencoder.post_quant_conv(latents / config.scale_factor + config.shift_factor)
    middle = decoder.mid(decoder.conv_in(fastest_layout(z)))
    work = _Work(tile, config.norm_groups, latents.device, store)
    return _up(decoder, work.begin(middle), work).to(latents.device)


@torch.no_grad()
def posterior_tiled(
    autoencoder: AutoencoderKL, images: Tensor, tile: int, store: Store = in_memory
) -> DiagonalGaussian:
    """`AutoencoderKL.posterior`: images (B, 3, H, W) in [-1, 1] -> the unscaled latent's distribution.

    tile: as of `decode_tiled`
    """
    check_tile(tile)
    encoder = autoencoder.encoder
    device = next(autoencoder.parameters()).device
    work = _Work(tile, autoencoder.config.norm_groups, device, store)
    hidden = _down(encoder, _Waiting(images.cpu()), work).values.to(device)
    hidden = encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(fastest_layout(hidden)))))
    mean, log_variance = autoencoder.quant_conv(hidden).chunk(2, dim=1)
    return DiagonalGaussian(mean, log_variance.clamp(-30.0, 20.0))


def check_tile(tile: int | None) -> None:
    """Raises LdmError for a side that a tile cannot have."""
    if tile is not None and tile < SMALLEST_TILE:
        raise LdmError(f"vae_tile: found {tile}, expected {SMALLEST_TILE} or more")


@dataclass(frozen=True)
class _Moments:
    """Of some positions of each group: how many values, their mean and their squared distances from it, (B, G)."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, part: Tensor, groups: int) -> Self:
        values = part.float().unflatten(1, (groups, -1)).flatten(2)
        mean = values.mean(dim=2, keepdim=True)
        squares = (values - mean).square_().sum(dim=2, dtype=torch.float64)
        return cls(values.shape[2], mean.squeeze(2).double().cpu(), squares.cpu())

    def merged(self, other: _Moments) -> _Moments:
        """Of both together."""
        total, apart = self.count + other.count, other.mean - self.mean
        return _Moments(
            total,
            self.mean + apart * (other.count / total),
            self.squares + other.squares + apart**2 * (self.count * other.count / total),
        )


@dataclass(frozen=True)
class _Waiting:
    """A layer's activations over the whole picture, (B, C, h, w) on the CPU, and their moments where a norm follows."""

    values: Tensor
    moments: _Moments | None = None


@dataclass(frozen=True)
class _Work:
    tile: int
    groups: int
    device: torch.device
    store: Store

    def begin(self, hidden: Tensor) -> _Waiting:
        """What was computed whole, (B, C, h, w), is left to wait."""
        return _Waiting(hidden.cpu(), _Moments.of(hidden, self.groups))

    def convolve(
        self,
        source: _Waiting,
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None = None,
        *,
        larger: int = 1,
        over: _Waiting | None = None,
        skip: nn.Module | None = None,
    ) -> _Waiting:
        """Norm, SiLU, enlargement and convolution, over all tiles.

        conv: 3x3, with stride 1 and a rim of zeros, or with stride 2 and one at the right and the bottom
        norm: without one nothing is done before the convolution; larger: how often a position is repeated
        over: what `skip` makes of it is added, and where that has as many channels the result is put in its place
        """
        stride, before = conv.stride[0], 1 if conv.stride[0] == 1 else 0
        batch, _, height, width = source.values.shape
        shape = (batch, conv.out_channels, height * larger // stride, width * larger // stride)
        room = over.values if over is not None and over.values.shape == shape else None
        room = self.store(shape, source.values.dtype) if room is None else room
        moments: _Moments | None = None
        for rows, columns in _tiles(shape[2], shape[3], self.tile):
            spans = [
                slice(span.start * stride - before, (span.stop - 1) * stride - before + 3) for span in (rows, columns)
            ]
            part = self._read(source, spans[0], spans[1], norm, larger)
            part = F.conv2d(part, conv.weight, conv.bias, stride=stride)
            if over is not None and skip is not None:
                part = part + skip(fastest_layout(over.values[:, :, rows, columns].to(self.device)))
            room[:, :, rows, columns] = part
            found = _Moments.of(part, self.groups) if part.shape[1] % self.groups == 0 else None
            moments = found if moments is None or found is None else moments.merged(found)
        return _Waiting(room, moments)

    def block(self, source: _Waiting, block: nn.Module) -> _Waiting:
        """A residual block, in the place of `source` where it has as many channels."""
        assert isinstance(block, ResnetBlock)
        hidden = self.convolve(source, block.conv1, block.norm1)
        return self.convolve(hidden, block.conv2, block.norm2, over=source, skip=block.nin_shortcut)

    def _read(self, source: _Waiting, rows: slice, columns: slice, norm: nn.GroupNorm | None, larger: int) -> Tensor:
        """A part of what the convolution sees, on the device, with zeros where it reaches over the picture's edge."""
        reach, inside, pads = [], [], []
        for span, side in zip((rows, columns), source.values.shape[2:], strict=True):
            start, stop = max(span.start, 0), min(span.stop, side * larger)
            reach.append(slice(start // larger, -(-stop // larger)))
            inside.append(slice(start % larger, start % larger + stop - start))
            pads = [start - span.start, span.stop - stop, *pads]  # the last dimension comes first
        part = source.values[:, :, reach[0], reach[1]].to(self.device)
        if norm is not None:
            assert source.moments is not None
            part = F.silu(_normed(part, norm, source.moments))
        part = fastest_layout(part)
        if larger > 1:
            part = F.interpolate(part, scale_factor=float(larger), mode="nearest")[:, :, inside[0], inside[1]]
        return F.pad(part, pads)


def _normed(part: Tensor, norm: nn.GroupNorm, moments: _Moments) -> Tensor:
    """GroupNorm (Wu and He 2018) by the moments of the whole picture, computed in float32."""
    each = part.shape[1] // norm.num_groups
    spread = (moments.squares / moments.count + norm.eps).rsqrt()
    mean, spread = (
        t.float().to(part.device).repeat_interleave(each, dim=1)[..., None, None] for t in (moments.mean, spread)
    )
    scale = spread * norm.weight.float()[:, None, None]
    return ((part.float() - mean) * scale + norm.bias.float()[:, None, None]).to(part.dtype)


def _tiles(height: int, width: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            yield slice(top, min(top + tile, height)), slice(left, min(left + tile, width))


def _up(decoder: Decoder, hidden: _Waiting, work: _Work) -> Tensor:
    """The decoder from behind its middle, as `Decoder.forward`."""
    for level in reversed(decoder.up):
        assert isinstance(level, DecoderLevel)
        for block in level.block:
            hidden = work.block(hidden, block)
        if isinstance(level.upsample, Upsample):
            hidden = work.convolve(hidden, level.upsample.conv, larger=2)
    return work.convolve(hidden, decoder.conv_out, decoder.norm_out).values


def _down(encoder: Encoder, images: _Waiting, work: _Work) -> _Waiting:
    """The encoder up to its middle, as `Encoder.forward`."""
    hidden = work.convolve(images, encoder.conv_in)
    for level in encoder.down:
        assert isinstance(level, EncoderLevel)
        for block in level.block:
            hidden = work.block(hidden, block)
        if isinstance(level.downsample, Downsample):
            hidden = work.convolve(hidden, level.downsample.conv)
    return hidden
