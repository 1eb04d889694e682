"""Fixed questions about a run: the same pictures, noise and timesteps at every look, so that losses can be compared.

Each picture is asked about twice, told its own caption and told another picture's: a network that has learned what the
captions say does better with the right one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.training.tune.objective import TuneObjective
from ldm.weights.io import Header, read_header, read_tensors
from ldm.weights.save import write_tensors

log = logging.getLogger(__name__)
FACTS = "ldm.facts"
"""The metadata entry with what `mark_of` says of the run that was measured."""

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of all timesteps: where the network is asked."""


@dataclass(frozen=True)
class Question:
    """Pictures by number, and a caption for each: their own, and one of another picture."""

    pictures: tuple[int, ...]
    own: tuple[str, ...]
    swapped: tuple[str, ...]


def question(objective: TuneObjective, pictures: Sequence[int]) -> Question:
    """What is asked about these pictures: the first caption of each, and that of the next of them that says another.

    Of another of these alone: what is trained on would know its own captions by heart, whether they fit or not.
    """
    own = [objective.pictures[i].caption for i in pictures]
    swapped = [next((text for text in (*own[i + 1 :], *own[:i]) if text != own[i]), own[i]) for i in range(len(own))]
    return Question(tuple(pictures), tuple(own), tuple(swapped))


def timesteps(objective: TuneObjective) -> Tensor:
    """The timesteps that are asked about, (T,) int64."""
    return torch.tensor([round(share * (len(objective.schedule) - 1)) for share in SHARES])


@torch.no_grad()
def losses(objective: TuneObjective, pictures: Sequence[int], captions: Sequence[str], draws: int = 1) -> Tensor:
    """The loss of each picture told this caption at each timestep, the mean of so many draws of noise, (N, T)."""
    rows = [_losses(objective, i, text, draws) for i, text in zip(pictures, captions, strict=True)]
    return torch.stack(rows) if rows else torch.zeros(0, len(SHARES))


def _losses(objective: TuneObjective, number: int, caption: str, draws: int) -> Tensor:
    """Of one picture, (T,): all timesteps and draws, in batches as large as training has them, which fit in memory."""
    picture, steps = objective.pictures[number], timesteps(objective).repeat_interleave(draws)
    view = picture.view(0)
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(len(steps), *view["latent"].shape, generator=generator)
    parts = []
    for some, shown in zip(steps.split(objective.epochs.batch), noise.split(objective.epochs.batch), strict=True):
        rows = len(some)
        held = {name: view[name].float().expand(rows, *view[name].shape) for name in ("mask",) if name in view}
        if objective.control is not None:
            held["hint"] = (view["hint"].float() / 255).expand(rows, *view["hint"].shape)
        batch = {
            "latents": view["latent"].float().expand(shown.shape),
            "noise": shown,
            "timestep": some,
            "weight": torch.ones(rows),
            **held,
            **objective.captions.batch([caption] * rows, [picture.views[0].crop] * rows),
        }
        batch = {name: tensor.to(objective.model.device) for name, tensor in batch.items()}
        with objective.lower_precision():
            parts.append(objective.loss(batch).float().cpu())
    return torch.cat(parts).view(len(SHARES), draws).mean(dim=1)


@dataclass(frozen=True, eq=False)
class Measured:
    """Losses at one step, (N, T) each: of pictures that are trained on and of those held out, told their own captions
    and told others'."""

    step: int
    train: Tensor
    train_swapped: Tensor
    held_out: Tensor
    held_out_swapped: Tensor

    def save(self, folder: Path, mark: str) -> None:
        """Write it as FOLDER/measured/step-N.safetensors, with the mark of the run."""
        path = folder / "measured" / f"step-{self.step:08d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = "train", "train_swapped", "held_out", "held_out_swapped"
        write_tensors(path, {name: getattr(self, name) for name in names}, {FACTS: mark})


def mark_of(objective: TuneObjective) -> str:
    """A digest of the run's facts: what was measured of another run cannot be held against this one's."""
    return hashlib.sha256(json.dumps(objective.facts(), sort_keys=True).encode()).hexdigest()[:16]


def measured_of_others(folder: Path, mark: str) -> list[Path]:
    """Files with another mark than this, by step; one without any, as all once were, is taken for the run's."""
    return [path for path, header in _headers(folder) if header.metadata.get(FACTS, mark) != mark]


def load_measured(folder: Path, mark: str, until: int) -> list[Measured]:
    """All that was measured of the run of this mark up to a step, by step; without what other settings left there.

    A file that is damaged is passed over, with a warning: the verdict does without that step.
    """
    found = []
    for path, header in _headers(folder):
        step = int(path.stem.removeprefix("step-"))
        if step > until or header.metadata.get(FACTS, mark) != mark:
            continue
        try:
            tensors = {name: tensor.clone() for name, tensor in read_tensors(header, header.tensors)}
            found.append(Measured(step, **tensors))
        except (LdmError, TypeError):
            log.warning("%s: is not what was measured there, and is passed over", path)
    return found


def _headers(folder: Path) -> Iterator[tuple[Path, Header]]:
    """What was measured, by step; a warning for each file that cannot be read."""
    for path in sorted((folder / "measured").glob("step-*.safetensors")):
        try:
            yield path, read_header(path)
        except LdmError as error:
            log.warning("%s; it is passed over", error)
