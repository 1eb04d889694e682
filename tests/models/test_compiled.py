"""Compiled blocks against the same blocks as they are, and how often something is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.layers.attention import attention_backend
from ldm.layers.convolution import ResBlock
from ldm.layers.transformer import TransformerBlock
from ldm.models.compiled import BlockCompiler, check_compiler
from ldm.models.presets import sd1, tiny
from ldm.pipeline.load import random_system
from ldm.pipeline.picture import record_of
from ldm.types import Conditioning

Graphs = list[torch.fx.GraphModule]


@pytest.fixture
def counting() -> tuple[BlockCompiler, Graphs]:
    """A compiler that runs each graph as it is, and keeps it."""
    graphs: Graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return BlockCompiler(keep), graphs


def blocks(randomize: Callable[..., Any], count: int) -> nn.ModuleList:
    """Residual blocks of the same shape."""
    return randomize(nn.ModuleList(ResBlock(32, 64, 16) for _ in range(count)), 0)


def shown(side: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(side)
    return torch.randn(batch, 32, side, side, generator=generator), torch.randn(batch, 16, generator=generator)


@torch.inference_mode()
def test_inductor_computes_the_same(randomize, relative_error):
    try:
        check_compiler(torch.device("cpu"))
    except LdmError as missing:  # nothing else of this package wants a compiler
        pytest.skip(str(missing))
    plain = blocks(randomize, 1)
    compiled = BlockCompiler().compiled(plain)
    assert relative_error(compiled[0](*shown(8)), plain[0](*shown(8))) < 1e-5


@torch.inference_mode()
def test_blocks_of_one_kind_are_compiled_once_and_a_second_size_once_more(randomize, counting):
    compiler, graphs = counting
    plain = blocks(randomize, 3)
    compiled = compiler.compiled(plain)
    for side, expected in ((8, 1), (12, 2), (16, 2), (24, 2), (12, 2)):
        for one, other in zip(compiled, plain, strict=True):
            assert torch.equal(one(*shown(side)), other(*shown(side)))
        assert len(graphs) == expected
    again = compiler.compiled(blocks(randomize, 1))  # another network, with blocks of that kind
    again[0](*shown(8))
    assert len(graphs) == expected


@torch.inference_mode()
def test_a_copy_sees_its_own_weights_and_compiles_nothing(randomize, counting):
    compiler, graphs = counting
    compiled = compiler.compiled(blocks(randomize, 1))
    compiled[0](*shown(8))
    other = copy.deepcopy(compiled)
    plain = randomize(blocks(randomize, 1), 1)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other[0](*shown(8)), plain[0](*shown(8)))
    assert not torch.equal(other[0](*shown(8)), compiled[0](*shown(8)))
    assert len(graphs) == 1


def test_the_network_itself_stays_as_it_is_and_shares_its_tensors(randomize, counting):
    plain = blocks(randomize, 1)
    compiled = counting[0].compiled(plain)
    assert type(plain[0]) is ResBlock and type(compiled[0]) is not ResBlock and isinstance(compiled[0], ResBlock)
    assert all(a is b for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))
    assert list(plain.state_dict()) == list(compiled.state_dict())


@torch.inference_mode()
def test_attention_is_one_operation_and_its_kernel_may_be_changed_later(randomize, counting):
    compiler, graphs = counting
    plain = randomize(nn.ModuleList([TransformerBlock(32, 16, 2)]), 0).bfloat16()
    compiled = compiler.compiled(plain)
    x, context = torch.randn(2, 9, 32).bfloat16(), torch.randn(2, 5, 16).bfloat16()
    for name, expected in (("auto", 2), ("sdpa", 0), ("auto", 2)):
        with attention_backend(name):
            assert torch.equal(compiled[0](x, context), plain[0](x, context))
        named = [str(node.target) for node in graphs[0 if name == "auto" else 1].graph.nodes]
        assert sum("attend_in_blocks" in target for target in named) == expected
    assert len(graphs) == 2


def test_the_operator_tells_its_layout_truly():
    BlockCompiler("eager").compiled(nn.ModuleList())
    for batch in (1, 2):
        q, k = (torch.randn(batch, n, 2, 8).bfloat16().transpose(1, 2) for n in (6, 5))
        torch.library.opcheck(torch.ops.ldm.attend_in_blocks, (q, k, k), test_utils=("test_schema", "test_faketensor"))


def test_a_compiler_that_fails_is_told_in_one_line(randomize):
    def fail(_graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        raise ValueError("no such header\nand much more")

    compiled = BlockCompiler(fail).compiled(blocks(randomize, 1))
    with torch.inference_mode(), pytest.raises(LdmError, match=r"^compile: .*failed .*run without it$") as raised:
        compiled[0](*shown(8))
    assert "\n" not in str(raised.value)


def test_no_compiler_is_told_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{tmp_path}/none -O2")
    with pytest.raises(LdmError, match=rf"compile: the C\+\+ compiler {tmp_path}/none was not found; install it"):
        check_compiler(torch.device("cpu"))
    with pytest.raises(LdmError, match="found the device meta, expected a CPU or a CUDA GPU"):
        check_compiler(torch.device("meta"))


def test_a_model_draws_the_same_picture_and_says_that_it_was_compiled(counting):
    model = random_system(tiny(sd1()))
    compiled = model.compiled(backend="eager")
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 3}
    (plain,), (ours,) = model.generate("x", **fields), compiled.generate("x", **fields)
    assert ours.image.tobytes() == plain.image.tobytes()
    assert record_of(ours)["compiled"] is True and record_of(plain)["compiled"] is False
    assert compiled.compiler is not None and model.compiler is None
    assert compiled.unet(*call(model.unet.config.context_width)).shape == (2, 4, 8, 8)


def call(width: int | None) -> tuple[Tensor, Tensor, Conditioning]:
    return torch.randn(2, 4, 8, 8), torch.full((2,), 5.0), Conditioning(cross=torch.randn(2, 5, width or 0))
