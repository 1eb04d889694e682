"""From an open_clip config to its model, its tokenizer and its files; nothing is ever downloaded.

A config is a name that open_clip knows, "small" (the CLIP that ships with this package), a JSON file, or a folder with
open_clip_config.json: {"model_cfg": {...}, "preprocess_cfg": {...}}, or the former alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.image_encoder import CLIP_DEVIATION, CLIP_MEAN, ImageConfig
from ldm.models.presets import SMALL_IMAGE, SMALL_TEXT
from ldm.models.text_encoder import TextConfig
from ldm.pipeline.files import read_file
from ldm.training.clip.data import Fit
from ldm.training.clip.objective import MAX_SCALE, Contrast, OpenCLIP, Pixels
from ldm.weights.atomic import replacing
from ldm.weights.clip_config import named_description
from ldm.weights.io import printable
from ldm.weights.save import write_tensors

MODEL_FILE, CONFIG_FILE = "open_clip_model.safetensors", "open_clip_config.json"
TOP_KEYS = {
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
}
FOLDERS = ("hf_model_name", "hf_tokenizer_name")
"""Keys of text_cfg that name what Hugging Face would be asked for; in a config made ready, folders that are here."""
TOLD_BY_FILES = (".json", ".txt", ".model")
"""Endings of the files in such a folder that are not weights: a tower's sizes, and the tokenizer."""
SIGMOID_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
"""Zhai et al. 2023, section 3.2: nearly all pairs do not fit, and so it begins."""


BROKEN = (
    *(TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError),
    *(OSError, ImportError),
)
"""What open_clip and what it stands on raise for a config that cannot be built."""


@dataclass(frozen=True)
class ClipConfig:
    """What open_clip builds (`model`, its model_cfg), and how pictures are brought to it. name: for messages."""

    name: str
    model: Mapping[str, Any]
    pixels: Pixels
    fit: Fit

    def folders(self) -> list[Path]:
        """Where its text tower and its tokenizer lie, if they have folders of their own."""
        return [Path(name) for key in FOLDERS if (name := self.model["text_cfg"].get(key))]

    def digest(self) -> str:
        """The same for the same network, tokenizer and preparation of pictures, whatever their names and places."""
        text = {key: value for key, value in self.model["text_cfg"].items() if key not in FOLDERS}
        told = [{**self.model, "text_cfg": text}, asdict(self.pixels), asdict(self.fit)]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for path in (path for folder in self.folders() for path in sorted(folder.iterdir())):
            if path.suffix in TOLD_BY_FILES and path.is_file():
                digest.update(hashlib.sha256(read_file(path, 2**28)).digest())
        return digest.hexdigest()[:16]


def read_config(name: str, loss: Contrast, text_model: Path | None = None) -> ClipConfig:
    """The config called `name`, made ready for the loss, its text model and tokenizer in a folder that is there.

    text_model: a folder in Hugging Face's layout, for configs whose text tower or tokenizer would be downloaded.
    Raises LdmError for an unknown name, an unknown key, and what cannot be had without a network.
    """
    model, preprocess = _find(name)
    told = printable(name)
    if "multimodal_cfg" in model:
        raise LdmError(f"config: {told} also writes captions, which is not trained here; choose one that does not")
    _check_keys(told, model, TOP_KEYS)
    vision, text = (dict(_section(told, model, key)) for key in ("vision_cfg", "text_cfg"))
    _check_keys(f"{told}: vision_cfg", vision, {field.name for field in fields(CLIPVisionCfg)})
    _check_keys(f"{told}: text_cfg", text, {field.name for field in fields(CLIPTextCfg)})
    for key in FOLDERS:
        if text.get(key):
            text[key] = str(_local(told, key, text[key], text_model))
    vision["timm_model_pretrained"] = False
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = _has_weights(Path(text["hf_model_name"]))
    if loss == "sigmoid":
        start = {key: value for key, value in SIGMOID_START.items() if model.get(key) is None}
    else:
        start = {"init_logit_bias": None}  # by which a model tells that it was trained with the sigmoid
    size = vision.get("image_size", CLIPVisionCfg.image_size)
    fit, pixels = _pictures(told, size, preprocess)
    return ClipConfig(told, {**model, "vision_cfg": vision, "text_cfg": text, **start}, pixels, fit)


def build(config: ClipConfig) -> OpenCLIP:
    """The model in float32, with random weights but for a text tower whose folder has some."""
    arguments: dict[str, Any] = json.loads(json.dumps(dict(config.model)))
    custom = arguments.pop("custom_text", False) or arguments["text_cfg"].get("hf_model_name")
    try:
        return (CustomTextCLIP if custom else CLIP)(**arguments).float()
    except BROKEN as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LdmError(f"config: {config.name}: open_clip cannot build it ({printable(reason)}); mend it") from None


def tokenizer(config: ClipConfig) -> Callable[[list[str]], Tensor]:
    """The config's own tokenizer: texts -> ids (B, N)."""
    text = config.model["text_cfg"]
    length, options = text.get("context_length", CLIPTextCfg.context_length), text.get("tokenizer_kwargs") or {}
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=length, **options)
    options = {**options, "trust_remote_code": False, "local_files_only": True}
    try:
        return HFTokenizer(
            text["hf_tokenizer_name"], context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise LdmError(f"{printable(text['hf_tokenizer_name'])}: has no tokenizer ({printable(reason)})") from None


def export(folder: Path, model: OpenCLIP, config: ClipConfig) -> None:
    """Write the model as open_clip's `local-dir:` takes it.

    With a text tower of Hugging Face's, its config and tokenizer go along; the config then names this folder.
    """
    described = json.loads(json.dumps(dict(config.model)))
    if described["text_cfg"].get("hf_model_name"):
        cast(Any, model).text.config.save_pretrained(folder)
        described["text_cfg"] |= {"hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}
    if described["text_cfg"].get("hf_tokenizer_name"):
        cast(HFTokenizer, tokenizer(config)).save_pretrained(folder)
        described["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
    preprocess = {
        "size": config.fit.size,
        "mode": "RGB",
        "mean": config.pixels.mean,
        "std": config.pixels.deviation,
        "interpolation": config.fit.resample,
        "resize_mode": config.fit.resize,
    }
    with replacing(folder / CONFIG_FILE) as file:
        file.write(json.dumps({"model_cfg": described, "preprocess_cfg": preprocess}, indent=2).encode())
    tensors = model.state_dict()
    tensors["logit_scale"] = tensors["logit_scale"].clamp(max=math.log(MAX_SCALE))
    write_tensors(folder / MODEL_FILE, tensors, {"format": "pt"})


def small_config(text: TextConfig, image: ImageConfig, patch_dropout: float = 0.0) -> dict[str, Any]:
    """open_clip's model_cfg of two towers of ours. patch_dropout: the share of a picture not looked at in training."""
    return {
        "embed_dim": text.projection or text.width,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": {
            "layers": image.layers,
            "width": image.width,
            "head_width": image.width // image.heads,
            "patch_size": image.patch,
            "image_size": image.size,
            "patch_dropout": patch_dropout,
        },
        "text_cfg": {
            "context_length": text.tokens,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    }


def small_clip(text: TextConfig, image: ImageConfig, patch_dropout: float = 0.0) -> CLIP:
    """An open_clip model of two towers of ours; see `small_config`."""
    return CLIP(**small_config(text, image, patch_dropout))


def _find(name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A config's model_cfg and preprocess_cfg, by name or from a file."""
    if name == "small":
        return small_config(SMALL_TEXT, SMALL_IMAGE), {"mean": SMALL_IMAGE.mean, "std": SMALL_IMAGE.deviation}
    file = Path(name) / CONFIG_FILE
    described = named_description(str(file) if file.is_file() else name)
    return described["model_cfg"], described["preprocess_cfg"]


def _section(name: str, model: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = model.get(key)
    if not isinstance(found, dict):
        raise LdmError(f"config: {printable(name)}: {key} is {printable(repr(found)[:40])}, expected an object")
    return found


def _check_keys(where: str, found: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(found) - known):
        raise LdmError(f"config: {where}: unknown {printable(unknown[0])}, expected of {', '.join(sorted(known))}")


def _local(config: str, key: str, name: str, given: Path | None) -> Path:
    """The folder that stands for what Hugging Face would be asked for. None of it may bring code along."""
    folder = given or Path(name)
    if not folder.is_dir():
        found = f"{printable(str(folder))} is no folder here"
        raise LdmError(f"config: {config}: {key}: {found}, and nothing is downloaded; give its folder as --text-model")
    for described in ("config.json", "tokenizer_config.json"):
        if (folder / described).is_file() and b'"auto_map"' in read_file(folder / described, 2**24):
            raise LdmError(f"{printable(str(folder / described))}: asks to run code of its own, which is never done")
    return folder.resolve()


def _has_weights(folder: Path) -> bool:
    """Whether a folder in Hugging Face's layout has weights to begin from."""
    if any(folder.glob("model*.safetensors")):
        return True
    if pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise LdmError(f"{printable(str(pickles[0]))}: is a pickle; expected .safetensors beside it, or no weights")
    return False


def _pictures(config: str, size: Any, told: Mapping[str, Any]) -> tuple[Fit, Pixels]:
    """How pictures are prepared: as preprocess_cfg says, else as open_clip does."""
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or not 8 <= sides[0] <= 4096:
        raise LdmError(f"config: {config}: image_size is {printable(repr(size))}, expected a square of 8 to 4096")
    resize, resample = told.get("resize_mode") or "shortest", told.get("interpolation") or "bicubic"
    if resize not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
        expected = "shortest or squash, bicubic or bilinear"
        raise LdmError(f"config: {config}: preprocess_cfg: found {printable(f'{resize}, {resample}')}, {expected}")
    mean, deviation = (
        tuple(float(x) for x in told.get(k) or d) for k, d in (("mean", CLIP_MEAN), ("std", CLIP_DEVIATION))
    )
    if len(mean) != 3 or len(deviation) != 3 or min(deviation) <= 0:
        raise LdmError(f"config: {config}: preprocess_cfg: expected 3 numbers as mean, 3 above 0 as std")
    fit = Fit(sides[0], cast(Literal["shortest", "squash"], resize), cast(Literal["bicubic", "bilinear"], resample))
    return fit, Pixels(sides[0], mean, deviation)
