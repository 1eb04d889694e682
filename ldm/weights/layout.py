"""Which tensor belongs where in a single file of the original Stable Diffusion layout.

Prefixes: the U-Net under `model.diffusion_model.`, the autoencoder under `first_stage_model.`, text towers under
`cond_stage_model.` (SD 1.x, 2.x, ours) or `conditioner.embedders.N.` (SDXL and its refiner).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.errors import LdmError
from ldm.models.image_conditioner import ImageTokens
from ldm.models.image_encoder import ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.pixel_blocks import FirstStage, first_stage
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import CLIPText, OpenCLIPText, text_tower
from ldm.models.unet import UNet
from ldm.weights.io import TensorInfo

Module = TypeVar("Module", bound=nn.Module)

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
TEXT = "cond_stage_model."
"""Where SD 1.x, 2.x and ours keep their text tower; SDXL has `conditioner.embedders.N.` instead."""
IMAGE = "embedder.model.visual."
AUGMENTOR = "noise_augmentor."
"""Where SD 2.1 unCLIP keeps its image tower, and the statistics of image embeddings."""
IMAGE_TOKENS = "image_tokens."
"""Where our decoder keeps the map from image embeddings to tokens."""
CLIP = "cond_stage_model.model."
"""Where our own file keeps all of its CLIP: the text tower, `visual.*` and `logit_scale`, in open_clip's names."""

NOT_NEEDED: tuple[tuple[str, str], ...] = (
    ("EMA copies", r"model_ema\..+|first_stage_model\.model_ema\..+"),
    (
        "noise schedule buffers",
        r"((low_scale_model|noise_augmentor)\.)?(betas|alphas_cumprod(_prev)?|sqrt_(recip(m1)?_)?(one_minus_)?alphas_cumprod"
        r"|log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar)"
        r"|denoiser\.(sigmas|log_sigmas)|scale_factor|global_step",
    ),
    ("training marks", r"v_pred|ztsnr"),
    ("token positions", r".+\.embeddings\.position_ids"),
    ("causal masks", r".+\.model\.attn_mask"),
    ("CLIP's image tower", r"cond_stage_model\.model\.visual\..+"),
    ("CLIP's temperature and unused projection", r"(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?logit_scale"
     r"|(cond_stage_model|conditioner\.embedders\.\d)\.transformer\.text_projection\.weight"),
    ("CLIP's text tower beside the image tower", r"embedder\.model\.(?!visual\.).+|embedder\.(mean|std)"),
    ("depth estimator", r"depth_model\..+"),
    ("first-stage training loss", r"first_stage_model\.loss\..+"),
)  # fmt: skip
"""Tensors that real files carry and our networks do not hold: what they are, and a pattern of their whole names."""


@dataclass(frozen=True)
class Comparison:
    """A file's tensors against those that its networks need.

    missing, unexpected: names; misshapen: what is wrong, in words; unknown: names outside every network;
    not_needed: what a tensor is that the networks do without -> how many of that kind.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    unknown: tuple[str, ...]
    not_needed: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether the networks can be filled."""
        return not (self.missing or self.unexpected or self.misshapen)


@dataclass(frozen=True, eq=False)
class Networks:
    """All networks of a system.

    text: a tower for each entry of `config.text`; image, augmentor, image_tokens: for `config.image`.
    """

    config: SystemConfig
    unet: UNet
    autoencoder: FirstStage
    text: tuple[OpenCLIPText | CLIPText, ...]
    image: ImageTower | None = None
    augmentor: NoiseAugmentor | None = None
    image_tokens: ImageTokens | None = None

    def by_prefix(self) -> dict[str, nn.Module]:
        """Where each network's tensors lie in a file -> the network."""
        towers = {text_prefix(self.config, index): tower for index, tower in enumerate(self.text)}
        networks = {UNET: self.unet, FIRST_STAGE: self.autoencoder, **towers}
        if self.image is not None and self.augmentor is not None:
            networks |= {image_prefix(self.config): self.image, AUGMENTOR: self.augmentor}
        if self.image_tokens is not None:
            networks[IMAGE_TOKENS] = self.image_tokens
        return networks


def text_prefix(config: SystemConfig, index: int) -> str:
    """Where the text tower with this index lies."""
    tower = "model." if config.text[index].tower.names == "open_clip" else "transformer."
    if config.sizes_in_vector or len(config.text) > 1:
        return f"conditioner.embedders.{index}.{tower}"
    return f"cond_stage_model.{tower}"


def image_prefix(config: SystemConfig) -> str:
    """Where the image tower lies whose embeddings the U-Net is told: in our own files beside CLIP's text tower."""
    return f"{CLIP}visual." if config.family == "ldm" else IMAGE


def build(config: SystemConfig) -> Networks:
    """The system's networks on `meta`, without weights. Raises LdmError where a width cannot be built."""
    try:
        with torch.device("meta"), _Unfilled():
            text = tuple(text_tower(use.tower) for use in config.text)
            autoencoder = first_stage(config.tiny_autoencoder or config.autoencoder)
            networks = Networks(config, UNet(config.unet), autoencoder, text)
            if (use := config.image) is None:
                return networks
            width = use.tower.projection
            augmentor = NoiseAugmentor(width, use.statistics)
            tokens = ImageTokens(width, use.tokens, config.unet.context_width or 0) if use.tokens else None
            return replace(networks, image=ImageTower(use.tower), augmentor=augmentor, image_tokens=tokens)
    except ValueError as error:
        raise LdmError(f"its networks cannot be built: {error}") from None


def compare(tensors: Mapping[str, TensorInfo], networks: Networks) -> Comparison:
    """What a file lacks, has too much or in another shape, of a whole system."""
    return compare_networks(tensors, networks.by_prefix())


def compare_networks(tensors: Mapping[str, TensorInfo], parts: Mapping[str, nn.Module]) -> Comparison:
    """The same of any networks by their prefixes. A tensor of whole numbers cannot be a weight."""
    wanted = {
        prefix + name: tuple(tensor.shape)
        for prefix, network in parts.items()
        for name, tensor in network.state_dict().items()
    }
    unexpected, unknown, not_needed = [], [], {}
    for name in tensors.keys() - wanted.keys():
        if (kind := not_needed_as(name)) is not None:
            not_needed[kind] = not_needed.get(kind, 0) + 1
        else:
            (unexpected if name.startswith(tuple(parts)) else unknown).append(name)
    present = [name for name in wanted if name in tensors]
    misshapen = [
        f"{name} is {tensors[name].shape}, expected {wanted[name]}"
        for name in present
        if tensors[name].shape != wanted[name]
    ]
    misshapen += [
        f"{name} holds {tensors[name].dtype} numbers, expected floating-point ones"
        for name in present
        if "F" not in tensors[name].dtype
    ]
    missing = tuple(name for name in wanted if name not in tensors)
    return Comparison(missing, tuple(sorted(unexpected)), tuple(misshapen), tuple(sorted(unknown)), not_needed)


def not_needed_as(name: str) -> str | None:
    """What a tensor is that our networks do without, or None."""
    return next((kind for kind, pattern in NOT_NEEDED if re.fullmatch(pattern, name)), None)


def unfilled(network: Callable[[], Module]) -> Module:
    """A network on `meta`, without weights. Random numbers on `meta` would make torch import its compiler: seconds."""
    with torch.device("meta"), _Unfilled():
        return network()


class _Unfilled(TorchFunctionMode):
    """Inside, networks are built without being given random weights: on `meta` there is nothing to fill."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        kwargs = kwargs or {}
        if func.__name__ in ("kaiming_uniform_", "uniform_", "normal_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
