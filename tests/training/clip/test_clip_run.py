"""`ldm train-clip` from files to files: it learns, survives a signal, and open_clip reads what it writes."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from ldm.apps import cli
from ldm.errors import LdmError
from ldm.evaluation.retrieval import retrieval
from ldm.training.clip import model as clip_model
from ldm.training.clip import run as clip_run
from ldm.training.clip.data import open_pairs
from ldm.training.clip.model import SIGMOID_START, build, export, read_config, tokenizer
from ldm.training.clip.objective import OpenCLIP, encode_text
from ldm.training.clip.run import ClipRun, train_clip
from ldm.training.engine.loop import LoopConfig

COLOURS = ("red", "green", "blue", "yellow", "white", "magenta")
SHAPES = ("circle", "square", "cross")
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
LOOP = LoopConfig(
    *(80, 32, 4e-3),
    warmup=10,
    schedule="cosine",
    ema=0.9,
    precision="no",
    save_every=100,
    evaluate_every=40,
    log_every=10,
)


def draw(colour: str, shape: str, generator: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (24, 20), "black")
    x, y, r = (int(generator.integers(a, b)) for a, b in ((9, 14), (8, 11), (5, 8)))
    box, pen = (x - r, y - r, x + r, y + r), ImageDraw.Draw(image)
    match shape:
        case "circle":
            pen.ellipse(box, fill=colour)
        case "square":
            pen.rectangle(box, fill=colour)
        case _:
            pen.line((box[0], y, box[2], y), fill=colour, width=3)
            pen.line((x, box[1], x, box[3]), fill=colour, width=3)
    return image


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 pictures, ten of each colour and shape, a config and labels beside their folder."""
    root, generator = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    (root / "in").mkdir()
    labels = {}
    for number in range(180):
        colour, shape = COLOURS[number % 6], SHAPES[number // 6 % 3]
        draw(colour, shape, generator).save(root / "in" / f"{number}.png")
        (root / "in" / f"{number}.txt").write_text(f"a {colour} {shape}\na {shape} that is {colour}\n")
        labels[f"{number}.png"] = colour
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "labels.json").write_text(json.dumps(labels))
    return root


def run_of(shapes: Path, output: Path) -> ClipRun:
    return ClipRun(shapes / "in", str(shapes / "config.json"), output, held_out=0.2, labels=shapes / "labels.json")


def figures(log: str, name: str) -> list[float]:
    """A figure's values in the order they were logged."""
    words = log.split()
    return [float(after) for word, after in pairwise(words) if word == name]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_it_learns_and_open_clip_reads_what_it_wrote(
    loss: Any, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = train_clip(replace(run_of(shapes, tmp_path), loss=loss, chunks=2), LOOP)
    assert path == tmp_path / "open_clip_model.safetensors"
    losses = figures(caplog.text, "loss")
    assert losses[-1] < 0.75 * losses[0]
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    model, _, preprocess = made
    words: Any = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    fit = read_config(str(tmp_path), loss).fit
    pairs = open_pairs(shapes / "in", tmp_path / "data", fit, held_out=0.2, mirror=False, seed=0)
    aside = [Image.open(shapes / "in" / pairs.names[int(i)]) for i in pairs.held_out]
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(i) for i in aside]), normalize=True)
        text = model.encode_text(words([pairs.texts[int(i)][0] for i in pairs.held_out]), normalize=True)
    recall = retrieval(image, text, torch.arange(len(aside)), at=(1, 5))
    assert recall.text_to_image[5] > 4 * 5 / len(aside) and recall.image_to_text[5] > 3 * 5 / len(aside), "chance"
    assert figures(caplog.text, "text-image@5")[-1] == pytest.approx(recall.text_to_image[5], abs=0.03)
    assert figures(caplog.text, "zero-shot@1")[-1] > 2 / len(COLOURS)
    assert (model.logit_bias is not None) == (loss == "sigmoid")


def test_a_signal_saves_and_the_resumed_run_ends_in_the_very_same_weights(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = replace(LOOP, steps=12, save_every=5, evaluate_every=4)
    whole = load_file(train_clip(run_of(shapes, tmp_path / "whole"), loop))

    def interrupting(config: Any) -> Callable[[list[str]], Tensor]:
        ordinary, calls = tokenizer(config), 0

        def tokens(texts: list[str]) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 14:  # in step 7: one a step, and in the evaluation after step 4 one and one a template
                signal.raise_signal(signal.SIGTERM)
            return ordinary(texts)

        return tokens

    run = run_of(shapes, tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(clip_run, "tokenizer", interrupting)
        train_clip(run, loop)
    assert stopped.value.code == 143
    saved = sorted(path.name for path in run.output.glob("step-*"))[-1]
    assert 5 < int(saved.removeprefix("step-")) < 12 and not (run.output / "open_clip_model.safetensors").exists()
    parts = load_file(train_clip(run, loop))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    with pytest.raises(LdmError, match="begun with loss = softmax, now sigmoid"):
        train_clip(replace(run, loss="sigmoid"), loop)
    with pytest.raises(LdmError, match="begun with data = "):
        train_clip(replace(run, held_out=0.3), loop)
    (tmp_path / "other.json").write_text(json.dumps(CONFIG | {"quick_gelu": True}))  # of the same tensors
    with pytest.raises(LdmError, match=r"begun with config = \w{16}, now \w{16}; give another --output"):
        train_clip(replace(run, config=str(tmp_path / "other.json")), loop)
    shutil.copy(shapes / "config.json", tmp_path / "renamed.json")
    train_clip(replace(run, config=str(tmp_path / "renamed.json")), loop)


def same_vectors(ours: OpenCLIP, folder: Path, ids: Tensor) -> None:
    """open_clip makes of the folder a model that says the same as ours."""
    mine: Any = ours
    theirs: Any = open_clip.create_model(f"local-dir:{folder}")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        pairs = zip(mine.eval().get_logits(images, ids), theirs.eval().get_logits(images, ids), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    "change",
    [
        {"quick_gelu": True, "custom_text": True, "init_logit_bias": -10},
        {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}},
        {"text_cfg": {**CONFIG["text_cfg"], "pool_type": "last", "no_causal_mask": True, "proj_bias": True}},
    ],
    ids=["custom text", "resnet", "siglip text"],
)
def test_any_config_is_exported_whole(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"model_cfg": CONFIG | change, "preprocess_cfg": {"mean": [0.5] * 3}}))
    config = read_config(str(tmp_path / "c.json"), "softmax")
    model = build(config)
    moved: Any = model.train()
    moved.encode_image(torch.randn(4, 3, config.fit.size, config.fit.size))  # moves a ResNet's running means
    export(tmp_path, model, config)
    written = open_clip.create_model(f"local-dir:{tmp_path}").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    assert read_config(str(tmp_path), "softmax") == replace(config, name=str(tmp_path))


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A tiny text model with random weights and a tokenizer of a few words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    words = ["<s>", "<pad>", "</s>", "<unk>", "ein", "roter", "Kreis", "赤い", "円"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    folder = tmp_path / "xlm"
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = XLMRobertaConfig(
        vocab_size=len(words), intermediate_size=32, max_position_embeddings=16, pad_token_id=1, **sizes
    )
    XLMRobertaModel(settings, add_pooling_layer=False).save_pretrained(folder)
    return folder


def multilingual(tmp_path: Path) -> str:
    text = {"hf_model_name": "xlm-roberta-base", "hf_tokenizer_name": "xlm-roberta-base", "hf_proj_type": "linear"}
    (tmp_path / "m.json").write_text(json.dumps(CONFIG | {"text_cfg": text | {"context_length": 6}}))
    return str(tmp_path / "m.json")


def test_a_multilingual_text_tower_comes_from_a_folder(hugging_face: Path, tmp_path: Path) -> None:
    name = multilingual(tmp_path)
    config = read_config(name, "softmax", hugging_face)
    model, words = build(config), tokenizer(config)
    ids = words(["ein roter Kreis", "赤い 円"])
    assert ids.tolist() == [[4, 5, 6, 1, 1, 1], [7, 8, 1, 1, 1, 1]]
    begun = load_file(hugging_face / "model.safetensors")
    assert torch.equal(model.state_dict()["text.transformer.embeddings.word_embeddings.weight"],
                       begun["embeddings.word_embeddings.weight"]), "from the folder's weights"  # fmt: skip
    assert torch.equal(encode_text(model, ids), model.encode_text(ids, normalize=True))
    out = tmp_path / "out"
    out.mkdir()
    export(out, model, config)
    shutil.rmtree(hugging_face)
    same_vectors(model, out, ids)
    theirs = open_clip.get_tokenizer(f"local-dir:{out}")
    assert isinstance(theirs, HFTokenizer) and torch.equal(theirs(["ein roter Kreis", "赤い 円"]), ids)


def test_the_digest_of_a_config_is_of_what_it_says_and_not_of_where_it_lies(hugging_face: Path, tmp_path: Path) -> None:
    name, moved = multilingual(tmp_path), tmp_path / "moved"
    shutil.copytree(hugging_face, moved)
    assert read_config(name, "softmax", moved).digest() == read_config(name, "softmax", hugging_face).digest()
    words = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(words.replace("Kreis", "Kreiz"))
    assert read_config(name, "softmax", moved).digest() != read_config(name, "softmax", hugging_face).digest()
    (tmp_path / "c.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.4] * 3}}))
    (tmp_path / "d.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3}}))
    assert len({read_config(str(tmp_path / file), "softmax").digest() for file in ("c.json", "d.json")}) == 2


def test_nobodys_files_are_overwritten(shapes: Path, hugging_face: Path, tmp_path: Path) -> None:
    run = replace(run_of(shapes, hugging_face), config=multilingual(tmp_path), text_model=hugging_face)
    before = {path.name: path.read_bytes() for path in hugging_face.iterdir()}
    with pytest.raises(LdmError, match=r"output: found .*xlm, where the text model lies and would be overwritten"):
        train_clip(run, LOOP)
    told = json.loads(Path(run.config).read_text())
    told["text_cfg"] |= {"hf_model_name": str(hugging_face), "hf_tokenizer_name": str(hugging_face)}
    Path(run.config).write_text(json.dumps(told))
    with pytest.raises(LdmError, match=r"where the text model lies"):
        train_clip(replace(run, text_model=None, output=hugging_face / ".." / "xlm"), LOOP)
    assert {path.name: path.read_bytes() for path in hugging_face.iterdir()} == before
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"theirs")
    with pytest.raises(LdmError, match=r"holds open_clip_model.safetensors, which no run here has made"):
        train_clip(run_of(shapes, tmp_path), LOOP)
    assert (tmp_path / "open_clip_model.safetensors").read_bytes() == b"theirs"


def test_what_would_be_downloaded_or_run_is_refused(hugging_face: Path, tmp_path: Path) -> None:
    name = multilingual(tmp_path)
    with pytest.raises(LdmError, match=r"hf_model_name: xlm-roberta-base is no folder.*nothing is downloaded"):
        read_config(name, "softmax")
    with pytest.raises(LdmError, match=r"hf_model_name: .*nothing is downloaded; give its folder as --text-model"):
        read_config("xlm-roberta-base-ViT-B-32", "softmax")
    with pytest.raises(LdmError, match=r"hf_tokenizer_name: .*nothing is downloaded"):
        read_config("ViT-B-16-SigLIP", "sigmoid")
    (hugging_face / "model.safetensors").rename(hugging_face / "pytorch_model.bin")
    with pytest.raises(LdmError, match="is a pickle"):
        read_config(name, "softmax", hugging_face)
    (hugging_face / "pytorch_model.bin").unlink()
    build(read_config(name, "softmax", hugging_face))  # with random weights
    told = json.loads((hugging_face / "config.json").read_text())
    (hugging_face / "config.json").write_text(json.dumps(told | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(LdmError, match="asks to run code"):
        read_config(name, "softmax", hugging_face)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("{", "is no JSON that can be read"),
        ("[]", "is no JSON object"),
        ('{"embed_dim": 8}', "has no 'vision_cfg'"),
        (json.dumps(CONFIG | {"_target_": "os.system"}), "unknown _target_, expected of custom_text, embed_dim"),
        (json.dumps(CONFIG | {"vision_cfg": {"layer": 2}}), "vision_cfg: unknown layer, expected of act_kwargs"),
        (json.dumps(CONFIG | {"text_cfg": {"width": 33, "heads": 2}}), "cannot be built|cannot build it"),
        (json.dumps(CONFIG | {"vision_cfg": {"image_size": [16, 32]}}), "image_size is"),
        (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "longest"}}), "shortest or squash"),
    ],
)
def test_a_config_file_that_is_wrong(told: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(told)
    with pytest.raises(LdmError, match=expected):
        build(read_config(str(tmp_path / "c.json"), "softmax"))


def test_what_each_loss_starts_from() -> None:
    told = {"init_logit_bias": -5, "init_logit_scale": None}
    for loss, scale, bias in (("softmax", None, None), ("sigmoid", SIGMOID_START["init_logit_scale"], -5)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip_model, "_find", lambda name: (CONFIG | told, {}))
            model = read_config("any", loss).model  # type: ignore[arg-type]
        assert (model.get("init_logit_scale"), model["init_logit_bias"]) == (scale, bias)


def test_names_of_configs() -> None:
    with pytest.raises(LdmError, match=r"config ViT-B32: open_clip has none of that name; perhaps .*ViT-B-32"):
        read_config("ViT-B32", "softmax")
    with pytest.raises(LdmError, match="also writes captions"):
        read_config("coca_ViT-B-32", "softmax")
    for name in open_clip.list_models():
        try:
            config = read_config(name, "softmax")
        except LdmError as error:
            assert "nothing is downloaded" in str(error) or "also writes captions" in str(error)
        else:
            assert config.fit.size == open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)  # type: ignore[index]
    assert read_config("small", "softmax").pixels.mean == (0.5, 0.5, 0.5)


def test_commands_that_cannot_be(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, data, out = str(shapes / "config.json"), str(shapes / "in"), str(tmp_path / "out")
    empty, foreign = tmp_path / "empty", tmp_path / "l.json"
    empty.mkdir()
    foreign.write_text('{"nobody.png": "red"}')
    for arguments, expected in (
        ([data], "batch: found 256, expected at most 171"),
        ([str(empty)], "found no pictures"),
        ([data, "--batch", "8", "--accumulate", "9"], "accumulate: found 9"),
        ([data, "--batch", "1"], "batch: found 1"),
        ([data, "--batch", "8", "--precision", "fp16"], "fp16, which needs a GPU"),
        ([data, "--batch", "8", "--held-out", "1"], "held-out: found 1.0"),
        ([data, "--batch", "8", "--save-every", "0"], "save-every: found 0"),
        ([data, "--batch", "8", "--seed", "-1"], "seed: found -1"),
        ([data, "--batch", "8", "--ema", "1"], "ema: found 1.0"),
        ([data, "--batch", "8", "--weight-decay", "nan"], "weight-decay: found nan"),
        ([data, "--batch", "8", "--labels", str(foreign)], "names no held-out picture; their names are like"),
        ([data, "--loss", "hinge"], "hinge"),
    ):
        assert cli.main(["train-clip", *arguments, "--config", config, "-o", out]) == 2, arguments
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1, said
    assert cli.main(["train-clip", data, "--config", config, "-o", out, "--batch", "8", "--steps", "2",
                     "--precision", "no"]) == 0  # fmt: skip
    assert capsys.readouterr().out == f"{out}/open_clip_model.safetensors\n"
