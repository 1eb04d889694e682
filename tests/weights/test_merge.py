"""EMA copies by LDM's own rule for their names, and merges against the formulas, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.models.unet import UNet
from ldm.weights.io import DTYPES, TensorInfo
from ldm.weights.layout import UNET
from ldm.weights.merge import FIRST_CONVOLUTION, add_difference, ema_name, unpaired, weighted, with_ema, without_ema
from ldm.weights.source import Source

WEIGHT = f"{UNET}out.2.weight"


def source(tensors: Mapping[str, Tensor], name: str = "x") -> Source:
    infos = {name: TensorInfo(DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return Source(Path(name), infos, {}, lambda names: ((name, tensors[name]) for name in names))


def values(merged: Source) -> dict[str, Tensor]:
    return dict(merged.read(merged.tensors))


def test_ema_names_are_those_of_the_original_code() -> None:
    """LDM's LitEma names the copy of each parameter of its wrapper with all dots taken out, and so must we."""
    with torch.device("meta"):
        wrapper = nn.Module()
        wrapper.diffusion_model = UNet(sd1().unet)
    theirs = {"model." + name: "model_ema." + name.replace(".", "") for name, _ in wrapper.named_parameters()}
    assert len(set(theirs.values())) == len(theirs) == 686
    assert {name: ema_name(name) for name in theirs} == theirs
    assert ema_name(f"{UNET}input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_ema_copies_take_the_place_of_the_others() -> None:
    plain, average = torch.zeros(2).half(), torch.ones(2)
    held = source({WEIGHT: plain, ema_name(WEIGHT): average, "model_ema.decay": average, "v_pred": plain})
    used = values(with_ema(held))
    assert used.keys() == {WEIGHT, "v_pred"}
    assert used[WEIGHT] is average
    assert values(without_ema(held)).keys() == {WEIGHT, "v_pred"}
    with pytest.raises(LdmError, match="has no EMA copies"):
        with_ema(source({WEIGHT: plain}))
    with pytest.raises(LdmError, match="no EMA copy of 1, the first model"):
        with_ema(source({WEIGHT: plain, f"{UNET}out.2.bias": plain, ema_name(WEIGHT): average}))
    with pytest.raises(LdmError, match="another shape"):
        with_ema(source({WEIGHT: plain, ema_name(WEIGHT): torch.ones(3)}))


def test_the_formulas_in_float32() -> None:
    a, b, c = (torch.tensor([x, 1 / 3]).half() for x in (1.0, 3.0, 2.5))
    first, second, minus = (source({WEIGHT: t}) for t in (a, b, c))
    assert torch.equal(values(weighted(first, second, 0.3))[WEIGHT], (0.7 * a.float() + 0.3 * b.float()).half())
    assert torch.equal(values(weighted(first, second, 0.0))[WEIGHT], a)
    assert torch.equal(values(weighted(first, second, 1.0))[WEIGHT], b)
    added = values(add_difference(first, second, minus, 2.0))[WEIGHT]
    assert added.tolist() == [2.0, a[1].item()]
    assert added.dtype == torch.float16
    assert a.tolist() == [1.0, a[1].item()]  # the inputs stay as they are


def test_what_only_the_first_has_stays() -> None:
    first = {WEIGHT: torch.zeros(2), "betas": torch.zeros(2), f"{UNET}extra": torch.zeros(1)}
    merged = values(weighted(source(first), source({WEIGHT: torch.ones(2), "betas": torch.ones(2)}), 0.5))
    assert merged[WEIGHT].tolist() == [0.5, 0.5]
    assert merged["betas"] is first["betas"]
    assert merged[f"{UNET}extra"] is first[f"{UNET}extra"]


def test_what_has_no_partner() -> None:
    one, none = torch.zeros(1), source({})
    assert unpaired(source({WEIGHT: one, "betas": one, ema_name(WEIGHT): one}), none) == [WEIGHT]
    assert unpaired(source({WEIGHT: one}), source({WEIGHT: one})) == []


def test_an_inpainting_model_learns_from_models_without_a_mask() -> None:
    wide, narrow = torch.zeros(2, 9, 3, 3), torch.ones(2, 4, 3, 3)
    inpainting = source({FIRST_CONVOLUTION: wide})
    merged = values(add_difference(inpainting, source({FIRST_CONVOLUTION: narrow}),
                                   source({FIRST_CONVOLUTION: narrow / 2}), 1.0))[FIRST_CONVOLUTION]  # fmt: skip
    assert (merged[:, :4] == 0.5).all()
    assert (merged[:, 4:] == 0).all()
    with pytest.raises(LdmError, match="two families"):
        weighted(source({FIRST_CONVOLUTION: narrow}), inpainting, 0.5)


def test_models_that_do_not_go_together() -> None:
    with pytest.raises(LdmError, match=r"two families: .* is \(2,\) in one and \(3,\) in the other"):
        weighted(source({WEIGHT: torch.ones(2)}), source({WEIGHT: torch.ones(3)}), 0.5)
    with pytest.raises(LdmError, match="no tensor in common"):
        weighted(source({WEIGHT: torch.ones(2)}), source({"x": torch.ones(2)}), 0.5)
    large = source({WEIGHT: torch.full((2,), 60000.0).half()})
    with pytest.raises(LdmError, match="not finite"):
        values(add_difference(large, large, source({WEIGHT: torch.zeros(2).half()}), 1.0))


def test_the_tiny_layout_has_no_two_names_without_dots() -> None:
    with torch.device("meta"):
        names = [UNET + name for name in UNet(tiny(sd1()).unet).state_dict()]
    assert len({ema_name(name) for name in names}) == len(names)
