"""`ldm sheet`: every prompt, in order, with one seed, in its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.apps.cli import main
from ldm.apps.sheet import compose
from ldm.data.heldout import read_prompts
from ldm.models.presets import small, tiny


@pytest.fixture
def folder(tiny_file, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(small()))))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_the_grid_goes_row_by_row():
    colours = [(10 * i, 0, 0) for i in range(5)]
    grid = np.asarray(compose([flat(colour) for colour in colours], columns=2, margin=3))
    assert grid.shape == (3 * 13 + 3, 2 * 23 + 3, 3)
    for index, colour in enumerate(colours):
        top, left = 3 + index // 2 * 13, 3 + index % 2 * 23
        assert (grid[top : top + 10, left : left + 20] == colour).all()
        assert (grid[top - 1, left : left + 20] == 255).all()
    assert (grid[-13:, 26:] == 255).all()  # the place of a sixth


def test_labels_stand_below_and_touch_no_picture():
    labels = ["a very long label that goes on for many words, more than fit", "b"]
    plain = np.asarray(compose([flat((0, 0, 255), (64, 64))] * 2, columns=2))
    labelled = np.asarray(compose([flat((0, 0, 255), (64, 64))] * 2, columns=2, labels=labels))
    assert labelled.shape[0] > plain.shape[0] and labelled.shape[1] == plain.shape[1]
    below = labelled[68:]
    assert (
        np.array_equal(labelled[:68], plain[:68]) and (below < 128).any() and (below[:, 64 + 4 : 64 + 8] == 255).all()
    )


def test_a_sheet_from_a_file_is_each_prompt_with_the_same_seed(folder, capsys):
    prompts = ["a red apple", "a pear", "a plum"]
    Path("prompts.json").write_text(json.dumps([{"prompt": prompt, "kind": "x"} for prompt in prompts]))
    assert main(["sheet", "--prompts", "prompts.json", "--columns", "2", "--steps", "2", "-o", "grid.png"]) == 0
    assert capsys.readouterr().out.startswith("grid.png  3 pictures, seed 0  ")
    sheet = Image.open("grid.png")
    assert json.loads(sheet.text["ldm-sheet"]) == {"seed": 0, "columns": 2, "prompts": prompts}
    assert main(["generate", *prompts, "--seed", "0", "--steps", "2"]) == 0
    singles = [Image.open(name) for name in ("a-red-apple-0.png", "a-pear-0.png", "a-plum-0.png")]
    assert np.array_equal(np.asarray(sheet), np.asarray(compose(singles, 2)))
    assert main(["sheet", "--prompts", "prompts.json", "--steps", "1", "-o", "grid.png"]) == 0
    assert Path("grid-2.png").exists()


def test_plain_texts_are_prompts_too(folder):
    Path("prompts.json").write_text('["a", "b"]')
    assert main(["sheet", "--prompts", "prompts.json", "--steps", "1", "--labels"]) == 0
    assert Path("sheet.png").exists()


def test_the_published_prompts_are_64_and_fit_a_sheet():
    prompts = [record["prompt"] for record in read_prompts()]
    assert len(prompts) == len(set(prompts)) == 64
