"""Characters and scenes drawn from parameters: DiceBear's CC0 styles, and the words for what each drawing shows.

A seed chooses the parts and their colours; the drawing tells which (`eyesVariant: "wink"`, `bodyColor: ["#f4d0a8"]`),
so every attribute of a caption is exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dicebear import Avatar, Style

from ldm.data.pictures.colors import color_name
from ldm.data.pictures.words import an, listing

EYES = {
    "mono": "one big eye", "monoSleepy": "one sleepy eye", "trio": "three eyes", "threeRow": "three eyes in a row",
    "four": "four eyes", "happy": "happy eyes", "closedLine": "closed eyes", "wink": "a wink",
    "squint": "squinting eyes", "wide": "wide eyes", "sleepy": "sleepy eyes", "angry": "angry eyes",
    "close": "close-set eyes", "sideeye": "eyes looking sideways", "side": "eyes looking sideways",
    "round": "round eyes", "dots": "dot eyes", "bigPupils": "big pupils", "inward": "crossed eyes",
    "uneven": "uneven eyes", "googly": "googly eyes", "even": "round eyes", "big": "big eyes", "tiny": "tiny eyes",
    "outward": "eyes looking apart", "down": "eyes looking down", "up": "eyes looking up",
    "pinprick": "pinprick eyes", "open": "open eyes", "soft": "soft eyes", "closed": "closed eyes",
    "star": "star eyes", "square": "square eyes", "visor": "a visor", "cyclops": "one round eye",
    "plus": "plus-shaped eyes",
}  # fmt: skip
MOUTHS = {
    "smile": "a smile", "tinySmile": "a tiny smile", "grin": "a grin", "laugh": "a laughing mouth",
    "teeth": "a toothy mouth", "ooh": "a surprised mouth", "line": "a straight mouth", "smirk": "a smirk",
    "wavy": "a wavy mouth", "catMouth": "a cat mouth", "zigzag": "a zigzag mouth", "frown": "a frown",
    "sad": "a sad mouth", "slant": "a slanted mouth", "dot": "a dot mouth", "open": "an open mouth",
    "tooth": "one tooth", "tongue": "its tongue out", "blep": "its tongue out", "o": "a round open mouth",
    "toothy": "a toothy mouth", "pout": "a pout", "cat": "a cat mouth", "smileBig": "a big smile",
    "uu": "a curly mouth", "openSmall": "a small open mouth", "smileTongue": "a smile and its tongue out",
    "bigSmile": "a big smile", "flat": "a straight mouth", "wideSmile": "a wide smile", "grill": "a grill mouth",
    "speaker": "a speaker mouth",
}  # fmt: skip
TOPS = {
    "horns": "horns", "hornsIn": "curved horns", "hornsSmall": "small horns", "spike": "a spike",
    "antenna": "an antenna", "antennae": "two antennae", "earsRound": "round ears", "earsPointy": "pointy ears",
    "earsDroop": "droopy ears", "spikes": "spikes", "fin": "a fin", "crown": "a crown",
    "sprout": "a sprout on its head", "nub": "a nub on its head", "bobble": "a bobble on its head",
    "curl": "a curl on its head", "loop": "a loop on its head", "peak": "a pointed head", "ears": "ears",
    "crest": "a crest", "swirl": "a swirl on its head", "pellet": "a ball on its head", "tuft": "a tuft of hair",
    "twin": "two antennas", "dish": "a dish antenna", "lightbar": "a light bar", "studs": "studs", "siren": "a siren",
}  # fmt: skip
BODIES = {
    "dome": "dome-shaped", "block": "blocky", "tower": "tall", "chimney": "narrow tall", "squat": "squat",
    "blob": "blobby", "round": "round", "tilt": "tilted", "lean": "leaning", "peak": "pointed",
    "bell": "bell-shaped", "wedge": "wedge-shaped", "wedgeInv": "top-heavy", "steps": "stepped",
    "pear": "pear-shaped", "boulder": "boulder-like", "loaf": "loaf-shaped", "column": "tall", "stack": "stacked",
    "gumdrop": "gumdrop-shaped", "dollop": "dollop-shaped", "slug": "slug-like", "egg": "egg-shaped",
    "cube": "cube-shaped",
}  # fmt: skip
PATTERNS = {
    "belly": "a belly patch", "dots": "dots", "speckles": "speckles", "bar": "a bar", "bars": "bars",
    "spot": "a spot", "stripes": "stripes", "dotRow": "a row of dots", "chevron": "chevrons", "ring": "a ring",
    "spiral": "a spiral", "prints": "prints", "pellets": "pellets", "buttons": "buttons", "stitches": "stitches",
    "patch": "a patch", "coil": "a coil", "freckles": "freckles", "checker": "checks", "zig": "a zigzag",
    "band": "a band",
}  # fmt: skip
PLANTS = {
    "sprout": "a sprout", "seedling": "a seedling", "cactus": "a cactus", "ball": "a round cactus",
    "succulent": "a succulent", "bush": "a bush", "tall": "a tall plant", "flower": "a flower", "tulip": "a tulip",
    "palm": "a palm", "grass": "grass", "buds": "flower buds",
}  # fmt: skip
HAIR = {
    "short": "short hair", "spiky": "spiky hair", "bowl": "a bowl cut", "sideSwept": "side-swept hair",
    "curly": "curly hair", "mohawk": "a mohawk", "buns": "hair buns", "ponytail": "a ponytail", "bob": "a bob",
    "shoulderLength": "shoulder-length hair", "longStraight": "long straight hair", "longWavy": "long wavy hair",
    "partedLong": "long parted hair", "braids": "braids", "twinTails": "twin tails", "afro": "an afro",
    "halfShaved": "half-shaved hair",
}  # fmt: skip
HATS = {"cap": "cap", "beanie": "beanie", "animalEars": "animal-ear hood", "bunnyEars": "bunny-ear hood"}
CLOTHES = {
    "plain": "t-shirt", "stripes": "striped shirt", "jacket": "jacket", "checker": "checkered shirt",
    "overalls": "overalls", "hoodie": "hoodie", "tie": "shirt and tie", "coat": "coat", "dress": "dress",
    "suit": "suit",
}  # fmt: skip
GLASSES = {
    "round": "round glasses", "square": "square glasses", "shades": "sunglasses", "cat": "cat-eye glasses",
    "visor": "a visor",
}  # fmt: skip
BEARDS = {"full": "a beard", "mustache": "a mustache", "goatee": "a goatee", "stubble": "stubble"}
CHESTS = {
    "heart": "a heart on its chest", "buttons": "buttons on its chest", "dial": "a dial on its chest",
    "screen": "a screen on its chest",
}  # fmt: skip
HILLS = {
    "dunes": "dunes", "gentle": "gentle hills", "mesa": "mesas", "peak": "peaks", "ridge": "ridges",
    "rolling": "rolling hills", "rugged": "rugged mountains", "slope": "slopes",
}  # fmt: skip
SUNS = {"sun": "sun", "ring": "ringed sun", "glow": "glowing sun"}
SUN_COLORS = ("red", "orange", "yellow")
MOONS = {"one": "a moon", "two": "two moons", "tiny": "a tiny moon"}
RINGS = {"thin": "a thin ring", "double": "a double ring", "bold": "a bold ring"}
SURFACES = {"cap": "ice-capped", "swirl": "swirled", "terra": "earth-like"}


@dataclass(frozen=True)
class Parts:
    """The parts of one drawing, as DiceBear's options name them."""

    options: Mapping[str, Any]

    def variant(self, part: str) -> str | None:
        """Which form a part has; None if the drawing has no such part."""
        return self.options.get(f"{part}Variant")

    def color(self, part: str, among: Collection[str] = ()) -> str:
        """The colour word of a part that the drawing has."""
        return color_name(self.options[f"{part}Color"][0], among)

    def named(self, part: str, names: Mapping[str, str], default: str = "") -> str:
        """The words for a part's form."""
        return names.get(self.variant(part) or "", default)


@dataclass(frozen=True)
class Description:
    """What a drawing shows, said briefly and in full; its ground; and the attributes behind the words."""

    short: str
    full: str
    ground: str
    attributes: dict[str, str | None]


@dataclass(frozen=True)
class ParametricStyle:
    """A DiceBear style: the words it is asked for with, how it is described, and the attributes that splits go by."""

    words: str
    describe: Callable[[Parts], Description]
    split_by: tuple[str, str]


def open_style(name: str) -> Style:
    """The definition of a DiceBear style."""
    return Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def draw(style: Style, seed: str, size: int) -> tuple[str, Parts]:
    """One drawing of a style as SVG, with its parts."""
    avatar = Avatar(style, {"seed": seed, "size": size})
    return str(avatar), Parts(avatar.to_json()["options"])


def captions(description: Description, style_words: str) -> list[str]:
    """Four captions, from all that is known to the least."""
    short, full, ground = description.short, description.full, description.ground
    texts = (f"{full} {ground}", full, short, f"{short} {ground}")
    return [f"{text}, {style_words}".replace(" ,", ",") for text in texts]


def _creature(parts: Parts, noun: str) -> Description:
    color, ground = parts.color("body"), parts.color("background")
    face = [parts.named("eyes", EYES, "eyes"), parts.named("mouth", MOUTHS, "a mouth")]
    more = [parts.named("top", TOPS), parts.named("pattern", PATTERNS)]
    details = listing([*face, *filter(None, more)])
    return Description(
        short=f"{an(color)} {noun}",
        full=f"{an(parts.named('body', BODIES) + f' {color}')} {noun} with {details}",
        ground=f"on {an(ground)} background",
        attributes={
            "color": color,
            "shape": parts.variant("body"),
            "eyes": parts.variant("eyes"),
            "mouth": parts.variant("mouth"),
            "top": parts.variant("top"),
            "bg": ground,
        },
    )


def _monster(parts: Parts) -> Description:
    return _creature(parts, "monster")


def _clay_creature(parts: Parts) -> Description:
    return _creature(parts, "clay creature")


def _potted_plant(parts: Parts) -> Description:
    color, ground = parts.color("pot"), parts.color("background")
    short = f"{parts.named('plant', PLANTS)} in {an(color)} pot"
    pattern = parts.named("pattern", PATTERNS)
    face = listing([parts.named("eyes", EYES, "eyes"), parts.named("mouth", MOUTHS, "a mouth")])
    return Description(
        short=short,
        full=f"{short}{f' with {pattern}' if pattern else ''}, the pot has {face}",
        ground=f"on {an(ground)} background",
        attributes={"plant": parts.variant("plant"), "color": color, "bg": ground},
    )


def _planet(parts: Parts) -> Description:
    color, surface = parts.color("planet"), parts.variant("surface")
    ring, moons = parts.named("ring", RINGS), parts.named("moons", MOONS)
    details = listing([detail for detail in (ring, moons) if detail])
    surface_words = SURFACES.get(surface or "", surface or "smooth")
    return Description(
        short=f"{an(color)} planet{' with a ring' if ring else ''}",
        full=f"{an(f'{surface_words} {color}')} planet{f' with {details}' if details else ''}",
        ground="in space",
        attributes={
            "color": color,
            "ring": parts.variant("ring"),
            "moons": parts.variant("moons"),
            "surface": surface,
        },
    )


def _landscape(parts: Parts) -> Description:
    sun = parts.named("orb", SUNS)
    sun_color = parts.color("orb", SUN_COLORS) if sun else None
    under = f" under {an(f'{sun_color} {sun}')}" if sun else ""
    far, near = (f"{parts.color(hill)} {parts.named(hill, HILLS)}" for hill in ("hill3", "hill1"))
    return Description(
        short=f"a landscape with hills{under}",
        full=f"a landscape with {far} and {near}{under}",
        ground=f", {parts.color('background')} sky",
        attributes={
            "orb": parts.variant("orb"),
            "sun": sun_color,
            "hill": parts.variant("hill3"),
            "color": parts.color("hill3"),
        },
    )


def _voxel_person(parts: Parts) -> Description:
    outfit, top, ground = parts.variant("outfit"), parts.variant("top"), parts.color("background")
    color = parts.color("jacket" if outfit in ("jacket", "coat", "suit") else "shirt")
    clothes = f"{color} {parts.named('outfit', CLOTHES, 'shirt')}"
    worn = clothes if outfit == "overalls" else an(clothes)
    hair = _colored(parts.color("hair"), HAIR[top]) if top in HAIR else ""
    on_head = f" with {hair}" if hair else f" wearing {an(parts.color('hat') + ' ' + HATS[top])}" if top in HATS else ""
    mouth = parts.named("mouth", MOUTHS, "a smile").replace("its", "their")
    face = [*filter(None, [parts.named("glasses", GLASSES), parts.named("beard", BEARDS)]), mouth]
    short = f"a voxel person in {worn}{on_head}"
    return Description(
        short=short,
        full=f"{short}, {'' if hair else 'with '}{listing(face)}",
        ground=f"on {an(ground)} background",
        attributes={
            "outfit": outfit,
            "color": color,
            "top": top,
            "hair": parts.color("hair") if hair else None,
            "bg": ground,
        },
    )


def _voxel_robot(parts: Parts) -> Description:
    color, top, ground = parts.color("body"), parts.variant("top"), parts.color("background")
    face = [parts.named("eyes", EYES, "eyes"), parts.named("mouth", MOUTHS, "a mouth")]
    more = [TOPS.get(top, top) if top else "", parts.named("chest", CHESTS)]
    short = f"{an(color)} voxel robot"
    return Description(
        short=short,
        full=f"{short} with {listing([*face, *filter(None, more)])}",
        ground=f"on {an(ground)} background",
        attributes={"color": color, "eyes": parts.variant("eyes"), "top": top, "bg": ground},
    )


def _colored(color: str, thing: str) -> str:
    """As in "brown" and "a mohawk" -> "a brown mohawk"; "black" and "braids" -> "black braids"."""
    counted = re.match(r"an? (.+)$", thing)
    return an(f"{color} {counted.group(1)}") if counted else f"{color} {thing}"


STYLES = {
    "critters": ParametricStyle("paper monster style", _monster, ("color", "top")),
    "clay": ParametricStyle("clay style", _clay_creature, ("color", "top")),
    "sprouts": ParametricStyle("potted plant style", _potted_plant, ("plant", "color")),
    "planets": ParametricStyle("planet illustration", _planet, ("color", "ring")),
    "landscape": ParametricStyle("landscape illustration", _landscape, ("color", "orb")),
    "voxel-art": ParametricStyle("voxel style", _voxel_person, ("color", "outfit")),
    "voxel-bot": ParametricStyle("voxel style", _voxel_robot, ("color", "eyes")),
}
