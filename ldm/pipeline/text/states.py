"""From what the text towers say to what the U-Net is told: the same at generation and in training.

Shapes: B prompts, N tokens, D text width, P width of all pooled states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.layers.embeddings import sinusoidal_embedding
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import TextStates
from ldm.pipeline.clip.unclip import told_no_image
from ldm.types import Conditioning

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion

SIZE_FEATURES = 256
"""Sinusoidal features of each size, crop and score number (SDXL)."""

WANTED_SCORE, UNWANTED_SCORE = 6.0, 2.5
"""How well-liked the SDXL refiner is told that the picture of the prompt is, and that of the negative prompt."""


def side_by_side(towers: Sequence[TextStates]) -> TextStates:
    """What all towers of a system say of the same prompts, joined along the width: (B, N, D) and (B, P) or None."""
    pooled = [said.pooled for said in towers if said.pooled is not None]
    states = torch.cat([said.states for said in towers], dim=-1)
    return TextStates(states, torch.cat(pooled, dim=-1) if pooled else None)


def size_numbers(
    config: SystemConfig,
    size: tuple[int, int],
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    *,
    wanted: bool = True,
) -> tuple[float, ...]:
    """Original size, crop corner and target size, or for the refiner a score in place of the last.

    Podell et al. 2023, section 2.2. All come as (width, height), (left, top), and are told as (height, width),
    (top, left). Nothing where the system is told none.
    """
    if not config.sizes_in_vector:
        return ()
    last: tuple[float, ...] = size[::-1]
    if config.sizes_in_vector == 5:  # of the crop the refiner's negative side is told nothing, as in diffusers
        last, crop = (WANTED_SCORE if wanted else UNWANTED_SCORE,), crop if wanted else (0, 0)
    return (*(original_size or size)[::-1], *crop[::-1], *last)


def told(model: LatentDiffusion, said: TextStates, sizes: Tensor) -> Conditioning:
    """What the towers say, and numbers of sizes (B, 6 or 5), or (B, 0), behind the pooled states, as features.

    A model that varies pictures is told of none.
    """
    vector = said.pooled
    if vector is not None and sizes.shape[1]:
        features = sinusoidal_embedding(sizes.flatten(), SIZE_FEATURES).reshape(len(sizes), -1)
        vector = torch.cat([vector, features.to(vector)], dim=-1)
    cond = Conditioning(cross=said.states, vector=vector)
    return cond if model.config.image is None else told_no_image(model, cond)
