"""Pictures composed of sprites: on grounds, recoloured, in pairs, counted, in landscapes; and geometric shapes.

Each function yields pictures whose captions say exactly what was put where. `rng` decides everything, in a fixed order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from PIL import Image

from ldm.data.pictures.colors import COLORS, GROUNDS, shade
from ldm.data.pictures.picture import Picture, Scene, Sprite
from ldm.data.pictures.raster import SIZE, fit, gradient, paste, plain, recolor, render
from ldm.data.pictures.splits import HELD_OUT_COMPOSITION, TRAIN, left_out
from ldm.data.pictures.words import NUMBER_WORDS, an, is_singular, phrase, plural, without_article

MIDDLE = SIZE // 2

SIZES = (("", 0.72), ("", 0.85), ("small ", 0.38), ("large ", 0.95))
"""Size words, and the share of the picture's side that such an object fills."""

TARGET_COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown")
COLOR_WORDS = re.compile(
    r"\b(red|orange|yellow|green|teal|blue|light blue|purple|pink|brown|black|gray|grey|white|beige|golden|dark"
    r"|light)\b"
)

GRID = {
    2: ((70, 128), (186, 128)),
    3: ((66, 84), (190, 84), (128, 190)),
    4: ((70, 70), (186, 70), (70, 186), (186, 186)),
    5: ((64, 64), (192, 64), (128, 128), (64, 192), (192, 192)),
    6: ((56, 84), (128, 84), (200, 84), (56, 176), (128, 176), (200, 176)),
    9: tuple((x, y) for y in (48, 128, 208) for x in (48, 128, 208)),
}
"""Where the middles of so many objects lie, in pixels."""

GRID_SIDE = {2: 104, 3: 92, 4: 92, 5: 72, 6: 66, 9: 62}

SCENE_SUBGROUPS = {
    "animal-mammal", "animal-bird", "animal-reptile", "animal-amphibian", "plant-flower", "plant-other",
    "place-building", "place-other", "transport-ground", "animal-bug",
}  # fmt: skip
SIDES = {"left": (62, " on the left"), "middle": (128, ""), "right": (194, " on the right")}

SHAPES = {
    "circle": '<circle cx="50" cy="50" r="46"/>',
    "crescent": '<path d="M62 5a46 46 0 1 0 0 90 38 46 0 0 1 0-90z"/>',
    "cross": '<path d="M35 5h30v30h30v30H65v30H35V65H5V35h30z"/>',
    "diamond": '<path d="M50 3 92 50 50 97 8 50z"/>',
    "heart": '<path d="M50 92C10 60 4 44 4 30 4 14 16 6 28 6c10 0 18 6 22 14C54 12 62 6 72 6c12 0 24 8 24 24'
    ' 0 14-6 30-46 62z"/>',
    "hexagon": '<path d="M26 8h48l24 42-24 42H26L2 50z"/>',
    "ring": '<path fill-rule="evenodd" d="M50 4a46 46 0 1 0 0 92 46 46 0 1 0 0-92zm0 24a22 22 0 1 1 0 44 22 22 0 1 1'
    ' 0-44z"/>',
    "square": '<rect x="8" y="8" width="84" height="84"/>',
    "star": '<path d="M50 4 62 38H98L69 59 80 94 50 73 20 94 31 59 2 38H38z"/>',
    "triangle": '<path d="M50 6 96 90H4z"/>',
}
SHAPE_SIZES = (("", 130), ("small ", 70), ("large ", 210))
SHAPE_COLORS = tuple(color for color in COLORS if color not in ("white", "beige"))

Shape = tuple[str, str]
"""Name and colour."""

Jitter = Callable[[int], int]
"""jitter(n): a random whole number from -n to n."""


def on_grounds(rng: Random, sprites: Sequence[Sprite], count: int) -> Iterator[Picture]:
    """One object, small, large or neither, on a coloured ground or on a gradient from one colour to another."""
    by_style = _by_style(sprites)
    styles = sorted(by_style)
    for _ in range(count):
        sprite = rng.choice(by_style[rng.choice(styles)])
        color = rng.choice(_grounds_for(sprite))
        size, share = rng.choice(SIZES)
        is_gradient = rng.random() < 0.25
        second = rng.choice([ground for ground in _grounds_for(sprite) if ground != color])
        canvas = gradient(rng, color, second) if is_gradient else plain(rng, color)
        paste(canvas, fit(sprite.image, SIZE * share), MIDDLE, MIDDLE)
        name = phrase(sprite.concept.label)
        if size and is_singular(name):
            name = an(size + without_article(name))
        ground = f"{an(color)} to {second} gradient background" if is_gradient else f"{an(color)} background"
        texts = [f"{name} on {ground}, {sprite.art.style}", f"{name} on {ground}"]
        texts.append(f"{sprite.art.prefix} {name} on {ground}")
        held = left_out(0.06, "bg", sprite.concept.code, color)
        attributes = {"bg": color, "bg2": second if is_gradient else None, "size": size.strip()}
        yield _of_sprite("background", sprite, canvas, texts, held, attributes)


def recolored(rng: Random, sprites: Sequence[Sprite], count: int, max_tries: int = 20000) -> Iterator[Picture]:
    """Objects of one main colour, painted in another. Fewer than `count` if too many tries fail."""
    paintable = [sprite for sprite in sprites if _has_main_color(sprite) and _is_simple(sprite)]
    made = 0
    for _ in range(max_tries):
        if made >= count or not paintable:
            break
        sprite = rng.choice(paintable)
        color = rng.choice([color for color in TARGET_COLORS if color != sprite.colors[0][0]])
        image = recolor(rng, fit(sprite.image, SIZE * 0.86), sprite.colors, color)
        if image is None:
            continue
        made += 1
        ground = "white" if rng.random() < 0.6 else rng.choice([ground for ground in GROUNDS if ground != color])
        canvas = plain(rng, ground)
        paste(canvas, image, MIDDLE, MIDDLE)
        noun = re.sub(r"\s+", " ", COLOR_WORDS.sub("", sprite.concept.label.lower())).strip()
        name, style = f"{an(color)} {noun}", sprite.art.style
        tail = "" if ground == "white" else f", {ground} background"
        texts = [f"{name}, {style}{tail}", f"{name} on {an(ground)} background, {style}", name]
        held = left_out(0.1, "rc", noun, color)
        attributes = {"color": color, "bg": ground}
        yield _of_sprite("recolor", sprite, canvas, texts, held, attributes, label=f"{color} {noun}")


def pairs(rng: Random, sprites: Sequence[Sprite], tries: int) -> Iterator[Picture]:
    """Two objects of one style, side by side, one above the other, or a large and a small one."""
    by_style = _by_style(sprites)
    styles = sorted(by_style)
    for _ in range(tries):
        first, second = rng.sample(by_style[rng.choice(styles)], 2)
        if first.concept.code == second.concept.code:
            continue
        relation = rng.choice(("left", "above", "big", "and"))
        on_white = rng.random() < 0.5
        color = rng.choice([ground for ground in _grounds_for(first) if ground in _grounds_for(second)])
        ground = "white" if on_white else color
        canvas = plain(rng, ground)
        texts = _pair_captions(relation, phrase(first.concept.label), phrase(second.concept.label), _tail(ground))
        if not texts:
            continue
        _place_pair(rng, canvas, relation, first.image, second.image)
        codes = [first.concept.code, second.concept.code]
        yield Picture(
            image=canvas,
            kind="pair",
            key=f"{first.art.name}:{'+'.join(codes)}",
            texts=[f"{text}, {first.art.style}" for text in texts] + texts[:1],
            split=HELD_OUT_COMPOSITION if left_out(0.08, *sorted(codes)) else TRAIN,
            set=first.art.name,
            style=first.art.style,
            concept=codes,
            label=[first.concept.label, second.concept.label],
            license=first.art.license,
            source=first.art.package,
            extra={"attrs": {"relation": relation, "bg": ground}},
        )


def counts(rng: Random, sprites: Sequence[Sprite], count: int) -> Iterator[Picture]:
    """Several of one object, scattered about a fixed pattern."""
    countable = [sprite for sprite in sprites if _is_simple(sprite)]
    for _ in range(count):
        sprite = rng.choice(countable)
        number = rng.choice(list(GRID))
        on_white = rng.random() < 0.6
        color = rng.choice(_grounds_for(sprite))
        ground = "white" if on_white else color
        canvas = plain(rng, ground)
        image = fit(sprite.image, GRID_SIDE[number])
        for x, y in GRID[number]:
            paste(canvas, image, x + rng.randint(-5, 5), y + rng.randint(-5, 5))
        text = f"{NUMBER_WORDS[number]} {plural(sprite.concept.label.lower())}{_tail(ground)}"
        held = left_out(0.1, "ct", sprite.concept.code, number)
        attributes = {"count": number, "bg": ground}
        texts = [f"{text}, {sprite.art.style}", text]
        yield _of_sprite("count", sprite, canvas, texts, held, attributes, suffix=f"x{number}")


def in_scenes(rng: Random, sprites: Sequence[Sprite], scenes: Sequence[Scene], count: int) -> Iterator[Picture]:
    """An animal, plant, building or vehicle standing at the foot of a landscape."""
    fitting = [sprite for sprite in sprites if sprite.concept.subgroup in SCENE_SUBGROUPS and _is_simple(sprite)]
    for _ in range(count):
        sprite, scene = rng.choice(fitting), rng.choice(scenes)
        canvas, image = scene.image.copy(), fit(sprite.image, rng.choice((90, 110, 130)))
        side = rng.choice(tuple(SIDES))
        middle, where = SIDES[side]
        x, bottom = middle + rng.randint(-8, 8), 246 - rng.randint(0, 22)
        paste(canvas, image, x, bottom - image.height / 2)
        name = phrase(sprite.concept.label)
        texts = [
            f"{name}{where} in {scene.caption}, {sprite.art.style}",
            f"{name} in {scene.caption}",
            f"{scene.caption} and {name}{where}",
        ]
        held = left_out(0.08, "ls", sprite.concept.code)
        yield _of_sprite("scene", sprite, canvas, texts, held, {"pos": side, **scene.attributes})


def shapes(rng: Random, count: int) -> Iterator[Picture]:
    """One or two geometric shapes, our own drawing."""
    names = tuple(SHAPES)
    for i in range(count):
        ground = "white" if rng.random() < 0.6 else rng.choice(GROUNDS)
        canvas = plain(rng, ground)
        number = rng.choice((1, 1, 2, 2, 2))
        colors = [color for color in SHAPE_COLORS if color != ground]
        drawn: list[Shape] = [(rng.choice(names), rng.choice(colors)) for _ in range(number)]
        texts = _draw_shapes(rng, canvas, drawn, _tail(ground))
        held = any(left_out(0.1, "sh", *shape) for shape in drawn)
        yield Picture(
            image=canvas,
            kind="shapes",
            key=str(i),
            texts=[f"{text}, geometric shapes" for text in texts],
            split=HELD_OUT_COMPOSITION if held else TRAIN,
            set="shapes",
            style="geometric shapes",
            concept=[name for name, _ in drawn],
            license="own work",
            source="generated",
            extra={"attrs": {"objects": drawn, "bg": ground}},
        )


def _of_sprite(
    kind: str, sprite: Sprite, canvas: Image.Image, texts: list[str], held: bool, attributes: dict[str, Any], *,
    label: str = "", suffix: str = "",
) -> Picture:  # fmt: skip
    """A picture of one sprite. label: if not the concept's; suffix: of the key."""
    art, concept = sprite.art, sprite.concept
    return Picture(
        image=canvas,
        kind=kind,
        key=f"{art.name}:{concept.code}{suffix}",
        texts=texts,
        split=HELD_OUT_COMPOSITION if held else TRAIN,
        set=art.name,
        style=art.style,
        concept=concept.code,
        label=label or concept.label,
        license=art.license,
        source=art.package,
        extra={"attrs": attributes},
    )


def _pair_captions(relation: str, first: str, second: str, tail: str) -> list[str]:
    """What can be said of a pair; nothing if a size word does not fit its names."""
    if relation == "left":
        return [
            f"{first} to the left of {second}{tail}",
            f"{second} to the right of {first}{tail}",
            f"{first} and {second} side by side{tail}",
        ]
    if relation == "and":
        return [f"{first} and {second}{tail}", f"{first} next to {second}{tail}"]
    if relation == "above":
        return [f"{first} above {second}{tail}", f"{second} below {first}{tail}"]
    if not (is_singular(first) and is_singular(second)):
        return []
    large, small = f"a large {without_article(first)}", f"a small {without_article(second)}"
    return [f"{large} and {small}{tail}", f"{small} next to {large}{tail}"]


def _place_pair(rng: Random, canvas: Image.Image, relation: str, first: Image.Image, second: Image.Image) -> None:
    jitter = _jitter(rng)
    if relation == "above":
        paste(canvas, fit(first, 110), 128 + jitter(20), 66 + jitter(4))
        paste(canvas, fit(second, 110), 128 + jitter(20), 190 + jitter(4))
    elif relation == "big":
        paste(canvas, fit(first, 160), 92 + jitter(4), 118 + jitter(8))
        paste(canvas, fit(second, 70), 208 + jitter(4), 196 + jitter(6))
    else:
        paste(canvas, fit(first, 112), 68 + jitter(6), 128 + jitter(14))
        paste(canvas, fit(second, 112), 188 + jitter(6), 128 + jitter(14))


def _draw_shapes(rng: Random, canvas: Image.Image, drawn: Sequence[Shape], tail: str) -> list[str]:
    """Put one shape in the middle, or two beside or above each other; returns the captions."""
    jitter = _jitter(rng)
    first, names = drawn[0], [an(f"{color} {name}") for name, color in drawn]
    if len(drawn) == 1:
        size, side = rng.choice(SHAPE_SIZES)
        _put_shape(rng, canvas, first, MIDDLE + jitter(10), MIDDLE + jitter(10), side)
        return [f"{an(f'{size}{first[1]} {first[0]}')}{tail}"]
    if rng.random() < 0.5:
        _put_shape(rng, canvas, first, 68, MIDDLE + jitter(20), 100)
        _put_shape(rng, canvas, drawn[1], 188, MIDDLE + jitter(20), 100)
        left, right = names
        texts = [f"{left} to the left of {right}", f"{right} to the right of {left}", f"{left} and {right}"]
    else:
        _put_shape(rng, canvas, first, MIDDLE + jitter(20), 68, 100)
        _put_shape(rng, canvas, drawn[1], MIDDLE + jitter(20), 188, 100)
        upper, lower = names
        texts = [f"{upper} above {lower}", f"{lower} below {upper}"]
    return [f"{text}{tail}" for text in texts]


def _put_shape(rng: Random, canvas: Image.Image, shape: Shape, x: int, y: int, side: int) -> None:
    name, color = shape
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" width="100" height="100">'
        f'<g fill="rgb{shade(rng, color)}">{SHAPES[name]}</g></svg>'
    )
    paste(canvas, render(svg, side), x, y)


def _jitter(rng: Random) -> Jitter:
    return lambda most: rng.randint(-most, most)


def _by_style(sprites: Sequence[Sprite]) -> dict[str, list[Sprite]]:
    groups: dict[str, list[Sprite]] = {}
    for sprite in sprites:
        groups.setdefault(sprite.art.name, []).append(sprite)
    return groups


def _grounds_for(sprite: Sprite) -> list[str]:
    """The grounds that do not have the sprite's main colour."""
    return [ground for ground in GROUNDS if not sprite.colors or sprite.colors[0][0] != ground]


def _tail(ground: str) -> str:
    return "" if ground == "white" else f" on {an(ground)} background"


def _is_simple(sprite: Sprite) -> bool:
    """Whether the name is a plain countable noun: few words, no preposition, no plural."""
    label = sprite.concept.label.lower()
    return (
        re.fullmatch(r"[a-z' -]+", label) is not None
        and len(label.split()) <= 3
        and not re.search(r"\b(with|of|in|on|and|button|face|mark)\b", label)
        and not label.endswith("s")
    )


def _has_main_color(sprite: Sprite) -> bool:
    return bool(sprite.colors) and sprite.colors[0][1] > 0.5 and sprite.colors[0][0] not in ("white", "black", "gray")
