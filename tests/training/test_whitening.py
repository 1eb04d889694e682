"""Whitening: what it does to text states, and that a U-Net trained on white ones is folded exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.models.presets import small, tiny
from ldm.models.unet import UNet
from ldm.training.whitening import FLOOR, TextWhitening, Whitening, fold, folded, unfold, whitening_of
from ldm.types import Conditioning

CONFIG = tiny(small()).unet
WIDTH = CONFIG.context_width or 0


def uneven_states(count: int = 4000, seed: int = 0) -> Tensor:
    """Correlated, off centre, with deviations from 0.1 to 10 along directions that are not the axes."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    spread = torch.logspace(-1, 1, WIDTH)
    return torch.randn(count, WIDTH, generator=generator) * spread @ turn + 3


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(CONFIG).double()
    for parameter in unet.parameters():  # or the layers that begin at zero would hide the text
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


@pytest.fixture
def whitening() -> TextWhitening:
    states, pooled = whitening_of(uneven_states()), whitening_of(uneven_states(seed=1) + 2)
    return TextWhitening(*(Whitening(found.mean.double(), found.matrix.double()) for found in (states, pooled)))


def answer(unet: UNet, states: Tensor, pooled: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return unet(x, torch.tensor([10.0, 500.0]), Conditioning(cross=states, vector=pooled))


def test_every_direction_gets_nearly_unit_deviation():
    states = uneven_states()
    white = whitening_of(states)(states)
    found = torch.linalg.eigvalsh(torch.cov(white.T)).sqrt().flip(0)
    deviations = torch.linalg.eigvalsh(torch.cov(states.T)).sqrt().flip(0)
    assert torch.allclose(found, deviations / (deviations + FLOOR), atol=1e-3)
    assert white.mean(dim=0).abs().max() < 1e-3


def test_folded_it_says_of_plain_text_what_it_said_of_white_text(unet: UNet, whitening: TextWhitening):
    states, pooled = uneven_states(2 * 7).reshape(2, 7, WIDTH).double(), uneven_states(2, seed=3).double()
    white = whitening.states(states), whitening.pooled(pooled)
    wanted = answer(unet, *white)
    assert not torch.allclose(answer(unet, states, white[1]), wanted, rtol=1e-2)
    assert not torch.allclose(answer(unet, white[0], pooled), wanted, rtol=1e-2)
    fold(unet, whitening)
    assert torch.allclose(answer(unet, states, pooled), wanted, rtol=1e-9, atol=1e-9)


def test_unfolding_is_the_way_back(unet: UNet, whitening: TextWhitening):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unfold(unet, whitening)
    fold(unet, whitening)
    assert all(torch.allclose(tensor, before[name], atol=1e-5) for name, tensor in unet.state_dict().items())


def test_for_a_while_is_bit_for_bit_undone(unet: UNet, whitening: TextWhitening):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), folded(unet, whitening):
        assert any(not torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
