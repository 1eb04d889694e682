"""The tiny autoencoder against diffusers' on the same random weights."""

from __future__ import annotations

import diffusers
import pytest
import torch

from ldm.errors import LdmError
from ldm.models.pixel_blocks import first_stage
from ldm.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ldm.weights.rename import autoencoder_names_of


@pytest.fixture(scope="module")
def theirs() -> diffusers.AutoencoderTiny:
    torch.manual_seed(1)
    return diffusers.AutoencoderTiny().eval()


@pytest.fixture(scope="module")
def ours(theirs: diffusers.AutoencoderTiny) -> TinyAutoencoder:
    network = first_stage(TinyAutoencoderConfig())
    assert isinstance(network, TinyAutoencoder)
    state = theirs.state_dict()
    names = autoencoder_names_of({name: tuple(tensor.shape) for name, tensor in state.items()})
    network.load_state_dict({name: state[piece.names[0]] for name, piece in names.items()}, strict=True)
    return network.eval()


@torch.inference_mode()
def test_decoding_equals_diffusers(ours: TinyAutoencoder, theirs: diffusers.AutoencoderTiny, relative_error) -> None:
    latents = 3 * torch.randn(3, 4, 5, 8)
    expected = theirs.decode(latents).sample
    assert expected.shape == (3, 3, 40, 64)
    assert relative_error(ours.decode(latents) + 1, expected + 1) < 1e-5
    assert not torch.allclose(theirs.decode(latents / 3).sample, expected, atol=1e-3), "what is given matters"


@torch.inference_mode()
def test_encoding_equals_diffusers(ours: TinyAutoencoder, theirs: diffusers.AutoencoderTiny, relative_error) -> None:
    pictures = 2 * torch.rand(3, 3, 40, 64) - 1
    expected = theirs.encode(pictures).latents
    assert expected.shape == (3, 4, 5, 8)
    assert relative_error(ours.encode(pictures), expected) < 1e-5


def test_a_picture_without_an_encoder() -> None:
    network = TinyAutoencoder(TinyAutoencoderConfig(channels=2, encoder=False))
    assert not any(name.startswith("encoder") for name in network.state_dict())
    with pytest.raises(LdmError, match="autoencoder: this tiny one is a decoder without its encoder"):
        network.encode(torch.zeros(1, 3, 8, 8))
