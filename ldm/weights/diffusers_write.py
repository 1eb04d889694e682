"""Diffusers' layout, written: a folder from which their pipelines start without a network.

It holds a folder for each network with its config and tensors, the scheduler's config, the tokenizers' tables and
`model_index.json`. Our own config travels in the metadata of the U-Net's file, so that a folder describes itself as a
single file of ours does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.presets import SystemConfig, TextUse
from ldm.models.tokenizer import END, LENGTH, START, vocabulary
from ldm.models.unet import UNetConfig
from ldm.weights.atomic import creating, replacing
from ldm.weights.config_json import CONFIG_KEY, config_to_json
from ldm.weights.diffusers import DROPPED_METADATA
from ldm.weights.io import TensorInfo
from ldm.weights.layout import FIRST_STAGE, UNET, text_prefix
from ldm.weights.rename import Names, autoencoder_names, controlnet_names, split, split_shape, text_names, unet_names
from ldm.weights.save import write_stream
from ldm.weights.source import Source

BETAS = {"scaled-linear": (0.00085, 0.012, "scaled_linear"), "upscaler": (0.0001, 0.02, "scaled_linear"),
         "latent-diffusion": (0.0015, 0.0195, "scaled_linear"), "linear": (0.0001, 0.02, "linear")}  # fmt: skip
"""Noise schedules: first and last beta, and what they call the way between."""

VERSION = "0.30.0"
"""A version of diffusers that knows all that is written here; it asks for one."""

SIZED = (2816, 2560)
"""How wide the vector of SDXL and of its refiner is: pooled text and sizes. A U-Net alone tells by nothing else that it
is one of theirs, and not an unCLIP, whose vector is a picture's embedding."""

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

Json = dict[str, Any]


def write_folder(
    path: str | Path,
    source: Source,
    config: SystemConfig,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write a system as a new folder, whole or not at all. Returns the names of the tensors that have no place in it.

    source:   holds every tensor of the system, one of which is read at a time
    dtype:    of every floating-point tensor; None: as each is
    metadata: what else the U-Net's file is to say, such as ModelSpec's entries

    Raises LdmError where the path is taken, a tensor is missing, or their classes cannot hold such a system.
    """
    held = held_config(config)
    index, parts, described = _pipeline(held), _parts(held), config_to_json(held)
    used = {prefix + name for prefix, names in parts.values() for name in names}
    if missing := sorted(used - source.tensors.keys()):
        raise LdmError(f"{len(missing)} tensors are missing, the first is {missing[0]}; nothing was written")
    with creating(path) as folder:
        for name, (prefix, names) in parts.items():
            (folder / name).mkdir()
            extra = {**(metadata or {}), CONFIG_KEY: described} if name == "unet" else {}
            extra = {key: value for key, value in extra.items() if key not in DROPPED_METADATA}
            part = theirs(source, prefix, names)
            stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
            write_stream(
                folder / name / f"{stem}.safetensors", part.tensors, part.read, {"format": "pt", **extra}, dtype
            )
        for name, content in _files(held).items():
            (folder / name).parent.mkdir(exist_ok=True)
            _write_text(folder / name, content)
        _write_text(folder / "model_index.json", _text(index))
    return tuple(sorted(source.tensors.keys() - used))


def write_component(
    path: str | Path, source: Source, prefix: str, config: Any, *, dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """Write a U-Net or an autoencoder alone as a new folder with its config and tensors; else like `write_folder`.

    prefix: UNET or FIRST_STAGE of `layout`; config: that network's.
    """
    if prefix == UNET:
        takes_sizes = config.vector_width in SIZED
        vector = "add_embedding" if takes_sizes else "class_embedding"
        names, content = unet_names(config, vector), _unet(config, None, takes_sizes)
    else:
        names, content = autoencoder_names(config), _autoencoder(config, size=512)
    return _write_network(path, source, prefix, names, content, dtype)


def write_controlnet(
    path: str | Path, source: Source, config: ControlNetConfig, *, dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """The same of a ControlNet, whose tensors have LDM's bare names."""
    sized = config.unet.vector_width is not None  # there are none for unCLIP, whose vector is a picture's
    content = _unet(config.unet, None, sized) | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": config.hint_widths,
        "global_pool_conditions": config.pooled,
    }
    for name in ("out_channels", "up_block_types", "sample_size"):
        del content[name]
    return _write_network(path, source, "", controlnet_names(config), content, dtype)


def _write_network(
    path: str | Path, source: Source, prefix: str, names: Names, content: Json, dtype: torch.dtype | None
) -> tuple[str, ...]:
    part = theirs(source, prefix, names)
    with creating(path) as folder:
        write_stream(folder / "diffusion_pytorch_model.safetensors", part.tensors, part.read, {"format": "pt"}, dtype)
        _write_text(folder / "config.json", _text(content))
    return tuple(sorted(source.tensors.keys() - {prefix + name for name in names}))


def held_config(config: SystemConfig) -> SystemConfig:
    """The system as their folder holds it: SD's text tower ends behind the layer whose states are used.

    So diffusers has 23 of SD 2.x's 24 text blocks, and no projection.
    """
    if config.sizes_in_vector:
        return config

    def cut(use: TextUse) -> TextUse:
        tower = replace(use.tower, layers=use.tower.layers - use.skip, projection=None)
        return replace(use, tower=tower, skip=0)

    return replace(config, text=tuple(cut(use) for use in config.text))


def theirs(source: Source, prefix: str, names: Names) -> Source:
    """The inverse of `diffusers.renamed_component`: tensors of ours under their names."""
    owner = {their: ours for ours, piece in names.items() for their in piece.names}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(wanted)
        for ours, tensor in source.read({prefix + owner[name] for name in wanted}):
            parts = split(names[ours.removeprefix(prefix)], tensor)
            yield from ((name, part) for name, part in parts.items() if name in wanted)

    def info(their: str) -> TensorInfo:
        ours = source.tensors[prefix + owner[their]]
        return TensorInfo(ours.dtype, split_shape(names[owner[their]], ours.shape))

    return replace(source, tensors={name: info(name) for name in owner}, read=read)


def _parts(config: SystemConfig) -> dict[str, tuple[str, Names]]:
    """The folder of each network -> where its tensors lie with us, and their names."""
    vector = "add_embedding" if config.sizes_in_vector else "class_embedding"
    parts = {
        "unet": (UNET, unet_names(config.unet, vector)),
        "vae": (FIRST_STAGE, autoencoder_names(config.autoencoder)),
    }
    for index, (suffix, use) in enumerate(zip(_suffixes(config), config.text, strict=True)):
        parts[f"text_encoder{suffix}"] = (text_prefix(config, index), text_names(use.tower))
    return parts


def _suffixes(config: SystemConfig) -> tuple[str, ...]:
    """What follows `text_encoder` and `tokenizer`: the refiner has SDXL's second tower alone."""
    return ("_2",) if config.family == "sdxl-refiner" else ("", "_2")[: len(config.text)]


def _files(config: SystemConfig) -> dict[str, str]:
    """Path -> content of everything but tensors and the index."""
    takes_sizes = config.sizes_in_vector > 0
    files = {
        "unet/config.json": _text(_unet(config.unet, config.size // config.autoencoder.downsampling, takes_sizes)),
        "vae/config.json": _text(_autoencoder(config.autoencoder, config.size)),
        "scheduler/scheduler_config.json": _text(_scheduler(config)),
    }
    if config.unet.classes is not None:
        files["low_res_scheduler/scheduler_config.json"] = _text(_low_resolution_scheduler())
    symbols, merges = vocabulary()
    for suffix, use in zip(_suffixes(config), config.text, strict=True):
        files[f"text_encoder{suffix}/config.json"] = _text(_text_tower(use))
        files[f"tokenizer{suffix}/vocab.json"] = json.dumps(symbols, ensure_ascii=False)
        files[f"tokenizer{suffix}/merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
        files[f"tokenizer{suffix}/tokenizer_config.json"] = _text(_tokenizer(use, symbols))
    return files


def _pipeline(config: SystemConfig) -> Json:
    """model_index.json: the pipeline and the class of each part. Raises LdmError where they have none for it."""
    extra = config.unet.in_channels - config.autoencoder.latent_channels
    if config.sizes_in_vector:
        kinds = {0: "StableDiffusionXLPipeline", 4: "StableDiffusionXLInstructPix2PixPipeline",
                 5: "StableDiffusionXLInpaintPipeline"}  # fmt: skip
        name = "StableDiffusionXLImg2ImgPipeline" if config.family == "sdxl-refiner" else kinds.get(extra)
    elif config.unet.classes is not None:
        name = "StableDiffusionUpscalePipeline"
    else:
        kinds = {0: "StableDiffusionPipeline", 1: "StableDiffusionDepth2ImgPipeline",
                 4: "StableDiffusionInstructPix2PixPipeline", 5: "StableDiffusionInpaintPipeline"}  # fmt: skip
        name = kinds.get(extra)
    vector = config.sizes_in_vector > 0
    if name is None or (config.unet.vector_width is not None) != vector or any(u.pooled for u in config.text) != vector:
        raise LdmError(
            f"no folder of diffusers is written of {config.family} with {config.unet.in_channels} input channels and "
            f"a vector of {config.unet.vector_width or 0}; choose a single file"
        )
    if config.schedule not in BETAS:
        raise LdmError(f"diffusers has no scheduler for the noise schedule {config.schedule}")
    nothing = [None, None]
    index: Json = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", _scheduler(config)["_class_name"]],
        "text_encoder": nothing,
        "tokenizer": nothing,
        "feature_extractor": nothing,
    }
    for suffix, use in zip(_suffixes(config), config.text, strict=True):
        index[f"text_encoder{suffix}"] = ["transformers", _text_tower(use)["architectures"][0]]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    if config.sizes_in_vector:
        refines = config.family == "sdxl-refiner"
        known = {"requires_aesthetics_score": True} if refines else {}
        return index | known | {"force_zeros_for_empty_prompt": not refines, "image_encoder": nothing}
    if config.unet.classes is not None:
        low = {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
        return index | low | {"safety_checker": nothing, "watermarker": nothing}
    if extra == 1:
        return index | {"depth_estimator": nothing}
    return index | {"safety_checker": nothing, "image_encoder": nothing, "requires_safety_checker": False}


def _unet(config: UNetConfig, side: int | None, takes_sizes: bool) -> Json:
    """side: of the latents it was trained on; takes_sizes: whether its vector is SDXL's (pooled text and sizes)."""
    if config.middle_attention == 0 or (config.attention[-1] and config.attention[-1] != config.middle_attention):
        raise LdmError("diffusers has no U-Net whose middle has another number of attention blocks than its last level")
    widths = [config.model_channels * mult for mult in config.channel_mult]
    content: Json = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.attention)],
        "block_out_channels": widths,
        "layers_per_block": config.res_blocks,
        "transformer_layers_per_block": [depth or config.middle_attention for depth in config.attention],
        "attention_head_dim": [config.heads_for(width) for width in widths],  # their name for the number of heads
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projections,
        "only_cross_attention": list(config.cross_only),
        "sample_size": side,
    }
    if config.classes is not None:
        content["num_class_embeds"] = config.classes
    elif config.vector_width is not None:
        content["projection_class_embeddings_input_dim"] = config.vector_width
        if takes_sizes:
            content |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        else:
            content["class_embed_type"] = "projection"
    return content


def _autoencoder(config: AutoencoderConfig, size: int) -> Json:
    levels = len(config.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [config.base_channels * mult for mult in config.channel_mult],
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": size,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor or None,
    }


def _text_tower(use: TextUse) -> Json:
    tower = use.tower
    return {
        "architectures": ["CLIPTextModelWithProjection" if use.pooled else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "projection_dim": tower.projection or tower.width,
        "vocab_size": tower.vocabulary,
        "max_position_embeddings": tower.tokens,
        "layer_norm_eps": 1e-5,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": use.padding,
    }


def _tokenizer(use: TextUse, symbols: Mapping[str, int]) -> Json:
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": next(symbol for symbol, index in symbols.items() if index == use.padding),
    }


def _scheduler(config: SystemConfig) -> Json:
    """Euler's where SDXL is published with it, else DDIM's: both know every prediction type and zero terminal SNR."""
    start, end, way = BETAS[config.schedule]
    content: Json = {
        "_class_name": "EulerDiscreteScheduler" if config.sizes_in_vector else "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": way,
        "prediction_type": PREDICTIONS[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",  # whose last timestep must be used
        "steps_offset": 1,
    }
    return content if config.sizes_in_vector else content | {"clip_sample": False, "set_alpha_to_one": False}


def _low_resolution_scheduler() -> Json:
    """How the upscaler's low-resolution picture is noised."""
    start, end, way = BETAS["upscaler"]
    return {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": start, "beta_end": end,
            "beta_schedule": way}  # fmt: skip


def _text(content: Json) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
