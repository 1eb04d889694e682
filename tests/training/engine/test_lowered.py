"""Autocast on tensors without numbers against PyTorch's own on tensors with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.models.presets import sd2, tiny
from ldm.pipeline.live_memory import live_memory
from ldm.pipeline.load import random_system
from ldm.training.engine.lowered import lowered
from ldm.types import Conditioning
from ldm.weights.layout import build

CPU = torch.device("cpu")


def dtypes_of(unet: nn.Module, width: int) -> dict[str, torch.dtype]:
    """What each layer gives."""
    given: dict[str, torch.dtype] = {}
    for name, module in unet.named_modules():

        def seen(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
            given[name] = out.dtype

        if not list(module.children()):
            module.register_forward_hook(seen)
    unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), Conditioning(cross=torch.zeros(1, 77, width)))
    return given


def test_layers_give_what_they_give_under_autocast():
    config = tiny(sd2())
    width = config.unet.context_width
    assert width is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        truly = dtypes_of(random_system(config).unet, width)
    with live_memory(CPU), torch.no_grad(), lowered(CPU, torch.bfloat16):
        assert dtypes_of(build(config).unet, width) == truly
    assert torch.bfloat16 in truly.values()


@pytest.mark.parametrize(("keep", "held"), [(True, 2), (False, 0)])
def test_casts_of_trained_weights_are_kept_until_the_end(keep, held):
    with live_memory(CPU) as memory, torch.no_grad():
        layer, frozen = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False).requires_grad_(False)
        x, before = torch.empty(1, 100), memory.live
        with lowered(CPU, torch.bfloat16, keep):
            layer(x)
            frozen(x)
            assert memory.live - before == held * 100 * 100
        assert memory.live == before
