"""The whole build on artwork of three squares a set, with packages laid out as npm unpacks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from webdataset.compat import WebDataset

from ldm.data.packed import open_packed, pack
from ldm.data.pictures.build import Amounts, build
from ldm.data.pictures.sources import EMOJI_SETS, SILHOUETTES, IconSet, match_icons, read_concepts
from ldm.errors import LdmError

FEW = Amounts(parametric=3, background=6, recolor=4, pair=6, count=4, scene=4, shapes=6)
CONCEPTS = {"1F400": "rat", "1F402": "ox", "1F98A": "fox"}
COLORS = {"rat": "#d62828", "ox": "#286edc", "fox": "#3ca046"}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_unicode(npm: Path) -> None:
    folder = npm / "emojibase-data-17.0.0" / "en"
    hand = {"hexcode": "270B-1F3FF", "label": "raised hand: dark skin tone"}
    animals = [
        {"hexcode": code, "label": label, "tags": ["animal"], "group": 3, "subgroup": 30}
        for code, label in CONCEPTS.items()
    ]
    more = [
        {"hexcode": "270B", "label": "raised hand", "tags": [], "group": 1, "subgroup": 10, "skins": [hand]},
        {"hexcode": "1F3FF", "label": "dark skin tone", "tags": []},  # no group: not an emoji of its own
        {"hexcode": "1F52B", "label": "water pistol", "tags": [], "group": 3, "subgroup": 30},
    ]
    write_json(folder / "data.json", animals + more)
    groups = [{"order": 1, "key": "people-body"}, {"order": 3, "key": "animals-nature"}]
    subgroups = [{"order": 10, "key": "hand-fingers-open"}, {"order": 30, "key": "animal-mammal"}]
    write_json(folder / "messages.json", {"groups": groups, "subgroups": subgroups})


def write_icons(npm: Path, package: str, icons: dict[str, str], chars: dict[str, str], aliases: dict[str, Any]) -> None:
    folder = npm / f"iconify-json-{package}-1.2.3"
    bodies = {
        name: {"body": f'<rect x="2" y="{2 + i}" width="12" height="10" fill="{color}"/>'}
        for i, (name, color) in enumerate(icons.items())
    }
    write_json(folder / "icons.json", {"icons": bodies, "aliases": aliases, "width": 16, "height": 16})
    write_json(folder / "chars.json", chars)
    write_json(folder / "info.json", {"author": {"name": "Someone", "url": "https://example.org/art"}})
    write_json(folder / "package.json", {"name": f"@iconify-json/{package}", "version": "1.2.3"})


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm = tmp_path_factory.mktemp("npm")
    write_unicode(npm)
    for art in EMOJI_SETS:
        named = art.name in ("emojitwo", "fxemoji", "streamline")  # these know no code points
        icons = {**COLORS, "raised-hand": "#faa046", "dark-hand": "#643c23", "water-pistol": "#14a0a0"}
        chars = {code.lower(): label for code, label in CONCEPTS.items()}
        chars |= {"270b": "raised-hand", "270b-1f3ff": "dark-hand", "1f52b": "water-pistol"}
        aliases = {"mouse-like": {"parent": "rat"}, "lost": {"parent": "nothing"}}
        write_icons(npm, art.package, icons, {} if named else chars, aliases)
    silhouettes = dict.fromkeys(("sword", "ak47-gun", "abstract-012", "oak-leaf"), "currentColor")
    write_icons(npm, SILHOUETTES.package, silhouettes, {}, {})
    return npm


@pytest.fixture(scope="module")
def shards(npm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "shards"
    build(npm, out, FEW)
    return out


def records(shards: Path, name: str) -> list[dict[str, Any]]:
    """As webdataset itself reads them, pictures decoded."""
    urls = [str(path) for path in sorted(shards.glob(f"{name}-*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=False).decode("pil")
    samples = list(dataset)
    assert all(sample["webp"].size == (256, 256) and sample["webp"].mode == "RGB" for sample in samples)
    return [sample["json"] for sample in samples]


def test_icons_are_matched_by_code_point_or_by_name(npm: Path) -> None:
    concepts = read_concepts(npm)
    assert concepts["270b-1f3ff"].has_skin_tone and concepts["270b-1f3ff"].base == "270b"
    assert "1f3ff" not in concepts
    assert not concepts["1f52b"].is_wanted
    matched = match_icons({art.name: IconSet(npm, art) for art in EMOJI_SETS}, concepts)
    animals = {code.lower(): label for code, label in CONCEPTS.items()}
    with_hand = {**animals, "270b": "raised-hand", "1f52b": "water-pistol"}
    assert matched["noto"] == {**with_hand, "270b-1f3ff": "dark-hand"}
    assert matched["blob"] == with_hand  # has no skin tones of ours
    assert matched["fxemoji"] == with_hand


def test_aliases_lead_to_icons(npm: Path) -> None:
    icons = IconSet(npm, EMOJI_SETS[0])
    assert (icons.resolve("mouse-like"), icons.resolve("rat")) == ("rat", "rat")
    assert icons.resolve("lost") is None and icons.resolve("absent") is None


def test_training_and_left_out_pictures_are_kept_apart(shards: Path) -> None:
    trained, left_out = records(shards, "pictures"), records(shards, "heldout")
    assert {record["split"] for record in trained} == {"train"}
    assert "train" not in {record["split"] for record in left_out}
    assert {record["set"] for record in left_out if record["split"] == "heldout_style"} == {"streamline"}
    assert "streamline" not in {record["set"] for record in trained}
    kinds = {record["kind"] for record in trained + left_out}
    assert kinds == {
        "emoji", "heldout_style", "silhouette", "parametric", "background", "recolor", "pair", "count", "scene",
        "shapes",
    }  # fmt: skip


def test_captions_name_what_is_drawn(shards: Path) -> None:
    everything = records(shards, "pictures") + records(shards, "heldout")
    fox = next(record for record in everything if record["key"] == "fluent3d:1f98a")
    assert fox["texts"] == [
        "a fox, 3d emoji style",
        "a 3d emoji of a fox",
        "a fox, 3d emoji style, white background",
        "a fox",
        "a fox, animal, 3d emoji style",
        "a fox, mostly green, 3d emoji style",
    ]
    assert (fox["source"], fox["license"]) == ("@iconify-json/fluent-emoji@1.2.3", "MIT")
    composed = {record["source"] for record in everything if record["kind"] in ("background", "count", "scene")}
    assert composed <= {art.package for art in EMOJI_SETS}
    texts = [text for record in everything for text in record["texts"]]
    assert not any("pistol" in text or "gun" in text or "abstract" in text for text in texts)
    assert {record["key"] for record in everything if record["kind"] == "silhouette"} == {"sword", "oak-leaf"}


def test_attributions_come_with_the_pictures(shards: Path) -> None:
    text = (shards / "CREDITS.md").read_text()
    for art in (*EMOJI_SETS, SILHOUETTES):
        assert f"{art.credit} - " in text and f"npm @iconify-json/{art.package}@1.2.3" in text


def test_the_shards_can_be_packed(shards: Path, tmp_path: Path) -> None:
    pack(shards, tmp_path, 32, name="heldout")
    pixels, packed = open_packed(tmp_path, 32, name="heldout")
    assert [record["texts"] for record in packed] == [record["texts"] for record in records(shards, "heldout")]
    assert pixels.shape == (len(packed), 32, 32, 3)


def test_the_same_packages_give_the_same_shards(npm: Path, shards: Path, tmp_path: Path) -> None:
    build(npm, tmp_path / "again", FEW)
    for path in sorted(shards.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_nothing_is_written_where_a_package_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="no folder emojibase-data-VERSION; run `npm pack`"):
        build(tmp_path, tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(npm: Path, shards: Path) -> None:
    with pytest.raises(LdmError, match="is there already"):
        build(npm, shards, FEW)
