"""`ldm convert`: there and back bit for bit, and each thing that it does against its formula or another program."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.apps.cli import main
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, tiny
from ldm.pipeline.load import load
from ldm.weights import save
from ldm.weights.layout import FIRST_STAGE, UNET
from ldm.weights.merge import ema_name

SYSTEMS = {
    "sd1": tiny(sd1()),
    "sd1-inpainting": tiny(sd1(9)),
    "sd2-v": tiny(sd2("v")),
    "sd2-inpainting": tiny(sd2(in_channels=9)),
    "sdxl": tiny(sdxl()),
    "sdxl-inpainting": tiny(sdxl(9)),
}
LAST_CONVOLUTION = f"{UNET}out.2.weight"


@pytest.fixture
def sd1_file(tiny_file: Callable[[SystemConfig], Path]) -> Path:
    return tiny_file(SYSTEMS["sd1"])


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What `ldm convert` says with --json."""
    assert main(["convert", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def edited(path: Path, target: Path, change: Callable[[dict[str, Tensor]], Any], **words: str) -> Path:
    """Another file: this one's tensors after a change, its metadata less our own config."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, target, {k: v for k, v in metadata(path).items() if k.startswith("modelspec")} | words)
    return target


@pytest.mark.parametrize("name", SYSTEMS)
def test_there_and_back(name: str, tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder, back = tiny_file(SYSTEMS[name]), tmp_path / "folder", tmp_path / "back.safetensors"
    said = run(capsys, file, folder)
    run(capsys, folder, back)
    original, returned = load_file(file), load_file(back)
    left = {name for names in said["left_out"].values() for name in names}
    assert_equal(returned, {name: tensor for name, tensor in original.items() if name not in left})
    tower = "cond_stage_model.model."
    if "sd2" in name:
        assert f"{tower}text_projection" in left
        assert all(name.startswith((f"{tower}transformer.resblocks.1.", f"{tower}text_projection")) for name in left)
    else:
        assert not left
    assert load(back).config.prediction == SYSTEMS[name].prediction
    again = tmp_path / "again.safetensors"
    run(capsys, back, again)
    assert_equal(load_file(again), returned)


def test_an_autoencoder_there_and_back(tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_file(tiny_file(SYSTEMS["sdxl"]))
    bare = {name.removeprefix(FIRST_STAGE): t for name, t in whole.items() if name.startswith(FIRST_STAGE)}
    save_file(bare, tmp_path / "vae.safetensors")
    said = run(capsys, tmp_path / "vae.safetensors", tmp_path / "folder")
    assert "0.18215 is a guess" in said["notes"][0]
    config = tmp_path / "folder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.13025}))
    run(capsys, tmp_path / "folder", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), bare)
    assert not run(capsys, tmp_path / "back.safetensors", tmp_path / "again")["notes"]
    assert json.loads((tmp_path / "again/config.json").read_text())["scaling_factor"] == 0.13025
    for theirs in (
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder", local_files_only=True),
        diffusers.AutoencoderKL.from_single_file(
            str(tmp_path / "back.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
        ),
    ):
        attention = theirs.decoder.mid_block.attentions[0].to_q.weight
        assert torch.equal(attention, bare["decoder.mid.attn_1.q.weight"][:, :, 0, 0].float())


def test_their_single_file_reader(tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file made of a folder, which lacks what the folder lacks, opens in diffusers as the folder does."""
    run(capsys, tiny_file(SYSTEMS["sd2-v"]), tmp_path / "folder")
    run(capsys, tmp_path / "folder", tmp_path / "x.safetensors")
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "x.safetensors"),
        config=str(tmp_path / "folder"),
        local_files_only=True,
        torch_dtype=torch.float16,
    )
    expected = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "folder", local_files_only=True, torch_dtype=torch.float16
    )
    for part in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(pipeline, part).state_dict(), getattr(expected, part).state_dict())


def test_precision_and_words(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.arange(77)[None]
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    words = {"modelspec.title": "Mine", "modelspec.author": "Me", "modelspec.hash_sha256": "0x0", "ss_steps": "5"}
    file = edited(sd1_file, tmp_path / "in.safetensors", lambda tensors: tensors.update({positions: whole}), **words)
    out = tmp_path / "out.safetensors"
    said = run(capsys, file, out, "--dtype", "fp32", "--prediction", "v")
    original, written = load_file(file), load_file(out)
    assert torch.equal(written.pop(positions), original.pop(positions))
    assert_equal(written, {name: tensor.float() for name, tensor in original.items()})
    found = metadata(out)
    assert found["modelspec.title"] == "Mine"
    assert found["modelspec.author"] == "Me"
    assert found["ss_steps"] == "5"
    assert found["modelspec.prediction_type"] == "v"
    content = out.read_bytes()
    numbers = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(numbers).hexdigest()
    assert said["files"] == {"out.safetensors": hashlib.sha256(numbers).hexdigest()}


def with_copies(tensors: dict[str, Tensor]) -> None:
    """As LDM's training saves them: EMA copies in float32, and buffers of the noise schedule."""
    copies = {ema_name(name): tensor.float() + 1 for name, tensor in tensors.items() if name.startswith(UNET)}
    tensors |= copies | {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9)}


@pytest.mark.parametrize("flags", ["", "--ema use", "--ema drop", "--prune", "--prune --ema use", "--prune --ema keep"])
def test_averages_and_pruning(flags: str, sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plain = edited(sd1_file, tmp_path / "in.safetensors", with_copies), load_file(sd1_file)
    said = run(capsys, file, tmp_path / "out.safetensors", *flags.split())
    written = load_file(tmp_path / "out.safetensors")
    expected = plain
    if "use" in flags:
        expected = {name: t.float() + 1 if name.startswith(UNET) else t for name, t in plain.items()}
    assert_equal({name: written[name] for name in plain}, expected)
    others = written.keys() - plain.keys()
    assert ("betas" in others) == ("--prune" not in flags)
    assert (ema_name(LAST_CONVOLUTION) in others) == (flags in ("", "--prune --ema keep"))
    gone = {name for names in said["left_out"].values() for name in names}
    assert gone == load_file(file).keys() - written.keys()


def test_another_autoencoder(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def brighter(tensors: dict[str, Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            del tensors[name]
            if name.startswith(FIRST_STAGE):
                tensors[name.removeprefix(FIRST_STAGE)] = tensor + 1

    vae = edited(sd1_file, tmp_path / "vae.safetensors", brighter)
    run(capsys, sd1_file, tmp_path / "out.safetensors", "--vae", vae)
    expected = {name: t + 1 if name.startswith(FIRST_STAGE) else t for name, t in load_file(sd1_file).items()}
    assert_equal(load_file(tmp_path / "out.safetensors"), expected)
    run(capsys, sd1_file, tmp_path / "mixed.safetensors", "--vae", vae, "--merge", sd1_file)  # it is not blended
    assert_equal(load_file(tmp_path / "mixed.safetensors"), expected)


def test_parts_by_name(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = "cond_stage_model."
    for folder, prefix in (("VAE", FIRST_STAGE), ("unet", UNET), ("text_encoders", tower)):
        (tmp_path / "all" / folder).mkdir(parents=True)

        def only(tensors: dict[str, Tensor], prefix: str = prefix) -> None:
            kept = {name: tensor + 1 for name, tensor in tensors.items() if name.startswith(prefix)}
            tensors.clear()
            tensors.update(kept)

        edited(sd1_file, tmp_path / "all" / folder / "mine.safetensors", only)
    plain, models = load_file(sd1_file), ("--models", tmp_path / "all")
    for flag, prefix in (("--vae", FIRST_STAGE), ("--unet", UNET), ("--text-encoder", tower)):
        out = tmp_path / f"{flag}.safetensors"
        run(capsys, sd1_file, out, flag, "mine", *models)
        assert_equal(load_file(out), {name: t + 1 if name.startswith(prefix) else t for name, t in plain.items()})


def test_a_precision_that_cannot_hold_a_number(
    sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def large(tensors: dict[str, Tensor]) -> None:
        tensors |= {LAST_CONVOLUTION: tensors[LAST_CONVOLUTION].float() + 70000}
        tensors |= {f"{UNET}out.2.bias": torch.full_like(tensors[f"{UNET}out.2.bias"], torch.inf, dtype=torch.float32)}

    file = edited(sd1_file, tmp_path / "in.safetensors", large)
    for out in ("out.safetensors", "folder"):
        message = refused(capsys, file, tmp_path / out, "--dtype", "fp16")
        assert LAST_CONVOLUTION in message or "conv_out.weight" in message
        assert "70000" in message
        assert "bf16 or fp32 holds it" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
    run(capsys, file, tmp_path / "out.safetensors", "--dtype", "bf16")  # what is infinite already may be


@pytest.mark.parametrize("part", [False, True])
def test_hashes_of_other_numbers_are_dropped(
    part: bool, sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bare(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part and not name.startswith(FIRST_STAGE)]:
            del tensors[name]

    words = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "ss_steps": "5"}
    run(capsys, edited(sd1_file, tmp_path / "in.safetensors", bare, **words), tmp_path / "out.safetensors")
    assert {key: value for key, value in metadata(tmp_path / "out.safetensors").items() if key.startswith("ss")} == {
        "ss_steps": "5"
    }


def test_models_that_predict_different_things(
    tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    v = tiny_file(SYSTEMS["sd2-v"])
    eps = edited(v, tmp_path / "eps.safetensors", lambda _: None, **{"modelspec.prediction_type": "epsilon"})
    out = tmp_path / "out.safetensors"
    message = refused(capsys, v, out, "--merge", eps)
    assert "predicts v (its own ldm.config)" in message
    assert "predicts eps (metadata modelspec.prediction_type)" in message
    assert not out.exists()
    run(capsys, v, out, "--merge", eps, "--prediction", "v")
    assert metadata(out)["modelspec.prediction_type"] == "v"


def test_what_a_merge_has_no_partner_for(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{UNET}out.2.bias"], tensors[LAST_CONVOLUTION]
        tensors |= {f"{UNET}more": torch.zeros(1), "betas": torch.zeros(1000)}

    file = edited(sd1_file, tmp_path / "other.safetensors", other)
    notes = run(capsys, sd1_file, tmp_path / "out.safetensors", "--merge", file)["notes"]
    assert "other.safetensors: 1 tensors are left out" in notes[0]
    assert "other.safetensors: lacks 2 tensors" in notes[1]
    assert not run(capsys, sd1_file, tmp_path / "same.safetensors", "--merge", sd1_file)["notes"]


def test_adapters_are_baked_in(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = load_file(sd1_file)
    name = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    width_out, width_in = plain[name].shape
    down, up = torch.randn(2, width_in), torch.randn(width_out, 2)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(1.0)}
    save_file(lora, tmp_path / "style.safetensors")
    out = tmp_path / "out.safetensors"
    run(capsys, sd1_file, out, "--lora", f"{tmp_path / 'style.safetensors'}:0.5")
    expected = plain | {name: (plain[name].float() + 0.5 * (1 / 2) * (up @ down)).half()}
    assert_equal(load_file(out), expected)
    assert metadata(out)["modelspec.merged_from"] == f"{sd1_file.stem}, style"


def test_merges(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def moved(by: float) -> Callable[[dict[str, Tensor]], None]:
        def move(tensors: dict[str, Tensor]) -> None:
            tensors[LAST_CONVOLUTION] = tensors[LAST_CONVOLUTION] + by

        return move

    plain = load_file(sd1_file)
    tuned = edited(sd1_file, tmp_path / "tuned.safetensors", moved(1.0))
    base = edited(sd1_file, tmp_path / "base.safetensors", moved(0.5))
    run(capsys, sd1_file, tmp_path / "half.safetensors", "--merge", tuned)
    a, b, c = (load_file(file)[LAST_CONVOLUTION].float() for file in (sd1_file, tuned, base))
    half = load_file(tmp_path / "half.safetensors")
    assert torch.equal(half[LAST_CONVOLUTION], (a * 0.5 + b * 0.5).half())
    assert metadata(tmp_path / "half.safetensors")["modelspec.merged_from"] == f"{sd1_file.stem}, tuned"
    run(capsys, sd1_file, tmp_path / "sum.safetensors", "--merge", tuned, "--minus", base, "--weight", "2")
    added = load_file(tmp_path / "sum.safetensors")
    assert torch.equal(added[LAST_CONVOLUTION], (a + 2 * (b - c)).half())
    assert_equal({**added, LAST_CONVOLUTION: a}, {**plain, LAST_CONVOLUTION: a})


def test_a_pickle_is_read_where_that_is_allowed(
    sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.ckpt"
    torch.save({"state_dict": load_file(sd1_file), "global_step": 7}, file)
    assert "--allow-pickle" in refused(capsys, file, tmp_path / "out.safetensors")
    run(capsys, file, tmp_path / "out.safetensors", "--allow-pickle")
    assert_equal(load_file(tmp_path / "out.safetensors"), load_file(sd1_file))


def test_sdxl_that_predicts_v_is_marked(tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    run(capsys, tiny_file(SYSTEMS["sdxl"]), out, "--prediction", "v")
    assert load_file(out)["v_pred"].shape == (0,)


def test_what_is_no_checkpoint_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"emb_params": torch.ones(2, 768)}
    torch.save(tensors, tmp_path / "cat.pt")
    run(capsys, tmp_path / "cat.pt", tmp_path / "cat.safetensors", "--allow-pickle", "--dtype", "fp16")
    assert_equal(load_file(tmp_path / "cat.safetensors"), {"emb_params": torch.ones(2, 768).half()})
    assert "written of checkpoints only" in refused(capsys, tmp_path / "cat.safetensors", tmp_path / "folder")
    assert "needs a whole checkpoint" in refused(
        capsys, tmp_path / "cat.safetensors", tmp_path / "y.safetensors", "--prune"
    )


def test_endings_in_capitals(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, sd1_file, tmp_path / "OUT.SAFETENSORS")["layout"] == "single file"


def test_reading_in_pieces_changes_nothing(
    sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, batch in (("a", save.BATCH), ("b", 1)):
        monkeypatch.setattr(save, "BATCH", batch)
        run(capsys, sd1_file, tmp_path / folder)
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_rights_follow_the_umask(sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    previous = os.umask(0o027)
    try:
        run(capsys, sd1_file, tmp_path / "folder")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    for file in (tmp_path / "folder").rglob("*.*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_what_cannot_be_done(
    sd1_file: Path, tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    cases: dict[str, tuple[str | Path, ...]] = {
        "exists already": (sd1_file, tmp_path),
        "must end in .safetensors": (sd1_file, tmp_path / "x.ckpt", "--to", "single"),
        "no other kind of file": (sd1_file, tmp_path / "x.CKPT"),
        "--minus: expected --merge": (sd1_file, out, "--minus", sd1_file),
        "--weight: expected": (sd1_file, out, "--weight", "0.5"),
        "has no EMA copies": (sd1_file, out, "--ema", "use"),
        "two families": (sd1_file, out, "--merge", tiny_file(SYSTEMS["sd2-v"])),
        "no such file": (tmp_path / "absent.safetensors", out),
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, *arguments)
    broken = edited(sd1_file, tmp_path / "broken.safetensors", lambda tensors: tensors.pop(LAST_CONVOLUTION))
    refused(capsys, broken, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors"]


def test_what_it_says(tiny_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tiny_file(SYSTEMS["sd2-v"])), str(tmp_path / "folder")]) == 0
    said = capsys.readouterr().out
    assert "diffusers folder, sd2, text to image, predicts v" in said
    assert "left out, no place for it (13):\n    cond_stage_model.model.text_projection" in said
