"""The Denoiser: what it shows to the network and what it makes of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.state import noised
from ldm.types import Conditioning, PredictionType

SCHEDULE = scaled_linear()
GENERATOR = torch.Generator().manual_seed(0)


@dataclass
class Spy:
    """Records what it is called with and answers with what it was given."""

    answer: Tensor
    seen: list[tuple[Tensor, Tensor, Conditioning]] = field(default_factory=list)

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.seen.append((x, timestep, cond))
        return self.answer


class Half(nn.Module):
    """A network in another dtype than float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.cross is not None and cond.vector is not None
        self.seen += [x.dtype, cond.cross.dtype, cond.vector.dtype, timestep.dtype]
        return x * self.scale


def test_the_network_sees_unit_variance_and_its_own_timesteps():
    x0, noise = torch.randn(2, 2, 5000, generator=GENERATOR)
    sigma = SCHEDULE.sigma(torch.tensor([37, 981])).float()
    spy = Spy(torch.zeros(2, 5000))
    Denoiser(spy, SCHEDULE, "eps")(noised(x0, noise, sigma), sigma, Conditioning())
    x, timestep, _ = spy.seen[0]
    assert x.std(dim=1).tolist() == pytest.approx([1, 1], abs=0.03)
    assert timestep.tolist() == [37, 981]


@pytest.mark.parametrize(("nearest", "expected"), [(False, 500.4), (True, 500.0)])
def test_timesteps_between_are_interpolated_or_rounded(nearest, expected):
    spy = Spy(torch.zeros(1, 3))
    sigma = SCHEDULE.sigma(torch.tensor([500.4])).float()
    Denoiser(spy, SCHEDULE, "eps", nearest_timestep=nearest)(torch.zeros(1, 3), sigma, Conditioning())
    assert spy.seen[0][1].item() == pytest.approx(expected, abs=1e-3)


def test_the_best_network_of_each_kind_gives_one_answer():
    """Unit-normal data: E[x0 | x] = x / (1 + sigma^2), which is VP noise * s, velocity 0, or the scaled state."""
    x, sigma = torch.randn(3, 2, 4, 4, generator=GENERATOR), torch.tensor([0.1, 1.0, 10.0])
    levels = sigma.reshape(-1, 1, 1, 1)
    s, alpha = levels / (1 + levels**2).sqrt(), (1 + levels**2).rsqrt()
    answers: dict[PredictionType, Tensor | float] = {"eps": s, "v": 0.0, "x0": alpha}
    for prediction, factor in answers.items():

        def network(x: Tensor, timestep: Tensor, cond: Conditioning, factor: Tensor | float = factor) -> Tensor:
            return factor * x

        denoised = Denoiser(network, SCHEDULE, prediction)(x, sigma, Conditioning()).denoised
        assert torch.allclose(denoised, x / (1 + levels**2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 8), (2, 3, 4, 4)])
def test_twice_the_channels_are_prediction_and_variance(shape):
    first, second = torch.full(shape, 0.25), torch.full(shape, -0.5)
    spy = Spy(torch.cat([first, second], dim=1))
    x, sigma = torch.ones(shape), torch.tensor([1.0, 2.0])
    denoiser = Denoiser(spy, SCHEDULE, "x0")
    prediction = denoiser(x, sigma, Conditioning())
    assert torch.equal(prediction.denoised, first)
    assert prediction.variance is not None and torch.equal(prediction.variance, torch.full(shape, 0.25))
    output, raw = denoiser.output(x, sigma, Conditioning())
    assert torch.equal(output, first) and raw is not None and torch.equal(raw, second)
    assert Denoiser(Spy(first), SCHEDULE, "x0")(x, sigma, Conditioning()).variance is None


def test_any_other_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="answered 5 channels for a state of 3"):
        Denoiser(Spy(torch.zeros(1, 5)), SCHEDULE, "eps")(torch.zeros(1, 3), torch.ones(1), Conditioning())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_runs_in_its_dtype_and_the_rest_in_float32_or_better(dtype):
    network = Half()
    cond = Conditioning(cross=torch.ones(1, 2, 3), vector=torch.tensor([4]))
    prediction = Denoiser(network, SCHEDULE, "v")(torch.ones(1, 3, dtype=dtype), torch.tensor([3.0]), cond)
    assert prediction.denoised.dtype == dtype
    assert network.seen == [torch.bfloat16, torch.bfloat16, torch.int64, torch.float32]


def test_the_dtype_can_be_told():
    network = Spy(torch.zeros(1, 3, dtype=torch.float16))
    denoiser = Denoiser(network, SCHEDULE, "eps", dtype=torch.float16)
    assert (
        denoiser(torch.ones(1, 3, dtype=torch.float16), torch.ones(1), Conditioning()).denoised.dtype == torch.float32
    )
    assert network.seen[0][0].dtype == torch.float16


def test_gradients_reach_the_network():
    network = Half()
    cond = Conditioning(cross=torch.ones(1, 2, 3), vector=torch.tensor([4]))
    output, _ = Denoiser(network, SCHEDULE, "v").output(torch.ones(1, 3), torch.tensor([3.0]), cond)
    output.sum().backward()
    assert network.scale.grad is not None and float(network.scale.grad) != 0
