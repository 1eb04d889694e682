"""The objective of the decoder: the denoising network's, told what CLIP sees in each picture besides the caption.

Ramesh et al. 2022, section 2.1. The picture is left out for a tenth of the rows and the caption for half of them, each
for itself, so that the decoder draws by either, by both and by none. The embedding is noised to a level drawn evenly,
which it is told as well (Rombach 2023, Stable Diffusion 2.1 unCLIP).
Shapes: B batch, N pictures, P width of the embedding, K image tokens, D text width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.diffusion.schedule import TIMESTEPS, cosine
from ldm.models.image_conditioner import ImageTokens
from ldm.models.image_encoder import ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.unet import UNet, UNetConfig
from ldm.pipeline.clip.model import clip_pixels
from ldm.pipeline.clip.unclip import in_scale
from ldm.training.diffusion import DiffusionObjective
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.training.whitening import Whitening
from ldm.weights.atomic import replacing

log = logging.getLogger(__name__)

Preview = Callable[[UNet, ImageTokens, Path], None]

DROP_TEXT, DROP_IMAGE = 0.5, 0.1
"""How likely caption and picture are left out."""

SPREAD = 0.1
"""How far the first tokens of different embeddings are apart, where text states have a deviation of 1."""

VECTOR = "label_emb.0.0.weight"
"""What looks at `Conditioning.vector`."""


class DecoderObjective(Objective):
    """`DiffusionObjective`'s error, of a U-Net that sees embeddings in its vector and in tokens behind the text's."""

    def __init__(
        self,
        diffusion: DiffusionObjective,
        image_tokens: ImageTokens,
        augmentor: NoiseAugmentor,
        embeddings: np.ndarray,
        *,
        drop: float = DROP_IMAGE,
        preview: Preview | None = None,
    ) -> None:
        """embeddings: (N, 2, P) of each picture and of it mirrored; drop: how likely a picture is left out."""
        super().__init__()
        self.diffusion, self.image_tokens, self.augmentor = diffusion, image_tokens, augmentor
        self.embeddings, self.drop, self.preview = embeddings, drop, preview
        self.levels = cosine()

    def batch(self, draw: Draw) -> Batch:
        """`DiffusionObjective`'s, and embedding and its noise (B, P), its level and whether it is told (B,)."""
        return self._with_embeddings(self.diffusion.batch(draw), draw.generator, self.drop)

    def _with_embeddings(self, batch: Batch, generator: torch.Generator, drop: float) -> Batch:
        chosen, mirrored = batch["pictures"].cpu().numpy(), batch["mirrored"].cpu().numpy()
        embedding = torch.from_numpy(self.embeddings[chosen, mirrored.astype(int)]).float()
        drawn = {
            "embedding": embedding,
            "embedding_noise": torch.randn(embedding.shape, generator=generator),
            "level": torch.randint(TIMESTEPS, (len(embedding),), generator=generator),
            "told": torch.rand(len(embedding), generator=generator) >= drop,
        }
        return batch | {name: tensor.to(batch["latents"].device) for name, tensor in drawn.items()}

    def compile(self) -> None:
        """Compile the network alone."""
        self.diffusion.compile()

    def forward(self, batch: Batch) -> Batch:
        """-> loss."""
        return {"loss": self.loss(batch).mean()}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted error of each row, (B,)."""
        alpha, sigma = self.levels.alpha_sigma(batch["level"])
        seen = self.augmentor(batch["embedding"], batch["embedding_noise"], batch["level"], alpha, sigma)
        seen = seen * batch["told"][:, None]
        tokens = self.image_tokens(seen).to(batch["states"])
        told = {
            "states": torch.cat([batch["states"], tokens], dim=1),
            "pooled": torch.cat([batch["pooled"], seen], dim=1),
        }
        return self.diffusion.loss(batch | told)

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """The loss on held-out pictures: told the right embedding, another picture's and none; `preview` draws."""
        generator = torch.Generator().manual_seed(1)
        batches = [self._with_embeddings(b, generator, 0.0) for b in self.diffusion.held_out_batches()]
        figures = {
            "held_out": batches,
            "other_picture": [b | {"embedding": b["embedding"].roll(1, dims=0)} for b in batches],
            "no_picture": [b | {"told": torch.zeros_like(b["told"])} for b in batches],
        }
        if self.preview is not None:
            self.preview(self.diffusion.unet, self.image_tokens, folder / f"samples-{step:06d}.png")
        return {name: float(torch.cat([self.loss(b) for b in told]).mean()) for name, told in figures.items()}


@torch.no_grad()
def widened(unet: UNet, config: UNetConfig) -> UNet:
    """A trained U-Net with a wider vector, of which the new part does nothing yet: as it was for any embedding."""
    state = unet.state_dict()
    narrow = state[VECTOR]
    assert config.vector_width is not None
    weight = F.pad(narrow, (0, config.vector_width - narrow.shape[1]))
    wider = UNet(config).to(narrow)
    wider.load_state_dict(state | {VECTOR: weight})
    return wider


@torch.no_grad()
def first_tokens(embedding: int, paddings: Tensor) -> ImageTokens:
    """The map to begin with: near `paddings`, (K, D) states behind a text's end, which a U-Net knows to pass over."""
    tokens = ImageTokens(embedding, *paddings.shape)
    nn.init.normal_(tokens.proj.weight, std=SPREAD * (2 * embedding) ** -0.5)
    tokens.proj.bias.copy_(paddings.flatten())
    return tokens


@torch.no_grad()
def plain_tokens(tokens: ImageTokens, whitening: Whitening) -> ImageTokens:
    """A map that was trained beside white states, for plain ones: what `fold` does not see of a U-Net's text."""
    inverse = torch.linalg.inv(whitening.matrix.double())
    width = len(whitening.mean)
    weight = tokens.proj.weight.double().cpu().unflatten(0, (tokens.tokens, width))
    bias = tokens.proj.bias.double().cpu().unflatten(0, (tokens.tokens, width))
    plain = ImageTokens(weight.shape[-1] // 2, tokens.tokens, width)
    plain.proj.weight.copy_(torch.einsum("de,kdi->kei", inverse, weight).flatten(0, 1))
    plain.proj.bias.copy_((bias @ inverse + whitening.mean.double()).flatten())
    return plain.to(tokens.proj.weight)


@torch.no_grad()
def encode_embeddings(tower: ImageTower, pictures: np.ndarray, batch: int = 64) -> np.ndarray:
    """uint8 (N, H, W, 3) -> float16 (N, 2, P): of each picture and of it mirrored, of length sqrt(P)."""
    found = np.empty((len(pictures), 2, tower.config.projection), np.float16)
    for start in range(0, len(pictures), batch):
        part = [Image.fromarray(picture) for picture in pictures[start : start + batch]]
        pixels = torch.cat([clip_pixels(picture, tower.config) for picture in part])
        vectors = in_scale(tower(torch.cat([pixels, pixels.flip(-1)])).float()).numpy()
        found[start : start + batch] = np.stack(np.split(vectors, 2), axis=1)
        if start % (batch * 50) == 0:
            log.info("embedded %d of %d pictures", start, len(pictures))
    return found


def kept_embeddings(path: Path, tower: ImageTower, pictures: np.ndarray) -> np.ndarray:
    """`encode_embeddings`, mapped from the .npy file `path`; made anew where that is none of this tower's pictures.

    Beside it, with the ending .mark, lies which tower they are of: a digest of its config and weights.
    """
    digest = hashlib.sha256(repr(tower.config).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    mark, wanted = path.with_suffix(".mark"), f"{digest.hexdigest()} {len(pictures)}\n".encode()
    if not (path.is_file() and mark.is_file() and mark.read_bytes() == wanted):
        mark.unlink(missing_ok=True)  # so that a stop half-way leaves no mark of another tower's
        with replacing(path) as file:
            np.save(file, encode_embeddings(tower, pictures))
        with replacing(mark) as file:
            file.write(wanted)
    return np.load(path, mmap_mode="r")


def augmentor_of(embeddings: np.ndarray) -> NoiseAugmentor:
    """The augmentor with the mean and deviation of embeddings (N, 2, P)."""
    rows = torch.from_numpy(embeddings.reshape(-1, embeddings.shape[-1]).astype(np.float32))
    augmentor = NoiseAugmentor(rows.shape[1], statistics=True)
    augmentor.data_mean, augmentor.data_std = rows.mean(dim=0, keepdim=True), rows.std(dim=0, keepdim=True) + 1e-3
    return augmentor
