"""The commands as records: each field is a flag, each docstring its help. Light, so that `ldm --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

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
    """A single .safetensors file: Stable Diffusion 1.x, 2.x, SDXL, or ours. By default the one that ships."""
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
class Generate:
    """Draw pictures from text."""

    prompts: Prompts
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)


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


@dataclass(frozen=True)
class Info:
    """Say what a model file is; exit code 2 where something is wrong with it."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A .safetensors file."""
    json: bool = False
    """Print a JSON object."""
    deep: bool = False
    """Also read all the numbers: the file's hash, and whether they are finite."""


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


Command = Generate | Img2Img | Info | Sheet | Train
