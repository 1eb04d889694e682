"""How well pictures and texts fit: their cosines in CLIP's space. Radford et al. 2021, section 2.3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.clip.model import CLIP
from ldm.pipeline.validation import shown

MAX_TEXTS = 10_000
MAX_LETTERS = 1000


@dataclass(frozen=True, eq=False)
class Scores:
    """cosines (N, M) of N pictures with M texts, and logits (N, M), see `CLIP.logits`; float32 on the CPU."""

    cosines: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class Scorer:
    """Texts as unit vectors (M, P), ready for any number of pictures."""

    clip: CLIP
    vectors: Tensor

    def __call__(self, images: Sequence[Image.Image]) -> Scores:
        """RGB pictures against the texts."""
        cosines = self.clip.image_vectors(images) @ self.vectors.T
        return Scores(cosines, self.clip.logits(cosines))


def scorer(clip: CLIP, texts: Sequence[str]) -> Scorer:
    """Texts as vectors, as they are. Raises `LdmError` for no or too many of them, or one that is empty."""
    return Scorer(clip, clip.text_vectors(checked_texts(texts, "texts")))


def score(clip: CLIP, images: Sequence[Image.Image], texts: Sequence[str]) -> Scores:
    """RGB pictures against texts. Raises `LdmError` as `scorer`."""
    return scorer(clip, texts)(images)


def checked_texts(texts: Sequence[str], field: str) -> list[str]:
    """The texts without the blanks around them. Raises `LdmError` where there is none, one is empty, or one twice."""
    texts = [text.strip() for text in texts]
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise LdmError(f"{field}: found {len(texts)}, expected 1 to {MAX_TEXTS}")
    for number, text in enumerate(texts, 1):
        if not text:
            raise LdmError(f"{field}: number {number} is empty; leave it out")
        if len(text) > MAX_LETTERS:
            raise LdmError(f"{field}: number {number} has {len(text)} letters, expected at most {MAX_LETTERS}")
    twice = [text for text, times in Counter(texts).items() if times > 1]
    if twice:
        raise LdmError(f"{field}: {shown(twice[0])} is there twice; name each once")
    return texts
