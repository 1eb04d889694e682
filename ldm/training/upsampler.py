"""The objective of the upsampler: see a small picture and the noised details of the large one, say what the noise was.

Ramesh et al. 2022, section 2.1: trained on crops, the small picture slightly corrupted, by blur in half of the rows and
by noise, whose level the network is told (Ho et al. 2021, section 4.2). Details as in `ldm.models.pixel_blocks`.
Shapes: B batch, H crop's side, z channels of the details, h = H / f.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DEFAULT_WEIGHING, Weighing, timestep_density, weighted_error
from ldm.diffusion.schedule import NoiseSchedule
from ldm.layers.embeddings import sinusoidal_embedding
from ldm.models.pixel_blocks import PixelBlocks
from ldm.models.unet import UNet
from ldm.pipeline.upscaling import details_of, noised_picture
from ldm.training.autoencoder import to_unit
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.types import Conditioning, PredictionType

Preview = Callable[[UNet, Path], dict[str, float]]

BLURRED, MOST_BLUR = 0.5, 0.8
"""How likely the small picture is blurred, and the largest deviation of that blur, in its pixels."""

WATCHED = 32
"""Held-out crops of which the loss is watched."""


class UpsamplerObjective(Objective):
    """Weighted squared error of the network's own prediction, as in `DiffusionObjective`."""

    def __init__(
        self,
        unet: UNet,
        first_stage: PixelBlocks,
        schedule: NoiseSchedule,
        prediction: PredictionType,
        pictures: np.ndarray,
        kept: np.ndarray,
        held_out: np.ndarray,
        crop: int,
        *,
        weighing: Weighing = DEFAULT_WEIGHING,
        preview: Preview | None = None,
    ) -> None:
        """pictures: uint8 (N, size, size, 3), large; crop: the side of what is shown of one.

        kept, held_out: numbers of the pictures that are trained on, and of those that are not.
        """
        super().__init__()
        assert unet.config.classes is not None
        self.unet, self.first_stage = unet.to(memory_format=torch.channels_last), first_stage
        self.schedule, self.levels = schedule, unet.config.classes
        self.denoiser = Denoiser(unet, schedule, prediction)
        self.pictures, self.kept, self.held_out, self.crop = pictures, kept, held_out, crop
        self.density = timestep_density(schedule, prediction, weighing)
        self.weighing, self.preview = weighing, preview

    def batch(self, draw: Draw) -> Batch:
        """crops (B, 3, H, H) in [-1, 1] and the same in small (B, 3, h, h), some blurred; small_noise for these, and
        noise (B, z, h, h) for the details; level, timestep and its density (B,).
        """
        chosen = self.kept[torch.randint(len(self.kept), (draw.count,), generator=draw.generator).numpy()]
        return self._of(chosen, self.density, draw.generator)

    def _of(self, chosen: np.ndarray, density: Tensor, generator: torch.Generator) -> Batch:
        count, crop, config = len(chosen), self.crop, self.first_stage.config
        corner = torch.randint(self.pictures.shape[1] - crop + 1, (count, 2), generator=generator).tolist()
        crops = [self.pictures[i, y : y + crop, x : x + crop] for i, (y, x) in zip(chosen, corner, strict=True)]
        blurred, blur, level = torch.rand(3, count, generator=generator)
        timestep = torch.multinomial(density, count, replacement=True, generator=generator)
        side = crop // config.downsampling
        large = to_unit(np.stack(crops))
        deviation = torch.where(blurred < BLURRED, MOST_BLUR * blur, 0.0)
        return {
            "crops": large,
            "small": gaussian_blur(F.avg_pool2d(large, config.downsampling), deviation),
            "level": (self.levels * level.square()).long(),  # little noise more often: most pictures are clean
            "timestep": timestep,
            "density": density[timestep].float(),
            "noise": torch.randn(count, config.latent_channels, side, side, generator=generator),
            "small_noise": torch.randn(count, 3, side, side, generator=generator),
        }

    def compile(self) -> None:
        """Compile the network alone: the maths around it runs in float64 on the CPU."""
        self.unet.compile()

    def forward(self, batch: Batch) -> Batch:
        """-> loss."""
        return {"loss": self.loss(batch).mean()}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted error of each row, (B,)."""
        details, seen = self.details(batch)
        cond = Conditioning(concat=seen, vector=batch["level"])
        error = weighted_error(self.denoiser, details, batch["noise"], batch["timestep"], cond, self.weighing)
        return error / batch["density"]

    def details(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the network is to draw of each crop, (B, z, h, h), and what it sees, the small picture (B, 3, h, h)."""
        seen = noised_picture(batch["small"], batch["small_noise"], batch["level"])
        return details_of(self.first_stage, seen, batch["level"]).encode(batch["crops"]), seen

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """The loss on held-out crops, at levels and with noise that are the same every time; `preview`'s figures."""
        generator = torch.Generator().manual_seed(1)
        batch = self._of(self.held_out[:WATCHED], torch.ones_like(self.density), generator)
        device = next(self.unet.parameters()).device
        figures = {"held_out": float(self.loss({name: t.to(device) for name, t in batch.items()}).mean())}
        if self.preview is not None:
            figures |= self.preview(self.unet, folder / f"samples-{step:06d}.png")
        return figures


def gaussian_blur(pictures: Tensor, deviation: Tensor) -> Tensor:
    """Blur each picture (B, C, H, W) by its own deviation (B,), 0 to 1 pixel; edges are repeated."""
    reach = torch.arange(-3, 4, device=pictures.device)
    kernel = torch.exp(-0.5 * (reach / deviation.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(pictures)[:, None]
    rows = F.pad(pictures, (3, 3, 3, 3), mode="replicate").transpose(0, 1)  # the batch as channels, to each its kernel
    down = F.conv2d(rows, kernel[..., None], groups=len(pictures))
    return F.conv2d(down, kernel[:, :, None], groups=len(pictures)).transpose(0, 1)


@torch.no_grad()
def measure_deviation(objective: UpsamplerObjective, crops: int = 512) -> None:
    """Tell the objective's first stage how large the details are that it will meet, from so many crops."""
    generator = torch.Generator().manual_seed(0)
    batches = [objective.batch(Draw(min(32, crops), n, generator)) for n in range(max(1, crops // 32))]
    objective.first_stage.deviation.fill_(1.0)
    details = torch.cat([objective.details(batch)[0] for batch in batches])
    objective.first_stage.deviation.copy_(details.square().mean(dim=(0, 2, 3)).sqrt().clamp(min=1e-3))


@torch.no_grad()
def smooth_levels(unet: UNet) -> None:
    """Begin with levels that are told alike where they are near each other: each one alone is seldom drawn."""
    table: nn.Module = unet.label_emb or nn.Identity()
    assert isinstance(table, nn.Embedding)
    table.weight.copy_(sinusoidal_embedding(torch.arange(table.num_embeddings), table.embedding_dim))
