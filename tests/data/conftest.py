"""Small picture shards, written with the standard library alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = list[tuple[str, bytes]]


def encode(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as lossless WebP."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


@pytest.fixture
def pictures() -> np.ndarray:
    """Five random pictures, uint8 (5, 8, 8, 3)."""
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.fixture
def members(pictures: np.ndarray) -> Members:
    """Five good samples as the files of a shard."""
    files: Members = []
    for i, pixels in enumerate(pictures):
        record = {"texts": [f"picture {i}", f"no. {i}"], "kind": "emoji", "key": str(i), "license": "CC0-1.0"}
        files += [(f"{i:06d}.webp", encode(pixels)), (f"{i:06d}.json", json.dumps(record).encode())]
    return files


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[[str, Members], Path]:
    """write_shard(file name, files) -> path of the tar."""

    def write(name: str, files: Members) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for file_name, content in files:
                info = tarfile.TarInfo(file_name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write
