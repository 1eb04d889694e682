"""The denoising network: a U-Net over latents, told the noise level and, by cross-attention, the text.

Ho et al. 2020 (the U-Net), Dhariwal & Nichol 2021 (its widths), Rombach et al. 2022 (cross-attention),
Podell et al. 2023 (transformer depth per level, vector conditioning). Tensor names as in LDM.
Shapes: B batch, C channels, h and w latent height and width, N text tokens, D text width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.layers.attention import AttentionBlock
from ldm.layers.convolution import Downsample, ResBlock, Upsample, fastest_layout
from ldm.layers.embeddings import sinusoidal_embedding
from ldm.layers.sharing import shared_copy
from ldm.layers.transformer import SpatialTransformer
from ldm.types import Conditioning, Context


@dataclass(frozen=True)
class UNetConfig:
    """Widths of a U-Net, a value per level where there are levels; the finest level comes first.

    in_channels:       latent channels plus those of `Conditioning.concat`
    attention:         transformer blocks after each residual block of the level; 0 is none
    middle_attention:  the same in the middle
    context_width:     width of the text states; None gives self-attention only (no text)
    heads, head_width: one of them; the other follows from the level's width
    linear_projections: SD 2.x and SDXL project by linear layers, SD 1.x by 1x1 convolutions
    cross_only:        levels whose first attention also looks at the text (x4 upscaler)
    vector_width:      width of `Conditioning.vector`, projected and added to the time embedding
    classes:           number of labels where `Conditioning.vector` holds int64 labels instead
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    attention: tuple[int, ...] = (1, 1, 1, 0)
    middle_attention: int = 1
    context_width: int | None = 768
    heads: int | None = 8
    head_width: int | None = None
    linear_projections: bool = False
    cross_only: tuple[bool, ...] = (False, False, False, False)
    vector_width: int | None = None
    classes: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        if len(self.attention) != levels or len(self.cross_only) != levels:
            raise ValueError(f"attention and cross_only need {levels} values, one per level of channel_mult")
        if (self.heads is None) == (self.head_width is None):
            raise ValueError("give exactly one of heads and head_width")
        if self.vector_width is not None and self.classes is not None:
            raise ValueError("give at most one of vector_width and classes")

    def heads_for(self, channels: int) -> int:
        """Attention heads at a level that is `channels` wide."""
        if self.heads is not None:
            return self.heads
        assert self.head_width is not None
        return channels // self.head_width


Attention = SpatialTransformer | AttentionBlock


class Stage(nn.ModuleList):
    """What stands between two skips: a residual block, its attention, a change of size. Numbered as on disk."""

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | Context | None,
        size: tuple[int, int] | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, h, w), embedding (B, E), context (B, N, D) -> (B, C', h', w').

        size: of an upsampling's result; perturbed: (B,) bool, the rows of perturbed self-attention.
        """
        for part in self:
            match part:
                case ResBlock():
                    x = part(x, embedding)
                case SpatialTransformer():
                    x = part(x, context, perturbed)
                case AttentionBlock():
                    x = part(x, perturbed)
                case Upsample():
                    x = part(x, size)
                case _:
                    x = part(x)
        return x


class Contracting(nn.Module):
    """The half of a U-Net that narrows, and its middle: all that a control network has of it (`ldm.models.controlnet`).

    skips: the width of every skip that it leaves.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self._base, self._takes_text = config.model_channels, config.context_width is not None
        width = 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(self._base, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = _label_embedding(config, width)
        self.input_blocks, self.skips = _down(config, width)
        deepest = self.skips[-1]
        first, last = (ResBlock(deepest, deepest, width, config.dropout) for _ in range(2))
        self.middle_block = Stage([first, *_attention(config, deepest, config.middle_attention), last])

    def embed(self, timestep: Tensor, vector: Tensor | None, dtype: torch.dtype) -> Tensor:
        """timestep (B,), vector (B, D) or labels (B,) -> the embedding that every residual block is given, (B, E)."""
        embedding = self.time_embed(sinusoidal_embedding(timestep, self._base).to(dtype))
        if self.label_emb is not None:
            if vector is None:
                raise ValueError("this network needs Conditioning.vector")
            embedding = embedding + self.label_emb(vector)
        return embedding

    def contract(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Conditioning,
        hint: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """x (B, C, h, w), timestep (B,), cond -> the embedding (B, E), every skip (B, C_i, h_i, w_i), and the middle.

        hint: (1 or B, model_channels, h, w), added behind the first convolution; perturbed: (B,) bool, the rows of
        perturbed self-attention in the middle. Raises ValueError where `cond` lacks the text states or the vector that
        this network was built for.
        """
        embedding, skips = self.narrow(x, timestep, cond, len(self.input_blocks), hint)
        return embedding, skips, self.middle_block(skips[-1], embedding, cond.shown, perturbed=perturbed)

    def narrow(
        self, x: Tensor, timestep: Tensor, cond: Conditioning, stages: int, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The first `stages` alone: as `contract`, the embedding and the skips that they leave."""
        if cond.cross is None and self._takes_text:
            raise ValueError("this network needs Conditioning.cross")
        embedding = self.embed(timestep, cond.vector, x.dtype)
        hidden = fastest_layout(x if cond.concat is None else torch.cat([x, cond.concat], dim=1))
        skips: list[Tensor] = []
        for stage in self.input_blocks[:stages]:
            hidden = stage(hidden, embedding, cond.shown)
            if hint is not None and not skips:
                hidden = hidden + hint
            skips.append(hidden)
        return embedding, skips


class UNet(Contracting):
    """Noisy latent, timestep and conditioning to a prediction (noise, velocity or image, as it was trained)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.config = config
        base = config.model_channels
        self.output_blocks = _up(config, 4 * base, self.skips)
        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), timestep (B,), cond -> (B, out_channels, h, w). Any height and width.

        Raises ValueError where `cond` lacks the text states or the vector that this network was built for.
        """
        embedding, skips, hidden = self.controlled(x, timestep, cond)
        return self.out(self.widen(hidden, skips, embedding, cond, len(self.output_blocks)))

    def controlled(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> tuple[Tensor, list[Tensor], Tensor]:
        """`contract`, with what control networks add to the skips and to the middle."""
        embedding, skips, hidden = self.contract(x, timestep, cond, perturbed=cond.perturbed)
        if cond.control:
            *levels, middle = cond.control
            hidden = hidden + middle
            skips = [skip + residual for skip, residual in zip(skips, levels, strict=True)]
        return embedding, skips, hidden

    def widen(self, hidden: Tensor, skips: list[Tensor], embedding: Tensor, cond: Conditioning, stages: int) -> Tensor:
        """As many of the stages that are left as `stages`: each takes the last of the skips, (B, C_i, h_i, w_i), off.

        hidden: (B, D, h', w'), the middle or what stages before gave; the result is (B, D', h'', w'').
        """
        left = len(skips)
        for stage in self.output_blocks[-left:][:stages]:
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            height, width = skips[-1].shape[-2:] if skips else hidden.shape[-2:]
            hidden = stage(hidden, embedding, cond.shown, (height, width))
        return hidden


def merging_tokens(unet: UNet, share: float) -> UNet:
    """A U-Net that shares every tensor with this one, and whose self-attention merges this share of its tokens where
    they are most: in the transformers of the finest level that has any. Itself where none has."""
    if (finest := finest_transformers(unet)) == []:
        return unet
    names = {name for name, module in unet.named_modules() if module in finest}
    unet = shared_copy(unet)
    for name in names:
        transformer = unet.get_submodule(name)
        assert isinstance(transformer, SpatialTransformer)
        transformer.merged = share
    return unet


def finest_transformers(unet: UNet) -> list[SpatialTransformer]:
    """The transformers of the finest level that has any, on the way down and up."""
    found: dict[int, list[SpatialTransformer]] = {}
    level = 0
    for stage in (*unet.input_blocks, *unet.output_blocks):
        assert isinstance(stage, Stage)
        for part in stage:
            if isinstance(part, SpatialTransformer):
                found.setdefault(level, []).append(part)
            level += isinstance(part, Downsample) - isinstance(part, Upsample)
    return found[min(found)] if found else []


def _label_embedding(config: UNetConfig, width: int) -> nn.Module | None:
    """What turns `Conditioning.vector` into a summand of the time embedding, where the network takes one."""
    if config.classes is not None:
        return nn.Embedding(config.classes, width)
    if config.vector_width is not None:
        project = nn.Sequential(nn.Linear(config.vector_width, width), nn.SiLU(), nn.Linear(width, width))
        return nn.Sequential(project)
    return None


def _attention(config: UNetConfig, channels: int, depth: int, cross_only: bool = False) -> list[Attention]:
    """The attention after a residual block: none, over itself, or also over the text."""
    if depth == 0:
        return []
    heads = config.heads_for(channels)
    if config.context_width is None:
        return [AttentionBlock(channels, heads)]
    linear = config.linear_projections
    return [SpatialTransformer(channels, config.context_width, heads, depth, linear=linear, cross_only=cross_only)]


def _down(config: UNetConfig, width: int) -> tuple[nn.ModuleList, list[int]]:
    """The contracting half, and the width of every skip it leaves."""
    channels = config.model_channels
    stages, skips = [Stage([nn.Conv2d(config.in_channels, channels, 3, padding=1)])], [channels]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.res_blocks):
            out = config.model_channels * mult
            attention = _attention(config, out, config.attention[level], config.cross_only[level])
            stages.append(Stage([ResBlock(channels, out, width, config.dropout), *attention]))
            skips.append(channels := out)
        if level < len(config.channel_mult) - 1:
            stages.append(Stage([Downsample(channels)]))
            skips.append(channels)
    return nn.ModuleList(stages), skips


def _up(config: UNetConfig, width: int, skips: list[int]) -> nn.ModuleList:
    """The expanding half: every stage first takes the newest skip."""
    skips = list(skips)
    channels, stages = skips[-1], []
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for block in range(config.res_blocks + 1):
            out = config.model_channels * mult
            stage: list[nn.Module] = [ResBlock(channels + skips.pop(), out, width, config.dropout)]
            stage += _attention(config, out, config.attention[level], config.cross_only[level])
            if level > 0 and block == config.res_blocks:
                stage.append(Upsample(out))
            stages.append(Stage(stage))
            channels = out
    return nn.ModuleList(stages)
