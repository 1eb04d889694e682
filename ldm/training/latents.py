"""What the diffusion stage is trained on, worked out once: latents of all pictures, text states of all captions.

FOLDER/latents.npy   float16 (N, z, h, w)   FOLDER/flips.npy   bool (N,), may picture i be mirrored
FOLDER/states.npy    float16 (M, 77, D)     FOLDER/first.npy   int64 (N + 1,), captions of picture i
FOLDER/pooled.npy    float16 (M, P)         the last row of both is of no caption

They are written into a folder that gets its name when all of them are whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldm.data.records import Record, may_flip
from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.presets import TextUse
from ldm.models.text_encoder import TextTower
from ldm.models.tokenizer import tokenize
from ldm.training.autoencoder import to_unit
from ldm.training.diffusion import LatentPictures
from ldm.training.engine.precision import mixed, precision_on
from ldm.training.whitening import TextWhitening, whitening_of

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
WORDS = slice(1, 14)
"""The tokens whose states are measured for whitening: where words stand in most captions."""
MEASURED = 3000
"""About how many captions are measured."""


@torch.no_grad()
def centre_latents(autoencoder: AutoencoderKL, pictures: np.ndarray) -> None:
    """Give every latent channel mean 0 and deviation 1 over `pictures`, uint8 (N, H, W, 3), by changing the weights.

    The 1x1 convolutions on both sides of the latent take an affine map exactly, so nothing else has to know of it
    and the scale factor is 1.
    """
    means = torch.cat([autoencoder.posterior(to_unit(part)).mean for part in _parts(pictures, 64)])
    mean, deviation = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    z = len(mean)
    inner, outer = autoencoder.quant_conv, autoencoder.post_quant_conv
    assert inner.bias is not None and outer.bias is not None
    inner.weight[:z] /= deviation[:, None, None, None]
    inner.bias[:z] = (inner.bias[:z] - mean) / deviation
    inner.bias[z:] -= 2 * deviation.log()
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= deviation[None, :, None, None]


@torch.no_grad()
def encode_pictures(
    autoencoder: AutoencoderKL, pictures: np.ndarray, records: Sequence[Record], folder: Path, batch: int = 64
) -> None:
    """Write latents.npy and flips.npy.

    Mirrored pictures are not encoded: the first stage was trained so that a mirrored latent decodes to one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    side = pictures.shape[1] // autoencoder.config.downsampling
    shape = (len(pictures), autoencoder.config.latent_channels, side, side)
    latents = np.lib.format.open_memmap(folder / "latents.npy", mode="w+", dtype=np.float16, shape=shape)
    precision = precision_on(CPU)
    for start in range(0, len(pictures), batch):
        images = to_unit(pictures[start : start + batch]).contiguous(memory_format=torch.channels_last)
        with mixed(CPU, precision):
            latents[start : start + batch] = autoencoder.encode(images).float().numpy()
        if start % (batch * 50) == 0:
            log.info("encoded %d of %d pictures", start, len(pictures))
    np.save(folder / "flips.npy", np.array([may_flip(record) for record in records]))


@torch.no_grad()
def encode_captions(tower: TextTower, use: TextUse, records: Sequence[Record], folder: Path, batch: int = 256) -> None:
    """Write states.npy, pooled.npy and first.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [*(text for record in records for text in record["texts"]), ""]
    first = np.cumsum([0, *(len(record["texts"]) for record in records)])
    widths = (use.tower.tokens, use.tower.width), (use.tower.projection or use.tower.width,)
    states, pooled = (
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=(len(texts), *width))
        for name, width in zip(("states", "pooled"), widths, strict=True)
    )
    precision = precision_on(CPU)
    for start in range(0, len(texts), batch):
        ids = [tokenize(text, use.tower.tokens, use.padding) for text in texts[start : start + batch]]
        with mixed(CPU, precision):
            said = tower(torch.tensor(ids), use.skip, use.final_norm, pooled=True)
        assert said.pooled is not None
        states[start : start + batch] = said.states.float().numpy()
        pooled[start : start + batch] = said.pooled.float().numpy()
        if start % (batch * 100) == 0:
            log.info("encoded %d of %d captions", start, len(texts))
    np.save(folder / "first.npy", first)


def open_latents(folder: Path) -> LatentPictures:
    """What `encode_pictures` and `encode_captions` wrote, mapped into memory. Raises LdmError where it is not there."""
    if not folder.is_dir():
        raise LdmError(f"{folder}: not found; encode the pictures and captions first (ldm train small-latents)")
    latents, flips, pooled, first = (
        np.load(folder / f"{name}.npy") for name in ("latents", "flips", "pooled", "first")
    )
    states = np.load(folder / "states.npy", mmap_mode="r")
    words = np.concatenate([states[row, WORDS] for row in range(0, len(states), max(1, len(states) // MEASURED))])
    whitening = TextWhitening(whitening_of(torch.from_numpy(words)), whitening_of(torch.from_numpy(pooled)))
    return LatentPictures(latents, flips, states, pooled, first, whitening)


def _parts(pictures: np.ndarray, size: int) -> list[np.ndarray]:
    return [pictures[a : a + size] for a in range(0, len(pictures), size)]
