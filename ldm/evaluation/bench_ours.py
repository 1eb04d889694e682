"""Our side of `ldm bench`: the same work as `bench_diffusers`, by a model as `ldm.load` places it.

It is also what a process of its own runs: `python -m ldm.evaluation.bench_ours JSON`.

Shapes: z latent channels, h and w latent sides, N tokens, D width of the text states.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, always, guided
from ldm.errors import LdmError
from ldm.evaluation.bench_inputs import GUIDANCE, NEGATIVE, PROMPT, SEED, TIMESTEP, Work
from ldm.evaluation.bench_process import Fresh
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import TextStates
from ldm.pipeline.first_stage import decode as decode_latents
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load
from ldm.pipeline.text.states import size_numbers, told

Run = Callable[[], Tensor]


def work_for(config: SystemConfig, size: int, steps: int, device: str) -> Work:
    """What such a model is given. Raises LdmError for one that is told more than a text, and for a size it cannot draw.

    size: the side in pixels; steps: of a whole picture.
    """
    use, f = config.unet, config.autoencoder.downsampling
    plain = use.in_channels == config.autoencoder.latent_channels and config.image is None and config.text
    if not plain or config.family == "sdxl-refiner" or use.classes is not None:
        raise LdmError("bench: this model needs more than a text; expected a model from text to pictures")
    if not 64 <= size <= 2048 or size % max(8, f):
        raise LdmError(f"size: found {size}, expected a multiple of {max(8, f)} from 64 to 2048")
    pooled = (use.vector_width or 0) - 256 * config.sizes_in_vector if config.sizes_in_vector else 0
    latent = (config.autoencoder.latent_channels, size // f, size // f)
    sampler = "euler" if config.sizes_in_vector else "ddim"
    return Work(size, steps, latent, use.context_width or 0, pooled, sampler, device)


def step(model: LatentDiffusion, work: Work) -> Run:
    """One guided call of the denoiser. -> x0 (1, z, h, w). The U-Net alone is kept."""
    pooled = work.pooled_states() if work.pooled else None
    sizes = size_numbers(model.config, (work.size, work.size))
    cond = told(model, TextStates(work.states(), pooled), torch.tensor([sizes] * 2, device=work.device))
    denoiser = model.denoiser()
    denoise = guided(denoiser, always(cond.select(slice(0, 1)), cond.select(slice(1, 2))), Guidance(GUIDANCE))
    level = float(model.schedule.sigmas[TIMESTEP])
    sigma, x = torch.tensor([level]), work.noise() * (1 + level**2) ** 0.5
    return lambda: denoise(x, sigma)


def decode(model: LatentDiffusion, work: Work) -> Run:
    """A latent to pixels. -> (1, 3, H, W) in [-1, 1]. The autoencoder alone is kept."""
    autoencoder, latents = model.autoencoder, work.noise()
    return lambda: decode_latents(autoencoder, latents)[0]


def text(model: LatentDiffusion, work: Work) -> Run:
    """A prompt and a negative one. -> (2, N, D)."""

    def run() -> Tensor:
        said = [model.encode_prompt(prompt, width=work.size, height=work.size) for prompt in (PROMPT, NEGATIVE)]
        return torch.cat([cond.cross for cond in said if cond.cross is not None])

    return run


def picture(model: LatentDiffusion, work: Work) -> Run:
    """From the prompt to a picture. -> (1, 3, H, W) in [-1, 1]."""

    def run() -> Tensor:
        drawn = model.generate(
            PROMPT, negative=NEGATIVE, width=work.size, height=work.size, steps=work.steps, sampler=work.sampler,
            schedule="leading", guidance=GUIDANCE, seed=SEED,
        )  # fmt: skip
        return torch.from_numpy(np.array(drawn[0].image)).permute(2, 0, 1)[None] / 127.5 - 1

    return run


@torch.inference_mode()
def run_fresh(asked: Fresh) -> None:
    """Load, then take steps or draw."""
    model = load(asked.file, device=asked.work.device)
    if asked.task == "picture":
        picture(model, asked.work)()
        asked.tell(time.monotonic() - asked.begun)
        return
    run = step(model, asked.work)
    run().cpu()
    first = time.monotonic()
    run().cpu()
    asked.tell(2 * first - time.monotonic() - asked.begun)


if __name__ == "__main__":
    task = Fresh.from_json(sys.argv[1])
    torch.set_num_threads(task.threads)
    run_fresh(task)
