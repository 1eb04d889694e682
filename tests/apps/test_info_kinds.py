"""`ldm info` of every kind of file that people have: sizes are the published ones, in sparse files without numbers."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from ldm.apps.cli import main
from ldm.apps.info import as_json_object, info
from ldm.apps.output.info_page import commands, page, table
from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, tiny
from ldm.pipeline.load import random_system
from ldm.weights.detect import detect
from ldm.weights.diffusers_write import write_folder
from ldm.weights.doctor import describe as describe_module
from ldm.weights.doctor.describe import describe, describe_folder
from ldm.weights.doctor.kinds import kind_of_file
from ldm.weights.doctor.report import FileReport
from ldm.weights.io import ITEM_BYTES
from ldm.weights.layout import build
from ldm.weights.source import open_source

Shape = tuple[int, ...]
Sparse = Callable[..., Path]


@pytest.fixture
def sparse(tmp_path: Path) -> Sparse:
    """sparse(name, shapes, dtype, metadata) -> a file of these tensors, all of them holes in the file: of any size."""

    def write(
        name: str, shapes: Mapping[str, Shape], dtype: str = "F16", metadata: Mapping[str, str] | None = None
    ) -> Path:
        entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for tensor, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            entries[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return path

    return write


def system_shapes(config: SystemConfig, *prefixes: str) -> dict[str, Shape]:
    """The tensors of a whole checkpoint, or those under some prefixes."""
    networks = build(config).by_prefix()
    shapes = {prefix + name: tuple(t.shape) for prefix, net in networks.items() for name, t in net.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name.startswith(prefixes)} if prefixes else shapes


def shown(report: FileReport, width: int = 100) -> str:
    """The page as a terminal shows it, blanks joined."""
    console = Console(width=width, record=True, file=StringIO())
    console.print(page(report))
    return " ".join([*console.export_text().split(), *commands(report)])


def kohya_shapes(width: int, rank: int = 4, text_width: int = 768, text: str = "lora_te") -> dict[str, Shape]:
    """A LoRA of one cross-attention, one feed-forward and one text layer in kohya's names."""
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    modules = {
        f"{block}_attn2_to_k": (320, width),
        f"{block}_ff_net_2": (320, 1280),
        f"{text}_text_model_encoder_layers_0_self_attn_q_proj": (text_width, text_width),
    }
    shapes: dict[str, Shape] = {}
    for module, (rows, columns) in modules.items():
        shapes |= {f"{module}.lora_down.weight": (rank, columns), f"{module}.lora_up.weight": (rows, rank)}
        shapes[f"{module}.alpha"] = ()
    return shapes


@pytest.mark.parametrize(
    ("config", "family", "gigabytes"),
    [(sd1(), "Stable Diffusion 1.x", 4), (sd2("v"), "Stable Diffusion 2.x", 5), (sdxl(), "Stable Diffusion XL", 12)],
)
def test_a_checkpoint_of_gigabytes_is_told_from_its_header(
    sparse: Sparse, config: SystemConfig, family: str, gigabytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse("model.safetensors", system_shapes(config), "F32", {"modelspec.prediction_type": config.prediction})
    assert path.stat().st_size > gigabytes * 1e9
    names, read = [], describe_module.read_tensors

    def counted(header: Any, wanted: Iterable[str]) -> Any:
        wanted = list(wanted)
        names.extend(wanted)
        return read(header, wanted)

    monkeypatch.setattr(describe_module, "read_tensors", counted)
    before = bytes_read()
    report = describe(path)
    assert bytes_read() - before < 5e6
    assert names == []
    assert report.problem is None
    assert report.found.system is not None
    assert report.found.system.prediction_rule == "metadata modelspec.prediction_type"
    text = shown(report)
    assert f"{family}, text to image" in text
    assert "read by ldm, A1111/Forge, ComfyUI, diffusers, kohya" in text
    assert f"ldm convert {path}" in text
    assert "--dtype fp16" in text
    assert len(shown(report, 80)) > 500


def bytes_read() -> int:
    """What this process has read so far by read(), 0 where the system does not say."""
    try:
        return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0


def test_ema_copies_are_counted_and_can_be_dropped(sparse: Sparse) -> None:
    shapes = system_shapes(tiny(sd1()))
    ema = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": shape for name, shape in shapes.items()}
    path = sparse("with ema.safetensors", shapes | ema)
    report = describe(path)
    assert report.ema
    assert report.problem is None
    assert "EMA weights" in [part.name for part in report.parts]
    (remedy,) = report.remedies
    assert remedy.command == f"ldm convert '{path}' '{path.with_name('with ema-pruned.safetensors')}' --prune"
    assert remedy.what == "49 % smaller, without its EMA copies"


def test_an_interrupted_download_still_gets_its_page(sparse: Sparse) -> None:
    path = sparse("model.safetensors", system_shapes(tiny(sd1())))
    whole = path.stat().st_size
    os.truncate(path, whole - 3)
    report = describe(path, deep=True)
    assert report.problem is not None
    assert report.problem.startswith(f"incomplete: have {whole - 3:,} of {whole:,} bytes (3 are missing, in 1 of ")
    assert (report.size, report.needed, report.kind, report.found.family) == (whole - 3, whole, "checkpoint", "sd1")
    assert report.read_by == ()
    with pytest.raises(LdmError, match="incomplete"):
        info(path)


@pytest.mark.parametrize(
    ("width", "family", "words"),
    [(768, "sd1", "SD 1.x"), (1024, "sd2", "SD 2.x"), (2048, "sdxl", "SDXL"), (1280, "sdxl-refiner", "SDXL refiner"),
     (77, None, "not known (its text states are 77 wide)")],
)  # fmt: skip
def test_a_lora_names_its_base(sparse: Sparse, width: int, family: str | None, words: str) -> None:
    report = describe(sparse("lora.safetensors", kohya_shapes(width)))
    assert (report.kind, report.found.family, report.problem) == ("adapter", family, None)
    text = shown(report)
    assert words in text
    assert "kind LoRA" in text
    assert "2 layers of the U-Net, 1 layer of the text encoder" in text
    assert "targets attention, feed-forward" in text
    assert "rank 4, alpha 0" in text
    assert report.read_by == ("ldm", "A1111/Forge", "ComfyUI", "diffusers", "kohya")


def test_a_lora_read_by_name_and_alpha(tmp_path: Path) -> None:
    tensors = {name: torch.full(shape, 8.0) for name, shape in kohya_shapes(768).items()}
    metadata = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_optimizer": "AdamW8bit", "ss_steps": "90"}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    report = describe(tmp_path / "x.safetensors")
    assert report.found.adapter is not None
    assert (report.found.adapter.ranks, report.found.adapter.alphas) == ((4,), (8.0,))
    assert report.training == {
        "base": "Stable Diffusion 1.x", "network": "rank 4", "length": "90 steps", "learning": "AdamW8bit",
    }  # fmt: skip
    text = shown(report)
    assert "rank 4, alpha 8" in text
    assert "trained: base Stable Diffusion 1.x" in text
    assert "ss_" not in text
    tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"] = torch.tensor(float("nan"))
    save_file(tensors, tmp_path / "x.safetensors")
    assert describe(tmp_path / "x.safetensors").problem == "an alpha is not finite"


BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA_BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
ADAPTERS: dict[str, tuple[dict[str, Shape], str, str]] = {
    "diffusers": (
        {f"{BLOCK}.lora_A.weight": (4, 768), f"{BLOCK}.lora_B.weight": (320, 4)}, "LoRA", "as diffusers writes"
    ),
    "original names": (
        {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768),
         "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (320, 4)},
        "LoRA", "kohya, original block names",
    ),
    "peft": (
        {"base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768),
         "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": (320, 4)},
        "LoRA", "as peft writes",
    ),
    "locon": (
        {f"{CONV}.lora_down.weight": (4, 320, 3, 3), f"{CONV}.lora_up.weight": (320, 4, 1, 1)},
        "LoRA with convolutions (LoCon)", "targets convolutions",
    ),
    "loha": (
        {f"{KOHYA_BLOCK}.hada_w1_a": (320, 4), f"{KOHYA_BLOCK}.hada_w1_b": (4, 768),
         f"{KOHYA_BLOCK}.hada_w2_a": (320, 4), f"{KOHYA_BLOCK}.hada_w2_b": (4, 768)},
        "LoHa", "SD 1.x",
    ),
    "lokr": (
        {f"{KOHYA_BLOCK}.lokr_w1": (16, 16), f"{KOHYA_BLOCK}.lokr_w2_a": (20, 4), f"{KOHYA_BLOCK}.lokr_w2_b": (4, 48)},
        "LoKr", "rank 4",
    ),
    "ia3": ({f"{KOHYA_BLOCK}.weight": (320,), f"{KOHYA_BLOCK}.on_input": ()}, "(IA)^3", "U-Net; no text encoder"),
    "full": ({f"{KOHYA_BLOCK}.diff": (320, 768)}, "full difference", "SD 1.x"),
    "dora": (
        {f"{KOHYA_BLOCK}.lora_down.weight": (4, 768), f"{KOHYA_BLOCK}.lora_up.weight": (320, 4),
         f"{KOHYA_BLOCK}.dora_scale": (320, 1)},
        "DoRA", "rank 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_of_every_kind(sparse: Sparse, case: str) -> None:
    shapes, kind, words = ADAPTERS[case]
    report = describe(sparse("x.safetensors", shapes))
    assert report.problem is None
    text = shown(report, 120)
    assert f"kind {kind}" in text
    assert words in text
    assert ("A1111/Forge" in report.read_by) == (case not in ("diffusers", "peft"))


def test_a_damaged_adapter_is_a_problem(sparse: Sparse) -> None:
    halves = {name: shape for name, shape in kohya_shapes(768).items() if "attn2_to_k.lora_up" not in name}
    assert "lacks its up" in str(describe(sparse("x.safetensors", halves)).problem)
    oft = {f"{KOHYA_BLOCK}.oft_blocks": (4, 8, 8)}
    assert "1 of its tensors are of no kind that is read" in str(describe(sparse("y.safetensors", oft)).problem)
    strange = kohya_shapes(768) | {"nobody.knows": (1,)}
    assert "nobody.knows" in str(describe(sparse("z.safetensors", strange)).problem)


EMBEDDINGS = [
    ({"emb_params": torch.ones(3, 768)}, "SD 1.x (text 768 wide)", "'x', 3 vectors of 768 numbers"),
    ({"<cat>": torch.ones(1024)}, "SD 2.x (text 1024 wide)", "'<cat>', 1 vector of 1024 numbers"),
    ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "SDXL (text 768 and 1280 wide)", "2 vectors"),
]


@pytest.mark.parametrize(("tensors", "base", "words"), EMBEDDINGS)
def test_embeddings(tmp_path: Path, tensors: dict[str, torch.Tensor], base: str, words: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    report = describe(tmp_path / "x.safetensors")
    assert (report.kind, report.found.base) == ("textual-inversion embedding", base)
    assert words in shown(report)


def test_parts_of_a_checkpoint(sparse: Sparse) -> None:
    config = sd1()
    unet = {name.removeprefix("model.diffusion_model."): s for name, s in system_shapes(config, "model.").items()}
    vae = {name.removeprefix("first_stage_model."): s for name, s in system_shapes(config, "first_stage").items()}
    for shapes, kind, words in (
        (unet, "U-Net alone", "works with the autoencoder and text encoder of SD 1.x (text 768 wide)"),
        (vae, "autoencoder alone", "4 latent channels at 1/8 of the size"),
        (system_shapes(config, "cond_stage_model"), "text encoder alone", "CLIP-L (SD 1.x, and the first of SDXL)"),
    ):
        report = describe(sparse("x.safetensors", shapes))
        assert (report.kind, report.problem) == (kind, None)
        assert words in shown(report)
        assert report.found.fit is not None
        assert report.found.fit.fits
    del vae["decoder.conv_out.bias"]
    report = describe(sparse("x.safetensors", vae))
    assert report.problem == "its tensors do not fit its networks: 1 missing"
    assert report.found.fit is not None
    assert report.found.fit.missing == ("first_stage_model.decoder.conv_out.bias",)


def test_a_checkpoint_without_its_autoencoder_is_told_how_to_get_one(sparse: Sparse) -> None:
    path = sparse("x.safetensors", system_shapes(tiny(sd1()), "model.", "cond_stage_model."))
    report = describe(path)
    assert "autoencoder" in str(report.problem)
    assert [remedy.command.split("--")[1] for remedy in report.remedies] == ["vae VAE.safetensors"]


def test_a_controlnet(sparse: Sparse) -> None:
    with torch.device("meta"):
        network = ControlNet(ControlNetConfig(unet=sd1().unet))
    shapes = {f"control_model.{name}": tuple(t.shape) for name, t in network.state_dict().items()}
    report = describe(sparse("control.safetensors", shapes))
    assert (report.kind, report.found.family, report.problem) == ("ControlNet", "sd1", None)
    assert "works with SD 1.x (text 768 wide)" in shown(report)


def test_a_diffusers_folder_is_one_model(tiny_file: Callable[[SystemConfig], Path], tmp_path: Path) -> None:
    source = open_source(tiny_file(tiny(sd2("v"))))
    folder = tmp_path / "models" / "my model"
    folder.parent.mkdir()
    write_folder(folder, source, detect(source).config)
    report = describe(folder, deep=True)
    assert (report.kind, report.layout, report.found.family, report.problem) == (
        "checkpoint", "diffusers folder", "sd2", None,
    )  # fmt: skip
    assert report.numbers is not None
    assert report.numbers.non_finite == ()
    assert "--to single" in shown(report)
    (entry,) = describe_folder(folder.parent)
    assert (entry.name, entry.kind, entry.family, entry.problem) == ("my model", "checkpoint", "sd2", None)
    unet = describe(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert (unet.kind, unet.layout, unet.problem) == ("U-Net alone", "diffusers U-Net", None)
    assert unet.read_by == ("ldm", "ComfyUI", "diffusers")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def test_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = random_system(tiny(sd1()))
    tensors = {f"model.diffusion_model.{name}": t.half() for name, t in model.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": t.half() for name, t in model.autoencoder.state_dict().items()}
    tower = model.text[0]
    assert isinstance(tower, torch.nn.Module)
    tensors |= {f"cond_stage_model.transformer.{name}": t.half() for name, t in tower.state_dict().items()}
    torch.save({"state_dict": OrderedDict(tensors)}, "model.ckpt")
    report = describe("model.ckpt")
    assert (report.kind, report.found.family, report.layout, report.problem) == ("checkpoint", "sd1", "pickle", None)
    assert report.pickle is not None
    assert report.pickle.readable
    assert [remedy.command for remedy in report.remedies] == [
        "ldm convert model.ckpt model.safetensors --allow-pickle",
        "ldm info model.ckpt --allow-pickle",
    ]
    assert "none found" in shown(report)
    allowed = describe("model.ckpt", allow_pickle=True)
    assert allowed.problem is None
    assert allowed.found.system is not None
    assert sum(part.tensors for part in allowed.parts) == len(tensors)
    Path("evil.ckpt").write_bytes(pickle.dumps({"a": Hostile()}))
    for flag in (False, True):
        report = describe("evil.ckpt", allow_pickle=flag)
        assert report.problem == "is a pickle; risk: DANGEROUS: loading it runs posix.system; delete it"
        assert report.remedies == ()
    with pytest.raises(LdmError, match="DANGEROUS"):
        info("evil.ckpt", allow_pickle=True)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "saved",
    [{"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x"},
     {"*": torch.ones(2, 768)}],
    ids=["A1111", "bare"],
)  # fmt: skip
def test_an_embedding_in_a_pickle_is_told_from_its_names(saved: dict[str, Any], tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "x.pt")
    for flag in (False, True):
        assert describe(tmp_path / "x.pt", allow_pickle=flag).kind == "textual-inversion embedding"


def test_a_pickle_of_a_trainer_is_told_to_be_saved_again(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"model_ema.decay": torch.ones(1)}, "hyper": argparse.Namespace(lr=1)}, path)
    report = describe(path, allow_pickle=True)
    assert str(report.problem).startswith("is a pickle; risk: it needs classes of other packages (argparse.Namespace)")
    assert "save it as .safetensors" in str(report.problem)
    torch.save({"state_dict": {"a": torch.ones(1)}}, path, _use_new_zipfile_serialization=False)
    assert "it is not read" in str(describe(path).problem)


def test_the_command_ends_with_2_and_one_line(
    sparse: Sparse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = system_shapes(tiny(sd1()))
    (name, shape), *_ = shapes.items()
    sparse("one wrong shape.safetensors", shapes | {name: (*shape[:-1], shape[-1] + 1)})
    sparse("one too many.safetensors", shapes | {"model.diffusion_model.more": (1,)})
    sparse("one too few.safetensors", {key: value for key, value in shapes.items() if key != name})
    sparse("whole numbers.safetensors", shapes, "I8")
    sparse("vae missing.safetensors", {key: value for key, value in shapes.items() if "first_stage" not in key})
    os.truncate(sparse("cut.safetensors", shapes), 500_000)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "page.ckpt").write_bytes(b"<!doctype html><html>404")
    (tmp_path / "empty.pt").write_bytes(b"")
    save_file({"emb_params": torch.ones(3, 3, 768)}, tmp_path / "three axes.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "a picture.png")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "absent.png", tmp_path / "absent.safetensors.index.json"]
    assert len(paths) == 13
    for path in paths:
        assert main(["info", str(path)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert path.name in said
        assert "Traceback" not in said


@pytest.mark.parametrize("numbers", ["F32", "F16", "BF16", "F64"])
def test_every_precision_of_weights_is_fine(sparse: Sparse, numbers: str) -> None:
    report = describe(sparse("x.safetensors", system_shapes(tiny(sd1())), numbers))
    assert report.problem is None
    assert {dtype for part in report.parts for dtype in part.dtypes} == {numbers}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.1.sub.0.RDB1.conv1.0.weight", "upscaler (ESRGAN)"),
        ("image_proj.latents", "IP-Adapter"),
        ("lllite_unet_input_blocks_1.down.0.weight", "ControlNet-LLLite"),
        ("body.0.block1.weight", "T2I-Adapter"),
        ("vision_model.embeddings.class_embedding", "image encoder (CLIP vision)"),
        ("double_blocks.0.img_attn.qkv.weight", "transformer model (SD 3, Flux or later)"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5 text encoder (SD 3, Flux)"),
        ("what.is.this", "unknown"),
    ],
)
def test_other_kinds_are_named(name: str, kind: str) -> None:
    assert kind_of_file([name]) == kind


def test_a_folder_gives_a_table(sparse: Sparse, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse("models/Lora/cat.safetensors", kohya_shapes(768))
    sparse("models/tiny.safetensors", system_shapes(tiny(sd1())))
    broken = sparse("models/broken.safetensors", kohya_shapes(768))
    os.truncate(broken, broken.stat().st_size - 1)
    (tmp_path / "models/page.safetensors").write_bytes(b"<html>")
    (tmp_path / "models/.hidden.safetensors").write_bytes(b"")
    (tmp_path / "models/notes.txt").write_text("x", encoding="utf-8")
    entries = {entry.name: entry for entry in describe_folder(tmp_path / "models")}
    assert list(entries) == ["broken.safetensors", "page.safetensors", "tiny.safetensors", "Lora/cat.safetensors"]
    cat, whole = entries["Lora/cat.safetensors"], entries["tiny.safetensors"]
    assert (cat.kind, cat.family, cat.problem) == ("LoRA", "sd1", None)
    assert (whole.kind, whole.family, whole.problem) == ("checkpoint", "sd1", None)
    assert "incomplete" in str(entries["broken.safetensors"].problem)
    assert "HTML" in str(entries["page.safetensors"].problem)
    console = Console(width=80, record=True, file=StringIO())
    console.print(table(list(entries.values()), 80))
    lines = console.export_text().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["name", "kind", "family", "size", "problem"]
    assert lines[4].split()[:4] == ["Lora/cat.safetensors", "LoRA", "sd1", "35.1"]
    with pytest.raises(LdmError, match="2 of 4 models have a problem"):
        info(tmp_path / "models")
    capsys.readouterr()
    with pytest.raises(LdmError):
        info(tmp_path / "models", as_json=True)
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(entries)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmError, match="holds no model files"):
        info(tmp_path / "empty")


def test_json_keys_are_the_same_for_every_kind(sparse: Sparse, capsys: pytest.CaptureFixture[str]) -> None:
    keys = set()
    for path in (sparse("a.safetensors", kohya_shapes(768)), sparse("b.safetensors", system_shapes(tiny(sd2())))):
        info(path, as_json=True)
        told = json.loads(capsys.readouterr().out)
        keys.add(tuple(told))
        assert told == json.loads(json.dumps(as_json_object(describe(path))))
    assert len(keys) == 1
