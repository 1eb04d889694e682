"""What CLIP's towers are like: told by an open_clip or transformers config, or read off the tensors.

The standard towers are those of Radford et al. 2021 as vision transformers: a causal text tower over CLIP's byte pairs,
and patches with one token before them. All else (SigLIP, ConvNeXt, ResNets, text towers of transformers) is not
standard, and `standard_towers` says so by None.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.models.image_encoder import CLIP_DEVIATION, CLIP_MEAN, ImageConfig
from ldm.models.text_encoder import TextConfig
from ldm.weights.architecture import Shapes, image_config, open_clip_config, under
from ldm.weights.io import printable
from ldm.weights.source import read_json

Description = Mapping[str, Any]
"""An open_clip_config.json: `model_cfg`, and perhaps `preprocess_cfg`."""

VOCABULARY = 49408
"""Of CLIP's byte pairs."""

LARGEST = 2**20
"""No number in a config is larger: it would be refused only after building something huge."""

VISION = {
    "head_width": 64, "mlp_ratio": 4, "patch_dropout": 0, "attentional_pool": False, "no_ln_pre": False,
    "pos_embed_type": "learnable", "final_ln_after_pool": False, "pool_type": "tok", "output_tokens": False,
}  # fmt: skip
TEXT = {
    "mlp_ratio": 4, "embed_cls": False, "pad_id": 0, "eos_id": 2, "no_causal_mask": False, "pool_type": "argmax",
    "final_ln_after_pool": False, "proj_bias": False, "proj_type": "linear", "output_tokens": False,
}  # fmt: skip
MODEL = {"quick_gelu": False, "custom_text": False, "nonscalar_logit_scale": False}
PREPROCESS = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
"""open_clip's fields with the values that the standard towers have, beside their sizes. A few have a choice there."""

FREE = {"head_width", "patch_dropout", "eos_id", "quick_gelu", "nonscalar_logit_scale", "fill_color"}
"""Those in which a standard tower may differ, or of which it makes no use."""

VISION_SIZES = ("image_size", "layers", "width", "patch_size")
TEXT_SIZES = ("context_length", "vocab_size", "width", "heads", "layers")


@dataclass(frozen=True)
class Towers:
    """The two standard towers."""

    text: TextConfig
    image: ImageConfig


def named_description(name: str) -> Description:
    """open_clip's own config of that name (ViT-B-32, RN50 ...), or a JSON file. Raises LdmError where there is none."""
    if name.endswith(".json"):
        return checked(read_json(Path(name)), name)
    spec = importlib.util.find_spec("open_clip")  # its configs lie beside it: importing it takes seconds
    if spec is None or spec.origin is None:
        raise LdmError(f"config {printable(name)}: open_clip is not installed; pip install open_clip_torch")
    configs = {path.stem: path for path in Path(spec.origin).with_name("model_configs").glob("*.json")}
    if name not in configs:
        close = get_close_matches(name, configs, 3) or ["ViT-B-32", "ViT-L-14", "ViT-H-14"]
        raise LdmError(f"config {printable(name)}: open_clip has none of that name; perhaps {', '.join(close)}")
    return checked({"model_cfg": read_json(configs[name])}, name)


def checked(description: Mapping[str, Any], where: str) -> Description:
    """The description, with a bare model config wrapped. Raises LdmError where that is none of open_clip's."""
    model = description.get("model_cfg", description)
    try:
        if not all(isinstance(model[part], dict) for part in ("vision_cfg", "text_cfg")):
            raise TypeError("vision_cfg and text_cfg must be objects")
        preprocess = description.get("preprocess_cfg") or {}
        if not isinstance(preprocess, dict):
            raise TypeError("preprocess_cfg must be an object")
        _check_numbers([model, preprocess])
        if not isinstance(model["embed_dim"], int):
            raise TypeError("embed_dim must be a number")
    except KeyError as error:
        raise LdmError(f"{printable(where)}: has no {error}; expected an open_clip_config.json") from None
    except (TypeError, ValueError) as error:
        raise LdmError(f"{printable(where)}: {printable(str(error))}; expected an open_clip_config.json") from None
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _check_numbers(value: Any) -> None:
    """Raises ValueError for a number that no network has."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(item)
    if isinstance(value, dict) and isinstance(layers := value.get("layers"), int) and not 0 < layers <= 1000:
        raise ValueError(f"found {layers} layers")
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= LARGEST):
        raise ValueError(f"found the number {value}")


def standard_towers(description: Description) -> Towers | None:
    """Our two towers where open_clip's config is of such, else None."""
    model, preprocess = description["model_cfg"], description["preprocess_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    sizes = {"embed_dim", "vision_cfg", "text_cfg", "init_logit_scale", "init_logit_bias"}
    if not (
        _usual(model, MODEL, sizes)
        and _usual(vision, VISION, set(VISION_SIZES))
        and _usual(text, TEXT, set(TEXT_SIZES))
        and _usual(preprocess, PREPROCESS, {"size", "mean", "std"})
        and all(isinstance(vision.get(key, 1), int) for key in (*VISION_SIZES, "head_width"))
        and text.get("vocab_size", VOCABULARY) == VOCABULARY
    ):
        return None
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, text_width = vision.get("width", 768), text.get("width", 512)
    mean, deviation = preprocess.get("mean") or CLIP_MEAN, preprocess.get("std") or CLIP_DEVIATION
    return Towers(
        TextConfig(
            width=text_width, layers=text.get("layers", 12), heads=text.get("heads", 8), projection=model["embed_dim"],
            names="open_clip", activation=activation, tokens=text.get("context_length", 77),
        ),
        ImageConfig(
            width=width, layers=vision.get("layers", 12), heads=width // max(1, vision.get("head_width", 64)),
            projection=model["embed_dim"], patch=vision.get("patch_size", 16), size=vision.get("image_size", 224),
            activation=activation, mean=_colours(mean), deviation=_colours(deviation),
        ),
    )  # fmt: skip


def _usual(config: Mapping[str, Any], values: Mapping[str, Any], sizes: set[str]) -> bool:
    """Whether a config has nothing that our towers could not do: an absent field and null mean what is usual."""
    return all(
        value is None or key in sizes or key in FREE or (key in values and values[key] == value)
        for key, value in config.items()
    )


def _colours(values: Any) -> tuple[float, ...]:
    """A number for each colour, or one for all three."""
    return tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),) * 3


def inferred_towers(shapes: Shapes) -> Towers | None:
    """Our two towers read off the shapes of open_clip's names; None where these are not those of standard towers.

    Heads are 64 wide, as in all of OpenAI's and in open_clip's up to ViT-L; an image tower wider than 1024 has 16
    (ViT-H, ViT-g, ViT-bigG). Nothing tells the activation: gelu; colours are brought to CLIP's mean and deviation.
    """
    try:
        text, image = open_clip_config(shapes), image_config(under(shapes, "visual."))
    except LdmError:
        return None
    if text.vocabulary != VOCABULARY or text.projection is None:
        return None
    heads = 16 if image.width > 1024 else max(1, image.width // 64)
    return Towers(text, replace(image, heads=heads, activation="gelu"))


def hugging_face_towers(shapes: Shapes, config: Mapping[str, Any], preprocess: Mapping[str, Any]) -> Towers | None:
    """Our two towers of transformers' CLIPModel, by its config.json and preprocessor_config.json.

    Where these are silent heads are as in `inferred_towers`, and the activation is transformers' default, quick_gelu.
    None where an activation is neither, or pictures are not brought to size as CLIP's are.
    """
    towers = inferred_towers(shapes)
    usual = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if towers is None or any(preprocess.get(key, True) is not True for key in usual):
        return None
    told_text, told_image = _part(config, "text_config"), _part(config, "vision_config")
    names = {told.get("hidden_act", "quick_gelu") for told in (told_text, told_image)}
    if preprocess.get("resample", 3) != 3 or len(names) != 1 or not names <= {"gelu", "quick_gelu"}:
        return None
    activation = names.pop()
    mean, deviation = preprocess.get("image_mean") or CLIP_MEAN, preprocess.get("image_std") or CLIP_DEVIATION
    return Towers(
        replace(towers.text, activation=activation, heads=_heads(told_text, towers.text)),
        replace(
            towers.image, activation=activation, mean=_colours(mean), deviation=_colours(deviation),
            heads=_heads(told_image, towers.image),
        ),
    )  # fmt: skip


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _heads(told: Mapping[str, Any], tower: TextConfig | ImageConfig) -> int:
    heads = told.get("num_attention_heads")
    return heads if isinstance(heads, int) else tower.heads


def check_towers(towers: Towers, where: str) -> None:
    """Raise LdmError for sizes with which nothing can be built."""
    text, image = towers.text, towers.image
    for kind, tower in (("text", text), ("image", image)):
        if tower.heads < 1 or tower.width < 1 or tower.width % tower.heads:
            raise LdmError(
                f"{printable(where)}: {tower.heads} heads do not divide a {kind} tower's width {tower.width}"
            )
    if not 1 <= image.patch <= image.size:
        raise LdmError(f"{printable(where)}: patches of {image.patch} do not fit pictures of {image.size}")
    if len(image.mean) != 3 or len(image.deviation) != 3 or min(image.deviation) <= 0:
        raise LdmError(f"{printable(where)}: its mean or deviation is not that of three colours")
