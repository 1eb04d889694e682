"""The records that pictures are made with and handed over in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm.data.pictures.sources import Art, Concept


@dataclass(frozen=True)
class Picture:
    """One picture with its captions and all that is known of it.

    image: RGB, SIZE x SIZE; texts: captions, the fullest first, repetitions allowed; key: what was drawn, not unique;
    concept, label: one name or, where several objects are shown, theirs; extra: facts that only some kinds have.
    """

    image: Image.Image
    kind: str
    key: str
    texts: list[str]
    split: str
    set: str
    style: str
    concept: str | list[str]
    license: str
    source: str
    label: str | list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The JSON that lies beside the picture: each caption once, and no field that is None."""
        names = ("kind", "key", "split", "set", "style", "concept", "label", "license", "source")
        named = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"texts": list(dict.fromkeys(self.texts)), **named, **self.extra}


@dataclass(frozen=True)
class Sprite:
    """A drawing cut out of its margins (RGBA), to be put into compositions, with its dominant colours."""

    art: Art
    concept: Concept
    image: Image.Image
    colors: list[tuple[str, float]]


@dataclass(frozen=True)
class Scene:
    """A landscape to put sprites into, with its caption and attributes."""

    image: Image.Image
    caption: str
    attributes: dict[str, str | None]
