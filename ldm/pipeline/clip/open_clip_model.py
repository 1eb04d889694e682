"""CLIPs that our two towers do not hold, through open_clip's own model: SigLIP, ConvNeXt, ResNets, multilingual text.

The only file that uses open_clip to look at pictures and texts. Everything is built from a config beside the weights;
whatever would need a download is an error instead.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from open_clip.hf_configs import arch_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.pipeline.clip.model import CLIP, check_shape
from ldm.weights.clip import ClipFile
from ldm.weights.io import printable, some
from ldm.weights.source import read_json

MANY_LANGUAGES = 100_000
"""Pieces of a vocabulary from which on it serves many languages: XLM-R, mT5, NLLB, Gemma have 250,000, English ones a
tenth of that."""

TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}
SIMPLE_OPTIONS = {"clean"}
"""What a config may say of a tokenizer."""

BROKEN = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError, OSError, ImportError)
"""What open_clip, timm and transformers raise for a config that cannot be built."""

Tokenizer = Callable[[list[str]], Tensor]


def open_clip_model(file: ClipFile, *, name: str, identity: str, device: torch.device) -> CLIP:
    """The CLIP of a file that has an open_clip config. Raises `LdmError` where it cannot be built, or does not fit."""
    assert file.description is not None
    path, config = file.source.path, file.description["model_cfg"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _built(config, path.parent)
            tokenizer = _tokenizer(config["text_cfg"], path.parent)
            size = model.visual.image_size
            colours = merge_preprocess_dict(PreprocessCfg(), {**file.description["preprocess_cfg"], "size": size})
            transform: Any = image_transform_v2(PreprocessCfg(**colours), is_train=False)
    except BROKEN as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise LdmError(f"{printable(str(path))}: open_clip cannot build its config: {printable(said)[:200]}") from None
    _fill(model, file)
    model.to(device=device).eval().requires_grad_(False)
    return CLIP(
        name=name,
        identity=identity,
        width=int(config["embed_dim"]),
        scale=float(model.logit_scale.exp()),
        bias=0.0 if model.logit_bias is None else float(model.logit_bias),
        english=_vocabulary(model, config) < MANY_LANGUAGES,
        embed_images=partial(_embed_images, model, transform, device),
        embed_texts=partial(_embed_texts, model, tokenizer, device),
    )


def _embed_images(
    model: Any, transform: Callable[[Image.Image], Tensor], device: torch.device, images: Sequence[Image.Image]
) -> Tensor:
    for image in images:
        check_shape(image)
    return model.encode_image(torch.stack([transform(image) for image in images]).to(device)).float().cpu()


def _embed_texts(model: Any, tokenizer: Tokenizer, device: torch.device, texts: Sequence[str]) -> Tensor:
    return model.encode_text(tokenizer(list(texts)).to(device)).float().cpu()


def _built(config: Mapping[str, Any], folder: Path) -> Any:
    """open_clip's model, with random weights in float32."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if vision.get("timm_model_name"):
        _refuse_address(vision["timm_model_name"], "vision_cfg.timm_model_name")
        vision["timm_model_pretrained"] = False
    options = {key: value for key, value in config.items() if key not in ("vision_cfg", "text_cfg", "custom_text")}
    with TemporaryDirectory() as plain:
        if text.get("hf_model_name"):
            _write_plain(_hugging_face_config(text["hf_model_name"], folder), Path(plain))
            text |= {"hf_model_name": plain, "hf_model_pretrained": False}
        custom = config.get("custom_text") or text.get("hf_model_name")
        kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        if "multimodal_cfg" in config:
            kind = open_clip.CoCa
        return kind(vision_cfg=vision, text_cfg=text, **options)


def _refuse_address(name: Any, field: str) -> None:
    """Raises ValueError for a timm model that lies elsewhere: on a server, or in a folder."""
    if not isinstance(name, str) or ":" in name or "/" in name:
        raise ValueError(f"{field} is {str(name)[:60]!r}, expected a model of timm")


def _hugging_face_config(name: Any, folder: Path) -> Path:
    """The config.json of transformers' text tower: beside the weights, in a folder of its name there, or downloaded
    before. Raises LdmError where it is nowhere."""
    if isinstance(name, str) and ".." not in name:
        for place in (folder / name, folder / name.rpartition("/")[2], folder):
            if (place / "config.json").is_file():
                return place / "config.json"
        from huggingface_hub import try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return Path(cached)
    raise LdmError(
        f"{printable(str(folder))}: its text tower is {printable(str(name))[:80]}, whose config.json is missing, and "
        "nothing is downloaded; put that model's config.json and tokenizer files into the folder"
    )


def _write_plain(path: Path, folder: Path) -> None:
    """A config of transformers as another file, with numbers and words alone: nothing in it that names code."""
    config = read_json(path)
    kind, known = str(config.get("model_type")), arch_dict
    if kind not in known:
        found = f"found the model_type {printable(kind)[:40]!r}, expected one of {', '.join(known)}"
        raise LdmError(f"{printable(str(path))}: {found}")
    plain = {
        key: value
        for key, value in config.items()
        if isinstance(value, int | float | str | None) and not key.startswith("_") and "attn_impl" not in key
    }
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")


def _tokenizer(text: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that a config asks for: CLIP's byte pairs, or the files of transformers' in the folder."""
    options, length = dict(text.get("tokenizer_kwargs") or {}), text.get("context_length", 77)
    named = text.get("hf_tokenizer_name")
    if unknown := options.keys() - (TOKENIZER_OPTIONS if named else SIMPLE_OPTIONS):
        raise ValueError(f"tokenizer_kwargs has {sorted(unknown)[0]!r}, which is not read")
    if not named:
        return SimpleTokenizer(context_length=length, **options)
    place = _tokenizer_folder(named, folder)
    mode = text.get("tokenizer_mode")
    return HFTokenizer(
        str(place),
        context_length=length,
        tokenizer_mode=mode,
        local_files_only=True,
        trust_remote_code=False,
        **options,
    )


TOKENIZER_FILES = ("tokenizer.json", "sentencepiece.bpe.model", "spiece.model", "vocab.txt")


def _tokenizer_folder(name: Any, folder: Path) -> Path:
    """Where the tokenizer's files lie, looked for as the text tower's config. Raises LdmError."""
    if isinstance(name, str) and ".." not in name:
        for place in (folder / name, folder / name.rpartition("/")[2], folder):
            if any((place / file).is_file() for file in TOKENIZER_FILES):
                return place
        from huggingface_hub import try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(name, TOKENIZER_FILES[0]), str):
            return Path(cached).parent
    raise LdmError(
        f"{printable(str(folder))}: its tokenizer is {printable(str(name))[:80]}, whose files are missing, and nothing "
        f"is downloaded; put its {TOKENIZER_FILES[0]} and tokenizer_config.json into the folder"
    )


def _fill(model: nn.Module, file: ClipFile) -> None:
    """Give the model the file's tensors, in float32. Raises LdmError where they are not those of this model."""
    read = file.source.read(file.source.tensors)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read}
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)  # files older than the class
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in wanted and state[name].numel() == wanted[name].numel():
            state[name] = state[name].reshape(wanted[name].shape)
    wrong = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": sorted(n for n in wanted.keys() & state.keys() if wanted[n].shape != state[n].shape),
    }
    if lists := [f"{len(names)} {kind}: {some(names, 4)}" for kind, names in wrong.items() if names]:
        raise LdmError(
            f"{printable(str(file.source.path))}: its tensors are not those of the model that its config describes; "
            + "; ".join(lists)
        )
    model.load_state_dict(state, strict=True, assign=True)


def _vocabulary(model: Any, config: Mapping[str, Any]) -> int:
    """Pieces that the text tower knows."""
    text = config["text_cfg"]
    return int(model.text.vocab_size if text.get("hf_model_name") else text.get("vocab_size", 49408))
