"""The artwork: which packages it comes from, and which drawing shows which concept.

The drawings are icon sets and Unicode's names for them, from npm. To fetch them, in an empty folder:

    npm pack @iconify-json/{noto@1.2.9,noto-v1@1.2.5,twemoji@1.2.5,fluent-emoji@1.2.7,fluent-emoji-flat@1.2.6} \\
             @iconify-json/{emojione@1.2.3,fxemoji@1.2.2,streamline-emojis@1.2.4,game-icons@1.2.4} emojibase-data@17.0.0
    for f in *.tgz; do mkdir -p "${f%.tgz}" && tar -xzf "$f" -C "${f%.tgz}" --strip-components=1; done

An icon set is `icons.json` (SVG bodies by name, aliases), `chars.json` (code points -> names; empty in some sets) and
`info.json` (author, licence). A concept is one emoji of Unicode, known by its code points ("1f34e": red apple).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.pictures.words import slug
from ldm.errors import LdmError


@dataclass(frozen=True)
class Art:
    """One artist's set of emoji: its package, the words its pictures are asked for with, and its credit."""

    name: str
    package: str
    style: str
    prefix: str
    license: str
    credit: str


EMOJI_SETS = (
    Art("noto", "noto", "noto emoji style", "a noto emoji of", "Apache-2.0", "Noto Emoji (c) Google"),
    Art("blob", "noto-v1", "blob emoji style", "a blob emoji of", "Apache-2.0", "Noto Emoji v1 (c) Google"),
    Art("twemoji", "twemoji", "twemoji style", "a twemoji of", "CC-BY-4.0", "Twemoji (c) Twitter and contributors"),
    Art("fluent3d", "fluent-emoji", "3d emoji style", "a 3d emoji of", "MIT", "Fluent Emoji (c) Microsoft"),
    Art("fluentflat", "fluent-emoji-flat", "flat emoji style", "a flat emoji of", "MIT",
        "Fluent Emoji Flat (c) Microsoft"),
    Art("emojitwo", "emojione", "emojitwo style", "an emojitwo emoji of", "CC-BY-4.0",
        "EmojiTwo / EmojiOne 2.2 (c) Ranks.com"),
    Art("fxemoji", "fxemoji", "firefox emoji style", "a firefox emoji of", "CC-BY-4.0", "FxEmojis (c) Mozilla"),
    Art("streamline", "streamline-emojis", "outlined cartoon style", "an outlined cartoon of", "CC-BY-4.0",
        "Streamline Emojis (c) Streamline"),
)  # fmt: skip
FINE_TUNING_SET = "streamline"
"""Left out of training wholly: an example of a style to fine-tune on."""

SKIN_TONE_SETS = ("noto", "twemoji", "fluentflat")
"""The sets whose skin-tone variants are used."""

SHARED_NAME_SETS = ("noto", "twemoji", "fluentflat")
"""Their icon names, known by code point, help to recognise the icons of the sets that have only names."""

SILHOUETTES = Art("game-icons", "game-icons", "silhouette icon style", "", "CC-BY-3.0",
                  "Icons made by Lorc, Delapouite and contributors, https://game-icons.net")  # fmt: skip

LICENSE_WORDS = {
    "Apache-2.0": "Apache License 2.0 https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "MIT License",
    "CC-BY-4.0": "CC BY 4.0 https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-3.0": "CC BY 3.0 https://creativecommons.org/licenses/by/3.0/",
}

DROPPED_GROUPS = {"flags", "component"}
DROPPED_SUBGROUPS = {
    "alphanum", "keycap", "gender", "av-symbol", "other-symbol", "skin-tone", "hair-style", "family",
}  # fmt: skip

UNWANTED = re.compile(
    r"\b(suicide|hang(ed|man|ing)|noose|gallows|guillotine|decapitat\w*|impal\w*|tortur\w*|corpse|dead body|blood\w*"
    r"|bleeding|gore|gut|intestine|severed|dismember\w*|crucif\w*|swastika|nazi|kkk|nude|naked|breast|penis|vagina"
    r"|condom|sex\w*|underage|eighteen|middle finger|cigarette|smoking|marijuana|cannabis|syringe|drug|gun|pistol"
    r"|rifle|shotgun|bullet|revolver|machine gun|bomb|grenade|explosion|kill\w*|murder\w*|slaver\w*|slave|whip"
    r"|gas chamber|stab\w*|sawed|ak47|uzi|luger|glock|bayonet|rape|abuse|electric chair|executioner|beheading"
    r"|mutilat\w*|vomit\w*)\b"
)
"""Names and keywords that no picture of ours is asked for with: violence, drugs, sex."""


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points ("1f9d9-200d-2640"), CLDR name and keywords, and its place in Unicode's order.

    base: the code without the skin tone; it equals `code` for all but skin-tone variants.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    base: str

    @property
    def has_skin_tone(self) -> bool:
        """Whether this drawing is a variant in some skin tone."""
        return self.base != self.code

    @property
    def is_wanted(self) -> bool:
        """Whether we draw it: no flags, letters or bare signs, nothing unwanted."""
        return (
            self.group not in DROPPED_GROUPS
            and self.subgroup not in DROPPED_SUBGROUPS
            and not UNWANTED.search(self.label.lower())
        )


class IconSet:
    """One icon package as it was unpacked."""

    def __init__(self, npm_folder: Path, art: Art) -> None:
        folder = _package_folder(npm_folder, f"iconify-json-{art.package}")
        package = _read_json(folder / "package.json")
        self.art = art
        self.source = f"{package['name']}@{package['version']}"
        self.homepage: str = _read_json(folder / "info.json")["author"]["url"]
        self.names_by_code: dict[str, str] = _read_json(folder / "chars.json")
        data = _read_json(folder / "icons.json")
        self.icons: dict[str, dict[str, Any]] = data["icons"]
        self.aliases: dict[str, dict[str, Any]] = data.get("aliases", {})
        self._frame: dict[str, Any] = {"left": 0, "top": 0, "width": 16, "height": 16}
        self._frame |= {edge: data[edge] for edge in self._frame if edge in data}

    def resolve(self, name: str) -> str | None:
        """The icon behind a name or a chain of aliases; None if there is none."""
        for _ in range(5):
            if name in self.icons or name not in self.aliases:
                break
            name = self.aliases[name]["parent"]
        return name if name in self.icons else None

    def svg(self, name: str, color: str = "") -> str:
        """The icon as a square SVG document, `color` put for `currentColor`."""
        icon = self._frame | self.icons[name]
        width, height, side = icon["width"], icon["height"], max(icon["width"], icon["height"])
        left, top = icon["left"] - (side - width) / 2, icon["top"] - (side - height) / 2
        body = icon["body"].replace("currentColor", color) if color else icon["body"]
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{side}" height="{side}" viewBox="{left} {top} {side} {side}">{body}</svg>'
        )


def read_concepts(npm_folder: Path) -> dict[str, Concept]:
    """All emoji that Unicode has a group for, skin-tone variants included, by code."""
    folder = _package_folder(npm_folder, "emojibase-data")
    messages = _read_json(folder / "en" / "messages.json")
    groups = {item["order"]: item["key"] for item in messages["groups"]}
    subgroups = {item["order"]: item["key"] for item in messages["subgroups"]}
    concepts: dict[str, Concept] = {}
    for item in _read_json(folder / "en" / "data.json"):
        if item.get("group") is None:
            continue
        group, subgroup = groups[item["group"]], subgroups[item["subgroup"]]
        base, tags = _code(item["hexcode"]), tuple(item.get("tags", ()))
        for variant in (item, *item.get("skins", ())):
            code = _code(variant["hexcode"])
            concepts[code] = Concept(code, variant["label"], tags, group, subgroup, base)
    return concepts


def match_icons(icon_sets: Mapping[str, IconSet], concepts: Mapping[str, Concept]) -> dict[str, dict[str, str]]:
    """Which icon shows which concept: set name -> concept code -> icon name.

    Sets with code points say so themselves; in the others the icon's name must be a name of the concept.
    """
    codes_by_name = _codes_by_name(icon_sets, concepts)
    return {
        name: _match_codes(icons, concepts) if icons.names_by_code else _match_names(icons, codes_by_name)
        for name, icons in icon_sets.items()
    }


def credits_text(icon_sets: Mapping[str, IconSet], silhouettes: IconSet) -> str:
    """The attributions that the licences ask for, as Markdown."""
    lines = [
        "# Artwork used",
        "",
        "Rendered to 256x256, recoloured, placed on backgrounds and combined; changes were made.",
        "",
    ]
    for name, icons in icon_sets.items():
        note = " (fine-tuning example only)" if name == FINE_TUNING_SET else ""
        license_words = LICENSE_WORDS[icons.art.license]
        lines.append(f"- {icons.art.credit} - {license_words} - npm {icons.source} - {icons.homepage}{note}")
    lines += [
        f"- {silhouettes.art.credit} - {LICENSE_WORDS[silhouettes.art.license]} - npm {silhouettes.source}",
        "- DiceBear styles critters, clay, sprouts, planets, landscape, voxel-art, voxel-bot by DiceBear, "
        "https://www.dicebear.com - CC0 1.0 - PyPI dicebear-styles",
        "- Names and keywords: emojibase-data (MIT, (c) Miles Johnson), from Unicode CLDR (Unicode License v3)",
    ]
    return "\n".join(lines) + "\n"


def _match_codes(icons: IconSet, concepts: Mapping[str, Concept]) -> dict[str, str]:
    matched = {}
    for hexcode, name in icons.names_by_code.items():
        concept, icon = concepts.get(_code(hexcode)), icons.resolve(name)
        if concept and icon and (not concept.has_skin_tone or icons.art.name in SKIN_TONE_SETS):
            matched[concept.code] = icon
    return matched


def _match_names(icons: IconSet, codes_by_name: Mapping[str, str]) -> dict[str, str]:
    joined = {name.replace("-", ""): code for name, code in codes_by_name.items()}
    matched: dict[str, str] = {}
    for name in [*icons.icons, *icons.aliases]:
        icon = icons.resolve(name)
        if icon is None or icons.icons[icon].get("hidden"):
            continue
        plain = re.sub(r"-\d+$", "", name)  # "cat-2" is a second drawing of a cat
        code = codes_by_name.get(name) or codes_by_name.get(plain) or joined.get(plain.replace("-", ""))
        if code:
            matched.setdefault(code, icon)
    return matched


def _codes_by_name(icon_sets: Mapping[str, IconSet], concepts: Mapping[str, Concept]) -> dict[str, str]:
    """Concepts without skin tone by hyphenated name: Unicode's first, then those of the sets with code points."""
    names = {slug(concept.label): code for code, concept in concepts.items() if not concept.has_skin_tone}
    for set_name in SHARED_NAME_SETS:
        for hexcode, name in icon_sets[set_name].names_by_code.items():
            concept = concepts.get(_code(hexcode))
            if concept and not concept.has_skin_tone:
                names.setdefault(name, concept.code)
    return names


def _code(hexcode: str) -> str:
    """Code points as all packages spell them alike: lower case, joined by hyphens, no variation selector."""
    return hexcode.lower().replace("-fe0f", "").replace("_", "-").lstrip("u")


def _package_folder(npm_folder: Path, package: str) -> Path:
    found = sorted(path for path in npm_folder.glob(f"{package}-[0-9]*") if path.is_dir())
    if not found:
        raise LdmError(f"{npm_folder}: no folder {package}-VERSION; run `npm pack` as ldm.data.pictures.sources says")
    return found[-1]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LdmError(f"{path}: cannot be read as JSON ({error}); unpack the package again") from error
