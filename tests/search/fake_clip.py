"""A CLIP for tests of search that needs no weights: what it sees of a picture is four by four mean colours."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.clip.model import CLIP

WIDTH = 24


def fake_clip(
    identity: str = "a" * 64, *, name: str = "fake", pause: float = 0.0, seen: list[int] | None = None
) -> CLIP:
    """pause: seconds for a batch; seen: gets the size of each batch of pictures."""
    matrix = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(identity.encode())))

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        if any(image.width > 20 * image.height for image in images):
            raise LdmError("image: found a strip, expected a picture; cut it")
        if seen is not None:
            seen.append(len(images))
        time.sleep(pause)
        small = [np.asarray(image.resize((4, 4), Image.Resampling.BOX), np.float32).reshape(-1) for image in images]
        return (torch.from_numpy(np.stack(small)) / 255 - 0.5) @ matrix

    def embed_texts(texts: Sequence[str]) -> Tensor:
        colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
        return embed_images([Image.new("RGB", (4, 4), colours.get(text, (99, 99, 99))) for text in texts])

    return CLIP(name, identity, WIDTH, 10.0, 0.0, True, embed_images, embed_texts)


def draw(path: Path, seed: int) -> None:
    """Write a picture of 16 random colours; the seed makes it."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).resize((16, 16), Image.Resampling.NEAREST).save(path, lossless=True)


def gallery(folder: Path, count: int) -> Path:
    """A folder of pictures in three kinds of files, some in folders below."""
    for number in range(count):
        place = folder if number % 3 else folder / f"below {number % 5}"
        draw(place / f"picture-{number:04d}.{('png', 'webp', 'PNG')[number % 3]}", number)
    return folder
