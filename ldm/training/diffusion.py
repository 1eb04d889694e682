"""The objective of the denoising network: see a noised latent and its caption, say what the noise was.

Ho et al. 2020, eq. 14; Salimans & Ho 2022 (v); Hang et al. 2023 (a bounded SNR weight); Ho & Salimans 2022 (dropped
captions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DEFAULT_WEIGHING, Weighing, timestep_density, weighted_error
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.unet import UNet
from ldm.training.draws import draws_from
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.training.whitening import TextWhitening
from ldm.types import Conditioning, PredictionType

Preview = Callable[[UNet, Path], None]


@dataclass(frozen=True)
class LatentPictures:
    """What the network is trained on, encoded once.

    latents: (N, C, h, w); flips: (N,) bool, may picture i be mirrored; states: (M, tokens, width) and pooled: (M, P),
    of all captions, the last row of no caption; first[i] .. first[i + 1] are the rows that describe picture i;
    whitening: what is done to both before the network sees them.
    """

    latents: np.ndarray
    flips: np.ndarray
    states: np.ndarray
    pooled: np.ndarray
    first: np.ndarray
    whitening: TextWhitening

    def __len__(self) -> int:
        return len(self.latents)


class DiffusionObjective(Objective):
    """Weighted squared error of the network's own prediction, through the same Denoiser that samplers use."""

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        prediction: PredictionType,
        data: LatentPictures,
        held_out: Sequence[int],
        *,
        share: np.ndarray | None = None,
        drop: float = 0.1,
        weighing: Weighing = DEFAULT_WEIGHING,
        preview: Preview | None = None,
    ) -> None:
        """share: how likely each picture is drawn; drop: how likely its caption is left out; held_out: never drawn."""
        super().__init__()
        self.unet = unet.to(memory_format=torch.channels_last)
        self.schedule, self.data = schedule, data
        self.denoiser = Denoiser(unet, schedule, prediction)
        self.draws = draws_from(data.flips, data.first, held_out, share)
        self.density = timestep_density(schedule, prediction, weighing)
        self.held_out, self.drop, self.weighing, self.preview = list(held_out), drop, weighing, preview

    def batch(self, draw: Draw) -> Batch:
        """latents and noise (B, C, h, w), timestep and its density (B,), text states (B, N, D) and pooled (B, P).

        And which pictures they are, and whether mirrored, both (B,).
        """
        return self._rows(self.draws.pictures(draw.count, draw.generator), self.density, draw.generator, self.drop)

    def _rows(self, chosen: Sequence[int], density: Tensor, generator: torch.Generator, drop: float) -> Batch:
        data = self.data
        timestep = torch.multinomial(density, len(chosen), replacement=True, generator=generator)
        drawn = self.draws.told(chosen, generator, drop)
        latents = [
            data.latents[i, ..., ::-1] if mirrored else data.latents[i]
            for i, mirrored in zip(chosen, drawn.mirrored, strict=True)
        ]
        x0 = torch.from_numpy(np.stack(latents)).float()
        return {
            "latents": x0,
            "noise": torch.randn(x0.shape, generator=generator),
            "timestep": timestep,
            "density": density[timestep].float(),
            "states": data.whitening.states(_rows_of(data.states, drawn.rows)),
            "pooled": data.whitening.pooled(_rows_of(data.pooled, drawn.rows)),
            "pictures": torch.from_numpy(drawn.pictures),
            "mirrored": torch.from_numpy(drawn.mirrored),
        }

    def compile(self) -> None:
        """Compile the network alone: the maths around it runs in float64 on the CPU."""
        self.unet.compile()

    def forward(self, batch: Batch) -> Batch:
        """-> loss."""
        return {"loss": self.loss(batch).mean()}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted error of each row, (B,)."""
        vector = None if self.unet.config.vector_width is None else batch["pooled"]
        cond = Conditioning(cross=batch["states"], vector=vector)
        x0, noise, timestep = batch["latents"], batch["noise"], batch["timestep"]
        return weighted_error(self.denoiser, x0, noise, timestep, cond, self.weighing) / batch["density"]

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """The loss on held-out pictures with noise that is the same every time, and whatever `preview` draws."""
        losses = [self.loss(batch) for batch in self.held_out_batches()]
        if self.preview is not None:
            self.preview(self.unet, folder / f"samples-{step:06d}.png")
        return {"held_out": float(torch.cat(losses).mean())}

    def held_out_batches(self) -> list[Batch]:
        """All held-out pictures with their captions, at levels and with noise that are the same every time."""
        generator = torch.Generator().manual_seed(1)
        device = next(self.unet.parameters()).device
        even = torch.ones(len(self.schedule), dtype=torch.float64)
        chosen = [self.held_out[a : a + 64] for a in range(0, len(self.held_out), 64)]
        batches = [self._rows(part, even, generator, drop=0.0) for part in chosen]
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _rows_of(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Some rows of an array that may lie on disk, float32."""
    return torch.from_numpy(np.stack([array[row] for row in rows])).float()
