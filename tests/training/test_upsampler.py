"""The upsampler's objective against its formula in float64, and its stage from packed pictures to a file that draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.packed import write_packed
from ldm.diffusion.schedule import scaled_linear
from ldm.layers.embeddings import sinusoidal_embedding
from ldm.models.pixel_blocks import PixelBlocks
from ldm.models.presets import small, small_upsampler, tiny
from ldm.models.unet import UNet
from ldm.pipeline.load import load
from ldm.training import recipes
from ldm.training.engine.loop import LoopConfig, step_generator
from ldm.training.engine.objective import Draw
from ldm.training.stages import Workspace
from ldm.training.upsampler import UpsamplerObjective, gaussian_blur, measure_deviation, smooth_levels
from ldm.training.upsampler_stage import UPSAMPLER, edges, psnr, train_upsampler
from ldm.types import Conditioning
from ldm.weights.doctor.describe import describe

CONFIG = tiny(small_upsampler())
SIZE = 64


def drawn(count: int) -> np.ndarray:
    """Bright discs on dark grounds, (N, 64, 64, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for picture in pictures:
        centre, radius = rng.integers(16, 48, 2), rng.integers(6, 20)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        picture[:] = np.where(inside[..., None], rng.integers(150, 256, 3), rng.integers(0, 100, 3))
    return pictures


class Oracle(UNet):
    """Answers what it is told to, and keeps what it was shown."""

    answer: Tensor
    shown: tuple[Tensor, Tensor, Conditioning]

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.shown = x, timestep, cond
        return self.answer


def objective_of(unet: UNet, pictures: np.ndarray, held_out: int = 1, crop: int = 32) -> UpsamplerObjective:
    numbers = np.arange(len(pictures))
    first_stage = PixelBlocks(CONFIG.autoencoder)
    kept, rest = numbers[held_out:], numbers[:held_out]
    return UpsamplerObjective(unet, first_stage, scaled_linear(), "v", pictures, kept, rest, crop)


def test_loss_is_the_published_one() -> None:
    unet = Oracle(CONFIG.unet)
    objective = objective_of(unet, drawn(6))
    objective.first_stage.deviation.copy_(torch.linspace(0.05, 0.2, 12))
    unet.answer = torch.full((8, 12, 16, 16), 0.25)
    batch = objective.batch(Draw(8, 0, torch.Generator().manual_seed(0)))
    got = objective.loss(batch).double().numpy()
    betas = np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[batch["level"].numpy()][:, None, None, None]
    noisy = np.sqrt(kept) * batch["small"].numpy() + np.sqrt(1 - kept) * batch["small_noise"].numpy()
    clear = torch.from_numpy(noisy / np.sqrt(kept))
    enlarged = F.interpolate(clear, size=(32, 32), mode="bicubic", antialias=True).numpy()
    blocks = (batch["crops"].numpy() - enlarged).reshape(8, 3, 16, 2, 16, 2).transpose(0, 1, 3, 5, 2, 4)
    x0 = blocks.reshape(8, 12, 16, 16) / np.linspace(0.05, 0.2, 12)[:, None, None]
    alpha2 = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[batch["timestep"].numpy()]
    a, s = np.sqrt(alpha2)[:, None, None, None], np.sqrt(1 - alpha2)[:, None, None, None]
    noise = batch["noise"].double().numpy()
    snr = alpha2 / (1 - alpha2)
    want = ((a * noise - s * x0 - 0.25) ** 2).mean(axis=(1, 2, 3)) * np.minimum(snr + 1, 5.0) / (snr + 1)
    assert got * batch["density"].numpy() == pytest.approx(want, rel=1e-4)
    x, timestep, cond = unet.shown
    assert cond.concat is not None and cond.vector is not None
    assert x.numpy() == pytest.approx(a * x0 + s * noise, abs=1e-4)
    assert cond.concat.numpy() == pytest.approx(noisy, abs=1e-5)
    assert timestep.tolist() == batch["timestep"].tolist() and cond.vector.tolist() == batch["level"].tolist()


def test_the_small_picture_is_blurred_in_half_of_the_rows() -> None:
    objective = objective_of(Oracle(CONFIG.unet), drawn(40), held_out=10)
    batch = objective.batch(Draw(400, 0, torch.Generator().manual_seed(0)))
    exact = batch["crops"].numpy().reshape(400, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    differs = np.abs(batch["small"].numpy() - exact).max(axis=(1, 2, 3))
    edged = np.ptp(batch["crops"].numpy(), axis=(1, 2, 3)) > 1
    left = 0.5 + 0.5 * 0.2 / 0.8  # a Gaussian narrower than a fifth of a pixel has no weight on the next one
    assert (differs[edged] < 1e-5).mean() == pytest.approx(left, abs=0.08)
    levels = batch["level"].double().numpy()
    assert levels.min() >= 0 and levels.max() <= 100
    assert (levels < 25.25).mean() == pytest.approx(0.5, abs=0.08), "half of them in the lowest quarter"


def test_held_out_pictures_are_not_drawn() -> None:
    numbered = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, SIZE, SIZE, 3), np.uint8)
    objective = objective_of(Oracle(CONFIG.unet), numbered, held_out=2)
    crops = objective.batch(Draw(100, 0, torch.Generator().manual_seed(0)))["crops"]
    assert set(((crops[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) == set(range(2, 8))


def test_details_get_unit_variance() -> None:
    objective = objective_of(Oracle(CONFIG.unet), drawn(20))
    measure_deviation(objective, 64)
    details, _ = objective.details(objective.batch(Draw(64, 0, torch.Generator().manual_seed(9))))
    assert details.square().mean(dim=(0, 2, 3)).sqrt().numpy() == pytest.approx(np.ones(12), abs=0.25)
    assert 0.02 < float(objective.first_stage.deviation.min()) < float(objective.first_stage.deviation.max()) < 0.5


def test_blur_is_a_gaussian() -> None:
    pictures = torch.randn(3, 3, 12, 14)
    deviations = [0.0, 0.5, 0.8]
    blurred = gaussian_blur(pictures, torch.tensor(deviations)).numpy()
    assert blurred[0] == pytest.approx(pictures[0].numpy(), abs=1e-6)
    for row, deviation in list(enumerate(deviations))[1:]:
        reach = np.arange(-3, 4)
        kernel = np.exp(-(reach[:, None] ** 2 + reach[None] ** 2) / (2 * deviation**2))
        padded = np.pad(pictures[row].double().numpy(), ((0, 0), (3, 3), (3, 3)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))
        assert blurred[row] == pytest.approx((windows * kernel / kernel.sum()).sum(axis=(3, 4)), abs=1e-5)


def test_levels_begin_alike_where_they_are_near() -> None:
    unet = UNet(CONFIG.unet)
    smooth_levels(unet)
    table = unet.get_parameter("label_emb.weight").detach()
    assert torch.allclose(table, sinusoidal_embedding(torch.arange(101), table.shape[1]))
    assert (table[50] - table[51]).norm() < 0.5 * (table[50] - table[100]).norm()


def test_it_learns() -> None:
    objective = objective_of(UNet(CONFIG.unet), drawn(30))
    smooth_levels(objective.unet)
    measure_deviation(objective, 64)
    optimizer = torch.optim.AdamW(objective.unet.parameters(), lr=2e-3)
    watched = objective.batch(Draw(32, 0, step_generator(1, 0)))
    before = float(objective(watched)["loss"].detach())
    for step in range(40):
        objective(objective.batch(Draw(8, 0, step_generator(0, step))))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(objective(watched)["loss"].detach()) < 0.9 * before


def test_figures() -> None:
    wanted = torch.zeros(2, 3, 4, 4)
    found = wanted.clone()
    found[0] += 0.2  # a tenth of the range: 20 dB
    assert psnr(found, wanted) == pytest.approx((20 + 100) / 2)
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)
    assert edges(ramp) == pytest.approx(0.5)


def test_the_stage_makes_a_file_that_draws(tmp_path: Path) -> None:
    pictures = drawn(75)
    records = ({"texts": ["a disc"], "kind": "shapes", "key": str(i)} for i in range(75))
    write_packed(zip(pictures, records, strict=True), tmp_path, SIZE, "pictures")
    work = Workspace(tmp_path, tmp_path / "runs", CONFIG)
    loop = LoopConfig(steps=2, batch=4, rate=1e-3, warmup=1, precision="no", save_every=2, evaluate_every=2)
    train_upsampler(work, loop)
    assert Image.open(work.stage("upsampler") / "samples-000002.png").size == (6 * SIZE, SIZE)
    path = work.runs / UPSAMPLER
    model = load(path, device="cpu", dtype="float32")
    assert model.config == CONFIG and model.text == ()
    assert isinstance(model.autoencoder, PixelBlocks) and 0.02 < float(model.autoencoder.deviation.max()) < 0.5
    (large,) = model.upscale("", Image.fromarray(pictures[0]), seed=1, steps=2)
    assert large.image.size == (2 * SIZE, 2 * SIZE)
    report = describe(path)
    assert report.problem is None and report.found.variant == "x2 upscaler" and report.read_by == ("ldm",)
    before = path.read_bytes()
    train_upsampler(work, loop)
    assert path.read_bytes() == before, "a finished run takes no step"


def test_the_recipes_name_it() -> None:
    for family in ("small", "gpu"):
        recipe = recipes.RECIPES[f"{family}-upsampler"]
        assert recipe.run is train_upsampler and recipe.loop is not None
        assert recipe.preset(recipe.size) == small_upsampler(256)
        assert recipes.RECIPES[f"{family}-unet"].preset is small
