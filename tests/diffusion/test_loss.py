"""What an error counts: against the published formulas, written out one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import Weighing, weighted_error
from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.types import Conditioning

SCHEDULE = NOISE_SCHEDULES["scaled-linear"]()
TIMESTEPS = torch.tensor([3, 250, 600, 990])


def min_snr(timestep: int, prediction: str, gamma: float) -> float:
    """Hang et al. 2023, section 3.4: of the error of x0 min(SNR, gamma), of eps over SNR, of v over SNR + 1."""
    alphas = float(SCHEDULE.alphas_cumprod[timestep])
    snr = alphas / (1 - alphas)
    return min(snr, gamma) / {"x0": 1.0, "eps": snr, "v": snr + 1}[prediction]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr(prediction):
    weight = Weighing(gamma=5.0, floor=0.0).level(SCHEDULE.sigma(TIMESTEPS), prediction)
    expected = [min_snr(t, prediction, 5.0) for t in TIMESTEPS.tolist()]
    assert weight.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("huber", [None, 0.1])
def test_the_error_of_a_row_is_the_mean_over_its_numbers(prediction, huber):
    generator = torch.Generator().manual_seed(0)
    x0, noise, shown = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(3))
    mask = torch.rand(4, 1, 3, 3, generator=generator)
    said = torch.randn(4, 2, 3, 3, generator=generator)
    seen = []

    def network(x, timestep, cond):
        seen.append(x)
        return said

    denoiser = Denoiser(network, SCHEDULE, prediction)
    weighing = Weighing(gamma=None, huber=huber)
    found = weighted_error(denoiser, x0, noise, TIMESTEPS, Conditioning(), weighing, shown=shown, mask=mask)
    for row, timestep in enumerate(TIMESTEPS.tolist()):
        alpha = math.sqrt(float(SCHEDULE.alphas_cumprod[timestep]))
        s = math.sqrt(1 - alpha**2)
        assert torch.allclose(seen[0][row], alpha * x0[row] + s * shown[row], atol=1e-5)
        target = noise[row] if prediction == "eps" else alpha * noise[row] - s * x0[row]
        total = 0.0
        for place, d in zip(
            mask[row].expand(2, 3, 3).flatten().tolist(), (said[row] - target).flatten().tolist(), strict=True
        ):
            total += place * (d * d if huber is None else 2 * huber * (math.sqrt(d * d + huber**2) - huber))
        assert float(found[row]) == pytest.approx(total / 18, rel=1e-4)
