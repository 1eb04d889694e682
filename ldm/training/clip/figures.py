"""What a CLIP has understood of pictures that training left out, against chance and against a bag of words.

    python -m ldm.data.packed --shards shards --out runs/data --size 128
    python -m ldm.data.packed --shards shards --out runs/data --size 128 --name heldout
    python -m ldm.training.clip.figures                        # of the model that ships; --model FILE for another

Radford et al. 2021, sections 2.3 and 3.1. The bag of words is a ridge regression from which words a caption has to the
vector of its picture: a CLIP that reads sentences must do better. Shapes: N pictures, P width of the common space.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.packed import open_packed
from ldm.data.pictures.splits import HELD_OUT_PAIR
from ldm.data.records import Record
from ldm.errors import LdmError
from ldm.evaluation.retrieval import retrieval, ridge
from ldm.evaluation.zero_shot import accuracy, class_vectors
from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.clip.model import CLIP

COMMON = 3
"""Words that fewer captions have are not counted."""
PENALTY = 10.0
"""Of the bag's regression; between 1 and 100 it hardly matters."""

Packed = tuple[np.ndarray, list[Record]]
"""Pictures uint8 (N, side, side, 3) and their records."""


@dataclass(frozen=True)
class Figures:
    """Shares from 0 to 1, by k.

    pictures, classes: among how many a caption finds its own picture, and a picture its class
    text_to_image, image_to_text, words_to_image: each caption's own picture, each picture's own caption, and the
        former by the bag of words
    zero_shot: of pictures of known things in a style that these were never shown in, by the things' names
    words_zero_shot: the same by the bag of words
    """

    pictures: int
    classes: int
    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    words_to_image: dict[int, float]
    zero_shot: dict[int, float]
    words_zero_shot: dict[int, float]


def clip_figures(
    clip: CLIP, left_out: Packed, known: Packed, *, count: int = 1000, taught: int = 10_000, seed: int = 0
) -> Figures:
    """Measure it.

    left_out: pictures that were not trained on; `count` of them with different captions are searched
    known:    pictures that were; `taught` of them teach the bag of words

    Raises LdmError where there are less than two to search, or two classes.
    """
    draw = np.random.default_rng(seed)
    pictures, records = left_out
    searched = _different(draw.permutation(len(records)).tolist(), records)[:count]
    named = [i for i, record in enumerate(records) if record.get("split") == HELD_OUT_PAIR and _label(record)]
    classes = sorted({_label(records[i]) for i in named})
    if min(len(searched), len(classes)) < 2:
        raise LdmError(f"left-out pictures: found {len(searched)} and {len(classes)} classes, expected two of each")

    def vectors(pixels: np.ndarray, numbers: Sequence[int]) -> Tensor:
        return clip.image_vectors([Image.fromarray(pixels[i]) for i in numbers])

    seen = draw.permutation(len(known[1]))[:taught].tolist()
    words = bag_of_words([known[1][i]["texts"][0] for i in seen], vectors(known[0], seen))
    images, captions = vectors(pictures, searched), [records[i]["texts"][0] for i in searched]
    own = torch.arange(len(searched))
    told = retrieval(images, clip.text_vectors(captions), own, at=(1, 5))
    shown = vectors(pictures, named)
    labels = torch.tensor([classes.index(_label(records[i])) for i in named])
    return Figures(
        pictures=len(searched),
        classes=len(classes),
        text_to_image=told.text_to_image,
        image_to_text=told.image_to_text,
        words_to_image=retrieval(images, words(captions), own, at=(1, 5)).text_to_image,
        zero_shot=accuracy(shown, class_vectors(clip.text_vectors, classes), labels),
        words_zero_shot=accuracy(shown, words(classes), labels),
    )


def bag_of_words(captions: Sequence[str], images: Tensor) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> unit vectors (N, P), learned from captions and the unit vectors of their pictures."""
    counts = Counter(word for caption in captions for word in set(_words(caption)))
    known = {word: i for i, word in enumerate(sorted(word for word, n in counts.items() if n >= COMMON))}

    def bag(texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), len(known))
        for row, text in zip(rows, texts, strict=True):
            row[[known[word] for word in _words(text) if word in known]] = 1.0
        return rows

    guess = ridge(bag(captions), images, PENALTY)
    return lambda texts: F.normalize(guess(bag(texts)), dim=-1)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _different(numbers: Sequence[int], records: Sequence[Record]) -> list[int]:
    """Those whose first caption none before them has."""
    first: dict[str, int] = {}
    for i in numbers:
        first.setdefault(records[i]["texts"][0], i)
    return list(first.values())


def _label(record: Record) -> str:
    label = record.get("label")
    return label if isinstance(label, str) else ""


def main() -> None:
    """The command line."""
    import tyro

    def run(
        pictures: Path = Path("runs/data"), model: Path | None = None, size: int = 128, device: str = "auto"
    ) -> None:
        """Print what a CLIP has understood, as JSON. PICTURES: the folder of both packed sets."""
        left_out, known = open_packed(pictures, size, "heldout"), open_packed(pictures, size)
        sys.stdout.write(json.dumps(asdict(clip_figures(load_clip(model), left_out, known))) + "\n")

    try:
        tyro.cli(run, prog="python -m ldm.training.clip.figures")
    except LdmError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
