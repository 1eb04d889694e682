"""The decoder's file: a part of a system, whose rest lies in the model beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.apps.info import info
from ldm.errors import LdmError
from ldm.models.presets import decoder_of, small, tiny
from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.weights.doctor.describe import describe
from ldm.weights.layout import Networks
from ldm.weights.part import REST_NAME, save_part

BASE = tiny(small())


@pytest.fixture(scope="module")
def base() -> LatentDiffusion:
    return random_system(BASE)


@pytest.fixture(scope="module")
def decoder(base: LatentDiffusion) -> LatentDiffusion:
    """With the autoencoder and the CLIP of `base`."""
    return replace(random_system(decoder_of(BASE), seed=1), autoencoder=base.autoencoder, text=base.text)


def save_base(model: LatentDiffusion, decoder: LatentDiffusion, path: Path, **options: Any) -> None:
    assert decoder.image is not None
    visual = {f"cond_stage_model.model.visual.{name}": t for name, t in decoder.image.state_dict().items()}
    save_checkpoint(model, path, extra=visual, **options)


def save_decoder(model: LatentDiffusion, path: Path, **options: Any) -> None:
    text: Any = model.text
    networks = Networks(
        model.config, model.unet, model.autoencoder, text, model.image, model.augmentor, model.image_tokens
    )
    save_part(path, networks, **options)


@pytest.fixture(scope="module")
def folder(base: LatentDiffusion, decoder: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_base(base, decoder, folder / REST_NAME, dtype=torch.float16)
    save_decoder(decoder, folder / "ldm-decoder.safetensors", eight_bits=False)
    save_decoder(decoder, folder / "small.safetensors")
    return folder


def test_it_loads_as_a_whole_model(folder: Path, decoder: LatentDiffusion) -> None:
    path = folder / "ldm-decoder.safetensors"
    model = load(path, device="cpu", dtype="float32")
    assert model.config == decoder.config and model.origin.warnings == () and model.origin.path == path
    for part in ("unet", "autoencoder", "image", "augmentor", "image_tokens"):
        theirs = getattr(decoder, part).state_dict()
        for name, tensor in getattr(model, part).state_dict().items():
            assert torch.equal(tensor, theirs[name].half().float()), f"{part}.{name}"
    assert any(f"autoencoder and CLIP: from {folder / REST_NAME}" in rule for rule in model.origin.rules)
    (drawn,) = model.variations("", Image.new("RGB", (40, 40), "red"), steps=1, seed=1)
    assert drawn.image.size == (64, 64)


def test_eight_bits_are_half_the_size_and_near(folder: Path, decoder: LatentDiffusion) -> None:
    full, small = (folder / name for name in ("ldm-decoder.safetensors", "small.safetensors"))
    assert small.stat().st_size < 0.75 * full.stat().st_size  # in full size 0.51: here scales and ends weigh more
    model = load(small, device="cpu", dtype="float32")
    for name, tensor in model.unet.state_dict().items():
        theirs = decoder.unet.state_dict()[name]
        assert (tensor - theirs).norm() < 0.04 * theirs.norm(), name
    kept = "time_embed.0.weight"
    assert torch.equal(model.unet.state_dict()[kept], decoder.unet.state_dict()[kept].half().float())


def test_the_rest_may_be_stored_more_precisely(
    folder: Path, base: LatentDiffusion, decoder: LatentDiffusion, tmp_path: Path
) -> None:
    """The hash is over what ships, float16, so that it can be known while the rest is still at hand in float32."""
    (tmp_path / "d.safetensors").write_bytes((folder / "small.safetensors").read_bytes())
    save_base(base, decoder, tmp_path / REST_NAME)
    load(tmp_path / "d.safetensors", device="cpu")


def test_a_rest_that_does_not_belong_to_it_is_refused(folder: Path, decoder: LatentDiffusion, tmp_path: Path) -> None:
    path = tmp_path / "ldm-decoder.safetensors"
    path.write_bytes((folder / path.name).read_bytes())
    save_base(random_system(BASE, seed=5), decoder, tmp_path / REST_NAME, dtype=torch.float16)
    with pytest.raises(
        LdmError, match=r"has another autoencoder or CLIP than it was trained with; put the ldm-small"
    ) as e:
        load(path, device="cpu")
    assert "\n" not in str(e.value)
    save_checkpoint(random_system(BASE), tmp_path / REST_NAME, dtype=torch.float16)  # without an image tower
    with pytest.raises(LdmError, match="lacks some of it"):
        load(path, device="cpu")


def test_without_one_beside_it_the_one_that_ships_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ldm-decoder.safetensors"
    path.write_bytes((folder / path.name).read_bytes())
    monkeypatch.setattr("ldm.pipeline.load.SHIPPED", folder / REST_NAME)
    assert load(path, device="cpu").config.image is not None
    monkeypatch.setattr("ldm.pipeline.load.SHIPPED", tmp_path / "gone" / REST_NAME)
    with pytest.raises(LdmError, match="no such file"):
        load(path, device="cpu")


def test_a_part_can_be_taken_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = random_system(BASE, seed=9)
    save_checkpoint(other, tmp_path / "other.safetensors")
    model = load(folder / "ldm-decoder.safetensors", vae=tmp_path / "other.safetensors", device="cpu", dtype="float32")
    name = "quant_conv.weight"
    assert torch.equal(model.autoencoder.state_dict()[name], other.autoencoder.state_dict()[name])


def test_a_whole_decoder_in_one_file_loads_too(decoder: LatentDiffusion, tmp_path: Path) -> None:
    save_checkpoint(decoder, tmp_path / "whole.safetensors")
    model = load(tmp_path / "whole.safetensors", device="cpu", dtype="float32")
    assert model.config == decoder.config and model.image is not None and decoder.image is not None
    assert torch.equal(model.image.proj, decoder.image.proj)


def test_its_clip_is_looked_for_in_the_other_file(folder: Path) -> None:
    with pytest.raises(LdmError, match="is a decoder without its CLIP, which lies in the ldm-small"):
        load_clip(folder / "small.safetensors", device="cpu")


def test_info_says_so_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = describe(folder / "small.safetensors")
    assert report.problem is None and report.kind.startswith("decoder of CLIP image embeddings, without")
    assert [part.name for part in report.parts] == ["U-Net", "image conditioning"]
    info(folder / "small.safetensors")
    said = " ".join(capsys.readouterr().out.split())
    assert "the autoencoder and CLIP of the ldm-small.safetensors beside it" in said
