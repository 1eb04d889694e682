"""Pictures ready to be trained on: against Pillow and the autoencoder, asked directly."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import usual_buckets
from ldm.data.captions import CaptionRules
from ldm.data.example import Example
from ldm.data.file_at import FileAt
from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline.images import to_tensor
from ldm.pipeline.load import random_system
from ldm.training.tune.cache import Cache
from ldm.training.tune.pictures import Prepared, prepare

MODEL = random_system(tiny(sd1()))
BUCKETS = usual_buckets(64)


def picture_file(path: Path, width: int, height: int, seed: int = 0) -> FileAt:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return FileAt(path)


def example(path: Path, width: int = 64, height: int = 64, **fields) -> Example:
    return Example(path.name, picture_file(path, width, height), ("a thing",), CaptionRules(), **fields)


def prepared(examples: list[Example], folder: Path, **options) -> list[Prepared]:
    found = list(prepare(examples, BUCKETS, MODEL.autoencoder, Cache(folder / "cache"), **options))
    assert all(isinstance(one, Prepared) for one in found)
    return found  # type: ignore[return-value]


def encoded(image: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        return MODEL.autoencoder.encode(to_tensor(image)[None])[0]


def test_a_latent_is_the_autoencoders_and_the_mirrored_one_of_the_mirrored_picture(tmp_path):
    (one,) = prepared([example(tmp_path / "a.png", flip=True)], tmp_path)
    image = Image.open(tmp_path / "a.png")
    assert one.bucket == (64, 64) and len(one.views) == 2
    assert torch.allclose(one.view(0)["latent"], encoded(image), atol=1e-5)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.allclose(one.view(1)["latent"], encoded(mirrored), atol=1e-5)
    assert [one.drawn(u) for u in (0.0, 0.49, 0.5, 0.999)] == [0, 0, 1, 1]


def test_where_memory_runs_out_it_is_encoded_in_tiles(tmp_path, monkeypatch):
    picture = example(tmp_path / "a.png")
    expected = encoded(Image.open(tmp_path / "a.png"))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(MODEL.autoencoder), "encode", fail)
    (one,) = prepared([picture], tmp_path)
    assert torch.allclose(one.view(0)["latent"], expected, atol=1e-5)


def test_masks_and_hints_are_cut_like_their_picture(tmp_path):
    half = np.zeros((64, 128, 3), dtype=np.uint8)
    half[:, 64:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    beside = FileAt(tmp_path / "half.png")
    (one,) = prepared([example(tmp_path / "a.png", 128, 64, mask=beside, hint=beside, flip=True)], tmp_path)
    (width, height), crop = one.bucket, one.views[0].crop
    assert width > height
    for number, mirrored in ((0, False), (1, True)):
        view = one.view(number)
        shown = Image.fromarray(half).resize(crop.scaled, Image.Resampling.LANCZOS)
        shown = shown.crop((crop.left, crop.top, crop.left + width, crop.top + height))
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
        pixels = pixels.flip(-1) if mirrored else pixels
        assert (view["hint"].int() - pixels.int()).abs().max() <= 1
        means = pixels[0].float().view(height // 8, 8, width // 8, 8).mean(dim=(1, 3)) / 255
        assert torch.allclose(view["mask"][0], means, atol=0.01)


def test_nothing_is_encoded_twice_and_other_weights_are_another_entry(tmp_path, monkeypatch):
    calls = []
    encode = MODEL.autoencoder.encode
    monkeypatch.setattr(MODEL.autoencoder, "encode", lambda images: (calls.append(1), encode(images))[1])
    pictures = [example(tmp_path / f"{i}.png") for i in range(2)]
    pictures[1] = Example("b", picture_file(tmp_path / "1.png", 64, 64, seed=5), ("b",), CaptionRules())
    prepared(pictures, tmp_path)
    prepared(pictures, tmp_path)
    assert len(calls) == 2
    with torch.no_grad():
        MODEL.autoencoder.quant_conv.weight.add_(0.1)
    prepared(pictures, tmp_path)
    with torch.no_grad():
        MODEL.autoencoder.quant_conv.weight.sub_(0.1)
    assert len(calls) == 4


def test_random_crops_stay_inside_and_are_the_same_again(tmp_path):
    wide = example(tmp_path / "a.png", 640, 64, random_crop=True)
    first, again = (prepared([wide], tmp_path / name)[0] for name in ("x", "y"))
    assert first.views == again.views and len({view.crop.left for view in first.views}) > 1
    for view in first.views:
        assert 0 <= view.crop.left <= view.crop.spare[0] and 0 <= view.crop.top <= view.crop.spare[1]


def test_a_picture_that_cannot_be_read_is_named_and_the_others_go_on(tmp_path):
    broken = tmp_path / "broken.png"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    broken.write_bytes(buffer.getvalue()[:60])
    bad = Example("broken.png", FileAt(broken), ("x",), CaptionRules())
    first, second = prepare([bad, example(tmp_path / "a.png")], BUCKETS, MODEL.autoencoder, Cache(tmp_path / "c"))
    assert isinstance(first, tuple) and first[0] is bad and "cannot be read" in str(first[1])
    assert isinstance(second, Prepared)


def test_an_entry_that_is_damaged_during_the_run_is_named(tmp_path):
    (one,) = prepared([example(tmp_path / "a.png")], tmp_path)
    path = one.cache.path(one.keys[0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LdmError, match="damaged or removed during the run"):
        one.view(0)
