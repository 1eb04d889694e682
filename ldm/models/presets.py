"""The known systems, each a function that returns a `SystemConfig`: all that is needed to build its networks.

| system          | latent | text                               | prediction | native size |
|-----------------|--------|------------------------------------|------------|-------------|
| SD 1.x          | 4      | CLIP-L, last layer                 | eps        | 512         |
| SD 2.x          | 4      | OpenCLIP ViT-H, last but one       | eps or v   | 512, 768    |
| SD 2.1 unCLIP   | 4      | as SD 2.x; a CLIP image as vector  | v          | 768         |
| SDXL base       | 4      | CLIP-L and OpenCLIP bigG           | eps        | 1024        |
| SDXL refiner    | 4      | OpenCLIP bigG                      | eps        | 1024        |
| ours            | 4      | a small OpenCLIP tower             | v          | 128 or 256  |
| our decoder     | 4      | the same; a CLIP image besides     | v          | 128 or 256  |
| our upsampler   | 12     | none; a picture of half the size   | v          | 256         |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.image_encoder import ImageConfig
from ldm.models.text_encoder import TextConfig
from ldm.models.tiny_autoencoder import TinyAutoencoderConfig
from ldm.models.tokenizer import END
from ldm.models.unet import UNetConfig
from ldm.types import PredictionType

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner", "ldm"]


@dataclass(frozen=True)
class TextUse:
    """A text tower and what a system takes from it.

    skip: layers left out at the end; final_norm: whether the states then pass the tower's last norm;
    pooled: whether the end token's state becomes part of `Conditioning.vector`; padding: the padding token's id.
    """

    tower: TextConfig
    skip: int = 0
    final_norm: bool = True
    pooled: bool = False
    padding: int = 0


@dataclass(frozen=True)
class ImageUse:
    """An image tower, whose embedding of a picture, noised, is the end of `Conditioning.vector`: all of it in SD 2.1
    unCLIP; in our decoder, the pooled text stands in front.

    statistics: whether mean and deviation of such embeddings are known; else they are taken as 0 and 1
    tokens:     how many tokens are made of the embedding besides, at the end of `Conditioning.cross`
    unit:       whether embeddings are brought to one length, sqrt(P) of P numbers
    """

    tower: ImageConfig
    statistics: bool = False
    tokens: int = 0
    unit: bool = False


@dataclass(frozen=True)
class SystemConfig:
    """One latent diffusion system.

    text: its towers; their states are joined along the width.
    schedule: a key of `ldm.diffusion.schedule.NOISE_SCHEDULES`.
    zero_terminal_snr: whether that schedule is rescaled to end in pure noise (Lin et al. 2023).
    size: the side in pixels of the pictures it was trained on.
    sizes_in_vector: how many size and crop numbers follow the pooled text in `Conditioning.vector` (SDXL 6, refiner 5).
    image: where the vector is made of a picture.
    clip_image: the image tower that was trained with the first text tower, where a file of ours brings it too.
    tiny_autoencoder: what encodes and decodes instead of `autoencoder`, which still says what the latents are.
    """

    family: Family
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    text: tuple[TextUse, ...]
    prediction: PredictionType = "eps"
    schedule: str = "scaled-linear"
    zero_terminal_snr: bool = False
    size: int = 512
    sizes_in_vector: int = 0
    image: ImageUse | None = None
    clip_image: ImageConfig | None = None
    tiny_autoencoder: TinyAutoencoderConfig | None = None


TEXT_WIDTHS: Mapping[int, str] = {
    768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "the SDXL refiner", 192: "the model that ships with ldm",
}  # fmt: skip
"""Families in words, by the width of all their text states together: what tells whom a small file was made for."""

CLIP_L = TextConfig(width=768, layers=12, heads=12)
OPENCLIP_H = TextConfig(1024, 24, 16, projection=1024, names="open_clip", activation="gelu")
OPENCLIP_BIGG = TextConfig(1280, 32, 20, projection=1280, names="open_clip", activation="gelu")
OPENCLIP_H_IMAGE = ImageConfig(1280, 32, 16, projection=1024)
OPENCLIP_L_IMAGE = ImageConfig(1024, 24, 16, projection=768, activation="quick_gelu")
SMALL_TEXT = TextConfig(192, 6, 6, projection=192, names="open_clip", activation="gelu")
SMALL_IMAGE = ImageConfig(
    192, 6, 6, projection=192, patch=8, size=64, mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5), resample="box"
)


def sd1(in_channels: int = 4) -> SystemConfig:
    """Stable Diffusion 1.x; 9 input channels for its inpainting model."""
    return SystemConfig(
        family="sd1",
        unet=UNetConfig(in_channels=in_channels),
        autoencoder=AutoencoderConfig(),
        text=(TextUse(CLIP_L, padding=END),),
    )


def sd2(prediction: PredictionType = "eps", in_channels: int = 4) -> SystemConfig:
    """Stable Diffusion 2.x: eps at 512 or v at 768; 9 input channels for inpainting, 5 for depth."""
    return SystemConfig(
        family="sd2",
        unet=UNetConfig(
            in_channels=in_channels, context_width=1024, heads=None, head_width=64, linear_projections=True
        ),
        autoencoder=AutoencoderConfig(),
        text=(TextUse(OPENCLIP_H, skip=1),),
        prediction=prediction,
        size=768 if prediction == "v" else 512,
    )


def sd2_unclip(tower: Literal["h", "l"] = "h") -> SystemConfig:
    """Stable Diffusion 2.1 unCLIP, which varies pictures: told by OpenCLIP ViT-H (h) or OpenAI's ViT-L (l)."""
    config = sd2("v")
    image = ImageUse(OPENCLIP_H_IMAGE if tower == "h" else OPENCLIP_L_IMAGE)
    return replace(config, unet=replace(config.unet, vector_width=2 * image.tower.projection), image=image)


def sd_x4_upscaler() -> SystemConfig:
    """Stable Diffusion's x4 upscaler: 7 input channels (latent and low-resolution picture), noise level as label."""
    return SystemConfig(
        family="sd2",
        unet=UNetConfig(
            in_channels=7,
            model_channels=256,
            channel_mult=(1, 2, 2, 4),
            attention=(0, 1, 1, 1),
            context_width=1024,
            heads=8,
            linear_projections=True,
            cross_only=(True, True, True, False),
            classes=1000,
        ),
        autoencoder=AutoencoderConfig(channel_mult=(1, 2, 4), scale_factor=0.08333),
        text=(TextUse(OPENCLIP_H, skip=1),),
        prediction="v",
        schedule="upscaler",
        size=512,
    )


def sdxl(in_channels: int = 4) -> SystemConfig:
    """SDXL base."""
    return SystemConfig(
        family="sdxl",
        unet=UNetConfig(
            in_channels=in_channels,
            channel_mult=(1, 2, 4),
            attention=(0, 2, 10),
            middle_attention=10,
            context_width=2048,
            heads=None,
            head_width=64,
            linear_projections=True,
            cross_only=(False, False, False),
            vector_width=2816,
        ),
        autoencoder=AutoencoderConfig(scale_factor=0.13025),
        text=(
            TextUse(CLIP_L, skip=1, final_norm=False, padding=END),
            TextUse(OPENCLIP_BIGG, skip=1, final_norm=False, pooled=True),
        ),
        size=1024,
        sizes_in_vector=6,
    )


def sdxl_refiner() -> SystemConfig:
    """SDXL refiner: the last, low-noise part of the way, with bigG alone and an aesthetic score."""
    return SystemConfig(
        family="sdxl-refiner",
        unet=UNetConfig(
            model_channels=384,
            attention=(0, 4, 4, 0),
            middle_attention=4,
            context_width=1280,
            heads=None,
            head_width=64,
            linear_projections=True,
            vector_width=2560,
        ),
        autoencoder=AutoencoderConfig(scale_factor=0.13025),
        text=(TextUse(OPENCLIP_BIGG, skip=1, final_norm=False, pooled=True),),
        size=1024,
        sizes_in_vector=5,
    )


def small(size: int = 128) -> SystemConfig:
    """The model that ships with this package: about 45 M parameters, trained on drawn pictures."""
    return SystemConfig(
        family="ldm",
        unet=UNetConfig(
            model_channels=128,
            channel_mult=(1, 2, 2),
            res_blocks=1,
            cross_only=(False, False, False),
            attention=(0, 1, 1),
            context_width=192,
            heads=None,
            head_width=32,
            linear_projections=True,
            vector_width=192,
        ),
        autoencoder=AutoencoderConfig(
            base_channels=16, channel_mult=(1, 3, 5, 8), res_blocks=1, norm_groups=1, scale_factor=1.0
        ),
        text=(TextUse(SMALL_TEXT, skip=1, pooled=True),),
        prediction="v",
        size=size,
        clip_image=SMALL_IMAGE,
    )


def small_decoder(size: int = 128) -> SystemConfig:
    """`small` told a CLIP image embedding too: the decoder of Ramesh et al. 2022, section 2.1, of our own size."""
    return decoder_of(small(size))


def decoder_of(config: SystemConfig) -> SystemConfig:
    """A system of ours with a CLIP, whose U-Net is told that one's image embedding beside the text."""
    assert config.clip_image is not None and config.unet.vector_width is not None
    image = ImageUse(config.clip_image, statistics=True, tokens=4, unit=True)
    vector = config.unet.vector_width + 2 * image.tower.projection
    return replace(config, unet=replace(config.unet, vector_width=vector), image=image, clip_image=None)


def small_upsampler(size: int = 256) -> SystemConfig:
    """Pictures twice as large: about 2.7 M parameters, no text, no attention (Ramesh et al. 2022, section 2.1).

    In the layout of `sd_x4_upscaler`: 15 input channels (12 of 2 x 2 blocks of pixels, and the low-resolution picture),
    the level of the noise over that one as label. Convolutions alone, so it learns from crops and draws any size.
    """
    return SystemConfig(
        family="ldm",
        unet=UNetConfig(
            in_channels=15,
            out_channels=12,
            model_channels=32,
            channel_mult=(1, 2, 4),
            res_blocks=1,
            attention=(0, 0, 0),
            middle_attention=0,
            context_width=None,
            heads=1,
            cross_only=(False, False, False),
            classes=101,
        ),
        autoencoder=AutoencoderConfig(
            base_channels=0, channel_mult=(1, 1), res_blocks=0, latent_channels=12, norm_groups=1, scale_factor=1.0
        ),
        text=(),
        prediction="v",
        size=size,
    )


def tiny(config: SystemConfig, width: int = 32) -> SystemConfig:
    """The same layout with every width cut and no level, for tests and for trying things; `width` a multiple of 32.

    Levels become as wide as `width`, or twice that; at most two transformer blocks stay in a row, two layers in a text
    tower and one residual block at each level of the autoencoder.
    """
    towers = tuple(replace(use, tower=_tiny_tower(use.tower, width)) for use in config.text)
    pooled = sum(use.pooled for use in config.text)
    vectors = pooled + (0 if config.image is None else 2)  # the embedding, and the level of its noise
    return replace(
        config,
        unet=_tiny_unet(config.unet, width, towers=len(towers), vector=width * vectors + 256 * config.sizes_in_vector),
        autoencoder=_tiny_autoencoder(config.autoencoder, width),
        text=towers,
        image=None if config.image is None else replace(config.image, tower=_tiny_image(config.image.tower, width)),
        clip_image=None if config.clip_image is None else _tiny_image(config.clip_image, width),
        size=64,
    )


def _tiny_tower(tower: TextConfig, width: int) -> TextConfig:
    projection = None if tower.projection is None else width
    return replace(tower, width=width, layers=2, heads=2, projection=projection)


def _tiny_image(tower: ImageConfig, width: int) -> ImageConfig:
    return replace(tower, width=width, layers=2, heads=2, projection=width, size=2 * tower.patch)


def _tiny_autoencoder(autoencoder: AutoencoderConfig, width: int) -> AutoencoderConfig:
    if autoencoder.base_channels == 0:
        return autoencoder
    multiples = _one_or_two(autoencoder.channel_mult)
    return replace(autoencoder, base_channels=width, channel_mult=multiples, res_blocks=1)


def _tiny_unet(unet: UNetConfig, width: int, towers: int, vector: int) -> UNetConfig:
    return replace(
        unet,
        model_channels=width,
        channel_mult=_one_or_two(unet.channel_mult),
        attention=tuple(min(depth, 2) for depth in unet.attention),
        middle_attention=min(unet.middle_attention, 2),
        context_width=None if unet.context_width is None else width * towers,
        heads=None if unet.heads is None else 2,
        head_width=None if unet.head_width is None else width // 2,
        vector_width=None if unet.vector_width is None else vector,
    )


def _one_or_two(multiples: tuple[int, ...]) -> tuple[int, ...]:
    """Where a level is wider than the first one, it stays so."""
    return tuple(2 if multiple > 1 else 1 for multiple in multiples)
