"""`ldm classify`: which of some labels each picture shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ldm.apps.flags.clip_inputs import check_some, clip_of_command, raise_unread, readable, texts_of
from ldm.apps.flags.commands import Classify
from ldm.apps.output.match_tables import print_matches
from ldm.apps.output.progress import to_stderr
from ldm.errors import LdmError
from ldm.pipeline.clip.model import BATCH
from ldm.tasks.classify import TEMPLATES, Match, classifier
from ldm.tasks.score import checked_texts

SHOWN = 5


def classify(command: Classify) -> None:
    """Print the best labels of each picture. Raises `LdmError`; for unreadable pictures at the end."""
    check_some(command.images)
    if command.top is not None and command.top < 1:
        raise LdmError(f"top: found {command.top}, expected 1 or more")
    labels = checked_texts(texts_of(command.labels, "labels"), "labels")
    clip = clip_of_command(command.model, labels)
    judge = classifier(clip, labels, command.template or TEMPLATES)
    if len(labels) == 1 and not clip.sigmoid:
        to_stderr("one label: its probability is 1 whatever a picture shows; name others too, or see ldm score")
    if clip.sigmoid and not command.json:
        to_stderr("this model judges each label alone: probabilities do not sum to 1")
    unread: list[str] = []
    for start in range(0, len(command.images), BATCH):
        good, bad = readable(command.images[start : start + BATCH])
        unread += bad
        for (path, _), matches in zip(good, judge([image for _, image in good]), strict=True):
            if command.json:
                print(_json(path, matches[: command.top], clip.name, clip.sigmoid), flush=True)
            else:
                print_matches(path, matches[: command.top or SHOWN])
    raise_unread(unread, len(command.images))


def _json(path: Path, matches: Sequence[Match], model: str, independent: bool) -> str:
    told = {"image": str(path), "model": model, "independent": independent, "labels": [asdict(m) for m in matches]}
    return json.dumps(told)
