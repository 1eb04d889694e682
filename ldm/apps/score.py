"""`ldm score`: how well each picture fits each text."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ldm.apps.flags.clip_inputs import check_some, clip_of_command, raise_unread, readable, texts_of
from ldm.apps.flags.commands import Score
from ldm.apps.output.heat_map import MOST_PICTURES, MOST_TEXTS, heat_map
from ldm.apps.output.match_tables import print_scores
from ldm.errors import LdmError
from ldm.pipeline.clip.model import BATCH, CLIP
from ldm.pipeline.files import check_output, write_new
from ldm.tasks.score import Scorer, Scores, checked_texts, scorer

MAX_IMAGES = 10_000


def score(command: Score) -> None:
    """Print the matrix, and draw it where that is asked for. Raises `LdmError` for what cannot be."""
    check_some(command.images)
    if len(command.images) > MAX_IMAGES:
        raise LdmError(f"images: found {len(command.images)}, expected at most {MAX_IMAGES}; see ldm index")
    texts = checked_texts(texts_of(command.texts, "texts"), "texts")
    if command.output is not None:
        _check_drawing(command.output, len(command.images), len(texts))
    clip = clip_of_command(command.model, texts)
    judge = scorer(clip, texts)
    paths, thumbnails, scores, unread = _matrix(judge, command.images, keep=command.output is not None)
    if paths:
        cosines = scores.cosines.tolist()
        if command.json:
            print(_json(clip, paths, texts, scores))
        else:
            print_scores(paths, texts, cosines)
        if command.output is not None:
            drawn = heat_map(thumbnails, [path.name for path in paths], texts, cosines)
            buffer = io.BytesIO()
            drawn.save(buffer, "PNG", optimize=True)
            written = write_new(command.output, buffer.getvalue())
            if not command.json:
                print(written)
    raise_unread(unread, len(command.images))


def _check_drawing(output: Path, pictures: int, texts: int) -> None:
    if output.suffix.lower() != ".png":
        raise LdmError(f"{output}: expected a name that ends in .png")
    if pictures > MOST_PICTURES or texts > MOST_TEXTS:
        raise LdmError(
            f"output: found {pictures} pictures and {texts} texts, expected at most {MOST_PICTURES} and {MOST_TEXTS} "
            "in a heat map; leave -o out, or take --json"
        )
    check_output(output)


def _matrix(
    judge: Scorer, images: Sequence[Path], *, keep: bool
) -> tuple[list[Path], list[Image.Image], Scores, list[str]]:
    """The pictures that could be read, themselves where they are kept, their scores, and what is wrong with others."""
    paths, kept, parts, unread = [], [], [], []
    for start in range(0, len(images), BATCH):
        good, bad = readable(images[start : start + BATCH])
        unread += bad
        paths += [path for path, _ in good]
        kept += [image for _, image in good] if keep else []
        parts.append(judge([image for _, image in good]))
    scores = Scores(torch.cat([part.cosines for part in parts]), torch.cat([part.logits for part in parts]))
    return paths, kept, scores, unread


def _json(clip: CLIP, paths: Sequence[Path], texts: Sequence[str], scores: Scores) -> str:
    told = {
        "model": clip.name, "scale": clip.scale, "bias": clip.bias, "images": [str(path) for path in paths],
        "texts": list(texts), "cosines": scores.cosines.tolist(), "logits": scores.logits.tolist(),
    }  # fmt: skip
    return json.dumps(told)
