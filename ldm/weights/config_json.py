"""A `SystemConfig` as JSON and back: what makes the files that we write self-describing.

Reading is strict, since a file may come from anywhere: only known fields, only values of the declared type. No field
names code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldm.errors import LdmError
from ldm.models.presets import ImageUse, SystemConfig
from ldm.models.unet import UNetConfig

CONFIG_KEY = "ldm.config"
"""The metadata key that holds the JSON."""

NOT_WRITTEN = (
    "no checkpoint is written with a tiny autoencoder, which other programs do not look for in one; leave its --vae"
    " away here, and give it where pictures are drawn"
)
"""What is said where it is tried."""

Record = TypeVar("Record")


def config_to_json(config: SystemConfig) -> str:
    """One line of JSON with every field that goes into a file. Raises LdmError for a system that does not."""
    fields = asdict(config)
    if fields.pop("tiny_autoencoder") is not None:
        raise LdmError(NOT_WRITTEN)
    return json.dumps(fields)


def config_from_json(text: str) -> SystemConfig:
    """The inverse. Fields that are absent take their defaults. Raises LdmError that names the field."""
    return record_from_json(SystemConfig, text, CONFIG_KEY, check_config)


def record_from_json(kind: type[Record], text: str, key: str, check: Callable[[Record], None]) -> Record:
    """A frozen dataclass from the JSON under a metadata key. Raises LdmError that names the field.

    check: what types cannot say; it raises ValueError.
    """
    try:
        record = _record(kind, json.loads(text), key)
        check(record)
    except (ValueError, RecursionError) as error:
        raise LdmError(f"metadata {key} is broken: {error}; load the file with the version that wrote it") from None
    return record


def _record(kind: type[Record], value: Any, where: str) -> Record:
    """A JSON object -> a frozen dataclass. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    assert is_dataclass(kind)
    known = {field.name for field in fields(kind)}
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    except TypeError as error:  # a field without a default is absent
        raise ValueError(f"{where}: {error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """A JSON value -> a value of the annotated type: a record, tuple[X, ...], Literal, union or plain type."""
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _record(kind, value, where)
    origin, options = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(options[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal and value in options:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in options:
            return None
        return _value(next(option for option in options if option is not NoneType), value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    expected = f"one of {', '.join(map(repr, options))}" if origin is Literal else f"{kind}"
    raise ValueError(f"{where} is {str(value)[:40]!r}, expected {expected}")


def check_config(config: SystemConfig) -> None:
    """What types cannot say. Widths need no bounds here: they are compared with the tensors. Raises ValueError."""
    if not 64 <= config.size <= 8192:
        raise ValueError(f"size {config.size} is not in 64..8192")
    if not 0 <= config.sizes_in_vector <= 16:
        raise ValueError(f"sizes_in_vector {config.sizes_in_vector} is not in 0..16")
    if config.autoencoder.scale_factor <= 0:
        raise ValueError("autoencoder.scale_factor must be positive")
    if config.autoencoder.norm_groups < 1:
        raise ValueError("autoencoder.norm_groups must be positive")
    autoencoder = config.autoencoder
    if autoencoder.base_channels == 0 and autoencoder.latent_channels != 3 * autoencoder.downsampling**2:
        blocks = f"blocks of {autoencoder.downsampling} x {autoencoder.downsampling} pixels"
        raise ValueError(f"autoencoder.latent_channels is {autoencoder.latent_channels}, which {blocks} do not give")
    if not 0 <= config.unet.dropout < 1:
        raise ValueError("unet.dropout is not in [0, 1)")
    _check_heads(config.unet)
    if config.image is not None:
        _check_image_use(config, config.image)
    for image in (config.image and config.image.tower, config.clip_image):
        if image is None:
            continue
        if image.heads < 1 or image.width % image.heads:
            raise ValueError(f"{image.heads} heads do not divide an image tower's width of {image.width}")
        if image.patch < 1 or not image.patch <= image.size <= 8192:
            raise ValueError("an image tower's patch or size is out of range")
        if len(image.mean) != 3 or len(image.deviation) != 3 or min(image.deviation) <= 0:
            raise ValueError("an image tower's mean or deviation is not that of three colours")
    for use in config.text:
        tower = use.tower
        if tower.heads < 1 or tower.width % tower.heads:
            raise ValueError(f"{tower.heads} heads do not divide a text width of {tower.width}")
        if not 0 <= use.skip < tower.layers or not 0 <= use.padding < tower.vocabulary:
            raise ValueError("text skip or padding is out of range")


def _check_image_use(config: SystemConfig, image: ImageUse) -> None:
    """The U-Net must have room for the embedding behind what the text gives. Raises ValueError."""
    pooled = sum(use.tower.projection or use.tower.width for use in config.text if use.pooled)
    vector = pooled + 2 * image.tower.projection + 256 * config.sizes_in_vector
    if config.unet.vector_width != vector:
        raise ValueError(f"unet.vector_width is {config.unet.vector_width}, text and image give {vector}")
    if not 0 <= image.tokens <= 64 or (image.tokens and config.unet.context_width is None):
        raise ValueError(f"image.tokens is {image.tokens}, expected 0..64, and 0 where the U-Net takes no text")


def _check_heads(unet: UNetConfig) -> None:
    """Every level with attention must divide into heads. Raises ValueError."""
    for mult, depth in [
        *zip(unet.channel_mult, unet.attention, strict=True),
        (unet.channel_mult[-1], unet.middle_attention),
    ]:
        width = unet.model_channels * mult
        parts = unet.heads if unet.heads is not None else unet.head_width
        if depth and (parts is None or parts < 1 or width % parts):
            raise ValueError(f"attention heads do not divide a width of {width}")
