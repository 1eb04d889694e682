"""What pictures say about themselves, read back by us and by other programs' rules."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import piexif
import piexif.helper
import pytest
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager

from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion, Origin
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.pipeline.metadata.exif import exif_bytes
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.names import SCHEDULE_TITLES
from ldm.pipeline.picture import OtherPart, Picture, parameters_text
from ldm.pipeline.request import GenerateRequest
from ldm.samplers import SAMPLERS

HASH = "0123456789abcdef" * 4

# The rule by which AUTOMATIC1111's web UI splits the last line, as documented for its infotext.
A1111_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def picture(model: str | None = "ldm-small", **fields: Any) -> Picture:
    base: dict[str, Any] = {"prompt": "a red apple", "seed": 42, "width": 128, "height": 96, "schedule": "karras"}
    request = GenerateRequest(**base | fields)
    return Picture(Image.new("RGB", (128, 96), "red"), 0, request.seed or 0, request, model, "float32", (), 1.0)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def test_parameters_text():
    assert parameters_text(picture(), HASH) == (
        "a red apple\n"
        "Steps: 24, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 42, Size: 128x96, "
        "Model hash: 0123456789, Model: ldm-small, RNG: CPU, Version: ldm-0.1.0"
    )


def test_all_that_may_stand_there():
    given = picture(
        model="my, model: v2", prompt="two\nlines", negative="bad\nthings", sampler="ddim", schedule="leading", eta=0.5,
        clip_skip=2, guidance=7.5,
    )  # fmt: skip
    assert parameters_text(given) == (
        "two\nlines\nNegative prompt: bad\nthings\n"
        "Steps: 24, Sampler: DDIM, Schedule type: DDIM, CFG scale: 7.5, Seed: 42, Size: 128x96, "
        'Model: "my, model: v2", Clip skip: 2, RNG: CPU, Eta: 0.5, Version: ldm-0.1.0'
    )


def test_it_reads_as_the_web_ui_reads_it():
    given = picture(model="a, b", negative="x")
    *prompt, last = parameters_text(given, HASH).split("\n")
    settings = dict(A1111_SETTING.findall(last))
    assert prompt == ["a red apple", "Negative prompt: x"]
    assert settings["Steps"] == "24" and settings["Seed"] == "42" and json.loads(settings["Model"]) == "a, b"
    assert set(settings) >= {"Sampler", "Schedule type", "CFG scale", "Size", "Model hash", "Version"}


def test_every_schedule_has_a_title():
    from ldm.diffusion.sigmas import SCHEDULES

    assert set(SCHEDULE_TITLES) == set(SCHEDULES)
    assert {s.schedule for s in SAMPLERS.values()} <= set(SCHEDULE_TITLES)


KEPT: list[Image.Image] = []
"""sd-parsers knows the picture that it read last by its `id`, which a new one may get when the old one is gone."""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize("prompt", ["a red apple", "日本語 🍎, (x:1.2)", "a\nb", ""])
def test_another_program_reads_it(prompt, suffix, tmp_path):
    path = picture(prompt=prompt, negative="ugly, blurry", guidance=6.5).save(tmp_path / f"a{suffix}", model_hash=HASH)
    KEPT.append(image := Image.open(path))
    found = ParserManager().parse(image)
    assert found is not None and found.generator.value == "AUTOMATIC1111"
    (sampler,) = found.samplers
    assert sampler.name == "DPM++ 2M"
    assert sampler.parameters == {"scheduler": "Karras", "cfg_scale": "6.5", "seed": "42", "steps": "24"}
    assert sampler.model is not None and (sampler.model.name, sampler.model.hash) == ("ldm-small", HASH[:10])
    assert [p.value for p in sampler.prompts] == ([prompt] if prompt else [])
    assert [p.value for p in sampler.negative_prompts] == ["ugly, blurry"]


@pytest.mark.parametrize(
    "prompt", ["a red apple", "日本語 🍎\n\nSteps: 3", "Negative prompt: no\nSteps: 1, a: b, c: d"]
)
def test_ours_reads_back_to_the_same_picture(prompt, model, tmp_path):
    (drawn,) = model.generate(prompt, negative="x: y", steps=2, guidance=3.0, sampler="euler-a", eta=0.5)
    path = drawn.save(tmp_path / "a.png")
    found = read_metadata(path)
    request = found.request()
    assert request is not None and request.seed is not None and request.count == 1
    assert request == drawn.request
    assert found.record is not None and found.record["dtype"] == "float32"
    again = model.generate(request)[0]
    assert np.array_equal(np.asarray(again.image), np.asarray(Image.open(path)))


def test_one_of_a_batch_reads_back_as_itself(model, tmp_path):
    drawn = model.generate("x", steps=2, count=3, seed=7)
    again = read_metadata(drawn[2].save(tmp_path / "a.png")).request()
    assert again is not None and (again.seed, again.count) == (9, 1)
    difference = np.asarray(model.generate(again)[0].image, dtype=int) - np.asarray(drawn[2].image, dtype=int)
    assert np.abs(difference).max() <= 1  # a batch's products are summed in another order


def test_a_picture_that_began_with_a_picture_cannot_be_remade_alone(model, tmp_path):
    start = model.generate("x", steps=1)[0].image
    path = model.image_to_image("y", start, steps=2)[0].save(tmp_path / "a.png")
    found = read_metadata(path)
    assert found.request() is None and found.record is not None
    assert found.parameters is not None and "Denoising strength: 0.75" in found.parameters


def test_the_model_is_named_by_its_file(model, tmp_path):
    named = replace(model, origin=Origin(tmp_path / "My model.safetensors"))
    assert "Model: My model," in parameters_text(named.generate("x", steps=1)[0])
    assert "Model" not in parameters_text(model.generate("x", steps=1)[0])


def test_parts_from_other_files_are_named(model, tmp_path):
    """In our record, and for the autoencoder where AUTOMATIC1111's web UI has it: after the model."""
    vae, folder = tmp_path / "kl-f8.vae.safetensors", tmp_path / "tower"
    save_checkpoint(model, tmp_path / "a.safetensors")
    save_checkpoint(model, vae)
    folder.mkdir()
    loaded = load(tmp_path / "a.safetensors", vae=vae, unet=vae)
    short = hashlib.sha256(vae.read_bytes()).hexdigest()[:10]
    drawn = loaded.generate("x", steps=1)[0]
    read = read_metadata(drawn.save(tmp_path / "x.png", model_hash=HASH))
    assert read.record is not None and read.parameters is not None
    assert read.record["parts"] == [{"kind": k, "name": vae.name, "hash": short} for k in ("unet", "vae")]
    assert f"Model hash: 0123456789, Model: a, VAE hash: {short}, VAE: {vae.name}, RNG: CPU" in read.parameters
    of_folder = replace(drawn, parts=(OtherPart("vae", folder),))
    assert "Model: a, VAE: tower, RNG: CPU" in parameters_text(of_folder)
    assert "VAE" not in parameters_text(model.generate("x", steps=1)[0])


FOREIGN = {
    "none": {},
    "no json": {"ldm": "{"},
    "a list": {"ldm": "[1, 2]"},
    "no request": {"ldm": '{"version": "9"}'},
    "deep": {"ldm": "[" * 100_000},
    "other request": {"ldm": '{"request": "os.system"}'},
}


@pytest.mark.parametrize("chunks", FOREIGN.values(), ids=FOREIGN)
def test_foreign_text_is_left_alone(chunks, tmp_path):
    info = PngImagePlugin.PngInfo()
    for keyword, text in chunks.items():
        info.add_text(keyword, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    found = read_metadata(tmp_path / "a.png")
    assert found.parameters is None and found.record is None and found.request() is None


def test_a_hostile_request_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("ldm", json.dumps({"request": {"prompt": "x", "model": "../../etc/passwd"}}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(LdmError, match='not known here and left out: "model"'):
        read_metadata(tmp_path / "a.png").request()


def test_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.gif")
    whole = picture().save(tmp_path / "c.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[:-12] + bytes(4) + b"iCCP" + zlib.crc32(b"iCCP").to_bytes(4, "big"))
    said = {"a.png": "found a web page, expected a PNG", "b.gif": "found a GIF, expected a PNG"}
    for name in ("a.png", "b.gif", "c.png", "missing.png"):
        with pytest.raises(LdmError, match=f"{name}: {said.get(name, 'cannot be read')}"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")])
def test_exif_is_what_piexif_reads(suffix, kind, tmp_path):
    """By which AUTOMATIC1111's web UI reads; and our own request is there too."""
    given = picture(prompt="日本語 🍎\nx", negative="é")
    path = given.save(tmp_path / f"a{suffix}", model_hash=HASH)
    with Image.open(path) as image:
        assert image.format == kind
        tags = piexif.load(image.info["exif"])["Exif"]
    text = piexif.helper.UserComment.load(tags[piexif.ExifIFD.UserComment])
    assert text == parameters_text(given, HASH)
    found = read_metadata(path)
    assert (found.format, found.parameters, found.request()) == (kind, text, given.request)


def test_a_text_by_piexif_is_read_and_goes_before_the_chunk(tmp_path):
    comment = piexif.helper.UserComment.dump("über\nSteps: 3, Sampler: Euler, Seed: 1", encoding="unicode")
    exif = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "another")
    for kind, more in (("PNG", {"pnginfo": info}), ("JPEG", {}), ("WEBP", {})):
        Image.new("RGB", (8, 8)).save(tmp_path / "a", kind, exif=exif, **more)
        remake = read_metadata(tmp_path / "a").remake()
        assert remake is not None and remake.fields["prompt"] == "über" and remake.fields["steps"] == 3


def test_what_does_not_fit_into_a_jpeg(tmp_path):
    """Signs that take 4 bytes in both: the text stays, our record goes, and it is said."""
    given = replace(picture(prompt="🍎" * 4000, negative="🍏" * 4000), notes=("long " * 400,))
    jpeg, webp = (read_metadata(given.save(tmp_path / name)) for name in ("a.jpg", "a.webp"))
    assert jpeg.record is None and jpeg.parameters == parameters_text(given)
    assert jpeg.notes == ("ldm: the record is not there, removed or too long for a JPEG; what only it knows is lost",)
    assert webp.request() == given.request


def test_all_keys_in_the_order_of_the_web_ui():
    given = picture(
        image=picture_bytes(Image.new("RGB", (64, 64), "red")), mask=picture_bytes(Image.new("RGB", (64, 64))),
        strength=0.5, only_masked=True, mask_invert=True, mask_fill="zero", variation_seed=3, variation_strength=0.25,
        clip_skip=2, rng="philox", emphasis="no-norm", rescale=0.5, guidance_start=0.25, refine_at=0.8,
    )  # fmt: skip
    pixels = hashlib.md5(b"\xff\0\0" * 64 * 64).hexdigest()
    assert (
        "Model: ldm-small, Variation seed: 3, Variation seed strength: 0.25, Denoising strength: 0.5, Clip skip: 2, "
        f"Init image hash: {pixels}, RNG: NV, Refiner switch at: 0.8, Mask mode: Inpaint not masked, Mask blur: 4, "
        "Masked content: latent nothing, Inpaint area: Only masked, Masked area padding: 32, Emphasis: No norm, "
        "Skip Early CFG: 0.25, CFG rescale: 0.5, Version: ldm-"
    ) in parameters_text(given)


def test_names_that_are_no_text(tmp_path):
    """A file's name may hold bytes that are no UTF-8, which Python keeps as half a sign."""
    given = picture(model="a\udcffb")
    for name in ("a.png", "a.jpg", "a.webp"):
        found = read_metadata(given.save(tmp_path / name))
        assert found.record is not None and found.record["model"] == "a\udcffb"
        assert found.parameters is not None and "Model: a\\udcffb" in found.parameters


def test_pictures_that_are_needed(tmp_path):
    data = picture_bytes(Image.new("RGB", (64, 64), "white"))
    given = picture(image=data, mask=data, controls=[{"network": "canny", "image": data, "weight": 0.5}])
    found = read_metadata(given.save(tmp_path / "a.png"))
    remake = found.remake()
    digest = hashlib.sha256(data).hexdigest()
    assert found.request() is None and remake is not None
    assert remake.pictures == {"image": digest, "mask": digest} and remake.controls[0]["image_sha256"] == digest
    assert remake.request({"image": data, "mask": data}, [data]) == given.request
    for pictures, controls, message in (
        ({}, [data], f"image: found none, expected the file .*{digest}"),
        ({"image": data, "mask": data}, [], "control images: found 0, expected the 1"),
        ({"image": data, "mask": data, "vary": data}, [data], "vary: found one, but"),
    ):
        with pytest.raises(LdmError, match=message):
            remake.request(pictures, controls)


GRAPH = {
    "1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 3, "cfg": 2, "positive": ["2", 0]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "hi", "is_changed": [float("nan")]}},
}


def test_the_graph_of_comfyui(tmp_path):
    """In a PNG's chunk and in a WebP's EXIF; a NaN, which it writes, is no obstacle."""
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(GRAPH)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    for name in ("a.png", "a.webp"):
        remake = read_metadata(tmp_path / name).remake()
        assert remake is not None and (remake.source, remake.fields["prompt"]) == ("ComfyUI", "hi")


OTHERS = {
    "InvokeAI": ({"invokeai_metadata": "{}"}, "InvokeAI metadata: found, not read"),
    "NovelAI": ({"Software": "NovelAI", "Comment": "{}"}, "NovelAI metadata: found, not read"),
    "SwarmUI": ({"parameters": '{"sui_image_params": {}}'}, "parameters: JSON of another program, not read"),
    "workflow": ({"workflow": "{}"}, "ComfyUI workflow: found without its graph, not read"),
    "5 MB": ({"ldm": json.dumps({"request": {"prompt": "x" * 5_000_000}})}, "too long to be read"),
    "5 MB text": ({"parameters": "x, " * 2_000_000}, "too long to be read"),
    "deep": ({"ldm": '{"request": {"prompt": ' + "[" * 200 + "]" * 200 + "}}"}, "no JSON object that can be read"),
    "deep graph": ({"prompt": '{"1": ' + "[" * 90_000 + "]" * 90_000 + "}"}, "no JSON object that can be read"),
    "huge number": ({"ldm": '{"request": {"steps": ' + "9" * 5000 + "}}"}, "no JSON object that can be read"),
}


@pytest.mark.parametrize(("chunks", "note"), OTHERS.values(), ids=OTHERS)
def test_what_is_not_read_is_said(chunks, note, tmp_path):
    info = PngImagePlugin.PngInfo()
    for keyword, text in chunks.items():
        info.add_text(keyword, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    found = read_metadata(tmp_path / "a.png")
    assert found.remake() is None and any(note in line for line in found.notes)


def test_a_picture_inside_of_metadata_is_not_taken(tmp_path):
    data = picture_bytes(Image.new("RGB", (64, 64)))
    record = {"request": {"prompt": "x", "image": base64.b64encode(data).decode(), "lora": "/etc/passwd"}}
    info = PngImagePlugin.PngInfo()
    info.add_text("ldm", json.dumps(record))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    remake = read_metadata(tmp_path / "a.png").remake()
    assert remake is not None and remake.request().image is None
    assert remake.misses == ('not known here and left out: "image", "lora"',)


def test_broken_exif_is_no_obstacle(tmp_path):
    """Every byte of a small EXIF block changed in turn."""
    image, whole = Image.new("RGB", (8, 8)), exif_bytes("Steps: 1", "{}")
    for place in range(6, 60):
        for value in (0, 0x7F, 0xFF):
            block = whole[:place] + bytes([value]) + whole[place + 1 :]
            image.save(tmp_path / "a.webp", exif=block)
            read_metadata(tmp_path / "a.webp").remake()


def test_a_picture_too_large_to_be_read(tmp_path, monkeypatch):
    path = picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(LdmError, match=r"a.png: cannot be read as a PNG, JPEG or WebP picture .*decompression bomb"):
        read_metadata(path)
