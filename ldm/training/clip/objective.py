"""The objective of CLIP: pictures and their captions close, others apart, on open_clip's own models and losses.

Radford et al. 2021, section 2.3 (softmax); Zhai et al. 2023 (sigmoid); Cherti et al. 2022 (OpenCLIP).
Shapes: B pairs in a batch, N tokens, S side of the picture in pixels, P width of the joint space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import CLIP, CustomTextCLIP
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ldm.evaluation.retrieval import retrieval
from ldm.evaluation.zero_shot import accuracy, class_vectors
from ldm.models.image_encoder import CLIP_DEVIATION, CLIP_MEAN
from ldm.training.clip.data import Pairs
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.training.engine.ranks import rank_and_ranks

Contrast = Literal["softmax", "sigmoid"]
OpenCLIP = CLIP | CustomTextCLIP

MAX_SCALE = 100.0
"""Radford et al. 2021, section 2.5: logits are never scaled by more."""
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Pixels:
    """How an image tower takes pictures: S, and mean and deviation of each colour, in [0, 1]."""

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    deviation: tuple[float, ...] = CLIP_DEVIATION

    def of(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, side, side) -> float32 (B, 3, S, S)."""
        mean, deviation = (torch.tensor(x, device=pictures.device)[:, None, None] for x in (self.mean, self.deviation))
        return shrink((pictures.float() / 255 - mean) / deviation, self.size)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Held-out pictures for zero-shot classification: class names, the pictures' numbers, and the class of each."""

    classes: Sequence[str]
    pictures: np.ndarray
    labels: np.ndarray


class CLIPObjective(Objective):
    """Contrast over the batch of all ranks, one caption of each picture drawn anew at every step."""

    def __init__(
        self,
        model: OpenCLIP,
        pairs: Pairs,
        tokens: Callable[[list[str]], Tensor],
        pixels: Pixels,
        *,
        loss: Contrast = "softmax",
        chunks: int = 1,
        labelled: Labelled | None = None,
        config: str | None = None,
    ) -> None:
        """tokens: captions -> ids (B, N); config: a digest of what the model was built of, see `facts`.

        chunks: into how many parts a batch is split for the towers. Their activations are computed twice and never
        held for more than one part, so memory is one part's; loss and gradients stay those of the whole batch.
        (Batch normalisation, in the ResNets, sees one part at a time.)
        """
        super().__init__()
        self.model = model
        self.pairs, self.tokens, self.pixels = pairs, tokens, pixels
        self.loss: Contrast = loss
        self.chunks, self.labelled, self.config = chunks, labelled, config

    def facts(self) -> dict[str, object]:
        """The loss, which pictures are trained on, and the model's config where one was given."""
        config = {} if self.config is None else {"config": self.config}
        return {"loss": self.loss, "data": self.pairs.digest(), **config}

    def rows_meet(self) -> bool:
        """A pair is told from the others of its batch."""
        return True

    def batch(self, draw: Draw) -> Batch:
        """images uint8 (B, 3, side, side) and ids (B, N): pictures of this rank's share, each once at most."""
        rank, ranks = rank_and_ranks()
        share = self.pairs.kept[rank::ranks]
        chosen: list[int] = share[torch.randperm(len(share), generator=draw.generator)[: draw.count].numpy()].tolist()
        random = torch.rand(len(chosen), 2, generator=draw.generator).tolist()
        images = self._pictures(chosen)
        mirror = torch.tensor([bool(self.pairs.flips[i]) and u < 0.5 for i, (u, _) in zip(chosen, random, strict=True)])
        images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
        captions = [self.pairs.texts[i] for i in chosen]
        drawn = [texts[int(u * len(texts))] for texts, (_, u) in zip(captions, random, strict=True)]
        return {"images": images, "ids": self.tokens(drawn)}

    def _pictures(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self.pairs.pictures[i] for i in numbers])).permute(0, 3, 1, 2)

    def forward(self, batch: Batch) -> Batch:
        """-> loss, and how often a picture's own caption is the nearest in the batch."""
        parts = zip(batch["images"].chunk(self.chunks), batch["ids"].chunk(self.chunks), strict=True)
        if self.chunks == 1:
            image, text = self.features(*next(parts))
        else:
            pairs: list[Any] = [checkpoint(self.features, *part, use_reentrant=False) for part in parts]
            image, text = (torch.cat(side) for side in zip(*pairs, strict=True))
        with torch.no_grad():  # the number itself is held, not its exponential: that would have no gradient beyond
            self.model.logit_scale.clamp_(max=math.log(MAX_SCALE))
        scale = self.model.logit_scale.exp()
        loss = contrast(image, text, scale, self.model.logit_bias, self.loss)
        with torch.no_grad():
            right = (image @ text.T).argmax(dim=1) == torch.arange(len(image), device=image.device)
        return {"loss": loss, "accuracy": right.float().mean(), "scale": scale.squeeze()}

    def features(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures uint8 (B, 3, side, side) and of captions (B, N), float32 (B, P) each."""
        with plain_attention(images.device):
            image = self.model.encode_image(self.pixels.of(images), normalize=True)
            return image.float(), encode_text(self.model, ids).float()

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Retrieval both ways over the held-out pictures and the first caption of each; then zero-shot accuracy."""
        aside = self.pairs.held_out
        image = self._image_vectors(aside)
        text = self._text_vectors([self.pairs.texts[int(i)][0] for i in aside])
        recall = retrieval(image, text, torch.arange(len(aside), device=text.device), at=(1, 5))
        found = {f"text-image@{k}": share for k, share in recall.text_to_image.items()}
        found |= {f"image-text@{k}": share for k, share in recall.image_to_text.items()}
        if self.labelled is None:
            return found
        vectors = class_vectors(self._text_vectors, self.labelled.classes)
        labels = torch.from_numpy(self.labelled.labels).to(vectors.device)
        right = accuracy(self._image_vectors(self.labelled.pictures), vectors, labels, at=(1, 5))
        return found | {f"zero-shot@{k}": share for k, share in right.items()}

    def _image_vectors(self, numbers: np.ndarray) -> Tensor:
        blocks = [self._pictures(numbers[a : a + EVALUATION_BATCH]) for a in range(0, len(numbers), EVALUATION_BATCH)]
        device = self.model.logit_scale.device
        return torch.cat([
            self.model.encode_image(self.pixels.of(block.to(device)), normalize=True).float() for block in blocks
        ])  # fmt: skip

    def _text_vectors(self, texts: list[str]) -> Tensor:
        ids = self.tokens(texts).to(self.model.logit_scale.device)
        return torch.cat([encode_text(self.model, block).float() for block in ids.split(EVALUATION_BATCH)])


def contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, loss: Contrast) -> Tensor:
    """The loss of unit vectors (B, P) of this rank's pairs against those of all ranks, gradients through all of them.

    softmax: each rank returns the loss of the joint batch; sigmoid: its share, the mean over ranks being the joint
    one. Either way the mean of the ranks' gradients is the joint gradient. A bias is needed for the sigmoid alone.
    Logits keep the vectors' precision also under autocast: in bfloat16 they would be off by up to a quarter.
    """
    rank, ranks = rank_and_ranks()
    with torch.autocast(image.device.type, enabled=False):
        if loss == "sigmoid":
            return SigLipLoss(rank=rank, world_size=ranks)(image, text, scale, bias)
        return ClipLoss(gather_with_grad=True, rank=rank, world_size=ranks)(image, text, scale, bias)


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """ids (B, N) through an open_clip model -> unit vectors (B, P). What is padding in every row is not computed."""
    if not _reads_the_end(model):
        return model.encode_text(ids, normalize=True)
    length = int(ids.argmax(dim=1).max()) + 1
    ids = ids[:, :length]
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    end = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
    return F.normalize(end @ model.text_projection, dim=-1)


def _reads_the_end(model: Any) -> bool:
    """Whether attention is causal and the end token's state is taken: then what follows it cannot matter."""
    if not isinstance(model, CLIP) or model.attn_mask is None or model.text_pool_type != "argmax":
        return False
    return isinstance(model.text_projection, Tensor)


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """In bfloat16 on a CPU, attention as plain products: torch's fused kernel is 1.6 times slower to train with."""
    if device.type != "cpu" or not (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    ):
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def shrink(images: Tensor, size: int) -> Tensor:
    """Area-average square pictures to `size`."""
    return images if images.shape[-1] == size else F.interpolate(images, size=(size, size), mode="area")
