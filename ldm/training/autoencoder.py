"""The objective of the first stage: reconstruct pictures through a small, smooth latent.

Rombach et al. 2022, appendix G (reconstruction and a small KL). Two additions make the latent easier to diffuse:
decoding a halved or mirrored latent must give the halved or mirrored picture (Kouzelis et al. 2025, EQ-VAE).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.training.sheets import save_sheet

Transform = Literal["none", "halve", "mirror"]


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the parts: gradients (edges), hues, coarse colours, and KL per latent entry."""

    edges: float = 1.0
    hues: float = 1.0
    coarse: float = 1.0
    kl: float = 5e-4


class AutoencoderObjective(Objective):
    """L1 on pixels, on differences between neighbours and between colours, and on 8 x 8 means; plus KL.

    The hues are weighted since brightness alone explains most of the pixels, and is learned alone for long.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        pictures: np.ndarray,
        kept: np.ndarray,
        held_out: np.ndarray,
        crop: int,
        loss: AutoencoderLoss,
    ) -> None:
        """pictures: uint8 (N, size, size, 3), may be a memory map; crop: side of the training crops.

        kept, held_out: numbers of the pictures that are trained on, and of those that are not.
        """
        super().__init__()
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)
        self.pictures, self.kept, self.held_out = pictures, kept, held_out
        self.crop, self.weights = crop, loss

    def batch(self, draw: Draw) -> Batch:
        """Random crops (B, 3, crop, crop) in [-1, 1], the latent's noise, and which transform to ask for."""
        count, generator = draw.count, draw.generator
        size, crop = self.pictures.shape[1], self.crop
        index = self.kept[torch.randint(len(self.kept), (count,), generator=generator).numpy()].tolist()
        corner = torch.randint(size - crop + 1, (count, 2), generator=generator).tolist()
        crops = [self.pictures[i, y : y + crop, x : x + crop] for i, (y, x) in zip(index, corner, strict=True)]
        images = to_unit(np.stack(crops))
        side = crop // self.autoencoder.config.downsampling
        noise = torch.randn(count, self.autoencoder.config.latent_channels, side, side, generator=generator)
        choice = torch.rand((), generator=generator)
        return {"images": images, "noise": noise, "halve": choice < 0.25, "mirror": choice > 0.75}

    def forward(self, batch: Batch) -> Batch:
        """-> loss, and its parts."""
        transform: Transform = "halve" if batch["halve"] else "mirror" if batch["mirror"] else "none"
        return self.losses(batch["images"].contiguous(memory_format=torch.channels_last), batch["noise"], transform)

    def losses(self, images: Tensor, noise: Tensor, transform: Transform) -> dict[str, Tensor]:
        """The loss for pictures (B, 3, H, W), given the noise that samples their latents."""
        posterior = self.autoencoder.posterior(images)
        latents = posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise
        decoded = self.autoencoder.reconstruct(_transformed(latents, transform)).float()
        target = _transformed(images, transform)
        kl = posterior.kl().mean() / noise[0].numel()
        parts = _unlike(decoded, target, self.weights)
        return {**parts, "loss": parts["loss"] + self.weights.kl * kl, "kl": kl}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """PSNR in dB over held-out pictures, and a sheet of them above their reconstructions."""
        images = to_unit(self.pictures[self.held_out[:64]])
        device = next(self.autoencoder.parameters()).device
        means = [self.autoencoder.posterior(part.to(device)).mode() for part in images.split(16)]
        decoded = torch.cat([self.autoencoder.reconstruct(mean).cpu() for mean in means])
        _save_rows(images, decoded, folder, step)
        return {"psnr": _psnr(decoded, images)}


class VAEDecoderObjective(Objective):
    """The decoder alone, on latents that are a little off, as a sampler leaves them; the encoder and its latents stay.

    The loss is `AutoencoderObjective`'s but for its KL. A picture's noise is of a level between none and `noise`, in
    standard deviations of the latents.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        pictures: np.ndarray,
        kept: np.ndarray,
        held_out: np.ndarray,
        loss: AutoencoderLoss,
        noise: float = 0.2,
    ) -> None:
        """pictures, kept, held_out: as of `AutoencoderObjective`; the pictures are taken whole."""
        super().__init__()
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)
        for part in (autoencoder.encoder, autoencoder.quant_conv):
            part.requires_grad_(False)
        self.pictures, self.kept, self.held_out = pictures, kept, held_out
        self.weights, self.noise = loss, noise

    def batch(self, draw: Draw) -> Batch:
        """Pictures (B, 3, H, W) in [-1, 1], noise (B, z, h, w), and its level (B,)."""
        index = self.kept[torch.randint(len(self.kept), (draw.count,), generator=draw.generator).numpy()].tolist()
        images = to_unit(self.pictures[index])
        level = self.noise * torch.rand(draw.count, generator=draw.generator)
        return {"images": images, "noise": self._noise(images, draw.generator), "level": level}

    def forward(self, batch: Batch) -> Batch:
        """-> loss, and its parts."""
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            mean = self.autoencoder.posterior(images).mean
        off = batch["level"][:, None, None, None] * batch["noise"] / self.autoencoder.config.scale_factor
        return _unlike(self.autoencoder.reconstruct(mean + off).float(), images, self.weights)

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """PSNR in dB over held-out pictures, without noise and with the half and all of it, and a sheet of the last."""
        images = to_unit(self.pictures[self.held_out[:64]])
        noise = self._noise(images, torch.Generator().manual_seed(0)) / self.autoencoder.config.scale_factor
        device = next(self.autoencoder.parameters()).device
        means = torch.cat([self.autoencoder.posterior(part.to(device)).mode().cpu() for part in images.split(16)])
        decoded, found = images, {}
        for level in (0.0, 0.5 * self.noise, self.noise):
            latents = means + level * noise
            decoded = torch.cat([self.autoencoder.reconstruct(part.to(device)).cpu() for part in latents.split(16)])
            found[f"psnr_{level:g}"] = _psnr(decoded, images)
        _save_rows(images, decoded, folder, step)
        return found

    def _noise(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        config = self.autoencoder.config
        sides = [side // config.downsampling for side in images.shape[2:]]
        return torch.randn(len(images), config.latent_channels, *sides, generator=generator)


def _psnr(decoded: Tensor, images: Tensor) -> float:
    """The mean over pictures (B, 3, H, W) in [-1, 1], in dB."""
    error = ((decoded.clamp(-1, 1) - images) / 2).square().flatten(1).mean(dim=1)
    return float((-10 * error.log10()).mean())


def _save_rows(images: Tensor, decoded: Tensor, folder: Path, step: int) -> None:
    """A sheet of the first pictures, each row above its reconstructions."""
    rows = [picture for i in range(0, 16, 8) for picture in (*images[i : i + 8], *decoded[i : i + 8])]
    save_sheet(torch.stack(rows), folder / f"reconstruction-{step:06d}.png", columns=8)


def _unlike(decoded: Tensor, target: Tensor, weights: AutoencoderLoss) -> dict[str, Tensor]:
    """How far a decoded picture is from what it should be, (B, 3, H, W) both: the loss, and its parts."""
    pixels = (decoded - target).abs().mean()
    edges = (_differences(decoded) - _differences(target)).abs().mean()
    coarse = (F.avg_pool2d(decoded, 8) - F.avg_pool2d(target, 8)).abs().mean()
    hues = (decoded.diff(dim=1) - target.diff(dim=1)).abs().mean()
    loss = pixels + weights.edges * edges + weights.hues * hues + weights.coarse * coarse
    return {"loss": loss, "pixels": pixels, "edges": edges, "hues": hues, "coarse": coarse}


def to_unit(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _transformed(x: Tensor, transform: Transform) -> Tensor:
    match transform:
        case "none":
            return x
        case "halve":
            return F.avg_pool2d(x, 2)
        case "mirror":
            return x.flip(-1)


def _differences(x: Tensor) -> Tensor:
    """Differences between neighbouring pixels, to the right and downwards, on the common grid."""
    return torch.cat([x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]], dim=1)
