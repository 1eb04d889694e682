"""What each kind of adapter makes of one weight equals what LyCORIS makes of it, from the file that LyCORIS' keys give.

The LyCORIS package owns LoCon, LoHa, LoKr, (IA)^3, full and norm, and DoRA on them; here layer by layer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.weights.adapters.kinds import Dora, Full, fits
from ldm.weights.adapters.read import Adapter, read_adapter
from ldm.weights.adapters.roles import Part

LAYERS = {
    "linear": lambda: nn.Linear(24, 32),
    "conv 1x1": lambda: nn.Conv2d(24, 32, 1),
    "conv 3x3": lambda: nn.Conv2d(24, 32, 3, padding=1),
}
DIMS: dict[str, Any] = {"lora_dim": 4, "alpha": 3.0}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "locon": (LoConModule, DIMS),
    "locon, mid": (LoConModule, DIMS | {"use_tucker": True}),
    "locon, by root of rank": (LoConModule, DIMS | {"rs_lora": True}),
    "loha": (LohaModule, DIMS),
    "loha, tucker": (LohaModule, DIMS | {"use_tucker": True}),
    "lokr": (LokrModule, {"lora_dim": 2, "alpha": 3.0, "factor": 4}),
    "lokr, both factored": (LokrModule, {"lora_dim": 1, "alpha": 3.0, "decompose_both": True}),
    "lokr, tucker": (LokrModule, {"lora_dim": 2, "alpha": 3.0, "use_tucker": True, "factor": 4}),
    "lokr, whole": (LokrModule, DIMS | {"full_matrix": True}),
    "ia3": (IA3Module, {}),
    "ia3, inputs": (IA3Module, {"train_on_input": True}),
    "full": (FullModule, {}),
}
DORA = ("locon", "locon, mid", "loha", "loha, tucker", "lokr", "lokr, tucker")


def adapter_of(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> Adapter:
    path = folder / "adapter.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return read_adapter(path)


def written(module: Any, folder: Path) -> Adapter:
    """LyCORIS' tensors of one module, as a file holds them."""
    match module:
        case FullModule():  # whose writer wants it in place of the layer; these are the keys it gives
            state = {"diff": module.weight, "diff_b": module.bias}
        case LoConModule() | LohaModule() | LokrModule():
            state = module.custom_state_dict()
        case _:
            state = module.state_dict()
    return adapter_of({f"lycoris_layer.{name}": tensor for name, tensor in state.items()}, folder)


def filled(module: nn.Module) -> nn.Module:
    """Random numbers in every parameter, which LyCORIS starts at zero change."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "dora" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind, layer, tmp_path):
    make, options = KINDS[kind]
    original = LAYERS[layer]()
    assert_same_output(filled(make("lycoris_layer", original, 1.0, **options)), original, tmp_path)


@pytest.mark.parametrize("on_output", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", DORA)
def test_dora(kind, layer, on_output, tmp_path):
    make, options = KINDS[kind]
    original = LAYERS[layer]()
    module = filled(make("lycoris_layer", original, 1.0, weight_decompose=True, wd_on_out=on_output, **options))
    decomposed = assert_same_output(module, original, tmp_path).weight
    assert isinstance(decomposed, Dora)
    assert decomposed.on_input is not on_output


@pytest.mark.parametrize("layer", [nn.LayerNorm(24), nn.GroupNorm(3, 24)], ids=["layer", "group"])
def test_norm(layer, tmp_path):
    part = assert_same_output(filled(NormModule("lycoris_layer", layer, 1.0)), layer, tmp_path)
    assert isinstance(part.weight, Full)
    assert isinstance(part.bias, Full)


def assert_same_output(module: Any, layer: nn.Module, folder: Path) -> Part:
    """The layer with our changed weight equals the one that LyCORIS has taken over. (Its forward is what it trains;
    its merging scales LoHa and LoKr twice.)"""
    part = written(module, folder).parts["lycoris_layer"]
    ours = copy.deepcopy(layer)
    x = torch.randn(4, 24, 5, 5) if isinstance(layer, nn.Conv2d | nn.GroupNorm) else torch.randn(4, 24)
    with torch.no_grad():
        unchanged = layer(x)
        for parameter, kind in ((ours.weight, part.weight), (ours.bias, part.bias)):
            if kind is not None:
                assert fits(kind, tuple(parameter.shape))
                assert not fits(kind, (7 * parameter.shape[0], *(7 * size for size in parameter.shape[1:])))
                parameter.add_(kind.delta(parameter))
        module.apply_to()
        theirs = layer(x)
        assert float((theirs - unchanged).abs().max()) > 0.01
        torch.testing.assert_close(ours(x), theirs, rtol=1e-5, atol=2e-5)
    return part
