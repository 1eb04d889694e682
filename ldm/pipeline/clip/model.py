"""CLIP, ready to use: pictures and texts as unit vectors of one space, where what fits together lies close.

Radford et al. 2021. Shapes: N pictures or texts, P width of the joint space.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.image_encoder import ImageConfig, ImageTower
from ldm.models.text_encoder import OpenCLIPText
from ldm.models.tokenizer import tokenize
from ldm.weights.io import printable

MAX_RATIO = 32
BATCH = 64
"""Pictures or texts that go through a tower at a time."""


@dataclass(frozen=True, eq=False)
class CLIP:
    """A contrastive model. It holds no state between calls, so threads may share it.

    name:     what it is called to users
    identity: the same for the same weights, another for others: what an index remembers
    width:    P
    scale, bias: a picture and a text fit by scale * cosine + bias (bias is 0 but for sigmoid-trained models)
    english:  whether it reads English only
    embed_images, embed_texts: a batch -> vectors (N, P) of any length, in float32 on the CPU; called through
    `image_vectors` and `text_vectors`
    notes:    what a user should be told of it unasked
    """

    name: str
    identity: str
    width: int
    scale: float
    bias: float
    english: bool
    embed_images: Callable[[Sequence[Image.Image]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    notes: tuple[str, ...] = ()

    def image_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any size -> unit vectors (N, P), float32. Raises `LdmError` where one is too narrow."""
        return self._unit(self.embed_images, images)

    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut where they are too long -> unit vectors (N, P), float32."""
        return self._unit(self.embed_texts, texts)

    @property
    def sigmoid(self) -> bool:
        """Whether it was trained to say of each pair alone whether it fits (Zhai et al. 2023), and not among others."""
        return self.bias != 0

    def logits(self, cosines: Tensor) -> Tensor:
        """How well pictures and texts fit, by their cosines; of a sigmoid-trained model the log odds that they do."""
        return self.scale * cosines + self.bias

    def notes_on(self, texts: Iterable[str]) -> Iterator[str]:
        """A line about texts in a script that it does not read; none where it reads more than English."""
        foreign = [text for text in texts if has_other_script(text)] if self.english else []
        if foreign:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            yield (
                f"text {printable(foreign[0][:60])!r}{others}: {printable(self.name)} reads English only, so this says "
                "little; write it in English, or use a multilingual open_clip model by --model"
            )

    def _unit(self, embed: Callable[[Sequence], Tensor], things: Sequence) -> Tensor:
        with torch.inference_mode():
            parts = [F.normalize(embed(things[a : a + BATCH]), dim=-1) for a in range(0, len(things), BATCH)]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.width)
        if not torch.isfinite(vectors).all():
            raise LdmError(f"{printable(self.name)}: its vectors are not finite; the file is damaged")
        return vectors


def has_other_script(text: str) -> bool:
    """Whether a letter in it is not of the Latin alphabet."""
    return any(letter.isalpha() and "LATIN" not in unicodedata.name(letter, "") for letter in text)


def clip_of(
    text: OpenCLIPText,
    image: ImageTower,
    *,
    name: str,
    identity: str,
    scale: float,
    bias: float = 0.0,
    notes: tuple[str, ...] = (),
) -> CLIP:
    """A CLIP of our own two towers, which read English."""
    assert text.config.projection is not None
    return CLIP(
        name=name,
        identity=identity,
        width=text.config.projection,
        scale=scale,
        bias=bias,
        english=True,
        embed_images=partial(_embed_images, image),
        embed_texts=partial(_embed_texts, text),
        notes=notes,
    )


def _embed_images(tower: ImageTower, images: Sequence[Image.Image]) -> Tensor:
    pixels = torch.cat([clip_pixels(image, tower.config) for image in images])
    return tower(pixels.to(tower.proj)).float().cpu()


def _embed_texts(tower: OpenCLIPText, texts: Sequence[str]) -> Tensor:
    ids = torch.tensor([tokenize(text, tower.config.tokens) for text in texts])
    ends = (ids == tower.config.vocabulary - 1).int().argmax(dim=1)
    ids = ids[:, : int(ends.max()) + 1]  # attention is causal: what follows the end token says nothing
    pooled = tower(ids.to(tower.positional_embedding.device), pooled=True).pooled
    assert pooled is not None
    return pooled.float().cpu()


def check_shape(image: Image.Image) -> None:
    """Raise `LdmError` where a picture is so narrow that one side would become huge."""
    if max(image.size) > MAX_RATIO * min(image.size):
        found = f"{image.width}x{image.height}"
        raise LdmError(f"image: found {found}, expected sides of at most 1:{MAX_RATIO}; cut it")


def clip_pixels(image: Image.Image, config: ImageConfig) -> Tensor:
    """A picture as an image tower is shown it: (1, 3, S, S), its middle square, in the tower's range of colours.

    Radford et al. 2021 (the released code): the shorter side is brought to S, then the longer one is cut.
    """
    size, (width, height) = config.size, image.size
    short = min(width, height)
    check_shape(image)
    resample = Image.Resampling.BICUBIC if config.resample == "bicubic" else Image.Resampling.BOX
    image = image.resize((int(size * width / short), int(size * height / short)), resample)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return ((pixels - torch.tensor(config.mean)) / torch.tensor(config.deviation)).permute(2, 0, 1)[None]
