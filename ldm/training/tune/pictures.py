"""The user's pictures, ready to be trained on: cut to their buckets, encoded once, and kept on disk.

Of each picture a few views are kept: cut in the middle or, where its set says so, in several places; as it is and,
where it may be, mirrored. An encoder of pictures is no mirror itself, so mirrored views are encoded too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.buckets import Buckets, Crop, Size, cut
from ldm.data.captions import whole
from ldm.data.example import Example
from ldm.data.file_at import BytesAt
from ldm.data.look import upright_size
from ldm.errors import LdmError
from ldm.models.pixel_blocks import FirstStage
from ldm.pipeline.control import edges
from ldm.pipeline.first_stage import encode
from ldm.pipeline.images import LARGE_BYTES, read_mask, read_picture, read_shrunk, to_tensor
from ldm.training.tune.cache import Cache, CacheError, Key

log = logging.getLogger(__name__)

CROPS = 4
"""Of a picture that is cut in different places, so many views are kept."""


@dataclass(frozen=True)
class View:
    """One way that a picture is shown."""

    crop: Crop
    mirrored: bool


@dataclass(frozen=True)
class Prepared:
    """A picture whose views are in the cache.

    content: the SHA-256 of its file; views: all of one size; keys: of each view, its entry
    """

    example: Example
    content: str
    views: tuple[View, ...]
    keys: tuple[Key, ...] = field(repr=False)
    cache: Cache = field(repr=False)

    @property
    def bucket(self) -> Size:
        """(width, height) in pixels."""
        return self.views[0].crop.bucket

    @property
    def caption(self) -> str:
        """What it is told when captions are not varied."""
        return whole(self.example.captions[0], self.example.rules)

    def drawn(self, u: float) -> int:
        """The number of a view, drawn by u in [0, 1); that of 0 is cut in the middle or first, and not mirrored."""
        return min(int(u * len(self.views)), len(self.views) - 1)

    def view(self, number: int) -> dict[str, Tensor]:
        """latent (z, h, w), and where the picture has them mask (1, h, w) in [0, 1] and hint (3, H, W) uint8.

        Raises LdmError where the entry was damaged or removed since it was prepared.
        """
        key = self.keys[number]
        if (tensors := self.cache.read(key)) is None:
            raise LdmError(f"{self.cache.path(key)}: was damaged or removed during the run; resume it, to make it anew")
        return tensors


def prepare(
    examples: Sequence[Example],
    buckets: Buckets,
    autoencoder: FirstStage,
    cache: Cache,
    *,
    canny: bool = False,
    seed: int = 0,
    seen: Callable[[int], None] = lambda number: None,
) -> Iterator[Prepared | tuple[Example, LdmError]]:
    """Each picture with all its views encoded, or what is wrong with it.

    canny: the hint of each picture are its edges, and no file
    seen:  told how many pictures are done
    """
    mark = network_mark(autoencoder)

    for done, example in enumerate(examples, 1):
        try:
            image = example.image.read(LARGE_BYTES)
            views = tuple(_views(example, buckets.crop(*upright_size(image)), seed))
            content = hashlib.sha256(image).hexdigest()
            others = {"mask": _digest(example.mask), "hint": "canny" if canny else _digest(example.hint)}
            keys = tuple(_key(content, others, mark, view) for view in views)
            for view, key in zip(views, keys, strict=True):
                cache.get(key, partial(_encoded, example, view, autoencoder, canny=canny))
        except CacheError:
            raise
        except LdmError as error:
            yield example, error
        else:
            yield Prepared(example, content, views, keys, cache)
        seen(done)


def network_mark(network: nn.Module) -> str:
    """The same for the same weights in the same dtype."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _views(example: Example, middle: Crop, seed: int) -> Iterator[View]:
    crops = [middle]
    if example.random_crop and any(middle.spare):
        generator = torch.Generator().manual_seed(seed)
        crops = [middle.at(*torch.rand(2, generator=generator).tolist()) for _ in range(CROPS)]
    for mirrored in (False, True) if example.flip else (False,):
        for crop in crops:
            yield View(crop, mirrored)


def _key(content: str, others: dict[str, str | None], mark: str, view: View) -> Key:
    crop = view.crop
    return {
        "what": "latent 1",
        "picture": content,
        **others,
        "encoder": mark,
        "scaled": f"{crop.scaled[0]}x{crop.scaled[1]}",
        "bucket": f"{crop.bucket[0]}x{crop.bucket[1]}",
        "left": crop.left,
        "top": crop.top,
        "mirrored": view.mirrored,
    }


def _digest(file: BytesAt | None) -> str | None:
    return None if file is None else hashlib.sha256(file.read(LARGE_BYTES)).hexdigest()


@torch.no_grad()
def _encoded(example: Example, view: View, autoencoder: FirstStage, *, canny: bool) -> dict[str, Tensor]:
    """A view's tensors; see `Prepared.view`."""

    def turned(pixels: Tensor) -> Tensor:
        return pixels.flip(-1) if view.mirrored else pixels

    image = cut(read_shrunk(example.image.read(LARGE_BYTES)), view.crop)
    pixels = turned(to_tensor(image))
    latent = encode(autoencoder, pixels[None])[0].cpu()
    if not latent.isfinite().all():
        raise LdmError(f"{example.name}: its latent is not finite; use --dtype float32, or remove the picture")
    tensors = {"latent": latent}
    if example.mask is not None:
        mask = cut(read_mask(example.mask.read(LARGE_BYTES)).convert("RGB"), view.crop)
        shown = (turned(to_tensor(mask))[:1] + 1) / 2
        tensors["mask"] = F.adaptive_avg_pool2d(shown, (latent.shape[1], latent.shape[2]))
    if canny:
        tensors["hint"] = _levels(edges((pixels[None] + 1) / 2)[0])
    elif example.hint is not None:
        hint = cut(read_picture(example.hint.read(LARGE_BYTES)), view.crop)
        tensors["hint"] = _levels((turned(to_tensor(hint)) + 1) / 2)
    return tensors


def _levels(pixels: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return (pixels * 255).round().byte()
