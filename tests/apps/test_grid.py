"""`ldm grid`: axes as they are written, cells as they would be drawn alone, and what is left when one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.apps import grid as grids
from ldm.apps.cli import main, parse
from ldm.apps.flags.axes import Axis, axis_of, request_at
from ldm.apps.flags.commands import Grid
from ldm.apps.output.tiles import centred, compose, message_tile, with_axes
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, small, tiny
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.request import GenerateRequest

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.fixture
def folder(tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, and a tiny model by default."""
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(small()))))
    monkeypatch.delenv("LDM_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(name: str | Path) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"))


# Axes


@pytest.mark.parametrize(
    ("text", "field", "values"),
    [
        ("steps=6,12, 24", "steps", (6, 12, 24)),
        ("steps=1-5", "steps", (1, 2, 3, 4, 5)),
        ("steps=1-10 (+3)", "steps", (1, 4, 7, 10)),
        ("steps=1-12(+3)", "steps", (1, 4, 7, 10)),
        ("steps=10-1 (-3)", "steps", (10, 7, 4, 1)),
        ("steps=3-1", "steps", (3, 2, 1)),
        ("steps=1-10 [4]", "steps", (1, 4, 7, 10)),
        ("steps=0-10 [4]", "steps", (0, 3, 6, 10)),  # cut, not rounded, as A1111 does
        ("steps=4-9 [1]", "steps", (4,)),
        ("steps=2,5-7,30", "steps", (2, 5, 6, 7, 30)),
        ("seed=7,8", "seed", (7, 8)),
        ("guidance=1-3", "guidance", (1.0, 2.0, 3.0)),
        ("guidance=1-2 (+0.25)", "guidance", (1.0, 1.25, 1.5, 1.75, 2.0)),
        ("rescale=0-1 [5]", "rescale", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("rescale=0-0.3 (+0.1)", "rescale", (0.0, 0.1, 0.2, 0.3)),  # no 0.30000000000000004
        ("eta=1e-2,.5,default", "eta", (0.01, 0.5, None)),
        ("clip-skip=1,2,default", "clip_skip", (1, 2, None)),
        ("sampler=euler,heun", "sampler", ("euler", "heun")),
        ("schedule=karras,default", "schedule", ("karras", None)),
        ("mask_soft=true,false", "mask_soft", (True, False)),
        ("highres=1.5,2", "highres.scale", (1.5, 2.0)),
        ("highres-strength=0.3,0.6", "highres.strength", (0.3, 0.6)),
        ("highres_steps=4,default", "highres.steps", (4, None)),
        ("apg.momentum=-0.75,0", "apg.momentum", (-0.75, 0.0)),
        ("apg-momentum=-1-1 [3]", "apg.momentum", (-1.0, 0.0, 1.0)),
        ("size=64,72x64", "size", ((64, 64), (72, 64))),
        ('prompt=cat,"a dog, sitting",bird', "prompt", ("cat", "a dog, sitting", "bird")),
        ("prompt=a=b,c", "prompt", ("a=b", "c")),
        ("negative=,ugly", "negative", ("", "ugly")),
        ("model=a.safetensors,b", "model", ("a.safetensors", "b")),
        ("lora=0,0.5,1", "lora", (0.0, 0.5, 1.0)),
    ],
)
def test_values_as_they_are_written(text, field, values):
    assert axis_of(text) == Axis(field, values)
    assert [type(value) for value in axis_of(text).values] == [type(value) for value in values]


def test_seeds_are_drawn():
    (first, second, third) = axis_of("seed=-1,-1,3").values
    assert third == 3 and first != second and min(first, second) >= 0


def test_labels_name_the_field():
    assert axis_of("guidance=1-2 (+0.5)").labels == ["guidance 1", "guidance 1.5", "guidance 2"]
    assert axis_of("highres-strength=0.3").labels == ["highres strength 0.3"]
    assert axis_of("clip_skip=2,default").labels == ["clip skip 2", "clip skip default"]
    assert axis_of("size=72x64").labels == ["size 72x64"]
    assert axis_of("model=some/where/mine.safetensors").labels == ["model mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "steps: found no values, expected FIELD=V1,V2,..."),
        ("steps=", "found no values"),
        ("steps=1,,3", "steps: found an empty value"),
        ("stepz=1", '"stepz": is no field of a grid; expected one of '),
        ("=1", '"": is no field'),
        ("count=1,2", '"count": is no field'),
        ("image=a.png", '"image": is no field'),
        ("controls=a", '"controls": is no field'),
        ("steps=six", 'steps: found "six", expected a whole number or a range, as 1-5'),
        ("steps=1.5", 'steps: found "1.5", expected a whole number'),
        ("steps=1-2.5", 'steps: found "1-2.5", expected a whole number'),
        ("steps=1-5 (+0)", "expected a range that leads from its first number to its second"),
        ("steps=1-5 (-1)", "expected a range that leads"),
        ("steps=1-5 [0]", "expected a range that leads"),
        ("steps=1-1000000000", "steps: found 1000000000 values, expected at most 400"),
        ("guidance=0-1 [999999999]", "guidance: found 999999999 values"),
        ("seed=" + ",".join("1" * 401), "seed: found 401 values"),
        ("steps=__import__('os')", "expected a whole number or a range"),
        ("guidance=1+1", "expected a number or a range"),
        ("mask_soft=1", "expected true or false"),
        ("size=wide", 'size: found "wide", expected WIDTHxHEIGHT'),
        ('prompt="cat,dog', "prompt: found"),
    ],
)
def test_what_is_no_axis(text, message):
    with pytest.raises(LdmError) as error:
        axis_of(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_of_one_record_go_together():
    request = request_at({"prompt": "x"}, {"highres.scale": 1.5, "highres.strength": 0.25, "apg.norm": 3.0}, {})
    assert request.highres is not None and (request.highres.scale, request.highres.strength) == (1.5, 0.25)
    assert request.apg is not None and request.apg.norm == 3.0 and request.apg.momentum == -0.75


# Cells


def cells(*arguments: str) -> list[grids.Cell]:
    command = parse(["grid", *arguments])
    assert isinstance(command, Grid)
    return grids.cells_of(command, axis_of(command.x), axis_of(command.y) if command.y else grids.NO_AXIS)


def test_cells_row_by_row_differ_in_the_axes_alone():
    base = GenerateRequest(prompt="a cat", seed=5, guidance=2.0)
    found = cells("a cat", "--x", "steps=4,6", "--y", "sampler=euler,heun", "--seed", "5", "--guidance", "2")
    assert [(cell.row, cell.column) for cell in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [cell.request for cell in found] == [
        base.changed(steps=steps, sampler=sampler) for sampler in ("euler", "heun") for steps in (4, 6)
    ]
    assert found[1].label == "steps 6, sampler euler"


def test_one_axis_and_one_drawn_seed():
    found = cells("x", "--x", "steps=1-3")
    assert len({cell.request.seed for cell in found}) == 1 and found[0].request.seed not in (None, -1)
    assert [cell.label for cell in found] == ["steps 1", "steps 2", "steps 3"]


def test_words_take_the_place_of_the_first():
    found = cells("a cat, cats", "--negative", "no cat", "--x", "prompt=cat,dog,red bird")
    assert [(c.request.prompt, c.request.negative) for c in found] == [
        ("a cat, cats", "no cat"),
        ("a dog, dogs", "no dog"),
        ("a red bird, red birds", "no red bird"),
    ]


def test_fields_that_fit_only_together():
    """Neither axis need be valid with the flags alone."""
    found = cells("x", "--x", "eta=0,1", "--y", "sampler=ddim,euler-a", "--steps", "3")
    assert [(c.request.sampler, c.request.eta) for c in found] == [
        ("ddim", 0.0), ("ddim", 1.0), ("euler-a", 0.0), ("euler-a", 1.0),
    ]  # fmt: skip
    found = cells("x", "--x", "variation_seed=1,2", "--y", "variation_strength=0.5,1", "--seed", "3")
    assert (found[3].request.variation_seed, found[3].request.variation_strength) == (2, 1.0)


def test_wildcards_follow_the_seed():
    found = cells("{a|b|c|d|e|f|g|h}", "--x", "seed=1-8")
    assert len({cell.request.prompt for cell in found}) > 2


REFUSED: dict[str, tuple[list[str], str]] = {
    "no axis": ([], "--x"),
    "unknown field": (["--x", "stepz=1,2"], '"stepz": is no field of a grid'),
    "value": (["--x", "steps=0,2"], "steps: found 0, expected a whole number from 1 to 1000"),
    "value of the last cell": (["--x", "seed=1,2", "--y", "guidance=1,99"], "guidance: found 99.0, expected"),
    "sampler": (["--x", "sampler=euler,eulr"], 'sampler: found "eulr", expected one of'),
    "nan": (["--x", "guidance=nan"], "guidance: found nan, expected"),
    "seed": (["--x", "seed=-5"], "seed: found -5, expected"),
    "size": (["--x", "size=64,65"], "width: found 65, expected"),
    "twice": (["--x", "steps=1,2", "--y", "steps=3,4"], "y: found steps, which x has already"),
    "too many": (["--x", "seed=1-100", "--y", "steps=1-5"], "grid: found 100 x 5 cells, expected at most 400 in all"),
    "strength of nothing": (["--x", "strength=0.5,1"], "strength: found without an image"),
    "word": (["--x", "prompt=cow,dog"], 'prompt: found no "cow" in it'),
    "lora of nothing": (["--x", "lora=0,1"], "lora: found 0 to weigh, expected one; give --lora once"),
    "no such lora": (["--x", "lora=0,1", "--lora", "none"], "none: "),
    "no such model": (["--x", "model=none.safetensors"], 'model: "none.safetensors": no such file'),
    "output": (["--x", "steps=1", "-o", "grid.jpg"], "grid.jpg: expected a name that ends in .png"),
    "output folder": (["--x", "steps=1", "-o", "sub"], "sub: expected a name that ends in .png"),
    "cells in a file": (["--x", "steps=1", "--cells", "file"], "file: is not a folder"),
    "image": (["--x", "strength=0.5,1", "--image", "none.png"], "none.png: cannot be read"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_before_anything_is_loaded(arguments, message, folder, capsys, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ldm.pipeline.load.load", never)
    Path("file").touch()
    assert main(["grid", "a cat", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldm: ") and err.count("\n") == 1 and message in err
    assert [path.name for path in folder.iterdir()] == ["file"]


# Pictures


def tile_of(name: str, row: int, column: int, columns: int, size: int = 64) -> np.ndarray:
    """A cell's pixels in a grid's file, found from its lower right corner, which has no labels."""
    grid = pixels(name)
    rows = 1 + row
    bottom, right = grid.shape[0] - 4, grid.shape[1] - 4
    top, left = bottom - (rows_of(name) - row) * 68 + 4, right - (columns - column) * 68 + 4
    assert rows <= rows_of(name)
    return grid[top : top + size, left : left + size]


def rows_of(name: str) -> int:
    record = json.loads(Image.open(name).info["ldm-grid"])
    return len(record["y"]["values"]) if record["y"] else 1


def test_every_cell_is_the_picture_drawn_alone(folder, capsys):
    arguments = ["grid", "a cat", "--x", "steps=1,2", "--y", "seed=3,4", "--cells", "cells", "-o", "grid.png"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("grid.png  4 pictures, 0 failed  ")
    for row, seed in enumerate((3, 4)):
        for column, steps in enumerate((1, 2)):
            assert main(["generate", "a cat", "--seed", str(seed), "--steps", str(steps), "-o", "alone.png"]) == 0
            name = f"cells/row-{row + 1}-column-{column + 1}.png"
            assert np.array_equal(pixels(name), pixels("alone.png"))
            assert np.array_equal(tile_of("grid.png", row, column, 2), pixels("alone.png"))
            assert read_metadata(name).record == read_metadata("alone.png").record
            Path("alone.png").unlink()


def test_the_file_says_what_it_shows(folder):
    assert main(["grid", "x", "--x", "steps=1,2", "--y", "clip-skip=default,2", "--seed", "9"]) == 0
    record = json.loads(Image.open("grid.png").info["ldm-grid"])
    assert record["x"] == {"field": "steps", "values": ["1", "2"]}
    assert record["y"] == {"field": "clip_skip", "values": ["default", "2"]}
    assert record["request"]["seed"] == 9 and record["request"]["prompt"] == "x" and record["failed"] == []


def test_a_model_is_loaded_once_and_an_adapter_put_on_once(tiny_file, folder, monkeypatch, capsys):
    """Whichever axis they are on, and each cell is what `generate` draws."""
    torch.manual_seed(0)
    tensors = {f"{QUERY}.lora_down.weight": torch.randn(2, 64), f"{QUERY}.lora_up.weight": torch.randn(64, 2)}
    save_file(tensors, "cat.safetensors")
    one, two = tiny_file(tiny(sd1())), tiny_file(tiny(sd1(in_channels=9)))
    loaded, put_on = [], []
    load, adapted = grids.load_plain, grids.adapted
    monkeypatch.setattr(
        grids, "load_plain", lambda *given, **asked: (loaded.append(given[0].file.name), load(*given, **asked))[1]
    )
    monkeypatch.setattr(
        grids, "adapted", lambda *given: (put_on.append([use.unet for use in given[1]]), adapted(*given))[1]
    )
    shared = ["x", "--seed", "1", "--steps", "1", "--size", "64"]
    axes = ["--x", f"model={one},{two}", "--y", "lora=0,0.5"]
    assert main(["grid", *shared, *axes, "--lora", "cat.safetensors", "--cells", "cells"]) == 0
    assert loaded == [one.name, two.name] and put_on == [[0.0], [0.5], [0.0], [0.5]]
    assert main(["generate", *shared, "--model", str(one), "--lora", "cat.safetensors:0.5", "-o", "a.png"]) == 0
    assert np.array_equal(pixels("cells/row-2-column-1.png"), pixels("a.png"))
    assert (pixels("cells/row-1-column-1.png") != pixels("a.png")).any()
    assert main(["generate", *shared, "--model", str(two), "-o", "b.png"]) == 0
    assert np.array_equal(pixels("cells/row-1-column-2.png"), pixels("b.png"))


def test_words_may_be_adapters(tiny_file, folder, monkeypatch, capsys):
    torch.manual_seed(0)
    tensors = {f"{QUERY}.lora_down.weight": torch.randn(2, 64), f"{QUERY}.lora_up.weight": torch.randn(64, 2)}
    Path("models/Lora").mkdir(parents=True)
    save_file(tensors, "models/Lora/cat.safetensors")
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(sd1()))))
    arguments = ["grid", "x <lora:cat:0>", "--x", "prompt=cat:0,cat:0.5", "--models", ".", "--steps", "1"]
    assert main([*arguments, "--cells", "cells", "--seed", "1"]) == 0
    for column, weight in ((1, 0.0), (2, 0.5)):
        record = read_metadata(f"cells/row-1-column-{column}.png").record
        assert record is not None and [one["unet"] for one in record["adapters"]] == [weight]


def test_a_cell_that_fails_is_grey_and_the_others_are_kept(folder, monkeypatch, capsys):
    draw = grids.draw

    def failing(model, request, *rest):
        if request.steps == 2:
            raise LdmError("denoising: step 1 of 2 gave values that are not finite")
        if request.steps == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(model, request, *rest)

    monkeypatch.setattr(grids, "draw", failing)
    assert main(["grid", "x", "--x", "steps=1-4", "--seed", "1", "--cells", "cells"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("grid.png  4 pictures, 2 failed")
    assert err.splitlines() == [
        "ldm: steps 2: denoising: step 1 of 2 gave values that are not finite",
        "ldm: steps 3: no memory left; draw smaller pictures",
        "ldm: grid.png: 2 of 4 pictures could not be drawn; the first: denoising: step 1 of 2 gave values that are not"
        " finite",
    ]
    assert sorted(path.name for path in Path("cells").iterdir()) == ["row-1-column-1.png", "row-1-column-4.png"]
    assert np.array_equal(tile_of("grid.png", 0, 3, 4), pixels("cells/row-1-column-4.png"))
    grey = tile_of("grid.png", 0, 1, 4)
    assert (grey == 200).mean() > 0.5 and (grey < 100).any()
    failed = json.loads(Image.open("grid.png").info["ldm-grid"])["failed"]
    assert [(one["row"], one["column"]) for one in failed] == [(0, 1), (0, 2)]


@pytest.mark.parametrize("drawn", [0, 2])
def test_ctrl_c_keeps_what_is_drawn(drawn, folder, monkeypatch, capsys):
    draw = grids.draw

    def interrupted(model, request, *rest):
        if request.steps > drawn:
            raise KeyboardInterrupt
        return draw(model, request, *rest)

    monkeypatch.setattr(grids, "draw", interrupted)
    assert main(["grid", "x", "--x", "steps=1-4", "--seed", "1"]) == 130
    assert capsys.readouterr().err.splitlines() == ["ldm: interrupted"]
    assert Path("grid.png").exists() == (drawn > 0)
    if drawn:
        grey = [bool((tile_of("grid.png", 0, column, 4) == 200).mean() > 0.5) for column in range(4)]
        assert grey == [False, False, True, True]
        failed = json.loads(Image.open("grid.png").info["ldm-grid"])["failed"]
        assert {one["error"] for one in failed} == {"not drawn: interrupted"} and len(failed) == 2


def test_a_model_that_cannot_be_read_leaves_the_others(tiny_file, folder, capsys):
    Path("broken.safetensors").write_bytes(b"\0" * 5)
    good = tiny_file(tiny(small()))
    assert main(["grid", "x", "--x", f"model=broken.safetensors,{good}", "--steps", "1"]) == 2
    assert "broken.safetensors" in capsys.readouterr().err and Path("grid.png").exists()


def test_nothing_is_written_where_every_cell_fails(folder, capsys):
    Path("broken.safetensors").write_bytes(b"\0" * 5)
    assert main(["grid", "x", "--x", "steps=1,2", "--model", "broken.safetensors"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "broken.safetensors" in said[-1] and len(said) == 2 and not Path("grid.png").exists()


def test_a_bug_is_not_taken_for_a_failed_cell(folder, monkeypatch):
    def bug(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(grids, "draw", bug)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["grid", "x", "--x", "steps=1"])


def test_cells_of_different_sizes(folder):
    assert main(["grid", "x", "--x", "size=64,96x64", "--steps", "1", "--seed", "1", "--cells", "cells"]) == 0
    grid, small = pixels("grid.png"), pixels("cells/row-1-column-1.png")
    assert grid.shape[1] >= 2 * 96 + 3 * 4
    left = grid.shape[1] - 2 * 100 + 16  # in the middle of 96
    assert np.array_equal(grid[-68:-4, left : left + 64], small)


# Drawing


def test_labels_stand_outside_of_the_pictures_and_inside_of_the_grid():
    tiles = [Image.new("RGB", (128, 96), (0, 0, 255))] * 6
    long = "prompt a very long label that goes on and on for many words, more than could ever fit"
    plain = np.asarray(compose(tiles, 3))
    grid = np.asarray(with_axes(tiles, ["steps 1", long, "steps 3"], ["seed 1", long]))
    top, left = grid.shape[0] - plain.shape[0], grid.shape[1] - plain.shape[1]
    assert np.array_equal(grid[top:, left:], plain)
    assert (grid[:, 0] == 255).all() and (grid[0] == 255).all()  # no letter is cut off
    dark = np.all(grid < 128, axis=2)
    for column in range(3):
        begin = left + 4 + column * 132
        assert dark[:top, begin : begin + 128].any()
        assert not dark[:top, begin + 128 : begin + 132].any()
    for row in range(2):
        begin = top + 4 + row * 100
        assert dark[begin : begin + 96, :left].any()


def test_without_rows_there_is_no_room_for_them():
    tiles = [Image.new("RGB", (64, 64))] * 2
    assert with_axes(tiles, ["a", "b"], [""]).width == compose(tiles, 2).width


def test_a_message_fills_its_tile_and_no_more():
    tile = np.asarray(message_tile("denoising: " + "a reason " * 100, (128, 128)))
    assert tile.shape == (128, 128, 3) and (tile < 100).any()
    assert (tile[:3] == 200).all() and (tile[-3:] == 200).all() and (tile[:, :3] == 200).all()


def test_a_smaller_picture_stands_in_the_middle():
    tile = np.asarray(centred(Image.new("RGB", (10, 20)), (30, 20)))
    assert (tile[:, 10:20] == 0).all() and (tile[:, :10] == 255).all() and (tile[:, 20:] == 255).all()
