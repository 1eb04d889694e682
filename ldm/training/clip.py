"""The objective of CLIP: pictures and their captions close, others apart, on open_clip's own model and loss.

Radford et al. 2021, section 2.3; Cherti et al. 2022 (OpenCLIP).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.models.text_encoder import TextConfig
from ldm.training.autoencoder import to_unit
from ldm.training.loop import Objective

MAX_SCALE = 100.0


def small_clip(text: TextConfig, image_size: int = 64, patch: int = 8) -> CLIP:
    """An open_clip model whose text tower has the widths of `text`, with an image tower of the same size."""
    vision = CLIPVisionCfg(
        layers=text.layers,
        width=text.width,
        head_width=text.width // text.heads,
        patch_size=patch,
        image_size=image_size,
    )
    words = CLIPTextCfg(
        context_length=text.tokens, vocab_size=text.vocabulary, width=text.width, heads=text.heads, layers=text.layers
    )
    return CLIP(embed_dim=text.projection or text.width, vision_cfg=vision, text_cfg=words)


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """ids (B, N) through an open_clip model -> unit vectors (B, P). What is padding in every row is not computed.

    Attention is causal and the end token is read, so what follows it cannot matter.
    """
    length = int(ids.argmax(dim=1).max()) + 1
    ids = ids[:, :length]
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    end = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
    return F.normalize(end @ model.text_projection, dim=-1)


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as plain matrix products: torch's fused kernel is 1.6 times slower to train with in bf16."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


class CLIPObjective(Objective):
    """Softmax contrast over the batch (InfoNCE), one caption of each picture drawn anew at every step."""

    def __init__(
        self,
        model: CLIP,
        pictures: np.ndarray,
        ids: Sequence[np.ndarray],
        flips: np.ndarray,
        kept: np.ndarray,
        held_out: np.ndarray,
    ) -> None:
        """pictures uint8 (N, size, size, 3); ids[i] int (captions, 77) of picture i; flips[i]: may it be mirrored;

        kept, held_out: numbers of the pictures that are trained on, and of those that are not.
        """
        super().__init__()
        self.model = model
        tower: Any = model.visual
        self.size: int = tower.image_size[0]
        self.pictures, self.ids, self.flips, self.kept, self.held_out = pictures, ids, flips, kept, held_out
        self.contrast = ClipLoss()

    def batch(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """images (B, 3, size, size) in [-1, 1] and ids (B, 77)."""
        chosen = self.kept[torch.randint(len(self.kept), (count,), generator=generator).numpy()].tolist()
        draw = torch.rand(count, 2, generator=generator).tolist()
        images = self._images(chosen)
        mirror = torch.tensor([bool(self.flips[i]) and u < 0.5 for i, (u, _) in zip(chosen, draw, strict=True)])
        images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
        rows = [self.ids[i][int(u * len(self.ids[i]))] for i, (_, u) in zip(chosen, draw, strict=True)]
        return {"images": images, "ids": torch.from_numpy(np.stack(rows)).long()}

    def _images(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Pictures by number, at the size that the image tower takes."""
        return shrink(to_unit(np.stack([self.pictures[i] for i in numbers])), self.size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> loss, and how often a picture's own caption is the nearest in the batch."""
        with plain_attention(batch["images"].device):
            image, text = self.features(batch["images"], batch["ids"])
        scale = self.model.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = self.contrast(image, text, scale)
        right = ((image @ text.T).argmax(dim=1) == torch.arange(len(image), device=image.device)).float().mean()
        return {"loss": loss, "accuracy": right, "scale": scale}

    def features(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures and of captions, float32 (B, P) each."""
        return self.model.encode_image(images, normalize=True).float(), encode_text(self.model, ids).float()

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Retrieval over the held-out pairs: how often a caption's own picture comes first, or among the first five."""
        device = self.model.logit_scale.device
        rows = torch.from_numpy(np.stack([self.ids[i][0] for i in self.held_out])).long().to(device)
        parts = [
            self.features(self._images(self.held_out[a : a + 64]).to(device), rows[a : a + 64])
            for a in range(0, len(rows), 64)
        ]
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        similarity = text @ image.T
        rank = (similarity > similarity.diag()[:, None]).sum(dim=1)
        return {"recall@1": float((rank < 1).float().mean()), "recall@5": float((rank < 5).float().mean())}


def shrink(images: Tensor, size: int) -> Tensor:
    """Area-average square pictures to `size`."""
    return images if images.shape[-1] == size else F.interpolate(images, size=(size, size), mode="area")
