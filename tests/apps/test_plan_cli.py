"""`ldm plan` by its command: the page, JSON, and what cannot be planned."""

from __future__ import annotations

import json

import pytest

from ldm.apps.cli import main
from ldm.apps.plan import bytes_of
from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny


def test_a_file_is_planned_as_json(tiny_file, capsys):
    file = tiny_file(tiny(sd1()))
    flags = ["--model", str(file), "--device", "cpu", "--dtype", "float32", "--batch", "4", "--budget", "1B"]
    assert main(["plan", *flags, "--image", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["phases"]) == ["load", "text", "encode", "denoise", "decode"]
    assert told["peak"] == max(told["phases"].values()) and told["fits"] is False and told["room"] == 1
    assert (told["width"], told["height"], told["batch"]) == (64, 64, 4)
    flags = [other["flag"] for other in told["others"]]
    assert flags == ["--dtype bfloat16", "--count 1", "--store int8", "--guidance 1"]  # no smaller size than 64
    assert all(0 < other["peak"] <= told["peak"] for other in told["others"])


def test_a_full_layout_is_planned_without_its_weights(capsys):
    assert main(["plan", "--preset", "sd21", "--dtype", "bfloat16", "--device", "cpu", "--budget", "100GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sd21: a picture of 512x512 on cpu (U-Net bfloat16")
    assert (
        lines[1].split()[0] == "load" and 2.9 < float(lines[1].split()[1]) < 3.4
    )  # 865 M and 84 M in 2 bytes, 340 M in 4
    assert any(line.startswith("fits: 93.13 GiB allowed") for line in lines)
    assert not any("bfloat16 " in line for line in lines[1:])


def test_a_gpu_can_be_planned_for_where_there_is_none(capsys):
    flags = ["plan", "--preset", "sdxl", "--device", "cuda", "--budget", "6GiB"]
    assert main([*flags, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    others = {other["flag"]: other for other in whole["others"]}
    # 2.567 G, 0.818 G and 0.084 G numbers of two bytes stay on the GPU: the U-Net, two text towers, the autoencoder
    assert 6.46 < whole["phases"]["load"] / 2**30 < 6.47 and not whole["fits"]
    assert others["--offload parts"]["fits"] and others["--offload blocks"]["peak"] < 2 * 2**30
    assert main([*flags, "--offload", "parts", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["peak"] == others["--offload parts"]["peak"] == parts["phases"]["denoise"]
    assert parts["phases"]["load"] == 0 and parts["fits"]
    assert "--offload parts" not in {other["flag"] for other in parts["others"]}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--offload", "parts"], "offload parts: the model runs on the CPU"),
        (["--preset", "sd15", "--model", "x"], "found both"),
        (["--budget", "six"], "budget: found six, expected an amount of memory"),
        (["--size", "100"], "multiple of 8"),
        (["--controls", "-1"], "controls: found -1, expected how many ControlNets, 0 to 8"),
        (["--model", "/nowhere/x.safetensors"], "/nowhere/x.safetensors"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, said, capsys):
    assert main(["plan", *flags, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_amounts_of_memory():
    assert bytes_of("6GB") == 6 * 10**9 and bytes_of("1.5 gib") == 3 * 2**29 and bytes_of("7") == 7
    for wrong in ("", "-1GB", "6XB", "0", "6 000"):
        with pytest.raises(LdmError, match="budget: "):
            bytes_of(wrong)


def test_tiles_hold_less_of_a_large_picture(tiny_file, capsys):
    flags = ["plan", "--model", str(tiny_file(tiny(sd1()))), "--device", "cpu", "--dtype", "float32"]
    flags += ["--size", "1024x1024", "--json"]
    peaks = {}
    for tile in ([], ["--vae-tile", "256"]):
        assert main([*flags, *tile]) == 0
        told = json.loads(capsys.readouterr().out)
        peaks[bool(tile)] = told["phases"]["decode"]
        assert ("--vae-tile 256" in [other["flag"] for other in told["others"]]) is not bool(tile)
    assert peaks[True] < 0.8 * peaks[False]
