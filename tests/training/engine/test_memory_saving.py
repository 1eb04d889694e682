"""Working activations out again: the same gradients, less kept, and the network as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldm.models.text_encoder import CLIPText, OpenCLIPText, TextConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.training.engine.memory_saving import BLOCKS, checkpointed
from ldm.types import Conditioning

UNETS = {
    "text": UNetConfig(
        model_channels=32, channel_mult=(1, 2), res_blocks=1, attention=(1, 2), context_width=16, heads=2,
        cross_only=(False, False), dropout=0.2,
    ),
    "plain": UNetConfig(
        model_channels=32, channel_mult=(1, 2), res_blocks=1, attention=(1, 1), context_width=None, heads=2,
        cross_only=(False, False),
    ),
}  # fmt: skip
TEXT = TextConfig(vocabulary=100, width=32, layers=3, heads=4)


def unet_case(config: UNetConfig) -> tuple[nn.Module, Callable[[], Tensor]]:
    unet = UNet(config)
    for parameter in unet.parameters():  # the last layers begin at nought
        nn.init.normal_(parameter, std=0.1)
    x, timestep = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    cross = None if config.context_width is None else torch.randn(2, 7, config.context_width)
    return unet, lambda: unet(x, timestep, Conditioning(cross=cross)).square().mean()


def text_case(tower: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    ids = torch.randint(1, 99, (2, 77))
    return tower, lambda: tower(ids).states.square().mean()


def measured(network: nn.Module, loss: Callable[[], Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the bytes of activations that are kept for them."""
    weights = {p.data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    network.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = loss()
    result.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}, sum(kept.values())


CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]] = {
    "unet": lambda: unet_case(UNETS["text"]),
    "unet without text": lambda: unet_case(UNETS["plain"]),
    "CLIP": lambda: text_case(CLIPText(TEXT)),
    "OpenCLIP": lambda: text_case(OpenCLIPText(TEXT)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_gradients_from_less(name: str) -> None:
    network, loss = CASES[name]()
    expected, whole = measured(network, loss)
    with checkpointed(network):
        found, kept = measured(network, loss)
    assert found.keys() == expected.keys() != set()
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-8), key
    assert kept < 0.5 * whole
    assert not any("forward" in vars(module) for module in network.modules())
    again, before = measured(network, loss)
    assert before == whole and all(torch.equal(again[key], expected[key]) for key in expected)


def test_nothing_is_worked_out_twice_without_gradients() -> None:
    network, loss = unet_case(UNETS["text"])
    calls: list[int] = []
    block = next(m for m in network.modules() if isinstance(m, BLOCKS))
    next(block.children()).register_forward_hook(lambda *_: calls.append(1))
    with checkpointed(network), torch.no_grad():
        loss()
    assert len(calls) == 1
    with checkpointed(network):
        loss().backward()
    assert len(calls) == 3
