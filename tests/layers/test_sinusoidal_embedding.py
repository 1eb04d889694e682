"""Sinusoidal features against diffusers' and against the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ldm.layers.embeddings import sinusoidal_embedding


@pytest.mark.parametrize("width", [2, 7, 256, 320])
def test_equals_diffusers(width):
    values = torch.tensor([0.0, 1.0, 6.5, 999.0, 1024.0])
    theirs = get_timestep_embedding(values, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(sinusoidal_embedding(values, width), theirs, atol=1e-6)


def test_follows_the_formula():
    features = sinusoidal_embedding(torch.tensor([3.0]), 4, max_period=100.0)[0]
    expected = [math.cos(3.0), math.cos(0.3), math.sin(3.0), math.sin(0.3)]
    assert features.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_is_float32_whatever_comes_in(dtype):
    features = sinusoidal_embedding(torch.tensor([7, 64], dtype=dtype), 8)
    assert features.dtype == torch.float32
    assert torch.equal(features, sinusoidal_embedding(torch.tensor([7.0, 64.0]), 8))
