"""What a file is found to be: full-size layouts from shapes alone, metadata, and the order of evidence for eps or v."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sd_x4_upscaler, sdxl, sdxl_refiner, small, tiny
from ldm.weights.clip import read_clip
from ldm.weights.config_json import CONFIG_KEY, config_from_json, config_to_json
from ldm.weights.detect import CHECKPOINT, Detection, detect, kind_of
from ldm.weights.io import TensorInfo
from ldm.weights.layout import CLIP, FIRST_STAGE, TEXT, UNET, build, compare, not_needed_as
from ldm.weights.source import Source, open_source

LAYOUTS: dict[str, SystemConfig] = {
    "sd1": sd1(),
    "sd1 inpainting": sd1(in_channels=9),
    "sd1 instruct": sd1(in_channels=8),
    "sd2": sd2(),
    "sd2 v": sd2("v"),
    "sd2 inpainting": sd2(in_channels=9),
    "sd2 depth": sd2(in_channels=5),
    "sd2 x4 upscaler": sd_x4_upscaler(),
    "sdxl": sdxl(),
    "sdxl inpainting": sdxl(in_channels=9),
    "refiner": sdxl_refiner(),
    "ours": small(),
}

WITHOUT_TEXT = replace(
    small(),
    text=(),
    unet=replace(small().unet, context_width=None, vector_width=None, linear_projections=False, classes=10),
)


@cache
def shapes_of(config: SystemConfig) -> dict[str, tuple[int, ...]]:
    parts = build(config).by_prefix()
    return {p + name: tuple(t.shape) for p, network in parts.items() for name, t in network.state_dict().items()}


def source_of(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    path: Path = Path("x.safetensors"),
    facts: Mapping[str, str] | None = None,
) -> Source:
    """A source with these tensors and no file behind it."""
    tensors = {name: TensorInfo("F16", shape) for name, shape in shapes.items()}
    return Source(path, tensors, metadata or {}, lambda names: iter(()), facts=facts or {})


def told(config: SystemConfig) -> dict[str, str]:
    return {CONFIG_KEY: config_to_json(config)}


def where_it_matters(config: SystemConfig) -> SystemConfig:
    """`cross_only` of a level without attention means nothing."""
    pairs = zip(config.unet.cross_only, config.unet.attention, strict=True)
    return replace(config, unet=replace(config.unet, cross_only=tuple(cross and depth > 0 for cross, depth in pairs)))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ours"])
def test_full_size_layouts_are_read_off_their_shapes(layout: str) -> None:
    config = LAYOUTS[layout]
    said = {"modelspec.prediction_type": "v"} if config.prediction == "v" else {"global_step": "875000"}
    detection = detect(source_of(shapes_of(config), said))
    assert detection.config == where_it_matters(config)
    assert detection.notes == ()


@pytest.mark.parametrize("config", [*LAYOUTS.values(), *map(tiny, LAYOUTS.values()), WITHOUT_TEXT])
def test_files_with_our_config_describe_themselves(config: SystemConfig) -> None:
    config = replace(config, zero_terminal_snr=True, schedule="cosine", prediction="x0", size=192)
    detection = detect(source_of(shapes_of(config), told(config)))
    assert detection.config == config
    assert CONFIG_KEY in detection.family_rule
    assert CONFIG_KEY in detection.prediction_rule


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ours"])
def test_tiny_layouts_need_no_config(layout: str) -> None:
    """All but what shapes cannot tell: head counts and the native size."""
    config = tiny(LAYOUTS[layout])
    found = detect(source_of(shapes_of(config), {"modelspec.prediction_type": config.prediction})).config
    heads = {"heads": config.unet.heads, "head_width": config.unet.head_width, "cross_only": config.unet.cross_only}
    text = tuple(
        replace(use, tower=replace(use.tower, heads=expected.tower.heads))
        for use, expected in zip(found.text, config.text, strict=True)
    )
    assert replace(found, unet=replace(found.unet, **heads), text=text, size=config.size) == config
    assert compare(source_of(shapes_of(config)).tensors, build(found)).fits


@pytest.mark.parametrize(("width", "head_width"), [(32, 32), (64, 64)])
def test_guessed_heads_are_said(width: int, head_width: int) -> None:
    detection = detect(source_of(shapes_of(tiny(sd2(), width)), {"global_step": "875000"}))
    assert detection.config.unet.head_width == head_width
    assert any("attention heads is a guess" in note for note in detection.notes) == (head_width != 64)


# The order of evidence for the prediction type.


def decision(metadata: Mapping[str, str], *markers: str, config: SystemConfig | None = None, **more: Any) -> Detection:
    shapes = shapes_of(config or tiny(sd2())) | dict.fromkeys(markers, ())
    return detect(source_of(shapes, metadata), **more)


@pytest.mark.parametrize(
    ("metadata", "markers", "prediction", "rule"),
    [
        ({"modelspec.prediction_type": "v", "global_step": "875000"}, (), "v", "prediction_type"),
        ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), "eps", "prediction_type"),
        ({"modelspec.predict_key": "v"}, (), "v", "predict_key"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v", "architecture"),
        ({"modelspec.prediction_type": "nonsense"}, ("v_pred",), "v", "v_pred"),
        ({"global_step": "875000"}, ("v_pred",), "v", "v_pred"),
        ({"global_step": "875000"}, (), "eps", "875000 steps"),
        ({"global_step": "220000"}, (), "eps", "220000 steps"),
        ({"global_step": "110000"}, (), "v", "110000 steps"),
    ],
)
def test_the_order_of_evidence(metadata: dict[str, str], markers: tuple[str, ...], prediction: str, rule: str) -> None:
    detection = decision(metadata, *markers)
    assert detection.config.prediction == prediction
    assert rule in detection.prediction_rule


def test_the_caller_wins_and_is_warned() -> None:
    detection = decision({"modelspec.prediction_type": "v"}, prediction="eps")
    assert detection.config.prediction == "eps"
    assert "caller" in detection.prediction_rule
    assert detection.warnings == (
        "eps-prediction was asked for, but the file says v (metadata modelspec.prediction_type)",
    )
    assert decision({"modelspec.prediction_type": "v"}, prediction="v").warnings == ()


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v"),
        ("    parameterization: v  # velocity\n", "v"),
        ("    parameterization: 'eps'\n", "eps"),
        ("scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n", "v"),
        ("  target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n", "eps"),
    ],
)
def test_a_yaml_file_beside_it(text: str, prediction: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    source = source_of(shapes_of(tiny(sd1())), path=tmp_path / "x.safetensors")
    detection = detect(source)
    assert detection.config.prediction == prediction
    assert detection.prediction_rule == "x.yaml beside the file"


@pytest.mark.parametrize(
    "text",
    ["# parameterization: v\n", "", "\0\xff" * 1000, "parameterization: !!python/object/apply:os.system ['x']\n"],
)
def test_a_yaml_file_that_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    source = source_of(shapes_of(tiny(sd1())), path=tmp_path / "x.safetensors")
    assert detect(source).prediction_rule == "sd1 files predict eps unless they say otherwise"


@pytest.mark.parametrize(
    ("config", "prediction", "rule"),
    [
        (sd1(), "eps", "sd1 files"),
        (sdxl(), "eps", "sdxl files"),
        (sdxl_refiner(), "eps", "sdxl-refiner files"),
        (sd2(in_channels=9), "eps", "9 input channels"),
        (sd2(in_channels=5), "eps", "5 input channels"),
        (sd_x4_upscaler(), "v", "x4 upscaler"),
    ],
)
def test_what_is_known_of_a_family(config: SystemConfig, prediction: str, rule: str) -> None:
    detection = decision({}, config=tiny(config))
    assert detection.config.prediction == prediction
    assert rule in detection.prediction_rule


@pytest.mark.parametrize(("spread", "prediction", "size"), [(0.05, "eps", 512), (0.13, "v", 768)])
def test_the_spread_of_biases_decides_for_a_silent_sd2_file(
    spread: float, prediction: str, size: int, tmp_path: Path, tiny_file: Callable[[SystemConfig], Path]
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = load_file(tiny_file(tiny(sd2())))
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[name] = spread * torch.tensor([1.0, -1.0]).repeat(tensors[name].numel() // 2)
    save_file(tensors, path)
    detection = detect(open_source(path))
    assert detection.config.prediction == prediction
    assert detection.config.size == size
    assert f"{spread:.3f}" in detection.prediction_rule


@pytest.mark.parametrize(("metadata", "markers"), [({}, ("v_pred", "ztsnr")), ({"ss_zero_terminal_snr": "True"}, ())])
def test_zero_terminal_snr(metadata: dict[str, str], markers: tuple[str, ...]) -> None:
    assert decision(metadata, *markers, config=tiny(sdxl())).config.zero_terminal_snr


def test_resolution_of_modelspec() -> None:
    for said, size in {"768x768": 768, "640x832": 512, "9x9": 512, "99999x99999": 512}.items():
        assert decision({"modelspec.resolution": said}, config=tiny(sd1())).config.size == size
    assert decision({}, config=tiny(sd1())).config.size == 512
    assert decision({}, config=tiny(sdxl())).config.size == 1024


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        (sd1(), "text to image"),
        (sd1(in_channels=9), "inpainting"),
        (sd1(in_channels=8), "instruct (picture to picture)"),
        (sd2(in_channels=5), "depth to image"),
        (sd_x4_upscaler(), "x4 upscaler"),
        (sd1(in_channels=6), "2 extra input channels"),
    ],
)
def test_variants(config: SystemConfig, variant: str) -> None:
    config = tiny(config)
    assert detect(source_of(shapes_of(config), told(config))).variant == variant


def test_ema_is_noted() -> None:
    shapes = shapes_of(tiny(sd1())) | {"model_ema.diffusion_modelout2bias": (4,)}
    assert "EMA weights present: using the ordinary ones" in detect(source_of(shapes)).notes


# Files that are no whole checkpoint, or one that is not read.


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "LoRA or another adapter"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "LoRA or another adapter"),
        (["lycoris_x.hada_w1_a"], "LoRA or another adapter"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", "first_stage_model.x"], "transformer model"),
        (["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"], "diffusers U-Net"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "diffusers autoencoder"),
        (["input_blocks.0.0.weight"], "U-Net alone"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "U-Net alone"),
        (["encoder.conv_in.weight", "quant_conv.weight"], "autoencoder alone"),
        (["first_stage_model.encoder.conv_in.weight"], "autoencoder alone"),
        (["text_model.embeddings.token_embedding.weight"], "text encoder alone"),
        (["cond_stage_model.model.token_embedding.weight"], "text encoder alone"),
        (["emb_params"], "textual-inversion embedding"),
        (["clip_g", "clip_l"], "textual-inversion embedding"),
        (["<cat-toy>"], "textual-inversion embedding"),
        (["weight"], "unknown"),
        ([], "unknown"),
    ],
)
def test_other_kinds_are_named(names: list[str], kind: str) -> None:
    assert kind_of(names).startswith(kind)
    with pytest.raises(LdmError, match=r"^x\.safetensors: this is ") as caught:
        detect(source_of(dict.fromkeys(names, (1,))))
    assert kind_of(names) in str(caught.value)
    assert ("add from other files: --" in str(caught.value)) == kind.endswith("alone")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_are_checkpoints(layout: str) -> None:
    assert kind_of(shapes_of(tiny(LAYOUTS[layout]))) == CHECKPOINT


def refused(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> str:
    with pytest.raises(LdmError) as caught:
        detect(source_of(shapes, metadata))
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(shapes: Mapping[str, tuple[int, ...]], start: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(start)}


def test_missing_parts_are_named() -> None:
    shapes = shapes_of(tiny(sd1()))
    autoencoder, text = FIRST_STAGE, TEXT
    assert "without autoencoder; add from other files: --vae FILE" in refused(without(shapes, autoencoder))
    assert "without U-Net; add from other files: --unet FILE" in refused(without(shapes, UNET))
    assert "without text encoder; add from other files: --text-encoder FILE" in refused(without(shapes, text))
    alone = refused(without(without(shapes, autoencoder), text))
    assert alone.endswith("add from other files: --vae FILE --text-encoder FILE")
    assert "this is U-Net alone: without autoencoder and text encoder;" in alone
    assert "of a kind that is not known" in refused(without(shapes, text) | {f"{text}other.weight": (1,)})


def test_systems_that_would_yield_noise_are_refused() -> None:
    shapes = shapes_of(tiny(sdxl()))
    assert "EDM" in refused(shapes | {"edm_mean": (4,), "edm_std": (4,)})
    assert "EDM" in refused(shapes | {"edm_vpred.sigma_max": ()})
    assert "VQ" in refused(shapes_of(tiny(sd1())) | {"first_stage_model.quantize.embedding.weight": (16, 4)})


def test_parts_of_two_families_are_refused() -> None:
    """SD 2's text encoder beside SD 1's U-Net."""
    shapes = without(shapes_of(sd1()), "cond_stage_model.")
    tower = {name: shape for name, shape in shapes_of(sd2()).items() if name.startswith("cond_stage_model.")}
    assert "expects text 768 wide, its text encoder gives 1024" in refused(shapes | tower)


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_no_missing_or_bent_tensor_crashes(layout: str) -> None:
    """With any one tensor gone or of another rank: our own error, or a comparison that does not fit."""
    config = tiny(LAYOUTS[layout])
    shapes = shapes_of(config)
    for metadata in ({"global_step": "875000"}, told(config)):
        for name in list(shapes)[::170]:
            for changed in (without(shapes, name), shapes | {name: ()}, shapes | {name: (0, 0)}):
                try:
                    found = detect(source_of(changed, metadata)).config
                    assert not compare(source_of(changed).tensors, build(found)).fits
                except LdmError as error:
                    assert str(error).startswith("x.safetensors: ")


# Our own config.


def test_config_round_trip() -> None:
    for config in (*LAYOUTS.values(), WITHOUT_TEXT):
        assert config_from_json(config_to_json(config)) == config


def changed(path: str, value: Any) -> str:
    """The JSON of a config with one field set; `path` like unet.heads or text.0.skip."""
    record: Any = json.loads(config_to_json(tiny(sd1())))
    *inner, last = path.split(".")
    target = record
    for key in inner:
        target = target[int(key) if key.isdigit() else key]
    target[last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("target", "os.system", "unknown field 'target'"),
        ("unet._target_", "os.system", "unet has the unknown field"),
        ("unet.heads", "8", "unet.heads is '8', expected"),
        ("unet.heads", True, "unet.heads is 'True'"),
        ("unet.heads", 3, "do not divide"),
        ("unet.heads", 0, "do not divide"),
        ("unet.heads", -2, "do not divide"),
        ("unet.heads", None, "exactly one of heads and head_width"),
        ("unet.channel_mult", 4, "channel_mult"),
        ("unet.channel_mult", [1, "2"], r"channel_mult\[1\]"),
        ("unet.channel_mult", [1, 2], "need 2 values"),
        ("unet.dropout", 2.0, "dropout"),
        ("unet", None, "unet must be an object"),
        ("family", "sd9", "expected one of 'sd1'"),
        ("family", [], "expected one of 'sd1'"),
        ("prediction", "edm", "expected one of 'eps'"),
        ("size", 0, "64..8192"),
        ("size", 10**9, "64..8192"),
        ("sizes_in_vector", 999, "0..16"),
        ("autoencoder.scale_factor", 0.0, "positive"),
        ("autoencoder.scale_factor", float("nan"), "scale_factor"),
        ("autoencoder.scale_factor", float("inf"), "scale_factor"),
        ("autoencoder.norm_groups", 0, "positive"),
        ("text.0.skip", 99, "out of range"),
        ("text.0.padding", 10**6, "out of range"),
        ("text.0.tower.heads", 5, "do not divide"),
        ("text", {}, "text"),
    ],
)
def test_broken_configs_are_refused(path: str, value: Any, expected: str) -> None:
    with pytest.raises(LdmError, match=f"^metadata ldm.config is broken: .*{expected}"):
        config_from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "{}", '{"family": "sd1"}', "[" * 100_000])
def test_texts_that_are_no_config(text: str) -> None:
    with pytest.raises(LdmError, match=r"^metadata ldm\.config is broken"):
        config_from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("unet.model_channels", 10**9, "says unet.model_channels is 1000000000, its tensors say 32"),
        ("unet.res_blocks", 10**9, "unet.res_blocks"),
        ("unet.linear_projections", True, "unet.linear_projections"),
        ("autoencoder.base_channels", 64, "autoencoder.base_channels"),
        ("text.0.tower.layers", 10**9, "tower.layers"),
        ("text.0.tower.vocabulary", 10**9, "tower.vocabulary"),
    ],
)
def test_a_config_that_its_tensors_contradict(path: str, value: Any, expected: str) -> None:
    assert expected in refused(shapes_of(tiny(sd1())), {CONFIG_KEY: changed(path, value)})


def test_fields_added_later_have_defaults() -> None:
    record = asdict(tiny(sd1()))
    del record["zero_terminal_snr"], record["unet"]["dropout"]
    assert config_from_json(json.dumps(record)) == tiny(sd1())


# Tensors that real files carry beyond the networks' own.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model_ema.diffusion_modelinput_blocks00weight", "EMA copies"),
        ("model_ema.decay", "EMA copies"),
        *((name, "noise schedule buffers") for name in (
            "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
            "logvar", "lvlb_weights", "scale_factor", "denoiser.sigmas", "low_scale_model.betas", "global_step",
        )),
        ("v_pred", "training marks"),
        ("ztsnr", "training marks"),
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", "token positions"),
        ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "token positions"),
        ("cond_stage_model.model.attn_mask", "causal masks"),
        ("conditioner.embedders.1.model.attn_mask", "causal masks"),
        ("cond_stage_model.model.visual.conv1.weight", "CLIP's image tower"),
        ("cond_stage_model.model.logit_scale", "CLIP's temperature and unused projection"),
        ("cond_stage_model.logit_scale", "CLIP's temperature and unused projection"),
        ("conditioner.embedders.1.model.logit_scale", "CLIP's temperature and unused projection"),
        ("conditioner.embedders.0.logit_scale", "CLIP's temperature and unused projection"),
        ("cond_stage_model.transformer.text_projection.weight", "CLIP's temperature and unused projection"),
        ("depth_model.model.pretrained.model.cls_token", "depth estimator"),
        ("first_stage_model.loss.logvar", "first-stage training loss"),
        ("model.diffusion_model.betas", None),
        ("betas.weight", None),
        ("conditioner.embedders.1.model.text_projection", None),
        ("cond_stage_model.model.transformer.resblocks.24.ln_1.weight", None),
        ("lora.weight", None),
    ],
)  # fmt: skip
def test_tensors_that_networks_do_without(name: str, kind: str | None) -> None:
    assert not_needed_as(name) == kind


def test_nothing_that_a_network_needs_is_left_out() -> None:
    for config in LAYOUTS.values():
        assert not any(not_needed_as(name) for name in shapes_of(config))


def test_comparison() -> None:
    config = tiny(sd1())
    tensors = dict(source_of(shapes_of(config)).tensors)
    assert compare(tensors, build(config)).fits
    gone = f"{UNET}out.2.bias"
    bent = f"{UNET}out.2.weight"
    whole = f"{UNET}out.0.weight"
    del tensors[gone]
    tensors[bent] = TensorInfo("F16", (1, 2))
    tensors[whole] = TensorInfo("I8", tensors[whole].shape)
    tensors[f"{UNET}extra"] = tensors["stranger"] = tensors["betas"] = TensorInfo("F16", (1,))
    found = compare(tensors, build(config))
    assert found.missing == (gone,)
    assert found.unexpected == (f"{UNET}extra",)
    assert found.misshapen == (
        f"{bent} is (1, 2), expected (4, 32, 3, 3)",
        f"{whole} holds I8 numbers, expected floating-point ones",
    )
    assert found.unknown == ("stranger",)
    assert found.not_needed == {"noise schedule buffers": 1}
    assert not found.fits


def test_the_image_tower_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{CLIP}visual.proj": torch.ones(2), f"{CLIP}logit_scale": torch.ones(()), "other": torch.ones(1)}, path)
    assert read_clip(path).keys() == {"visual.proj", "logit_scale"}
    save_file({f"{CLIP}logit_scale": torch.ones(())}, path)
    with pytest.raises(LdmError, match="no image tower"):
        read_clip(path)
