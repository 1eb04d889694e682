"""The commands as records: each field is a flag, each docstring its help. Light, so that `ldm --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ldm.apps.flags.shared import (
    Asking,
    ClipModel,
    Decoding,
    Details,
    Model,
    Output,
    PictureFolder,
    Prompts,
    Sampling,
    SecondPass,
)
from ldm.apps.flags.tune import Adapting, Learning, Loss, Naming, PlanTuning, Showing
from ldm.pipeline.request import DEFAULT_GUIDANCE, DEFAULT_STRENGTH, MaskFill

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
    """Draw a picture larger, with a model made for it: four times (x4-upscaler), or twice (ldm-upsampler)."""

    prompts: Prompts
    image: Annotated[Path, arg(metavar="FILE")]
    """The PNG, JPEG or WebP picture; a prompt that says what it shows helps the x4-upscaler."""
    noise: Annotated[int, arg(metavar="N")] = 20
    """How much noise the model sees over it, 0 to 350, to 100 for ours: more frees it to invent."""
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
    inverted: bool = False
    """Begin in the picture's own noise, by DDIM: --eta 0 --guidance 1 gives it back, and --eta up to 1 varies it."""
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
    prior: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The prior that was asked what to draw. By default the one that ships, where it was that one."""
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


@dataclass(frozen=True)
class Check:
    """Look at pictures before a model is tuned on them: which are broken, double, without a caption, and how each is
    cut; exit code 2 where none can be used."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Pictures with captions beside them or in a table, kohya's folders or .toml, .tar shards or .parquet files."""
    json: bool = False
    """Print a JSON object."""
    page: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A .html or .png file to show all of them on, with what is cut off. A taken name gets a number."""
    pictures: PictureFolder = field(default_factory=PictureFolder)


@dataclass(frozen=True)
class Tune:
    """Tune a model on a folder of your own pictures, by night a LoRA; started again, it resumes. accelerate launch -m
    ldm tune ... trains on many GPUs."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Pictures with captions beside them or in a table, kohya's folders or .toml, .tar shards or .parquet files."""
    base: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The model to tune, SD 1.x, 2.x, SDXL or ours. By default the one that ships."""
    method: Literal["lora", "full", "dreambooth", "embedding", "controlnet"] = "lora"
    """What is trained. dreambooth is a LoRA of one subject, beside pictures of its class."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="DIR", help_behavior_hint="")] = None
    """The folder for the result, samples, report and saves. By default FOLDER-METHOD, here."""
    plan: bool = False
    """Say what the run would take, and stop."""
    sample: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PROMPT", help_behavior_hint="")] = ()
    """A prompt to draw on the way. Repeatable; by default captions of held-out pictures."""
    held_out: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """The share of the pictures that is only measured on. By default a fifth, of less than 20 one picture."""
    text: bool = False
    """Train the text towers too."""
    whole: bool = False
    """With dreambooth: train all of the U-Net, and no LoRA."""
    canny: bool = False
    """With controlnet: hints are the pictures' own edges."""
    layout: Literal["kohya", "diffusers"] = "kohya"
    """Of the file that a LoRA or an embedding is written to."""
    cache: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Where latents and text states are kept. By default in the output folder."""
    device: Annotated[str, arg(metavar="D")] = "auto"
    """cpu, cuda, cuda:1, mps; auto is a CUDA GPU if there is one, else the CPU."""
    allow_pickle: bool = False
    """Read .ckpt, .pt and .bin too, with a reader that runs nothing that is in them."""
    json: bool = False
    """Print a JSON object at the end."""
    learning: Learning = field(default_factory=Learning)
    adapting: Adapting = field(default_factory=Adapting)
    naming: Naming = field(default_factory=Naming)
    showing: Showing = field(default_factory=Showing)
    loss: Loss = field(default_factory=Loss)
    pictures: PictureFolder = field(default_factory=PictureFolder)


@dataclass(frozen=True)
class TrainClip:
    """Train a CLIP on pictures with captions; started again, it resumes. accelerate launch -m ldm train-clip ...
    trains on many GPUs."""

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """A folder of pictures with KEY.txt beside them, WebDataset shards (a .tar or a folder of them), or a packed
    set."""
    config: Annotated[str, arg(metavar="NAME|FILE")]
    """A config that open_clip knows (ViT-B-32 ...), a JSON file or folder with one, or small."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="DIR")] = Path("runs/clip")
    """The folder for checkpoints and, at the end, the model, as open_clip's local-dir: takes it."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's contrast over the batch, or SigLIP's over pairs."""
    batch: Annotated[int, arg(metavar="N")] = 256
    """Pictures of a step, on each GPU; all are contrasted with all, those of other GPUs too."""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """Compute the batch in so many parts: less memory, more time, the same gradients."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Mixed precision; no is float32, auto what the device is fastest in."""
    steps: Annotated[int, arg(metavar="N")] = 10_000
    """How long."""
    rate: Annotated[float, arg(metavar="X")] = 5e-4
    """Of learning, at its height; it falls as a cosine."""
    warmup: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Steps over which the rate rises; by default a twentieth."""
    weight_decay: Annotated[float, arg(metavar="X")] = 0.1
    """AdamW's; gains and biases are spared."""
    ema: Annotated[float, arg(metavar="X")] = 0.999
    """The decay of the averaged weights, which are what is written; 0 takes the last ones."""
    text_model: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A Hugging Face text model and its tokenizer, for configs that would download them (multilingual ones, SigLIP)."""
    labels: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A JSON object of pictures' names and labels: those held out are classified, zero-shot, while it trains."""
    held_out: Annotated[float, arg(metavar="X")] = 0.05
    """The share of the pictures that are not trained on, but searched while it trains."""
    mirror: bool = False
    """Mirror half of the pictures whose English captions speak of no side."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of all that is drawn by lot."""
    save_every: Annotated[int, arg(metavar="N")] = 500
    """Steps; a run that is stopped saves, too."""
    evaluate_every: Annotated[int, arg(metavar="N")] = 500
    """Steps."""
    log_every: Annotated[int, arg(metavar="N")] = 50
    """Steps."""


@dataclass(frozen=True)
class Bench:
    """Time this machine: a step, decoding, text, a picture, loading, peak memory; and diffusers on the same weights in
    turns, where it is installed."""

    preset: Literal["sd15", "sd21", "sdxl"] | None = None
    """Random weights in this layout, which cost as much as trained ones."""
    file: Annotated[Path | None, arg(name="model", metavar="FILE", help_behavior_hint="")] = None
    """Or a model: a file or a diffusers folder. By default the one that ships."""
    parts: Annotated[str, arg(metavar="A,B,...")] = "step,decode,text,picture,load,memory"
    """What to measure. load and memory are of processes of their own. tune, steps of a LoRA, must be asked for."""
    size: Annotated[str, arg(metavar="N,...", help_behavior_hint="")] = ""
    """Sides in pixels. By default the model's own."""
    runs: Annotated[int, arg(metavar="N")] = 5
    """Timed runs, of which the median counts, after one to warm up."""
    steps: Annotated[int, arg(metavar="N")] = 4
    """Of whole pictures."""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Of both sides. By default torch's own choice."""
    alone: bool = False
    """Leave diffusers out."""
    compile: bool = False
    """Time steps and pictures of ours with compiled blocks, see ldm generate --compile."""
    device: Annotated[str, arg(metavar="D")] = "auto"
    """cpu, cuda, cuda:1, mps; auto is a CUDA GPU if there is one, else the CPU."""
    save: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A folder with a file for each kind of machine, to which the results are added."""
    json: bool = False
    """Print a JSON object."""


@dataclass(frozen=True)
class Plan:
    """Say what drawing or tuning will take of memory, phase by phase, and what takes less; nothing is loaded for it."""

    tune: Literal["lora", "full", "dreambooth", "embedding", "controlnet"] | None = None
    """Plan for tuning by this method, and not for drawing."""
    preset: Literal["sd15", "sd21", "sdxl"] | None = None
    """A file of this layout in float16."""
    file: Annotated[Path | None, arg(name="model", metavar="FILE", help_behavior_hint="")] = None
    """Or a model: a file or a diffusers folder. By default the one that ships."""
    size: Annotated[str, arg(metavar="WxH", help_behavior_hint="")] = ""
    """In pixels, multiples of 8. By default the model's own."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Pictures asked for, by default one, of which as many are drawn at once as ldm generate would. With --tune those
    of a step, by default as ldm tune has them."""
    guidance: Annotated[float, arg(metavar="X")] = DEFAULT_GUIDANCE
    """1 asks the network once a step and not twice."""
    image: bool = False
    """Begin with a picture."""
    lora: bool = False
    """With adapters, which may change every matrix: those are held as they were, too."""
    controls: Annotated[int, arg(metavar="N")] = 0
    """How many ControlNets look on."""
    vae_tile: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Decode in tiles of this side."""
    offload: Literal["none", "parts", "blocks"] = "none"
    """What waits in the machine's memory while a GPU does not use it: whole networks, or all but a block."""
    store: Literal["full", "int8"] = "full"
    """How the U-Net keeps its weights: as they are computed with, or in bytes."""
    budget: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="")] = None
    """What it may take, as 6GB. By default what is free."""
    device: Annotated[str, arg(metavar="D")] = "auto"
    """cpu, cuda (also where this machine has none), cuda:1, mps; auto is a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The precision of the networks."""
    allow_pickle: bool = False
    """Read .ckpt, .pt and .bin too, with a reader that runs nothing that is in them."""
    json: bool = False
    """Print a JSON object."""
    tuning: PlanTuning = field(default_factory=PlanTuning)


@dataclass(frozen=True)
class Index:
    """Embed the pictures of a folder for ldm search. Started again, it resumes, and follows what changed.

    accelerate launch -m ldm index FOLDER shares the work among processes and GPUs.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """PNG, JPEG and WebP pictures, also in folders below; hidden ones are passed over."""
    index: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Where the index lies. By default FOLDER/.ldm-index."""
    rebuild: bool = False
    """Forget the index that is there, and make it anew."""
    shard: Annotated[str, arg(metavar="I/N", help_behavior_hint="")] = ""
    """Embed the I-th of N shares only, for machines that share no more than the folder; a run without it then joins
    them."""
    json: bool = False
    """Print a JSON object."""
    clip: ClipModel = field(default_factory=ClipModel)


@dataclass(frozen=True)
class Search:
    """Find the pictures that are nearest to words, to pictures, or to a sum of them less other words."""

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="WORDS", help_behavior_hint="")] = ()
    """What to look for; several texts are added."""
    index: Annotated[Path, arg(metavar="DIR")] = Path()
    """What ldm index made, or the folder of pictures that it lies in."""
    image: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A picture to look for. Repeatable."""
    plus: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="WORDS", help_behavior_hint="")] = ()
    """Words to add. Repeatable."""
    minus: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="WORDS", help_behavior_hint="")] = ()
    """Words to take away. Repeatable."""
    top: Annotated[int, arg(metavar="N")] = 10
    """How many to find."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE", help_behavior_hint="")] = None
    """A .png file for a sheet of what was found. Nothing is ever overwritten: a taken name gets a number."""
    json: bool = False
    """Print a JSON object."""
    clip: ClipModel = field(default_factory=ClipModel)


@dataclass(frozen=True)
class Classify:
    """Say which of some labels each picture shows, by CLIP, which was trained on none of them."""

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint="")]
    """PNG, JPEG or WebP pictures."""
    labels: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="A,B,...|FILE")]
    """The labels, with commas between them, or a file with one a line. Repeatable."""
    template: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help_behavior_hint="")] = ()
    """A sentence with {} where the label goes, as "a picture of {}". Repeatable: the mean counts. By default six."""
    top: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Labels to show of each picture; by default 5, and all with --json."""
    json: bool = False
    """Print a JSON object for each picture."""
    model: ClipModel = field(default_factory=ClipModel)


@dataclass(frozen=True)
class Score:
    """Say how well each picture fits each text: their cosines in CLIP's space, as a matrix."""

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint="")]
    """PNG, JPEG or WebP pictures."""
    texts: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="A,B,...|FILE")]
    """The texts, with commas between them, or a file with one a line. Repeatable."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE", help_behavior_hint="")] = None
    """A .png file for the matrix as a heat map. Nothing is ever overwritten: a taken name gets a number."""
    json: bool = False
    """Print a JSON object, with the logits too."""
    model: ClipModel = field(default_factory=ClipModel)


@dataclass(frozen=True)
class Interpolate:
    """Draw the pictures between two: a sheet. Needs a model that is told pictures (our decoder, SD 2.1 unCLIP)."""

    first: Annotated[Positional[Path], arg(metavar="A")]
    """The PNG, JPEG or WebP picture to begin with."""
    second: Annotated[Positional[Path], arg(metavar="B")]
    """The one to end with."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("interpolation.png")
    """The .png file. Nothing is ever overwritten: a taken name gets a number."""
    frames: Annotated[int, arg(metavar="N")] = 9
    """Pictures in a row, both ends included."""
    rows: Annotated[str, arg(metavar="own|N,...")] = "own"
    """A row for each: own begins in the two pictures' own noise, a number in the noise of this seed."""
    json: bool = False
    """Print a JSON object."""
    decoding: Decoding = field(default_factory=Decoding)
    model: Model = field(default_factory=Model)


@dataclass(frozen=True)
class TextDiff:
    """Change a picture as one caption changes into another: a sheet. Needs a model as ldm interpolate does."""

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """The PNG, JPEG or WebP picture."""
    source: Annotated[str, arg(name="from", metavar="TEXT")]
    """What it shows, as "a cat"."""
    target: Annotated[str, arg(name="to", metavar="TEXT")]
    """What it is to show, as "a lion"."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("textdiff.png")
    """The .png file. Nothing is ever overwritten: a taken name gets a number."""
    frames: Annotated[int, arg(metavar="N")] = 7
    """Pictures, of which the first is the picture given back."""
    theta: Annotated[float, arg(metavar="X")] = 0.5
    """How far the last one goes, above 0 and at most 1; 0.25 to 0.5 is usual."""
    json: bool = False
    """Print a JSON object."""
    decoding: Decoding = field(default_factory=Decoding)
    model: Model = field(default_factory=Model)


@dataclass(frozen=True)
class Pca:
    """Draw pictures from a few principal components of what CLIP sees in them: a sheet. Needs a model as ldm
    interpolate does."""

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint="")]
    """PNG, JPEG or WebP pictures."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("pca.png")
    """The .png file. Nothing is ever overwritten: a taken name gets a number."""
    components: Annotated[str, arg(metavar="N,...,all", help_behavior_hint="")] = ""
    """How many to keep, a column for each. By default 1,2,5,10 ... as far as there are so many, and all."""
    of: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A folder of pictures whose components they are. By default those that go with our decoder, or else of IMAGE..."""
    statistics: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Or a file that --write wrote."""
    write: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A .safetensors file to keep the components in. Nothing is ever overwritten."""
    inverted: bool = False
    """Begin in each picture's own noise; else all begin in that of --seed."""
    json: bool = False
    """Print a JSON object."""
    decoding: Decoding = field(default_factory=Decoding)
    model: Model = field(default_factory=Model)


@dataclass(frozen=True)
class PriorSheet:
    """Draw prompts told the text alone, told CLIP's vector of it, and told what a prior makes of it: a sheet. Needs a
    model as ldm interpolate does."""

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT", help_behavior_hint="")]
    """What to draw, a row for each."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("prior.png")
    """The .png file. Nothing is ever overwritten: a taken name gets a number."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the first row, row i has seed + i; -1 draws one."""
    json: bool = False
    """Print a JSON object."""
    asking: Asking = field(default_factory=Asking)
    sampling: Sampling = field(default_factory=Sampling)
    model: Model = field(default_factory=Model)


TaskCommand = Generate | Img2Img | Inpaint | Outpaint | Upscale | Variations | Depth2Img
Command = (
    TaskCommand
    | Grid
    | Show
    | Redo
    | Info
    | Convert
    | Sheet
    | Check
    | Train
    | TrainClip
    | Tune
    | Bench
    | Plan
    | Index
    | Search
    | Classify
    | Score
    | Interpolate
    | TextDiff
    | Pca
    | PriorSheet
)
