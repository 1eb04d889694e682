"""What may be asked of a model: one validated record, the same for the library, the command line and a server.

Nothing here imports torch, so that a wrong request is answered at once.
"""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import BeforeValidator, Field, model_validator

from ldm.errors import LdmError
from ldm.pipeline.names import SamplerName, ScheduleName, nearest_sampler, sampler_named, schedule_named
from ldm.pipeline.text.prompt import Emphasis
from ldm.pipeline.validation import PictureBytes, Record, Share, Text, shown, tuple_of_list

Rng = Literal["cpu", "philox", "comfy"]
MaskFill = Literal["original", "noise", "zero"]
Upscaling = Literal["latent", "lanczos"]

TAKES_ETA = ("ddim", "euler-a", "dpm2-a", "dpmpp-2m-sde", "dpmpp-3m-sde", "dpmpp-sde", "dpmpp-2s-a", "tcd")
"""The samplers that have an `eta`."""

DEFAULT_STEPS = 24
DEFAULT_SAMPLER: SamplerName = "dpmpp-2m"
DEFAULT_GUIDANCE = 5.0
DEFAULT_STRENGTH = 0.75

MAX_PIXELS = 2048 * 1536
MAX_SEED = 2**63 - 1
MAX_JSON = 40 * 2**20
MAX_EXTEND = 1024
MAX_CONTROLS = 8
MAX_COMFY_BATCH = 64

NEEDS: dict[str, tuple[str, ...]] = {
    "mask_invert": ("mask",), "mask_soft": ("mask",), "only_masked": ("mask",), "mask_padding": ("only_masked",),
    "mask_blur": ("mask", "extend"), "mask_fill": ("mask", "extend"), "vary_noise": ("vary",),
    "vary_inverted": ("vary",),
}  # fmt: skip
"""Fields that mean nothing but together with one of others: a fault where they are changed without."""

Side = Annotated[
    int | None,
    Field(ge=64, le=2048, multiple_of=8, description="a whole number from 64 to 2048 that is a multiple of 8"),
]
Strength = Annotated[float, Field(gt=0, le=1, description="a number above 0, at most 1")]
Seed = Annotated[
    int, Field(ge=-1, le=MAX_SEED, description="a whole number from 0 to 2^63 - 1, or -1 for a random one")
]
Steps = Annotated[int, Field(ge=1, le=1000, description="a whole number from 1 to 1000")]
Pixels = Annotated[int, Field(ge=0, le=MAX_EXTEND)]


class Control(Record):
    """A picture that a control network holds a request to; frozen.

    network: its name: of those that the model was given by `with_controls`
    image:   a PNG, JPEG or WebP file's bytes (or base64 text): what the network looks at, in its own language (edges,
             a depth map, a pose ...), scaled and cut to the picture's size
    weight:  0..2, how strongly it acts
    start, end: the shares of the steps between which it acts
    guess:   it acts on the prompt's side alone, less in the finer levels, so that it may guess what the picture shows
             (Zhang et al. 2023, "guess mode"); wants a guidance of 3 to 5
    canny:   `image` is any picture, and its edges (Canny 1986, thresholds 100 and 200) are what the network looks at
    """

    title: ClassVar[str] = "control"

    network: Annotated[str, Field(min_length=1, max_length=255, description="the name of a control network")]
    image: PictureBytes
    weight: Annotated[float, Field(ge=0, le=2, description="a number from 0 to 2")] = 1.0
    start: Share = 0.0
    end: Share = 1.0
    guess: bool = False
    canny: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Control:
        if self.start >= self.end:
            raise self.fault(f"start: found {self.start:g}, expected less than end, {self.end:g}")
        if self.canny and importlib.util.find_spec("cv2") is None:
            raise self.fault("canny: needs OpenCV, which is not installed; pip install opencv-python-headless")
        _check_picture("control", self.image)
        return self


class HighRes(Record):
    """A second pass: the picture made larger, noised, and denoised again at its new size; frozen.

    scale:    above 1, at most 4: of both sides, rounded to multiples of 8
    upscale:  "latent" enlarges the latent (bilinear), "lanczos" the decoded picture, which is then encoded again
    strength: 0..1, the share of the steps that are run again, rounded down
    steps:    of which `strength` is a share; None: those of the request
    """

    title: ClassVar[str] = "highres"

    scale: Annotated[float, Field(gt=1, le=4, description="a number above 1, at most 4")] = 2.0
    upscale: Upscaling = "lanczos"
    strength: Strength = 0.4
    steps: Steps | None = None


class Apg(Record):
    """Adaptive projected guidance (Sadat et al. 2024): guidance whose part along the picture is damped; frozen.

    parallel: 0..1, how much of that part is kept (the paper's eta); 1 with the others off is ordinary guidance
    norm:     0..100, the largest norm that the difference of the two answers may have; 0 does not limit it
    momentum: -1..1, how much of the differences before is added; negative values push away from them
    """

    title: ClassVar[str] = "apg"

    parallel: Share = 0.0
    norm: Annotated[float, Field(ge=0, le=100, description="a number from 0 to 100")] = 7.5
    momentum: Annotated[float, Field(ge=-1, le=1, description="a number from -1 to 1")] = -0.75


class PriorUse(Record):
    """How a model's prior makes of the prompt what the decoder is told (Ramesh et al. 2022, section 2.2); frozen.

    guidance: 0..50, how far its embedding leans towards the text; 1 leaves guidance out. The paper names no scale
    steps:    1..1000 of its sampler (appendix C: 64); an autoregressive prior takes one for each code instead
    choose:   1..64, how many embeddings are drawn, of which the one is taken that fits the text best (the paper: 2)
    """

    title: ClassVar[str] = "prior"

    guidance: Annotated[float, Field(ge=0, le=50, description="a number from 0 to 50")] = 2.0
    steps: Steps = 64
    choose: Annotated[int, Field(ge=1, le=64, description="a whole number from 1 to 64")] = 2


class GenerateRequest(Record):
    """One request for pictures; frozen, and valid once it exists.

    What is wanted
        prompt, negative: what is wanted and what is not, see `ldm.pipeline.text.prompt` for what may stand in them
        emphasis:         whose rules `(word:1.2)` follows; "ignore" reads the marks but gives no weight, "literal"
                          takes every mark as text
        clip_skip:        the text layer that is looked at, counted from the last one, 1; None: as the model was trained
        empty_negative:   what an empty `negative` is: the encoded empty text, or zeros (as SDXL in diffusers)
        original_size, crop: what SDXL is told: the (width, height) that a picture had before it was scaled, by default
                          its own, and the (left, top) of where it was cut from it
        width, height:    in pixels; None: the model's own size, in the shape of the first that there is of `image`,
                          `depth` and the first control's picture. With `mask` or `extend` what is drawn at before it
                          is scaled back to its place, None: the place's own size where the model draws such; the
                          picture itself keeps the size of `image`, and `extend` more

    How it is drawn
        steps:            of the sampler, 1..1000
        sampler:          a key of `ldm.samplers.SAMPLERS`
        schedule:         a key of `ldm.diffusion.sigmas.SCHEDULES`; None: what suits the sampler and the model
        eta:              0..1, how much noise a sampler of TAKES_ETA adds on the way; None: its own
        guidance:         0..50, how far the result leans towards the prompt; 1 leaves guidance and `negative` out
        rescale:          0..1, how much of the contrast that guidance adds is taken back
        guidance_start, guidance_end: the shares of the steps between which guidance acts (Kynkaanniemi et al. 2024)
        perturbed:        0..20, how far the result leans away from what the U-Net draws with its middle self-attention
                          switched off (Ahn et al. 2024); 0: not at all
        apg:              guidance by projection; None: plain
        reuse:            1..10, of so many calls of the U-Net one computes its inner half, whose features the others
                          take over ("DeepCache"): faster, and less exact; 1: all do
        merge_tokens:     0..0.75, the share of tokens that the self-attention of the U-Net's finest level merges with
                          those that they are most alike: faster for large pictures, and less exact; 0: none
        refine_at:        0..1, the share of the steps after which the model's refiner goes on; None: never
        highres:          a second pass at a larger size

    Chance
        seed:             of the first picture, picture i has seed + i; None or -1: one is drawn, and recorded
        count:            how many pictures
        variation_seed, variation_strength: another seed, also counted up, and how far, 0..1, the start noise has moved
                          towards that seed's along the arc between them (slerp)
        rng:              whose start noise a seed gives: "cpu" PyTorch's, each picture from a seed of its own; "philox"
                          AUTOMATIC1111's on a GPU; "comfy" ComfyUI's, where all pictures of a batch have one seed
        batch_index:      with "comfy", the place of the first picture in that batch, 0..63

    Pictures to start from: PNG, JPEG or WebP files' bytes (or base64 text)
        image:            is noised and redrawn; what the x4 upscaler enlarges
        strength:         0..1, the share of the steps that are run over `image`, rounded down; None: 0.75, or 1 where
                          nothing of `image` is to be seen: with `extend`, or a `mask_fill` other than "original"
        mask:             of the size of `image`: white is redrawn, black kept bit for bit, and grey by `mask_soft`;
                          colours by their luminance, transparent as black
        mask_invert:      black is redrawn and white kept
        mask_blur:        0..64 pixels over which the redrawn fades into the kept, inwards from the edge of the mask;
                          fewer where the mask is thinner
        mask_fill:        what the redrawn part starts from: the picture, noise alone, or a latent of zeros; the last
                          two with `mask_soft` only where it is white
        mask_soft:        a pixel's grey is its share of the steps that are run, rounded down, and it is kept bit for
                          bit where that is none (Levin and Fried 2023); else from half grey on it is redrawn
        only_masked:      draw the mask and what is around it alone, at the model's size, and scale it back
        mask_padding:     0..1024 pixels that are then shown around the mask
        extend:           (left, top, right, bottom) pixels by which `image` is continued beyond its edges; it starts
                          from its mirror image, into which the drawn fades over `mask_blur` pixels
        depth:            a depth map, near is white, for a model that takes one; 8 or 16 bit
        vary:             a picture whose content is varied, for a model that takes one (our decoder, SD 2.1 unCLIP)
        vary_noise:       0..999, how freely
        vary_inverted:    begin in the picture's own noise, found by running ddim backwards: with eta 0 and guidance 1
                          it is given back, and with eta up to 1 it varies the more
        prior:            have the model's prior make of the prompt's words, without their weights, what the decoder is
                          told of a picture, in place of `vary`; None: it is told the text alone
        upscale_noise:    0..350, how much noise the x4 upscaler puts over `image` before it looks at it
        controls:         pictures that the result is held to by control networks; several add up

    Anything out of range, of another type or of another name raises `LdmError`, in one line.
    """

    prompt: Text
    negative: Text = ""
    emphasis: Emphasis = "a1111"
    clip_skip: Annotated[int | None, Field(ge=1, le=32, description="a whole number from 1 to 32")] = None
    empty_negative: Literal["encoded", "zeros"] = "encoded"
    original_size: Annotated[
        tuple[Annotated[int, Field(ge=1, le=2**16)], Annotated[int, Field(ge=1, le=2**16)]] | None,
        BeforeValidator(tuple_of_list),
        Field(description="a width and a height from 1 to 65536"),
    ] = None
    crop: Annotated[
        tuple[Annotated[int, Field(ge=0, le=2**16)], Annotated[int, Field(ge=0, le=2**16)]],
        BeforeValidator(tuple_of_list),
        Field(description="a left and a top from 0 to 65536"),
    ] = (0, 0)
    width: Side = None
    height: Side = None
    steps: Steps = DEFAULT_STEPS
    sampler: SamplerName = DEFAULT_SAMPLER
    schedule: ScheduleName | None = None
    eta: Annotated[float | None, Field(ge=0, le=1, description="a number from 0 to 1")] = None
    guidance: Annotated[float, Field(ge=0, le=50, description="a number from 0 to 50")] = DEFAULT_GUIDANCE
    rescale: Share = 0.0
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    perturbed: Annotated[float, Field(ge=0, le=20, description="a number from 0 to 20")] = 0.0
    apg: Apg | None = None
    reuse: Annotated[int, Field(ge=1, le=10, description="a whole number from 1 to 10")] = 1
    merge_tokens: Annotated[float, Field(ge=0, le=0.75, description="a number from 0 to 0.75")] = 0.0
    refine_at: Share | None = None
    highres: HighRes | None = None
    seed: Seed | None = None
    count: Annotated[int, Field(ge=1, le=64, description="a whole number from 1 to 64")] = 1
    variation_seed: Seed | None = None
    variation_strength: Share = 0.0
    rng: Rng = "cpu"
    batch_index: Annotated[int, Field(ge=0, le=63, description="a whole number from 0 to 63")] = 0
    image: PictureBytes | None = None
    strength: Strength | None = None
    mask: PictureBytes | None = None
    mask_invert: bool = False
    mask_blur: Annotated[int, Field(ge=0, le=64, description="a whole number from 0 to 64")] = 4
    mask_fill: MaskFill = "original"
    mask_soft: bool = False
    only_masked: bool = False
    mask_padding: Annotated[int, Field(ge=0, le=1024, description="a whole number from 0 to 1024")] = 32
    extend: Annotated[
        tuple[Pixels, Pixels, Pixels, Pixels] | None,
        BeforeValidator(tuple_of_list),
        Field(description=f"four whole numbers from 0 to {MAX_EXTEND}: left, top, right, bottom"),
    ] = None
    depth: PictureBytes | None = None
    vary: PictureBytes | None = None
    vary_noise: Annotated[int, Field(ge=0, le=999, description="a whole number from 0 to 999")] = 0
    vary_inverted: bool = False
    prior: PriorUse | None = None
    upscale_noise: Annotated[int, Field(ge=0, le=350, description="a whole number from 0 to 350")] = 20
    controls: Annotated[
        tuple[Control, ...],
        BeforeValidator(tuple_of_list),
        Field(max_length=MAX_CONTROLS, description=f"a list of at most {MAX_CONTROLS} controls"),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        """Other programs' names of samplers and schedules become ours; "DPM++ 2M Karras" is both."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(name := data.get("schedule"), str):
            data["schedule"] = schedule_named(name)
        if isinstance(name := data.get("sampler"), str):
            data["sampler"], schedule = sampler_named(name)
            if data.get("schedule") is None:
                data["schedule"] = schedule
            if nearest := nearest_sampler(data["sampler"]):
                choices = ", ".join(get_args(SamplerName))
                raise LdmError(f"sampler: found {shown(name)}, expected one of {choices}; the nearest is {nearest}")
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        for name, text in (("prompt", self.prompt), ("negative", self.negative)):
            if "\0" in text:
                raise LdmError(f"{name}: found a NUL character, expected plain text")
        if self.width is not None and self.height is not None and self.width * self.height > MAX_PIXELS:
            raise LdmError(
                f"width x height: found {self.width}x{self.height}, expected at most {MAX_PIXELS} pixels in all;"
                " make it smaller"
            )
        if self.eta is not None and self.sampler not in TAKES_ETA:
            raise LdmError(f"eta: the sampler {self.sampler} takes none; those that do: {', '.join(TAKES_ETA)}")
        if self.guidance_start >= self.guidance_end:
            raise LdmError(
                f"guidance_start: found {self.guidance_start:g}, expected less than guidance_end, {self.guidance_end:g}"
            )
        if self.vary_inverted and self.sampler != "ddim":
            raise LdmError(f"vary_inverted: found with sampler {self.sampler}, expected ddim, which is run backwards")
        if self.apg is not None and self.rescale:
            raise LdmError("rescale: found together with apg, expected one of them; set rescale to 0")
        self._check_seeds()
        self._check_pictures()
        return self

    def _check_seeds(self) -> None:
        for name, seed in (("seed", self.seed), ("variation_seed", self.variation_seed)):
            if seed is not None and seed + self.count - 1 > MAX_SEED:
                raise LdmError(f"{name}: found {seed} for {self.count} pictures, expected seed + count - 1 below 2^63")
        if self.batch_index and self.rng != "comfy":
            raise LdmError(f"batch_index: found with rng {self.rng}, expected comfy, where it means something")
        if self.batch_index + self.count > MAX_COMFY_BATCH:
            raise LdmError(
                f"batch_index: found {self.batch_index} for {self.count} pictures, expected batch_index + count at most"
                f" {MAX_COMFY_BATCH}"
            )
        if self.variation_seed is not None and not self.variation_strength:
            raise LdmError("variation_seed: found without variation_strength, expected how far to go; give it too")

    def _check_pictures(self) -> None:
        """The pictures can be read, and what belongs to one is not there without it."""
        needs = (("strength", self.strength), ("mask", self.mask), ("extend", self.extend))
        if self.image is None:
            for name, value in needs:
                if value is not None:
                    raise LdmError(f"{name}: found without an image, expected one to start from; give image")
            if self.highres is not None:
                self._check_steps("highres.strength", self.highres.strength, self.highres.steps or self.steps)
        elif self.highres is not None:
            raise LdmError("highres: found together with an image, expected text alone; use strength and a larger size")
        else:
            self._check_steps("strength", self.share, self.steps)
        if self.extend is not None and not any(self.extend):
            raise LdmError("extend: found 0 pixels on every side, expected some on one; name a side")
        if self.prior is not None and self.vary is not None:
            raise LdmError("prior: found together with vary, expected one of them to say what CLIP sees; leave one out")
        for name, others in NEEDS.items():
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and all(getattr(self, other) in (None, False) for other in others):
                raise LdmError(f"{name}: found without {' or '.join(others)}, where alone it acts; give that too")
        for name in ("image", "mask", "depth", "vary"):
            if (data := getattr(self, name)) is not None:
                _check_picture("" if name == "image" else name, data)
        if self.mask is not None:
            self._check_mask(self.mask)

    def _check_mask(self, mask: bytes) -> None:
        """It has the size of the image, and something in it is to be redrawn."""
        from ldm.pipeline.images import read_mask, read_picture

        assert self.image is not None
        grey, size = read_mask(mask), read_picture(self.image).size
        if grey.size != size:
            raise LdmError(
                f"mask: found {grey.width}x{grey.height}, expected the size of image, {size[0]}x{size[1]}; scale it"
            )
        low, high = cast("tuple[int, int]", grey.getextrema())
        most = 255 - low if self.mask_invert else high
        if not (whole_steps(most / 255, self.steps_to_run) if self.mask_soft else most >= 128):
            raise LdmError("mask: found nothing to redraw, expected white somewhere; see mask_invert and mask_soft")

    @staticmethod
    def _check_steps(name: str, share: float, steps: int) -> None:
        if whole_steps(share, steps) < 1:
            raise LdmError(
                f"{name}: {share} of {steps} steps is less than one step,"
                f" expected at least {math.ceil(1000 / steps) / 1000}; raise {name} or steps"
            )

    @property
    def share(self) -> float:
        """The share of the steps that are run over `image`: `strength`, or its default; 1 where there is none."""
        if self.image is None:
            return 1.0
        unseen = self.extend is not None or self.mask_fill != "original"
        default = 1.0 if unseen else max(DEFAULT_STRENGTH, 1 / self.steps)
        return default if self.strength is None else self.strength

    @property
    def steps_to_run(self) -> int:
        """How many of the steps are run: all, or for image-to-image `strength` of them, rounded down."""
        return whole_steps(self.share, self.steps)

    def changed(self, **fields: Any) -> GenerateRequest:
        """A copy with other values, validated again."""
        return GenerateRequest(**(dict(self) | fields))


def whole_steps(share: float, steps: int) -> int:
    """A share of the steps, rounded down."""
    return math.floor(share * steps + 1e-9)  # 0.29 * 100 is a hair below 29


def _check_picture(name: str, data: bytes) -> None:
    from ldm.pipeline.images import read_picture

    try:
        read_picture(data)
    except LdmError as error:
        raise LdmError(f"{name}: {error}" if name else str(error)) from None


def as_request(request: str | GenerateRequest, fields: dict[str, Any]) -> GenerateRequest:
    """A prompt and fields, or a request and changes to it -> a request."""
    if isinstance(request, GenerateRequest):
        return request.changed(**fields) if fields else request
    return GenerateRequest(prompt=request, **fields)


def from_json(text: str | bytes) -> GenerateRequest:
    """A request from a JSON object as `record` or a client wrote it.

    Raises `LdmError` where the text is no JSON object, holds a name twice or a NaN, is nested beyond sense or is
    above 40 MiB.
    """
    if len(text) > MAX_JSON:
        raise LdmError(f"request: found {len(text)} bytes of JSON, expected at most {MAX_JSON}")
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LdmError(f"request: found no valid JSON ({error}), expected an object") from None
    if not isinstance(data, dict):
        raise LdmError(f"request: found {shown(data)}, expected a JSON object")
    return GenerateRequest(**data)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise LdmError(f"request: found the field {shown(name)} twice, expected it once")
        found[name] = value
    return found


def _no_constant(name: str) -> float:
    raise LdmError(f"request: found {name}, expected finite numbers")
