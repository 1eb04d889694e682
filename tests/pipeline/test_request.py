"""The one request record: what it takes, what it refuses, and in which words."""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
from typing import Any, get_args

import pytest
from PIL import Image

from ldm.errors import LdmError
from ldm.pipeline.request import (
    MAX_SEED,
    TAKES_ETA,
    GenerateRequest,
    SamplerName,
    ScheduleName,
    as_request,
    from_json,
)


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"width": 513}, "width: found 513, expected a whole number from 64 to 2048 .* multiple of 8; the nearest is 512"),
    ({"width": 0}, "width: found 0, expected a whole number from 64 to 2048"),
    ({"width": -8}, "width: found -8,"),
    ({"height": 10**9}, "height: found 1000000000,"),
    ({"height": 2056}, "height: found 2056,"),
    ({"width": "512"}, 'width: found "512",'),
    ({"width": 512.0}, "width: found 512.0,"),
    ({"width": True}, "width: found true,"),
    ({"width": 2048, "height": 2048}, "width x height: found 2048x2048, expected at most 3145728 pixels"),
    ({"steps": 0}, "steps: found 0, expected a whole number from 1 to 1000"),
    ({"steps": -1}, "steps: found -1,"),
    ({"steps": 1001}, "steps: found 1001,"),
    ({"steps": 1e3}, "steps: found 1000.0,"),
    ({"steps": True}, "steps: found true,"),
    ({"steps": None}, "steps: found null,"),
    ({"guidance": math.nan}, "guidance: found nan, expected a number from 0 to 50"),
    ({"guidance": math.inf}, "guidance: found inf,"),
    ({"guidance": -5}, "guidance: found -5,"),
    ({"guidance": 1e6}, "guidance: found 1000000.0,"),
    ({"guidance": "7"}, 'guidance: found "7",'),
    ({"guidance": True}, "guidance: found true,"),
    ({"rescale": 1.5}, "rescale: found 1.5, expected a number from 0 to 1"),
    ({"eta": -0.1, "sampler": "ddim"}, "eta: found -0.1,"),
    ({"eta": math.nan, "sampler": "ddim"}, "eta: found nan,"),
    ({"eta": 0.5, "sampler": "euler"}, "eta: the sampler euler takes none; those that do: ddim, euler-a"),
    ({"seed": 2**63}, "seed: found 9223372036854775808, expected a whole number from 0 to 2\\^63 - 1, or -1"),
    ({"seed": 2**64}, "seed: found"),
    ({"seed": 10**26}, "seed: found"),
    ({"seed": 10**5000}, "seed: found a huge number"),
    ({"seed": -2}, "seed: found -2"),
    ({"seed": 1.5}, "seed: found 1.5"),
    ({"seed": "7"}, 'seed: found "7"'),
    ({"seed": MAX_SEED, "count": 2}, "seed: found 9223372036854775807 for 2 pictures"),
    ({"count": 0}, "count: found 0, expected a whole number from 1 to 64"),
    ({"count": 10**6}, "count: found 1000000"),
    ({"sampler": "eulr"}, 'sampler: found "eulr", expected one of ddim, .*, lcm; did you mean euler\\?'),
    ({"sampler": None}, "sampler: found null, expected one of ddim"),
    ({"sampler": 3}, "sampler: found 3, expected one of ddim"),
    ({"schedule": "karas"}, 'schedule: found "karas", expected one of karras, .*; did you mean karras\\?'),
    ({"empty_negative": "none"}, "empty_negative: .* expected one of encoded, zeros"),
    ({"prompt": None}, "prompt: found null, expected a text of at most 4000 characters"),
    ({"prompt": "x" * 4001}, "prompt: found 4001 characters, expected a text of at most 4000 characters; shorten it"),
    ({"prompt": "a\0b"}, "prompt: found a NUL character"),
    ({"prompt": b"bytes"}, "prompt: found 5 bytes"),
    ({"prompt": "\ud800"}, "prompt: found characters that are not valid Unicode"),
    ({"negative": "\0"}, "negative: found a NUL character"),
    ({"negative": ["a", "b"]}, "negative: found \\['a', 'b'\\]"),
    ({"clip_skip": 0}, "clip_skip: found 0"),
    ({"strength": 0.5}, "strength: found without an image"),
    ({"image": png(), "strength": 0.0}, "strength: found 0.0, expected a number above 0, at most 1"),
    ({"image": png(), "strength": 1.01}, "strength: found 1.01"),
    ({"image": png(), "strength": math.nan}, "strength: found nan"),
    ({"image": png(), "strength": 0.04, "steps": 20}, "strength: 0.04 of 20 steps is less than one step.* 0.05;"),
    ({"rng": "comfy", "batch_index": 62, "count": 3}, "batch_index: found 62 for 3 pictures, expected .* at most 64"),
    ({"image": png(), "mask_fill": "zero"}, "mask_fill: found without mask or extend"),
    ({"image": png(), "mask_blur": 8}, "mask_blur: found without mask or extend"),
    ({"image": png(), "mask_soft": True, "extend": (8, 0, 0, 0)}, "mask_soft: found without mask"),
    ({"mask_invert": True}, "mask_invert: found without mask, where alone it acts; give that too"),
    ({"image": png(), "only_masked": True}, "only_masked: found without mask"),
    ({"image": png(), "mask": png(), "mask_padding": 8}, "mask_padding: found without only_masked"),
    ({"vary_noise": 8}, "vary_noise: found without vary"),
    ({"image": b""}, "image: found an empty file"),
    ({"image": b"<html>"}, "image: found a web page"),
    ({"image": "not base64!"}, "image: found text that is not base64"),
    ({"image": 3}, "image: found 3, expected a picture's bytes"),
    ({"stps": 3}, '"stps": no such field; did you mean steps\\?; the fields are prompt, negative, emphasis'),
    ({"\x1b[31mred\n": 3}, "no such field"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[f"{list(f)[-1]}-{i}" for i, (f, _) in enumerate(REFUSED)])
def test_refused_in_one_line(fields, message):
    with pytest.raises(LdmError, match=message) as caught:
        GenerateRequest(**{"prompt": "x"} | fields)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 800


def test_a_prompt_is_needed():
    with pytest.raises(LdmError, match=r"^prompt: found none, expected a text"):
        GenerateRequest()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 64, "height": 2048},
        {"steps": 1000},
        {"guidance": 0},
        {"guidance": 50.0},
        {"seed": -1},
        {"seed": None},
        {"seed": MAX_SEED},
        {"prompt": ""},
        {"prompt": "x" * 4000},
        {"prompt": "日本 🍎\n<b>"},
        {"image": png(), "strength": 0.05, "steps": 20},
        {"image": png(), "strength": 1},
        {"image": png(), "extend": (8, 0, 0, 0), "mask_fill": "zero", "mask_blur": 8},
        {"image": png(), "mask": png(), "only_masked": True, "mask_padding": 8, "mask_soft": True},
        {"rng": "comfy", "batch_index": 62, "count": 2},
    ],
)
def test_allowed(fields):
    request = GenerateRequest(**{"prompt": "x"} | fields)
    assert all(getattr(request, name) == value for name, value in fields.items())


def test_every_name_is_a_real_one():
    from ldm.diffusion.sigmas import SCHEDULES
    from ldm.samplers import SAMPLERS

    assert get_args(SamplerName) == tuple(SAMPLERS)
    assert get_args(ScheduleName) == tuple(SCHEDULES)
    takes_eta = [name for name, s in SAMPLERS.items() if "eta" in inspect.signature(s.sample).parameters]
    assert list(TAKES_ETA) == takes_eta


def test_frozen():
    with pytest.raises(Exception, match="frozen"):
        GenerateRequest(prompt="x").steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("strength", "steps", "run"),
    [(0.5, 20, 10), (0.29, 100, 29), (0.7, 10, 7), (0.999, 10, 9), (1.0, 7, 7), (0.05, 20, 1), (None, 20, 15)],
)
def test_strength_is_exact_to_the_step(strength, steps, run):
    assert GenerateRequest(prompt="x", image=png(), strength=strength, steps=steps).steps_to_run == run


def test_changes_are_checked():
    request = GenerateRequest(prompt="x", seed=3)
    assert as_request(request, {}) is request
    assert as_request(request, {"steps": 7}) == GenerateRequest(prompt="x", seed=3, steps=7)
    assert as_request("y", {"steps": 7}) == GenerateRequest(prompt="y", steps=7)
    with pytest.raises(LdmError, match=r"^steps"):
        request.changed(steps=0)


def test_json_round_trip_with_a_picture():
    request = GenerateRequest(prompt="ä\n", image=png(), strength=0.5, seed=MAX_SEED, guidance=3.25)
    assert from_json(request.model_dump_json()) == request
    url = "data:image/png;base64," + base64.encodebytes(png()).decode()
    assert from_json(json.dumps({"prompt": "x", "image": url})).image == png()


def test_the_record_keeps_all_but_the_picture():
    request = GenerateRequest(prompt="x", image=png(), strength=0.5)
    record = request.record()
    assert len(record.pop("image_sha256")) == 64
    assert {name: getattr(request, name) for name in record} == record
    assert set(record) == set(GenerateRequest.model_fields) - {"image"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[]", "expected a JSON object"),
        ("null", "found null, expected a JSON object"),
        ('{"prompt": "x", "prompt": "y"}', 'found the field "prompt" twice'),
        ('{"prompt": "x", "guidance": NaN}', "found NaN"),
        ('{"prompt": "x", "guidance": -Infinity}', "found -Infinity"),
        ('{"prompt": "x", "guidance": 1e999}', "guidance: found inf"),
        ('{"prompt": "x", "steps": 24.0}', "steps: found 24.0"),
        ("[" * 100_000, "no valid JSON"),
        ('{"a":' * 100_000, "no valid JSON"),
        ('\ufeff{"prompt": "x"}', "no valid JSON"),
        ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "no valid JSON"),
        (b'{"prompt": "\xff"}', "no valid JSON"),
    ],
    ids=range(14),
)
def test_bad_json(text, message):
    with pytest.raises(LdmError, match=message):
        from_json(text)
