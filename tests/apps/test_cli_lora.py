"""`--lora` on the command line: files, names in the folders that people have, weights, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.apps.cli import main
from ldm.apps.flags.adapters import split_weights
from ldm.models.presets import sd1, tiny
from ldm.pipeline.metadata.read import read_metadata

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5, 0.5)),
        ("a.safetensors:-0.5:1", ("a.safetensors", -0.5, 1.0)),
        ("C:\\loras\\a.safetensors:.8", ("C:\\loras\\a.safetensors", 0.8, 0.8)),
        ("a:b", ("a:b", 1.0, 1.0)),
        ("a:1:2:3", ("a:1", 2.0, 3.0)),
    ],
)
def test_weights(text, expected):
    assert split_weights(text) == expected


@pytest.fixture
def folder(tmp_path: Path, tiny_file, monkeypatch) -> Path:
    """A working folder with a model, and a LoRA where A1111 keeps them."""
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(sd1()))))
    monkeypatch.chdir(tmp_path)
    loras = tmp_path / "webui" / "models" / "Lora"
    loras.mkdir(parents=True)
    tensors = {f"{QUERY}.lora_down.weight": torch.randn(2, 64), f"{QUERY}.lora_up.weight": torch.randn(64, 2)}
    save_file(tensors, loras / "cat.safetensors")
    return tmp_path


def draw(*arguments: str) -> int:
    return main(["generate", "x", "--seed", "1", "--steps", "1", "--device", "cpu", *arguments])


def test_a_name_and_a_file(folder):
    assert draw("-o", "plain.png") == 0
    assert draw("-o", "named.png", "--models", "webui", "--lora", "cat:0.5:0") == 0
    assert draw("-o", "file.png", "--lora", "webui/models/Lora/cat.safetensors:0.5") == 0
    records = [read_metadata(folder / name).record for name in ("plain.png", "named.png", "file.png")]
    said = [[(a["name"], a["unet"], a["text"]) for a in record["adapters"]] for record in records if record]
    assert said == [[], [("cat", 0.5, 0.0)], [("cat", 0.5, 0.5)]]
    plain, named, file = ((folder / f"{name}.png").read_bytes() for name in ("plain", "named", "file"))
    assert plain != named != file


@pytest.mark.parametrize(
    ("given", "message"),
    [("dog", "dog: no such file"), ("webui/models/Lora/cat.safetensors:nan", "expected a finite number")],
)
def test_what_cannot_be_put_on(given, message, folder, capsys):
    assert draw("--lora", given) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(folder.glob("*.png"))
