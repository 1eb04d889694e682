"""Files to models and back: every layout bit-equal, as diffusers reads it, and each refusal in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sd_x4_upscaler, sdxl, sdxl_refiner, small, tiny
from ldm.pipeline import load as loading
from ldm.pipeline.device import Precision, choose_device, choose_precision
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import MODEL_VARIABLE, load, random_system, save_checkpoint, shipped_model
from ldm.types import Conditioning
from ldm.weights.config_json import CONFIG_KEY
from ldm.weights.layout import CLIP, FIRST_STAGE, UNET, Networks, build

CPU = torch.device("cpu")
GPU = torch.device("cuda")

LAYOUTS = {
    "sd1": tiny(sd1()),
    "sd1 inpainting": tiny(sd1(in_channels=9)),
    "sd2 v": tiny(sd2("v")),
    "sd2 depth": tiny(sd2(in_channels=5)),
    "sd2 x4 upscaler": tiny(sd_x4_upscaler()),
    "sdxl": tiny(sdxl()),
    "refiner": tiny(sdxl_refiner()),
    "ours": tiny(small()),
}


def state(model: LatentDiffusion | Networks) -> dict[str, Tensor]:
    parts = Networks(model.config, model.unet, model.autoencoder, model.text).by_prefix()  # type: ignore[arg-type]
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str, tmp_path: Path) -> None:
    model = random_system(LAYOUTS[layout], seed=1)
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    loaded = load(path, device="cpu", dtype="float32")
    assert loaded.config == model.config
    assert equal(state(loaded), state(model))
    assert loaded.device == CPU
    assert loaded.dtype == torch.float32
    assert loaded.origin.path == path
    assert loaded.origin.warnings == ()
    assert not loaded.unet.training
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
    again = tmp_path / "again.safetensors"
    save_checkpoint(loaded, again, title="model")
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture
def path(tiny_file: Callable[[SystemConfig], Path]) -> Path:
    """A tiny SD 1 file of ours, float16."""
    return tiny_file(LAYOUTS["sd1"])


def test_weights_are_cast_while_they_are_loaded(path: Path) -> None:
    on_disk = load_file(path)
    for name, tensor in state(load(path, device="cpu", dtype="bf16")).items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith((UNET, FIRST_STAGE)) else torch.float32)
        assert torch.equal(tensor, on_disk[name].to(tensor.dtype))


def test_mixed_dtypes_are_converted(path: Path, tmp_path: Path) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = {name: tensor.to(kinds[i % 4]) for i, (name, tensor) in enumerate(load_file(path).items())}
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = state(load(tmp_path / "x.safetensors", dtype="float32"))
    assert equal(loaded, {name: tensor.float() for name, tensor in tensors.items()})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_weights_of_the_right_dtype_stay_mapped(tmp_path: Path) -> None:
    path = tmp_path / "only-here.safetensors"
    save_checkpoint(random_system(LAYOUTS["ours"]), path)
    loaded = load(path, dtype="float32")
    assert str(path) in Path("/proc/self/maps").read_text()
    del loaded
    load(path, dtype="float32").unet.bfloat16()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_no_weight_is_initialised_to_be_overwritten(path: Path) -> None:
    before = torch.get_rng_state()
    assert all(tensor.is_meta for tensor in state(build(LAYOUTS["sdxl"])).values())
    load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_systems_depend_on_their_seed_alone() -> None:
    first, second, third = (state(random_system(LAYOUTS["ours"], seed)) for seed in (0, 0, 1))
    assert equal(first, second)
    assert not equal(first, third)
    assert all(bool(tensor.any()) for tensor in first.values())


# What real files carry, or lack.


def edited(path: Path, tmp_path: Path, extra: Mapping[str, Tensor], without: tuple[str, ...] = ()) -> Path:
    """The same file of another program: no config of ours, some tensors more, some less."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
    save_file(tensors | dict(extra), tmp_path / "edited.safetensors", metadata={"format": "pt"})
    return tmp_path / "edited.safetensors"


REAL = {
    "model_ema.decay": torch.ones(()),
    "model_ema.diffusion_modelout2bias": torch.ones(4),
    "betas": torch.ones(1000),
    "alphas_cumprod": torch.ones(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "cond_stage_model.logit_scale": torch.ones(()),
    "depth_model.model.pretrained.model.cls_token": torch.ones(1),
}


def test_tensors_that_networks_do_without(path: Path, tmp_path: Path) -> None:
    loaded = load(edited(path, tmp_path, REAL), dtype="float32")
    assert equal(state(loaded), {name: tensor.float() for name, tensor in load_file(path).items()})
    assert loaded.origin.warnings == ()
    assert loaded.origin.rules[:3] == (
        "family: sd1, text to image (text encoder under cond_stage_model.transformer)",
        "prediction: eps (sd1 files predict eps unless they say otherwise)",
        "EMA weights present: using the ordinary ones",
    )


def test_tensors_of_nobody_are_a_warning(path: Path, tmp_path: Path) -> None:
    loaded = load(edited(path, tmp_path, {f"stranger.{i}": torch.ones(1) for i in range(12)}))
    (warning,) = loaded.origin.warnings
    assert warning.startswith("12 tensors belong to no network and were left out: stranger.0, ")
    assert warning.endswith(" and 2 more")


def test_our_own_file_ships_the_whole_clip(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    extra = {f"{CLIP}visual.conv1.weight": torch.ones(1, 1), f"{CLIP}logit_scale": torch.ones(())}
    save_checkpoint(random_system(LAYOUTS["ours"]), path, extra=extra, metadata={"modelspec.author": "me"})
    assert load(path).origin.warnings == ()
    assert load_file(path).keys() >= extra.keys()


def refusal(path: Path) -> str:
    with pytest.raises(LdmError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_missing_tensor(path: Path, tmp_path: Path) -> None:
    name = f"{UNET}out.2.bias"
    assert refusal(edited(path, tmp_path, {}, (name,))).endswith(
        f"its tensors do not fit the networks of sd1; 1 missing: {name}"
    )


def test_an_extra_tensor_inside_a_network(path: Path, tmp_path: Path) -> None:
    assert f"1 unexpected: {UNET}new.weight" in refusal(edited(path, tmp_path, {f"{UNET}new.weight": torch.ones(1)}))


def test_a_wrong_shape_and_a_wrong_type(path: Path, tmp_path: Path) -> None:
    bent, whole = f"{UNET}out.2.bias", f"{UNET}out.0.bias"
    message = refusal(edited(path, tmp_path, {bent: torch.ones(5), whole: torch.ones(32, dtype=torch.int8)}))
    assert f"{bent} is (5,), expected (4,)" in message
    assert f"{whole} holds I8 numbers" in message


def test_at_most_ten_names_are_shown(path: Path, tmp_path: Path) -> None:
    biases = tuple(name for name in load_file(path) if name.endswith("attn2.to_out.0.bias"))
    assert len(biases) > 10
    message = refusal(edited(path, tmp_path, {}, biases))
    assert message.count(UNET) == 10
    assert f"{len(biases)} missing: " in message
    assert message.endswith(f" and {len(biases) - 10} more")
    message = refusal(edited(path, tmp_path, {f"{UNET}new{i}": torch.ones(1) for i in range(20)}, biases))
    assert message.count(UNET) == 10


def test_a_schedule_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(replace(random_system(LAYOUTS["ours"]), config=replace(LAYOUTS["ours"], schedule="wavy")), path)
    assert "its noise schedule 'wavy' is not known; expected scaled-linear" in refusal(path)


def test_networks_that_cannot_be_built(path: Path, tmp_path: Path) -> None:
    """Norms of 32 groups over 48 and 96 channels."""
    sides = {32: 48, 64: 96, 96: 144, 128: 192, 192: 288, 256: 384, 512: 768}
    shapes = {name: [sides.get(side, side) for side in tensor.shape] for name, tensor in load_file(path).items()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    assert "its networks cannot be built: num_channels" in refusal(tmp_path / "x.safetensors")


# Prediction types.


def test_the_caller_may_override_the_prediction(path: Path) -> None:
    loaded = load(path, prediction="v")
    assert loaded.config.prediction == "v"
    assert loaded.origin.warnings == (f"v-prediction was asked for, but the file says eps (its own {CONFIG_KEY})",)


@pytest.mark.parametrize(("bias", "prediction"), [(-3.0, "v"), (0.0, "eps")])
def test_a_probe_runs_the_unet_once(bias: float, prediction: str, tmp_path: Path) -> None:
    model = random_system(LAYOUTS["sd2 v"])
    last = model.unet.out[-1]
    assert isinstance(last, nn.Conv2d)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, bias)  # type: ignore[arg-type]
    save_checkpoint(model, tmp_path / "x.safetensors")
    loaded = load(tmp_path / "x.safetensors", prediction="probe")
    assert loaded.config.prediction == prediction
    assert f"prediction: {prediction} (one step of its U-Net)" in loaded.origin.rules


def test_only_plain_unets_can_be_probed(tiny_file: Callable[[SystemConfig], Path]) -> None:
    with pytest.raises(LdmError, match="cannot be probed"):
        load(tiny_file(LAYOUTS["sdxl"]), prediction="probe")


# Which file.


def test_the_environment_may_name_the_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODEL_VARIABLE, str(path))
    assert load().origin.path == path
    monkeypatch.setenv(MODEL_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(LdmError, match=f"absent: no such file or directory; .*{MODEL_VARIABLE}"):
        load()
    monkeypatch.setenv(MODEL_VARIABLE, "x" * 300)
    with pytest.raises(LdmError, match=f"file name too long; .*{MODEL_VARIABLE}"):
        load()


def test_the_shipped_model_lies_beside_the_package(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    assert Path(__file__).parents[2] / "checkpoints" / "ldm-small.safetensors" == loading.SHIPPED
    monkeypatch.setattr(loading, "SHIPPED", path)
    assert shipped_model() == path
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "ldm-small.safetensors")
    with pytest.raises(LdmError, match=r"the model that ships with this package is missing; .*--model"):
        load()


# Devices and dtypes.


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("gpu", "device gpu: not known; expected auto, cpu"),
        ("", "not known"),
        ("meta", "device meta: not supported"),
        ("cuda:x", "not known"),
        ("cpu\n", "not known"),
    ],
)
def test_devices_that_do_not_exist(device: str, expected: str) -> None:
    with pytest.raises(LdmError, match=expected) as caught:
        choose_device(device)
    assert "\n" not in str(caught.value)


def test_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    for name in ("cuda", "cuda:9"):
        with pytest.raises(LdmError, match=f"device {name}: no CUDA GPU was found; use --device cpu"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(LdmError, match="device mps: this machine has none"):
        choose_device("mps")


def test_a_machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(LdmError, match="device cuda:9: this machine has 2 CUDA GPUs; use cuda:0 to cuda:1"):
        choose_device("cuda:9")


@pytest.mark.parametrize("dtype", ["float16", "fp16", torch.float16])
def test_float16_is_refused_on_a_cpu_before_the_file_is_looked_at(dtype: str | torch.dtype) -> None:
    with pytest.raises(LdmError, match="dtype float16: not supported on a CPU; use bfloat16 or float32"):
        load("absent.safetensors", device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "", torch.float64, torch.int8])
def test_dtypes_that_are_not_known(dtype: str | torch.dtype, path: Path) -> None:
    with pytest.raises(LdmError, match="not known; expected auto, float32, bfloat16 or float16"):
        load(path, dtype=dtype)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_precision("auto", CPU, "sd1") == Precision(brain, single, brain)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto", CPU, "sd1") == Precision(single, single, single)
    assert choose_precision("bf16", CPU, "sd1") == Precision(brain, single, brain)
    assert choose_precision("auto", GPU, "sd1") == Precision(half, half, half)
    assert choose_precision("float32", GPU, "sdxl") == Precision(single, single, single)
    assert choose_precision("bfloat16", GPU, "sdxl") == Precision(brain, brain, brain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, wide in ((True, brain), (False, single)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_precision("auto", GPU, "sdxl") == Precision(half, half, wide)
        assert choose_precision("fp16", GPU, "sdxl-refiner") == Precision(half, half, wide)


# Other programs read what we write.


def test_diffusers_reads_our_file(tmp_path: Path) -> None:
    """Each part, loaded by diffusers from our single file and a local config, gives what ours gives."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextConfig, CLIPTextModel

    ours = random_system(LAYOUTS["sd1"])
    path = tmp_path / "model.safetensors"
    save_checkpoint(ours, path)
    network, first_stage, tower = ours.config.unet, ours.config.autoencoder, ours.config.text[0].tower
    UNet2DConditionModel(
        block_out_channels=tuple(network.model_channels * mult for mult in network.channel_mult),
        attention_head_dim=network.heads,
        cross_attention_dim=network.context_width,
        layers_per_block=network.res_blocks,
    ).save_config(tmp_path / "unet")
    AutoencoderKL(
        block_out_channels=tuple(first_stage.base_channels * mult for mult in first_stage.channel_mult),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=first_stage.res_blocks,
        norm_num_groups=first_stage.norm_groups,
    ).save_config(tmp_path / "vae")
    CLIPTextConfig(
        hidden_size=tower.width,
        intermediate_size=4 * tower.width,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
    ).save_pretrained(tmp_path / "text_encoder")
    local = {"config": str(tmp_path), "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **local)
    vae = AutoencoderKL.from_single_file(str(path), subfolder="vae", **local)
    clip = create_diffusers_clip_model_from_ldm(
        CLIPTextModel,
        load_file(path),
        subfolder="text_encoder",
        config=str(tmp_path),
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, tower.width, generator=generator)
    timestep = torch.tensor([3.0, 800.0])
    ids = torch.randint(0, 49407, (2, 77), generator=generator)
    with torch.no_grad():
        close(ours.unet(x, timestep, Conditioning(cross=context)), unet(x, timestep, context).sample)
        close(ours.autoencoder.reconstruct(x), vae.decode(x).sample)
        close(ours.text[0](ids).states, clip(ids).last_hidden_state)


def close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm() / expected.norm()) < 1e-4
