"""Classification by names alone: a picture belongs to the class whose texts lie closest; Radford et al. 2021, 3.1.

Shapes: N pictures, C classes, T texts of a class, P width of the common space; all vectors are unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.retrieval import top_k

TEMPLATES = ("{}", "a {}", "a picture of a {}", "a photo of a {}", "a drawing of a {}")
"""What a class's name is put into; its vector is the mean over them."""


def class_texts(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every template of the first name, then of the second ...: C * T texts."""
    return [template.replace("{}", name) for name in names for template in templates]


def class_vectors(texts: Tensor, classes: int) -> Tensor:
    """Vectors (C * T, P) of `class_texts` -> one unit vector for each class (C, P): the direction of their mean."""
    return F.normalize(texts.unflatten(0, (classes, -1)).mean(dim=1), dim=-1)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor, at: Sequence[int] = (1, 5)) -> dict[int, float]:
    """The share of pictures (N, P) whose class (labels (N,) int) is among the k closest of classes (C, P), by k."""
    return top_k(images @ classes.T, labels, at)
