"""Adapter files that are wrong end in one line that names what is; what is written beside the tensors is obeyed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, sdxl_refiner, tiny
from ldm.weights.adapters.apply import Use, changed, merged, plan
from ldm.weights.adapters.family import meant_for
from ldm.weights.adapters.kinds import Lora
from ldm.weights.adapters.names import spelled, targets
from ldm.weights.adapters.read import Adapter, read_adapter
from ldm.weights.layout import build

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(tensors, metadata) -> the path of such a file."""

    def save(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, name: str = "a.safetensors") -> Path:
        path = tmp_path / name
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return path

    return save


def lora(module: str = QUERY, rank: int = 2, out: int = 64, ins: int = 64, **more: Any) -> dict[str, Tensor]:
    tensors = {"lora_down.weight": torch.ones(rank, ins), "lora_up.weight": torch.ones(out, rank), **more}
    return {f"{module}.{role}": tensor for role, tensor in tensors.items()}


NAN = torch.tensor(float("nan"))
BAD = {
    "rank 0": (lora(rank=0), "is empty, of shape"),
    "rank above the width": (lora(rank=65), r"has rank 65 for a weight of \(64, 64\)"),
    "alpha NaN": (lora(alpha=NAN), r"\.alpha holds numbers that are not finite"),
    "alpha infinite": (lora(alpha=torch.tensor(float("inf"))), "not finite"),
    "alpha a vector": (lora(alpha=torch.ones(3)), r"\.alpha has shape \(3,\), expected one number"),
    "weights NaN": (lora() | {f"{QUERY}.lora_up.weight": NAN.expand(64, 2).clone()}, "lora_up.weight holds numbers"),
    "whole numbers": (lora() | {f"{QUERY}.lora_up.weight": torch.ones(64, 2, dtype=torch.int32)}, "expected floating"),
    "one half": ({f"{QUERY}.lora_up.weight": torch.ones(64, 2)}, "to_q: lacks its down"),
    "the other half": ({f"{QUERY}.lora_down.weight": torch.ones(2, 64)}, "to_q: lacks its up"),
    "ranks that differ": (lora() | {f"{QUERY}.lora_up.weight": torch.ones(64, 3)}, "do not make a product"),
    "a vector for a matrix": (lora() | {f"{QUERY}.lora_up.weight": torch.ones(64)}, "expected a matrix"),
    "a core of another rank": (lora(**{"lora_mid.weight": torch.ones(3, 3, 3, 3)}), "the core between factors"),
    "alpha alone": ({f"{QUERY}.alpha": torch.tensor(1.0)}, "does nothing"),
    "a magnitude alone": ({f"{QUERY}.dora_scale": torch.ones(64, 1)}, "has dora_scale without what belongs to it"),
    "two names for one": (lora() | {f"{QUERY}.lora_A.weight": torch.ones(2, 64)}, "under another name too"),
    "halves of LoHa that differ": (
        {f"{QUERY}.hada_{name}": torch.ones(64, 2) if name.endswith("a") else torch.ones(2, 64 + (name == "w2_b"))
         for name in ("w1_a", "w1_b", "w2_a", "w2_b")}, "expected equal ones"),
    "OFT": ({f"{QUERY}.oft_blocks": torch.ones(2, 4, 4)}, "not OFT, BOFT, GLoRA"),
    "a checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "1 of its 1 tensors are of no kind"),
    "nothing": ({}, "holds no tensors of an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_file(fault, write):
    tensors, message = BAD[fault]
    with pytest.raises(LdmError, match=message) as caught:
        read_adapter(write(tensors))
    assert str(caught.value).count("\n") == 0
    assert "a.safetensors" in str(caught.value)


def test_names_from_the_file_are_printed_safely(write):
    module = "lora_unet_x" * 30
    with pytest.raises(LdmError) as caught:
        read_adapter(write({f"{module[:200]}.lora_up.weight": torch.ones(2, 2)}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("config", ["[]", "{", '{"unet.lora_alpha": "big"}', '{"unet.lora_alpha": NaN}', "1"])
def test_bad_peft_metadata(config, write):
    with pytest.raises(LdmError, match=r"peft|lora_adapter_metadata"):
        read_adapter(write(lora("unet.x"), {"lora_adapter_metadata": config}))


def test_peft_says_dora_but_has_no_magnitude(write):
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True})
    with pytest.raises(LdmError, match="lacks the magnitude"):
        read_adapter(write(lora("unet.x"), {"lora_adapter_metadata": config}))


SCALES = {
    "no alpha": ({}, None, 1.0),
    "alpha": ({"alpha": torch.tensor(3.0)}, None, 1.5),
    "alpha 0, which trainers take for the rank": ({"alpha": torch.tensor(0.0)}, None, 1.0),
    "alpha of one element": ({"alpha": torch.tensor([3.0])}, None, 1.5),
    "peft's": ({}, {"unet.lora_alpha": 8}, 4.0),
    "peft's, by root of rank": ({}, {"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
    "peft's, for this module": ({}, {"unet.lora_alpha": 8, "unet.alpha_pattern": {"^mid.to_q": 5}}, 2.5),
    "peft's, for another module": ({}, {"unet.lora_alpha": 8, "unet.alpha_pattern": {"id.to_q": 5}}, 4.0),
    "the tensor before peft's": ({"alpha": torch.tensor(3.0)}, {"unet.lora_alpha": 8}, 1.5),
    "peft's of another network": ({}, {"text_encoder.lora_alpha": 8}, 1.0),
}


@pytest.mark.parametrize("case", SCALES)
def test_scale(case, write):
    more, config, expected = SCALES[case]
    metadata = None if config is None else {"lora_adapter_metadata": json.dumps(config)}
    kind = read_adapter(write(lora("unet.mid.to_q", **more), metadata)).parts["unet.mid.to_q"].weight
    assert isinstance(kind, Lora)
    assert kind.scale == pytest.approx(expected)


def test_hash_is_that_of_the_numbers_or_what_kohya_noted(write):
    path = write(lora())
    data = path.read_bytes()
    numbers = data[8 + int.from_bytes(data[:8], "little") :]
    assert read_adapter(path).hash == hashlib.sha256(numbers).hexdigest()[:12]
    assert read_adapter(write(lora(), {"sshs_model_hash": "ab" * 32})).hash == "ab" * 6
    assert read_adapter(write(lora(), {"sshs_model_hash": "../../x"})).hash == hashlib.sha256(numbers).hexdigest()[:12]


def test_bundled_embeddings_are_named_and_left_out(write):
    adapter = read_adapter(write(lora() | {"bundle_emb.cat.string_to_param.*": torch.ones(2, 768)}))
    assert adapter.bundled == ("cat",)
    assert set(adapter.parts) == {QUERY}


def test_pickle_needs_a_word(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(lora(), path)
    with pytest.raises(LdmError, match="--allow-pickle"):
        read_adapter(path)
    adapter = read_adapter(path, allow_pickle=True)
    assert set(adapter.parts) == {QUERY}
    assert adapter.hash == hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_folder_without_an_adapter(tmp_path):
    with pytest.raises(LdmError, match=r"is a folder without adapter_model\.safetensors"):
        read_adapter(tmp_path)


def shapes_of(config: SystemConfig) -> dict[str, tuple[int, ...]]:
    networks = build(config).by_prefix().items()
    return {prefix + name: tuple(t.shape) for prefix, network in networks for name, t in network.state_dict().items()}


def planned(adapter: Adapter, config: SystemConfig) -> list[str]:
    return list(plan(config, shapes_of(config), [Use(adapter)]))


SD1 = tiny(sd1())
Q = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
TEXT_Q = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
SPELLINGS = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": Q,
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": Q,
    "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": Q,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Q,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q": Q,
    "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Q,
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Q,
    "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q": Q,
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q": Q,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out": Q.replace("to_q", "to_out.0"),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": TEXT_Q,
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": TEXT_Q,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": TEXT_Q,
    "text_encoder.encoder.layers.0.self_attn.q_proj": TEXT_Q,
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q": TEXT_Q,
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out": TEXT_Q.replace("q_proj", "out_proj"),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj": TEXT_Q,
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj": TEXT_Q,
}


def test_two_that_tell_one_hash_are_two(write: Write) -> None:
    """kohya's hash is copied along by programs that change the numbers."""
    said = {"sshs_model_hash": "ab" * 32}
    paths = write(lora(), said), write(lora(out=64, rank=3), said, "b.safetensors")
    first, second = map(read_adapter, paths)
    assert first.hash == second.hash == "ab" * 6
    (changes,) = plan(SD1, shapes_of(SD1), [Use(first), Use(second)]).values()
    assert len(changes) == 2
    with pytest.raises(LdmError, match=r"b\.safetensors: is given twice"):
        plan(SD1, shapes_of(SD1), [Use(second), Use(read_adapter(paths[1].parent / "." / "b.safetensors"))])


@pytest.mark.parametrize("module", SPELLINGS)
def test_spelling(module, write):
    size = 32 if "self_attn" in module else 64
    assert planned(read_adapter(write(lora(module, out=size, ins=size))), SD1) == [SPELLINGS[module]]


def test_towers_of_sdxl_and_its_refiner():
    """The second tower's modules are rows of OpenCLIP's joined matrix; the refiner has that tower alone."""
    for preset, home in (
        (sdxl(), "conditioner.embedders.1.model."),
        (sdxl_refiner(), "conditioner.embedders.0.model."),
    ):
        config = tiny(preset)
        places = targets(config, shapes_of(config))
        layer = "text_model_encoder_layers_0_self_attn"
        key = places[f"lora_te2_{layer}_k_proj"]["weight"]
        assert (key.name, key.rows) == (f"{home}transformer.resblocks.0.attn.in_proj_weight", (32, 64))
        assert places[spelled("text_encoder_2.text_projection")]["weight"].transposed
        assert (f"lora_te1_{layer}_k_proj" in places) == (preset.family == "sdxl")
        assert f"lycoris_{layer}_k_proj" in places or preset.family == "sdxl"  # of which tower, with two?


def test_lost_modules_are_listed_ten_at_most(write):
    tensors = {name: t for index in range(12) for name, t in lora(f"lora_unet_nowhere_{index:02}").items()}
    with pytest.raises(LdmError) as caught:
        planned(read_adapter(write(tensors | lora())), SD1)
    message = str(caught.value)
    assert "does not suit this sd1 model: 12 of its 13 modules match nothing in it: lora_unet_nowhere_00," in message
    assert "lora_unet_nowhere_09 and 2 more" in message


def test_misshapen_modules_are_listed(write):
    with pytest.raises(LdmError, match=rf"1 of its 1 modules are of another shape: {QUERY} \(this model's has shape"):
        planned(read_adapter(write(lora(ins=48))), SD1)


def test_no_bias_there(write):
    module = QUERY.replace("attn1_to_q", "attn1_to_k")
    tensors = {f"{module}.diff": torch.ones(64, 64), f"{module}.diff_b": torch.ones(64)}
    with pytest.raises(LdmError, match=r"match nothing in it: .*attn1_to_k \(its bias\)"):
        planned(read_adapter(write(tensors)), SD1)


def test_one_weight_under_two_names(write):
    twin = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(LdmError, match="is there under another name too"):
        planned(read_adapter(write(lora() | lora(twin))), SD1)


CROSS = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
FAMILIES = {
    "width 768": (lora(CROSS, ins=768), {}, "SD 1.x (its text states are 768 wide)"),
    "width 1024": (lora(CROSS, ins=1024), {"ss_base_model_version": "sd_v1"}, "SD 2.x (its text states are 1024 wide)"),
    "width 2048": (lora(CROSS, ins=2048), {}, "SDXL (its text states are 2048 wide)"),
    "kohya's base": (
        lora(),
        {"ss_base_model_version": "sdxl_base_v1-0"},
        "SDXL (ss_base_model_version sdxl_base_v1-0)",
    ),
    "ModelSpec": (lora(), {"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD 1.x (modelspec.architecture"),
    "ss_v2": (lora(), {"ss_v2": "True"}, "SD 2.x (ss_v2)"),
    "second tower": (lora("lora_te2_text_model_encoder_layers_0_mlp_fc1"), {}, "SDXL (it has a second text encoder)"),
    "Flux": (lora("transformer.single_blocks.0.attn.to_q"), {}, "a diffusion transformer"),
    "Flux, kohya": (lora("lora_unet_double_blocks_0_img_attn_qkv"), {}, "a diffusion transformer"),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_what_a_file_is_for(case, write):
    tensors, metadata, expected = FAMILIES[case]
    adapter = read_adapter(write(tensors, metadata or None))
    guess = meant_for(adapter)
    assert guess is not None
    assert guess.startswith(expected)
    with pytest.raises(LdmError, match="looks made for"):
        planned(read_adapter(write(tensors | lora("lora_unet_nowhere"), metadata or None)), tiny(sd2()))


def test_nothing_tells_what_a_file_is_for(write):
    assert meant_for(read_adapter(write(lora()))) is None


def test_merged_tensors_are_made_one_at_a_time(write):
    changes = plan(SD1, shapes_of(SD1), [Use(read_adapter(write(lora())), 0.5)])
    tensors = {"other": torch.ones(3), Q: torch.ones(64, 64, dtype=torch.float16)}
    got = iter(merged(iter(tensors.items()), changes))
    assert next(got)[1] is tensors["other"]
    name, tensor = next(got)
    assert (name, tensor.dtype) == (Q, torch.float16)
    assert torch.equal(tensor, torch.full((64, 64), 2.0, dtype=torch.float16))
    assert torch.equal(tensors[Q], torch.ones(64, 64, dtype=torch.float16))


def test_strength_0_changes_nothing(write):
    adapter = read_adapter(write(lora()))
    assert plan(SD1, shapes_of(SD1), [Use(adapter, 0.0, 1.0)]) == {}
    with pytest.raises(LdmError, match="does not suit"):
        plan(tiny(sdxl()), shapes_of(tiny(sdxl())), [Use(read_adapter(write(lora(ins=48))), 0.0)])


def test_changes_on_slices_and_turned_weights(write):
    """q, k and v of OpenCLIP's joined matrix, each by its own; the projection, which lies the other way round."""
    config = tiny(sdxl())
    layer = "lora_te2_text_model_encoder_layers_0_self_attn"
    up = torch.arange(32.0)[:, None]
    tensors = {
        f"{layer}_v_proj.lora_up.weight": up,
        f"{layer}_v_proj.lora_down.weight": torch.ones(1, 32),
        "lora_te2_text_projection.lora_up.weight": up.clone(),
        "lora_te2_text_projection.lora_down.weight": torch.ones(1, 32),
    }
    changes = plan(config, shapes_of(config), [Use(read_adapter(write(tensors)))])
    home = "conditioner.embedders.1.model."
    joined = changed(torch.zeros(96, 32), changes[f"{home}transformer.resblocks.0.attn.in_proj_weight"])
    assert torch.equal(joined, torch.cat([torch.zeros(64, 32), up.expand(32, 32)]))
    assert torch.equal(changed(torch.zeros(32, 32), changes[f"{home}text_projection"]), up.expand(32, 32).T)
