"""Every layout comes out under the canonical names, bit for bit, as the libraries that write it mean it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, sdxl_refiner, tiny
from ldm.pipeline.load import load
from ldm.weights import io
from ldm.weights.detect import detect
from ldm.weights.io import read_header, read_tensors
from ldm.weights.layout import CLIP, FIRST_STAGE, TEXT, UNET
from ldm.weights.source import Source, open_source, with_part

SYSTEMS = {"sd1": tiny(sd1()), "sd2": tiny(sd2("v")), "sdxl": tiny(sdxl()), "refiner": tiny(sdxl_refiner())}
FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."

Weights = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def weights(tiny_file: Callable[[SystemConfig], Path]) -> Weights:
    """The tensors of a tiny system, as a file of another program has them."""
    return lambda name: load_file(tiny_file(SYSTEMS[name]))


def written(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, metadata=metadata)
    return path


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_holds(source: Source, expected: Mapping[str, Tensor]) -> None:
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    read = dict(source.read(expected))
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def whole(path: Path, **options: Any) -> dict[str, Tensor]:
    """All weights of a loaded model."""
    model = load(path, dtype="float32", **options)
    parts = {"unet": model.unet, "vae": model.autoencoder, **{f"text{i}": t for i, t in enumerate(model.text)}}
    return {f"{part}.{name}": t for part, network in parts.items() for name, t in network.state_dict().items()}


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# One file.


@pytest.mark.parametrize(
    ("system", "prefix"),
    [("sd1", UNET), ("sdxl", UNET), ("sd1", FIRST_STAGE), ("sd2", CLIP), ("sd1", f"{TEXT}transformer.")],
)
def test_a_part_with_bare_names_or_under_its_prefix(system: str, prefix: str, weights: Weights, tmp_path: Path) -> None:
    bare = under(weights(system), prefix)
    expected = prefixed(bare, prefix)
    assert_holds(open_source(written(bare, tmp_path / "bare.safetensors")), expected)
    assert_holds(open_source(written(expected, tmp_path / "prefixed.safetensors")), expected)


def test_other_files_keep_their_names(tmp_path: Path) -> None:
    """A ControlNet has a U-Net's first half in bare names; a LoRA may end like a network's tensor."""
    for names in (
        ("input_hint_block.0.weight", "input_blocks.0.0.weight", "time_embed.0.weight"),
        ("control_model.input_blocks.0.0.weight",),
        ("down_blocks.0.attentions.0.processor.to_q_lora.down.weight",),
        ("emb_params",),
    ):
        tensors = {name: torch.ones(2, 2) for name in names}
        assert_holds(open_source(written(tensors, tmp_path / "x.safetensors")), tensors)


def test_a_window_is_given_back_with_its_last_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.full((100, 11), i, dtype=torch.float16) for i in range(20)} | {"none": torch.ones(0, 3)}
    path = written(tensors, tmp_path / "only-here.safetensors")
    monkeypatch.setattr(io, "WINDOW", 5000)
    header = read_header(path)
    held = []
    for name, tensor in read_tensors(header, tensors):
        assert torch.equal(tensor, tensors[name])
        held = [tensor, *held][:2]
        if Path("/proc/self/maps").exists():
            assert Path("/proc/self/maps").read_text().count(str(path)) <= 3
    del held, tensor
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_many_windows_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(3000)}
    monkeypatch.setattr(io, "WINDOW", 16 * 100)
    header = read_header(written(tensors, tmp_path / "x.safetensors"))
    read = dict(read_tensors(header, tensors))
    assert equal(read, tensors)


# Shards.


@pytest.fixture
def sharded(weights: Weights, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in several files, as the hub's library writes it."""
    tensors = weights("sd1")
    save_torch_state_dict(tensors, tmp_path, filename_pattern="model{suffix}.safetensors", max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    return tmp_path / "model.safetensors.index.json", tensors


def test_shards_are_one_source(sharded: tuple[Path, dict[str, Tensor]], tiny_file: Any) -> None:
    path, tensors = sharded
    assert_holds(open_source(path), tensors)
    assert equal(whole(path), whole(tiny_file(SYSTEMS["sd1"])))


def test_an_index_with_a_variant_in_its_name(sharded: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = sharded
    assert_holds(open_source(path.rename(path.with_name("model.safetensors.index.fp16.json"))), tensors)


def test_shards_may_be_pickles(weights: Weights, tmp_path: Path) -> None:
    tensors = under(weights("sd1"), FIRST_STAGE)
    halves = (dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2]))
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / f"m-{i}.bin")
    weight_map = {name: f"m-{i}.bin" for i, half in enumerate(halves) for name in half}
    path = tmp_path / "m.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(open_source(path, allow_pickle=True), prefixed(tensors, FIRST_STAGE))
    with pytest.raises(LdmError, match="--allow-pickle"):
        open_source(path)


def index_refusal(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(LdmError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "x.safetensors:y.safetensors", ".x.safetensors", "x.ckpt", "", "x\n.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_a_shard_lies_in_the_same_folder(shard: Any, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "m.index.json"
    written({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "expected a .safetensors file in the same folder" in index_refusal(path, {"weight_map": {"a": shard}})


def test_broken_indexes(tmp_path: Path) -> None:
    path = tmp_path / "m.index.json"
    written({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "is no JSON" in index_refusal(path, "{")
    assert "is no JSON" in index_refusal(path, "[" * 100_000)
    assert "is no JSON object" in index_refusal(path, "[]")
    assert "has no weight_map" in index_refusal(path, {})
    assert "has no weight_map" in index_refusal(path, {"weight_map": {}})
    assert "tensors, at most" in index_refusal(path, {"weight_map": {str(i): "x.safetensors" for i in range(20_001)}})
    assert "y.safetensors: no such file" in index_refusal(path, {"weight_map": {"a": "y.safetensors"}})
    assert "x.safetensors lacks b" in index_refusal(path, {"weight_map": {"b": "x.safetensors"}})
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    assert "incomplete" in index_refusal(path, {"weight_map": {"a": "x.safetensors"}})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LdmError, match="is no JSON"):
        open_source(path)


# Parts from other files.


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_in_parts_is_the_whole(system: str, weights: Weights, tmp_path: Path, tiny_file: Any) -> None:
    """The U-Net is the model, everything else is added to it; text encoders in the names that each tool uses."""
    tensors = weights(system)
    unet = written(under(tensors, UNET), tmp_path / "unet.safetensors", {"modelspec.prediction_type": "v"})
    vae = written(under(tensors, FIRST_STAGE), tmp_path / "vae.safetensors")
    towers = []
    for home in (f"{FIRST}model.", f"{SECOND}model.", f"{FIRST}transformer.", CLIP, f"{TEXT}transformer."):
        if tower := under(tensors, home):
            towers.append(written(tower, tmp_path / f"{home}safetensors"))
    parts = whole(unet, vae=vae, text_encoder=towers)
    assert equal(parts, whole(tiny_file(SYSTEMS[system])))
    if len(towers) == 1:
        assert equal(whole(unet, vae=vae, text_encoder=towers[0]), parts)


def test_an_autoencoder_from_another_file(weights: Weights, tmp_path: Path) -> None:
    tensors = weights("sd1")
    path = written(tensors, tmp_path / "model.safetensors")
    other = written({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    before, after = whole(path), whole(path, vae=other)
    for name, tensor in after.items():
        changed = (tensors[FIRST_STAGE + name[4:]] + 1).float() if name.startswith("vae.") else before[name]
        assert torch.equal(tensor, changed)
    rules = load(path, vae=other).origin.rules
    assert f"vae: from {other}" in rules


@pytest.mark.parametrize(("said", "scale"), [("0.13025", 0.13025), ("inf", 0.18215), ("a lot", 0.18215)])
def test_an_autoencoder_says_its_scale(said: str, scale: float, weights: Weights, tmp_path: Path) -> None:
    tensors = weights("sd1")
    path = written(tensors, tmp_path / "model.safetensors")
    other = written(under(tensors, FIRST_STAGE), tmp_path / "vae.safetensors", {"ldm.scale_factor": said})
    source = with_part(open_source(path), FIRST_STAGE, open_source(other))
    assert detect(source).config.autoencoder.scale_factor == scale


def test_each_of_two_towers_takes_the_place_of_its_kind(weights: Weights, tmp_path: Path) -> None:
    tensors = weights("sdxl")
    source = open_source(written(tensors, tmp_path / "model.safetensors"))
    for home in (f"{FIRST}transformer.", f"{SECOND}model."):
        tower = {name: tensor + 1 for name, tensor in under(tensors, home).items()}
        other = open_source(written(tower, tmp_path / "tower.safetensors"))
        assert_holds(with_part(source, TEXT, other), tensors | prefixed(tower, home))


def test_what_config_files_say_of_a_part_goes_with_it(weights: Weights, tmp_path: Path) -> None:
    tensors = weights("sdxl")
    source = open_source(written(tensors, tmp_path / "model.safetensors"))
    facts = {"text.0.heads": "4", "scale_factor": "0.5", "heads": "3"}
    tower = Source(tmp_path, prefixed_infos(source, f"{SECOND}model.", CLIP), {}, source.read, facts=facts)
    assert with_part(source, TEXT, tower).facts == {"text.1.heads": "4"}
    vae = Source(tmp_path, prefixed_infos(source, FIRST_STAGE, FIRST_STAGE), {}, source.read, facts=facts)
    assert with_part(source, FIRST_STAGE, vae).facts == {"scale_factor": "0.5"}


def test_what_config_files_say_of_the_other_tower_stays(weights: Weights, tmp_path: Path) -> None:
    base = open_source(written(weights("sdxl"), tmp_path / "model.safetensors"))
    source = replace(base, facts={"text.0.heads": "2", "text.1.heads": "3", "text.1.skip": "0", "size": "96"})
    tower = Source(tmp_path, prefixed_infos(base, f"{SECOND}model.", CLIP), {}, base.read, facts={"text.0.heads": "4"})
    assert with_part(source, TEXT, tower).facts == {"text.0.heads": "2", "text.1.heads": "4", "size": "96"}


def prefixed_infos(source: Source, old: str, new: str) -> dict[str, Any]:
    return {new + n.removeprefix(old): info for n, info in source.tensors.items() if n.startswith(old)}


def test_a_part_that_is_not_there(weights: Weights, tmp_path: Path) -> None:
    tensors = weights("sd1")
    unet = written(under(tensors, UNET), tmp_path / "unet.safetensors")
    with pytest.raises(LdmError, match=r"unet\.safetensors: has no autoencoder; expected a file with one"):
        load(unet, vae=unet)
    with pytest.raises(LdmError, match="has no text encoder"):
        load(unet, text_encoder=unet)
    with pytest.raises(LdmError, match=r"without autoencoder and text encoder; .* --vae FILE --text-encoder FILE"):
        load(unet)
    with pytest.raises(LdmError, match="two families"):
        sd2_tower = written(under(weights("sd2"), CLIP), tmp_path / "tower.safetensors")
        wide = {name: torch.cat([t, t], 1) if "attn2.to_k" in name else t for name, t in tensors.items()}
        load(written(wide, tmp_path / "wide.safetensors"), text_encoder=sd2_tower)


# What config files say is evidence.


def test_facts_decide_what_shapes_cannot_tell(weights: Weights, tmp_path: Path) -> None:
    path = written(weights("sd2"), tmp_path / "model.safetensors")
    base = open_source(path)

    def config(**facts: str) -> SystemConfig:
        named = {key.replace("_", ".") if key.startswith("text") else key: value for key, value in facts.items()}
        return detect(Source(path, base.tensors, {}, base.read, facts=named)).config

    assert config(heads="2").unet.heads == 2
    assert config(head_width="16").unet.head_width == 16
    assert config(scale_factor="0.5").autoencoder.scale_factor == 0.5
    assert config(size="96").size == 96
    assert config(zero_terminal_snr="true").zero_terminal_snr
    assert not config().zero_terminal_snr
    assert (config(prediction="v").prediction, config(prediction="eps").prediction) == ("v", "eps")
    assert config(text_0_heads="4").text[0].tower.heads == 4
    assert config(text_0_activation="quick_gelu").text[0].tower.activation == "quick_gelu"
    assert (config().text[0].skip, config(text_0_skip="0").text[0].skip) == (1, 0)
    for facts in ({"heads": "0"}, {"heads": "x"}, {"scale_factor": "-1"}, {"scale_factor": "nan"}, {"heads": "7"}):
        with pytest.raises(LdmError, match="config files say"):
            config(**facts)


def test_a_tower_without_projection_serves_where_nothing_is_pooled(weights: Weights, tmp_path: Path) -> None:
    def without(system: str, name: str) -> Path:
        tensors = {key: tensor for key, tensor in weights(system).items() if key != name}
        return written(tensors, tmp_path / f"{system}.safetensors", {"modelspec.prediction_type": "v"})

    assert load(without("sd2", f"{CLIP}text_projection")).config.text[0].tower.projection is None
    with pytest.raises(LdmError, match="text_projection is missing"):
        load(without("sdxl", f"{SECOND}model.text_projection"))
