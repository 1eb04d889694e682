"""Names find files in the folders that people have, and nothing outside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, tiny
from ldm.pipeline.load import load
from ldm.weights.find import MODELS_VARIABLE, Kind, find, listing, locate, model_roots

WEBUI = (
    "models/Stable-diffusion/anything-v3.safetensors",
    "models/Stable-diffusion/anime/Counterfeit.ckpt",
    "models/Stable-diffusion/anime/Counterfeit.yaml",
    "models/Lora/styles/ink.safetensors",
    "models/LyCORIS/fur.safetensors",
    "models/VAE/kl-f8.vae.pt",
    "models/ControlNet/canny.safetensors",
    "embeddings/easynegative.pt",
    "outputs/picture.png",
)
COMFY = (
    "models/checkpoints/anything-v3.safetensors",
    "models/checkpoints/Deliberate.safetensors",
    "models/loras/ink.safetensors",
    "models/vae/kl-f8.safetensors",
    "models/controlnet/canny.safetensors",
    "models/embeddings/easynegative.safetensors",
    "models/unet/one.safetensors",
    "models/diffusion_models/two.safetensors",
    "models/text_encoders/clip_l.safetensors",
    "models/clip/clip_g.safetensors",
)


def tree(root: Path, files: tuple[str, ...]) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    return tree(tmp_path / "webui", WEBUI)


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    return tree(tmp_path / "comfy", COMFY)


@pytest.mark.parametrize(
    ("kind", "webui_names", "comfy_names"),
    [
        ("checkpoint", ["anime/Counterfeit.ckpt", "anything-v3.safetensors"],
         ["Deliberate.safetensors", "anything-v3.safetensors"]),
        ("lora", ["fur.safetensors", "styles/ink.safetensors"], ["ink.safetensors"]),
        ("vae", ["kl-f8.vae.pt"], ["kl-f8.safetensors"]),
        ("controlnet", ["canny.safetensors"], ["canny.safetensors"]),
        ("embedding", ["easynegative.pt"], ["easynegative.safetensors"]),
        ("unet", [], ["one.safetensors", "two.safetensors"]),
        ("text encoder", [], ["clip_g.safetensors", "clip_l.safetensors"]),
    ],
)  # fmt: skip
def test_both_layouts_are_known(
    kind: Kind, webui_names: list[str], comfy_names: list[str], webui: Path, comfy: Path
) -> None:
    for root, names in ((webui, webui_names), (comfy, comfy_names), (comfy / "models", comfy_names)):
        assert [file.name for file in listing(kind, [root])] == names
    everything = [file.path for file in listing(kind, [webui, comfy, comfy / "models"])]
    assert len(everything) == len(webui_names) + len(comfy_names), "each file once"


def test_a_flat_folder_holds_every_kind(tmp_path: Path) -> None:
    root = tree(tmp_path, ("a.safetensors", "b/c.pt", ".hidden/d.pt", ".e.pt", "notes.txt"))
    for kind in ("checkpoint", "lora", "vae"):
        assert [file.name for file in listing(kind, [root])] == ["a.safetensors", "b/c.pt"]


def test_a_kind_without_a_folder_of_its_own_is_looked_for_beside_those_of_others(tmp_path: Path) -> None:
    root = tree(tmp_path, ("a.safetensors", "b/c.pt", "loras/ink.safetensors", "models/VAE/d.pt"))
    assert [file.name for file in listing("checkpoint", [root])] == ["a.safetensors", "b/c.pt"]
    assert [file.name for file in listing("lora", [root])] == ["ink.safetensors"]
    assert find("checkpoint", "a", [root]) == root / "a.safetensors"


def test_folders_of_diffusers_are_one_model(webui: Path) -> None:
    place = webui / "models/Stable-diffusion/sd-turbo"
    tree(place, ("model_index.json", "unet/diffusion_pytorch_model.safetensors"))
    assert find("checkpoint", "sd-turbo", [webui]) == place
    assert not any("unet" in file.name for file in listing("checkpoint", [webui]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("anything-v3", "anything-v3.safetensors"),
        ("anything-v3.safetensors", "anything-v3.safetensors"),
        ("anime/Counterfeit.ckpt", "anime/Counterfeit.ckpt"),
        ("anime/Counterfeit", "anime/Counterfeit.ckpt"),
        ("Counterfeit.ckpt", "anime/Counterfeit.ckpt"),
        ("Counterfeit", "anime/Counterfeit.ckpt"),
        ("counterFEIT", "anime/Counterfeit.ckpt"),
        ("ANIME/counterfeit.CKPT", "anime/Counterfeit.ckpt"),
    ],
)
def test_what_a_file_may_be_called(name: str, expected: str, webui: Path) -> None:
    assert find("checkpoint", name, [webui]) == webui / "models/Stable-diffusion" / expected


def test_the_exact_name_wins_and_safetensors_comes_before_pickles(tmp_path: Path) -> None:
    root = tree(tmp_path, ("Model.ckpt", "Model.safetensors", "other/model.pt", "x.y.safetensors", "x.safetensors"))
    assert find("lora", "Model", [root]) == root / "Model.safetensors"
    assert find("lora", "Model.ckpt", [root]) == root / "Model.ckpt"
    assert find("lora", "model", [root]) == root / "other/model.pt"
    assert find("lora", "x", [root]) == root / "x.safetensors"
    assert find("lora", "x.y", [root]) == root / "x.y.safetensors"


def test_two_files_of_one_name_are_listed(webui: Path, comfy: Path) -> None:
    with pytest.raises(LdmError, match=r"canny: 2 files have this name: .*; give the path of one") as caught:
        find("controlnet", "canny", [webui, comfy])
    assert str(webui / "models/ControlNet/canny.safetensors") in str(caught.value)
    assert str(comfy / "models/controlnet/canny.safetensors") in str(caught.value)
    assert find("lora", "ink", [webui, comfy]) == comfy / "models/loras/ink.safetensors", "the whole name comes first"


def test_close_names_are_suggested(webui: Path) -> None:
    with pytest.raises(LdmError) as caught:
        find("checkpoint", "anythingv3", [webui])
    message = str(caught.value)
    assert message.startswith(f"anythingv3: no such file, and no checkpoint of that name under {webui}")
    assert message.endswith("close to it: anything-v3.safetensors")
    with pytest.raises(LdmError, match="no lora of that name") as caught:
        find("lora", "anything-v3", [webui])
    assert "close to it" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../secret", "../secret.safetensors", "anime/../../../../secret", "..", "", ".", "/", "..\\secret",
     "C:secret", "secret::$DATA", "secret.safetensors:x", "secret\0", "secret\n", "//secret", "x" * 5000],
)  # fmt: skip
def test_no_name_leads_outside(name: str, webui: Path) -> None:
    secret = webui.parent / "secret.safetensors"
    secret.touch()
    for given in (name, str(secret)):
        with pytest.raises(LdmError, match=r"no such file, and no checkpoint") as caught:
            find("checkpoint", given, [webui])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_links_that_lead_outside_are_not_followed_unasked(webui: Path, comfy: Path) -> None:
    folder = webui / "models/Stable-diffusion"
    (folder / "out.safetensors").symlink_to(comfy / "models/checkpoints/Deliberate.safetensors")
    (folder / "in.safetensors").symlink_to(webui / "models/Lora/styles/ink.safetensors")
    (folder / "dangling.safetensors").symlink_to(webui / "absent")
    (folder / "loop").symlink_to(folder)
    assert find("checkpoint", "in", [webui]) == folder / "in.safetensors"
    with pytest.raises(LdmError, match="no such file"):
        find("checkpoint", "out", [webui])
    assert find("checkpoint", "out", [webui], follow=True) == folder / "out.safetensors"


def test_what_lies_at_the_path_wins(webui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("anything-v3").touch()
    assert locate("checkpoint", "anything-v3", [webui]) == Path("anything-v3")
    assert locate("checkpoint", "Counterfeit", [webui]).name == "Counterfeit.ckpt"
    assert locate("checkpoint", "Counterfeit", []) == Path("Counterfeit")
    assert locate("checkpoint", webui / "outputs/picture.png", [webui]) == webui / "outputs/picture.png"


def test_the_folders_to_search(webui: Path, comfy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODELS_VARIABLE, raising=False)
    assert model_roots() == []
    monkeypatch.setenv(MODELS_VARIABLE, os.pathsep.join([str(webui), "", str(comfy)]))
    assert model_roots() == [webui, comfy]
    assert model_roots([str(comfy)]) == [comfy]
    with pytest.raises(LdmError, match=r"absent: is no folder; expected one with model files$"):
        model_roots([webui / "absent"])
    monkeypatch.setenv(MODELS_VARIABLE, "x" * 5000)
    with pytest.raises(LdmError, match=f"is no folder; .* {MODELS_VARIABLE}"):
        model_roots()


def test_models_load_by_name(
    webui: Path, tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = webui / "models/Stable-diffusion/mine.safetensors"
    path.write_bytes(tiny_file(tiny(sd1())).read_bytes())
    assert load("mine", models=[webui]).origin.path == path
    monkeypatch.setenv(MODELS_VARIABLE, str(webui))
    (webui / "models/VAE/other.safetensors").write_bytes(path.read_bytes())
    assert load("mine", vae="other").origin.path == path
    with pytest.raises(LdmError, match="no vae of that name"):
        load("mine", vae="nine")
