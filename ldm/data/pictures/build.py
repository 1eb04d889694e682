"""Draw all pictures of the training set from their public packages: about ten minutes on one core.

    pip install -e ".[data]"
    mkdir npm                              # and fetch and unpack the packages, as the head of sources.py says
    python -m ldm.data.pictures.build --npm npm --out shards
    python -m ldm.data.packed --shards shards --out runs/data --size 128       # ready for training

Writes `pictures-*.tar` to train on, `heldout-*.tar` never to train on (see splits.py), and the attributions CREDITS.md.
The same packages give the same pictures and captions.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from webdataset.writer import ShardWriter

from ldm.data.pictures import compose, parametric, singles
from ldm.data.pictures.picture import Picture, Scene, Sprite
from ldm.data.pictures.sources import EMOJI_SETS, SILHOUETTES, IconSet, credits_text, match_icons, read_concepts
from ldm.data.pictures.splits import TRAIN
from ldm.errors import LdmError

log = logging.getLogger(__name__)

PER_SHARD = 3000
MAX_SCENES = 250
"""Of the landscapes, those that objects are put into."""


@dataclass(frozen=True)
class Amounts:
    """How many pictures of each generated kind are drawn (of pairs and recolourings: at most)."""

    parametric: int = 1000
    background: int = 4000
    recolor: int = 3000
    pair: int = 4000
    count: int = 2000
    scene: int = 2500
    shapes: int = 3000
    every: int = 1
    """Of the emoji and silhouettes, only each n-th: for a quick look."""


AS_PUBLISHED = Amounts()


def draw_all(npm: Path, amounts: Amounts, seed: int = 7) -> Iterator[Picture]:
    """Yield every picture, left-out ones among them, in a fixed order."""
    rng = Random(seed)
    sprites: list[Sprite] = []
    scenes: list[Scene] = []
    for picture, sprite in _emoji(rng, npm, amounts.every):
        if sprite is not None:
            sprites.append(sprite)
        yield picture
    yield from singles.silhouettes(rng, IconSet(npm, SILHOUETTES), amounts.every)
    for style in parametric.STYLES:
        for picture, scene in singles.illustrations(style, amounts.parametric, seed):
            if scene is not None and len(scenes) < MAX_SCENES:
                scenes.append(scene)
            yield picture
    yield from compose.on_grounds(rng, sprites, amounts.background)
    yield from compose.recolored(rng, sprites, amounts.recolor)
    yield from compose.pairs(rng, sprites, amounts.pair)
    yield from compose.counts(rng, sprites, amounts.count)
    yield from compose.in_scenes(rng, sprites, scenes, amounts.scene)
    yield from compose.shapes(rng, amounts.shapes)


def build(npm: Path, out: Path, amounts: Amounts = AS_PUBLISHED, seed: int = 7, quality: int = 95) -> Counter[str]:
    """Draw all pictures and write them as shards; returns how many there are of each split.

    Args:
        npm: the folder of the unpacked packages.
        out: the folder to write, which must not be there yet; it appears when all is done.
        quality: of the WebP pictures, up to 100.

    Raises LdmError if `out` is there already or a package is missing.
    """
    if out.exists():
        raise LdmError(f"{out}: is there already; name a new folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temp:
        shards = Path(temp) / "shards"
        shards.mkdir()
        splits = _write(draw_all(npm, amounts, seed), shards, quality)
        credits = credits_text(_emoji_sets(npm), IconSet(npm, SILHOUETTES))
        (shards / "CREDITS.md").write_text(credits, encoding="utf-8")
        shards.replace(out)
    return splits


def _write(pictures: Iterable[Picture], folder: Path, quality: int) -> Counter[str]:
    """Write pictures as two sets of shards; returns how many there are of each split."""
    splits: Counter[str] = Counter()
    kind = ""
    with _shard_writer(folder, "pictures") as trained, _shard_writer(folder, "heldout") as held_out:
        for i, picture in enumerate(pictures):
            if picture.kind != kind:
                kind = picture.kind
                log.info("%d pictures drawn; next: %s", i, kind)
            splits[picture.split] += 1
            record = json.dumps(picture.record(), ensure_ascii=False).encode()
            writer = trained if picture.split == TRAIN else held_out
            writer.write({"__key__": f"{i:06d}", "webp": _webp(picture, quality), "json": record})
    return splits


def _emoji(rng: Random, npm: Path, every: int) -> Iterator[tuple[Picture, Sprite | None]]:
    concepts, icon_sets = read_concepts(npm), _emoji_sets(npm)
    matched = match_icons(icon_sets, concepts)
    splits = singles.EmojiSplits.of(matched, concepts)
    for name, icons in icon_sets.items():
        yield from singles.emoji(rng, icons, matched[name], concepts, splits, every)


def _emoji_sets(npm: Path) -> dict[str, IconSet]:
    return {art.name: IconSet(npm, art) for art in EMOJI_SETS}


def _shard_writer(folder: Path, name: str) -> ShardWriter:
    pattern = f"{folder}/".replace("%", "%%") + f"{name}-%02d.tar"
    return ShardWriter(pattern, maxcount=PER_SHARD, mtime=0, verbose=0)


def _webp(picture: Picture, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.image.convert("RGB").save(stream, "WEBP", quality=quality, method=3)
    return stream.getvalue()


def main() -> None:
    """The command line."""
    import tyro

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        splits = tyro.cli(build, prog="python -m ldm.data.pictures.build")
    except LdmError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    log.info("done: %s", ", ".join(f"{count} {split}" for split, count in splits.items()))


if __name__ == "__main__":
    main()
