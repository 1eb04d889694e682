"""Self-attention over fewer tokens: those that are most alike are merged before it and parted again after it.

Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion", by the bipartite soft matching of Bolya et al. 2023,
"Token Merging: Your ViT But Faster". One token of each 2 x 2 is a destination. The paper draws which of the four; here
it is the top left one, so that a picture depends on its seed and not on a second generator.

Shapes: B batch, N = h * w tokens, D destinations, S = N - D sources, R merged ones, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 2
"""One token of so many by so many is a destination."""

MOST = 1 - 1 / STRIDE**2
"""The largest share of tokens that can be merged: all sources."""

AT_ONCE = 2**23
"""Of so many pairs of a source and a destination the likeness is held at a time: 32 MiB."""

WHOLE = 2.0**24


@dataclass(frozen=True)
class Merging:
    """What share of h x w tokens is to be merged, 0..MOST."""

    height: int
    width: int
    share: float


@dataclass(frozen=True, eq=False)
class Matching:
    """Which tokens are merged into which.

    kept:   (B, N - R) the tokens that stay: first sources, then all destinations
    merged: (B, R) those that go; into: (B, R) the place in `kept` of the destination that each goes into
    """

    kept: Tensor
    merged: Tensor
    into: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N - R, C), a destination as the mean of itself and of all that goes into it.

        Summed in steps of 2^-24 as whole numbers: a GPU adds in whatever order, which sums of these do not show.
        """
        kept = _whole(_at(x, self.kept))
        sums = kept.scatter_add(1, self.into[..., None].expand(-1, -1, x.shape[2]), _whole(_at(x, self.merged)))
        sizes = torch.ones_like(self.kept).scatter_add(1, self.into, torch.ones_like(self.into))
        return (sums.float() / (sizes[..., None] * WHOLE)).to(x.dtype)

    def part(self, x: Tensor) -> Tensor:
        """x (B, N - R, C) -> (B, N, C): a token that went is given what its destination has."""
        whole = torch.cat([x, _at(x, self.into)], dim=1)
        tokens = torch.cat([self.kept, self.merged], dim=1)
        return torch.empty_like(whole).scatter_(1, tokens[..., None].expand_as(whole), whole)


def match(x: Tensor, merging: Merging) -> Matching:
    """x (B, N, C) -> the `share` of its tokens, sources, whose nearest destination by cosine is the nearest of all.

    Rows are looked at one by one, so that a picture does not depend on those of its batch.
    """
    b, n, _ = x.shape
    is_destination = torch.zeros(merging.height, merging.width, dtype=torch.uint8, device=x.device)
    rows, columns = merging.height // STRIDE, merging.width // STRIDE  # an odd rest is of sources
    is_destination[: rows * STRIDE : STRIDE, : columns * STRIDE : STRIDE] = 1
    order, left = is_destination.flatten().argsort(stable=True), n - rows * columns
    sources, destinations = order[:left], order[left:]
    unit = F.normalize(x.float(), dim=-1)
    parts = sources.split(max(1, AT_ONCE // max(1, len(destinations))))
    found = [(row[part] @ row[destinations].T).max(dim=-1) for row in unit for part in parts]
    likeness, nearest = (torch.cat(each).unflatten(0, (b, left)) for each in zip(*found, strict=True))
    by_likeness = likeness.argsort(dim=-1, descending=True, stable=True)
    count = min(left, int(merging.share * n))
    going, staying = by_likeness[:, :count], by_likeness[:, count:]
    kept = torch.cat([sources[staying], destinations.expand(b, -1)], dim=1)
    return Matching(kept, sources[going], left - count + nearest.gather(1, going))


def _at(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (B, M) of x (B, N, C) -> (B, M, C)."""
    return x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2]))


def _whole(x: Tensor) -> Tensor:
    """In steps of 1 / WHOLE, as whole numbers."""
    return (x.float() * WHOLE).round().long()
