"""What every sampler promises, whatever its mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, always, guided
from ldm.diffusion.noise import per_image_noise
from ldm.diffusion.schedule import NoiseSchedule, cosine, scaled_linear, zero_terminal_snr
from ldm.diffusion.sigmas import SCHEDULES, end_above_zero, trailing
from ldm.diffusion.state import noised, start_state
from ldm.samplers import SAMPLERS
from ldm.samplers.common import intervals
from ldm.types import Conditioning, Step

SCHEDULE = scaled_linear()
SHAPE = (3, 6, 5)


class Network(nn.Module):
    """Any function of the state, the timestep and the condition that a batch cannot mix up."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3, generator=generator) / 4, requires_grad=False)

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert timestep.shape == (len(x),)
        assert cond.vector is not None
        features = nn.functional.conv2d(x, self.weight, padding=1) + cond.vector[:, :, None, None]
        return torch.tanh(features + torch.sin(timestep / 100)[:, None, None, None])


NETWORK = Network()

STEEPEST = {"heun": 100, "dpm2": 100, "dpm2-a": 10, "dpmpp-3m-sde": 100}
"""How many times smaller a step may make sigma: Heun and DPM2 divide by the level they look ahead to (DPM2 a looks
twice as far in log sigma), and 3M carries a parabola on. Beyond that the result is finite, and no picture."""


def run(name: str, seeds: Sequence[int], sigmas: Tensor, schedule: NoiseSchedule = SCHEDULE) -> list[Step]:
    """One guided run with a condition that belongs to the seed, as the pipeline makes it."""
    cond = Conditioning(vector=torch.tensor([[0.1 * seed, 0.2, -0.3] for seed in seeds]))
    uncond = cond.map(torch.zeros_like)
    denoise = guided(Denoiser(NETWORK, schedule, "v"), always(cond, uncond), Guidance(3.0))
    noise = per_image_noise(SHAPE, seeds)
    return list(SAMPLERS[name].sample(denoise, start_state(noise.start, float(sigmas[0])), sigmas, noise))


def suited(name: str, steps: int) -> Tensor:
    sampler = SAMPLERS[name]
    sigmas = SCHEDULES[sampler.schedule](SCHEDULE, steps)
    return end_above_zero(sigmas, SCHEDULE) if sampler.ends_above_zero else sigmas


@pytest.mark.parametrize("levels", SCHEDULES)
@pytest.mark.parametrize(
    "schedule", [SCHEDULE, zero_terminal_snr(SCHEDULE), cosine()], ids=["scaled-linear", "zero-terminal-snr", "cosine"]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_solver_runs_on_every_schedule(name, schedule, levels):
    for steps in (1, 2, 3, 20):
        sigmas = SCHEDULES[levels](schedule, steps)
        done = run(name, [1, 2], sigmas, schedule)
        assert [step.index for step in done] == list(range(steps))
        assert [step.sigma for step in done] == sigmas[:-1].tolist()
        assert [step.sigma_next for step in done] == sigmas[1:].tolist()
        for step in done:
            assert step.x.shape == step.denoised.shape == (2, *SHAPE)
            assert step.x.dtype == step.denoised.dtype == torch.float32
            assert bool(step.x.isfinite().all() and step.denoised.isfinite().all())
        # Having reached sigma 0 the state is an estimate of the clean sample, of its size and not of the noise's.
        steepest = max((step.sigma / step.sigma_next for step in done[:-1]), default=1.0)
        assert float(done[-1].x.abs().max()) < 30 or steepest > STEEPEST.get(name, math.inf)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_record_tells_the_truth(name):
    """Number of evaluations, and whether the noise source is asked for anything."""
    calls, draws = [], []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2,) and sigma.dtype == torch.float32 and bool((sigma > 0).all())
        calls.append(float(sigma[0]))
        return 0.3 * x / (1 + sigma.reshape(-1, 1, 1, 1))

    def noise(sigma: float, sigma_next: float) -> Tensor:
        assert sigma > sigma_next > 0
        draws.append(sigma)
        return torch.ones(2, *SHAPE)

    sampler, steps = SAMPLERS[name], 6
    sigmas = SCHEDULES["karras"](SCHEDULE, steps)
    list(sampler.sample(denoise, torch.ones(2, *SHAPE), sigmas, noise))
    expected = {1: steps, 2: 2 * steps - 1}[sampler.evaluations]  # no second look on the step to 0
    assert len(calls) == expected + (name == "plms")
    assert bool(draws) == sampler.stochastic


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_prediction_at_few_steps(name, prediction):
    for steps in (1, 2, 3, 20):
        denoise = guided(
            Denoiser(NETWORK, SCHEDULE, prediction), always(Conditioning(vector=torch.zeros(2, 3))), Guidance()
        )
        sigmas, noise = suited(name, steps), per_image_noise(SHAPE, [1, 2], brownian=SAMPLERS[name].brownian)
        done = list(SAMPLERS[name].sample(denoise, start_state(noise.start, float(sigmas[0])), sigmas, noise))
        assert len(done) == steps and all(bool(step.x.isfinite().all()) for step in done)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.brownian])
def test_brownian_samplers_ask_for_parts_of_one_path(name):
    """What they ask for covers every step that ends above 0 and does not overlap, so the parts are independent."""
    asked: list[tuple[float, float]] = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        asked.append((sigma, sigma_next))
        return torch.zeros(1, *SHAPE)

    sigmas = SCHEDULES["karras"](SCHEDULE, 5)
    list(SAMPLERS[name].sample(lambda x, sigma: x / 2, torch.ones(1, *SHAPE), sigmas, noise))
    assert asked[0][0] == float(sigmas[0]) and asked[-1][1] == float(sigmas[-2])
    assert all(before[1] == after[0] for before, after in pairwise(asked))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_own_seed_alone(name):
    sigmas = suited(name, 6)
    together = run(name, [5, 6, 7], sigmas)[-1].x
    alone = run(name, [6], sigmas)[-1].x
    assert torch.allclose(together[1:2], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_twice_is_the_same_to_the_bit(name):
    sigmas = suited(name, 6)
    assert torch.equal(run(name, [5, 6], sigmas)[-1].x, run(name, [5, 6], sigmas)[-1].x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_threads_on_one_model_equal_two_runs(name):
    sigmas = suited(name, 8)
    jobs = [[1, 2], [3, 4], [5, 6], [7, 8]]
    one_by_one = [run(name, seeds, sigmas)[-1].x for seeds in jobs]
    with ThreadPoolExecutor(2) as pool:
        at_once = [steps[-1].x for steps in pool.map(lambda seeds: run(name, seeds, sigmas), jobs)]
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, at_once, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_yielded_is_changed_later(name):
    copies = []
    cond = Conditioning(vector=torch.zeros(1, 3))
    noise = per_image_noise(SHAPE, [1])
    x = start_state(noise.start, 5.0)
    before, sigmas = x.clone(), torch.tensor([5.0, 2.0, 1.0, 0.5, 0.0])
    steps = []
    denoise = guided(Denoiser(NETWORK, SCHEDULE, "v"), always(cond), Guidance())
    for step in SAMPLERS[name].sample(denoise, x, sigmas, noise):
        steps.append(step)
        copies.append((step.x.clone(), step.denoised.clone()))
    assert torch.equal(x, before)
    for step, (state, denoised) in zip(steps, copies, strict=True):
        assert torch.equal(step.x, state) and torch.equal(step.denoised, denoised)


@pytest.mark.parametrize("name", SAMPLERS)
def test_starting_part_way_down_keeps_a_perfect_estimate(name):
    """Image to image: with a model that knows the image, every sampler returns it."""
    x0 = torch.linspace(-1, 1, 90).reshape(1, *SHAPE)
    noise = per_image_noise(SHAPE, [3])
    sigmas = SCHEDULES["karras"](SCHEDULE, 10)[4:]
    start = noised(x0, noise.start, float(sigmas[0]))
    *_, last = SAMPLERS[name].sample(lambda x, sigma: x0, start, sigmas, noise)
    assert torch.allclose(last.x, x0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "dpmpp-2m", "ddpm"])
def test_any_shape_will_do(name):
    """Vectors as well as pictures: the state of a prior is (B, D)."""
    noise = per_image_noise((4,), [1, 2])
    *_, last = SAMPLERS[name].sample(lambda x, sigma: x / 2, noise.start, torch.tensor([3.0, 1.0, 0.0]), noise)
    assert last.x.shape == (2, 4)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0], [1.0, 1.0, 0.0], [1.0, 2.0], [1.0, -1.0], [1.0, 0.0, 0.0], [float("inf"), 1.0], [float("nan"), 0.0]],
)
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must be finite and fall"):
        list(intervals(torch.tensor(sigmas)))


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_zero_terminal_snr_equals_exact_ddim(name):
    """The clamped sigma stands for infinity: DDIM equals, to 2e-5, the DDIM in which alpha_T is 0."""
    schedule = zero_terminal_snr(SCHEDULE)
    seeds = [4, 5]
    ours = run(name, seeds, trailing(schedule, 10), schedule)[-1].x
    cumulative = schedule.alphas_cumprod.clone()
    cumulative[-1] = 0
    cond = Conditioning(vector=torch.tensor([[0.1 * seed, 0.2, -0.3] for seed in seeds]))
    x = per_image_noise(SHAPE, seeds).start.double()
    for timestep in range(999, 0, -100):
        at = torch.full((2,), float(timestep))
        with_cond, without = (NETWORK(x.float(), at, c).double() for c in (cond, cond.map(torch.zeros_like)))
        v = without + 3.0 * (with_cond - without)
        alpha, s = cumulative[timestep].sqrt(), (1 - cumulative[timestep]).sqrt()
        kept = cumulative[timestep - 100] if timestep > 100 else torch.ones(())
        x = kept.sqrt() * (alpha * x - s * v) + (1 - kept).sqrt() * (alpha * v + s * x)
    assert torch.allclose(ours.double(), x, rtol=2e-5, atol=2e-5)
