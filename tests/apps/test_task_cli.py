"""Every task and every field of a request on the command line: what the flags ask for, and how they say no."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.apps import generate as drawing
from ldm.apps.cli import main, parse
from ldm.apps.flags.requests import requests_of
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sd2_unclip, sd_x4_upscaler, small, tiny
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.request import Apg, GenerateRequest, HighRes, PriorUse
from ldm.pipeline.text.wildcards import expand

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.fixture
def folder(tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with pictures, wildcards and LoRAs, and a tiny model by default."""
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(sd1()))))
    monkeypatch.delenv("LDM_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 64), 80).convert("RGB").save("in.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    Path("binary").write_bytes(b"\xff\xfe\x00\x01" * 10)
    Path("cards").mkdir()
    Path("cards/colour.txt").write_text("red\ngreen\nblue\nwhite\nblack\n")
    Path("webui/models/Lora").mkdir(parents=True)
    for index, name in enumerate(("cat", "dog")):
        torch.manual_seed(index)
        tensors = {f"{QUERY}.lora_down.weight": torch.randn(2, 64), f"{QUERY}.lora_up.weight": torch.randn(64, 2)}
        save_file(tensors, f"webui/models/Lora/{name}.safetensors")
    return tmp_path


def requests(*arguments: str) -> list[GenerateRequest]:
    return requests_of(parse(arguments))  # pyright: ignore[reportArgumentType]


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"), dtype=int)


def bytes_of(name: str) -> bytes:
    return Path(name).read_bytes()


FLAGS: dict[str, dict[str, Any]] = {
    "generate x --negative y --size 72x64 --steps 9 --sampler euler-a --schedule karras --guidance 3 --rescale 0.5"
    " --eta 0.25 --clip-skip 2 --seed 5 --count 3": {
        "prompt": "x", "negative": "y", "width": 72, "height": 64, "steps": 9, "sampler": "euler-a",
        "schedule": "karras", "guidance": 3.0, "rescale": 0.5, "eta": 0.25, "clip_skip": 2, "seed": 5, "count": 3,
    },
    "generate x --emphasis comfy --empty-negative zeros --original-size 1024x768 --crop 0,64": {
        "emphasis": "comfy", "empty_negative": "zeros", "original_size": (1024, 768), "crop": (0, 64),
    },
    "generate x --guidance-start 0.1 --guidance-end 0.8 --perturbed 3": {
        "guidance_start": 0.1, "guidance_end": 0.8, "perturbed": 3.0,
    },
    "generate x --reuse 3": {"reuse": 3},
    "generate x --merge-tokens 0.5": {"merge_tokens": 0.5},
    "generate x --apg": {"apg": Apg()},
    "generate x --apg-norm 2.5 --apg-parallel 1 --apg-momentum 0": {"apg": Apg(norm=2.5, parallel=1.0, momentum=0.0)},
    "generate x --refiner other.safetensors": {"refine_at": 0.8},
    "generate x --refiner other.safetensors --refine-at 0.6": {"refine_at": 0.6},
    "generate x --prior p.safetensors": {"prior": PriorUse()},
    "generate x --prior p.safetensors --prior-guidance 3 --prior-steps 9 --prior-choose 4": {
        "prior": PriorUse(guidance=3.0, steps=9, choose=4),
    },
    "generate x --highres 1.5": {"highres": HighRes(scale=1.5)},
    "generate x --highres 2 --highres-upscale lanczos --highres-strength 0.5 --highres-steps 8": {
        "highres": HighRes(scale=2.0, upscale="lanczos", strength=0.5, steps=8),
    },
    "generate x --variation-seed 7 --variation-strength 0.25 --rng philox": {
        "variation_seed": 7, "variation_strength": 0.25, "rng": "philox",
    },
    "generate x --rng comfy --batch-index 3": {"rng": "comfy", "batch_index": 3},
    "generate x --control net --control-image in.png": {"controls": "in.png"},
    "img2img x --image in.png --strength 0.5": {"image": "in.png", "strength": 0.5},
    "inpaint x --image in.png --mask mask.png": {
        "image": "in.png", "mask": "mask.png", "strength": None, "mask_blur": 4, "mask_fill": "original",
    },
    "inpaint x --image in.png --mask mask.png --strength 0.9 --mask-blur 0 --mask-fill noise --mask-invert --mask-soft"
    " --only-masked --mask-padding 8": {
        "strength": 0.9, "mask_blur": 0, "mask_fill": "noise", "mask_invert": True, "mask_soft": True,
        "only_masked": True, "mask_padding": 8,
    },
    "outpaint x --image in.png --left 8 --bottom 16": {"image": "in.png", "extend": (8, 0, 0, 16), "strength": None},
    "outpaint x --image in.png --all 32 --top 0 --strength 0.9 --mask-blur 2": {
        "extend": (32, 0, 32, 32), "strength": 0.9, "mask_blur": 2,
    },
    "upscale --image in.png --noise 40": {"prompt": "", "image": "in.png", "upscale_noise": 40, "strength": None},
    "variations --image in.png": {"prompt": "", "vary": "in.png", "vary_noise": 0, "image": None},
    "variations x --image in.png --noise 300": {"prompt": "x", "vary_noise": 300},
    "variations --image in.png --inverted --eta 0.3": {"vary_inverted": True, "sampler": "ddim", "eta": 0.3},
    "depth2img x --image in.png --depth mask.png": {"image": "in.png", "depth": "mask.png", "strength": 0.75},
}  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), FLAGS.items(), ids=FLAGS)
def test_flags_become_fields_and_all_others_keep_their_defaults(line, expected, folder):
    (request,) = requests(*line.split())
    for name, value in expected.items():
        found = getattr(request, name)
        if name == "controls":
            found = found[0].image
        assert found == (bytes_of(value) if isinstance(found, bytes) else value), name
    assert {"seed": -1, "strength": None, "image": None}.items() <= dict(requests("generate", "x")[0]).items()


def test_every_field_has_a_flag():
    assert {name for fields in FLAGS.values() for name in fields} == set(GenerateRequest.model_fields)


def test_wildcards_are_each_pictures_own(folder):
    line = "a {tall|small} __colour__ cat"
    drawn = requests(
        "generate", line, "--negative", "__colour__", "--count", "8", "--seed", "3", "--wildcards", "cards"
    )
    expected = [(seed, expand(line, seed, [Path("cards")]), expand("__colour__", seed, [Path("cards")]))
                for seed in range(3, 11)]  # fmt: skip
    found = [(r.seed + i, r.prompt, r.negative) for r in drawn for i in range(r.count) if r.seed is not None]
    assert found == expected and len({prompt for _, prompt, _ in found}) > 2
    assert all((a.prompt, a.negative) != (b.prompt, b.negative) for a, b in pairwise(drawn))


def test_what_wildcards_leave_equal_stays_together(folder):
    (request,) = requests("generate", "a {cat|cat}", "--count", "4", "--seed", "3")
    assert (request.prompt, request.count, request.seed) == ("a cat", 4, 3)
    (request,) = requests("generate", "a {cat|dog}", "--emphasis", "literal")
    assert request.prompt == "a {cat|dog}" and request.seed == -1


def test_a_drawn_seed_is_the_one_that_the_wildcards_had(folder):
    (request,) = requests("generate", "{a|b|c|d|e|f|g|h}")
    assert request.seed not in (None, -1) and request.prompt == expand("{a|b|c|d|e|f|g|h}", request.seed)


def test_the_variations_seed_counts_up_with_the_seed(folder):
    flags = ["--variation-seed", "100", "--variation-strength", "0.5", "--count", "9", "--seed", "1"]
    drawn = requests("generate", "{a|b|c}", *flags)
    assert len(drawn) > 1
    assert all(r.seed is not None and r.variation_seed == r.seed + 99 for r in drawn)


def test_comfys_batch_keeps_its_seed(folder):
    drawn = requests("generate", "{a|b|c}", "--rng", "comfy", "--count", "9", "--seed", "1", "--batch-index", "2")
    assert {r.seed for r in drawn} == {1} and len(drawn) > 1
    assert [r.batch_index + i for r in drawn for i in range(r.count)] == list(range(2, 11))


def test_the_expanded_prompt_is_recorded(folder):
    assert main(["generate", "__colour__", "--wildcards", "cards", "--seed", "1", "--steps", "1", "-o", "a.png"]) == 0
    request = read_metadata("a.png").request()
    assert request is not None and request.prompt == expand("__colour__", 1, [Path("cards")])


REFUSED: dict[str, tuple[str, str]] = {
    "emphasis": ("generate x --emphasis loud", "invalid choice 'loud' for argument '--emphasis'"),
    "rng": ("generate x --rng dice", "invalid choice 'dice' for argument '--rng'"),
    "guidance interval": ("generate x --guidance-start 0.8 --guidance-end 0.2", "guidance_start: found 0.8, expected"),
    "guidance end": ("generate x --guidance-end 1.5", "guidance_end: found 1.5, expected a number from 0 to 1"),
    "perturbed nan": ("generate x --perturbed nan", "perturbed: found nan, expected a number from 0 to 20"),
    "merge tokens": (
        "generate x --merge-tokens 0.8",
        "merge_tokens: found 0.8, expected a number from 0 to 0.75",
    ),
    "apg norm": ("generate x --apg-norm -1", "apg: norm: found -1.0, expected a number from 0 to 100"),
    "apg and rescale": ("generate x --apg --rescale 0.5", "rescale: found together with apg"),
    "refine at": ("generate x --refine-at 0.8", "refine-at: found without a refiner"),
    "refine at 2": ("generate x --refiner f --refine-at 2", "refine_at: found 2.0, expected"),
    "no refiner": ("generate x --refiner none.safetensors", "none.safetensors: "),
    "wrong refiner": ("generate x --refiner binary", "binary: "),
    "highres": ("generate x --highres 1", "highres: scale: found 1.0, expected a number above 1, at most 4"),
    "highres flags alone": ("generate x --highres-strength 0.5", "highres: found none for the flags that go with it"),
    "highres strength": (
        "generate x --highres 2 --highres-strength 0.01",
        "highres.strength: 0.01 of 24 steps is less",
    ),
    "variation": ("generate x --variation-seed 3", "variation_seed: found without variation_strength"),
    "variation seed": ("generate x --variation-seed -2 --variation-strength 1", "variation_seed: found -2"),
    "original size": ("generate x --original-size big", 'original-size: found "big", expected WIDTHxHEIGHT'),
    "crop": ("generate x --crop 5", 'crop: found "5", expected LEFT,TOP, as 0,64'),
    "crop minus": ("generate x --crop=-1,5", 'crop: found "-1,5"'),
    "no wildcards": ("generate __flower__ --wildcards cards", "flower"),
    "wildcards folder": ("generate __colour__ --wildcards none", "colour"),
    "inpaint without mask": ("inpaint x --image in.png", "--mask FILE"),
    "wrong mask": ("inpaint x --image in.png --mask binary", "mask: image: found another kind of file"),
    "missing mask": ("inpaint x --image in.png --mask none.png", "none.png: cannot be read"),
    "mask folder": ("inpaint x --image in.png --mask cards", "cards: found a folder, expected a file"),
    "mask blur": ("inpaint x --image in.png --mask mask.png --mask-blur 65", "mask_blur: found 65, expected"),
    "mask blur text": ("inpaint x --image in.png --mask mask.png --mask-blur y", "--mask-blur: found 'y', expected a"),
    "mask fill": ("inpaint x --image in.png --mask mask.png --mask-fill red", "invalid choice 'red'"),
    "tiny strength": ("inpaint x --image in.png --mask mask.png --strength 0.01", "strength: 0.01 of 24 steps is less"),
    "outpaint nothing": (
        "outpaint x --image in.png",
        "outpaint: found no pixels to add, expected some on a side; give --all",
    ),
    "outpaint minus": ("outpaint x --image in.png --left=-8", "extend: found -8, expected four whole numbers"),
    "outpaint much": ("outpaint x --image in.png --all 5000", "extend: found 5000, expected four whole numbers"),
    "upscale noise": ("upscale x --image in.png --noise 351", "upscale_noise: found 351, expected"),
    "no upscaler": ("upscale x --image in.png", "is no upscaler, expected the x4 upscaler"),
    "variations noise": ("variations --image in.png --noise 1000", "vary_noise: found 1000, expected"),
    "wrong picture to vary": ("variations --image binary", "vary: image: found another kind of file"),
    "depth neither": ("depth2img x --image in.png", "depth: found both or neither"),
    "depth both": ("depth2img x --image in.png --depth mask.png --depth-model m", "depth: found both or neither"),
    "wrong depth": ("depth2img x --image in.png --depth binary", "depth: image: found another kind of file"),
    "lora in a prompt": ("generate <lora:bird:1> --models webui", "prompt: <lora:bird>: bird: no such file, and no l"),
    "lora by path": ("generate <lora:webui/models/Lora/cat:1> --models webui", "found a path, expected the name"),
    "lora by another path": (r"generate <lora:..\cat:1> --models webui", "found a path, expected the name"),
    "lora without folders": ("generate <lora:cat:1>", "found no folder to look in; name one by --models, or in LDM"),
    "lora weight": ("generate <lora:cat:much> --models webui", "'much'"),
    "lora without a name": ("generate <lora::1> --models webui", ""),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_with_nothing_written(line, message, folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldm: ") and err.count("\n") == 1 and len(err) < 1000
    assert message in err
    assert sorted(folder.rglob("*")) == before


def draw(*arguments: str) -> int:
    return main(["generate", *arguments, "--seed", "1", "--steps", "1", "--device", "cpu", "--models", "webui"])


def test_a_lora_by_name_in_the_prompt_is_the_one_given_as_a_flag(folder):
    assert draw("x", "-o", "plain.png") == 0
    assert draw("x<lora:cat:0.5>", "-o", "tag.png") == 0
    assert draw("x<lora:cat:0.25:0.5>", "-o", "two.png") == 0  # the first is for the text towers
    assert draw("x", "--lora", "cat:0.5", "-o", "flag.png") == 0
    assert np.array_equal(pixels("tag.png"), pixels("flag.png")) and (pixels("tag.png") != pixels("plain.png")).any()
    record = read_metadata("two.png").record
    assert record is not None and record["request"]["prompt"] == "x<lora:cat:0.25:0.5>"
    assert [(a["name"], a["unet"], a["text"]) for a in record["adapters"]] == [("cat", 0.5, 0.25)]


@pytest.mark.parametrize("command", ["generate", "grid"])
@pytest.mark.parametrize("line", ["x<lora:cat:1> --lora cat", "x<lora:cat:1><lora:cat:1>", "x --lora cat --lora cat"])
def test_an_adapter_that_is_asked_for_twice(command, line, folder, monkeypatch, capsys):
    """Whether by flag or in the prompt, and before anything is loaded."""
    monkeypatch.setattr("ldm.apps.flags.adapters.read_adapter", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr("ldm.pipeline.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    axis = ["--x", "steps=1,2"] if command == "grid" else []
    assert main([command, *line.split(), *axis, "--models", "webui"]) == 2
    err = capsys.readouterr().err
    assert "cat.safetensors: is asked for twice, by --lora or <lora:...>; give it once" in err and err.count("\n") == 1


def test_prompts_with_the_same_loras_share_them(folder, capsys, monkeypatch):
    """Each set is put on once, beside those that the flags name, and no prompt has another one's."""
    put_on = []
    original = drawing.adapted
    monkeypatch.setattr(drawing, "adapted", lambda *given: (put_on.append(given[1]), original(*given))[1])
    assert draw("a<lora:dog:1>", "b", "c<lora:dog:1>", "--lora", "cat:0.5") == 0
    sets = [[(one.path.stem, one.unet, one.text) for one in wanted] for wanted in put_on]
    assert sets == [[("cat", 0.5, 0.5), ("dog", 1.0, 1.0)], [("cat", 0.5, 0.5)]]
    records = {name: read_metadata(f"{name}-1.png").record for name in ("a-lora-dog-1", "b", "c-lora-dog-1")}
    adapters = {name: [a["name"] for a in record["adapters"]] for name, record in records.items() if record}
    assert adapters == {"a-lora-dog-1": ["cat", "dog"], "b": ["cat"], "c-lora-dog-1": ["cat", "dog"]}


def test_a_refiner_goes_on_where_it_is_told_to(folder):
    """The model as its own refiner with the same prompt changes nothing but rounding; the hand-over is recorded."""
    base = ["generate", "x", "--seed", "1", "--steps", "4", "--sampler", "euler", "--device", "cpu"]
    assert main([*base, "-o", "plain.png"]) == 0
    assert main([*base, "-o", "refined.png", "--refiner", os.environ["LDM_MODEL"]]) == 0
    assert np.abs(pixels("plain.png") - pixels("refined.png")).max() <= 1
    record = read_metadata("refined.png").record
    assert record is not None and record["request"]["refine_at"] == 0.8


def test_a_depth_map_is_found_before_the_model_is_loaded(folder, monkeypatch, capsys):
    """The estimator is given the picture, and its answer becomes the request's depth map, 16 bit deep."""
    from ldm.models import depth

    grey = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    seen = []

    def estimate(path: Path, picture: Image.Image) -> Image.Image:
        seen.append((str(path), picture.size))
        return grey

    asked: list[GenerateRequest] = []

    def no_model(*_: object, **__: object) -> None:
        raise LdmError("stop here")

    monkeypatch.setattr(depth, "estimate", estimate)
    monkeypatch.setattr("ldm.pipeline.load.load", no_model)
    changed = GenerateRequest.changed
    monkeypatch.setattr(
        GenerateRequest, "changed", lambda self, **fields: (asked.append(made := changed(self, **fields)), made)[1]
    )
    assert main(["depth2img", "x", "--image", "in.png", "--depth-model", "midas"]) == 2
    assert seen == [("midas", (64, 64))] and "stop here" in capsys.readouterr().err
    assert asked[0].depth is not None
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(asked[0].depth))), np.asarray(grey))


SHORT = ("--steps", "2", "--seed", "1", "-o", "out.png")


def test_inpainting_keeps_the_rest(folder):
    line = "inpaint x --image in.png --mask mask.png --steps 4 --seed 1 --mask-fill noise -o out.png"
    assert main(line.split()) == 0
    changed = (pixels("out.png") != pixels("in.png")).any(axis=2)
    assert changed[16:48, 16:48].any() and changed[20:44, 20:44].mean() > 0.5
    changed[16:48, 16:48] = False
    assert not changed.any()


def test_outpainting_keeps_the_old_and_adds_the_new(folder):
    assert main(["outpaint", "x", *SHORT, "--image", "in.png", "--left", "16", "--bottom", "8"]) == 0
    assert pixels("out.png").shape == (72, 80, 3)
    assert np.array_equal(pixels("out.png")[:64, 16:], pixels("in.png"))


def test_a_second_pass(tiny_file, folder, monkeypatch):
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(small()))))
    assert main(["generate", "x", *SHORT, "--highres", "1.5", "--highres-strength", "0.5"]) == 0
    assert Image.open("out.png").size == (96, 96)


@pytest.mark.parametrize(
    ("config", "line", "size"),
    [
        (sd_x4_upscaler(), "upscale --image in.png --noise 30", (256, 256)),
        (sd2_unclip("l"), "variations --image in.png --size 64", (64, 64)),
        (sd2(in_channels=5), "depth2img x --image in.png --depth mask.png --size 64", (64, 64)),
    ],
    ids=["upscale", "variations", "depth2img"],
)
def test_tasks_with_models_of_their_own(config, line, size, tiny_file, folder):
    assert main([*line.split(), "--model", str(tiny_file(tiny(config))), *SHORT]) == 0
    assert Image.open("out.png").size == size
