"""Files of tiny autoencoders: whether they are whole, the encoder beside a decoder, and whose latents they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ldm.errors import LdmError
from ldm.models.presets import Family, SystemConfig
from ldm.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ldm.weights.architecture import is_tiny_autoencoder, tiny_autoencoder_config, under
from ldm.weights.io import printable
from ldm.weights.layout import FIRST_STAGE, compare_networks, unfilled
from ldm.weights.source import MADE_FOR, Source, open_source, renamed_source, with_tensors

SD, SDXL = "SD 1.x and 2.x", "SDXL"

LATENTS: Mapping[Family, str] = {"sd1": SD, "sd2": SD, "sdxl": SDXL, "sdxl-refiner": SDXL, "ldm": "this package's own"}
"""Whose latents a family has, in words."""

ENCODER = f"{FIRST_STAGE}encoder."


def whole_tiny(part: Source, *, allow_pickle: bool = False) -> Source:
    """A tiny autoencoder with its encoder where that has a file of its own, and with the fact whose latents it is for.

    Of another autoencoder the same source. Raises LdmError that names the file where tensors are missing, too many or
    of another shape.
    """
    if not is_tiny_autoencoder(under(part.shapes, FIRST_STAGE)):
        return part
    if (beside := encoder_beside(part)) is not None:
        other = open_source(beside, allow_pickle=allow_pickle)
        names = (name for name in other.tensors if name.startswith(ENCODER))
        part = with_tensors(part, renamed_source(other, {name: name for name in names}))
    try:
        config = tiny_autoencoder_config(under(part.shapes, FIRST_STAGE))
    except LdmError as error:
        raise LdmError(f"{printable(str(part.path))}: {error}") from None
    fit = compare_networks(part.tensors, {FIRST_STAGE: unfilled(lambda: TinyAutoencoder(config))})
    if not fit.fits:
        wrong = [f"{name} is missing" for name in fit.missing] + list(fit.misshapen)
        wrong += [f"{name} has no place in it" for name in fit.unexpected]
        first = printable(wrong[0].removeprefix(FIRST_STAGE))
        raise LdmError(
            f"{printable(str(part.path))}: {len(wrong)} tensors do not fit a tiny autoencoder, the first: {first}"
        )
    return replace(part, facts={MADE_FOR: whose} if (whose := whose_latents(part)) else {})


def check_latents(tiny: TinyAutoencoderConfig, system: SystemConfig) -> None:
    """Raise LdmError where a tiny autoencoder is for latents of another shape than a system has."""
    both = (tiny, system.autoencoder)
    found, expected = (f"{c.latent_channels} channels at 1/{c.downsampling} of the size" for c in both)
    if found != expected:
        raise LdmError(f"the tiny autoencoder is for latents with {found}, those of {system.family} have {expected}")


def encoder_beside(part: Source) -> Path | None:
    """The encoder's file, where this is the decoder's of the pair that TAESD is published as and the other is there."""
    beside = part.path.with_name(part.path.name.replace("decoder", "encoder"))
    alone = not any(name.startswith(ENCODER) for name in part.tensors)
    return beside if alone and beside != part.path and beside.is_file() else None


def whose_latents(part: Source) -> str | None:
    """Whose latents a tiny autoencoder is for, as far as metadata or a name says, in the words of `LATENTS`.

    No tensor tells. A folder's name counts where the file's says nothing, as diffusers' does.
    """
    architecture = part.metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-"):
        return SDXL if "xl" in architecture else SD
    for name in reversed(part.path.parts):
        if match := re.search(r"taesd(xl)?(?![a-z\d])", name.lower()):
            return SDXL if match[1] else SD
    return None
