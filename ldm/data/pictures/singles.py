"""Pictures of one drawing each: emoji on white, silhouettes in two colours, and parametric illustrations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from PIL import Image

from ldm.data.pictures import parametric
from ldm.data.pictures.colors import GROUNDS, dominant_colors, shade
from ldm.data.pictures.picture import Picture, Scene, Sprite
from ldm.data.pictures.raster import SIZE, WHITE, crop, flatten, render
from ldm.data.pictures.sources import FINE_TUNING_SET, UNWANTED, Art, Concept, IconSet
from ldm.data.pictures.splits import (
    HELD_OUT_ATTRIBUTES,
    HELD_OUT_CONCEPT,
    HELD_OUT_PAIR,
    HELD_OUT_STYLE,
    TRAIN,
    choose_concepts,
    left_out,
)
from ldm.data.pictures.words import an, phrase

SKIN_TONE_SHARE = 0.16
"""Of the skin-tone variants; with all of them, half of the emoji would be hands and people."""

PAIR_SHARE = 0.06
PAIR_MIN_STYLES = 4
"""A concept loses a style only if so many draw it."""

COMPOSED_GROUPS = {"animals-nature", "food-drink", "objects", "activities", "travel-places"}
NOT_COMPOSED_SUBGROUPS = {"time", "hotel", "sky-weather", "transport-sign"}

FIGURE_COLORS = (
    "red", "orange", "green", "blue", "purple", "pink", "brown", "black", "black", "teal", "white", "yellow",
)  # fmt: skip
HARD_TO_TELL = {"white": {"beige", "yellow"}, "yellow": {"white", "beige"}, "black": {"brown"}, "brown": {"black"}}
"""Grounds that a figure of this colour would be lost on."""


@dataclass(frozen=True)
class EmojiSplits:
    """Which emoji are left out: `styles` of each concept, by code, and the concepts left out in all of them."""

    styles: Mapping[str, list[str]]
    concepts: set[str]

    @staticmethod
    def of(icons: Mapping[str, Mapping[str, str]], concepts: Mapping[str, Concept]) -> EmojiSplits:
        """icons: set name -> concept code -> icon name."""
        styles: dict[str, list[str]] = {}
        for set_name, matched in icons.items():
            for code in matched:
                if set_name != FINE_TUNING_SET and concepts[code].is_wanted and not concepts[code].has_skin_tone:
                    styles.setdefault(code, []).append(set_name)
        return EmojiSplits(styles, choose_concepts({code: concepts[code].label for code in sorted(styles)}))

    def split(self, code: str, set_name: str) -> str:
        """The split of a concept without skin tone in one style."""
        if set_name == FINE_TUNING_SET:
            return HELD_OUT_STYLE
        if code in self.concepts:
            return HELD_OUT_CONCEPT
        if len(self.styles.get(code, ())) >= PAIR_MIN_STYLES and left_out(PAIR_SHARE, code, set_name):
            return HELD_OUT_PAIR
        return TRAIN


def emoji(
    rng: Random, icons: IconSet, matched: Mapping[str, str], concepts: Mapping[str, Concept], splits: EmojiSplits,
    every: int = 1,
) -> Iterator[tuple[Picture, Sprite | None]]:  # fmt: skip
    """Each wanted emoji of one set on white, and some of its skin-tone variants where the plain one is trained on.

    matched: concept code -> icon name. With each picture comes the sprite, if it is fit for compositions. A drawing
    that stands for two concepts is shown once, under the shorter name.
    """
    set_name, seen = icons.art.name, set[bytes]()
    ordered = sorted((concepts[code] for code in matched), key=lambda c: (c.has_skin_tone, len(c.label), c.code))
    for concept in ordered[::every]:
        if not concept.is_wanted:
            continue
        split = splits.split(concept.base, set_name)
        if concept.has_skin_tone and (rng.random() > SKIN_TONE_SHARE or split != TRAIN):
            continue
        image = render(icons.svg(matched[concept.code]))
        digest = hashlib.md5(image.tobytes()).digest()
        if image.getbbox() is None or digest in seen:
            continue
        seen.add(digest)
        colors = dominant_colors(image)
        texts = emoji_captions(rng, concept, icons.art, colors)
        is_sprite = split == TRAIN and _fits_compositions(concept)
        sprite = Sprite(icons.art, concept, crop(image), colors) if is_sprite else None
        yield _emoji_picture(icons, concept, image, split, colors, texts), sprite


def emoji_captions(rng: Random, concept: Concept, art: Art, colors: list[tuple[str, float]]) -> list[str]:
    """By style, by medium, with the ground, bare; with up to three keywords; with the main colours."""
    name = phrase(concept.label + (" zodiac sign" if concept.subgroup == "zodiac" else ""))
    texts = [f"{name}, {art.style}", f"{art.prefix} {name}", f"{name}, {art.style}, white background", name]
    tags = [
        tag for tag in concept.tags if len(tag) > 2 and tag not in concept.label.lower() and not UNWANTED.search(tag)
    ]
    if tags:
        texts.append(f"{name}, {', '.join(rng.sample(tags, min(3, len(tags))))}, {art.style}")
    if colors and concept.group != "people-body":
        texts.append(f"{name}, mostly {' and '.join(color for color, _ in colors[:2])}, {art.style}")
    return texts


def silhouettes(rng: Random, icons: IconSet, every: int = 1) -> Iterator[Picture]:
    """Each icon once, in a random colour on a ground that it stands out from."""
    names = sorted(name for name in icons.icons if _is_wanted_silhouette(name))
    for name in names[::every]:
        figure = rng.choice(FIGURE_COLORS)
        ground = rng.choice(_grounds_for(figure))
        paint = shade(rng, figure)
        back = WHITE if ground == "white" else shade(rng, ground)
        words = name.replace("-", " ")
        noun, style = phrase(words), icons.art.style
        yield Picture(
            image=flatten(render(icons.svg(name, f"rgb{paint}")), back),
            kind="silhouette",
            key=name,
            texts=[
                f"{an(figure)} {words} icon on {an(ground)} background, {style}",
                f"{noun}, {figure} silhouette icon, {ground} background",
                f"{noun}, {style}",
            ],
            split=HELD_OUT_ATTRIBUTES if left_out(0.06, "gi", figure, ground) else TRAIN,
            set=icons.art.name,
            style=style,
            concept=words,
            label=words,
            license=icons.art.license,
            source=icons.source,
            extra={"attrs": {"fg": figure, "bg": ground}},
        )


def illustrations(name: str, count: int, seed: int) -> Iterator[tuple[Picture, Scene | None]]:
    """`count` drawings of one parametric style. With each landscape that is trained on comes its scene."""
    style, drawn = parametric.STYLES[name], parametric.open_style(name)
    for i in range(count):
        svg, parts = parametric.draw(drawn, f"{name}-{seed}-{i}", SIZE)
        description, image = style.describe(parts), flatten(render(svg))
        attributes = description.attributes
        held = left_out(0.08, name, *(attributes[attribute] for attribute in style.split_by))
        picture = Picture(
            image=image,
            kind="parametric",
            key=f"{name}:{i}",
            texts=parametric.captions(description, style.words),
            split=HELD_OUT_ATTRIBUTES if held else TRAIN,
            set=f"dicebear-{name}",
            style=style.words,
            concept=name,
            license="CC0-1.0",
            source="dicebear-styles",
            extra={"attrs": attributes},
        )
        is_scene = name == "landscape" and not held
        yield picture, Scene(image, description.short, attributes) if is_scene else None


def _emoji_picture(
    icons: IconSet, concept: Concept, image: Image.Image, split: str, colors: list[tuple[str, float]], texts: list[str]
) -> Picture:
    art = icons.art
    return Picture(
        image=flatten(image),
        kind="heldout_style" if split == HELD_OUT_STYLE else "emoji",
        key=f"{art.name}:{concept.code}",
        texts=texts,
        split=split,
        set=art.name,
        style=art.style,
        concept=concept.base,
        label=concept.label,
        license=art.license,
        source=icons.source,
        extra={"group": concept.group, "subgroup": concept.subgroup, "colors": [color for color, _ in colors]},
    )


def _fits_compositions(concept: Concept) -> bool:
    return (
        not concept.has_skin_tone
        and concept.group in COMPOSED_GROUPS
        and concept.subgroup not in NOT_COMPOSED_SUBGROUPS
    )


def _is_wanted_silhouette(name: str) -> bool:
    return not UNWANTED.search(name.replace("-", " ")) and not re.search(r"abstract|\d", name)


def _grounds_for(figure: str) -> list[str]:
    """The grounds to choose among; white is thrice as likely, but for a white figure."""
    lost_on = HARD_TO_TELL.get(figure, set()) | {figure}
    return [ground for ground in (*GROUNDS, "white", "white", "white") if ground not in lost_on]
