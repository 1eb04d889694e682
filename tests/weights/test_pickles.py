"""What torch.save writes is read bit for bit behind --allow-pickle; what a pickle may try beyond that is refused."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, tiny
from ldm.pipeline.load import load
from ldm.weights.pickles import MAX_PICKLE, Pickled, read_pickle
from ldm.weights.source import open_source

WEIGHTS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.arange(6, dtype=torch.float16).reshape(2, 3).t(),
    "e": nn.Parameter(torch.tensor([0.5, 2.0])),
    "f": torch.zeros(0, 4),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a hostile pickle would leave its canary."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(value: Any, name: str = "model.ckpt", **options: Any) -> Path:
    torch.save(value, name, **options)
    return Path(name)


def assert_weights(pickled: Pickled) -> None:
    assert pickled.tensors.keys() == WEIGHTS.keys()
    for name, tensor in pickled.tensors.items():
        assert tensor.dtype == WEIGHTS[name].dtype
        assert torch.equal(tensor, WEIGHTS[name])
        assert not tensor.requires_grad


@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_a_state_dict_comes_back(container: Callable[..., Any]) -> None:
    pickled = read_pickle(saved(container(WEIGHTS)))
    assert_weights(pickled)
    assert pickled.metadata == {}


def test_a_training_checkpoint_is_unwrapped() -> None:
    file = {"state_dict": WEIGHTS, "global_step": 875000, "epoch": 3, "optimizer_states": [{}], "loops": None}
    pickled = read_pickle(saved(file))
    assert_weights(pickled)
    assert pickled.metadata == {"global_step": "875000", "epoch": "3"}


def test_a_dict_in_the_dict_gives_dotted_names() -> None:
    """As an embedding of AUTOMATIC1111's web UI."""
    file = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "x", "step": 5}
    pickled = read_pickle(saved(file, "x.pt"))
    assert pickled.tensors.keys() == {"string_to_param.*"}
    assert pickled.metadata == {"name": "x", "step": "5"}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".anything"])
def test_a_checkpoint_loads_like_its_safetensors(
    suffix: str, here: Path, tiny_file: Callable[[SystemConfig], Path]
) -> None:
    tensors = load_file(tiny_file(tiny(sd1())))
    path = saved({"state_dict": tensors, "global_step": 1}, f"model{suffix}")
    source = open_source(path, allow_pickle=True)
    assert source.layout == "pickle"
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in source.read(tensors))
    if suffix == ".ckpt":
        loaded = load(path, allow_pickle=True, dtype="float32").unet.state_dict()
        assert all(torch.equal(t, tensors[f"model.diffusion_model.{name}"].float()) for name, t in loaded.items())
    with pytest.raises(LdmError, match=r"pickle.*--allow-pickle.*ldm convert"):
        open_source(path)


def test_the_training_step_in_a_pickle_is_evidence(tiny_file: Callable[[SystemConfig], Path]) -> None:
    tensors = load_file(tiny_file(tiny(sd2())))
    for step, prediction in ((875000, "eps"), (110000, "v")):
        path = saved({"state_dict": tensors, "global_step": step})
        assert load(path, allow_pickle=True).config.prediction == prediction


# What is refused.


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, ("touch canary",)


def refusal(path: Path) -> str:
    with pytest.raises(LdmError) as caught:
        open_source(path, allow_pickle=True)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert not Path("canary").exists()
    return message


@pytest.mark.parametrize("value", [Hostile(), {"a": torch.ones(1), "b": Hostile()}, {"state_dict": {"x": Hostile()}}])
@pytest.mark.parametrize("protocol", range(6))
def test_code_never_runs(value: Any, protocol: int) -> None:
    message = refusal(saved(value, pickle_protocol=protocol))
    assert "system" in message if protocol < 4 else "not of the kind that torch.save writes" in message


@pytest.mark.parametrize("protocol", range(6))
def test_raw_pickles_are_refused(protocol: int) -> None:
    Path("x.pt").write_bytes(pickle.dumps(Hostile(), protocol))
    assert "is a pickle without a zip archive" in refusal(Path("x.pt"))


def test_the_format_before_the_zip_archive_is_refused() -> None:
    assert "torch wrote before 1.6" in refusal(saved(WEIGHTS, _use_new_zipfile_serialization=False))
    assert "torch wrote before 1.6" in refusal(saved(Hostile(), _use_new_zipfile_serialization=False))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"state_dict": WEIGHTS, "args": argparse.Namespace(x=1)}, "argparse.Namespace"),
        ({"w": nn.ParameterDict({"*": torch.ones(1)})}, "torch.nn.modules.container.ParameterDict"),
        ({"w": bytearray(b"x")}, "__builtin__.bytearray"),
        ({"w": torch.ones(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"w": torch.device("cpu")}, "torch.device"),
    ],
)
def test_what_is_no_tensor_is_named_and_not_imported(value: Any, name: str) -> None:
    message = refusal(saved(value))
    assert f"asks for {name}" in message
    assert "export it as .safetensors" in message


def test_whole_modules_and_lists_are_no_weights() -> None:
    assert "asks for torch.nn.modules.linear.Linear" in refusal(saved(nn.Linear(1, 1)))
    assert "holds a list; expected a dict" in refusal(saved([torch.ones(1)]))
    assert "holds a Tensor" in refusal(saved(torch.ones(1)))


@pytest.mark.parametrize("name", ["../x", "a\nb", "", "x" * 300])
def test_names_that_are_none(name: str) -> None:
    assert "is not a tensor name" in refusal(saved({name: torch.ones(1)}))


def test_a_tensor_larger_than_its_numbers() -> None:
    """One number, said to be 10^12 of them: nothing is allocated."""
    assert "not a tensor with all its numbers" in refusal(saved({"x": torch.ones(1).expand(10**6, 10**6)}))


def rewritten(change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Path:
    """A file of torch's, each member written anew by `change`."""
    stream = BytesIO()
    torch.save(WEIGHTS, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile("model.ckpt", "w") as new:
        for member in old.infolist():
            change(new, member, old.read(member))
    return Path("model.ckpt")


def test_a_compressed_archive_is_not_inflated() -> None:
    path = rewritten(lambda new, member, data: new.writestr(member.filename, data, zipfile.ZIP_DEFLATED))
    assert "is compressed" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
    assert "is compressed" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:.*deprecated:FutureWarning")
def test_archives_that_torch_does_not_write() -> None:
    def twice(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(member.filename, data)
        new.writestr(member.filename, data)

    assert "two members of one name" in refusal(rewritten(twice))
    with zipfile.ZipFile("a.pt", "w") as archive:
        archive.writestr("x", "y")
    assert "not of torch.save's weights" in refusal(Path("a.pt"))
    torch.jit.save(torch.jit.script(nn.Identity()), "b.pt")
    assert "not of torch.save's weights" in refusal(Path("b.pt"))
    with zipfile.ZipFile("c.pt", "w") as archive:
        archive.writestr("x/data.pkl", bytes(MAX_PICKLE + 1))
    assert f"at most {MAX_PICKLE} are read" in refusal(Path("c.pt"))


def test_a_directory_hidden_behind_another_end() -> None:
    """Readers of zip archives look for the end backwards, some take the nearest record, some the first that fits."""
    path = saved(WEIGHTS)
    content = path.read_bytes()
    for tail in (b"x", bytes(22), content[-22:-2] + b"\x05\0hello"):
        path.write_bytes(content + tail)
        assert "has no proper end" in refusal(path)
    comment = len(content[-22:])
    path.write_bytes(content[:-2] + comment.to_bytes(2, "little") + content[-22:-2] + b"\1\0")
    assert "has no proper end" in refusal(path)


def test_a_cut_file_is_said_to_be_incomplete() -> None:
    path = saved(WEIGHTS)
    content = path.read_bytes()
    for size in (5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "incomplete" in refusal(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(where=st.integers(0, 2**16), byte=st.integers(0, 255), hostile=st.booleans())
def test_changed_bytes_end_in_our_own_error(where: int, byte: int, hostile: bool) -> None:
    stream = BytesIO()
    torch.save({"a": Hostile()} if hostile else WEIGHTS, stream)
    content = bytearray(stream.getvalue())
    content[where % len(content)] = byte
    Path("x.pt").write_bytes(content)
    try:
        for tensor in read_pickle(Path("x.pt")).tensors.values():
            tensor.clone()
    except LdmError as error:
        assert "\n" not in str(error)
    assert not Path("canary").exists()
