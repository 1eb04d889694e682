"""Adapters in training, and their files: what peft's layers do inside of our networks is what the file does here, in
diffusers and in LyCORIS; gradients are those that peft gives on diffusers' networks."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lycoris import LycorisNetwork
from lycoris.wrapper import create_lycoris_from_weights
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.errors import LdmError
from ldm.models.presets import sd1, sd2, sdxl, small, tiny
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.training.adapter_options import AdapterKind, AdapterOptions, network_facts
from ldm.training.adapters import add_adapter, trained_parts
from ldm.types import Conditioning
from ldm.weights.adapters.kinds import Lora
from ldm.weights.adapters.names import modules
from ldm.weights.adapters.read import read_adapter
from ldm.weights.adapters.write import write_adapter
from ldm.weights.hashes import check_full, check_short, full_hashes
from ldm.weights.io import read_header

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))

from test_adapters import (  # isort: skip
    TEXT_BLOCKS, TEXT_PREFIXES, inputs, kohya_modules, networks_of, outputs_of_ours, outputs_of_theirs,
)  # fmt: skip
from test_pipeline_parity import DDIM, LEADING, their_pipeline  # isort: skip

LAYOUTS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "small": small}


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    return {name: random_system(tiny(preset()), seed=index) for index, (name, preset) in enumerate(LAYOUTS.items())}


@pytest.fixture(scope="module")
def originals(models: dict[str, LatentDiffusion]) -> dict[str, Any]:
    """diffusers' pipelines of the same weights."""
    scheduler: Any = diffusers.DDIMScheduler(**LEADING, **DDIM)  # pyright: ignore[reportPrivateImportUsage]
    names = ("sd1", "sd2", "sdxl")
    return {name: their_pipeline(models[name], defaultdict(lambda: None), scheduler) for name in names}


def shaken(model: LatentDiffusion, options: AdapterOptions) -> LatentDiffusion:
    """A model with an adapter that has learned something: other numbers in all that is trained."""
    adapted = add_adapter(model, options)
    with torch.no_grad():
        for parameter in trainable(adapted).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def trainable(model: LatentDiffusion) -> dict[str, torch.nn.Parameter]:
    networks: Any = {"unet": model.unet, **{f"text {index}": tower for index, tower in enumerate(model.text)}}
    return {
        f"{part} {name}": p
        for part, network in networks.items()
        for name, p in network.named_parameters()
        if p.requires_grad
    }


def outputs(model: LatentDiffusion) -> list[torch.Tensor]:
    """The U-Net's output and each tower's states on fixed inputs."""
    if model.config.family != "ldm":
        return outputs_of_ours(model)
    generator = torch.Generator().manual_seed(1)
    unet, (use,) = model.config.unet, model.config.text
    x = torch.randn(2, 4, 16, 16, generator=generator)
    cross = torch.randn(2, 7, unet.context_width or 0, generator=generator)
    vector = torch.randn(2, unet.vector_width or 0, generator=generator)
    ids = torch.randint(0, use.tower.vocabulary, (2, 77), generator=generator)
    with torch.no_grad():
        said = model.text[0](ids, use.skip, use.final_norm, use.pooled)
        assert said.pooled is not None
        return [model.unet(x, torch.tensor([12, 700]), Conditioning(cross, vector)), said.states, said.pooled]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    """Equal to 1e-4 of their size, and not what they were without the adapter."""
    for one, other, plain in zip(ours, theirs, before, strict=True):
        scale = float(other.abs().max())
        assert float((one - plain).abs().max()) > 0.01 * scale
        assert float((one - other).abs().max()) < 1e-4 * scale


OPTIONS: dict[str, AdapterOptions] = {
    "lora": AdapterOptions("lora", rank=4, alpha=6.0, text_rank=3),
    "locon": AdapterOptions("locon", rank=4, alpha=3.0, conv_rank=2, text_rank=4),
    "dora": AdapterOptions("dora", rank=4, conv_rank=4, text_rank=4),
    "loha": AdapterOptions("loha", rank=4, alpha=6.0, conv_rank=2, text_rank=4),
    "lokr": AdapterOptions("lokr", rank=1, alpha=0.5, conv_rank=2, text_rank=1),
    "lokr, whole": AdapterOptions("lokr", rank=8, alpha=4.0, conv_rank=8, text_rank=8),
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("sd1", "lora"), ("sdxl", "locon"), *(("small", kind) for kind in OPTIONS)],
)
def test_the_file_does_what_was_trained(layout, kind, models, tmp_path):
    model = models[layout]
    adapted = shaken(model, OPTIONS[kind])
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, trained_parts(adapted), model.config, dtype=torch.float32)
    with_file = model.with_adapters([(read_adapter(path), 1.0)])
    assert_close(outputs(with_file), outputs(adapted), outputs(model))


@pytest.mark.parametrize(
    ("family", "kind", "layout"),
    [
        ("sd1", "locon", "diffusers"),
        ("sd1", "dora", "diffusers"),  # of kohya's DoRA diffusers leaves the magnitudes away, and says so
        ("sd2", "lora", "kohya"),
        ("sdxl", "locon", "kohya"),
        ("sdxl", "lora", "diffusers"),
    ],
)
def test_diffusers_reads_it(family, kind, layout, models, originals, tmp_path):
    model, pipeline = models[family], copy.deepcopy(originals[family])
    adapted = shaken(model, OPTIONS[kind])
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, trained_parts(adapted), model.config, layout=layout, dtype=torch.float32)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    theirs = outputs_of_theirs(model, networks_of(pipeline))
    assert_close(outputs(adapted), theirs, outputs(model))
    with_file = model.with_adapters([(read_adapter(path), 1.0)])
    assert_close(outputs(with_file), theirs, outputs(model))


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "lokr, whole"])
def test_lycoris_reads_it(kind, models, originals, tmp_path, monkeypatch):
    model, unet = models["sd1"], copy.deepcopy(originals["sd1"].unet)
    adapted = shaken(model, OPTIONS[kind])
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, trained_parts(adapted), model.config, dtype=torch.float32)
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    network, _ = create_lycoris_from_weights(1.0, str(path), unet)
    assert len(network.loras) == sum(target.network == "unet" for target in trained_parts(adapted))
    network.apply_to()
    theirs = outputs_of_theirs(model, {"unet": unet})
    assert_close(outputs(adapted)[:1], theirs, outputs(model)[:1])


@pytest.mark.parametrize(("family", "kind"), [("sd1", "lora"), ("sd2", "locon"), ("sdxl", "locon")])
def test_it_is_where_kohya_has_it(kind, family, models, originals):
    """The layers that kohya's scripts train, but for those of text blocks whose result nobody looks at."""
    model, pipeline = models[family], originals[family]
    blocks = ("Transformer2DModel",) + (("ResnetBlock2D", "Downsample2D", "Upsample2D") if kind == "locon" else ())
    expected = {name for name, _ in kohya_modules(pipeline.unet, "lora_unet", blocks)}
    texts = [network for name, network in networks_of(pipeline).items() if name != "unet"]
    for prefix, text in zip(TEXT_PREFIXES[family], texts, strict=True):
        for name, _ in kohya_modules(text, prefix, TEXT_BLOCKS):
            stem = name.removeprefix(f"{prefix}_").removeprefix("text_model_")
            expected.add(f"{prefix}_text_model_{stem}")
    if family == "sdxl":  # of CLIP-L the last of two blocks is left out, in both programs
        expected = {name for name in expected if not name.startswith("lora_te1_text_model_encoder_layers_1_")}
    parts = trained_parts(add_adapter(model, OPTIONS[kind]))
    assert set(modules(model.config, parts, "kohya").values()) == expected


def test_gradients_and_files_are_those_of_peft_on_diffusers(models, originals, tmp_path):
    """Three steps of a LoRA by peft on their U-Net: gradients equal ours at each; then its file is read here."""
    model, pipeline = models["sd1"], copy.deepcopy(originals["sd1"])
    options = AdapterOptions("locon", rank=4, alpha=6.0)
    adapted = shaken(model, options)
    parts = trained_parts(adapted)
    names = {target: name.removeprefix("unet.") for target, name in modules(model.config, parts, "diffusers").items()}
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=sorted(names.values())))
    theirs = dict(pipeline.unet.named_parameters())
    ours = trainable(adapted)
    pairs = []
    for target, kind in parts.items():
        assert isinstance(kind, Lora)
        path = target.name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for letter, factor in (("A", kind.product.down), ("B", kind.product.up)):
            their_factor = theirs[f"{names[target]}.lora_{letter}.default.weight"]
            with torch.no_grad():
                their_factor.copy_(factor.reshape(their_factor.shape))
            pairs.append((ours[f"unet {path}.lora_{letter}.default.weight"], their_factor))
    assert len(pairs) == len(ours) == sum(p.requires_grad for p in theirs.values())
    x, timestep, cross, _, _ = inputs(model)
    for _ in range(3):
        adapted.unet(x, timestep, Conditioning(cross)).square().mean().backward()
        pipeline.unet(x, timestep, encoder_hidden_states=cross).sample.square().mean().backward()
        largest = max(float(other.grad.abs().max()) for _, other in pairs if other.grad is not None)
        with torch.no_grad():
            for one, other in pairs:
                assert one.grad is not None and other.grad is not None
                torch.testing.assert_close(one.grad, other.grad.reshape(one.shape), rtol=1e-3, atol=1e-5 * largest)
            # A norm of one channel a group takes what the time adds away, so that its layers have no gradient.
            moved = [one for one, _ in pairs if one.grad is not None and float(one.grad.abs().max()) > 1e-4 * largest]
            assert len(moved) > 0.8 * len(pairs)
            for parameter in itertools.chain.from_iterable(pairs):
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    with_file = model.with_adapters([(read_adapter(tmp_path), 1.0)])
    assert_close(outputs(with_file)[:1], outputs(adapted)[:1], outputs(model)[:1])


@pytest.mark.parametrize("kind", ["lora", "locon", "dora", "loha", "lokr"])
def test_at_first_nothing_changes_and_only_the_adapter_learns(kind: AdapterKind, models):
    model = models["small"]
    before = outputs(model)
    adapted = add_adapter(model, AdapterOptions(kind, rank=4, text_rank=4))
    for plain, one in zip(before, outputs(adapted), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)
    marks = ("lora_", "hada_", "lokr_")
    assert all(any(mark in name for mark in marks) for name in trainable(adapted))
    assert any(name.startswith("text 0") for name in trainable(adapted))
    held = {tensor.untyped_storage().data_ptr() for tensor in model.unet.state_dict().values()}
    shared = {tensor.untyped_storage().data_ptr() for tensor in adapted.unet.state_dict().values()}
    assert held <= shared  # no second copy of the base
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    assert not trainable(model)


@pytest.mark.parametrize("kind", ["locon", "dora", "loha", "lokr"])
def test_a_base_of_half_precision_learns_in_float32(kind: AdapterKind):
    model = random_system(tiny(small()), dtype=torch.bfloat16)
    adapted = add_adapter(model, AdapterOptions(kind, rank=4, text_rank=4))
    assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}
    unet = model.config.unet
    cond = Conditioning(torch.randn(1, 5, unet.context_width or 0), torch.randn(1, unet.vector_width or 0))
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    out = adapted.unet(x, torch.tensor([5]), cond.to(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    moved = [p for name, p in trainable(adapted).items() if name.startswith("unet")]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in moved)
    assert sum(bool(p.grad.any()) for p in moved if p.grad is not None) >= len(moved) / 4


def test_the_seed_alone_tells_the_beginning(models):
    options = AdapterOptions("locon", rank=4, text_rank=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trainable(add_adapter(models["small"], options, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (trainable(add_adapter(models["small"], options, seed=seed)) for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_dropout_is_for_training_alone(models):
    adapted = shaken(models["small"], AdapterOptions("lora", rank=4, dropout=0.5))
    still = outputs(adapted)[0]
    assert torch.equal(still, outputs(adapted)[0])
    adapted.unet.train()
    assert not torch.equal(still, outputs(adapted)[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 0}, "rank is 0, expected 1 or more"),
        ({"text_rank": -1}, "text_rank is -1, expected 1 or more"),
        ({"rank": 33}, "rank is 33, expected at most 32, the smaller side of"),
        ({"kind": "locon", "conv_rank": 33}, "rank is 33, expected at most 32"),
        ({"text_rank": 40}, "rank is 40, expected at most 32"),
        ({"alpha": 0.0}, "alpha is 0.0, expected a finite number above 0"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 or more, below 1"),
        ({"conv_rank": 4}, "conv_rank is given for lora"),
    ],
)
def test_what_cannot_be_is_refused(given, said, models):
    with pytest.raises(LdmError) as caught:
        add_adapter(models["small"], AdapterOptions(**given))
    assert said in str(caught.value)


def test_metadata_and_hashes(models, tmp_path):
    """The hashes by kohya's definition: of a file by the safetensors library with the ss_ entries alone."""
    model, path = models["sd1"], tmp_path / "style.safetensors"
    options = AdapterOptions("locon", rank=32, alpha=16.0, conv_rank=16)
    facts = network_facts(options, model.config) | {"ss_steps": "300", "ss_tag_frequency": json.dumps({"a": {"b": 1}})}
    given = facts | {"modelspec.author": "me"}
    write_adapter(path, trained_parts(shaken(model, options)), model.config, metadata=given)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    assert said.items() >= given.items()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert float(tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"]) == 16
    assert float(tensors["lora_unet_mid_block_resnets_0_conv1.alpha"]) == 8
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (said["modelspec.title"], said["modelspec.implementation"]) == ("style", "diffusers")
    assert said["modelspec.prediction_type"] == "epsilon"
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare, facts)
    data = bare.read_bytes()
    assert len(data) > 0x110000
    numbers = data[8 + int.from_bytes(data[:8], "little") :]
    assert said["sshs_model_hash"] == hashlib.sha256(numbers).hexdigest()
    assert said["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    header = read_header(path)
    assert all((check_short(header) | check_full(header, full_hashes(header))).values())
    adapter = read_adapter(path)
    assert adapter.hash == said["sshs_model_hash"][:12]


def test_what_is_said_of_the_network():
    facts = network_facts(AdapterOptions("locon", rank=8, alpha=4.0, conv_rank=2, text_rank=3), sd2("v"))
    assert facts == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_dropout": "0.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1.0", "text_dim": "3"}',
    }
    other = network_facts(AdapterOptions("dora"), sdxl())
    assert (other["ss_base_model_version"], other["ss_v2"]) == ("sdxl_base_v1-0", "False")
    assert other["ss_network_module"] == "lycoris.kohya"
    assert json.loads(other["ss_network_args"]) == {"algo": "locon", "dora_wd": "True"}


@pytest.mark.parametrize(
    ("value", "said"), [(1e6, "is too large for F16; bf16 or fp32 holds it"), (float("nan"), "not finite")]
)
def test_numbers_that_a_file_cannot_hold(value, said, models, tmp_path):
    adapted = shaken(models["small"], AdapterOptions(rank=2))
    with torch.no_grad():
        next(iter(trainable(adapted).values())).fill_(value)
    with pytest.raises(LdmError, match=said):
        write_adapter(tmp_path / "a.safetensors", trained_parts(adapted), models["small"].config)
    assert not list(tmp_path.iterdir())


def test_diffusers_has_no_form_for_the_others(models, tmp_path):
    parts = trained_parts(add_adapter(models["small"], AdapterOptions("loha", rank=2)))
    with pytest.raises(LdmError, match="is of the kind Loha, expected LoRA or DoRA"):
        write_adapter(tmp_path / "a.safetensors", parts, models["small"].config, layout="diffusers")
