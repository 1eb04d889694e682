"""The flags of `ldm tune`, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class Learning:
    """How long is learned, and how fast."""

    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """By default about a hundred looks at each picture, at most 3000 (a control network: 20000)."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pictures at once, on each GPU. By default 8 for small models, 2 for SD, 1 for SDXL."""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """Batches of a step: as a larger batch, in less memory and more time."""
    rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Of learning. By default what works for most, by method and model."""
    text_rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Of the text towers, with --text. By default the same rate; half of it or less is usual."""
    optimizer: Literal["adamw", "muon", "adamw8bit", "adafactor", "prodigy", "schedulefree"] = "adamw"
    """prodigy finds its rate by itself: give it a rate of 1."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant falls over the last fifth of the steps, cosine all the way."""
    warmup: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Steps over which the rate rises. By default a tenth of them, 100 at most."""
    ema: Annotated[float, arg(metavar="X")] = 0.99
    """The decay of the averaged weights, which are what is written; 0 takes the last ones."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Of the arithmetic; no is float32, auto what the device is fastest in."""
    checkpointing: bool = False
    """Work activations out twice and do not keep them: slower, in less memory."""
    shard: bool = False
    """With method full on several GPUs: each keeps but its part of the weights. Start it by torchrun."""
    workers: Annotated[int, arg(metavar="N")] = 2
    """Threads that read the next batches meanwhile."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of all that is drawn by lot."""
    looks: Annotated[int, arg(metavar="N")] = 10
    """How often it is measured and drawn on the way."""
    save_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Steps between saves, from which a stopped run goes on. By default one at every look."""


@dataclass(frozen=True)
class Adapting:
    """What kind of LoRA is trained."""

    kind: Literal["lora", "locon", "loha", "lokr", "dora"] = "lora"
    """locon adapts the convolutions of residual blocks too."""
    rank: Annotated[int, arg(metavar="N")] = 16
    """How many numbers a layer's change is made of: of its width."""
    alpha: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Changes are multiplied by alpha over rank. By default as much as the rank."""
    dropout: Annotated[float, arg(metavar="X")] = 0.0
    """The chance that a layer's input is left out."""
    conv_rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Of 3x3 convolutions. By default as rank for locon, none for the others."""
    text_rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Of the text towers, with --text. By default as rank."""


@dataclass(frozen=True)
class Naming:
    """The new word of method embedding."""

    word: Annotated[str, arg(metavar="WORD")] = "sks"
    """What prompts will call it. Captions must hold it, or it is put before them."""
    like: Annotated[str, arg(metavar="WORDS")] = ""
    """What it is most like: where its vectors begin. By default in the middle of all words."""
    vectors: Annotated[int, arg(metavar="N")] = 4
    """How many places it takes in a prompt."""


@dataclass(frozen=True)
class Showing:
    """How pictures and captions are varied from one time to the next."""

    flip: bool = False
    """Mirror half of the pictures."""
    random_crop: bool = False
    """Cut pictures in four places, not in the middle alone."""
    repeats: Annotated[int, arg(metavar="N")] = 1
    """How often each picture is shown before all have been."""
    shuffle: bool = False
    """Tags, what stands between commas, in a new order each time."""
    keep: Annotated[int, arg(metavar="N")] = 0
    """So many tags at the beginning stay there."""
    prefix: Annotated[str, arg(metavar="TEXT", help_behavior_hint="")] = ""
    """Before every caption."""
    suffix: Annotated[str, arg(metavar="TEXT", help_behavior_hint="")] = ""
    """Behind every caption."""
    drop: Annotated[float, arg(metavar="X")] = 0.1
    """The chance that a caption is left out, which guidance needs."""
    drop_tags: Annotated[float, arg(metavar="X")] = 0.0
    """The chance that a tag is."""


@dataclass(frozen=True)
class Loss:
    """What errors count, and how pictures are noised."""

    min_snr: Annotated[float, arg(metavar="X")] = 5.0
    """Bounds what low noise levels count (min-SNR); 0 lets all count alike."""
    huber: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Errors count as squares up to this size, and by their size beyond it."""
    offset: Annotated[float, arg(metavar="X")] = 0.0
    """Offset noise: 0.05 to 0.1 for darker and brighter pictures."""
    perturbation: Annotated[float, arg(metavar="X")] = 0.0
    """Input perturbation: 0.1 is usual."""
    zero_terminal_snr: bool = False
    """The last timestep is all noise; for models that predict velocity."""
    prior_weight: Annotated[float, arg(metavar="X")] = 1.0
    """What errors on pictures of the class count (DreamBooth)."""


@dataclass(frozen=True)
class PlanTuning:
    """With --tune: flags of ldm tune that memory depends on."""

    kind: Literal["lora", "locon", "loha", "lokr", "dora"] = "lora"
    """Of LoRA."""
    rank: Annotated[int, arg(metavar="N")] = 16
    """Of a LoRA."""
    whole: bool = False
    """With dreambooth: train all of the U-Net, and no LoRA."""
    text: bool = False
    """Train the text towers too."""
    shuffle: bool = False
    """Captions are varied, so that the text towers are asked about each batch."""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """Batches of a step."""
    optimizer: Literal["adamw", "muon", "adamw8bit", "adafactor", "prodigy", "schedulefree"] = "adamw"
    """What keeps numbers for each trained one."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Of the arithmetic; no is float32, auto what the device is fastest in."""
    checkpointing: bool = False
    """Work activations out twice and do not keep them."""
    workers: Annotated[int, arg(metavar="N")] = 2
    """Threads that read the next batches meanwhile."""
