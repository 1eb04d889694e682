"""Adapters on whole networks: diffusers, peft and LyCORIS put theirs on the same weights, write the file, and their
outputs are the truth; then what only a stack of them, or taking them off, can show."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from test_pipeline_parity import DDIM, LEADING, SEEDS, assert_same, their_arguments, their_pipeline
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.layers.convolution import fastest_layout
from ldm.layers.embeddings import sinusoidal_embedding
from ldm.models.presets import sd1, sd2, sdxl, tiny
from ldm.models.tokenizer import END, tokenize
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.picture import Picture, parameters_text
from ldm.pipeline.request import GenerateRequest
from ldm.types import Conditioning
from ldm.weights.adapters.read import Adapter, read_adapter

LAYOUTS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}
SIZES = [64, 64, 0, 0, 64, 64]
UNET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1",
                "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "conv_in", "linear_1"]  # fmt: skip
TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "lora, by root of rank": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "lora, alphas": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_q": 11, "fc1": 9, "conv2": 2}},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    return {name: random_system(tiny(preset()), seed=index) for index, (name, preset) in enumerate(LAYOUTS.items())}


@pytest.fixture(scope="module")
def originals(models: dict[str, LatentDiffusion]) -> dict[str, Any]:
    """diffusers' pipelines of the same weights."""
    scheduler = diffusers.DDIMScheduler(**LEADING, **DDIM)
    return {name: their_pipeline(model, defaultdict(lambda: None), scheduler) for name, model in models.items()}


@pytest.fixture
def pipelines(originals: dict[str, Any]) -> dict[str, Any]:
    """The same, to put adapters on."""
    return copy.deepcopy(originals)


def peft_config(config: str, modules: list[str]) -> LoraConfig:
    options = dict(CONFIGS[config])
    if "alpha_pattern" in options:
        options["alpha_pattern"] = {name: alpha for name, alpha in options["alpha_pattern"].items() if name in modules}
    return LoraConfig(**options, target_modules=modules)


def networks_of(pipeline: Any) -> dict[str, Any]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: network for name in names if (network := getattr(pipeline, name, None)) is not None}


def shake(network: nn.Module, *marks: str) -> None:
    """Random numbers in the adapter's tensors, which start as no change; near their start for magnitudes."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "magnitude" in name or "dora_scale" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif any(mark in name for mark in marks):
                parameter.copy_(0.2 * torch.randn_like(parameter))


def outputs_of_ours(model: LatentDiffusion) -> list[Tensor]:
    """The U-Net's output and each tower's states on fixed inputs."""
    x, timestep, cross, pooled, ids = inputs(model)
    vector = None
    if pooled is not None:
        features = sinusoidal_embedding(torch.tensor(SIZES), 256).reshape(1, -1).repeat(2, 1)
        vector = torch.cat([pooled, features], dim=1)
    with torch.no_grad():
        out = [model.unet(x, timestep, Conditioning(cross=cross, vector=vector))]
        for tower, use in zip(model.text, model.config.text, strict=True):
            encoded = tower(ids, use.skip, use.final_norm, use.pooled)
            out += [encoded.states] if encoded.pooled is None else [encoded.states, encoded.pooled]
    return out


def outputs_of_theirs(model: LatentDiffusion, networks: dict[str, Any]) -> list[Tensor]:
    x, timestep, cross, pooled, ids = inputs(model)
    sizes = torch.tensor([SIZES, SIZES], dtype=torch.float32)
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
    out = []
    with torch.no_grad():
        for name, network in networks.items():
            if name == "unet":
                out.append(network(x, timestep, encoder_hidden_states=cross, added_cond_kwargs=added).sample)
                continue
            encoded = network(ids, output_hidden_states=True)
            whole = model.config.family != "sdxl"
            out.append(encoded.last_hidden_state if whole else encoded.hidden_states[-2])
            if name == "text_encoder_2":
                out.append(encoded.text_embeds)
    return out


def inputs(model: LatentDiffusion) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    unet = model.config.unet
    x = torch.randn(2, 4, 16, 16, generator=generator)
    assert unet.context_width is not None
    cross = torch.randn(2, 7, unet.context_width, generator=generator)
    pooled = torch.randn(2, unet.vector_width - 256 * 6, generator=generator) if unet.vector_width else None
    ids = torch.randint(0, END - 1, (2, 77), generator=generator)
    ids[:, 20:] = END
    return x, torch.tensor([12, 700]), cross, pooled, ids


def assert_same_networks(model: LatentDiffusion, base: LatentDiffusion, pipeline: Any, moved: str = "both") -> None:
    """Our outputs equal theirs to 1e-4 of their size, and the adapter made a difference to those it is for."""
    pairs = zip(
        outputs_of_ours(model), outputs_of_ours(base), outputs_of_theirs(base, networks_of(pipeline)), strict=True
    )
    for index, (ours, before, theirs) in enumerate(pairs):
        scale = float(theirs.abs().max())
        if moved == "both" or (index == 0) == (moved == "unet"):
            assert float((ours - before).abs().max()) > 0.01 * scale
        assert float((ours - theirs).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize(
    ("layout", "config", "old_names"),
    [
        *(("sd1", config, False) for config in CONFIGS),
        ("sd1", "lora", True),
        ("sd1", "dora", True),
        ("sd2", "dora", False),
        ("sdxl", "dora", False),
        ("sdxl", "lora, alphas", False),
    ],
)
def test_diffusers_writes(layout, config, old_names, models, pipelines, tmp_path):
    """With peft's names, and with those of its own that it had before."""
    model, pipeline = models[layout], pipelines[layout]
    networks = networks_of(pipeline)
    layers = {}
    for name, network in networks.items():
        modules = UNET_MODULES if name == "unet" else TEXT_MODULES
        network.add_adapter(peft_config(config, modules))
        shake(network, "lora_")
        state = get_peft_model_state_dict(network)
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state) if old_names else state
    type(pipeline).save_lora_weights(tmp_path, **layers, **_collate_lora_metadata(networks))
    assert_same_networks(model.with_adapters([(read_adapter(tmp_path), 1)]), model, pipeline)


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_writes(config, models, pipelines, tmp_path):
    """Its own folder: names under `base_model.model.`, its config beside the file."""
    model, pipeline = models["sd2"], pipelines["sd2"]
    pipeline.text_encoder = get_peft_model(pipeline.text_encoder, peft_config(config, TEXT_MODULES))
    shake(pipeline.text_encoder, "lora_")
    pipeline.text_encoder.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert all(module.startswith("base_model.model.") for module in adapter.parts)
    assert adapter.name == tmp_path.name
    assert_same_networks(model.with_adapters([(adapter, 1)]), model, pipeline, moved="text")


def kohya_modules(network: nn.Module, prefix: str, blocks: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Kohya's names of what its scripts train: linear layers and convolutions inside blocks of these classes."""
    for path, block in network.named_modules():
        if type(block).__name__ in blocks:
            for inner, module in block.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    yield f"{prefix}_{path}.{inner}".replace(".", "_"), module


def kohya_tensors(module: nn.Module, rank: int = 4, alpha: float = 3.0) -> dict[str, Tensor]:
    """The three tensors of the published table."""
    out, ins, *kernel = module.weight.shape  # type: ignore[union-attr]
    ones = [1] * len(kernel)
    return {
        "lora_down.weight": 0.2 * torch.randn(rank, ins, *kernel),
        "lora_up.weight": 0.2 * torch.randn(out, rank, *ones),
        "alpha": torch.tensor(alpha),
    }


DIFFUSERS_BLOCKS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
ORIGINAL_BLOCKS = ("SpatialTransformer", "ResBlock", "Downsample", "Upsample")
TEXT_BLOCKS = ("CLIPAttention", "CLIPMLP")
TEXT_PREFIXES = {"sd1": ("lora_te",), "sd2": ("lora_te",), "sdxl": ("lora_te1", "lora_te2")}


def kohya_file(layout: str, model: LatentDiffusion, pipeline: Any, original_names: bool, path: Path) -> Adapter:
    modules: dict[str, nn.Module] = {}
    if original_names:
        modules |= kohya_modules(model.unet, "lora_unet", ORIGINAL_BLOCKS)
    else:
        modules |= kohya_modules(pipeline.unet, "lora_unet", DIFFUSERS_BLOCKS)
    texts = [network for name, network in networks_of(pipeline).items() if name != "unet"]
    for prefix, text in zip(TEXT_PREFIXES[layout], texts, strict=True):
        for name, module in kohya_modules(text, prefix, TEXT_BLOCKS):
            stem = name.removeprefix(f"{prefix}_").removeprefix("text_model_")  # which their newer version leaves out
            modules[f"{prefix}_text_model_{stem}"] = module
    tensors = {
        f"{name}.{role}": tensor for name, module in modules.items() for role, tensor in kohya_tensors(module).items()
    }
    save_file(tensors, path)
    return read_adapter(path)


@pytest.mark.parametrize(
    ("layout", "original_names"), [("sd1", False), ("sd2", False), ("sdxl", False), ("sdxl", True)]
)
def test_kohya_names(layout, original_names, models, pipelines, tmp_path):
    model, pipeline = models[layout], pipelines[layout]
    path = tmp_path / "kohya.safetensors"
    adapter = kohya_file(layout, model, pipeline, original_names, path)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert_same_networks(model.with_adapters([(adapter, 1)]), model, pipeline)


def test_numbers_of_modules_are_the_published_ones():
    """SD 1.5: 192 modules in the U-Net and 72 in CLIP-L; SD 2 with 23 layers 138; all have a place here."""
    from ldm.weights.adapters.names import targets
    from ldm.weights.layout import build

    for preset, text_count in ((sd1(), 72), (sd2(), 24 * 6)):
        networks = build(preset).by_prefix().items()
        shapes = {
            prefix + name: tuple(t.shape) for prefix, network in networks for name, t in network.state_dict().items()
        }
        places = targets(preset, shapes)
        unet = [n for n in places if n.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_"))]
        linear = [n for n in unet if "_attentions_" in n and "norm" not in n]
        text = [n for n in places if n.startswith("lora_te_text_model_encoder") and "norm" not in n]
        assert (len(linear), len(text)) == (192, text_count)


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon", "use_tucker": True, "train_norm": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "loha": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "ia3": {"algo": "ia3"},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_writes(kind, models, pipelines, tmp_path):
    model, pipeline = models["sd1"], pipelines["sd1"]
    LycorisNetwork.LORA_PREFIX = "lycoris"
    network = create_lycoris(
        pipeline.unet, 1.0, linear_dim=4, linear_alpha=2, conv_dim=2, conv_alpha=1, **LYCORIS[kind]
    )
    network.apply_to()
    shake(network, "lora_", "hada_", "lokr_", "_norm", "weight")
    network.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, {})
    adapter = read_adapter(tmp_path / "lycoris.safetensors")
    assert_same_networks(model.with_adapters([(adapter, 1)]), model, pipeline, moved="unet")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_is_the_sum_of_its_changes(layout, models, stack):
    model = models[layout]
    adapters = stack(layout, 3)
    strengths = [(0.7, 0.7), (-0.4, 1.5), (1.0, 0.0)]
    alone = [weights(model.with_adapters([adapter])) for adapter in adapters]
    stacked = weights(model.with_adapters([(a, *s) for a, s in zip(adapters, strengths, strict=True)]))
    for name, before in weights(model).items():
        side = 0 if name.startswith("unet") else 1
        change = sum(s[side] * (one[name] - before) for s, one in zip(strengths, alone, strict=True))
        assert isinstance(change, Tensor)
        torch.testing.assert_close(stacked[name], before + change, rtol=1e-5, atol=1e-5)


@pytest.fixture
def stack(
    models: dict[str, LatentDiffusion], originals: dict[str, Any], tmp_path: Path
) -> Callable[..., list[Adapter]]:
    """stack(layout, n) -> adapters for a model, each of other random numbers."""

    def make(layout: str, count: int = 1) -> list[Adapter]:
        paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")[:count]]
        return [kohya_file(layout, models[layout], originals[layout], False, path) for path in paths]

    return make


def weights(model: LatentDiffusion) -> dict[str, Tensor]:
    networks = {"unet": model.unet, **{f"text {index}": tower for index, tower in enumerate(model.text)}}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


REQUEST = GenerateRequest(
    prompt="a red apple", width=64, height=64, steps=2, sampler="ddim", guidance=4.0, seed=SEEDS[0]
)


def test_on_and_off(models, stack):
    """The picture before, with and after: the old model stays bit for bit, and so does one it is taken off again."""
    model = models["sd1"]
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    plain = model.generate(REQUEST)[0].image.tobytes()
    adapters = stack("sd1", 2)
    with_one = model.with_adapters([(adapters[0], 1.0)])
    changed = with_one.generate(REQUEST)[0].image.tobytes()
    other = with_one.with_adapters([(adapters[1], 0.5)])  # in place of the first
    assert changed != plain
    assert model.generate(REQUEST)[0].image.tobytes() == plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    off = other.with_adapters([])
    assert off.adapters == () and not off.originals
    assert all(t.data_ptr() == weights(model)[name].data_ptr() for name, t in weights(off).items())
    assert off.generate(REQUEST)[0].image.tobytes() == plain
    direct = weights(model.with_adapters([(adapters[1], 0.5)]))
    assert all(torch.equal(tensor, direct[name]) for name, tensor in weights(other).items())


def test_untouched_tensors_are_shared(models, tmp_path):
    model = models["sd1"]
    path = tmp_path / "one.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 64), f"{name}.lora_up.weight": torch.ones(64, 2)}, path)
    changed = model.with_adapters([(read_adapter(path), 0.5)])
    assert changed.autoencoder is model.autoencoder
    assert changed.text[0] is model.text[0]
    before = weights(model)
    moved = [n for n, tensor in weights(changed).items() if tensor.data_ptr() != before[n].data_ptr()]
    assert moved == ["unet.middle_block.1.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(weights(changed)[moved[0]], before[moved[0]] + 1.0)


def test_merged_into_a_file(models, stack, tmp_path):
    """What is saved with adapters on and loaded again draws the same picture."""
    model = models["sdxl"]
    adapted = model.with_adapters([(stack("sdxl")[0], 0.8)])
    save_checkpoint(adapted, tmp_path / "merged.safetensors")
    merged = load(tmp_path / "merged.safetensors", dtype="float32")
    for ours, theirs in zip(outputs_of_ours(adapted), outputs_of_ours(merged), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert adapted.generate(REQUEST)[0].image.tobytes() == merged.generate(REQUEST)[0].image.tobytes()


def test_a_whole_picture(models, pipelines, tmp_path):
    model, pipeline = models["sd1"], pipelines["sd1"]
    adapter = kohya_file("sd1", model, pipeline, False, tmp_path / "kohya.safetensors")
    pipeline.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    request = REQUEST.changed(count=len(SEEDS), negative="blurry", schedule="leading")
    embeds = [
        pipeline.text_encoder(torch.tensor([tokenize(text, 77, END)])).last_hidden_state.detach()
        for text in (request.prompt, request.negative)
    ]
    arguments = their_arguments(request) | {"prompt": None, "negative_prompt": None}
    theirs = pipeline(**arguments, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1]).images
    assert_same(model.with_adapters([(adapter, 1)]), request, theirs)


def test_half_precision_is_rounded_once(models, stack):
    """Changes are added in float32 and cast once, whatever the model's precision."""
    model = models["sd1"]
    adapters = stack("sd1", 2)
    half = random_system(model.config, seed=0, dtype=torch.bfloat16)
    wide = random_system(model.config, seed=0, dtype=torch.bfloat16)
    for network in (wide.unet, *wide.text):
        assert isinstance(network, nn.Module)
        network.float()
    choices = [(adapter, 0.3) for adapter in adapters]
    exact = weights(wide.with_adapters(choices))
    for name, tensor in weights(half.with_adapters(choices)).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16())
        assert tensor.stride() == fastest_layout(tensor).stride()


def test_pictures_say_their_adapters(models, stack, tmp_path):
    model = models["sd1"]
    one, two = stack("sd1", 2)
    picture = model.with_adapters([(one, 0.5), (two, 0.25, 1)]).generate(REQUEST.changed(steps=1))[0]
    assert f'Lora hashes: "one: {one.hash}, two: {two.hash}"' in parameters_text(picture)
    record = read_metadata(picture.save(tmp_path / "a.png")).record
    assert record is not None
    assert record["adapters"] == [
        {"name": "one", "hash": one.hash, "unet": 0.5, "text": 0.5},
        {"name": "two", "hash": two.hash, "unet": 0.25, "text": 1.0},
    ]
    plain = model.generate(REQUEST.changed(steps=1))[0]
    assert isinstance(plain, Picture)
    assert "Lora hashes" not in parameters_text(plain)


def test_wrong_base_says_what_it_is_for(models, stack):
    adapter = stack("sdxl")[0]
    with pytest.raises(
        LdmError, match=r"one\.safetensors: does not suit this sd1 model: .* match nothing in it: lora_te2"
    ):
        models["sd1"].with_adapters([(adapter, 1)])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "1"])
def test_bad_weights(weight, models, stack):
    adapter = stack("sd1")[0]
    with pytest.raises(LdmError, match="expected a finite number"):
        models["sd1"].with_adapters([(adapter, weight)])


def test_the_same_adapter_twice(models, stack):
    adapter = stack("sd1")[0]
    with pytest.raises(LdmError, match=r"one\.safetensors: is given twice"):
        models["sd1"].with_adapters([(adapter, 1), (adapter, 0.5)])


def test_overflow_is_an_error(models, stack):
    model = random_system(models["sd1"].config, dtype=torch.float16)
    adapter = stack("sd1")[0]
    with pytest.raises(LdmError, match=r"is not finite in torch\.float16; lower their weights"):
        model.with_adapters([(adapter, 1e6)])
