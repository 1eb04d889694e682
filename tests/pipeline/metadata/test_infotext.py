"""AUTOMATIC1111's text: what we write reads back, and what its web UI wrote means the same here."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.pipeline.images import picture_bytes
from ldm.pipeline.metadata.infotext import NEGATIVE, parse, write
from ldm.pipeline.metadata.infotext_fields import remake_of
from ldm.pipeline.picture import Picture, parameters_text
from ldm.pipeline.request import TAKES_ETA, GenerateRequest, HighRes, whole_steps
from ldm.samplers import SAMPLERS

PNG = picture_bytes(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))  # as a mask, some of it is free

# As the web UI 1.5 wrote it, with an extension's settings, a LoRA and a second pass.
REAL = """masterpiece, (best quality:1.2), a castle on a hill,
sunset, <lora:add_detail:0.7>
Negative prompt: (worst quality:1.4), EasyNegative,
blurry
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 1234567890, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.55, Clip skip: 2, Hires upscale: 1.5, Hires steps: 12, \
Hires upscaler: R-ESRGAN 4x+, ADetailer model: face_yolov8n.pt, ADetailer prompt: "a face, smiling", \
Lora hashes: "add_detail: 7c6bad76eb54", Version: v1.5.1"""

# The same web UI at 1.10: schedule and sampler apart, image-to-image with a mask.
NEWER = """a red door
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.0, Seed: 5, Size: 512x512, \
Model hash: e1441589a6, Model: "sd, inpainting", VAE hash: 735e4c3a44, VAE: vae-ft-mse.safetensors, \
Variation seed: 99, Variation seed strength: 0.25, Denoising strength: 0.5, RNG: CPU, Mask mode: Inpaint not masked, \
Mask blur: 8, Inpaint area: Only masked, Masked area padding: 48, Masked content: latent noise, \
Emphasis: No norm, Eta: 0.5, Version: v1.10.1"""


def text_of(request: GenerateRequest) -> str:
    image = Image.new("RGB", (request.width or 64, request.height or 64))
    return parameters_text(Picture(image, 0, 0, request, "m", "float32", (), 0.0))


def test_a_text_of_the_web_ui():
    remake = remake_of(parse(REAL))
    assert remake.fields == {
        "prompt": "masterpiece, (best quality:1.2), a castle on a hill,\nsunset, <lora:add_detail:0.7>",
        "negative": "(worst quality:1.4), EasyNegative,\nblurry",
        "steps": 28, "sampler": "dpmpp-2m", "schedule": "karras", "guidance": 7.5, "seed": 1234567890,
        "width": 512, "height": 768, "clip_skip": 2, "rng": "philox",
        "highres": {"scale": 1.5, "upscale": "lanczos", "strength": 12 / 21, "steps": 21},
    }  # fmt: skip
    assert (remake.model, remake.model_hash) == ("v1-5-pruned-emaonly", "6ce0161689")
    told = "\n".join(remake.misses)
    for part in ("R-ESRGAN 4x+", '"add_detail: 7c6bad76eb54"', '"ADetailer model", "ADetailer prompt"', "before 1.6"):
        assert part in told
    highres = remake.request().highres
    assert highres is not None and whole_steps(highres.strength, 21) == 12  # all of its "Hires steps"


def test_a_newer_one_with_a_mask():
    remake = remake_of(parse(NEWER))
    assert remake.pictures == {"image": None, "mask": None} and remake.model == "sd, inpainting"
    request = remake.request({"image": PNG, "mask": PNG})
    assert (request.sampler, request.schedule, request.rng, request.emphasis) == (
        "euler-a", "linspace", "cpu", "no-norm",
    )  # fmt: skip
    assert (request.variation_seed, request.variation_strength, request.eta) == (99, 0.25, 0.5)
    assert (request.mask_invert, request.mask_blur, request.mask_fill) == (True, 8, "noise")
    assert (request.only_masked, request.mask_padding) == (True, 48)
    assert request.steps_to_run == 11  # the web UI runs int(0.5 * 20) + 1
    assert "before 1.6" not in "\n".join(remake.misses)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.55, 0.75, 1.0])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_image_to_image_runs_as_many_steps_as_there(steps, strength):
    line = f"Steps: {steps}, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: {strength}"
    wanted = int(min(strength, 0.999) * steps) + 1
    assert remake_of(parse(line)).request({"image": PNG}).steps_to_run == wanted


@pytest.mark.parametrize(
    ("name", "version", "sampler", "schedule"),
    [
        ("DPM++ 2M Karras", "v1.5.1", "dpmpp-2m", "karras"),
        ("DPM++ 2M", "v1.5.1", "dpmpp-2m", "linspace"),
        ("Euler a", "v1.7.0", "euler-a", "linspace"),
        ("DDIM", "v1.6.0", "ddim", None),
    ],
)
def test_the_sampler_by_its_old_name(name, version, sampler, schedule):
    line = f"Steps: 20, Sampler: {name}, CFG scale: 7, Seed: 1, Size: 64x64, Version: {version}"
    fields = remake_of(parse(line)).fields
    assert (fields["sampler"], fields.get("schedule")) == (sampler, schedule)


def test_an_unknown_sampler_is_told():
    remake = remake_of(parse("Steps: 20, Sampler: DPM adaptive, Schedule type: Fancy, CFG scale: 7, Seed: 1"))
    assert remake.fields["sampler"] == "dpm2" and "schedule" not in remake.fields
    assert any("DPM adaptive" in miss for miss in remake.misses) and any("Fancy" in miss for miss in remake.misses)


words = st.text(alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=40)
prompts = words.filter(lambda text: not any(line.startswith(NEGATIVE) for line in text.split("\n")))
shares = st.floats(0.001, 1, allow_nan=False)


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    """Any request whose fields AUTOMATIC1111's text has names for."""
    sampler = draw(st.sampled_from(sorted(SAMPLERS)))
    fields: dict[str, Any] = {
        "prompt": draw(prompts), "negative": draw(words.map(str.strip)), "sampler": sampler,
        "schedule": draw(st.sampled_from(["karras", "simple", "linspace", "sgm-uniform", "beta", "trailing"])),
        "steps": draw(st.integers(1, 1000)), "guidance": draw(st.floats(0, 50)), "rescale": draw(shares),
        "seed": draw(st.integers(0, 2**63 - 1)), "width": draw(st.integers(8, 40)) * 8, "height": 64,
        "rng": draw(st.sampled_from(["cpu", "philox"])), "clip_skip": draw(st.sampled_from([None, 2, 12])),
        "emphasis": draw(st.sampled_from(["a1111", "no-norm", "comfy", "compel", "ignore", "literal"])),
    }  # fmt: skip
    if sampler in TAKES_ETA:
        fields["eta"] = draw(st.floats(0, 1))
    if draw(st.booleans()):
        fields |= {"variation_seed": draw(st.integers(0, 9)), "variation_strength": draw(shares)}
    kind = draw(st.sampled_from(["text", "image", "mask", "highres"]))
    if kind == "highres":
        fields["highres"] = HighRes(scale=draw(st.floats(1.01, 4)), upscale="lanczos", strength=1.0)
    elif kind != "text":
        fields |= {"image": PNG, "strength": 1.0}
    if kind == "mask":
        fields |= {"mask": PNG, "mask_blur": draw(st.integers(0, 64)), "mask_invert": draw(st.booleans())}
        fields |= {"mask_fill": draw(st.sampled_from(["original", "noise", "zero"])), "only_masked": True}
    return GenerateRequest(**fields)


@settings(max_examples=60, deadline=None)
@given(requests())
def test_what_is_written_reads_back(request):
    remake = remake_of(parse(text_of(request)))
    assert remake.misses == ()
    again = remake.request(dict.fromkeys(remake.pictures, PNG))
    if request.highres is not None:
        steps = request.steps
        request = request.changed(highres=request.highres.model_copy(update={"steps": steps}))
    assert again == request


@given(st.text(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read(text):
    remake_of(parse(text))
    remake_of(parse("x\nSteps: 3, Sampler: Euler, Seed: 1, " + text))


def test_values_are_quoted_as_json():
    values = {"A1": "a, b", "A2": 'say "x"', "A3": "two\nlines", "A4": "plain", "A5": "back\\slash, é"}
    text = write("p", "n", values)
    assert parse(text).settings == values and text.count("\n") == 2


@pytest.mark.parametrize(
    "text",
    ["a" * 10**5, " " * 10**5, 'ab:"' * 25_000, 'ab:"\\",' * 15_000, "Steps: 1, " * 10_000, "\n" * 10**5],
    ids=["letters", "spaces", "quotes", "escapes", "keys", "lines"],
)
def test_no_text_takes_for_ever(text):
    begun = time.process_time()
    remake_of(parse(text))
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Steps: many, Sampler: Euler, Seed: 1", 'Steps: "many" is no number'),
        ("Steps: 3, Sampler: Euler, Seed: 1, CFG scale: nan", 'CFG scale: "nan" is no number'),
        ("Steps: 3, Sampler: Euler, Seed: 1, Size: big", 'Size: "big" is no WIDTHxHEIGHT'),
        ("Steps: 3, Sampler: Euler, Seed: 1, Tiling: True", 'not known here and left out: "Tiling"'),
        ("Steps: 3, Sampler: Euler, Seed: 1, Model x: \x1b[2J", 'not known here and left out: "Model x"'),
    ],
)
def test_what_cannot_be_matched_is_told(line, told):
    assert told in remake_of(parse(line)).misses
