"""What a run of `ldm tune` is told, as one record, and what is chosen where it is told nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm.data.buckets import Buckets, usual_buckets
from ldm.data.example import Defaults
from ldm.diffusion.loss import Weighing
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig
from ldm.training.adapter_options import AdapterOptions
from ldm.training.tune.objective import Noising

Method = Literal["lora", "full", "dreambooth", "embedding", "controlnet"]

FEW = 20
"""With fewer pictures one alone is held out."""


@dataclass(frozen=True)
class Tuning:
    """What is tuned, on what, and how.

    pictures:  see `ldm.data.picture_set`; output: a folder for all that the run writes
    adapter:   for "lora", and for "dreambooth" unless `whole`, which trains the U-Net itself
    text:      whether the text towers are trained too (lora, full, dreambooth); text_rate: of them; None: the run's
    word, like, vectors: of "embedding": its name in prompts, the words it starts from, how many places it takes
    buckets:   the sizes that pictures are cut to; None: those that suit the model's
    held_out:  the share of the pictures that is only measured on; None: a fifth, or one of a few
    min_snr, huber: see `weighing`
    canny:     the hints of a control network are edges of the pictures themselves
    samples:   prompts to draw on the way; none: captions of held-out pictures
    layout:    of the written adapter
    checkpointing: activations are worked out twice and not kept: slower, in less memory
    shard:     each of the processes that train together keeps but its part of what is trained; for "full", or `whole`
    """

    pictures: Path
    output: Path
    method: Method = "lora"
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    whole: bool = False
    text: bool = False
    text_rate: float | None = None
    word: str = "sks"
    like: str = ""
    vectors: int = 4
    defaults: Defaults = field(default_factory=Defaults)
    buckets: Buckets | None = None
    held_out: float | None = None
    canny: bool = False
    noising: Noising = field(default_factory=Noising)
    min_snr: float | None = 5.0
    huber: float | None = None
    samples: tuple[str, ...] = ()
    seed: int = 0
    layout: Literal["kohya", "diffusers"] = "kohya"
    checkpointing: bool = False
    shard: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        noising = self.noising
        for name, number in (
            ("offset", noising.offset), ("perturbation", noising.perturbation), ("prior weight", noising.prior),
        ):  # fmt: skip
            if not 0 <= number < math.inf:
                raise LdmError(f"{name}: found {number}, expected a finite number of 0 or more")
        for name, number in (("min-snr", self.min_snr), ("huber", self.huber)):
            if number is not None and not 0 < number < math.inf:
                raise LdmError(f"{name}: found {number}, expected a finite number above 0")
        if self.text_rate is not None and not (self.text and 0 <= self.text_rate < math.inf):
            raise LdmError(
                f"text-rate: found {self.text_rate}, expected 0 or more, and that the text towers are trained"
            )
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise LdmError(f"held out: found {self.held_out}, expected a share of at least 0 and below 1")
        if self.text and self.method in ("embedding", "controlnet"):
            raise LdmError(f"text: the text towers are not trained by {self.method}; leave it away")
        if self.whole and self.method != "dreambooth":
            raise LdmError(f"whole: found with {self.method}, expected dreambooth; method full trains all of it")
        if self.shard and not self.all_of_it:
            raise LdmError(f"shard: found with {self.method}, which trains little; it is for method full")
        if self.by_adapter and self.layout == "diffusers" and self.adapter.kind in ("loha", "lokr"):
            raise LdmError(
                f"layout: diffusers has no form for {self.adapter.kind}; use kohya's, or lora, locon or dora"
            )
        if self.by_adapter and self.adapter.text_rank is not None and not self.text:
            raise LdmError("text-rank: found without training the text towers; ask for that too, or leave it away")
        if self.method == "embedding" and not _names_a_file(self.word):
            raise LdmError(f"word: found {self.word[:80]!r}, expected one that can be the name of a file")

    @property
    def by_adapter(self) -> bool:
        """Whether a LoRA or one of its kin is what is trained."""
        return self.method == "lora" or (self.method == "dreambooth" and not self.whole)

    @property
    def all_of_it(self) -> bool:
        """Whether all of the U-Net is what is trained, and maybe of the text towers."""
        return self.method == "full" or (self.method == "dreambooth" and self.whole)


def _names_a_file(word: str) -> bool:
    """Whether a word can be, with a dozen characters behind it, and is not hidden."""
    fits = 0 < len(word.encode(errors="replace")) <= 200 and word.isprintable()
    return fits and not word.startswith(".") and not {"/", "\\"} & set(word)


def check_base(tuning: Tuning, config: SystemConfig) -> None:
    """Raise LdmError where this model cannot be tuned so."""
    if tuning.noising.zero_terminal_snr and config.prediction == "eps":
        raise LdmError(
            "zero-terminal-snr: this model predicts the noise, of which a timestep that is all noise tells nothing; "
            "leave it away, or take a model that predicts velocity"
        )
    if tuning.text and not config.text:
        raise LdmError("text: this model has no text towers to train; leave it away")


def weighing(tuning: Tuning, config: SystemConfig) -> Weighing:
    """What errors count. min_snr bounds what low noise levels do (Hang et al. 2023), None: all count alike.

    A network that predicts no noise is asked about the highest levels too, where the caption alone decides.
    """
    return Weighing(tuning.min_snr, 0.0 if config.prediction == "eps" else 1.0, tuning.huber)


def buckets_for(tuning: Tuning, config: SystemConfig) -> Buckets:
    """The sizes that pictures are cut to."""
    return tuning.buckets or usual_buckets(config.size)


def usual_batch(config: SystemConfig) -> int:
    """Pictures of a step that fit where most train."""
    return {"ldm": 8, "sdxl": 1, "sdxl-refiner": 1}.get(config.family, 2)


def usual_rate(tuning: Tuning, config: SystemConfig) -> float:
    """What works for most: of AdamW, by what is trained. A small model of ours takes, and needs, larger steps."""
    small = config.family == "ldm"
    if tuning.by_adapter:
        return 1e-3 if small else 1e-4
    return {"embedding": 5e-3, "controlnet": 1e-4 if small else 1e-5}.get(tuning.method, 1e-4 if small else 1e-5)


def text_share(tuning: Tuning, rate: float) -> float | None:
    """What the rate of the text towers is to the run's; None where they have no rate of their own."""
    if tuning.text_rate is None:
        return None
    if tuning.text_rate and not rate:
        raise LdmError(f"rate: found 0 beside a text-rate of {tuning.text_rate}, expected above 0")
    return tuning.text_rate / rate if rate else 1.0


def usual_steps(tuning: Tuning, pictures: int, batch: int) -> int:
    """About a hundred looks at each picture, within bounds."""
    least, most = {"embedding": (600, 3000), "controlnet": (2000, 20000)}.get(tuning.method, (400, 3000))
    return max(least, min(most, round(100 * pictures / batch)))


def held_out_numbers(count: int, share: float | None, seed: int) -> tuple[int, ...]:
    """Which of so many pictures are only measured on: a fifth, 32 at most, one where they are few; none of one."""
    import torch

    wanted = (1 if count < FEW else min(32, count // 5)) if share is None else round(share * count)
    wanted = min(wanted, count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(sorted(order[:wanted]))
