"""The flags that several commands share, in groups: each field is a flag, each docstring its help. Light."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

from ldm.pipeline.request import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    Emphasis,
    HighRes,
    PriorUse,
    Rng,
    SamplerName,
    ScheduleName,
    Upscaling,
)

SAMPLER_HELP = f"One of {', '.join(get_args(SamplerName))}; or as A1111, ComfyUI or diffusers call them."
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
    """SD 1.x, 2.x, SDXL or ours: a file, a diffusers folder, or a name in --models. By default the one that ships."""
    vae: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """An autoencoder to use instead of the model's own; a tiny one (TAESD) decodes in little time, less exactly."""
    unet: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A U-Net to use instead of the model's own."""
    text_encoder: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A text encoder to use instead of the model's own; SDXL has two, so it may be given twice."""
    lora: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE[:W[:TEXT]]", help_behavior_hint="")] = ()
    """A LoRA or its kin, with its weight, by default 1, and perhaps another for the text encoders. Repeatable."""
    embedding: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="")] = ()
    """A textual-inversion embedding, which prompts then use by its name. Repeatable."""
    models: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="DIR", help_behavior_hint="")] = ()
    """Where names are looked for: any folder, or A1111's or ComfyUI's. Repeatable; by default those of LDM_MODELS."""
    allow_pickle: bool = False
    """Read .ckpt, .pt and .bin too, with a reader that runs nothing that is in them."""
    device: Annotated[str, arg(metavar="D")] = "auto"
    """cpu, cuda, cuda:1, mps; auto is a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The precision of the networks."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """The kernel: torch's own, xformers', or the fastest one here."""
    compile: bool = False
    """Compile the networks' blocks, for GPUs: the first step takes longer, and pictures differ by rounding."""
    prediction: Literal["auto", "eps", "v", "x0", "probe"] = "auto"
    """What the U-Net says: noise, velocity or picture. auto reads it off the file, probe tries an SD 2.x file."""
    offload: Literal["auto", "none", "parts", "blocks"] = "auto"
    """What waits in the machine's memory while a GPU does not use it: nothing, whole networks, or all but one block of
    the U-Net. auto: as little as has to."""
    store: Literal["full", "int8"] = "full"
    """int8: the U-Net's weights are kept in bytes, which takes half the memory and changes pictures a little."""
    vae_tile: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Encode and decode in tiles of this side: the same picture with less memory. By default where it must be."""


@dataclass(frozen=True)
class ClipModel:
    """Which CLIP looks at pictures and texts, and where."""

    file: Annotated[Path | None, arg(name="model", metavar="FILE", help_behavior_hint="")] = None
    """One of ours, of SD 2.1 unCLIP, open_clip or transformers: a file or folder. By default the one that ships."""
    config: Annotated[str | None, arg(metavar="NAME|FILE", help_behavior_hint="")] = None
    """open_clip's config for weights that have none beside them, as ViT-B-32, or a JSON file like it."""
    allow_pickle: bool = False
    """Read .pt and .bin too, with a reader that runs nothing that is in them."""
    device: Annotated[str, arg(metavar="D")] = "auto"
    """cpu, cuda, cuda:1, mps; auto is a CUDA GPU if there is one, else the CPU."""


@dataclass(frozen=True)
class Decoding:
    """How pictures are drawn from what CLIP sees; by DDIM, which can be run backwards."""

    prompt: Annotated[str, arg(metavar="TEXT", help_behavior_hint="")] = ""
    """Words to lean towards besides."""
    negative: Annotated[str, arg(metavar="TEXT", help_behavior_hint="")] = ""
    """What the pictures should not show."""
    size: Annotated[str, arg(metavar="WxH", help_behavior_hint="")] = ""
    """In pixels, multiples of 8. By default the model's own, in the shape of the first picture."""
    steps: Annotated[int, arg(metavar="N")] = 50
    """Steps of DDIM, and of its way back."""
    guidance: Annotated[float, arg(metavar="X")] = 1.0
    """How far to lean towards what is told; with 1 a picture's own noise gives it back."""
    eta: Annotated[float, arg(metavar="X")] = 0.0
    """Noise added on the way, 0 to 1."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the noise; -1 draws one."""


@dataclass(frozen=True)
class Output:
    """Where pictures go and what is said about them."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="PATH")] = Path()
    """A .png, .jpg or .webp file, or a folder. Nothing is ever overwritten: a taken name gets a number."""
    json: bool = False
    """Print a JSON object for each picture."""
    verbose: bool = False
    """Say what the model file was found to be, by which rule, and where the time went."""
    preview: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture file that shows how far the pictures are, and is written anew every few steps."""
    preview_vae: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A tiny autoencoder (TAESD) that decodes for it; else its colours are right, and its details are not there."""
    preview_every: Annotated[int, arg(metavar="N")] = 5
    """After how many steps."""


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
class Reading:
    """How prompts are read: (word:1.2), [from:to:0.5], [one|two], AND, BREAK, {one|two}, __NAME__, <lora:NAME:0.8>."""

    emphasis: Emphasis = "a1111"
    """Whose rules (word:1.2) follows; ignore drops the weights, literal takes every mark as text."""
    wildcards: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="DIR", help_behavior_hint="")] = ()
    """A folder of .txt files; __NAME__ in a prompt becomes a line of NAME.txt, by the seed. Repeatable."""
    empty_negative: Literal["encoded", "zeros"] = "encoded"
    """What an empty --negative is: the encoded empty text, or zeros."""
    original_size: Annotated[str, arg(metavar="WxH", help_behavior_hint="")] = ""
    """The size that SDXL is told a picture had before it was scaled. By default the picture's own."""
    crop: Annotated[str, arg(metavar="LEFT,TOP", help_behavior_hint="")] = ""
    """Where SDXL is told that a picture was cut from it. By default 0,0."""


@dataclass(frozen=True)
class Steering:
    """Guidance in detail, and steps that are cheaper."""

    guidance_start: Annotated[float, arg(metavar="X")] = 0.0
    """The share of the steps before guidance begins to act."""
    guidance_end: Annotated[float, arg(metavar="X")] = 1.0
    """The share of the steps after which it acts no more."""
    perturbed: Annotated[float, arg(metavar="X")] = 0.0
    """How far to lean away from what the U-Net draws without its middle self-attention; 3 is usual, 0 is off."""
    apg: bool = False
    """Guide by projection, which does not burn out at a high --guidance. Any flag that follows switches it on, too."""
    apg_parallel: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """How much of the part along the picture is kept, 0 to 1; by default 0."""
    apg_norm: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """The largest norm of the difference that guides, 0 for no limit; by default 7.5."""
    apg_momentum: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """How much of the differences before is added, -1 to 1; by default -0.75."""
    reuse: Annotated[int, arg(metavar="N")] = 1
    """Compute the inner half of the U-Net at every Nth step alone: 2 is faster and nearly as good, 1 is exact."""
    merge_tokens: Annotated[float, arg(metavar="X")] = 0.0
    """The share of tokens that self-attention merges at the finest level, as 0.5: faster for large pictures."""


@dataclass(frozen=True)
class Chance:
    """The noise that a picture starts from."""

    variation_seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Another seed, to move the start noise towards. Needs --variation-strength."""
    variation_strength: Annotated[float, arg(metavar="X")] = 0.0
    """How far, 0 to 1."""
    rng: Rng = "cpu"
    """Whose noise a seed gives: PyTorch's, AUTOMATIC1111's on a GPU (philox), or ComfyUI's."""
    batch_index: Annotated[int, arg(metavar="N")] = 0
    """With --rng comfy, where a batch has one seed: the first picture's place in it."""


@dataclass(frozen=True)
class Refining:
    """A second model for the last steps, as SDXL has one."""

    refiner: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The model that goes on: a file, a diffusers folder, or a name in --models."""
    refine_at: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """The share of the steps after which it does; by default 0.8."""


@dataclass(frozen=True)
class SecondPass:
    """The picture made larger, then drawn again over its last steps."""

    highres: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="")] = None
    """How much larger both sides become, above 1, at most 4. By default there is one pass."""
    highres_upscale: Upscaling = HighRes().upscale
    """Enlarge the latent, or the decoded picture."""
    highres_strength: Annotated[float, arg(metavar="X")] = HighRes().strength
    """The share of the steps that are run again."""
    highres_steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Of which it is a share; by default those of --steps."""


@dataclass(frozen=True)
class Controls:
    """Pictures that the result is held to. Weight, start and end: once for all --control, or once for each."""

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
class Asking:
    """A prior: it makes of the prompt what CLIP might see in a picture of it, and a decoder draws that (DALL-E 2)."""

    prior: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The prior's file, as checkpoints/ldm-prior.safetensors; without --model, our decoder draws."""
    prior_guidance: Annotated[float, arg(metavar="X")] = PriorUse().guidance
    """How far its embedding leans towards the prompt; 1 is not at all."""
    prior_steps: Annotated[int, arg(metavar="N")] = PriorUse().steps
    """Of its sampler."""
    prior_choose: Annotated[int, arg(metavar="N")] = PriorUse().choose
    """How many embeddings it makes; the one is drawn that fits the prompt best by CLIP."""


@dataclass(frozen=True)
class Details:
    """What few need, and every task takes."""

    asking: Asking = field(default_factory=Asking)
    refining: Refining = field(default_factory=Refining)
    steering: Steering = field(default_factory=Steering)
    chance: Chance = field(default_factory=Chance)
    reading: Reading = field(default_factory=Reading)
    controls: Controls = field(default_factory=Controls)


@dataclass(frozen=True)
class PictureFolder:
    """How the pictures of a folder are found, and cut to shape."""

    size: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """The side in pixels of a square one; others have about its area. By default the model's."""
    class_tokens: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """The caption of pictures that have none; else they are left out."""
    caption_ending: Annotated[str, arg(metavar=".EXT", help_behavior_hint="")] = ""
    """Of the caption files. By default .txt, .caption or .json, the first of them that is there."""
    wildcards: bool = False
    """Each line of a caption file is a caption, and {a|b} in it is a or b; else the first line is its caption."""
    masks: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A folder of masks with the names of the pictures: white is what is learned."""
    hints: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A folder of pictures that a ControlNet is told, with the names of the others."""
    class_pictures: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A folder of pictures of the subject's class (DreamBooth)."""
    class_caption: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """The caption of those that have none. Given alone, the model draws them itself."""
    no_upscale: bool = False
    """Enlarge no picture: a small one is trained on as small as it is."""
    bucket_step: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """What all sides are multiples of; by default 64, and less for small models."""
