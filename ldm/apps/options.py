"""The commands as records: each field is a flag, each docstring its help. Light, so that `ldm --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ldm.apps.flags import Details, Model, Output, Prompts, Sampling, SecondPass
from ldm.pipeline.request import DEFAULT_STRENGTH, MaskFill

AXIS_HELP = (
    "What changes from column to column: steps=6,12,24  seed=1-5  'guidance=1-9 [3]'  'strength=0.2-0.8 (+0.2)'"
    "  sampler=euler,heun  size=64x64,128x128  highres-strength=0.3,0.6 ... In prompt=cat,dog the others take the place"
    " of the first; model=FILE,FILE are models; lora=0,0.5,1 weighs the one --lora."
)


@dataclass(frozen=True)
class Generate:
    """Draw pictures from text."""

    prompts: Prompts
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    second_pass: SecondPass = field(default_factory=SecondPass)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Img2Img:
    """Redraw a picture towards a text."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture to start from."""
    strength: Annotated[float, arg(metavar="X")] = DEFAULT_STRENGTH
    """The share of the steps that are run: near 0 keeps the picture, 1 forgets most of it."""
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Inpaint:
    """Redraw a part of a picture, and keep every pixel of the rest."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture."""
    mask: Annotated[Path, arg(metavar="FILE")]
    """A picture of its size: white is redrawn, black is kept."""
    strength: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """The share of the steps that are run; by default 0.75, or 1 where --mask-fill is not original."""
    mask_blur: Annotated[int, arg(metavar="PIXELS")] = 4
    """Over which the redrawn fades into the kept, inwards."""
    mask_fill: MaskFill = "original"
    """What the redrawn part starts from: the picture, noise alone, or nothing."""
    mask_invert: bool = False
    """Redraw black and keep white."""
    mask_soft: bool = False
    """Take grey as a share of --strength; else from half grey on a pixel is redrawn."""
    only_masked: bool = False
    """Draw what surrounds the mask alone, at the model's size, and scale the result back."""
    mask_padding: Annotated[int, arg(metavar="PIXELS")] = 32
    """Of surroundings that are then shown around the mask."""
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Outpaint:
    """Continue a picture beyond its edges."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture."""
    all: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pixels to add on every side; those below go before it."""
    left: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pixels to add on the left."""
    top: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pixels to add at the top."""
    right: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pixels to add on the right."""
    bottom: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pixels to add at the bottom."""
    strength: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """The share of the steps that are run; by default 1."""
    mask_blur: Annotated[int, arg(metavar="PIXELS")] = 4
    """Over which the new fades into the old, outwards."""
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Upscale:
    """Draw a picture four times as large, with a model made for it (x4-upscaler)."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture; a prompt that says what it shows helps."""
    noise: Annotated[int, arg(metavar="N")] = 20
    """How much noise the model sees over it, 0 to 350: more frees it to invent."""
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Variations:
    """Draw pictures like another, with a model made for it (SD 2.1 unCLIP); a prompt may be left out."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture to vary."""
    noise: Annotated[int, arg(metavar="N")] = 0
    """How freely, 0 to 999."""
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Depth2Img:
    """Redraw a picture and keep its depth, with a model made for it (SD 2 depth)."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture to start from."""
    depth: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Its depth map, near is white."""
    depth_model: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Or a depth-estimation model in the layout of transformers, to find it."""
    strength: Annotated[float, arg(metavar="X")] = DEFAULT_STRENGTH
    """The share of the steps that are run: near 0 keeps the picture, 1 forgets most of it."""
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    model: Model = field(default_factory=Model)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Grid:
    """Draw one prompt over the values of one field, or of two: a picture with labelled axes."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What to draw."""
    x: Annotated[str, arg(metavar="FIELD=V1,V2,...", help=AXIS_HELP)]
    y: Annotated[str, arg(metavar="FIELD=V1,V2,...", help_behavior_hint="")] = ""
    """What changes from row to row."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("grid.png")
    """The .png file. Nothing is ever overwritten: a taken name gets a number."""
    cells: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A folder for each picture on its own, too, with all that made it."""
    seed: Annotated[int, arg(metavar="N")] = -1
    """The same for every picture; -1 draws one."""
    image: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture to start from."""
    strength: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """The share of the steps that are run over it; by default 0.75."""
    sampling: Sampling = field(default_factory=Sampling)
    model: Model = field(default_factory=Model)
    second_pass: SecondPass = field(default_factory=SecondPass)
    details: Annotated[Details, arg(name="")] = field(default_factory=Details)


@dataclass(frozen=True)
class Show:
    """Say how a picture was made, by what its file tells: ours, AUTOMATIC1111's text, or ComfyUI's graph."""

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """A PNG, JPEG or WebP picture."""
    json: bool = False
    """Print a JSON object."""


@dataclass(frozen=True)
class Redo:
    """Make a picture again from what its file tells, and say how far the two differ.

    Files are never taken from there: a model other than the one that ships, adapters and pictures have to be given.
    """

    original: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """A PNG, JPEG or WebP picture by ldm, AUTOMATIC1111 or ComfyUI."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="PATH")] = Path()
    """A .png, .jpg or .webp file, or a folder. Nothing is ever overwritten: a taken name gets a number."""
    image: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The picture that it began with."""
    mask: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Its mask."""
    depth: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Its depth map."""
    vary: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The picture that it varied."""
    control: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A ControlNet that held it. Repeatable."""
    control_image: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """The picture that a ControlNet looked at; one for each, in their order."""
    refiner: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The model that drew its last steps."""
    json: bool = False
    """Print a JSON object for each picture."""
    model: Model = field(default_factory=Model)


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


TaskCommand = Generate | Img2Img | Inpaint | Outpaint | Upscale | Variations | Depth2Img
Command = TaskCommand | Grid | Show | Redo | Info | Convert | Sheet | Train
