"""`ldm classify` and `ldm score`: what they print, draw and refuse."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ldm.apps.cli import main
from ldm.apps.output import match_tables
from ldm.apps.output.heat_map import CELL, heat_map, ink_on, shade
from ldm.models.image_encoder import ImageTower
from ldm.models.presets import sd1, small, tiny
from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.load import random_system, save_checkpoint
from ldm.tasks.classify import Match, classify


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of ours with a whole CLIP."""
    config = tiny(small())
    assert config.clip_image is not None
    torch.manual_seed(0)
    tower = {f"cond_stage_model.model.visual.{n}": t for n, t in ImageTower(config.clip_image).state_dict().items()}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(
        random_system(config), path, extra=tower | {"cond_stage_model.model.logit_scale": torch.tensor(2.0)}
    )
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    names = []
    for index, size in enumerate(((40, 30), (30, 90), (64, 64))):
        names.append(str(tmp_path / f"picture {index}.png"))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(names[-1])
    return names


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_classify_prints_what_the_library_finds(capsys, model, pictures):
    labels = ["cat", "dog", "owl", "bee", "cow", "elk"]
    code, out, err = run(capsys, "classify", *pictures, "--labels", ",".join(labels), "--json", "--model", model)
    assert (code, err) == (0, "")
    opened = [Image.open(path).convert("RGB") for path in pictures]
    expected = classify(load_clip(model, device="cpu"), opened, labels)
    for line, path, matches in zip(out.splitlines(), pictures, expected, strict=True):
        told = json.loads(line)
        assert (told["image"], told["model"], told["independent"]) == (path, "tiny", False)
        assert [label["label"] for label in told["labels"]] == [match.label for match in matches]
        assert [label["probability"] for label in told["labels"]] == pytest.approx(
            [m.probability for m in matches], abs=1e-5
        )
    code, out, _ = run(capsys, "classify", pictures[0], "--labels", ",".join(labels), "--model", model)
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert code == 0 and [row[0] for row in rows] == [match.label for match in expected[0][:5]], "five unless told"
    assert f"{100 * expected[0][0].probability:.1f}" in rows[0]
    _, out, _ = run(capsys, "classify", pictures[0], "--labels", "cat,dog", "--top", "1", "--model", model)
    assert out.count("%") == 1


def test_templates_of_ones_own(capsys, model, pictures):
    arguments = ["classify", pictures[0], "--labels", "cat,dog", "--json", "--model", model]
    _, default, _ = run(capsys, *arguments)
    code, own, _ = run(capsys, *arguments, "--template", "{}", "--template", "two of {}s")
    expected = classify(
        load_clip(model, device="cpu"), [Image.open(pictures[0]).convert("RGB")], ["cat", "dog"], ["{}", "two of {}s"]
    )
    assert code == 0 and own != default
    assert json.loads(own)["labels"][0]["cosine"] == pytest.approx(expected[0][0].cosine, abs=1e-6)


def test_a_file_of_labels_may_have_commas(capsys, model, pictures, tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\ufeffred, white and blue\n\n  a cat \r\n", encoding="utf-8")
    code, out, _ = run(capsys, "classify", pictures[0], "--labels", path, "--json", "--model", model)
    assert code == 0
    assert {label["label"] for label in json.loads(out)["labels"]} == {"red, white and blue", "a cat"}


def test_one_label_is_said_honestly(capsys, model, pictures):
    code, out, err = run(capsys, "classify", pictures[0], "--labels", "cat", "--model", model)
    assert code == 0 and "100.0 %" in out and "its probability is 1 whatever a picture shows" in err


def test_another_script_is_a_warning(capsys, model, pictures):
    code, out, err = run(capsys, "classify", pictures[0], "--labels", "猫,dog", "--model", model)
    assert code == 0 and "猫" in out
    assert err.count("\n") == 1 and "'猫'" in err and "reads English only" in err
    code, _, err = run(capsys, "score", pictures[0], "--texts", "кошка", "--model", model)
    assert code == 0 and "'кошка'" in err


def test_unreadable_pictures_are_named_and_the_others_judged(capsys, model, pictures, tmp_path):
    page, narrow, gone = tmp_path / "page.png", tmp_path / "narrow.png", tmp_path / "gone.png"
    page.write_bytes(b"<!doctype html><p>404")
    Image.new("RGB", (3, 200)).save(narrow)
    bad = [page, narrow, gone]
    code, out, err = run(capsys, "classify", *bad, *pictures, "--labels", "a,b", "--json", "--model", model)
    assert code == 2 and [json.loads(line)["image"] for line in out.splitlines()] == pictures
    assert (
        "page.png: found a web page" in err and "narrow.png: found 3x200" in err and "gone.png: cannot be read" in err
    )
    assert "3 of 6 pictures could not be read" in err.splitlines()[-1] and "image:" not in err
    code, out, err = run(capsys, "score", gone, "--texts", "a,b", "--model", model)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "gone.png: cannot be read" in err


@pytest.mark.parametrize("command", ["classify", "score"])
@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("cat,,dog", "number 2 is empty"), ("cat,cat", "is there twice"), ("", "number 1 is empty"),
        ("none.txt", "there is no file none.txt"),
        (",".join(map(str, range(10_001))), "found 10001, expected 1 to 10000"),
    ],
)  # fmt: skip
def test_bad_texts(capsys, pictures, command, texts, said):
    flag = "--labels" if command == "classify" else "--texts"
    code, out, err = run(capsys, command, pictures[0], flag, texts)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_other_bad_input(capsys, model, pictures, tmp_path, tiny_file):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, said in (
        (["classify", "--labels", "a,b"], "no pictures"),
        (["classify", pictures[0]], "none are given; name them, as --labels cat,dog"),
        (["classify", pictures[0], "--labels", empty], "is empty; expected one text a line"),
        (["classify", pictures[0], "--labels", binary], "is no text in UTF-8"),
        (["classify", pictures[0], "--labels", "a,b", "--top", "0"], "top: found 0, expected 1 or more"),
        (["classify", pictures[0], "--labels", "a,b", "--template", "none", "--model", model], "has no {}"),
        (
            ["classify", pictures[0], "--labels", "a,b", "--model", tiny_file(tiny(sd1()))],
            "text tower but no image tower",
        ),
        (["score", pictures[0], "--texts", "a,b", "-o", "map.jpg"], "map.jpg: expected a name that ends in .png"),
        (
            ["score", *pictures * 30, "--texts", "a", "-o", "map.png"],
            "found 90 pictures and 1 texts, expected at most 64",
        ),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, arguments


def test_score_prints_and_draws_the_matrix(capsys, model, pictures, tmp_path):
    texts = ["a red cat", "an owl"]
    target = tmp_path / "map.png"
    arguments = ["score", *pictures, "--texts", "a red cat", "--texts", "an owl", "--model", model]
    code, out, err = run(capsys, *arguments, "--json", "-o", target)
    told = json.loads(out)
    clip = load_clip(model, device="cpu")
    opened = [Image.open(path).convert("RGB") for path in pictures]
    cosines = (clip.image_vectors(opened) @ clip.text_vectors(texts).T).numpy()
    assert (code, err, told["texts"], told["images"]) == (0, "", texts, pictures)
    np.testing.assert_allclose(told["cosines"], cosines, atol=1e-5)
    np.testing.assert_allclose(told["logits"], np.exp(2.0) * cosines, atol=1e-4)
    assert Image.open(target).width > 3 * CELL
    code, out, _ = run(capsys, *arguments, "-o", target)
    assert code == 0 and out.splitlines()[-1].endswith("map-2.png"), "nothing is overwritten"
    for row, text in enumerate(texts):
        line = next(line for line in out.splitlines() if line.startswith(text))
        assert line.split()[-3:] == [f"{column[row]:.3f}" for column in cosines]


def test_the_matrix_is_cut_to_the_terminal():
    console = Console(width=60, file=StringIO(), record=True)
    paths, texts = [Path(f"{i:03}.png") for i in range(11)], ["text one", "a [bold]second[/bold] text\x1b[2J"]
    cosines = [[i / 20, -i / 20] for i in range(11)]
    match_tables.print_scores(paths, texts, cosines, console)
    text = console.export_text()
    assert all(f"{i:03}" in text and f"{i / 20:.3f}" in text for i in range(11))
    assert max(map(len, text.splitlines())) <= 60 and "[bold]" in text and "\x1b" not in text


def test_bars():
    assert match_tables.bar_of(0, 4) == "    " and match_tables.bar_of(1, 4) == "████"
    assert match_tables.bar_of(0.5, 4) == "██  " and match_tables.bar_of(0.28125, 4) == "█▏  "
    assert match_tables.bar_of(0.5, 4, ascii_only=True) == "##  "
    lengths = [len(match_tables.bar_of(share / 999)) for share in range(1000)]
    assert set(lengths) == {match_tables.BAR}


def test_labels_are_shown_as_they_are():
    console = Console(width=80, file=StringIO(), record=True)
    match_tables.print_matches(Path("a [red].png"), [Match("[b]x[/b]\x1b[2J" + "y" * 80, 0.5, 0.1)], console)
    text = console.export_text()
    assert "a [red].png" in text and "[b]x[/b]\\x1b" in text and "\x1b" not in text and "50.0 %" in text


def test_heat_map_has_the_colour_of_each_cosine():
    pictures = [Image.new("RGB", (50, 20), colour) for colour in ("red", "lime", "blue")]
    cosines = [[0.1, 0.4], [-0.2, 0.3], [0.25, 0.0]]
    drawn = heat_map(pictures, ["a", "b", "c" * 50], ["one", "two"], cosines)
    left, bottom = drawn.width - 3 * CELL - 8, drawn.height - 8
    for column, (picture, values) in enumerate(zip(pictures, cosines, strict=True)):
        assert drawn.getpixel((left + column * CELL + CELL // 2, 40)) == picture.getpixel((0, 0))
        for row, value in enumerate(values):
            y = bottom - (2 - row) * 40 + 8
            assert drawn.getpixel((left + column * CELL + 8, y)) == shade(value, -0.2, 0.4)
            frame = drawn.getpixel((left + column * CELL + 2, y)) == (230, 85, 13)
            assert frame == (value == max(values))


def test_shades_run_from_light_to_dark():
    ramp = [shade(i / 50, 0, 1) for i in range(51)]
    light = [sum(colour) for colour in ramp]
    assert light == sorted(light, reverse=True) and len(set(ramp)) == 51
    assert ink_on(ramp[0]) == (0, 0, 0) and ink_on(ramp[-1]) == (255, 255, 255)
    assert shade(0.3, 0.3, 0.3) == ramp[0], "one value alone"
