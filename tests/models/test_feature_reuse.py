"""Calls that take over an earlier call's deep features, against the whole network with these put in by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.feature_reuse import FeatureReuse
from ldm.models.presets import sd1, tiny
from ldm.models.unet import UNet
from ldm.pipeline.load import random_system
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_system(tiny(sd1())).unet


def told(unet: UNet, batch: int, seed: int = 0, **parts: Any) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    cross = torch.randn(batch, 5, unet.config.context_width or 0, generator=generator)
    return x, torch.full((batch,), 900.0 - seed), Conditioning(cross=cross, **parts)


def residuals(unet: UNet, batch: int) -> tuple[Tensor, ...]:
    seen: list[Tensor] = []
    stages = [*unet.input_blocks, unet.middle_block]
    handles = [stage.register_forward_hook(lambda _m, _i, out: seen.append(torch.ones_like(out))) for stage in stages]
    unet(*told(unet, batch))
    for handle in handles:
        handle.remove()
    return tuple(seen)


@torch.no_grad()
def test_every_call_whole_is_the_network(unet):
    network = FeatureReuse(unet, 1)
    for seed in range(3):
        assert torch.equal(network(*told(unet, 2, seed)), unet(*told(unet, 2, seed)))


@torch.no_grad()
@pytest.mark.parametrize("outer", [1, 2, 4])
@pytest.mark.parametrize("controlled", [False, True])
def test_deep_features_are_those_of_the_last_whole_call(outer, controlled, unet):
    control = residuals(unet, 2) if controlled else ()
    calls = [told(unet, 2, seed, control=control) for seed in range(3)]
    network = FeatureReuse(unet, 3, outer)
    answers = [network(*call) for call in calls]
    assert torch.equal(answers[0], unet(*calls[0]))
    for answer, call in zip(answers[1:], calls[1:], strict=True):
        assert torch.equal(answer, by_hand(unet, outer, calls[0], call))
        assert not torch.allclose(answer, unet(*call))


def by_hand(unet: UNet, outer: int, whole: tuple[Any, ...], now: tuple[Any, ...]) -> Tensor:
    """What the last stages are given by `whole` put in the place of what `now` gives them, but for their own skip."""
    stage = unet.output_blocks[-outer]
    skip = unet.skips[outer - 1]
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0][:, :-skip])

    def put(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.cat([kept[0], args[0][:, -skip:]], dim=1), *args[1:]

    for hook, call in ((keep, whole), (put, now)):
        handle = stage.register_forward_pre_hook(hook)
        answer = unet(*call)
        handle.remove()
    return answer


@torch.no_grad()
def test_another_batch_begins_anew(unet):
    network = FeatureReuse(unet, 4)
    network(*told(unet, 2, 0))
    assert torch.equal(network(*told(unet, 1, 1)), unet(*told(unet, 1, 1)))


@pytest.mark.parametrize(("fields", "whole"), [({}, 6), ({"reuse": 2}, 3), ({"reuse": 4}, 2), ({"count": 2}, 6)])
def test_a_picture_computes_the_inner_half_less_often(fields, whole):
    model, calls = random_system(tiny(sd1())), []
    model.unet.middle_block.register_forward_hook(lambda *_: calls.append(1))
    pictures = model.generate("a red apple", width=64, height=64, steps=6, sampler="euler", seed=3, **fields)
    assert len(calls) == whole
    assert all(picture.request.reuse == fields.get("reuse", 1) for picture in pictures)
