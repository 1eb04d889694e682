"""Inpainting: what is kept is kept bit for bit, and around the hole the network sees what its training showed it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ldm.diffusion.noise import per_image_noise, start_noise
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.sigmas import SCHEDULES, end_above_zero
from ldm.diffusion.state import noised
from ldm.errors import LdmError
from ldm.models.presets import sd1, sd2, tiny
from ldm.pipeline.images import picture_bytes, read_picture, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.masks import Window
from ldm.pipeline.prepare import last_steps, sigmas_for
from ldm.pipeline.request import Control, GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.samplers import SAMPLERS
from ldm.tasks import inpaint, run
from ldm.tasks.inpaint import held, within
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


@pytest.fixture(scope="module")
def trained_for_it() -> LatentDiffusion:
    return random_system(tiny(sd1(in_channels=9)))


def picture(size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int], level: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(level, box)
    return mask


class Watching:
    """The model's U-Net, or another one, every state and channels that it was shown kept."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.shown, self.beside = unet, list[Tensor](), list[Tensor | None]()

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.shown.append(x)
        self.beside.append(cond.concat)
        return self.unet(x, timestep, cond)


def watched(model: LatentDiffusion) -> tuple[LatentDiffusion, Watching]:
    unet = Watching(model.unet)
    return replace(model, unet=unet), unet  # pyright: ignore[reportArgumentType]


# ---- the guarantee

QUICK: dict[str, Any] = {"steps": 2, "sampler": "euler", "guidance": 1.0, "seed": 1}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    seed=st.integers(0, 2**32),
    density=st.floats(0, 1),
    levels=st.sampled_from([2, 256]),
    fields=st.fixed_dictionaries(
        {
            "mask_blur": st.integers(0, 12),
            "mask_fill": st.sampled_from(["original", "noise", "zero"]),
            "mask_invert": st.booleans(),
            "mask_soft": st.booleans(),
            "only_masked": st.booleans(),
            "mask_padding": st.integers(0, 40),
            "strength": st.sampled_from([None, 0.5, 1.0]),
            "width": st.sampled_from([None, None, 64, 80]),
            "extend": st.sampled_from([None, None, (0, 5, 9, 0)]),
        }
    ),
    special=st.booleans(),
)
def test_every_pixel_outside_of_the_mask_is_bit_for_bit_that_of_the_picture(
    size, seed, density, levels, fields, special, model, trained_for_it
):
    rng = np.random.default_rng(seed)
    grey = np.zeros(size[::-1], dtype=np.uint8)
    left, top = rng.integers(0, size[0]), rng.integers(0, size[1])
    part = grey[top : top + rng.integers(1, 80), left : left + rng.integers(1, 80)]
    part[rng.random(part.shape) <= density] = 255
    part[0, 0] = 255
    if levels > 2:
        grey = (grey * rng.random(grey.shape)).astype(np.uint8)
        grey[top, left] = 255
    kept = grey < (1 if fields["mask_soft"] else 128)
    if fields["mask_invert"]:
        grey = 255 - grey
    original = picture(size, seed)
    if not fields["only_masked"]:
        del fields["mask_padding"]
    drawn = (trained_for_it if special else model).inpaint("x", original, Image.fromarray(grey), **QUICK, **fields)[0]
    left, top, right, bottom = fields["extend"] or (0, 0, 0, 0)
    assert drawn.image.size == (size[0] + left + right, size[1] + top + bottom)
    inner = np.asarray(drawn.image)[top : top + size[1], left : left + size[0]]
    assert np.array_equal(inner[kept], np.asarray(original)[kept])
    if not fields["mask_soft"] and fields["mask_blur"] == 0 and (~kept).sum() > 50:
        assert (inner[~kept] != np.asarray(original)[~kept]).any()


def test_a_picture_with_transparency_is_kept_as_it_looks_on_white(model):
    clear = picture((40, 30)).convert("RGBA")
    clear.putalpha(128)
    drawn = model.inpaint("x", clear, rectangle((40, 30), (0, 0, 20, 30)), **QUICK)[0].image
    on_white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    assert np.array_equal(np.asarray(drawn)[:, 20:], np.asarray(on_white)[:, 20:])


def test_what_is_drawn_lands_where_it_was_taken_from(model):
    """A network that knows the picture's latent draws its reconstruction: in its place, to the pixel, padded or not."""
    for size in ((64, 64), (75, 59)):
        original, mask = picture(size), rectangle(size, (20, 10, 50, 40))
        width, height = -(-size[0] // 8) * 8, -(-size[1] // 8) * 8
        ahead, above = (width - size[0] + 1) // 2, (height - size[1] + 1) // 2
        rows = np.arange(-above, height - above).clip(0, size[1] - 1)
        columns = np.arange(-ahead, width - ahead).clip(0, size[0] - 1)
        padded = Image.fromarray(np.asarray(original)[rows[:, None], columns])
        latent = model.autoencoder.encode(to_tensor(padded)[None])
        knowing = replace(
            model,
            unet=lambda x, timestep, cond, latent=latent: latent.expand(len(x), -1, -1, -1),  # pyright: ignore
            config=replace(model.config, prediction="x0"),
        )
        drawn = np.asarray(knowing.inpaint("x", original, mask, mask_blur=0, **QUICK)[0].image, dtype=int)
        decoded = ((model.autoencoder.decode(latent)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        decoded = decoded[above : above + size[1], ahead : ahead + size[0]]
        assert np.abs(drawn[10:40, 20:50] - decoded[10:40, 20:50]).max() <= 1


# ---- what the network is shown


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 7])
def test_around_the_hole_every_sampler_shows_the_picture_under_noise_of_the_level(name, steps):
    """x = latent + sigma * noise with unit noise at every evaluation, and where no noise is drawn, with the first."""
    sampler, schedule = SAMPLERS[name], scaled_linear()
    sigmas = SCHEDULES[sampler.schedule](schedule, steps)
    if sampler.ends_above_zero:
        sigmas = end_above_zero(sigmas, schedule)
    shares = torch.zeros(1, 1, 64, 64)
    shares[..., 20:40, 20:40] = 1
    outside = (shares == 0).expand(2, 4, -1, -1)
    latent = torch.randn(1, 4, 64, 64)
    noise = per_image_noise((4, 64, 64), [1, 2], brownian=sampler.brownian)
    seen: list[tuple[float, Tensor]] = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((float(sigma[0]), x))
        return torch.tanh(x)

    start = noised(latent, noise.start, float(sigmas[0]))
    last = list(sampler.sample(held(network, latent, shares, sigmas), start, sigmas, noise))[-1]
    assert len(seen) >= steps
    for sigma, x in seen:
        if sampler.stochastic:
            unit = ((x - latent) / sigma)[outside]
            assert abs(float(unit.mean())) < 0.03 and abs(float(unit.std()) - 1) < 0.02
        else:
            assert torch.allclose(x[outside], (latent + sigma * noise.start)[outside], atol=1e-4)
    if last.sigma_next == 0:
        assert torch.allclose(last.x[outside], latent.expand(2, -1, -1, -1)[outside], atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpmpp-2m"])
def test_a_share_of_the_steps_is_image_to_image_with_so_many(name):
    """For a network that looks at each cell alone, what a cell of share j / n becomes is what the last j steps make."""
    sampler, schedule, steps = SAMPLERS[name], scaled_linear(), 6
    sigmas = SCHEDULES[sampler.schedule](schedule, steps)
    latent, noise = torch.randn(1, 4, 1, steps + 1), per_image_noise((4, 1, steps + 1), [3])
    shares = torch.arange(steps + 1).reshape(1, 1, 1, -1) / steps
    network = lambda x, sigma: torch.tanh(x)  # noqa: E731
    start = noised(latent, noise.start, float(sigmas[0]))
    ours = list(sampler.sample(held(network, latent, shares, sigmas), start, sigmas, noise))[-1].x
    assert torch.allclose(ours[..., 0], latent[..., 0], atol=1e-5)
    for j in range(1, steps + 1):
        own = last_steps(sigmas, j)
        expected = list(sampler.sample(network, noised(latent, noise.start, float(own[0])), own, noise))[-1].x
        if name in ("euler", "ddim") or j == steps:  # the others remember the step before
            assert torch.allclose(ours[..., j], expected[..., j], atol=1e-4)
        assert (ours[..., j] - latent[..., j]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["original", "noise", "zero"])
def test_what_the_hole_starts_from(kind, model):
    model_, unet = watched(model)
    original, mask = picture(), rectangle((64, 64), (16, 24, 40, 64))
    drawn = model_.inpaint("x", original, mask, mask_fill=kind, steps=4, strength=0.5, guidance=1.0, seed=3)[0]
    sigma = float(last_steps(sigmas_for(model, drawn.request), 2)[0])
    latent, noise = model.autoencoder.encode(to_tensor(original)[None]), start_noise((4, 8, 8), [3])
    inside = {
        "original": latent + sigma * noise,
        "noise": noise * (1 + sigma**2) ** 0.5,
        "zero": sigma * noise,
    }[kind]
    expected = latent + sigma * noise
    expected[..., 3:8, 2:5] = inside[..., 3:8, 2:5]
    assert torch.allclose(unit_variance(expected, sigma), unet.shown[0], atol=1e-4)


def unit_variance(x: Tensor, sigma: float) -> Tensor:
    return x / (1 + sigma**2) ** 0.5


def test_a_model_that_was_trained_for_it_is_shown_the_mask_and_the_picture_around_it(trained_for_it):
    model_, unet = watched(trained_for_it)
    original, mask = picture((64, 72)), rectangle((64, 72), (16, 20, 40, 64))
    drawn = model_.inpaint("x", original, mask, steps=2, count=2)[0]
    assert (drawn.request.width, drawn.request.height) == (64, 72)
    shown = unet.beside[0]
    assert shown is not None and shown.shape == (4, 5, 9, 8)  # two pictures, wanted and not
    cells = torch.zeros(9, 8)
    cells[2:8, 2:5] = 1  # rows 20 ... 63 touch the cells from 16 on
    grey = to_tensor(original)
    grey[:, 20:64, 16:40] = 0
    assert torch.equal(shown[:, 0], cells.expand(4, -1, -1))
    assert torch.allclose(shown[:, 1:], trained_for_it.autoencoder.encode(grey[None]).expand(4, -1, -1, -1), atol=1e-5)


def test_only_masked_shows_the_surroundings_at_the_size_of_the_model(model):
    model_, unet = watched(model)
    original, mask = picture((400, 300)), rectangle((400, 300), (200, 100, 210, 110))
    drawn = model_.inpaint("x", original, mask, only_masked=True, mask_padding=11, mask_blur=0, **QUICK)[0]
    assert unet.shown[0].shape == (1, 4, 8, 8) and drawn.image.size == (400, 300)
    assert "drawn at 64x64 and scaled to 32x32" in drawn.notes
    changed = np.argwhere((np.asarray(drawn.image) != np.asarray(original)).any(axis=-1))
    assert changed.min(axis=0).tolist() == [100, 200] and changed.max(axis=0).tolist() == [109, 209]


def test_a_control_shows_what_the_window_does():
    whole, other = picture((400, 300)), picture((99, 77))
    window = Window((190, 90, 222, 122), (64, 64))
    first, second = within(
        tuple(Control(network="x", image=picture_bytes(image)) for image in (whole, other)), (400, 300), window
    )
    assert np.array_equal(np.asarray(read_picture(first.image)), np.asarray(window.of(whole)))
    assert second.image == picture_bytes(other)


# ---- the task


def test_strength_counts_the_steps_and_defaults_by_the_fill(model):
    shared: dict[str, Any] = {"prompt": "x", "steps": 4, "image": picture_bytes(picture())}
    shared["mask"] = picture_bytes(rectangle((64, 64), (0, 0, 9, 9)))
    for fields, steps in (({}, 3), ({"mask_fill": "noise"}, 4), ({"strength": 0.5, "mask_fill": "zero"}, 2)):
        events = list(run(model, GenerateRequest(**shared, **fields)))
        assert {event.steps for event in events if isinstance(event, Progress)} == {steps}


def test_a_picture_of_a_batch_equals_the_same_seed_alone(model):
    fields: dict[str, Any] = {"steps": 4, "sampler": "euler-a", "mask_fill": "noise"}
    mask = rectangle((64, 64), (8, 8, 50, 50))
    batch = model.inpaint("x", picture(), mask, seed=3, count=3, **fields)
    alone = model.inpaint("x", picture(), mask, seed=5, **fields)[0]
    assert np.abs(np.asarray(batch[2].image, dtype=int) - np.asarray(alone.image, dtype=int)).max() <= 1


def test_its_own_record_makes_it_again(model):
    mask = rectangle((101, 67), (30, 8, 50, 50))
    drawn = model.inpaint("x", picture((101, 67)), mask, steps=2)[0]
    again = model.generate(drawn.request)[0]
    assert np.array_equal(np.asarray(drawn.image), np.asarray(again.image))


def test_what_is_refused(model):
    with pytest.raises(LdmError, match="mask: found 32x64, expected the size of image, 64x64"):
        model.inpaint("x", picture(), rectangle((32, 64), (0, 0, 9, 9)))
    with pytest.raises(LdmError, match="mask: found nothing to redraw"):
        model.inpaint("x", picture(), Image.new("L", (64, 64)))
    with pytest.raises(LdmError, match="mask: image: found a web page"):
        model.inpaint("x", picture(), b"<html>")
    with pytest.raises(LdmError, match="mask: found none"):
        list(inpaint(model, GenerateRequest(prompt="x", image=picture_bytes(picture()))))
    deep = random_system(tiny(sd2(in_channels=5)))
    with pytest.raises(LdmError, match="takes 1 extra channels"):
        deep.inpaint("x", picture(), rectangle((64, 64), (0, 0, 9, 9)))
