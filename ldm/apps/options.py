"""The commands as records: each field is a flag, each docstring its help. Light, so that `ldm --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

from ldm.pipeline.request import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    SamplerName,
    ScheduleName,
)

SAMPLER_HELP = f"One of {', '.join(get_args(SamplerName))}."
SCHEDULE_HELP = f"The noise levels: {', '.join(get_args(ScheduleName))}. By default what suits the sampler."


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn."""

    negative: Annotated[str, arg(metavar="TEXT", help_behavior_hint="")] = ""
    """What the picture should not show."""
    size: Annotated[str, arg(metavar="WxH", help_behavior_hint="")] = ""
    """In pixels, multiples of 8, as 128x128. By default the model's own."""
    steps: Annotated[int, arg(metavar="N")] = DEFAULT_STEPS
    """Steps of the sampler."""
    sampler: Annotated[str, arg(metavar="NAME", help=SAMPLER_HELP)] = DEFAULT_SAMPLER
    schedule: Annotated[str, arg(metavar="NAME", help=SCHEDULE_HELP, help_behavior_hint="")] = ""
    guidance: Annotated[float, arg(metavar="X")] = DEFAULT_GUIDANCE
    """How far to lean towards the prompt; 1 is not at all."""
    rescale: Annotated[float, arg(metavar="X")] = 0.0
    """How much of the contrast that guidance adds is taken back, 0 to 1."""
    eta: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Noise added on the way, 0 to 1, by samplers that add some."""
    clip_skip: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """The text layer to look at, counted from the last one, 1."""


@dataclass(frozen=True)
class Model:
    """Which model draws, and where."""

    file: Annotated[Path | None, arg(name="model", metavar="FILE", help_behavior_hint="")] = None
    """Stable Diffusion 1.x, 2.x, SDXL, or ours: a file, a diffusers folder, or a name in --models. By default the model
    that ships."""
    vae: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """An autoencoder to use instead of the model's own."""
    unet: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A U-Net to use instead of the model's own."""
    text_encoder: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A text encoder to use instead of the model's own; SDXL has two, so it may be given twice."""
    lora: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE[:W[:TEXT]]", help_behavior_hint="")] = ()
    """A LoRA or another adapter, with its weight, by default 1, and perhaps another one for the text encoders. May be
    given more than once."""
    embedding: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A textual-inversion embedding, which prompts then use by its name. May be given more than once."""
    models: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="DIR", help_behavior_hint="")] = ()
    """A folder in which files are looked for by name: a flat one, AUTOMATIC1111's or ComfyUI's. May be given more than
    once; by default the folders that LDM_MODELS lists."""
    allow_pickle: bool = False
    """Read .ckpt, .pt and .bin too, with a reader that runs nothing that is in them."""
    device: Annotated[str, arg(metavar="D")] = "auto"
    """cpu, cuda, cuda:1, mps; auto is a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The precision of the networks."""
    prediction: Literal["auto", "eps", "v", "x0", "probe"] = "auto"
    """What the U-Net says: noise, velocity or picture. auto reads it off the file, probe tries an SD 2.x file."""


@dataclass(frozen=True)
class Output:
    """Where pictures go and what is said about them."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="PATH")] = Path()
    """A .png file or a folder. Nothing is ever overwritten: a taken name gets a number."""
    json: bool = False
    """Print a JSON object for each picture."""
    verbose: bool = False
    """Say what the model file was found to be, by which rule, and where the time went."""


@dataclass(frozen=True)
class Prompts:
    """What to draw."""

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT", help_behavior_hint="")]
    """What to draw. Several prompts give a picture each."""
    prompt_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """More prompts, one a line."""
    seed: Annotated[int, arg(metavar="N")] = -1
    """Picture i of a prompt has seed + i; -1 draws one."""
    count: Annotated[int, arg(metavar="N")] = 1
    """Pictures of each prompt."""


@dataclass(frozen=True)
class Controls:
    """Pictures that the result is held to, each by a ControlNet. Weight, start and end are given once for all or once
    for each."""

    control: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A ControlNet: a file, a diffusers folder, or a name in --models. May be given more than once; they add up."""
    control_image: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """The picture that it looks at: edges, a depth map, a pose ... One for each --control, in the same order."""
    control_weight: Annotated[UseAppendAction[tuple[float, ...]], arg(metavar="X", help_behavior_hint="")] = ()
    """How strongly it acts, 0 to 2; by default 1."""
    control_start: Annotated[UseAppendAction[tuple[float, ...]], arg(metavar="X", help_behavior_hint="")] = ()
    """The share of the steps before it begins to act; by default 0."""
    control_end: Annotated[UseAppendAction[tuple[float, ...]], arg(metavar="X", help_behavior_hint="")] = ()
    """The share of the steps after which it acts no more; by default 1."""
    guess: bool = False
    """Have all controls act on the prompt's side alone, so that an empty prompt will do; with --guidance 3 to 5."""
    canny: bool = False
    """Control images are ordinary pictures; show their edges instead (needs OpenCV)."""


@dataclass(frozen=True)
class Generate:
    """Draw pictures from text."""

    prompts: Prompts
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    controls: Controls = field(default_factory=Controls)


@dataclass(frozen=True)
class Img2Img:
    """Redraw a picture towards a text."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture to start from."""
    strength: Annotated[float, arg(metavar="X")] = DEFAULT_STRENGTH
    """The share of the steps that are run: near 0 keeps the picture, 1 forgets most of it."""
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    controls: Controls = field(default_factory=Controls)


@dataclass(frozen=True)
class Info:
    """Say what a model file is, and how to mend it; exit code 2 where something is wrong with it."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A model file, a folder that diffusers wrote, or a folder with many files, which gives a table."""
    json: bool = False
    """Print a JSON object."""
    deep: bool = False
    """Also read all the numbers: the file's hashes, and whether they are finite."""
    allow_pickle: bool = False
    """Read the tensors of .ckpt, .pt and .bin too, with a reader that runs nothing that is in them."""


@dataclass(frozen=True)
class Convert:
    """Write a model in another layout or precision; with parts exchanged, adapters baked in, or merged with another."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A model in any layout that can be read, or a part of one."""
    output: Annotated[Positional[Path], arg(metavar="OUT")]
    """The .safetensors file or the diffusers folder to write. Nothing is ever overwritten."""
    to: Literal["auto", "single", "diffusers"] = "auto"
    """The layout. auto is a single file where OUT ends in .safetensors, else a diffusers folder."""
    dtype: Literal["same", "fp32", "bf16", "fp16"] = "same"
    """The precision of every tensor."""
    ema: Literal["auto", "keep", "use", "drop"] = "auto"
    """The U-Net's averaged weights: keep them beside the others, use them instead, or drop them. auto keeps them unless
    they are in the way of --prune, --merge or --lora."""
    prune: bool = False
    """Leave out what no network needs."""
    prediction: Literal["auto", "eps", "v"] = "auto"
    """What the U-Net says, where the file says nothing or is wrong."""
    vae: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """An autoencoder to put in instead of the model's own, or of the mixture's."""
    unet: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A U-Net to put in, likewise."""
    text_encoder: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A text encoder to put in, likewise; SDXL has two, so it may be given twice."""
    lora: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE[:W]", help_behavior_hint="")] = ()
    """A LoRA or another adapter to bake in, with its weight, by default 1. May be given more than once."""
    merge: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Another model to merge in: (1 - weight) * the first + weight * this."""
    minus: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """With --merge, add a difference instead: the first + weight * (the merged one - this)."""
    weight: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Of --merge; by default 0.5, and 1 with --minus."""
    models: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="DIR", help_behavior_hint="")] = ()
    """A folder in which files are looked for by name. May be given more than once; by default the folders that
    LDM_MODELS lists."""
    allow_pickle: bool = False
    """Read .ckpt, .pt and .bin too, with a reader that runs nothing that is in them."""
    json: bool = False
    """Print a JSON object."""


@dataclass(frozen=True)
class Sheet:
    """Draw a contact sheet: one picture for each prompt, with the first seed and no choosing."""

    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A JSON list of prompts (texts, or objects with a "prompt"). By default 64 captions left out of training."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("sheet.png")
    """The .png file."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """The same for every picture."""
    columns: Annotated[int, arg(metavar="N")] = 8
    """Pictures in a row."""
    labels: bool = False
    """Write each prompt under its picture."""
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Train:
    """Train a model from scratch by a named recipe; started again, it resumes."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name; a wrong one lists them all."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="DIR", help_behavior_hint="")] = None
    """The folder for checkpoints and samples. By default one below runs."""
    pictures: Annotated[Path, arg(metavar="DIR")] = Path("runs/data")
    """The folder of picture and caption pairs."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Stop after so many steps. By default the recipe's."""


Command = Generate | Img2Img | Info | Convert | Sheet | Train
