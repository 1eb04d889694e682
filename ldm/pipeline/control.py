"""ControlNets while a picture is drawn: what each one looks at, when it acts, and their sum as one network.

Zhang et al. 2023. Shapes: B batch, C channels, h and w latent height and width, H and W picture height and width,
K control networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet
from ldm.pipeline.images import fit, read_picture, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import Control, GenerateRequest
from ldm.types import Conditioning, Network

CANNY_THRESHOLDS = (100, 200)


@dataclass(frozen=True, eq=False)
class Hint:
    """A control network and what it is shown.

    picture: (1, 3, H, W) in [0, 1], of the network's device and dtype
    weight:  of its residuals
    low, high: it acts on rows with low < timestep <= high
    guess:   residuals shrink towards the finer levels, to a tenth ("guess mode")
    """

    network: ControlNet
    picture: Tensor
    weight: float = 1.0
    low: float = -torch.inf
    high: float = torch.inf
    guess: bool = False

    @property
    def on_prompt_alone(self) -> bool:
        """Whether it leaves the unconditional side of guidance alone: in guess mode, and where it says but a style."""
        return self.guess or self.network.config.pooled

    def residuals(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> list[Tensor]:
        """x (B, C, h, w), timestep (B,), cond -> `Conditioning.control`, weighted."""
        residuals = self.network(x, timestep, cond, self.picture)
        fades = self.guess and not self.network.config.pooled
        scales = torch.logspace(-1, 0, len(residuals)).tolist() if fades else [1.0] * len(residuals)
        return [residual * (self.weight * scale) for residual, scale in zip(residuals, scales, strict=True)]


@dataclass(frozen=True, eq=False)
class Controlled:
    """A U-Net that is told what its control networks say; a `Network` like the U-Net itself.

    `Conditioning.controlled`, (B, K), says which of them act on a row; None: all.
    """

    unet: Network
    hints: tuple[Hint, ...]

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), timestep (B,), cond -> (B, C', h, w)."""
        asked = cond.controlled
        cond = cond.with_(controlled=None)
        total: list[Tensor] = list(cond.control)
        for index, hint in enumerate(self.hints):
            rows = (timestep > hint.low) & (timestep <= hint.high)
            rows = rows if asked is None else rows & asked[:, index]
            if (acting := int(rows.sum())) == 0:
                continue
            if acting == len(rows):
                residuals = hint.residuals(x, timestep, cond)
            else:
                residuals = _on_rows(hint, rows, x, timestep, cond)
            total = [a + b for a, b in zip(total, residuals, strict=True)] if total else residuals
        return self.unet(x, timestep, cond.with_(control=tuple(total)))


def _on_rows(hint: Hint, rows: Tensor, x: Tensor, timestep: Tensor, cond: Conditioning) -> list[Tensor]:
    """The hint's residuals on these rows, (B,) bool, of the batch; zero on the others."""
    some = hint.residuals(x[rows], timestep[rows], cond.select(rows))
    whole = [residual.new_zeros(len(x), *residual.shape[1:]) for residual in some]
    for target, residual in zip(whole, some, strict=True):
        target[rows] = residual
    return whole


def prepare_hints(model: LatentDiffusion, request: GenerateRequest, sigmas: Tensor) -> tuple[Hint, ...]:
    """The controls of a resolved request that runs over these levels, (n + 1,) falling; the idle ones are left out.

    Raises LdmError where the model was not given the network that a control names.
    """
    assert request.width is not None and request.height is not None
    _, height, width = model.latent_shape(request.width, request.height)
    hints = []
    for control in request.controls:
        network = named(model, control.network)
        interval = timesteps_between(model.schedule, sigmas, control.start, control.end)
        if interval is None or control.weight == 0:
            continue
        scale = network.config.downsampling
        picture = hint_picture(control, width * scale, height * scale).to(model.device, model.dtype)
        hints.append(Hint(network, picture, control.weight, *interval, control.guess))
    return tuple(hints)


def named(model: LatentDiffusion, name: str) -> ControlNet:
    """The control network of this name. Raises LdmError that lists those that the model was given."""
    if name in model.controls:
        return model.controls[name]
    given = ", ".join(model.controls) or "none"
    raise LdmError(f"control: network: found {name!r}, expected one that the model was given: {given}")


def acted_on(cond: Conditioning, hints: tuple[Hint, ...], *, wanted: bool) -> Conditioning:
    """`cond` of batch 1 with word of which hints act on it; wanted: False for the unconditional side of guidance."""
    acts = [wanted or not hint.on_prompt_alone for hint in hints]
    return cond.with_(controlled=torch.tensor([acts], device=hints[0].picture.device)) if hints else cond


def timesteps_between(schedule: NoiseSchedule, sigmas: Tensor, start: float, end: float) -> tuple[float, float] | None:
    """The (low, high) timesteps of the whole steps between these shares of all steps: low < timestep <= high.

    A sampler that also calls its network at the end of a step, or within it, is answered there as the next or the same
    step would be. Each bound stands a hundredth of a step away from the timestep that it divides from, for rounding;
    None: there is no such step.
    """
    steps = steps_between(len(sigmas) - 1, start, end)
    if not steps:
        return None
    timesteps = schedule.timestep(sigmas).tolist()

    def just_above(index: int) -> float:
        return timesteps[index] + 0.01 * (timesteps[index - 1] - timesteps[index])

    high = torch.inf if steps[0] == 0 else just_above(steps[0])
    low = -torch.inf if steps[-1] == len(sigmas) - 2 else just_above(steps[-1] + 1)
    return low, high


def steps_between(count: int, start: float, end: float) -> list[int]:
    """The steps that lie wholly between two shares of `count` steps."""
    return [step for step in range(count) if step / count >= start and (step + 1) / count <= end]


def hint_picture(control: Control, width: int, height: int) -> Tensor:
    """What the network is shown, (1, 3, height, width) in [0, 1]: a picture that fits, or its edges."""
    image = fit(read_picture(control.image), width, height)
    hint = (to_tensor(image)[None] + 1) / 2
    return edges(hint) if control.canny else hint


def edges(picture: Tensor) -> Tensor:
    """(1, 3, H, W) in [0, 1] -> white lines on black, the same shape (Canny 1986, by OpenCV)."""
    import cv2  # pyright: ignore[reportMissingImports]

    grey = cv2.cvtColor((picture[0] * 255).round().byte().permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    lines = torch.from_numpy(cv2.Canny(grey, *CANNY_THRESHOLDS))
    return (lines.float() / 255).expand(1, 3, -1, -1)
