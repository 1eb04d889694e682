"""What a file is: its kind, its family, and the whole `SystemConfig`, from tensors and metadata alone.

A file that we wrote carries its config, which must agree with its tensors. Of any other file the sizes are read off the
shapes, and what shapes cannot tell follows from the family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ldm.errors import LdmError
from ldm.models import presets
from ldm.models.presets import ImageUse, SystemConfig, TextUse
from ldm.models.text_encoder import TextConfig
from ldm.models.tiny_autoencoder import TinyAutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.types import PredictionType
from ldm.weights.architecture import (
    Shapes,
    autoencoder_config,
    clip_config,
    image_config,
    is_tiny_autoencoder,
    open_clip_config,
    tiny_autoencoder_config,
    under,
    unet_config,
)
from ldm.weights.config_json import CONFIG_KEY, check_config, config_from_json
from ldm.weights.io import printable
from ldm.weights.layout import AUGMENTOR, FIRST_STAGE, IMAGE, UNET, image_prefix, text_prefix
from ldm.weights.prediction import Decision, decide
from ldm.weights.source import MADE_FOR, Source
from ldm.weights.tiny_autoencoder import LATENTS, check_latents

Config = TypeVar("Config")
Number = TypeVar("Number", int, float)

CHECKPOINT = "checkpoint"

KINDS: tuple[tuple[str, str], ...] = (
    ("LoRA or another adapter", r"\.(lora_(down|up|A|B|mid)|hada_w1_a|lokr_w[12](_a)?|oft_blocks|dora_scale)\b"),
    ("ControlNet", r"^(control_model|controlnet_cond_embedding|input_hint_block)\."),
    ("transformer model (SD 3, Flux or later)", r"^(model\.diffusion_model\.)?(joint|double|single)_blocks\."),
    ("diffusers U-Net", r"^(down_blocks|add_embedding|time_embedding)\."),
    ("diffusers autoencoder", r"^(encoder|decoder)\.(down|up)_blocks\."),
    ("U-Net alone", r"^input_blocks\.0\.0\.weight$"),
    ("autoencoder alone", r"^(encoder|decoder)\.conv_in\.weight$|^((en|de)coder\.)?[13]\.conv\.0\.weight$"),
    ("text encoder alone", r"^(text_model|transformer\.resblocks)\."),
    ("textual-inversion embedding", r"^(emb_params|emp_params|clip_[lg]|string_to_param(\..*)?|\*|<.*>)$"),
)
"""Kinds of files that are no whole checkpoint, each with a pattern that one of its tensors' names has."""

NOT_READ: tuple[tuple[str, str], ...] = (
    (r"^edm_(mean|std)$|^edm_vpred\.", "it was trained in EDM form, which is not read"),
)
"""Tensors of systems that would load and then yield noise."""

PARTS = ((UNET, "U-Net"), (FIRST_STAGE, "autoencoder"), (("cond_stage_model.", "conditioner."), "text encoder"))
"""The parts of a checkpoint, by prefix."""

ALONE = tuple(f"{what} alone" for _, what in PARTS)
"""The kinds of files that hold one part under its prefix."""

FLAGS = {"U-Net": "--unet", "autoencoder": "--vae", "text encoder": "--text-encoder"}
"""The option that gives a part from a file of its own."""

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


def detect(source: Source, prediction: PredictionType | None = None) -> Detection:
    """Find out what system a checkpoint holds; `prediction` overrides what the file says of it.

    Reads at most one small tensor. Raises LdmError where the file is no checkpoint, lacks a part, or is of a kind that
    is not read.
    """
    try:
        return _detect(source, prediction)
    except LdmError as error:
        raise LdmError(f"{printable(str(source.path))}: {error}") from None


def _detect(source: Source, prediction: PredictionType | None) -> Detection:
    kind = kind_of(source.tensors)
    if kind != CHECKPOINT and kind not in ALONE:
        raise LdmError(
            f"this is not a whole checkpoint but: {kind}; expected U-Net, autoencoder and text encoder in one file"
        )
    for pattern, why in NOT_READ:
        if any(re.search(pattern, name) for name in source.tensors):
            raise LdmError(f"{why}; load an SD 1.x, 2.x or SDXL checkpoint")
    expected = PARTS if CONFIG_KEY not in source.metadata else PARTS[:2]  # a system of ours may do without text
    missing = [what for prefix, what in expected if not any(name.startswith(prefix) for name in source.tensors)]
    if missing:
        flags = " ".join(f"{FLAGS[what]} FILE" for what in missing)
        raise LdmError(f"this is {kind}: without {' and '.join(missing)}; add from other files: {flags}")
    if CONFIG_KEY in source.metadata:
        config = _config_of_ours(source)
        rule, found = f"its own {CONFIG_KEY}", Decision(config.prediction, f"its own {CONFIG_KEY}")
    else:
        config, rule = _config_of_others(source)
        found = decide(source, config)
    chosen = found if prediction is None else Decision(prediction, f"the caller (the file says {found.prediction})")
    config = replace(config, prediction=chosen.prediction)
    if CONFIG_KEY not in source.metadata:
        config = replace(config, size=_native_size(source, config), zero_terminal_snr=_is_zero_terminal(source))
    return Detection(
        config=config,
        variant=_variant(config),
        family_rule=rule,
        prediction_rule=chosen.rule,
        notes=_notes(source, config),
        warnings=_warnings(source, config, found),
    )


def _config_of_ours(source: Source) -> SystemConfig:
    """The config in the metadata, once everything that shapes can tell agrees with it."""
    config = config_from_json(source.metadata[CONFIG_KEY])
    unet = _read(unet_config, source.shapes, UNET)
    told = config.unet
    unet = replace(unet, heads=told.heads, head_width=told.head_width, cross_only=told.cross_only, dropout=told.dropout)
    _agree("unet", told, unet)
    config, told = replace(config, tiny_autoencoder=_tiny(source.shapes, config)), config.autoencoder
    if config.tiny_autoencoder is None:
        autoencoder = _read(autoencoder_config, source.shapes, FIRST_STAGE)
        scaling = {"scale_factor": told.scale_factor, "shift_factor": told.shift_factor}
        _agree("autoencoder", told, replace(autoencoder, norm_groups=told.norm_groups, **scaling))
    for index, use in enumerate(config.text):
        told = use.tower
        tower = _tower(source.shapes, text_prefix(config, index), told)
        _agree(f"text[{index}].tower", told, replace(tower, heads=told.heads, activation=told.activation))
    if config.image is not None:
        told = config.image.tower
        image = _read(image_config, source.shapes, image_prefix(config))
        shown = {"mean": told.mean, "deviation": told.deviation, "resample": told.resample}
        _agree("image.tower", told, replace(image, heads=told.heads, activation=told.activation, **shown))
    return config


def _agree(where: str, told: Any, read: Any) -> None:
    """Raise LdmError that names the first field in which a config and the tensors differ."""
    for field in fields(told):
        said, found = getattr(told, field.name), getattr(read, field.name)
        if said != found:
            raise LdmError(f"metadata {CONFIG_KEY} says {where}.{field.name} is {said}, its tensors say {found}")


def _config_of_others(source: Source) -> tuple[SystemConfig, str]:
    """The config of an SD 1.x, 2.x or SDXL file, and the rule that decided its family."""
    shapes, facts = source.shapes, source.facts
    unet = _read(unet_config, shapes, UNET)
    if unet.context_width is None:
        raise LdmError("its U-Net takes no text, which only files of this package with their own config do")
    for mark, family in FAMILIES:
        if any(name.startswith(mark) for name in shapes):
            preset = presets.sd_x4_upscaler() if unet.classes is not None else family()
            break
    else:
        raise LdmError("its text encoder is of a kind that is not known; expected CLIP-L or OpenCLIP")
    preset = replace(preset, tiny_autoencoder=_tiny(shapes, preset))
    if preset.tiny_autoencoder is None:
        first_stage = _read(autoencoder_config, shapes, FIRST_STAGE)
        scale = _number(facts, "scale_factor", preset.autoencoder.scale_factor)
        preset = replace(preset, autoencoder=replace(first_stage, scale_factor=scale))
    text = tuple(
        _use(use, _tower(shapes, text_prefix(preset, index), use.tower), facts, f"text.{index}")
        for index, use in enumerate(preset.text)
    )
    config = replace(preset, unet=_with_heads(unet, facts), text=text, image=_image(shapes))
    _check_widths(config)
    try:
        check_config(config)
    except ValueError as error:
        raise LdmError(f"what its config files say does not fit its tensors: {error}") from None
    return config, f"text encoder under {mark[:-1]}"


def _tiny(shapes: Shapes, config: SystemConfig) -> TinyAutoencoderConfig | None:
    """The tiny autoencoder that a file has in place of a system's own, whose latents it must be for."""
    if not is_tiny_autoencoder(under(shapes, FIRST_STAGE)):
        return None
    tiny = _read(tiny_autoencoder_config, shapes, FIRST_STAGE)
    check_latents(tiny, config)
    return tiny


def _tower(shapes: Shapes, prefix: str, expected: TextConfig) -> TextConfig:
    """The tower under this prefix, in the names that are expected of it."""
    return _read(open_clip_config if expected.names == "open_clip" else clip_config, shapes, prefix)


def _use(use: TextUse, tower: TextConfig, facts: Mapping[str, str], where: str) -> TextUse:
    """A text tower in its use, with what its config file says of it."""
    if use.pooled and tower.projection is None:
        raise LdmError(f"tensor text_projection is missing (of text encoder {where[-1]})")
    tower = replace(
        tower,
        heads=_number(facts, f"{where}.heads", tower.heads),
        activation="gelu" if facts.get(f"{where}.activation", tower.activation) == "gelu" else "quick_gelu",
    )
    return replace(use, tower=tower, skip=min(_number(facts, f"{where}.skip", use.skip), tower.layers - 1))


def _image(shapes: Shapes) -> ImageUse | None:
    """The image tower of an unCLIP file, whose statistics some lack."""
    if not any(name.startswith(IMAGE) for name in shapes):
        return None
    return ImageUse(_read(image_config, shapes, IMAGE), statistics=f"{AUGMENTOR}data_mean" in shapes)


def _with_heads(unet: UNetConfig, facts: Mapping[str, str]) -> UNetConfig:
    """The U-Net with the heads that its config file names."""
    if "heads" in facts:
        return replace(unet, heads=_number(facts, "heads", 1), head_width=None)
    if "head_width" in facts:
        return replace(unet, heads=None, head_width=_number(facts, "head_width", 1))
    return unet


def _number(facts: Mapping[str, str], key: str, default: Number) -> Number:
    """A fact as a number of the default's type. Raises LdmError where it is none, or not above zero but for `skip`."""
    try:
        value = float(facts.get(key, default))
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (value == 0 and key.endswith("skip"))) or type(default)(value) != value:
        raise LdmError(f"its config files say {key} is {printable(facts[key])[:40]!r}, expected a number above zero")
    return type(default)(value)


def _read(read: Callable[[Shapes], Config], shapes: Shapes, prefix: str) -> Config:
    """A network's config; an error says where the network lies."""
    try:
        return read(under(shapes, prefix))
    except LdmError as error:
        raise LdmError(f"{error} (under {prefix})") from None


def _check_widths(config: SystemConfig) -> None:
    """The U-Net must be made for these towers."""
    width = sum(use.tower.width for use in config.text)
    if config.unet.context_width != width:
        raise LdmError(
            f"its U-Net expects text {config.unet.context_width} wide, its text encoder gives {width}: two families"
        )
    pooled = [use.tower.projection or use.tower.width for use in config.text if use.pooled]
    vector = sum(pooled) + 256 * config.sizes_in_vector
    if config.image is not None:
        vector += 2 * config.image.tower.projection
    found = config.unet.vector_width or 0
    if found != vector:
        raise LdmError(f"its U-Net expects {found} numbers beside the text, {config.family} gives {vector}")


def _is_zero_terminal(source: Source) -> bool:
    """Whether the last timestep is to be pure noise, by a marker tensor, kohya's metadata or diffusers' config."""
    said = (source.metadata.get("ss_zero_terminal_snr", ""), source.facts.get("zero_terminal_snr", ""))
    return "ztsnr" in source.tensors or "true" in map(str.lower, said)


def _native_size(source: Source, config: SystemConfig) -> int:
    """The side in pixels that ModelSpec or a config file names, else the family's."""
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", source.metadata.get("modelspec.resolution", ""))
    if match and match[1] == match[2] and 64 <= int(match[1]) <= 8192:
        return int(match[1])
    if "size" in source.facts and 64 <= _number(source.facts, "size", 1) <= 8192:
        return _number(source.facts, "size", 1)
    if config.family == "sd2" and config.unet.classes is None:
        return presets.sd2(config.prediction).size
    return config.size


def _variant(config: SystemConfig) -> str:
    """What the U-Net's channels beyond the latent's are for."""
    extra = config.unet.in_channels - config.autoencoder.latent_channels
    if config.unet.classes is not None and extra == 3:
        return f"x{config.autoencoder.downsampling} upscaler"
    if config.image is not None:
        return "unCLIP (varies a picture)"
    if config.unet.context_width is None:
        return "without text"
    names = {0: "text to image", 1: "depth to image", 4: "instruct (picture to picture)", 5: "inpainting"}
    return names.get(extra, f"{extra} extra input channels")


def _notes(source: Source, config: SystemConfig) -> tuple[str, ...]:
    notes = []
    if any(name.startswith("model_ema.") for name in source.tensors):
        notes.append("EMA weights present: using the ordinary ones")
    if CONFIG_KEY not in source.metadata and not _published_heads(config.unet):
        notes.append("the number of attention heads is a guess: no published model has these widths")
    if (tiny := config.tiny_autoencoder) is not None:
        whose = source.facts.get(MADE_FOR, "SD or SDXL, no tensor or name tells which")
        notes.append(f"tiny autoencoder: with{'' if tiny.encoder else 'out'} an encoder, made for {whose}")
    return tuple(notes)


def _published_heads(unet: UNetConfig) -> bool:
    return unet.heads == 8 or unet.head_width == 64


def _warnings(source: Source, config: SystemConfig, found: Decision) -> tuple[str, ...]:
    warnings = []
    if config.prediction != found.prediction:
        said = f"the file says {found.prediction} ({found.rule})"
        warnings.append(f"{config.prediction}-prediction was asked for, but {said}")
    latents = LATENTS[config.family]
    if config.tiny_autoencoder is not None and source.facts.get(MADE_FOR, latents) != latents:
        whose = source.facts[MADE_FOR]
        warnings.append(f"the tiny autoencoder is made for {whose} by its name, these latents are {latents}")
    return tuple(warnings)
