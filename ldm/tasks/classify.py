"""Zero-shot classification: which of some labels a picture shows, by CLIP, which was trained on none of them.

Radford et al. 2021, section 3.1. Each label is put into several sentences (section 3.1.4); the mean of their vectors
stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.zero_shot import TEMPLATES, class_vectors
from ldm.pipeline.clip.model import CLIP
from ldm.pipeline.validation import shown
from ldm.tasks.score import checked_texts

MAX_TEMPLATES = 100


@dataclass(frozen=True)
class Match:
    """A label and how well a picture fits it.

    probability: among all labels, softmax of scale * cosine, so that they sum to 1; of a sigmoid-trained model
                 (SigLIP) the probability that the label fits, whatever the others: these do not sum to 1
    """

    label: str
    probability: float
    cosine: float


@dataclass(frozen=True, eq=False)
class Classifier:
    """Labels as unit vectors (M, P), ready for any number of pictures."""

    clip: CLIP
    labels: tuple[str, ...]
    vectors: Tensor

    def __call__(self, images: Sequence[Image.Image]) -> list[tuple[Match, ...]]:
        """RGB pictures -> for each all labels, the best first."""
        cosines = self.clip.image_vectors(images) @ self.vectors.T
        logits = self.clip.logits(cosines)
        probabilities = logits.sigmoid() if self.clip.sigmoid else logits.softmax(dim=-1)
        return [
            tuple(Match(self.labels[i], probability[i].item(), cosine[i].item()) for i in order)
            for cosine, probability, order in zip(
                cosines, probabilities, cosines.argsort(dim=-1, descending=True, stable=True).tolist(), strict=True
            )
        ]


def classifier(clip: CLIP, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Classifier:
    """Labels as vectors: the mean of their unit vectors in each template, normalised.

    templates: sentences with {} where the label goes. Raises `LdmError` for labels that are empty, double or too many,
    and for a template without a place for one.
    """
    labels = checked_texts(labels, "labels")
    if not 1 <= len(templates) <= MAX_TEMPLATES:
        raise LdmError(f"templates: found {len(templates)}, expected 1 to {MAX_TEMPLATES}")
    for template in templates:
        if "{}" not in template:
            raise LdmError(f"template: {shown(template)} has no {{}}, where the label goes")
    return Classifier(clip, tuple(labels), class_vectors(clip.text_vectors, labels, templates))


def classify(
    clip: CLIP, images: Sequence[Image.Image], labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> list[tuple[Match, ...]]:
    """RGB pictures -> for each all labels, the best first. Raises `LdmError` as `classifier`."""
    return classifier(clip, labels, templates)(images)
