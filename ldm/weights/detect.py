"""What a file is: its kind, its family, and the whole `SystemConfig`, from tensors and metadata alone.

A file that we wrote carries its config, which must agree with its tensors. Of any other file the sizes are read off the
shapes, and what shapes cannot tell follows from the family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ldm.errors import LdmError
from ldm.models import presets
from ldm.models.presets import PredictionType, SystemConfig
from ldm.models.text_encoder import TextConfig
from ldm.models.unet import UNetConfig
from ldm.weights.architecture import Shapes, autoencoder_config, clip_config, open_clip_config, under, unet_config
from ldm.weights.config_json import CONFIG_KEY, config_from_json
from ldm.weights.io import Header, printable
from ldm.weights.layout import FIRST_STAGE, UNET, text_prefix
from ldm.weights.prediction import Decision, decide

Config = TypeVar("Config")

CHECKPOINT = "checkpoint"

KINDS: tuple[tuple[str, str], ...] = (
    ("LoRA or another adapter", r"\.(lora_(down|up|A|B|mid)|hada_w1_a|lokr_w[12](_a)?|oft_blocks|dora_scale)\b"),
    ("ControlNet", r"^(control_model|controlnet_cond_embedding|input_hint_block)\."),
    ("transformer model (SD 3, Flux or later)", r"^(model\.diffusion_model\.)?(joint|double|single)_blocks\."),
    ("diffusers U-Net", r"^(down_blocks|add_embedding|time_embedding)\."),
    ("diffusers autoencoder", r"^(encoder|decoder)\.(down|up)_blocks\."),
    ("U-Net alone", r"^input_blocks\.0\.0\.weight$"),
    ("autoencoder alone", r"^(encoder|decoder)\.conv_in\.weight$"),
    ("text encoder alone", r"^(text_model|transformer\.resblocks)\."),
    ("textual-inversion embedding", r"^(emb_params|emp_params|clip_[lg]|string_to_param\..*|<.*>)$"),
)
"""Kinds of files that are no whole checkpoint, each with a pattern that one of its tensors' names has."""

NOT_READ: tuple[tuple[str, str], ...] = (
    (r"^edm_(mean|std)$|^edm_vpred\.", "it was trained in EDM form, which is not read"),
    (r"^noise_augmentor\.|^embedder\.model\.visual\.", "it is an unCLIP model, which is not read yet"),
)
"""Tensors of systems that would load and then yield noise."""

PARTS = ((UNET, "U-Net"), (FIRST_STAGE, "autoencoder"), (("cond_stage_model.", "conditioner."), "text encoder"))
"""The parts of a checkpoint, by prefix."""

FAMILIES: tuple[tuple[str, Callable[[], SystemConfig]], ...] = (
    ("conditioner.embedders.1.model.", presets.sdxl),
    ("conditioner.embedders.0.model.", presets.sdxl_refiner),
    ("cond_stage_model.model.", presets.sd2),
    ("cond_stage_model.transformer.", presets.sd1),
)
"""The published families, each known by where its largest text encoder lies; the first that fits."""


@dataclass(frozen=True)
class Detection:
    """What was found out about a checkpoint, and how.

    variant: what the U-Net's input channels are for; family_rule, prediction_rule: what decided;
    notes: what a user who asks may want to know; warnings: what every user should.
    """

    config: SystemConfig
    variant: str
    family_rule: str
    prediction_rule: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def kind_of(names: Iterable[str]) -> str:
    """`CHECKPOINT` where U-Net, autoencoder and text tower may be there, else what kind of file it looks like."""
    names = list(names)
    for kind, pattern in KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    holds = [what for prefix, what in PARTS if any(name.startswith(prefix) for name in names)]
    if not holds:
        return "unknown"
    return CHECKPOINT if len(holds) > 1 else f"{holds[0]} alone"


def detect(header: Header, prediction: PredictionType | None = None) -> Detection:
    """Find out what system a checkpoint holds; `prediction` overrides what the file says of it.

    Reads the header and at most one small tensor. Raises LdmError where the file is no checkpoint, lacks a part, or is
    of a kind that is not read.
    """
    try:
        return _detect(header, prediction)
    except LdmError as error:
        raise LdmError(f"{printable(str(header.path))}: {error}") from None


def _detect(header: Header, prediction: PredictionType | None) -> Detection:
    kind = kind_of(header.tensors)
    if kind != CHECKPOINT:
        raise LdmError(
            f"this is not a whole checkpoint but: {kind}; expected U-Net, autoencoder and text encoder in one file"
        )
    for pattern, why in NOT_READ:
        if any(re.search(pattern, name) for name in header.tensors):
            raise LdmError(f"{why}; load an SD 1.x, 2.x or SDXL checkpoint")
    for prefix, what in PARTS[:2]:
        if not any(name.startswith(prefix) for name in header.tensors):
            raise LdmError(f"the {what} is missing; expected U-Net, autoencoder and text encoder in one file")
    if CONFIG_KEY in header.metadata:
        config = _config_of_ours(header)
        rule, found = f"its own {CONFIG_KEY}", Decision(config.prediction, f"its own {CONFIG_KEY}")
    else:
        config, rule = _config_of_others(header.shapes)
        found = decide(header, config)
    chosen = found if prediction is None else Decision(prediction, f"the caller (the file says {found.prediction})")
    config = replace(config, prediction=chosen.prediction)
    if CONFIG_KEY not in header.metadata:
        terminal = "ztsnr" in header.tensors or header.metadata.get("ss_zero_terminal_snr") == "True"
        config = replace(config, size=_native_size(header.metadata, config), zero_terminal_snr=terminal)
    return Detection(
        config=config,
        variant=_variant(config),
        family_rule=rule,
        prediction_rule=chosen.rule,
        notes=_notes(header, config),
        warnings=_warnings(chosen, found),
    )


def _config_of_ours(header: Header) -> SystemConfig:
    """The config in the metadata, once everything that shapes can tell agrees with it."""
    config = config_from_json(header.metadata[CONFIG_KEY])
    unet = _read(unet_config, header.shapes, UNET)
    told = config.unet
    unet = replace(unet, heads=told.heads, head_width=told.head_width, cross_only=told.cross_only, dropout=told.dropout)
    _agree("unet", told, unet)
    told = config.autoencoder
    autoencoder = _read(autoencoder_config, header.shapes, FIRST_STAGE)
    scaling = {"scale_factor": told.scale_factor, "shift_factor": told.shift_factor}
    _agree("autoencoder", told, replace(autoencoder, norm_groups=told.norm_groups, **scaling))
    for index, use in enumerate(config.text):
        told = use.tower
        tower = _tower(header.shapes, text_prefix(config, index), told)
        if told.names == "open_clip" and told.projection is None:  # a square projection is still on disk
            told = replace(told, projection=told.width)
        _agree(f"text[{index}].tower", told, replace(tower, heads=told.heads, activation=told.activation))
    return config


def _agree(where: str, told: Any, read: Any) -> None:
    """Raise LdmError that names the first field in which a config and the tensors differ."""
    for field in fields(told):
        said, found = getattr(told, field.name), getattr(read, field.name)
        if said != found:
            raise LdmError(f"metadata {CONFIG_KEY} says {where}.{field.name} is {said}, its tensors say {found}")


def _config_of_others(shapes: Shapes) -> tuple[SystemConfig, str]:
    """The config of an SD 1.x, 2.x or SDXL file, and the rule that decided its family."""
    unet = _read(unet_config, shapes, UNET)
    if unet.context_width is None:
        raise LdmError("its U-Net takes no text, which only files of this package with their own config do")
    for mark, family in FAMILIES:
        if any(name.startswith(mark) for name in shapes):
            preset = presets.sd_x4_upscaler() if unet.classes is not None else family()
            break
    else:
        raise LdmError("its text encoder is of a kind that is not known; expected CLIP-L or OpenCLIP")
    first_stage = _read(autoencoder_config, shapes, FIRST_STAGE)
    first_stage = replace(first_stage, scale_factor=preset.autoencoder.scale_factor)
    towers = [_tower(shapes, text_prefix(preset, index), use.tower) for index, use in enumerate(preset.text)]
    text = tuple(replace(use, tower=tower) for use, tower in zip(preset.text, towers, strict=True))
    config = replace(preset, unet=unet, autoencoder=first_stage, text=text)
    _check_widths(config)
    return config, f"text encoder under {mark[:-1]}"


def _tower(shapes: Shapes, prefix: str, expected: TextConfig) -> TextConfig:
    """The tower under this prefix, in the names that are expected of it."""
    return _read(open_clip_config if expected.names == "open_clip" else clip_config, shapes, prefix)


def _read(read: Callable[[Shapes], Config], shapes: Shapes, prefix: str) -> Config:
    """A network's config; an error says where the network lies."""
    try:
        return read(under(shapes, prefix))
    except LdmError as error:
        raise LdmError(f"{error} (under {prefix})") from None


def _check_widths(config: SystemConfig) -> None:
    """The U-Net must be made for these text towers."""
    width = sum(use.tower.width for use in config.text)
    if config.unet.context_width != width:
        raise LdmError(
            f"its U-Net expects text {config.unet.context_width} wide, its text encoder gives {width}: two families"
        )
    pooled = [use.tower.projection or use.tower.width for use in config.text if use.pooled]
    vector = sum(pooled) + 256 * config.sizes_in_vector
    found = config.unet.vector_width or 0
    if found != vector:
        raise LdmError(f"its U-Net expects {found} numbers beside the text, {config.family} gives {vector}")


def _native_size(metadata: Mapping[str, str], config: SystemConfig) -> int:
    """The side in pixels that ModelSpec names, else the family's."""
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", ""))
    if match and match[1] == match[2] and 64 <= int(match[1]) <= 8192:
        return int(match[1])
    if config.family == "sd2" and config.unet.classes is None:
        return presets.sd2(config.prediction).size
    return config.size


def _variant(config: SystemConfig) -> str:
    """What the U-Net's channels beyond the latent's are for."""
    extra = config.unet.in_channels - config.autoencoder.latent_channels
    if config.unet.classes is not None and extra == 3:
        return "x4 upscaler"
    if config.unet.context_width is None:
        return "without text"
    names = {0: "text to image", 1: "depth to image", 4: "instruct (picture to picture)", 5: "inpainting"}
    return names.get(extra, f"{extra} extra input channels")


def _notes(header: Header, config: SystemConfig) -> tuple[str, ...]:
    notes = []
    if any(name.startswith("model_ema.") for name in header.tensors):
        notes.append("EMA weights present: using the ordinary ones")
    if CONFIG_KEY not in header.metadata and not _published_heads(config.unet):
        notes.append("the number of attention heads is a guess: no published model has these widths")
    return tuple(notes)


def _published_heads(unet: UNetConfig) -> bool:
    return unet.heads == 8 or unet.head_width == 64


def _warnings(chosen: Decision, found: Decision) -> tuple[str, ...]:
    if chosen.prediction == found.prediction:
        return ()
    return (f"{chosen.prediction}-prediction was asked for, but the file says {found.prediction} ({found.rule})",)
