"""What each kind of file tells of itself: its family, the base that it works with, and how well its tensors fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch

from ldm.errors import LdmError
from ldm.models import presets
from ldm.models.controlnet import ControlNet
from ldm.models.presets import TEXT_WIDTHS, SystemConfig
from ldm.models.tiny_autoencoder import TinyAutoencoder
from ldm.weights.architecture import (
    autoencoder_config,
    clip_config,
    is_tiny_autoencoder,
    open_clip_config,
    tiny_autoencoder_config,
    under,
    unet_config,
)
from ldm.weights.config_json import CONFIG_KEY
from ldm.weights.controlnet import DIFFERENCE, control_config, control_source, made_for
from ldm.weights.detect import CHECKPOINT, FAMILIES, Detection, detect
from ldm.weights.doctor.adapter import adapter_facts
from ldm.weights.doctor.kinds import ADAPTER, CONTROLNET, EMBEDDING, PART, TINY
from ldm.weights.doctor.report import EmbeddingFacts, Finding, System
from ldm.weights.embeddings import read_embeddings
from ldm.weights.io import printable
from ldm.weights.layout import (
    CLIP,
    FIRST_STAGE,
    TEXT,
    UNET,
    Comparison,
    Networks,
    build,
    compare,
    compare_networks,
    unfilled,
)
from ldm.weights.part import REST_KEY, REST_NAME, own_networks
from ldm.weights.source import Source
from ldm.weights.tiny_autoencoder import ENCODER, encoder_beside, whose_latents

WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner", 192: "ldm"}
"""Width of the text that cross-attention reads -> family."""
FAMILY_IDS = {TEXT_WIDTHS[width]: family for width, family in WIDTHS.items()}

TOWERS = {768: "CLIP-L (SD 1.x, and the first of SDXL)", 1024: "OpenCLIP ViT-H (SD 2.x)",
          1280: "OpenCLIP bigG (SDXL's second, the refiner's only)"}  # fmt: skip

CHANNELS = {4: "text to image", 5: "depth to image", 7: "x4 upscaler", 8: "picture to picture", 9: "inpainting"}
"""Input channels of a published U-Net -> what they are for."""


def find_out(source: Source, kind: str, *, whole: bool = True) -> Finding:
    """What a file of this kind tells. whole: whether its numbers are there, a few of which some kinds look at.

    Never raises: what is wrong is the finding's `problem`.
    """
    try:
        if kind == CHECKPOINT:
            return _checkpoint(source)
        if kind == PART:
            return _part(source)
        if kind == ADAPTER:
            return _adapter(source, whole=whole)
        if kind == EMBEDDING:
            return _embedding(source) if whole else Finding()
        if kind == CONTROLNET:
            return _controlnet(source)
        for start, look in (("U-Net", _unet), ("autoencoder", _autoencoder), ("text encoder", _text_encoder)):
            if kind.startswith(start):
                return look(source)
    except LdmError as error:
        return Finding(problem=str(error).removeprefix(f"{printable(str(source.path))}: "))
    return Finding()


def family_of_pickle(keys: Iterable[str]) -> str | None:
    """The family by the names of tensors alone."""
    keys = list(keys)
    return next((family().family for mark, family in FAMILIES if any(key.startswith(mark) for key in keys)), None)


def _checkpoint(source: Source) -> Finding:
    try:
        detection = detect(source)
    except LdmError as error:
        said = str(error).removeprefix(f"{printable(str(source.path))}: ")
        return Finding(family=family_of_pickle(source.tensors), problem=said)
    fit = compare(source.tensors, _networks(detection.config))
    return Finding(
        family=detection.config.family,
        variant=detection.variant,
        system=_system(detection),
        fit=fit,
        problem=_misfit(fit),
    )


def _part(source: Source) -> Finding:
    fit = compare_networks(source.tensors, own_networks(source))
    base = f"the autoencoder and CLIP of the {REST_NAME} beside it, if their hash is {source.metadata[REST_KEY][:10]}"
    return Finding(family="ldm", base=base, variant="varies a picture", fit=fit, problem=_misfit(fit))


def _system(detection: Detection) -> System:
    config = detection.config
    return System(
        family=config.family,
        family_rule=detection.family_rule,
        variant=detection.variant,
        prediction=config.prediction,
        prediction_rule=detection.prediction_rule,
        zero_terminal_snr=config.zero_terminal_snr,
        resolution=config.size,
        notes=detection.notes,
        warnings=detection.warnings,
    )


def _unet(source: Source) -> Finding:
    unet = unet_config(under(source.shapes, UNET))
    family = WIDTHS.get(unet.context_width or 0)
    fit = _fit(source, replace(presets.sd1(), unet=unet), UNET)
    variant = CHANNELS.get(unet.in_channels, f"{unet.in_channels} input channels")
    base = f"the autoencoder and text encoder of {made_for(unet)}"
    return Finding(family=family, base=base, variant=variant, fit=fit, problem=_misfit(fit))


def _autoencoder(source: Source) -> Finding:
    if is_tiny_autoencoder(under(source.shapes, FIRST_STAGE)):
        return _tiny_autoencoder(source)
    config = autoencoder_config(under(source.shapes, FIRST_STAGE))
    fit = _fit(source, replace(presets.sd1(), autoencoder=config), FIRST_STAGE)
    factor = 2 ** (len(config.channel_mult) - 1)
    scale = source.facts.get("scale_factor") or _said_of_scale(source)
    told = f"; latents scaled by {scale}" if scale else "; whether for SD 1.x, 2.x or SDXL, no tensor tells"
    base = f"any model with {config.latent_channels} latent channels at 1/{factor} of the size{told}"
    if CONFIG_KEY in source.metadata:
        base = "models of this package"
    return Finding(base=base, fit=fit, problem=_misfit(fit))


def _tiny_autoencoder(source: Source) -> Finding:
    whose = whose_latents(source) or "SD or SDXL, no tensor or name tells which"
    if all(name.startswith(ENCODER) for name in source.tensors):
        return Finding(base=f"models of {whose}", variant=f"{TINY}, encoder alone: is read beside its decoder")
    tiny = tiny_autoencoder_config(under(source.shapes, FIRST_STAGE))
    fit = compare_networks(source.tensors, {FIRST_STAGE: unfilled(lambda: TinyAutoencoder(tiny))})
    base = f"models with {tiny.latent_channels} latent channels at 1/{tiny.downsampling} of the size: of {whose}"
    halves = "" if tiny.encoder else ", decoder alone"
    beside = "" if encoder_beside(source) is None else ", with the encoder beside it"
    variant = f"{TINY}{halves}{beside}: decodes in little time, less exactly"
    return Finding(base=base, variant=variant, fit=fit, problem=_misfit(fit))


def _said_of_scale(source: Source) -> str:
    """The latents' scale that goes with the architecture in the metadata."""
    said = source.metadata.get("modelspec.architecture", "")
    scales = {"stable-diffusion-xl": "0.13025, as in SDXL", "stable-diffusion-v": "0.18215, as in SD 1.x and 2.x"}
    return next((scale for start, scale in scales.items() if said.startswith(start)), "")


def _text_encoder(source: Source) -> Finding:
    transformer = f"{TEXT}transformer."
    if any(name.startswith(CLIP) for name in source.tensors):
        prefix, tower = CLIP, open_clip_config(under(source.shapes, CLIP))
    elif any(name.startswith(transformer) for name in source.tensors):
        prefix, tower = transformer, clip_config(under(source.shapes, transformer))
    else:
        return Finding()
    preset = presets.sd1()
    fit = _fit(source, replace(preset, text=(replace(preset.text[0], tower=tower),)), prefix)
    kind = TOWERS.get(tower.width, "a tower that is not known")
    base = f"a model whose text encoder is {kind}: {tower.width} wide, {tower.layers} layers"
    return Finding(base=base, fit=fit, problem=_misfit(fit))


def _fit(source: Source, config: SystemConfig, prefix: str) -> Comparison:
    """How well one network's tensors fit, whatever else a system needs."""
    fit = compare(source.tensors, _networks(config))
    return replace(fit, missing=tuple(name for name in fit.missing if name.startswith(prefix)))


def _misfit(fit: Comparison) -> str | None:
    """What is wrong with the tensors, counted."""
    if fit.fits:
        return None
    kinds = (("missing", fit.missing), ("unexpected", fit.unexpected), ("of another shape or dtype", fit.misshapen))
    counts = ", ".join(f"{len(names):,} {what}" for what, names in kinds if names)
    return f"its tensors do not fit its networks: {counts}"


@lru_cache(maxsize=8)
def _networks(config: SystemConfig) -> Networks:
    """Networks without weights; kept, for a folder has many files of one kind."""
    return build(config)


def _adapter(source: Source, *, whole: bool) -> Finding:
    facts = adapter_facts(source, whole=whole)
    words = (facts.base or "").partition(" (")[0]
    return Finding(family=FAMILY_IDS.get(words), base=facts.base, adapter=facts, problem=facts.fault)


def _embedding(source: Source) -> Finding:
    found = read_embeddings(source.path, allow_pickle=source.layout == "pickle")
    facts = tuple(EmbeddingFacts(e.name, e.places, e.widths, e.steps, e.base) for e in found)
    base = found[0].made_for
    return Finding(family=FAMILY_IDS.get(base.partition(" (")[0]), base=base, embeddings=facts)


def _controlnet(source: Source) -> Finding:
    source = control_source(source)
    tensors = {name: info for name, info in source.tensors.items() if name != DIFFERENCE}
    config = control_config({name: info.shape for name, info in tensors.items()})
    with torch.device("meta"):
        fit = compare_networks(tensors, {"": ControlNet(config)})
    variant = "to be added to the base's own weights" if DIFFERENCE in source.tensors else None
    family = WIDTHS.get(config.unet.context_width or 0)
    problem = _misfit(fit)
    return Finding(family=family, base=made_for(config.unet), variant=variant, fit=fit, problem=problem)
