"""Files of tiny autoencoders, in TAESD's own layout and in diffusers', sound and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.tiny_autoencoder import TinyAutoencoderConfig
from ldm.weights.architecture import tiny_autoencoder_config, under
from ldm.weights.doctor.describe import describe
from ldm.weights.layout import FIRST_STAGE
from ldm.weights.source import MADE_FOR, Source, open_source
from ldm.weights.tiny_autoencoder import whole_tiny, whose_latents

CONFIG = TinyAutoencoderConfig(channels=8)

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers writes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "taesd"
    widths = (CONFIG.channels,) * 4
    theirs = diffusers.AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def halves(folder: Path) -> tuple[Tensors, Tensors]:
    """Decoder and encoder as TAESD has them: in the decoder's sequence a layer comes first that clamps the latents."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    decoder, encoder = {}, {}
    for name, tensor in tensors.items():
        half, _, layer, rest = name.split(".", 3)
        if half == "decoder":
            decoder[f"{int(layer) + 1}.{rest}"] = tensor
        else:
            encoder[f"{layer}.{rest}"] = tensor
    return decoder, encoder


@pytest.fixture
def pair(halves: tuple[Tensors, Tensors], tmp_path: Path) -> Path:
    """A decoder's file, with the encoder's beside it."""
    save_file(halves[0], tmp_path / "taesdxl_decoder.safetensors")
    save_file(halves[1], tmp_path / "taesdxl_encoder.safetensors")
    return tmp_path / "taesdxl_decoder.safetensors"


def config_of(source: Source) -> TinyAutoencoderConfig:
    return tiny_autoencoder_config(under(source.shapes, FIRST_STAGE))


def test_every_layout_holds_the_same_numbers_under_the_same_names(
    folder: Path, pair: Path, halves: tuple[Tensors, Tensors]
) -> None:
    expected = {f"first_stage_model.decoder.{name}": tensor for name, tensor in halves[0].items()}
    expected |= {f"first_stage_model.encoder.{name}": tensor for name, tensor in halves[1].items()}
    both = pair.with_name("both.safetensors")
    save_file({name.removeprefix(FIRST_STAGE): tensor for name, tensor in expected.items()}, both)
    for path in (folder, folder / "diffusion_pytorch_model.safetensors", pair, both):
        source = whole_tiny(open_source(path))
        assert config_of(source) == CONFIG
        found = dict(source.read(source.tensors))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_decoder_without_its_encoder_beside_it(pair: Path) -> None:
    pair.with_name("taesdxl_encoder.safetensors").unlink()
    source = whole_tiny(open_source(pair))
    assert not config_of(source).encoder
    assert all(name.startswith("first_stage_model.decoder.") for name in source.tensors)


@pytest.mark.parametrize(
    ("path", "metadata", "expected"),
    [
        ("taesd_decoder.safetensors", {}, "SD 1.x and 2.x"),
        ("TAESDXL.safetensors", {}, "SDXL"),
        ("taesd/taesdxl_decoder.safetensors", {}, "SDXL"),
        ("models--madebyollin--taesdxl/snapshots/0f/diffusion_pytorch_model.safetensors", {}, "SDXL"),
        ("decoder.safetensors", {}, None),
        ("taesd3_decoder.safetensors", {}, None),
        ("x.safetensors", {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "SDXL"),
        ("x.safetensors", {"modelspec.architecture": "stable-diffusion-v1"}, "SD 1.x and 2.x"),
    ],
)
def test_names_tell_whose_latents_it_is_for(path: str, metadata: dict[str, str], expected: str | None) -> None:
    assert whose_latents(Source(Path(path), {}, metadata, lambda names: iter(()))) == expected


def test_another_autoencoder_is_left_as_it_is(folder: Path) -> None:
    other = Source(folder, {}, {}, lambda names: iter(()))
    assert whole_tiny(other) is other
    assert whole_tiny(open_source(folder)).facts == {MADE_FOR: "SD 1.x and 2.x"}


def without_a_bias(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "4.conv.2.bias"}


def with_a_norm(tensors: Tensors) -> Tensors:
    return tensors | {"4.pool.0.weight": torch.zeros(8)}


def with_a_wider_layer(tensors: Tensors) -> Tensors:
    return tensors | {"4.conv.2.bias": torch.zeros(9)}


def of_whole_numbers(tensors: Tensors) -> Tensors:
    return tensors | {"4.conv.2.bias": torch.zeros(8, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_bias, r"1 tensors do not fit a tiny autoencoder, the first: decoder.4.conv.2.bias is missing"),
        (with_a_norm, r"1 tensors do not .*: decoder.4.pool.0.weight has no place in it"),
        (with_a_wider_layer, r"1 tensors do not .*: decoder.4.conv.2.bias is \(9,\), expected \(8,\)"),
        (of_whole_numbers, r"1 tensors do not .*: decoder.4.conv.2.bias holds I32 numbers"),
        (lambda tensors: {"1.weight": torch.zeros(8), **without_first(tensors)}, r"tensor decoder.1.weight has shape"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(
    change: Callable[[Tensors], Tensors], said: str, halves: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    path = tmp_path / "broken.safetensors"
    save_file(change(halves[0]), path)
    with pytest.raises(LdmError, match=f"^{path}: {said}") as raised:
        whole_tiny(open_source(path))
    assert "\n" not in str(raised.value)
    assert describe(path).problem


def without_first(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "1.weight"}


def test_an_encoder_alone_is_no_autoencoder(pair: Path) -> None:
    encoder = pair.with_name("taesdxl_encoder.safetensors")
    with pytest.raises(LdmError, match=f"^{encoder}: is the encoder of a tiny autoencoder without its decoder"):
        whole_tiny(open_source(encoder))


def test_info_says_what_it_is(folder: Path, pair: Path) -> None:
    of_diffusers, decoder, encoder = (
        describe(p) for p in (folder, pair, pair.with_name("taesdxl_encoder.safetensors"))
    )
    for report in (of_diffusers, decoder, encoder):
        assert (report.kind, report.problem) == ("autoencoder alone", None)
        assert str(report.found.variant).startswith("tiny autoencoder (TAESD)")
    assert of_diffusers.found.base == "models with 4 latent channels at 1/8 of the size: of SD 1.x and 2.x"
    assert "decoder alone, with the encoder beside it" in str(decoder.found.variant)
    assert "encoder alone" in str(encoder.found.variant)
    assert (of_diffusers.read_by, decoder.read_by) == (("ldm", "diffusers"), ("ldm", "A1111/Forge", "ComfyUI"))
