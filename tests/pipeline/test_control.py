"""Pictures under ControlNets equal those of diffusers' pipelines on the same weights, to 1e-3."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image, ImageDraw
from test_pipeline_parity import (
    NEGATIVE,
    PROMPT,
    SEEDS,
    SOLVERS,
    _round_timesteps,
    assert_same,
    their_arguments,
    their_pipeline,
    their_prediction,
    tokenizers,  # noqa: F401 - a fixture
)
from torch import Tensor, nn

from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.sigmas import SCHEDULES
from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import sd1, sd2, sdxl, tiny
from ldm.pipeline.control import Controlled, Hint, acted_on, hint_picture, timesteps_between
from ldm.pipeline.images import picture_bytes, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.request import Control, GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import run
from ldm.types import Conditioning
from ldm.weights.adapters.read import read_adapter

HINT_WIDTHS = (8, 8, 16, 16)
LAYOUTS = {"sd1": sd1, "sd2-v": lambda: sd2("v"), "sdxl": sdxl}
PIPELINES = {
    "sd1": diffusers.StableDiffusionControlNetPipeline,
    "sd2-v": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
}


def picture(seed: int, size: tuple[int, int] = (72, 64)) -> Image.Image:
    """A picture of coloured patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def control_net(model: LatentDiffusion, seed: int, *, pooled: bool = False) -> ControlNet:
    """A random ControlNet for this model, its residuals about as large as the skips that they are added to."""
    network = ControlNet(ControlNetConfig(model.config.unet, hint_widths=HINT_WIDTHS, pooled=pooled))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim > 1
            parameter.copy_(
                noise * parameter[0].numel() ** -0.5 if wide else 0.1 * noise + ("norm" in name or ".0.w" in name)
            )
        network.input_hint_block[-1].weight.mul_(20)  # so that the picture counts as much as the latent
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    """Tiny models with two ControlNets each, and one of styles."""
    found = {}
    for index, (name, preset) in enumerate(LAYOUTS.items()):
        model = random_system(tiny(preset()), seed=index)
        nets = {"a": control_net(model, 1), "b": control_net(model, 2), "style": control_net(model, 3, pooled=True)}
        found[name] = replace(model, controls=nets)
    return found


def control(network: str = "a", seed: int = 1, **fields: Any) -> Control:
    return Control(network=network, image=picture_bytes(picture(seed)), **fields)


def request(*controls: Control, **fields: Any) -> GenerateRequest:
    sizes: dict[str, Any] = {"width": 72, "height": 64}
    given = {"negative": NEGATIVE, "steps": 5, "sampler": "ddim", "guidance": 5.0, "seed": SEEDS[0]}
    return GenerateRequest(prompt=PROMPT, controls=controls, **(sizes | {"count": len(SEEDS)} | given | fields))


def their_control(network: ControlNet) -> ControlNetModel:
    unet, state = network.config.unet, network.state_dict()
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    vector: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    theirs = ControlNetModel(
        block_out_channels=tuple(widths),
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.attention),
        transformer_layers_per_block=tuple(depth or unet.middle_attention for depth in unet.attention),
        attention_head_dim=tuple(unet.heads_for(width) for width in widths),
        cross_attention_dim=unet.context_width or 1,
        use_linear_projection=unet.linear_projections,
        projection_class_embeddings_input_dim=unet.vector_width,
        conditioning_embedding_out_channels=HINT_WIDTHS,
        global_pool_conditions=network.config.pooled,
        **(vector if unet.vector_width else {}),
    )
    tensors = convert_controlnet_checkpoint(dict(state), {"layers_per_block": 2})
    names = {"0.0": "linear_1", "0.2": "linear_2"}  # for which their converter has no names
    tensors |= {
        f"add_embedding.{their_name}.{kind}": state[f"label_emb.{name}.{kind}"]
        for name, their_name in names.items()
        for kind in ("weight", "bias")
        if unet.vector_width
    }
    theirs.load_state_dict(tensors)
    return theirs.eval()


def theirs_for(model: LatentDiffusion, asked: GenerateRequest, solver: str, words: Any, kind: Any) -> Any:
    """Their pipeline of this kind, with the request's ControlNets."""
    _, _, scheduler, settings, _ = SOLVERS[solver]
    plain = their_pipeline(model, words, scheduler(**settings, prediction_type=their_prediction(model.config)))
    nets = [their_control(model.controls[c.network]) for c in asked.controls]
    safety = {} if model.config.family == "sdxl" else {"requires_safety_checker": False}
    pipeline = kind(**plain.components, controlnet=nets[0] if len(nets) == 1 else nets, **safety)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_controls(asked: GenerateRequest) -> dict[str, Any]:
    def one_or_all(values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    controls = asked.controls
    return {
        "image": one_or_all([Image.open(io.BytesIO(c.image)).convert("RGB") for c in controls]),
        "controlnet_conditioning_scale": one_or_all([float(c.weight) for c in controls]),
        "control_guidance_start": one_or_all([c.start for c in controls]),
        "control_guidance_end": one_or_all([c.end for c in controls]),
        "guess_mode": any(c.guess for c in controls),
    }


CASES: dict[str, tuple[str, str, tuple[Control, ...], dict[str, Any]]] = {
    "sd1": ("sd1", "ddim", (control(weight=0.8),), {}),
    "sd1, multistep": ("sd1", "dpmpp-2m", (control(),), {}),
    "sd2": ("sd2-v", "euler", (control(weight=0.8),), {}),
    "sdxl": ("sdxl", "euler", (control(weight=0.8),), {}),
    "another size": ("sd1", "ddim", (Control(network="a", image=picture_bytes(picture(4, (144, 128)))),), {}),
    "two": ("sd1", "ddim", (control(weight=0.5), control("b", 2, weight=1.2)), {}),
    "two of sdxl": ("sdxl", "euler", (control(weight=0.5), control("b", 2)), {}),
    "one twice": ("sd1", "ddim", (control(weight=0.5), control("a", 2)), {}),
    "first part": ("sd1", "ddim", (control(end=0.5),), {}),
    "last part": ("sd1", "ddim", (control(start=0.5),), {}),
    "middle": ("sd1", "euler", (control(start=0.25, end=0.66),), {"steps": 10}),
    "middle, karras": ("sd1", "dpmpp-2m karras", (control(start=0.25, end=0.66),), {"steps": 10}),
    "middle of sdxl": ("sdxl", "euler", (control(start=0.25, end=0.66),), {}),
    "two intervals": ("sd1", "ddim", (control(end=0.4), control("b", 2, start=0.3, end=0.8)), {}),
    "guess": ("sd1", "ddim", (control(guess=True),), {}),
    "guess of sdxl": ("sdxl", "euler", (control(guess=True, end=0.5),), {}),
    "two guess": ("sd1", "ddim", (control(guess=True), control("b", 2, guess=True, weight=0.7)), {}),
    "guess without guidance": ("sd1", "ddim", (control(guess=True),), {"guidance": 1.0}),
    "without guidance": ("sd1", "ddim", (control(),), {"guidance": 1.0}),
    "style": ("sd1", "ddim", (control("style"),), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_equal_diffusers(case, models, tokenizers, monkeypatch):  # noqa: F811
    layout, solver, controls, fields = CASES[case]
    model = models[layout]
    sampler, schedule, _, _, rounds = SOLVERS[solver]
    if rounds:
        _round_timesteps(monkeypatch)
    asked = request(*controls, sampler=sampler, schedule=schedule, **fields)
    pipeline = theirs_for(model, asked, solver, tokenizers, PIPELINES[layout])
    assert_same(model, asked, pipeline(**their_arguments(asked), **their_controls(asked)).images)


def test_everything_asked_for_counts(models):
    """Or equality with theirs would show little."""
    ways = [(), (control(),), (control(weight=0.5),), (control(start=0.5),), (control(guess=True),), (control("b"),)]
    ways += [(control(), control("b")), (control(seed=2),)]
    found = [last_latents(models["sd1"], request(*way, steps=4, count=1)) for way in ways]
    assert all(difference(a, b) > 0.01 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("fields", [{}, {"start": 0.3, "end": 0.7}], ids=["all", "middle"])
def test_image_to_image_equals_diffusers(fields, models, tokenizers):  # noqa: F811
    """Shares of the steps are shares of those that are run."""
    model, start = models["sd1"], picture(7)
    asked = request(control(**fields), schedule="leading", image=picture_bytes(start), strength=0.8, steps=10)
    pipeline = theirs_for(model, asked, "ddim", tokenizers, diffusers.StableDiffusionControlNetImg2ImgPipeline)
    latent = model.autoencoder.encode(to_tensor(start)[None])  # theirs would draw one from the distribution
    given = their_controls(asked)
    given |= {"control_image": given["image"], "image": torch.cat([latent] * len(SEEDS)), "strength": 0.8}
    assert_same(model, asked, pipeline(**their_arguments(asked) | given).images)


def test_a_new_one_leaves_the_picture_as_it_is(models):
    model = models["sd1"]
    fresh = replace(model, controls={"new": ControlNet(ControlNetConfig(model.config.unet)).eval()})
    asked = request(control("new"), steps=3)
    assert torch.equal(last_latents(fresh, asked), last_latents(model, asked.changed(controls=())))


def test_a_weight_of_zero_leaves_the_picture_as_it_is(models):
    asked = request(control(weight=0.0), steps=3)
    assert torch.equal(last_latents(models["sd1"], asked), last_latents(models["sd1"], asked.changed(controls=())))


def test_each_picture_is_the_same_alone(models):
    asked = request(control(guess=True, start=0.2), control("b", 2, end=0.6), steps=5)
    alone = [last_latents(models["sd1"], asked.changed(count=1, seed=seed)) for seed in SEEDS]
    assert torch.allclose(last_latents(models["sd1"], asked), torch.cat(alone), atol=1e-4)


def test_half_precision(models):
    model = models["sd1"]
    half = random_system(model.config, dtype=torch.bfloat16)
    nets = {name: control_net(model, 1).bfloat16() for name in ("a", "b")}
    asked = request(control(guess=True), control("b"), steps=2)
    latents = last_latents(replace(half, controls=nets), asked)
    assert torch.isfinite(latents).all() and difference(latents, last_latents(half, asked.changed(controls=()))) > 0.01


class Recorder(nn.Module):
    """A U-Net that keeps the residuals which it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.control: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.controlled is None
        self.control = cond.control
        return x


@torch.inference_mode()
def test_every_row_gets_what_acts_on_it(models):
    """Rows of one batch at several timesteps, on both sides of guidance, with hints of every kind."""
    model = models["sd1"]
    pictures = [hint_picture(control(seed=seed), 64, 64) for seed in (1, 2)]
    hints = (
        Hint(model.controls["a"], pictures[0], 0.5, low=100, high=600, guess=True),
        Hint(model.controls["style"], pictures[1], 2.0),
    )
    x, cross = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    timestep = torch.tensor([100.0, 600.0])
    sides = [
        acted_on(Conditioning(cross=cross[i : i + 1]), hints, wanted=wanted) for i in (0, 1) for wanted in (True, False)
    ]
    unet = Recorder()
    Controlled(unet, hints)(x.repeat_interleave(2, 0), timestep.repeat_interleave(2), Conditioning.stack(sides))
    for level, residual in enumerate(unet.control):
        scale = torch.logspace(-1, 0, len(unet.control))[level] * 0.5
        parts = [
            [net(x[i : i + 1], timestep[i : i + 1], Conditioning(cross=cross[i : i + 1]), hint)[level] for i in (0, 1)]
            for net, hint in zip((model.controls["a"], model.controls["style"]), pictures, strict=True)
        ]
        zero = torch.zeros_like(residual[:1])
        expected = [parts[1][0] * 2, zero, parts[0][1] * scale + parts[1][1] * 2, zero]
        expected = torch.cat([zero + row for row in expected])
        assert torch.allclose(residual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30])
def test_the_steps_are_those_of_diffusers(schedule, steps):
    noise = scaled_linear()
    sigmas = SCHEDULES[schedule](noise, steps)
    timesteps = noise.timestep(sigmas[:-1])
    for start, end in [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.1, 0.9), (0.3, 0.35), (0.29, 0.7), (1 / 3, 2 / 3)]:
        kept = [not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]
        interval = timesteps_between(noise, sigmas, start, end)
        low, high = interval or (torch.inf, torch.inf)
        assert [low < t <= high for t in timesteps.tolist()] == kept and (interval is None) == (not any(kept))


def test_without_a_size_the_picture_has_the_shape_of_what_it_is_held_to(models):
    image = picture_bytes(picture(1, (300, 150)))
    found = models["sd1"].generate("x", steps=1, controls=[Control(network="a", image=image)])[0]
    assert found.image.size == (88, 48) or found.image.size == (88, 64)


def test_a_name_that_the_model_was_not_given(models):
    with pytest.raises(
        LdmError, match="control: network: found 'c', expected one that the model was given: a, b, style"
    ):
        models["sd1"].generate("x", steps=1, controls=[control("c")])
    with pytest.raises(LdmError, match="was given: none"):
        random_system(tiny(sd1())).generate("x", steps=1, controls=[control()])


def test_a_share_below_one_step_is_told(models):
    found = models["sd1"].generate("x", steps=3, controls=[control(start=0.4, end=0.6), control("b")])[0]
    assert found.notes == ("control a: from 0.4 to 0.6 there is no whole step; it did not act",)


def test_what_the_file_says(models, tmp_path):
    used = (control(weight=0.5, start=0.1, end=0.9, guess=True), control("b", 2))
    path = models["sd1"].generate("x", steps=1, controls=used)[0].save(tmp_path / "x.png")
    found = read_metadata(path)
    assert found.record is not None and found.parameters is not None and found.request() is None
    first, second = found.record["request"]["controls"]
    assert len(first.pop("image_sha256")) == 64 and "image" not in second
    assert first == {"network": "a", "weight": 0.5, "start": 0.1, "end": 0.9, "guess": True, "canny": False}
    text = "Module: none, Model: a, Weight: 0.5, Guidance Start: 0.1, Guidance End: 0.9, Control Mode: "
    assert f"ControlNet 0: {json.dumps(text + 'ControlNet is more important')}" in found.parameters


def test_edges(monkeypatch):
    image = Image.new("RGB", (128, 128), "black")
    ImageDraw.Draw(image).rectangle((32, 32, 95, 95), fill="white")
    drawn = Control(network="a", image=picture_bytes(image), canny=True)
    hint = hint_picture(drawn, 64, 64)
    assert hint.shape == (1, 3, 64, 64) and set(hint.unique().tolist()) == {0.0, 1.0}
    assert 110 < float(hint[0, 0].sum()) < 140 and not hint[..., 22:42, 22:42].any()  # the outline, not the inside
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LdmError, match="control: canny: needs OpenCV, which is not installed; pip install opencv"):
        Control(network="a", image=picture_bytes(image), canny=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weight": 3.0}, "control: weight: found 3.0, expected a number from 0 to 2"),
    ({"weight": -1.0}, "control: weight: found -1.0"),
    ({"start": 1.5}, "control: start: found 1.5, expected a number from 0 to 1"),
    ({"start": 0.5, "end": 0.5}, "control: start: found 0.5, expected less than end, 0.5"),
    ({"image": b"<html>"}, "control: image: found a web page"),
    ({"image": "/etc/passwd"}, "image: found text that is not base64"),
    ({"network": ""}, "control: network: found"),
    ({"guess": 1}, "control: guess: found 1"),
    ({"wieght": 1.0}, '"wieght": no such field; did you mean weight'),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(fields, message):
    given = {"network": "a", "image": picture_bytes(picture(1))} | fields
    with pytest.raises(LdmError, match=message):
        GenerateRequest(prompt="x", controls=[given])  # pyright: ignore[reportArgumentType]


def test_files_become_networks(models, tmp_path):
    from safetensors.torch import save_file

    model = models["sd1"]
    save_file(
        {f"control_model.{n}": t for n, t in model.controls["a"].state_dict().items()}, tmp_path / "x.safetensors"
    )
    read = replace(model, controls={}).with_controls({"a": tmp_path / "x.safetensors"})
    assert torch.equal(
        last_latents(read, request(control(), steps=2)), last_latents(model, request(control(), steps=2))
    )
    assert read.unet is model.unet and model.with_controls({}).controls == {}
    assert model.with_controls({"z": "x"}, models=[tmp_path]).controls.keys() == {"z"}
    with pytest.raises(
        LdmError, match=r"x.safetensors: is made for a U-Net with text 32 wide, the model is .* 64 wide"
    ):
        models["sdxl"].with_controls({"a": tmp_path / "x.safetensors"})


def test_differences_are_added_to_weights_without_adapters(models, tmp_path):
    from safetensors.torch import save_file

    model, module = models["sd1"], "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    weight = model.unet.get_parameter("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight")
    halves = {"down": torch.ones(2, weight.shape[1]), "up": torch.ones(len(weight), 2)}
    save_file({f"{module}.lora_{half}.weight": t for half, t in halves.items()}, tmp_path / "lora.safetensors")
    state = {f"control_model.{n}": t for n, t in model.controls["a"].state_dict().items()}
    save_file(state | {"difference": torch.ones(1)}, tmp_path / "x.safetensors")
    adapted = model.with_adapters([(read_adapter(tmp_path / "lora.safetensors"), 1)])
    plain, found = (
        each.with_controls({"x": tmp_path / "x.safetensors"}).controls["x"].state_dict() for each in (model, adapted)
    )
    assert not torch.equal(
        adapted.unet.get_parameter("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"), weight
    )
    assert plain.keys() == found.keys() and all(torch.equal(plain[name], found[name]) for name in plain)


def last_latents(model: LatentDiffusion, asked: GenerateRequest) -> Tensor:
    steps = [event.step for event in run(model, asked) if isinstance(event, Progress)]
    assert steps[-1] is not None
    return steps[-1].x


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((first - second).abs().max() / second.abs().max())
