"""Classification by names alone: a picture belongs to the class whose texts lie closest; Radford et al. 2021, 3.1.

Shapes: N pictures, C classes, P width of the common space; all vectors are unit vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.retrieval import top_k

TEMPLATES = (
    "{}", "a {}", "an emoji of a {}", "a drawing of a {}", "a photo of a {}", "a {} on a white background",
)  # fmt: skip
"""What a class's name is put into, for drawn pictures and photos. `a {}` is filled as "an owl" before a vowel."""


def filled(template: str, label: str) -> str:
    """The template with the label in its place, and "an" for "a" before a vowel."""
    if label[:1].lower() in "aeiou":
        template = re.sub(r"\ba (?=\{\})", "an ", template)
    return template.replace("{}", label)


def class_vectors(
    embed: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector for each class (C, P): the direction of the mean of its name's in all templates (section 3.1.4).

    embed: C texts -> their unit vectors (C, P)
    """
    each = (embed([filled(template, name) for name in names]) for template in templates)
    return F.normalize(sum(each, start=torch.zeros(())), dim=-1)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor, at: Sequence[int] = (1, 5)) -> dict[int, float]:
    """The share of pictures (N, P) whose class (labels (N,) int) is among the k closest of classes (C, P), by k."""
    return top_k(images @ classes.T, labels, at)
