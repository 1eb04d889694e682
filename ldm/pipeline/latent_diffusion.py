"""The assembled system: a U-Net, an autoencoder, its text towers, and what is known about them.

Shapes: B batch, N tokens, D text width, z latent channels, h and w latent height and width, f downsampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, zero_terminal_snr
from ldm.errors import LdmError
from ldm.layers.embeddings import sinusoidal_embedding
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import ControlNet
from ldm.models.image_encoder import ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import TextTower
from ldm.models.tokenizer import tokenize, word_ids
from ldm.models.unet import UNet
from ldm.pipeline.adapters import AdapterChoice, AppliedAdapter, with_adapters
from ldm.pipeline.embeddings import fitted, words_of
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.picture import OtherPart, Picture
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.unclip import image_vector
from ldm.types import Conditioning
from ldm.weights.controlnet import read_control
from ldm.weights.embeddings import Embedding
from ldm.weights.find import locate, model_roots

if TYPE_CHECKING:
    from PIL import Image

SIZE_FEATURES = 256
"""Sinusoidal features of each size, crop and score number (SDXL)."""

WANTED_SCORE, UNWANTED_SCORE = 6.0, 2.5
"""How well-liked the SDXL refiner is told that the picture of the prompt is, and that of the negative prompt."""


@dataclass(frozen=True)
class Origin:
    """Where a system came from: the file (None: made in memory), a line for each thing found out about it, what a user
    should be told unasked, and the parts that were taken from other files."""

    path: Path | None = None
    rules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    parts: tuple[OtherPart, ...] = ()

    @property
    def name(self) -> str | None:
        """The file's name without its ending."""
        return None if self.path is None else self.path.stem


@dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """A latent diffusion model, ready to draw. It holds no state between calls, so threads may share it.

    text:       a tower for each entry of `config.text`; image, augmentor: for `config.image`
    dtype:      of the U-Net, and of the others unless they need a wider one
    embeddings: what prompts may use by name, see `with_embeddings`
    adapters:   those it has, see `with_adapters`; originals: what they changed, as it was, by its name in a file
    controls:   see `with_controls`
    """

    config: SystemConfig
    unet: UNet
    autoencoder: AutoencoderKL
    text: tuple[TextTower, ...]
    device: torch.device
    dtype: torch.dtype
    origin: Origin = Origin()
    image: ImageTower | None = None
    augmentor: NoiseAugmentor | None = None
    embeddings: tuple[Embedding, ...] = ()
    adapters: tuple[AppliedAdapter, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    controls: Mapping[str, ControlNet] = field(default_factory=dict)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the U-Net was trained with."""
        schedule = NOISE_SCHEDULES[self.config.schedule]()
        return zero_terminal_snr(schedule) if self.config.zero_terminal_snr else schedule

    def with_embeddings(self, embeddings: Iterable[Embedding]) -> LatentDiffusion:
        """A model whose prompts may use these embeddings by name, and no others; all else is shared with this one.

        A name takes as many places as the embedding has vectors. It is found as `split_at_names` says. Raises
        `LdmError` for an embedding that was made for text towers of other widths.
        """
        return replace(self, embeddings=fitted(embeddings, self.config))

    def with_adapters(self, adapters: Iterable[AdapterChoice]) -> LatentDiffusion:
        """A model with these adapters, LoRAs and their kin, and no others; none takes off what this one has.

        adapters: (adapter, weight), or (adapter, weight for the U-Net, weight for the text towers); 1 is as trained

        It shares every tensor that they leave alone with this one, which stays bit for bit as it is. What they change
        is computed in float32 from the weights without adapters. Raises `LdmError` for an adapter that was made for
        another kind of model, that is given twice, or that leads to weights that are not finite.
        """
        return with_adapters(self, adapters)

    def with_controls(
        self,
        controls: Mapping[str, str | Path],
        *,
        allow_pickle: bool = False,
        models: Sequence[str | Path] | None = None,
    ) -> LatentDiffusion:
        """A model whose requests may name these ControlNets, and no others; name -> file; all else is shared.

        `model.with_controls({"canny": "control_v11p_sd15_canny.safetensors"})` then draws by
        `generate("a bird", controls=[Control(network="canny", image=...)])`. Raises `LdmError` where a file is no
        ControlNet or is made for another model. allow_pickle, models: as of `load`.
        """
        roots = model_roots(models)
        base = self.with_adapters(()).unet  # or differences would keep what an adapter added
        read = partial(read_control, base=base, device=self.device, dtype=self.dtype, allow_pickle=allow_pickle)
        return replace(
            self, controls={name: read(locate("controlnet", path, roots)) for name, path in controls.items()}
        )

    def denoiser(self) -> Denoiser:
        """The U-Net as a function (x, sigma, cond) -> estimate of the clean latent."""
        return Denoiser(self.unet, self.schedule, self.config.prediction)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(z, h, w) of a picture of width x height."""
        f = self.config.autoencoder.downsampling
        return self.config.autoencoder.latent_channels, height // f, width // f

    @torch.inference_mode()
    def encode_prompt(
        self,
        prompt: str,
        *,
        width: int | None = None,
        height: int | None = None,
        clip_skip: int | None = None,
        wanted: bool = True,
        zeros: bool = False,
    ) -> Conditioning:
        """A prompt -> `Conditioning` of batch 1: text states (1, N, D) and, where the U-Net takes one, a vector.

        width, height: of the picture, for models that are told its size; None: the model's own
        clip_skip:     the text layer that is looked at, counted from the last one, 1; None: as the model was trained
        wanted:        False for a negative prompt: the SDXL refiner is told a lower score
        zeros:         zeros in place of all that the towers say

        Raises `LdmError` when a tower has no such layer or says something that is not finite.
        """
        states, pooled = [], []
        for index, (tower, use) in enumerate(zip(self.text, self.config.text, strict=True)):
            skip = use.skip if clip_skip is None else clip_skip - 1
            if skip >= use.tower.layers:
                raise LdmError(f"clip_skip: found {clip_skip}, expected 1 to {use.tower.layers}, this model's layers")
            words, vectors = words_of(self.embeddings, index, use.tower.vocabulary)
            ids = torch.tensor([tokenize(prompt, use.tower.tokens, use.padding, words)], device=self.device)
            encoded = tower(ids, skip, use.final_norm, use.pooled, vectors)
            states.append(encoded.states)
            if encoded.pooled is not None:
                pooled.append(encoded.pooled)
        cross = torch.cat(states, dim=-1)
        if not torch.isfinite(cross).all():
            raise LdmError("text encoder: its states are not finite; the file is damaged, or try --dtype float32")
        vector = torch.cat(pooled, dim=-1) if pooled else None
        if zeros:
            cross, vector = torch.zeros_like(cross), None if vector is None else torch.zeros_like(vector)
        if self.config.image is not None:  # no picture: as in a quarter of its training
            vector = cross.new_zeros(1, 2 * self.config.image.tower.projection)
        if vector is not None and self.config.sizes_in_vector:
            features = self._size_features(width or self.config.size, height or self.config.size, wanted)
            vector = torch.cat([vector, features.to(vector)], dim=-1)
        return Conditioning(cross=cross, vector=vector)

    @torch.inference_mode()
    def encode_image(self, image: bytes | str | Path | Image.Image, *, noise_level: int = 0, seed: int = 0) -> Tensor:
        """A picture -> `Conditioning.vector` of batch 1 for a model that varies pictures (SD 2.1 unCLIP).

        noise_level: 0..999, how freely it may be varied; seed: of the noise that the level adds. Raises `LdmError`
        where the model takes no picture, or the file is none.
        """
        return image_vector(self, picture_bytes(image), noise_level, seed)

    def _size_features(self, width: int, height: int, wanted: bool) -> Tensor:
        """Original size, crop corner and target size, or for the refiner a score in place of the last, (1, 256 n).

        Podell et al. 2023, section 2.2. The picture is said to be uncropped and to have its own size.
        """
        last = [height, width] if self.config.sizes_in_vector == 6 else [WANTED_SCORE if wanted else UNWANTED_SCORE]
        numbers = [height, width, 0, 0, *last]
        return sinusoidal_embedding(torch.tensor(numbers, device=self.device), SIZE_FEATURES).reshape(1, -1)

    def words_cut(self, prompt: str) -> int:
        """How many of the prompt's tokens do not fit into the text towers and are left out."""
        if not self.config.text:
            return 0
        room = min(use.tower.tokens for use in self.config.text) - 2  # start and end
        words, _ = words_of(self.embeddings, 0, self.config.text[0].tower.vocabulary)
        return max(0, len(word_ids(prompt, words)) - room)

    def generate(self, request: str | GenerateRequest, **fields: Any) -> list[Picture]:
        """Draw pictures: a prompt and fields of `GenerateRequest`, or a request and changes to it.

        It is `ldm.tasks.run` without its steps; the one place where the pipeline calls upwards, for the short name.
        Raises `LdmError` for a request that cannot be, or a result that is not finite.
        """
        from ldm.tasks import draw

        return draw(self, request, fields)

    def image_to_image(
        self, request: str | GenerateRequest, image: bytes | str | Path | Image.Image, **fields: Any
    ) -> list[Picture]:
        """`generate` from a picture: a file's bytes, its path, or a PIL image."""
        from ldm.tasks import draw

        return draw(self, request, fields | {"image": picture_bytes(image)})
