"""When the autoencoder works in tiles, what is said of it, and that the picture stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.presets import sd1, tiny
from ldm.pipeline import first_stage
from ldm.pipeline.first_stage import decode, encode, whole_takes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system

SIDE = 64


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    network = random_system(tiny(sd1())).autoencoder
    assert isinstance(network, AutoencoderKL)
    return network


def latents(autoencoder: AutoencoderKL) -> Tensor:
    side = SIDE // autoencoder.config.downsampling
    return torch.randn(1, autoencoder.config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sides that are asked for."""
    sides: list[int] = []
    for name in ("decode_tiled", "posterior_tiled"):
        function = getattr(first_stage, name)
        monkeypatch.setattr(
            first_stage, name, lambda a, x, side, store, f=function: sides.append(side) or f(a, x, side, store)
        )
    return sides


def test_asked_for(autoencoder, tiles):
    whole, _ = decode(autoencoder, latents(autoencoder))
    assert not tiles
    tiled, notes = decode(autoencoder, latents(autoencoder), 24)
    assert tiles == [24] and not notes
    assert torch.allclose(tiled, whole, atol=1e-5)
    assert torch.allclose(encode(autoencoder, whole, 16), encode(autoencoder, whole), atol=1e-4)
    assert tiles == [24, 16]


def test_where_memory_is_short(autoencoder, tiles, monkeypatch):
    whole, _ = decode(autoencoder, latents(autoencoder))
    takes = whole_takes(autoencoder, whole)
    monkeypatch.setattr(first_stage, "available_memory", lambda _: takes)
    decode(autoencoder, latents(autoencoder))
    assert not tiles
    monkeypatch.setattr(first_stage, "available_memory", lambda _: takes - 1)
    tiled, notes = decode(autoencoder, latents(autoencoder))
    assert tiles == [first_stage.TILE]
    assert torch.allclose(tiled, whole, atol=1e-5)
    assert len(notes) == 1 and "works in tiles" in notes[0]


def test_where_memory_ran_out(autoencoder, tiles, monkeypatch):
    whole, _ = decode(autoencoder, latents(autoencoder))

    def no_memory(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(AutoencoderKL, "decode", no_memory)
    tiled, notes = decode(autoencoder, latents(autoencoder))
    assert tiles == [first_stage.TILE] and len(notes) == 1
    assert torch.allclose(tiled, whole, atol=1e-5)


def test_what_the_whole_takes_is_about_right(autoencoder, monkeypatch):
    """Against the live tensors of a real run, at a size where the picture's own counts and not the weights."""
    from ldm.pipeline.live_memory import live_memory

    config = autoencoder.config
    with live_memory(torch.device("cpu")) as memory, torch.no_grad():
        network = AutoencoderKL(config)
        before = memory.peak
        side = 512 // config.downsampling
        network.decode(torch.empty(1, config.latent_channels, side, side))
        held = memory.peak - before
    assert whole_takes(autoencoder, torch.empty(1, 3, 512, 512, device="meta")) == pytest.approx(held, rel=0.35)


def test_a_model_that_works_in_tiles(tiny_file, tiles):
    path = tiny_file(tiny(sd1()))
    fields: dict[str, Any] = {"width": SIDE, "height": SIDE, "steps": 2, "seed": 5}

    def drawn(model: LatentDiffusion) -> np.ndarray:
        (picture,) = model.generate("a red apple", **fields)
        return np.asarray(picture.image, dtype=int)

    whole = drawn(load(path, device="cpu", dtype="float32"))
    assert not tiles
    assert np.abs(drawn(load(path, device="cpu", dtype="float32", vae_tile=32)) - whole).max() <= 1
    assert tiles == [32]
    with pytest.raises(LdmError, match="vae_tile: found 8, expected 16 or more"):
        load(path, vae_tile=8)


def test_asked_for_where_memory_is_short(autoencoder, tiles, monkeypatch):
    whole, _ = decode(autoencoder, latents(autoencoder))
    used, in_files = [], first_stage.in_files
    monkeypatch.setattr(first_stage, "in_files", lambda: (used.append(True), in_files())[1])
    decode(autoencoder, latents(autoencoder), 24)
    assert not used
    monkeypatch.setattr(first_stage, "available_memory", lambda _: 0)
    tiled, notes = decode(autoencoder, latents(autoencoder), 24)
    assert used == [True] and tiles == [24, 24] and not notes
    assert torch.allclose(tiled, whole, atol=1e-5)
