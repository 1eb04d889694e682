"""A judge of what a picture shows, from its pixels: a small convolutional classifier of our own.

It shares nothing with the CLIP that our models are told by, so that they cannot please it by pleasing that CLIP.
Shapes: N pictures, C classes, D width of a level, H and W height and width; pictures are in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError

BATCH = 256
GROUPS = 8


@dataclass(frozen=True)
class JudgeConfig:
    """What a judge knows, and its sizes.

    concepts: C, as the records of pictures call them; names: what a person calls them, a name for each
    size: pixels that it looks at; widths: of its levels, each at half the resolution; blocks: of each level
    """

    concepts: tuple[str, ...]
    names: tuple[str, ...]
    size: int = 64
    widths: tuple[int, ...] = (32, 64, 128, 256)
    blocks: int = 2


class ResidualBlock(nn.Module):
    """Two convolutions and a way around them, in the order of He et al. 2016b; with group normalisation."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, out_width)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.around = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> the same at the new width."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.around(x) + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Pictures (N, 3, H, W) -> logits (N, C). Tensor names: stem, levels.*, norm, out."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.widths[0], 3, stride=2, padding=1)
        levels: list[nn.Module] = []
        for width, out_width in pairwise((config.widths[0], *config.widths)):
            levels.append(nn.AvgPool2d(2) if levels else nn.Identity())
            levels += [ResidualBlock(width if i == 0 else out_width, out_width) for i in range(config.blocks)]
        self.levels = nn.Sequential(*levels)
        self.norm = nn.GroupNorm(GROUPS, config.widths[-1])
        self.out = nn.Linear(config.widths[-1], len(config.concepts))

    def forward(self, pictures: Tensor) -> Tensor:
        """Of any size; they are looked at in `config.size`."""
        x = F.interpolate(pictures, (self.config.size, self.config.size), mode="bilinear", antialias=True)
        x = self.levels(self.stem(x))
        return self.out(F.silu(self.norm(x)).mean(dim=(2, 3)))

    @torch.inference_mode()
    def probabilities(self, pictures: Tensor) -> Tensor:
        """(N, C) float32, in batches; the judge must be in evaluation mode."""
        place = self.out.weight
        parts = [self(part.to(place)).float().softmax(dim=1).cpu() for part in pictures.split(BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.config.concepts))

    def number(self, concept: str) -> int:
        """The class of a concept, or of its name. Raises `LdmError` for one that the judge does not know."""
        for known in (self.config.concepts, self.config.names):
            if concept in known:
                return known.index(concept)
        raise LdmError(f"concept: {concept!r} is none of the {len(self.config.concepts)} that the judge was taught")

    def names_of(self, pictures: Tensor) -> list[str]:
        """What each picture shows most likely."""
        return [self.config.names[i] for i in self.probabilities(pictures).argmax(dim=1).tolist()]


@dataclass(frozen=True)
class Varied:
    """How variations of a picture are judged; shares are of them all, differences RMS over pixels from 0 to 1.

    kept, kept_in_5:  whose likeliest concept is the picture's; that have it among the likeliest five
    difference:       of two of them, the mean over all pairs; closest: of the two that are most alike
    """

    kept: float
    kept_in_5: float
    difference: float
    closest: float


def judge_variations(judge: Judge, pictures: Tensor, concept: str) -> Varied:
    """pictures: two or more variations (N, 3, H, W) of one that shows the concept. Raises `LdmError`."""
    if len(pictures) < 2:
        raise LdmError(f"variations: found {len(pictures)}, expected two or more to compare")
    said = judge.probabilities(pictures).topk(min(5, len(judge.config.concepts)), dim=1).indices
    right = said == judge.number(concept)
    apart = differences(pictures)
    return Varied(
        kept=float(right[:, 0].float().mean()),
        kept_in_5=float(right.any(dim=1).float().mean()),
        difference=float(apart.mean()),
        closest=float(apart.min()),
    )


def differences(pictures: Tensor) -> Tensor:
    """The RMS difference of every two of (N, 3, H, W), from 0 to 1: (N (N - 1) / 2,)."""
    flat = pictures.float().flatten(1) / 2
    return F.pdist(flat) / math.sqrt(flat.shape[1])


@dataclass(frozen=True)
class Moved:
    """How text diffs are judged; both are shares of all tries.

    between:  before, the source is likelier than the target, and afterwards the target likelier than the source
    outright: before, the source is the likeliest concept of all, and afterwards the target is
    """

    between: float
    outright: float


def judge_textdiffs(
    judge: Judge, before: Tensor, after: Tensor, sources: Sequence[str], targets: Sequence[str]
) -> Moved:
    """Whether pictures moved from one concept to another.

    before, after: (N, 3, H, W), the first and last picture of each try; sources, targets: N concepts, or their names.
    Raises `LdmError` for other numbers of them, and for concepts that the judge does not know.
    """
    if not len(before) == len(after) == len(sources) == len(targets) > 0:
        raise LdmError(
            f"tries: found {len(before)} and {len(after)} pictures, {len(sources)} sources and {len(targets)} targets,"
            " expected as many of each, and one at least"
        )
    rows = torch.arange(len(before))
    source = torch.tensor([judge.number(concept) for concept in sources])
    target = torch.tensor([judge.number(concept) for concept in targets])
    first, last = judge.probabilities(before), judge.probabilities(after)
    between = (first[rows, source] > first[rows, target]) & (last[rows, target] > last[rows, source])
    outright = (first.argmax(dim=1) == source) & (last.argmax(dim=1) == target)
    return Moved(float(between.float().mean()), float(outright.float().mean()))
