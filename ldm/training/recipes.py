"""How the model that ships was made: named stages, each a record, run in this order by `ldm train NAME`.

    small-autoencoder   pictures -> first stage
    small-clip          pictures and captions -> text tower and image tower
    small-latents       both, over all pictures and captions, once
    small-unet          the denoising network
    small-vae-decoder   the first stage's decoder again, on latents as a sampler leaves them
    small-assemble      one checkpoint of all of them
    small-decoder       the network again, told CLIP image embeddings besides: a file of its own
    small-prior         captions -> CLIP image embeddings, by diffusion: a file of its own
    small-prior-ar      the same code by code
    small-upsampler     pictures -> the same twice as large: a file of its own, which needs none of the others
    small-judge         pictures -> what they show: a classifier that judges the models, and needs none of them

The same stages with "gpu-" in front learn at 256 x 256 and in large batches. The upsampler always learns at 256 x 256.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, small, small_upsampler
from ldm.training import stages
from ldm.training.engine.loop import LoopConfig
from ldm.training.judge import train_judge
from ldm.training.stages import Workspace
from ldm.training.upsampler_stage import train_upsampler


@dataclass(frozen=True)
class Recipe:
    """A stage: what it does in a line, what to run, and for how long where it is a training loop.

    size: of the pictures; preset: what is built of them.
    """

    summary: str
    run: Callable[[Workspace, LoopConfig | None], None]
    loop: LoopConfig | None = None
    size: int = 128
    preset: Callable[[int], SystemConfig] = small


def run(name: str, output: Path | None = None, *, pictures: Path = Path("runs/data"), steps: int | None = None) -> None:
    """Run the recipe called `name`, or resume it; stages write below `output`, "runs/small" where none is given.

    Raises LdmError for an unknown name, for missing inputs, and for `steps` where the stage has none.
    """
    if name not in RECIPES:
        raise LdmError(f"recipe: found {name!r}, expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if steps is not None and recipe.loop is None:
        raise LdmError(f"steps: {name} is no training loop; leave it out")
    loop = recipe.loop if recipe.loop is None or steps is None else replace(recipe.loop, steps=steps)
    family = name.split("-", 1)[0]
    recipe.run(Workspace(pictures, output or Path("runs") / family, recipe.preset(recipe.size)), loop)


SMALL = {
    "autoencoder": LoopConfig(
        steps=5600,
        batch=12,
        rate=1e-3,
        warmup=100,
        cooldown=1400,
        ema=0.998,
        weight_decay=0.0,
        compile=True,
    ),
    "clip": LoopConfig(
        steps=1400,
        batch=256,
        rate=2e-3,
        optimizer="muon",
        warmup=60,
        schedule="cosine",
        ema=0.99,
        weight_decay=0.1,
        betas=(0.9, 0.98),
        save_every=100,
        evaluate_every=100,
        log_every=10,
    ),
    "unet": LoopConfig(
        steps=20_000,
        batch=64,
        rate=1.5e-3,
        optimizer="muon",
        warmup=200,
        cooldown=2_000,
        ema=0.9995,
        compile=True,
        save_every=500,
        evaluate_every=1000,
    ),
    "vae-decoder": LoopConfig(
        steps=4_000,
        batch=16,
        rate=5e-4,
        warmup=100,
        cooldown=2_000,
        ema=0.998,
        weight_decay=0.0,
        compile=True,
        save_every=250,
        evaluate_every=500,
    ),
    "decoder": LoopConfig(
        steps=6_000,
        batch=64,
        rate=5e-4,
        warmup=200,
        cooldown=2_000,
        ema=0.9995,
        compile=True,
        save_every=500,
        evaluate_every=1000,
    ),
    "prior": LoopConfig(
        steps=3_000,
        batch=256,
        rate=7e-4,
        warmup=150,
        schedule="cosine",
        ema=0.998,
        weight_decay=0.06,
        save_every=250,
        evaluate_every=500,
    ),
    "prior-ar": LoopConfig(
        steps=2_000,
        batch=128,
        rate=7e-4,
        warmup=150,
        schedule="cosine",
        ema=0.998,
        weight_decay=0.06,
        save_every=250,
        evaluate_every=500,
    ),
    "upsampler": LoopConfig(
        steps=3_000,
        batch=16,
        rate=1e-3,
        warmup=100,
        cooldown=1_000,
        ema=0.998,
        compile=True,
        save_every=250,
        evaluate_every=500,
    ),
    "judge": LoopConfig(
        steps=4_000,
        batch=128,
        rate=2e-3,
        warmup=200,
        schedule="cosine",
        ema=0.998,
        weight_decay=0.05,
        save_every=500,
        evaluate_every=500,
    ),
}
"""For two CPU cores that do nothing else: about 20 minutes, 40 minutes, seven hours, one more for the decoder and half
of one for the upsampler."""

GPU = {
    "autoencoder": LoopConfig(
        steps=20_000,
        batch=128,
        rate=1e-3,
        warmup=500,
        cooldown=4000,
        ema=0.999,
        weight_decay=0.0,
        compile=True,
        save_every=2000,
        evaluate_every=2000,
    ),
    "clip": LoopConfig(
        steps=6_000,
        batch=1024,
        rate=1e-3,
        warmup=300,
        schedule="cosine",
        ema=0.995,
        weight_decay=0.1,
        betas=(0.9, 0.98),
        save_every=1000,
        evaluate_every=500,
    ),
    "unet": LoopConfig(
        steps=60_000,
        batch=256,
        rate=1e-3,
        warmup=1000,
        cooldown=10_000,
        ema=0.9998,
        compile=True,
        save_every=2000,
        evaluate_every=2000,
    ),
    "decoder": LoopConfig(
        steps=20_000,
        batch=256,
        rate=5e-4,
        warmup=500,
        cooldown=6_000,
        ema=0.9998,
        compile=True,
        save_every=2000,
        evaluate_every=2000,
    ),
    "prior": LoopConfig(
        steps=15_000,
        batch=1024,
        rate=7e-4,
        warmup=500,
        schedule="cosine",
        ema=0.9995,
        weight_decay=0.06,
        save_every=1000,
        evaluate_every=1000,
    ),
    "prior-ar": LoopConfig(
        steps=15_000,
        batch=512,
        rate=7e-4,
        warmup=500,
        schedule="cosine",
        ema=0.9995,
        weight_decay=0.06,
        save_every=1000,
        evaluate_every=1000,
    ),
    "vae-decoder": LoopConfig(
        steps=10_000,
        batch=16,
        rate=5e-4,
        warmup=100,
        cooldown=5_000,
        ema=0.998,
        weight_decay=0.0,
        compile=True,
    ),
    "upsampler": LoopConfig(
        steps=40_000,
        batch=64,
        rate=1e-3,
        warmup=500,
        cooldown=10_000,
        ema=0.9995,
        compile=True,
        save_every=2000,
        evaluate_every=2000,
    ),
    "judge": LoopConfig(
        steps=10_000,
        batch=512,
        rate=2e-3,
        warmup=500,
        schedule="cosine",
        ema=0.9995,
        weight_decay=0.05,
        save_every=2000,
        evaluate_every=1000,
    ),
}
"""For one GPU, at 256 x 256. Not yet run."""


def _family(name: str, size: int, loops: dict[str, LoopConfig]) -> dict[str, Recipe]:
    functions = {
        "autoencoder": ("first stage: pictures to latents and back", stages.train_autoencoder),
        "clip": ("text tower and image tower, contrastively", stages.train_clip),
        "latents": ("encode all pictures and captions once", stages.encode_all),
        "unet": ("the denoising network", stages.train_unet),
        "vae-decoder": ("the first stage's decoder, on latents as a sampler leaves them", stages.train_vae_decoder),
        "assemble": ("write one checkpoint", stages.assemble),
        "decoder": ("the denoising network, told CLIP image embeddings too", stages.train_decoder),
        "prior": ("the prior: captions to CLIP image embeddings", stages.train_prior),
        "prior-ar": ("the autoregressive prior, code by code", stages.train_prior_ar),
        "judge": ("a classifier of pictures, to judge the others by", train_judge),
    }
    return {
        f"{name}-{stage}": Recipe(summary, function, loops.get(stage), size)
        for stage, (summary, function) in functions.items()
    } | {
        f"{name}-upsampler": Recipe(
            "the upsampler: pictures twice as large", train_upsampler, loops["upsampler"], 256, small_upsampler
        )
    }


RECIPES: dict[str, Recipe] = _family("small", 128, SMALL) | _family("gpu", 256, GPU)
