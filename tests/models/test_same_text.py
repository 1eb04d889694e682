"""Keys and values of a text, worked out once: the same answers, and how often they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.layers.attention import CrossAttention
from ldm.models.presets import sd1, sd_x4_upscaler, sdxl, tiny
from ldm.models.same_text import SameText
from ldm.models.unet import UNet
from ldm.pipeline.load import random_system
from ldm.types import Conditioning, Context


def made(network: UNet, tokens: int) -> list[Tensor]:
    """All that keys of a text of so many tokens are made of from now on; no picture here has as many."""
    seen: list[Tensor] = []

    def note(_module: Any, given: tuple[Tensor, ...]) -> None:
        if given[0].shape[1] == tokens:
            seen.append(given[0])

    for module in network.modules():
        if isinstance(module, CrossAttention):
            module.to_k.register_forward_pre_hook(note)
    return seen


def told(config: Any, seed: int, rows: int = 2) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    vector = None if config.vector_width is None else torch.randn(rows, config.vector_width, generator=generator)
    if config.classes is not None:
        vector = torch.randint(config.classes, (rows,), generator=generator)
    concat = torch.randn(rows, config.in_channels - 4, 8, 8, generator=generator) if config.in_channels > 4 else None
    return Conditioning(torch.randn(rows, 7, config.context_width, generator=generator), vector, concat)


@pytest.mark.parametrize("config", [sd1(), sdxl(), sd_x4_upscaler()], ids=["sd1", "sdxl", "cross-only"])
@torch.inference_mode()
def test_answers_are_the_same_whatever_is_told_in_whatever_order(config):
    unet = random_system(tiny(config)).unet
    remembering = SameText(unet)
    x, step = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    first, second, fewer = told(unet.config, 0), told(unet.config, 1), told(unet.config, 0, rows=1)
    for cond in (first, first, second, second, first, fewer, first):
        rows = len(cond.cross)  # pyright: ignore[reportArgumentType]
        assert torch.equal(remembering(x[:rows], step[:rows], cond), unet(x[:rows], step[:rows], cond))


@torch.inference_mode()
def test_a_text_is_looked_at_once():
    unet = random_system(tiny(sd1())).unet
    seen, remembering = made(unet, 7), SameText(unet)
    x, step, cond = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), told(unet.config, 0)
    assert cond.cross is not None
    remembering(x, step, cond)
    layers = len(seen)
    for _ in range(3):  # equal, and another tensor each time, as guidance makes it
        remembering(x, step, cond.map(torch.clone))
    assert len(seen) == layers > 1
    remembering(x, step, told(unet.config, 1))
    assert len(seen) == 2 * layers


def test_a_changed_text_is_never_taken_for_the_old_one():
    cond = told(tiny(sd1()).unet, 0)
    assert cond.cross is not None
    kept = cond.with_(context=Context(cond.cross))
    assert kept.shown is kept.context and cond.shown is cond.cross
    assert kept.with_(vector=None).context is kept.context
    for changed in (kept.with_(cross=cond.cross + 1), kept.select(slice(1)), kept.repeat(2), kept.to(dtype=torch.half)):
        assert changed.context is None and changed.shown is changed.cross


@pytest.mark.parametrize("reuse", [1, 2])
def test_a_picture_asks_once_whatever_its_steps(reuse: int):
    model = random_system(tiny(sd1()))
    seen = made(model.unet, 77)
    counts = []
    for steps in (2, 5):
        seen.clear()
        model.generate("a cat", negative="a dog", steps=steps, seed=1, reuse=reuse)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 1
    seen.clear()
    model.generate("[a cat:a dog:0.5]", negative="a dog", steps=4, seed=1, reuse=reuse)
    assert len(seen) == 2 * counts[0]
