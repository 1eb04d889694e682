"""What tuning minimises: the model's own training loss, on the user's pictures.

Ho et al. 2020, eq. 14, weighted and noised as `Noising` and `Weighing` say; Ruiz et al. 2023 (DreamBooth, section 3.3)
for pictures of the class; Zhang et al. 2023 for a control network. Shapes: B batch, z latent channels, h and w latent
height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.data.buckets import Crop
from ldm.data.captions import told
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import Weighing, weighted_error
from ldm.diffusion.schedule import NoiseSchedule, zero_terminal_snr
from ldm.models.controlnet import ControlNet
from ldm.pipeline.control import Controlled, Hint
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.training.tune.epochs import Epochs
from ldm.training.tune.pictures import Prepared
from ldm.types import Conditioning, Network

Look = Callable[[Path, int], dict[str, float]]
"""What is measured and drawn on the way, with the weights of that step: (folder, step) -> figures."""


@dataclass(frozen=True)
class Noising:
    """How latents are noised.

    offset:       of how much more noise is the same all over a channel, so that the mean of a picture is learned too
                  (Guttenberg 2023, "Diffusion with Offset Noise")
    perturbation: of how much more noise is shown than the network is to speak of (Ning et al. 2023, section 4)
    zero_terminal_snr: whether the last timestep is noise and nothing else (Lin et al. 2023); for v and x0
    prior:        what an error on a picture of the class counts
    """

    offset: float = 0.0
    perturbation: float = 0.0
    zero_terminal_snr: bool = False
    prior: float = 1.0

    def schedule(self, of_the_model: NoiseSchedule) -> NoiseSchedule:
        """The schedule that is trained on."""
        return zero_terminal_snr(of_the_model) if self.zero_terminal_snr else of_the_model


class Captions(Protocol):
    """What turns captions into what the network is told."""

    def batch(self, captions: Sequence[str], crops: Sequence[Crop]) -> Batch:
        """What `cond` needs of these captions, tensors of B rows on the CPU; called by any thread."""
        ...

    def cond(self, batch: Batch) -> Conditioning:
        """What the network is told, with gradients where the text side is trained."""
        ...


class TuneObjective(Objective):
    """The loss on batches that `epochs` names. It holds the networks that are trained, and those that they need.

    control:  the control network that is trained, told each picture's hint
    text_share: what the rate of the text towers is to the run's; None: they are one group with all else
    autocast: in which dtype layers are run where the loop does not say so itself; None: in their own
    facts:    see `Objective.facts`
    look:     called by `evaluate`
    """

    def __init__(
        self,
        model: LatentDiffusion,
        networks: nn.ModuleList,
        pictures: Sequence[Prepared],
        epochs: Epochs,
        captions: Captions,
        *,
        noising: Noising,
        weighing: Weighing,
        control: ControlNet | None = None,
        text_share: float | None = None,
        autocast: torch.dtype | None = None,
        facts: dict[str, object],
    ) -> None:
        super().__init__()
        self.networks, self.control, self.text_share = networks, control, text_share
        self.model, self.pictures, self.epochs, self.captions = model, pictures, epochs, captions
        self.noising, self.weighing, self.autocast = noising, weighing, autocast
        self.look: Look | None = None
        self.schedule = noising.schedule(model.schedule)
        self._facts = facts

    def batch(self, draw: Draw) -> Batch:
        """latents, noise and the noise that is shown (B, z, h, w), timestep and weight (B,), and what captions need.

        mask (B, 1, h, w) where a picture has one; hint (B, 3, H, W) in [0, 1] for a control network.
        """
        chosen = [self.pictures[i] for i in self.epochs.pictures(draw.number)]
        generator = draw.generator
        drawn = [p.drawn(u) for p, u in zip(chosen, torch.rand(len(chosen), generator=generator).tolist(), strict=True)]
        views = [picture.view(number) for picture, number in zip(chosen, drawn, strict=True)]
        texts = [told(picture.example.captions, picture.example.rules, generator) for picture in chosen]
        latents = torch.stack([view["latent"].float() for view in views])
        timestep = torch.randint(len(self.schedule), (len(chosen),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        if self.noising.offset:
            noise = noise + self.noising.offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        batch = {"latents": latents, "noise": noise, "timestep": timestep}
        if self.noising.perturbation:
            batch["shown"] = noise + self.noising.perturbation * torch.randn(noise.shape, generator=generator)
        if any("mask" in view for view in views):
            batch["mask"] = torch.stack(
                [view.get("mask", torch.ones_like(view["latent"][:1])).float() for view in views]
            )
        if self.control is not None:
            batch["hint"] = torch.stack([view["hint"].float() / 255 for view in views])
        regular = [picture.example.regular for picture in chosen]
        batch["weight"] = torch.where(torch.tensor(regular), self.noising.prior, 1.0)
        crops = [picture.views[number].crop for picture, number in zip(chosen, drawn, strict=True)]
        return batch | self.captions.batch(texts, crops)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> loss."""
        return {"loss": self.loss(batch).mean()}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted error of each row, (B,)."""
        denoiser = Denoiser(self.network(batch), self.schedule, self.model.config.prediction, dtype=self.model.dtype)
        error = weighted_error(
            denoiser,
            batch["latents"],
            batch["noise"],
            batch["timestep"],
            self.captions.cond(batch),
            self.weighing,
            shown=batch.get("shown"),
            mask=batch.get("mask"),
        )
        return error * batch["weight"]

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """One of all that is trained or, where the text towers have a rate of their own, these behind all else."""
        ((trained, share),) = super().groups()
        if self.text_share is None:
            return [(trained, share)]
        towers = (tower for tower in self.model.text if isinstance(tower, nn.Module))
        text = {id(parameter) for tower in towers for parameter in tower.parameters()}
        return [
            ([p for p in trained if id(p) not in text], share),
            ([p for p in trained if id(p) in text], self.text_share),
        ]

    def lower_precision(self) -> torch.autocast:
        """The dtype in which the loop runs layers, for who asks the networks outside of it."""
        kind = self.model.device.type
        return torch.autocast(kind, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def network(self, batch: Batch) -> Network:
        """The U-Net, or what it and the control network are together on this batch."""
        if self.control is None:
            return self.model.unet
        return Controlled(self.model.unet, (Hint(self.control, batch["hint"].to(self.model.dtype)),))

    def facts(self) -> dict[str, object]:
        """What was tuned, on which pictures."""
        return self._facts

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """What `look` finds."""
        return {} if self.look is None else self.look(folder, step)
