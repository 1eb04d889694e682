"""Pictures drawn and read by a tiny autoencoder in place of the model's own, against diffusers' decoding of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd_x4_upscaler, sdxl, small, tiny
from ldm.models.tiny_autoencoder import TinyAutoencoderConfig
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.pipeline.request import GenerateRequest, HighRes
from ldm.pipeline.sample import Progress
from ldm.tasks import run

Write = Callable[[SystemConfig], Path]


def tiny_folder(folder: Path, **settings: int) -> Path:
    """An AutoencoderTiny as diffusers writes it, whose random weights give pictures of more than one colour."""
    torch.manual_seed(0)
    widths = (8,) * 4
    theirs = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, **settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(1.7)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("whole") / "taesd")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Path:
    """Its decoder alone as TAESD has it, under a name that says nothing."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    path = folder.parent.parent / "previews.safetensors"
    parts = {name: name.split(".", 3) for name in tensors if name.startswith("decoder.")}
    save_file({f"{int(part[2]) + 1}.{part[3]}": tensors[name] for name, part in parts.items()}, path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(model: LatentDiffusion) -> tuple[Tensor, np.ndarray]:
    """A picture's latent (1, z, h, w) behind the last step, and its pixels (H, W, 3)."""
    latent = None
    for event in run(model, GenerateRequest(prompt="a fox", steps=2, seed=5, sampler="euler")):
        if not isinstance(event, Progress):
            assert latent is not None
            return latent, np.asarray(event.image, dtype=np.float32)
        latent = event.step.x if event.step else latent
    raise AssertionError("no picture")


@pytest.mark.parametrize("family", [sd1, sdxl])
@pytest.mark.parametrize("layout", ["diffusers", "TAESD"])
def test_a_picture_is_what_diffusers_decodes(
    family: Callable[[], SystemConfig], layout: str, tiny_file: Write, folder: Path, decoder: Path, theirs
) -> None:
    model = load(tiny_file(tiny(family())), vae=folder if layout == "diffusers" else decoder, dtype="float32")
    latent, pixels = drawn(model)
    with torch.no_grad():
        expected = theirs.decode(latent).sample[0].permute(1, 2, 0).clamp(-1, 1).numpy()
    assert np.abs(pixels - (expected + 1) * 127.5).max() <= 0.51  # which is rounding to whole numbers
    assert pixels.std() > 5


@torch.inference_mode()
def test_a_latent_is_what_diffusers_encodes(tiny_file: Write, folder: Path, theirs, png: bytes) -> None:
    model = load(tiny_file(tiny(sd1())), vae=folder, dtype="float32")
    image = Image.open(io.BytesIO(png))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(model.latent_of(image), theirs.encode(pixels).latents, atol=1e-5)
    assert model.image_to_image("a fox", png, steps=2, strength=0.5, seed=1)[0].image.size == (64, 64)


def test_bfloat16_is_near_float32(tiny_file: Write, folder: Path) -> None:
    path = tiny_file(tiny(sdxl()))
    exact, rounded = (load(path, vae=folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {t.dtype for t in rounded.autoencoder.parameters()} == {torch.bfloat16}
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected, found = exact.autoencoder.decode(latents), rounded.autoencoder.decode(latents.bfloat16()).float()
    assert 0 < float((found - expected).norm() / (expected - expected.mean()).norm()) < 0.05


def test_float16_files_load(tiny_file: Write, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "half.safetensors")
    model = load(tiny_file(tiny(sd1())), vae=tmp_path / "half.safetensors", dtype="float32")
    for name, tensor in model.autoencoder.state_dict().items():
        half, layer, rest = name.split(".", 2)
        theirs = f"{half}.layers.{int(layer) - (half == 'decoder')}.{rest}"
        assert torch.equal(tensor, tensors[theirs].half().float())


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, png: model.image_to_image("x", png, steps=1),
        lambda model, png: model.inpaint("x", png, Image.new("L", (64, 64), 255), steps=1),
        lambda model, png: next(run(model, GenerateRequest(prompt="x", highres=HighRes(scale=1.5)))),
    ],
    ids=["image to image", "inpaint", "highres"],
)
def test_what_needs_an_encoder_says_that_there_is_none(ask, tiny_file: Write, decoder: Path, png: bytes) -> None:
    model = load(tiny_file(tiny(sd1())), vae=decoder)
    with pytest.raises(LdmError, match=r"^autoencoder: this tiny one is a decoder without its encoder, .* --vae$"):
        ask(model, png)


def test_highres_in_latents_needs_no_encoder(tiny_file: Write, decoder: Path) -> None:
    model = load(tiny_file(tiny(sd1())), vae=decoder)
    picture = model.generate("x", steps=2, seed=0, highres=HighRes(scale=1.5, upscale="latent", strength=0.5))[0]
    assert picture.image.size == (96, 96)


@pytest.mark.parametrize(
    ("family", "name", "rule", "warning"),
    [
        (sd1, "taesd", "with an encoder, made for SD 1.x and 2.x", None),
        (sdxl, "taesdxl", "with an encoder, made for SDXL", None),
        (sdxl, "mine", "with an encoder, made for SD or SDXL, no tensor or name tells which", None),
        (sdxl, "taesd", "made for SD 1.x and 2.x", "made for SD 1.x and 2.x by its name, these latents are SDXL"),
        (small, "taesd", "made for SD 1.x and 2.x", "by its name, these latents are this package's own"),
    ],
)
def test_whose_latents_it_is_for_is_said(
    family: Callable[[], SystemConfig], name: str, rule: str, warning: str | None, tiny_file, folder, tmp_path
) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    origin = load(tiny_file(tiny(family())), vae=path).origin
    assert any(rule in said for said in origin.rules)
    assert len(origin.warnings) == (warning is not None)
    assert warning is None or warning in origin.warnings[0]


def test_tiles_are_not_needed(tiny_file: Write, folder: Path) -> None:
    whole, tiled = (load(tiny_file(tiny(sd1())), vae=folder, vae_tile=tile) for tile in (None, 64))
    assert whole.origin.warnings == ()
    assert "--vae-tile: the tiny autoencoder takes little memory" in tiled.origin.warnings[0]
    assert np.array_equal(drawn(whole)[1], drawn(tiled)[1])


def test_latents_of_another_kind(tiny_file: Write, tmp_path: Path, folder: Path) -> None:
    of_sd3 = tiny_folder(tmp_path / "taesd3", latent_channels=16)
    with pytest.raises(LdmError, match="is for latents with 16 channels at 1/8 of the size, those of sd1 have 4 chan"):
        load(tiny_file(tiny(sd1())), vae=of_sd3)
    with pytest.raises(LdmError, match=r"is for latents with 4 channels at 1/8 of the size, those of sd2 .* 1/4 of"):
        load(tiny_file(tiny(sd_x4_upscaler())), vae=folder)


def test_no_checkpoint_is_written_with_it(tmp_path: Path) -> None:
    model = random_system(replace(tiny(sd1()), tiny_autoencoder=TinyAutoencoderConfig(channels=2)))
    with pytest.raises(LdmError, match="no checkpoint is written with a tiny autoencoder"):
        save_checkpoint(model, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())
