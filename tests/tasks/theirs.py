"""diffusers' pipelines with our weights, where a task needs more than `tests/pipeline/test_pipeline_parity.py` has.

Prompts go in as embeddings: that tokens and towers agree is tested there.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from their_networks import their_autoencoder, their_prediction, their_unet
from torch import Tensor

from ldm.diffusion.state import finish_state
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import run
from ldm.types import Conditioning

TOLERANCE = 1e-3
DDIM: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip


def networks(model: LatentDiffusion, **scheduler: Any) -> dict[str, Any]:
    """The parts that all pipelines share. scheduler: changes to DDIM's settings."""
    settings = DDIM | {"prediction_type": their_prediction(model.config)} | scheduler
    return {
        "unet": their_unet(model),
        "vae": their_autoencoder(model),
        "scheduler": diffusers.DDIMScheduler(**settings),
        "text_encoder": None,
        "tokenizer": None,
    }


def asked(model: LatentDiffusion, request: GenerateRequest, count: int = 1) -> dict[str, Any]:
    """A request for an explicit size, in their words."""
    size = {"width": request.width, "height": request.height}
    wanted = model.encode_prompt(request.prompt, **size)
    unwanted = model.encode_prompt(request.negative, **size, wanted=False)
    assert wanted.cross is not None and unwanted.cross is not None
    return {
        "prompt_embeds": wanted.cross.repeat(count, 1, 1),
        "negative_prompt_embeds": unwanted.cross.repeat(count, 1, 1),
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "output_type": "latent",
    }


def final_latents(model: LatentDiffusion, request: GenerateRequest) -> Tensor:
    """The latents (B, z, h, w) of all pictures of a request."""
    steps = [e.step for e in run(model, request) if isinstance(e, Progress) and e.step and e.done == e.steps]
    return torch.cat([finish_state(step.x, step.sigma_next) for step in steps])


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-3 of the largest value, which is not 0."""
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max())
    assert torch.isfinite(ours).all() and scale > 0.1
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * scale)


class WatchedControl:
    """A ControlNet for a model, and the (latent, picture) sizes at each of its calls."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.config = ControlNetConfig(model.config.unet, hint_widths=(8, 8, 16, 16))
        self.network, self.seen = ControlNet(self.config).eval(), list[tuple[torch.Size, torch.Size]]()

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning, picture: Tensor) -> list[Tensor]:
        self.seen.append((x.shape[2:], picture.shape[2:]))
        return self.network(x, timestep, cond, picture)
