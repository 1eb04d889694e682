"""Guidance against its formulas, and when it costs what."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided, guided_prediction, rescaled
from ldm.diffusion.prediction import PredictionType, to_denoised
from ldm.diffusion.schedule import scaled_linear
from ldm.types import Conditioning

SCHEDULE = scaled_linear()
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([2.0, 2.0])
COND = Conditioning(vector=torch.tensor([[1.0], [2.0]]))
UNCOND = Conditioning(vector=torch.tensor([[-0.5], [-0.5]]))


class Network:
    """Depends on the condition in a way that is no mere offset; counts its calls and rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        self.rows.append(len(x))
        return torch.tanh(x * cond.vector[:, :, None, None]) + 0.1 * cond.vector[:, :, None, None]


class TwoHeaded(Network):
    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        return torch.cat([super().__call__(x, timestep, cond), 0 * x + cond.vector[:, :, None, None]], dim=1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_is_its_formula_in_one_batch(scale):
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    with_cond, without = (denoiser(X, SIGMA, c).denoised for c in (COND, UNCOND))
    network.rows.clear()
    denoised = guided(denoiser, COND, UNCOND, scale)(X, SIGMA)
    assert torch.allclose(denoised, without + scale * (with_cond - without), atol=1e-5)
    assert network.rows == [4]


def test_scale_one_never_looks_at_the_other_condition():
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    denoised = guided(denoiser, COND, None, 1.0)(X, SIGMA)
    assert torch.equal(denoised, denoiser(X, SIGMA, COND).denoised)
    assert network.rows == [2, 2]


def test_scale_needs_an_unconditional():
    with pytest.raises(ValueError, match="needs an unconditional"):
        guided(Denoiser(Network(), SCHEDULE, "eps"), COND, None, 2.0)


def test_an_interval_saves_the_second_half_outside():
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    limited = guided(denoiser, COND, UNCOND, 5.0, interval=(1.0, 4.0))
    everywhere = guided(denoiser, COND, UNCOND, 5.0)
    for level, guides in ((0.5, False), (1.0, True), (2.0, True), (4.0, True), (4.5, False)):
        sigma = torch.full((2,), level)
        expected = everywhere(X, sigma) if guides else denoiser(X, sigma, COND).denoised
        network.rows.clear()
        assert torch.allclose(limited(X, sigma), expected, atol=1e-6)
        assert network.rows == [4 if guides else 2]


def test_an_interval_may_hold_part_of_a_batch():
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    sigma = torch.tensor([0.5, 2.0])
    denoised = guided(denoiser, COND, UNCOND, 5.0, rescale=0.7, interval=(1.0, 4.0))(X, sigma)
    assert torch.allclose(denoised[0], denoiser(X, sigma, COND).denoised[0], atol=1e-5)
    assert torch.allclose(denoised[1], guided(denoiser, COND, UNCOND, 5.0, rescale=0.7)(X, sigma)[1], atol=1e-5)


@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_rescale_equals_diffusers_on_the_network_output(prediction: PredictionType, amount: float):
    denoiser = Denoiser(Network(), SCHEDULE, prediction)
    with_cond, without = (denoiser.output(X, SIGMA, c)[0] for c in (COND, UNCOND))
    output = rescale_noise_cfg(without + 6 * (with_cond - without), with_cond, guidance_rescale=amount)
    expected = to_denoised(prediction, output, X, SIGMA)
    assert torch.allclose(guided(denoiser, COND, UNCOND, 6.0, rescale=amount)(X, SIGMA), expected, atol=1e-4)


def test_a_full_rescale_has_the_contrast_of_the_conditional_output():
    output, output_cond = 5 * X + 1, 0.5 * X
    full = rescaled(output, output_cond, 1.0)
    assert torch.allclose(full.flatten(1).std(dim=1), output_cond.flatten(1).std(dim=1))
    assert torch.equal(rescaled(output, output_cond, 0.0), output)


def test_the_learned_variance_is_that_of_the_condition():
    denoiser = Denoiser(TwoHeaded(), SCHEDULE, "eps")
    guided_one = guided_prediction(denoiser, COND, UNCOND, 4.0)(X, SIGMA)
    alone = denoiser(X, SIGMA, COND)
    assert guided_one.variance is not None and alone.variance is not None
    assert torch.equal(guided_one.variance, alone.variance)
