"""The stage of `ldm.training.recipes` that trains the upsampler: large pictures alone, without captions or latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.packed import open_packed
from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.models.pixel_blocks import PixelBlocks
from ldm.models.presets import SystemConfig
from ldm.models.unet import UNet
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import save_checkpoint
from ldm.training.autoencoder import to_unit
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.sheets import save_sheet
from ldm.training.stages import HELD_OUT_EVERY, Workspace
from ldm.training.upsampler import UpsamplerObjective, measure_deviation, smooth_levels

UPSAMPLER = "ldm-upsampler.safetensors"
PREVIEWS = 8
"""Held-out pictures that are drawn while the network trains."""
STEPS = 8
"""Of the sampler, for these."""


def train_upsampler(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn on crops, a quarter of a picture each; write the averaged weights as a file of their own."""
    assert loop is not None
    config = work.config
    pictures, _ = open_packed(work.pictures, config.size)
    held_out = np.arange(len(pictures)) % HELD_OUT_EVERY == 0
    kept, held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    torch.manual_seed(loop.seed)
    unet, first_stage = UNet(config.unet), PixelBlocks(config.autoencoder)
    smooth_levels(unet)
    shown = [Image.fromarray(pictures[i]) for i in held_out[:: max(1, len(held_out) // PREVIEWS)][:PREVIEWS]]

    def preview(unet: UNet, path: Path) -> dict[str, float]:
        return preview_of(system_of(config, unet, first_stage), shown, path)

    objective = UpsamplerObjective(
        unet, first_stage, NOISE_SCHEDULES[config.schedule](), config.prediction, pictures, kept, held_out,
        config.size // 2, preview=preview,
    )  # fmt: skip
    measure_deviation(objective)
    train(objective, loop, work.stage("upsampler")).swap()
    save_checkpoint(system_of(config, unet, first_stage), work.runs / UPSAMPLER, dtype=torch.float16)


def system_of(config: SystemConfig, unet: UNet, first_stage: PixelBlocks) -> LatentDiffusion:
    """The two networks as a model, on the device where they are."""
    return LatentDiffusion(config, unet, first_stage, (), next(unet.parameters()).device, torch.float32)


def preview_of(model: LatentDiffusion, pictures: Sequence[Image.Image], path: Path) -> dict[str, float]:
    """Enlarge small versions of pictures, clean ones, and write a sheet: enlarged bicubically, drawn, and as they are.

    Returns for the first two the PSNR in dB, the mean over pictures, and the sharpness: the mean difference between
    neighbouring pixels over that of the pictures themselves.
    """
    scale = model.config.autoencoder.downsampling
    small = [picture.reduce(scale) for picture in pictures]
    plain = [one.resize(large.size, Image.Resampling.BICUBIC) for one, large in zip(small, pictures, strict=True)]
    drawn = [model.upscale("", one, seed=0, steps=STEPS, upscale_noise=0)[0].image for one in small]
    columns = [to_unit(np.stack([np.asarray(one) for one in column])) for column in (plain, drawn, pictures)]
    save_sheet(torch.stack(columns, dim=1).flatten(0, 1), path, columns=6)
    figures: dict[str, float] = {}
    for name, found in zip(("bicubic", "drawn"), columns, strict=False):
        figures |= {f"{name}_psnr": psnr(found, columns[2]), f"{name}_sharp": edges(found) / edges(columns[2])}
    return figures


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1], the mean over them; at most 100."""
    error = ((found - wanted) / 2).square().flatten(1).mean(dim=1).clamp(min=1e-10)
    return float((-10 * error.log10()).mean())


def edges(pictures: Tensor) -> float:
    """The mean absolute difference between neighbouring pixels of (B, 3, H, W)."""
    return float((pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean()) / 2)
