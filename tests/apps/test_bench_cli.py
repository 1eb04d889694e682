"""`ldm bench` by its command: flags, the table, JSON, and the file of each kind of machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm.apps.bench import COLUMNS, notes, plan_of, table
from ldm.apps.cli import main, parse
from ldm.apps.flags.commands import Bench
from ldm.errors import LdmError
from ldm.evaluation import bench_diffusers
from ldm.evaluation.bench import Entry
from ldm.evaluation.bench_results import as_json, by_part, save
from ldm.models.presets import sd1, tiny

STEP = Entry(
    "step", 256, 5, "s", 0.5, 0.75, 2.0, 1.5, 4.0, 1.45, 3.9, {"ours": "bf16", "theirs_best": "fp32", "other": None},
    0.1, 0.2, 0.01, 0.02, agreement=1e-6,
)  # fmt: skip
DECODE = Entry("decode", 256, 5, "s", 2.0, psnr_db=float("inf"), l2_error=0.0, note="diffusers was left out")
MEMORY = Entry("memory", 256, 1, "bytes", 2**30, 2**31, 2**32, 2.0, 4.0)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_diffusers, "installed", lambda: None)


@pytest.mark.usefixtures("alone")
def test_a_file_is_measured_without_diffusers_and_kept(tiny_file, tmp_path, capsys):
    file, threads = tiny_file(tiny(sd1())), torch.get_num_threads()
    flags = ["--model", str(file), "--parts", "step,decode", "--size", "64,128", "--runs", "2", "--threads", "1"]
    assert main(["bench", *flags, "--save", str(tmp_path / "bench"), "--json"]) == 0
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert set(told) == {"model", "machine", "versions", "threads", "step 64", "step 128", "decode 64", "decode 128"}
    assert told["step 64"]["ours_s"] > 0 and told["step 64"]["runs"] == 2 and told["threads"] == 1
    assert told["step 64"]["ratio"] is None and "not installed" in told["step 64"]["note"]
    assert "step, 128 x 128" in err and "kept in" in err
    (kept,) = (tmp_path / "bench").iterdir()
    content = json.loads(kept.read_text())
    assert content["machine"] == told["machine"]
    assert set(content["results"][file.name]) == {f"{p} {n}, 1 threads" for p in ("step", "decode") for n in (64, 128)}
    assert content["results"][file.name]["step 64, 1 threads"]["ours_s"] == told["step 64"]["ours_s"]


@pytest.mark.usefixtures("alone")
def test_the_table_says_that_ours_was_measured_alone(tiny_file, capsys):
    assert (
        main(["bench", "--model", str(tiny_file(tiny(sd1()))), "--parts", "text", "--size", "64", "--runs", "1"]) == 0
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == " ".join(COLUMNS).split()
    assert out.splitlines()[1].startswith("text") and "not installed" in out.splitlines()[-1]


def test_a_row_shows_what_its_entry_holds():
    columns = {str(column.header): list(column.cells) for column in table([STEP, DECODE, MEMORY]).columns}
    assert columns["ours"] == ["0.5 s", "2 s", "1024 MiB"] and columns["best"] == ["0.75 s", "", "2048 MiB"]
    assert columns["to best"] == ["1.50x", "", "2.00x"] and columns["to default"] == ["4.00x", "", "4.00x"]
    assert columns["error"] == ["0.01", "inf dB", ""] and columns["theirs"] == ["0.02", "", ""]
    assert notes([STEP, DECODE])[0] == "step 256: ours: bf16; theirs best: fp32; the median of 5"
    assert notes([STEP, DECODE, DECODE])[-1] == "diffusers was left out"


def test_json_names_units_and_holds_no_infinity():
    told = as_json(STEP)
    assert told["ours_s"] == 0.5 and told["theirs_best_s"] == 0.75 and told["theirs_default_s"] == 2.0
    assert told["ratio"] == 1.5 and told["max_error"] == 0.1 and told["settings"]["ours"] == "bf16"
    assert as_json(MEMORY)["ours_bytes"] == 2**30 and "ours_s" not in as_json(MEMORY)
    assert as_json(DECODE)["psnr_db"] is None
    json.dumps([as_json(entry) for entry in (STEP, DECODE, MEMORY)], allow_nan=False)
    assert list(by_part([STEP, MEMORY])) == ["step", "memory"]


def test_results_are_added_to_what_a_machines_file_has(tmp_path):
    path = save(tmp_path, "sd21", "cpu", [STEP, DECODE])
    assert save(tmp_path, "sdxl", "cpu", [STEP]) == path
    save(tmp_path, "sd21", "cpu", [Entry("step", 256, 5, "s", 0.25)])
    save(tmp_path, "sd21", "cpu", [Entry("step", 256, 5, "s", 0.125, settings={"ours": "bf16, compiled"})])
    results = json.loads(path.read_text())["results"]
    threads = torch.get_num_threads()
    assert results["sd21"][f"step 256, {threads} threads"]["ours_s"] == 0.25
    assert results["sd21"][f"step 256, compiled, {threads} threads"]["ours_s"] == 0.125
    assert results["sd21"][f"decode 256, {threads} threads"]["ours_s"] == 2.0
    assert results["sdxl"][f"step 256, {threads} threads"]["ours_s"] == 0.5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"{}", b'{"results": 3}', b'{"results": {"sd21": 1}}'])
def test_a_file_that_is_none_of_ours_is_left_alone(content: bytes, tmp_path: Path):
    path = save(tmp_path, "sd21", "cpu", [STEP])
    path.write_bytes(content)
    with pytest.raises(LdmError, match=r"move it away|holds no results"):
        save(tmp_path, "sd21", "cpu", [STEP])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "step,speed"], "parts: found speed, expected some of step,decode,text,picture,load,memory,tune"),
        (["--size", "big"], "size: found big, expected sides in pixels"),
        (["--threads", "0"], "threads: found 0, expected 1 to 1024"),
        (["--preset", "sd21", "--model", "x"], "found both --model and --preset"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], message: str):
    command = parse(["bench", *flags])
    assert isinstance(command, Bench)
    with pytest.raises(LdmError, match=message):
        plan_of(command)


def test_flags_become_a_plan():
    command = parse(["bench", "--preset", "sd21", "--size", "512,256,512", "--parts", "step, decode,step", "--alone"])
    assert isinstance(command, Bench)
    plan = plan_of(command)
    assert plan.model == "sd21" and plan.sizes == (512, 256) and plan.parts == ("step", "decode") and plan.alone


def test_tuning_without_its_packages_is_said_before_anything_is_written(monkeypatch, capsys):
    monkeypatch.setattr("ldm.apps.bench.find_spec", lambda package: None if package == "peft" else object())
    assert main(["bench", "--parts", "tune", "--alone", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(
        'tune: peft is not installed; pip install "ldm[tune]", or leave the part out\n'
    )
