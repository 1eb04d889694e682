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
from ldm.layers.in_bytes import Store
from ldm.layers.sharing import Network
from ldm.models.compiled import Backend, BlockCompiler, check_compiler
from ldm.models.controlnet import ControlNet
from ldm.models.image_conditioner import ImageTokens
from ldm.models.image_encoder import ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.offloading import Anything, Offload, block_by_block, check_offload, here
from ldm.models.pixel_blocks import FirstStage
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import TextStates, TextTower
from ldm.models.tokenizer import text_of
from ldm.models.unet import UNet
from ldm.pipeline.adapters import AdapterChoice, AppliedAdapter, with_adapters
from ldm.pipeline.clip.unclip import image_embedding, noised_embedding, told_image
from ldm.pipeline.first_stage import encode
from ldm.pipeline.images import as_mask, picture_bytes, read_shrunk, to_tensor
from ldm.pipeline.picture import OtherPart, Picture
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.text.embeddings import fitted, words_of
from ldm.pipeline.text.emphasis import MAX_CHUNKS, encode_chunks, token_chunks
from ldm.pipeline.text.prompt import Emphasis
from ldm.pipeline.text.states import side_by_side, size_numbers, told
from ldm.types import Conditioning
from ldm.weights.controlnet import read_control
from ldm.weights.embeddings import Embedding
from ldm.weights.find import locate, model_roots

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline.clip.components import Components
    from ldm.pipeline.clip.model import CLIP
    from ldm.pipeline.clip.prior import AnyPrior, PriorBeside
    from ldm.tasks.classify import Match
    from ldm.tasks.invert import Inverted
    from ldm.tasks.score import Scores


@dataclass(frozen=True)
class Origin:
    """Where a system came from: the file (None: made in memory), a line for each thing found out about it, what a user
    should be told unasked, and the parts that were taken from other files."""

    path: Path | None = None
    rules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    parts: tuple[OtherPart, ...] = ()

    @cached_property
    def as_refiner(self) -> tuple[OtherPart, ...]:
        """The file as what metadata calls the refiner of another model's pictures; none where there is no file."""
        return () if self.path is None else (OtherPart("refiner", self.path),)

    @property
    def name(self) -> str | None:
        """The file's name without its ending."""
        return None if self.path is None else self.path.stem


@dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """A latent diffusion model, ready to draw. It holds no state between calls, so threads may share it.

    text:       a tower for each entry of `config.text`; image, augmentor, image_tokens: for `config.image`
    dtype:      of the U-Net, and of the others unless they need a wider one
    embeddings: what prompts may use by name, see `with_embeddings`
    adapters:   those it has, see `with_adapters`; originals: what they changed, as it was, by its name in a file
    controls:   see `with_controls`
    refiner:    see `with_refiner`
    prior:      see `with_prior`
    vae_tile:   the autoencoder works in tiles of this side, with the same result; None: where there is no other way
    compiler:   what compiled its networks, see `compiled`
    offload:    what waits beside the device, see `offloaded`
    store:      how the U-Net's blocks keep their weights, see `load`
    """

    config: SystemConfig
    unet: UNet
    autoencoder: FirstStage
    text: tuple[TextTower, ...]
    device: torch.device
    dtype: torch.dtype
    origin: Origin = Origin()
    image: ImageTower | None = None
    augmentor: NoiseAugmentor | None = None
    image_tokens: ImageTokens | None = None
    embeddings: tuple[Embedding, ...] = ()
    adapters: tuple[AppliedAdapter, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    controls: Mapping[str, ControlNet] = field(default_factory=dict)
    refiner: LatentDiffusion | None = None
    prior: PriorBeside | None = None
    vae_tile: int | None = None
    compiler: BlockCompiler | None = None
    offload: Offload = "none"
    store: Store = "full"

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

        adapters: each alone, as it was trained; or (adapter, weight); or (adapter, weight for the U-Net, for the text
        towers). 1 is as trained.

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
        read = partial(
            read_control,
            base=base,
            device=self.home,
            runs_on=self.device,
            dtype=self.dtype,
            allow_pickle=allow_pickle,
        )
        networks = {name: read(locate("controlnet", path, roots)) for name, path in controls.items()}
        if self.compiler is not None:
            networks = {name: self.compiler.compiled(network) for name, network in networks.items()}
        return replace(self, controls=networks)

    def with_refiner(self, refiner: LatentDiffusion) -> LatentDiffusion:
        """A model that hands its pictures over to another one at a request's `refine_at` (SDXL's base and refiner).

        Raises `LdmError` where the two do not share a latent space, or a device.
        """
        mine, other = self.config.autoencoder, refiner.config.autoencoder
        if (mine.latent_channels, mine.downsampling) != (other.latent_channels, other.downsampling):
            raise LdmError(
                f"refiner: its latents have {other.latent_channels} channels at 1/{other.downsampling} of the size,"
                f" expected {mine.latent_channels} at 1/{mine.downsampling}; use one made for this model"
            )
        if refiner.device != self.device:
            raise LdmError(
                f"refiner: found on {refiner.device}, expected {self.device}, where the model is; load it there"
            )
        return replace(self, refiner=refiner)

    def with_prior(self, prior: str | Path | AnyPrior | None = None) -> LatentDiffusion:
        """A decoder whose requests may ask its `prior` what CLIP might see in a picture of the prompt (DALL-E 2).

        `model.with_prior().generate("a red apple", prior=PriorUse())`. prior: a file of ours, or a network; None: the
        one that ships with this package. Raises `LdmError` where the file is none, where the two were not trained for
        the same CLIP, or where this model is told no embeddings.
        """
        from ldm.pipeline.clip.prior import beside

        return replace(self, prior=beside(self, prior))

    def compiled(self, backend: Backend = "inductor") -> LatentDiffusion:
        """A model that denoises with compiled blocks, also with other adapters and ControlNets than it has now.

        `torch.compile` turns the blocks of the U-Net and of its ControlNets into kernels of their own when they are
        first run: the first step takes longer, and so does the first one of another size. Pictures differ by rounding.
        Every tensor is shared with this model. backend: as `torch.compile` takes it. Raises `LdmError` where inductor,
        the default, finds no C++ compiler.
        """
        if self.offload == "blocks":
            raise LdmError("compile: found offload blocks, whose weights come and go; take parts, or run without it")
        if backend == "inductor":
            check_compiler(self.device)
        compiler = BlockCompiler(backend)
        return replace(
            self,
            unet=compiler.compiled(self.unet),
            controls={name: compiler.compiled(network) for name, network in self.controls.items()},
            refiner=None if self.refiner is None else self.refiner.compiled(backend),
            compiler=compiler,
        )

    def offloaded(self, offload: Offload) -> LatentDiffusion:
        """A model whose networks wait in the machine's memory while they are not used; see `Offload` for the ways.

        Pictures are the same, bit for bit; of what adapters change from then on, which is computed where it waits, but
        for rounding. The device's memory is free when nothing refers to this model any more. With "none" they come to
        the device, and stay. Raises `LdmError` where the device's memory is the machine's, so that there is nowhere to
        wait, and for the blocks of a compiled model.
        """
        check_offload(offload, self.device)
        if offload == "blocks" and self.compiler is not None:
            raise LdmError("offload blocks: the blocks of a compiled model must stay; take parts, or do not compile")
        home = self.device if offload == "none" else torch.device("cpu")
        return replace(
            self,
            offload=offload,
            unet=here(self.unet, home),
            autoencoder=here(self.autoencoder, home),
            text=tuple(here(tower, home) for tower in self.text),
            image=here(self.image, home),
            augmentor=here(self.augmentor, home),
            image_tokens=here(self.image_tokens, home),
            controls={name: here(network, home) for name, network in self.controls.items()},
            originals={name: tensor.to(home) for name, tensor in self.originals.items()},
            refiner=None if self.refiner is None else self.refiner.offloaded(offload),
            prior=None if self.prior is None else replace(self.prior, network=here(self.prior.network, home)),
        )

    @property
    def home(self) -> torch.device:
        """Where its networks are while they are not used."""
        return next(self.unet.parameters()).device

    def present(self, network: Anything) -> Anything:
        """One of its networks on the device: for as long as the result is held, where it waits elsewhere."""
        return here(network, self.device)

    def denoising(self, network: Network) -> Network:
        """The same for the U-Net and for ControlNets, whose blocks may come one at a time."""
        return block_by_block(network, self.device) if self.offload == "blocks" else self.present(network)

    def denoiser(self) -> Denoiser:
        """The U-Net as a function (x, sigma, cond) -> estimate of the clean latent; on the device while it is held."""
        return Denoiser(self.denoising(self.unet), self.schedule, self.config.prediction)

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
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        clip_skip: int | None = None,
        wanted: bool = True,
        zeros: bool = False,
        emphasis: Emphasis = "a1111",
    ) -> Conditioning:
        """A prompt -> `Conditioning` of batch 1: text states (1, N, D) and, where the U-Net takes one, a vector.

        N is the towers' 77 places for each chunk of the prompt. It is one prompt at one step: what AND, [from:to:when]
        and <lora:...> mean is for `ldm.pipeline.text.prompt`. A model without text towers is told nothing.

        width, height: of the picture, for models that are told its size; None: the model's own
        original_size, crop: (width, height) and (left, top), see `GenerateRequest`; for models that are told them
        clip_skip:     the text layer that is looked at, counted from the last one, 1; None: as the model was trained
        wanted:        False for a negative prompt: the SDXL refiner is told a lower score
        zeros:         zeros in place of all that the towers say
        emphasis:      how weights are written, and what they do

        Raises `LdmError` when a tower has no such layer or says something that is not finite.
        """
        if not self.text:
            return Conditioning()
        said = []
        for index, (tower, use) in enumerate(zip(self.text, self.config.text, strict=True)):
            skip = use.skip if clip_skip is None else clip_skip - 1
            if skip >= use.tower.layers:
                raise LdmError(f"clip_skip: found {clip_skip}, expected 1 to {use.tower.layers}, this model's layers")
            words, vectors = words_of(self.embeddings, index, use.tower.vocabulary)
            chunks = token_chunks(prompt, use.tower.tokens - 2, words, emphasis)[:MAX_CHUNKS]
            said.append(encode_chunks(chunks, self.present(tower), use, skip, vectors, emphasis, self.device))
        states = side_by_side(said)
        if not torch.isfinite(states.states).all():
            raise LdmError(
                "text encoder: its states are not finite; the file is damaged, or a weight in the prompt is too large, "
                "or try --dtype float32"
            )
        if zeros:
            pooled = None if states.pooled is None else torch.zeros_like(states.pooled)
            states = TextStates(torch.zeros_like(states.states), pooled)
        size = width or self.config.size, height or self.config.size
        sizes = size_numbers(self.config, size, original_size, crop, wanted=wanted)
        return told(self, states, torch.tensor([sizes], device=self.device))

    @torch.inference_mode()
    def encode_image(self, image: bytes | str | Path | Image.Image, *, noise_level: int = 0, seed: int = 0) -> Tensor:
        """What a model that varies pictures sees of one: its embedding, noised, and the level in features, (1, 2 P).

        It is `Conditioning.vector` of SD 2.1 unCLIP, and the last part of our decoder's. noise_level: 0..999, how
        freely it may be varied; seed: of the noise that the level adds. Raises as `image_embedding` and `tell_image`.
        """
        return noised_embedding(self, self.image_embedding(image), noise_level, seed)

    @torch.inference_mode()
    def image_embedding(self, image: bytes | str | Path | Image.Image) -> Tensor:
        """A picture -> what CLIP sees in it, (1, P), without noise, in the scale that this model is told it.

        SD 2.1 unCLIP is told its image tower's answer as it is, our decoder a vector of length sqrt(P). Raises
        `LdmError` where the model takes no picture, or the file is none.
        """
        return image_embedding(self, picture_bytes(image))

    @torch.inference_mode()
    def tell_image(self, cond: Conditioning, embedding: Tensor, *, noise_level: int = 0, seed: int = 0) -> Conditioning:
        """What a prompt says, and an embedding besides: a picture's, or one that was made in its place.

        The path: `embedding`, (1, P) as `image_embedding` gives it or (B, P), is noised to `noise_level`, 0..999, with
        the noise of `seed`; it and the level's features take the place of the zeros at the end of `cond.vector`, and
        the tokens that our decoder makes of both that of the last ones of `cond.cross`. cond: from `encode_prompt`;
        what it says of another embedding is forgotten. Raises `LdmError` where the model takes no picture, or for an
        embedding of another width, one that is not finite, or a level that cannot be.
        """
        return told_image(self, cond, noised_embedding(self, embedding, noise_level, seed))

    @torch.inference_mode()
    def latent_of(self, image: Image.Image) -> Tensor:
        """An RGB picture with sides that are multiples of the downsampling -> its latent's mean, (1, z, h, w) float32.

        Raises `LdmError` where that is not finite.
        """
        latent = encode(self.present(self.autoencoder), to_tensor(image)[None], self.vae_tile)
        if not torch.isfinite(latent).all():
            raise LdmError(
                "autoencoder: the picture's latent is not finite; the file is damaged, or try --dtype float32"
            )
        return latent

    def words_cut(self, prompt: str, emphasis: Emphasis = "a1111") -> str:
        """The words at the prompt's end that are left out, since it has more than `MAX_CHUNKS` chunks; mostly none."""
        if not self.config.text:
            return ""
        tower = self.config.text[0].tower
        words, _ = words_of(self.embeddings, 0, tower.vocabulary)
        cut = token_chunks(prompt, tower.tokens - 2, words, emphasis)[MAX_CHUNKS:]
        return text_of((token.id for chunk in cut for token in chunk), words)

    @cached_property
    def clip(self) -> CLIP:
        """The whole CLIP of the file that this model came from, without adapters: pictures and texts as vectors.

        Raises `LdmError` where the file has only CLIP's text tower, as SD's have, or where there is no file.
        """
        from ldm.pipeline.clip.load import load_clip

        if self.origin.path is None:
            raise LdmError("clip: this model came from no file; load one by load_clip(path)")
        return load_clip(self.origin.path, device=self.device)

    def classify(
        self,
        images: Sequence[bytes | str | Path | Image.Image],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> list[tuple[Match, ...]]:
        """Which of the labels each picture shows: for each all of them, the best first; see `ldm.tasks.classify`.

        templates: sentences with {} where the label goes, whose mean counts; None: some for drawings and photos.
        """
        from ldm.tasks.classify import TEMPLATES, classify

        pictures = [read_shrunk(picture_bytes(image)) for image in images]
        return classify(self.clip, pictures, labels, templates or TEMPLATES)

    def score(self, images: Sequence[bytes | str | Path | Image.Image], texts: Sequence[str]) -> Scores:
        """How well each picture fits each text: cosines and logits, (pictures, texts); see `ldm.tasks.score`."""
        from ldm.tasks.score import score

        return score(self.clip, [read_shrunk(picture_bytes(image)) for image in images], texts)

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

    def upscale(
        self, request: str | GenerateRequest, image: bytes | str | Path | Image.Image, **fields: Any
    ) -> list[Picture]:
        """A picture larger, four times by the x4 upscaler or twice by ours.

        request: what the picture shows, for the former; it may be ""
        """
        from ldm.tasks import draw, upscale

        return draw(self, request, fields | {"image": picture_bytes(image)}, upscale)

    def variations(
        self, request: str | GenerateRequest, image: bytes | str | Path | Image.Image, **fields: Any
    ) -> list[Picture]:
        """Pictures like another one, by SD 2.1 unCLIP or our decoder. `request` may be ""."""
        from ldm.tasks import draw

        return draw(self, request, fields | {"vary": picture_bytes(image)})

    def invert(self, image: bytes | str | Path | Image.Image, **fields: Any) -> Inverted:
        """A picture as the pair of an embedding and noise that DDIM gives it back from (Ramesh et al. 2022, section 3).

        fields: of `GenerateRequest`: the size, the steps. Raises `LdmError` as `ldm.tasks.invert.inverting` does, like
        the three below, which see for what they draw.
        """
        from ldm.tasks.frames import as_sequence
        from ldm.tasks.invert import invert

        return invert(self, picture_bytes(image), as_sequence("", fields))

    def interpolate(
        self,
        first: bytes | str | Path | Image.Image,
        second: bytes | str | Path | Image.Image,
        request: str | GenerateRequest = "",
        *,
        frames: int = 9,
        rows: Sequence[int | None] = (None,),
        **fields: Any,
    ) -> list[Picture]:
        """Pictures on the way from one to another, row by row; see `ldm.tasks.interpolate`."""
        from ldm.tasks import pictures_of
        from ldm.tasks.frames import as_sequence
        from ldm.tasks.interpolate import interpolate

        ends = picture_bytes(first), picture_bytes(second)
        return pictures_of(interpolate(self, ends, as_sequence(request, fields), frames=frames, rows=rows))

    def textdiff(
        self,
        image: bytes | str | Path | Image.Image,
        source: str,
        target: str,
        request: str | GenerateRequest = "",
        *,
        frames: int = 7,
        theta: float = 0.5,
        **fields: Any,
    ) -> list[Picture]:
        """A picture changed from what one caption says to what another does; see `ldm.tasks.textdiff`."""
        from ldm.tasks import pictures_of
        from ldm.tasks.frames import as_sequence
        from ldm.tasks.textdiff import textdiff

        asked = as_sequence(request, fields)
        return pictures_of(textdiff(self, picture_bytes(image), asked, source, target, frames=frames, theta=theta))

    def pca(
        self,
        images: Sequence[bytes | str | Path | Image.Image],
        counts: Sequence[int | None],
        request: str | GenerateRequest = "",
        *,
        components: Components | None = None,
        inverted: bool = False,
        **fields: Any,
    ) -> list[Picture]:
        """Each picture from the first principal components of what CLIP sees in it; see `ldm.tasks.pca`."""
        from ldm.tasks import pictures_of
        from ldm.tasks.frames import as_sequence
        from ldm.tasks.pca import pca

        given, asked = [picture_bytes(image) for image in images], as_sequence(request, fields)
        return pictures_of(pca(self, given, asked, counts, components=components, inverted=inverted))

    def depth_to_image(
        self, request: str | GenerateRequest, depth: bytes | str | Path | Image.Image, **fields: Any
    ) -> list[Picture]:
        """Pictures with a depth map's depth, by SD 2 depth; from noise, or from `image=` a file's bytes.

        `ldm.models.depth.estimate` makes a map of a picture.
        """
        from ldm.tasks import depth2img, draw

        return draw(self, request, fields | {"depth": picture_bytes(depth)}, depth2img)

    def inpaint(
        self,
        request: str | GenerateRequest,
        image: bytes | str | Path | Image.Image,
        mask: bytes | str | Path | Image.Image,
        **fields: Any,
    ) -> list[Picture]:
        """`generate` within a picture, where the mask is white: all else stays bit for bit. Both as files' bytes, paths
        or PIL images; see `GenerateRequest` for `mask_blur`, `mask_fill`, `only_masked` ..."""
        from ldm.tasks import draw

        if not isinstance(mask, bytes | str | Path):
            mask = as_mask(mask)
        return draw(self, request, fields | {"image": picture_bytes(image), "mask": picture_bytes(mask)})
