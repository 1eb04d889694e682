"""How well pictures and texts find each other by their vectors: recall at k, both ways.

Shapes: N pictures, M texts, P width of their common space; all vectors are unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
"""Rows of similarities that are held at a time."""


@dataclass(frozen=True)
class Recall:
    """The share of searches whose answer is among the first k, by k.

    text_to_image: a text finds its picture; image_to_text: a picture finds one of its texts.
    """

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]


def retrieval(images: Tensor, texts: Tensor, owners: Tensor, at: Sequence[int] = (1, 5, 10)) -> Recall:
    """Search all pictures by each text, and all texts by each picture; Karpathy & Fei-Fei 2015, section 4.1.

    images (N, P), texts (M, P); owners (M,): the number of each text's picture, and each picture has one at least.
    """
    by_text, by_image = [], []
    for rows, own in zip(texts.split(BLOCK), owners.split(BLOCK), strict=True):
        similarity = rows @ images.T
        by_text.append(_hits(similarity, similarity.gather(1, own[:, None]), 1, at))
    for first in range(0, len(images), BLOCK):
        similarity = images[first : first + BLOCK] @ texts.T
        mine = owners == torch.arange(first, first + len(similarity), device=owners.device)[:, None]
        best = similarity.masked_fill(~mine, -torch.inf).amax(dim=1, keepdim=True)
        by_image.append(_hits(similarity.masked_fill(mine, -torch.inf), best, 0, at))
    return Recall(_means(by_text, at), _means(by_image, at))


def top_k(similarity: Tensor, answers: Tensor, at: Sequence[int] = (1, 5)) -> dict[int, float]:
    """The share of rows whose right column is among the k greatest. similarity (N, C), answers (N,) int."""
    return _means([_hits(similarity, similarity.gather(1, answers[:, None]), 1, at)], at)


def ridge(texts: Tensor, pictures: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """The linear map from what is known of texts (M, K) to picture vectors (M, P) of the least squared error.

    With a penalty on its squared weights; both are centred first, so that the mean is not held back (Hoerl & Kennard
    1970). What a model is held against that has learned more than that.
    """
    x, y = texts.double(), pictures.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    square = (x - x_mean).T @ (x - x_mean)
    held = square + penalty * torch.eye(len(square), dtype=square.dtype)
    weights = torch.linalg.solve(held, (x - x_mean).T @ (y - y_mean))
    return lambda vectors: ((vectors.double() - x_mean) @ weights + y_mean).float()


def _hits(similarity: Tensor, right: Tensor, itself: int, at: Sequence[int]) -> Tensor:
    """The chance (rows, len(at)) that each row's right answer is among its first k, where ties are broken by lot.

    A lot, since a model whose vectors have all become the same must come out at chance, not at one; and what is no
    number counts as greater, since a broken model must not come out at one either.
    right (rows, 1): the right answer's similarity; itself: 1 where that is one of the row's, else 0.
    """
    greater = (~(similarity <= right)).sum(dim=1)
    equal = ((similarity == right).sum(dim=1) - itself).clamp(min=0)
    return torch.stack([((k - greater) / (equal + 1)).clamp(0, 1) for k in at], dim=1)


def _means(hits: Sequence[Tensor], at: Sequence[int]) -> dict[int, float]:
    return dict(zip(at, torch.cat(list(hits)).double().mean(dim=0).tolist(), strict=True))
