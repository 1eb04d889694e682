"""What a model that varies pictures is told of one: its CLIP embedding, noised, and how much.

Ramesh et al. 2022, section 2.1. One path for Stable Diffusion 2.1 unCLIP and for our own decoder:

    picture --image tower--> embedding --noise of a level--> seen (2 P) --> the last 2 P numbers of Conditioning.vector
                                                                  `-------> the last K tokens of Conditioning.cross

Of no picture, `seen` is zeros, which both were trained on. SD 2.1 unCLIP has no tokens, and no pooled text in front.
Shapes: B batch, P width of the embedding, K tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.schedule import TIMESTEPS, cosine
from ldm.errors import LdmError
from ldm.pipeline.clip.model import clip_pixels
from ldm.pipeline.images import read_picture
from ldm.types import Conditioning
from ldm.weights.io import printable

if TYPE_CHECKING:
    from ldm.models.image_encoder import ImageTower
    from ldm.models.noise_augmentor import NoiseAugmentor
    from ldm.models.presets import ImageUse
    from ldm.pipeline.latent_diffusion import LatentDiffusion


def image_embedding(model: LatentDiffusion, picture: bytes) -> Tensor:
    """A picture file's bytes -> (1, P); see `LatentDiffusion.image_embedding`."""
    use, tower, _ = _parts(model)
    tower = model.present(tower)
    embedding = tower(clip_pixels(read_picture(picture), tower.config).to(tower.proj))
    return in_scale(embedding) if use.unit else embedding


def in_scale(vectors: Tensor) -> Tensor:
    """Vectors of any length (B, P) -> of length sqrt(P), a deviation of about 1 a coordinate, as ours is told them."""
    return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


def as_told(model: LatentDiffusion, vectors: Tensor) -> Tensor:
    """Vectors of any length (B, P) -> as long as the embeddings are that the model is told. Raises `LdmError`.

    SD 2.1 unCLIP is told them as they are: theirs is the root mean square that its statistics give.
    """
    use, _, augmentor = _parts(model)
    if use.unit or augmentor.data_mean is None or augmentor.data_std is None:
        return in_scale(vectors)
    length = (augmentor.data_mean.float().square() + augmentor.data_std.float().square()).sum().sqrt()
    return F.normalize(vectors, dim=-1) * length.to(vectors)


def noised_embedding(model: LatentDiffusion, embedding: Tensor, level: int, seed: int) -> Tensor:
    """An embedding (B, P) -> what the U-Net sees of it, (B, 2 P): noised, and the level. Raises `LdmError`."""
    use, tower, augmentor = _parts(model)
    if not 0 <= level < TIMESTEPS:
        raise LdmError(f"noise level: found {level}, expected 0 to {TIMESTEPS - 1}")
    width = use.tower.projection
    if embedding.ndim != 2 or embedding.shape[1] != width or not torch.isfinite(embedding).all():
        found = "numbers that are not finite" if embedding.shape[-1:] == (width,) else f"{tuple(embedding.shape)}"
        raise LdmError(f"embedding: found {found}, expected (1, {width}) as this model's image_embedding gives")
    embedding = embedding.to(device=model.device, dtype=tower.proj.dtype)
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed)).to(embedding)
    levels = torch.full((len(embedding),), level, device=embedding.device)
    return model.present(augmentor)(embedding, noise, levels, *cosine().alpha_sigma(levels))


def told_image(model: LatentDiffusion, cond: Conditioning, seen: Tensor) -> Conditioning:
    """What a prompt says (see `told_no_image`) with `seen` (1 or B, 2 P) in place of what it says of a picture.

    A prompt of one row is said beside each of several. Raises `LdmError` for other numbers of rows.
    """
    assert cond.vector is not None
    rows, pictures = len(cond.vector), len(seen)
    if pictures != rows and 1 not in (pictures, rows):
        raise LdmError(f"embedding: found {pictures} rows, expected 1 or {rows}, one for each prompt")
    cond, seen = cond.repeat(pictures if rows == 1 else 1), seen.expand(max(rows, pictures), -1)
    assert cond.vector is not None and cond.cross is not None
    vector = torch.cat([cond.vector[:, : -seen.shape[1]], seen.to(cond.vector)], dim=1)
    if model.image_tokens is None:
        return cond.with_(vector=vector)
    image_tokens = model.present(model.image_tokens)
    tokens = image_tokens(seen.to(image_tokens.proj.weight))
    return cond.with_(vector=vector, cross=torch.cat([cond.cross[:, : -tokens.shape[1]], tokens.to(cond.cross)], dim=1))


def told_no_image(model: LatentDiffusion, cond: Conditioning) -> Conditioning:
    """What a text alone says, with room for a picture: zeros behind the pooled text, and their tokens."""
    assert cond.cross is not None and model.config.image is not None
    nothing = cond.cross.new_zeros(len(cond.cross), 2 * model.config.image.tower.projection)
    vector = nothing if cond.vector is None else torch.cat([cond.vector, nothing.to(cond.vector)], dim=1)
    if model.image_tokens is None:
        return cond.with_(vector=vector)
    image_tokens = model.present(model.image_tokens)
    tokens = image_tokens(nothing.to(image_tokens.proj.weight))
    return cond.with_(vector=vector, cross=torch.cat([cond.cross, tokens.to(cond.cross)], dim=1))


def _parts(model: LatentDiffusion) -> tuple[ImageUse, ImageTower, NoiseAugmentor]:
    """How a model is told a picture, and by which networks. Raises `LdmError` for one that is not."""
    use, tower, augmentor = model.config.image, model.image, model.augmentor
    if use is None or tower is None or augmentor is None:
        name = printable(str(model.origin.path or "model"))
        raise LdmError(
            f"{name}: takes no picture to vary, expected an SD 2.1 unCLIP checkpoint or this package's decoder"
            " (checkpoints/ldm-decoder.safetensors); use another one"
        )
    return use, tower, augmentor
