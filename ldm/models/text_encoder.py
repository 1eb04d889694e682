"""Text towers of CLIP: one causal transformer, with the tensor names of OpenCLIP or of Hugging Face's CLIP.

Radford et al. 2021, section 2.4; Cherti et al. 2022 (OpenCLIP). Both name the same network differently:
checkpoints of SD 2.x and SDXL hold OpenCLIP names, those of SD 1.x and SDXL's first tower Hugging Face names.
Shapes: B batch, N = 77 tokens, D width, P width of the joint text-image space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers.attention import attend


@dataclass(frozen=True)
class TextConfig:
    """Widths of a text tower. `projection` is P where the tower ends in the joint space, else None."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    projection: int | None = None
    names: Literal["open_clip", "hugging_face"] = "hugging_face"
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu"
    vocabulary: int = 49408
    tokens: int = 77

    def __post_init__(self) -> None:
        if self.names == "hugging_face" and self.projection is not None:
            raise ValueError("a text tower with Hugging Face's names has no projection")


@dataclass(frozen=True)
class TextStates:
    """states (B, N, D) for cross-attention; pooled (B, P or D), the end token's, where it was asked for."""

    states: Tensor
    pooled: Tensor | None


class TextTower(Protocol):
    """What the rest of the code knows of a text encoder."""

    config: TextConfig

    def __call__(
        self,
        ids: Tensor,
        skip: int = 0,
        final_norm: bool = True,
        pooled: bool = False,
        extra: Tensor | None = None,
    ) -> TextStates:
        """ids (B, N) int64; `skip` layers left out at the end for the states; see `_encode`.

        extra (n, D): the vectors of ids above the vocabulary, which textual-inversion embeddings bring.
        """
        ...


def _activate(x: Tensor, name: str) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else F.gelu(x)


class OpenCLIPAttention(nn.Module):
    """Self-attention with one input projection. Tensor names: in_proj_weight, in_proj_bias, out_proj."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=width**-0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); seen (B, N) bool: the positions that are looked at."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, causal=self.causal, seen=seen))


class OpenCLIPMLP(nn.Module):
    """The position-wise network. Tensor names: c_fc, c_proj."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.c_proj(_activate(self.c_fc(x), self.activation))


class OpenCLIPBlock(nn.Module):
    """Attention and position-wise network, normalised first and added. Tensor names: ln_1, attn, ln_2, mlp."""

    def __init__(self, width: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = OpenCLIPAttention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = OpenCLIPMLP(width, activation)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); seen (B, N) bool: the positions that are looked at."""
        x = x + self.attn(self.ln_1(x), seen)
        return x + self.mlp(self.ln_2(x))


class OpenCLIPTransformer(nn.Module):
    """The blocks of a text tower (causal) or of an image tower. Tensor names: resblocks.N."""

    def __init__(self, width: int, layers: int, heads: int, activation: str, *, causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenCLIPBlock(width, heads, activation, causal) for _ in range(layers))


class OpenCLIPText(nn.Module):
    """An OpenCLIP text tower: token_embedding, positional_embedding, transformer, ln_final, text_projection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.tokens, config.width).normal_(std=0.01))
        self.transformer = OpenCLIPTransformer(
            config.width, config.layers, config.heads, config.activation, causal=True
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = None
        if config.projection is not None:
            self.text_projection = nn.Parameter(
                torch.empty(config.width, config.projection).normal_(std=config.width**-0.5)
            )

    def forward(
        self,
        ids: Tensor,
        skip: int = 0,
        final_norm: bool = True,
        pooled: bool = False,
        extra: Tensor | None = None,
    ) -> TextStates:
        """ids (B, N) -> text states; the end token's state in the joint space where `pooled`."""
        x = _look_up(self.token_embedding, ids, extra) + self.positional_embedding[: ids.shape[1]]
        end = _end(ids, self.config) if pooled else None
        states, last = _encode(x, self.transformer.resblocks, self.ln_final, skip, final_norm, end)
        return TextStates(states, last if last is None or self.text_projection is None else last @ self.text_projection)


class CLIPAttention(nn.Module):
    """Causal self-attention with three input projections. Tensor names: q_proj, k_proj, v_proj, out_proj."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class CLIPMLP(nn.Module):
    """The position-wise network. Tensor names: fc1, fc2."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(_activate(self.fc1(x), self.activation))


class CLIPBlock(nn.Module):
    """The same block as OpenCLIP's. Tensor names: layer_norm1, self_attn, layer_norm2, mlp."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CLIPAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = CLIPMLP(config.width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """Tensor names: token_embedding, position_embedding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, ids: Tensor, extra: Tensor | None) -> Tensor:
        """ids (B, N) -> (B, N, D)."""
        return _look_up(self.token_embedding, ids, extra) + self.position_embedding.weight[: ids.shape[1]]


class CLIPEncoder(nn.Module):
    """The blocks. Tensor names: layers.N."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPBlock(config) for _ in range(config.layers))


class CLIPTextModel(nn.Module):
    """Tensor names: embeddings, encoder, final_layer_norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class CLIPText(nn.Module):
    """Hugging Face's CLIP text tower, all its tensors under `text_model`; its pooled state is not projected."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextModel(config)

    def forward(
        self,
        ids: Tensor,
        skip: int = 0,
        final_norm: bool = True,
        pooled: bool = False,
        extra: Tensor | None = None,
    ) -> TextStates:
        """ids (B, N) -> text states; the end token's normalised state where `pooled`."""
        model = self.text_model
        x = model.embeddings(ids, extra)
        end = _end(ids, self.config) if pooled else None
        return TextStates(*_encode(x, model.encoder.layers, model.final_layer_norm, skip, final_norm, end))


def _look_up(table: nn.Embedding, ids: Tensor, extra: Tensor | None) -> Tensor:
    """The vectors of ids (B, N) -> (B, N, D): from the table, and for ids beyond it from `extra` (n, D)."""
    if extra is None:
        return table(ids)
    known = table.num_embeddings
    new = ids >= known
    x = table(ids.masked_fill(new, 0))
    x[new] = extra.to(x)[ids[new] - known]
    return x


def _end(ids: Tensor, config: TextConfig) -> Tensor:
    """Where the first end token stands, (B,). It is the vocabulary's last; tokens that embeddings bring lie above."""
    return (ids == config.vocabulary - 1).int().argmax(dim=-1)


def _encode(
    x: Tensor, blocks: nn.ModuleList, norm: nn.Module, skip: int, final_norm: bool, end: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Run a tower: states after all but `skip` blocks, and the state at `end` after all of them.

    Blocks whose result nobody asked for are not run.
    """
    if not 0 <= skip < len(blocks):
        raise ValueError(f"skip {skip}: this text tower has {len(blocks)} layers")
    for block in blocks[: len(blocks) - skip]:
        x = block(x)
    states = norm(x) if final_norm else x
    if end is None:
        return states, None
    for block in blocks[len(blocks) - skip :]:
        x = block(x)
    return states, norm(x)[torch.arange(len(x), device=x.device), end]


def text_tower(config: TextConfig) -> OpenCLIPText | CLIPText:
    """The tower whose tensor names the config asks for."""
    return OpenCLIPText(config) if config.names == "open_clip" else CLIPText(config)
