"""Embeddings in every layout that other programs write, and ours as diffusers reads it."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.embeddings import Embedding, read_embedding, read_embeddings, write_embedding

GENERATOR = torch.Generator().manual_seed(7)
SD1 = torch.randn(3, 768, generator=GENERATOR)
LARGE = torch.randn(3, 1280, generator=GENERATOR)
A1111: dict[str, Any] = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": SD1},
    "name": "not the file's",
    "step": 4999,
    "sd_checkpoint": "e3edb8a26f",
    "sd_checkpoint_name": "sd-v1-4",
}

# name in the file -> tensor, the embedding's name, its vectors
LAYOUTS: dict[str, tuple[dict[str, Tensor], str, tuple[Tensor, ...]]] = {
    "diffusers": ({"<cat-toy>": SD1}, "<cat-toy>", (SD1,)),
    "diffusers, one vector": ({"sks": SD1[0]}, "sks", (SD1[:1],)),
    "kohya": ({"emb_params": SD1}, "my style", (SD1,)),
    "kohya, SDXL": ({"clip_l": SD1, "clip_g": LARGE}, "my style", (SD1, LARGE)),
    "refiner": ({"clip_g": LARGE}, "my style", (LARGE,)),
    "OneTrainer": ({"emp_params": SD1, "emp_params_out": SD1 * 2}, "my style", (SD1,)),
    "OneTrainer, SDXL": (
        {"clip_l": SD1, "clip_g": LARGE, "clip_l_out": SD1, "clip_g_out": LARGE},
        "my style",
        (SD1, LARGE),
    ),
    "half precision": ({"emb_params": SD1.half()}, "my style", (SD1.half().float(),)),
    "A1111 in safetensors": ({"string_to_param.*": SD1}, "my style", (SD1,)),
    "bundled": ({"bundle_emb.sks.string_to_param.*": SD1, "lora_unet_x.alpha": torch.ones(())}, "sks", (SD1,)),
    "bundled, SDXL": ({"bundle_emb.s k.clip_g": LARGE, "bundle_emb.s k.clip_l": SD1}, "s k", (SD1, LARGE)),
    "bundled, kohya": ({"bundle_emb.sks.emb_params": SD1}, "sks", (SD1,)),
}


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def assert_holds(embedding: Embedding, name: str, vectors: tuple[Tensor, ...], path: Path) -> None:
    assert embedding.name == name
    assert len(embedding.vectors) == len(vectors)
    assert all(torch.equal(found, wanted) for found, wanted in zip(embedding.vectors, vectors, strict=True))
    assert all(found.dtype == torch.float32 for found in embedding.vectors)
    assert embedding.hash == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_safetensors(layout, tmp_path):
    tensors, name, vectors = LAYOUTS[layout]
    path = tmp_path / "my style.safetensors"
    save(tensors, path)
    embedding = read_embedding(path)
    assert_holds(embedding, name, vectors, path)
    assert set(embedding.unused) == {key for key in tensors if key.endswith("_out")}
    assert (embedding.steps, embedding.base) == (None, None)


@pytest.mark.parametrize(
    ("saved", "name"), [(A1111, "my style"), ({"<cat-toy>": SD1}, "<cat-toy>"), ({"<x>": SD1[0]}, "<x>")]
)
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickles(saved, name, suffix, tmp_path):
    path = tmp_path / f"my style{suffix}"
    torch.save(saved, path)
    embedding = read_embedding(path, allow_pickle=True)
    assert_holds(embedding, name, (SD1[:1] if name == "<x>" else SD1,), path)
    assert (embedding.steps, embedding.base) == ((4999, "sd-v1-4") if saved is A1111 else (None, None))
    with pytest.raises(LdmError, match="allow-pickle"):
        read_embedding(path)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("ran",))

    torch.save({"string_to_param": {"*": SD1}, "x": Bad()}, tmp_path / "bad.pt")
    with pytest.raises(LdmError, match=r"bad\.pt: its pickle asks for"):
        read_embedding(tmp_path / "bad.pt", allow_pickle=True)


def as_json(data: Mapping[str, Any]) -> bytes:
    """As AUTOMATIC1111 puts it: numbers in full, tensors marked."""
    return json.dumps(data, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}).encode()


def in_pixels(data: Mapping[str, Any], height: int = 64) -> Image.Image:
    """A picture with its data left and right of it, by the rules that `ldm.weights.embedding_pictures` states."""
    stream = np.frombuffer(zlib.compress(as_json(data), 9), np.uint8)
    size = -(-len(stream) // (3 * height)) * 3 * height
    state, mask = 0, np.zeros(size, np.uint8)
    for index in range(size):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        mask[index] = state % 255 % 16
    decoration = np.random.default_rng(1).integers(1, 16, (height, size // 3 // height, 3), dtype=np.uint8) << 4
    low, high = (
        (np.resize(half, size) ^ mask).reshape(height, -1, 3) | decoration for half in (stream & 15, stream >> 4)
    )
    picture = np.full((height, 40, 3), 77, np.uint8)
    black = np.zeros((height, 1, 3), np.uint8)
    return Image.fromarray(np.concatenate([low, black, picture, black, high], axis=1))


def test_the_scramble_is_theirs():
    """The first numbers of their generator, as their own test has them."""
    from ldm.weights.embedding_pictures import _generator

    theirs = [253, 242, 127, 44, 157, 27, 239, 133, 38, 79, 167, 4, 177, 95, 130, 79, 78, 14, 52, 215]
    assert [number for number, _ in zip(_generator(), theirs, strict=False)] == [number & 15 for number in theirs]


def test_pictures(tmp_path):
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("sd-ti-embedding", base64.b64encode(as_json(A1111)).decode())
    Image.new("RGB", (32, 32), "red").save(tmp_path / "text.png", pnginfo=chunk)
    in_pixels(A1111).save(tmp_path / "pixels.png")
    in_pixels(A1111).save(tmp_path / "pixels.webp", lossless=True)
    for name in ("text.png", "pixels.png", "pixels.webp"):
        embedding = read_embedding(tmp_path / name)
        assert_holds(embedding, "not the file's", (SD1,), tmp_path / name)
        assert (embedding.steps, embedding.base) == (4999, "sd-v1-4")


def _text(content: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(content).decode())
    return info


@pytest.mark.parametrize(
    ("image", "info", "said"),
    [
        (Image.new("RGB", (32, 32), "red"), None, "no text chunk, and no data in its pixels"),
        (Image.new("RGB", (32, 32)), None, "all black"),
        (in_pixels(A1111).crop((0, 0, 200, 64)), None, "holds no embedding"),
        (Image.new("RGB", (32, 32)), _text(b"{"), "holds no embedding"),
        (Image.new("RGB", (32, 32)), _text(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1], [2, 3]]}}}'), "embedding"),
        (Image.new("RGB", (32, 32)), _text(b'{"string_to_param": {"*": 5}}'), "no embedding"),
        (Image.new("RGB", (32, 32)), _text(b'{"string_to_param": {"*": {}}}'), "without a TORCHTENSOR"),
        (Image.new("RGB", (32, 32)), _text(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1' + b"0" * 400 + b"]]}}}"),
         "no embedding"),
        (Image.new("RGB", (32, 32)), _text(b"[" * 100_000), "no embedding"),
        (Image.new("RGB", (32, 32)), _text(b'{"string_to_param": {"*": {"TORCHTENSOR": [[NaN]]}}}'), "not finite"),
    ],
)  # fmt: skip
def test_pictures_without_an_embedding(image, info, said, tmp_path):
    image.save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(LdmError, match=rf"x\.png: .*{said}"):
        read_embedding(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": SD1, "b": SD1}, "is no textual-inversion embedding: it holds 2 tensors"),
        ({"emp_params_out": SD1}, "it holds 0 tensors"),
        ({"emb_params": torch.zeros(0, 768)}, r"emb_params \(0, 768\) are not the vectors"),
        ({"emb_params": torch.zeros(76, 768)}, "n at most 75"),
        ({"emb_params": torch.zeros(2, 3, 4)}, "are not the vectors"),
        ({"emb_params": torch.zeros(2, 768, dtype=torch.int64)}, "are not the vectors"),
        ({"emb_params": torch.full((2, 768), torch.inf)}, "not finite"),
        ({"clip_l": SD1, "clip_g": LARGE[:1]}, "3 and 1 vectors for its two text towers"),
        ({"clip_l": SD1, "clip_g": LARGE, "t5xxl": SD1}, "it holds 3 tensors"),
    ],
)
def test_what_is_no_embedding(tensors, said, tmp_path):
    save(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LdmError, match=rf"x\.safetensors: .*{said}"):
        read_embedding(tmp_path / "x.safetensors")


def test_several_bundled_with_a_lora(tmp_path):
    save({f"bundle_emb.{word}.string_to_param.*": SD1 for word in "ab"}, tmp_path / "x.safetensors")
    assert [embedding.name for embedding in read_embeddings(tmp_path / "x.safetensors")] == ["a", "b"]
    with pytest.raises(LdmError, match=r"holds 2 embeddings \(a, b\)"):
        read_embedding(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("vectors", "names"),
    [((SD1,), {"emb_params"}), ((SD1, LARGE), {"clip_l", "clip_g"}), ((LARGE,), {"clip_g"})],
    ids=["SD 1.x", "SDXL", "refiner"],
)
def test_written_files(vectors, names, tmp_path):
    written = Embedding("style", vectors, "", steps=500, base="sd-v1-4")
    write_embedding(tmp_path / "style.safetensors", written)
    read = read_embedding(tmp_path / "style.safetensors")
    assert_holds(read, "style", vectors, tmp_path / "style.safetensors")
    assert (read.steps, read.base, read.places) == (500, "sd-v1-4", 3)
    with safe_open(tmp_path / "style.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == names
    assert metadata["modelspec.architecture"].endswith("/textual-inversion")
    raw = (tmp_path / "style.safetensors").read_bytes()
    numbers = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(numbers).hexdigest()


def test_written_in_half_precision(tmp_path):
    write_embedding(tmp_path / "x.safetensors", Embedding("x", (SD1,), ""), dtype=torch.float16)
    assert torch.equal(read_embedding(tmp_path / "x.safetensors").vectors[0], SD1.half().float())
