"""What may be asked of a model: one validated record, the same for the library, the command line and a server.

Nothing here imports torch, so that a wrong request is answered at once.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ldm.errors import LdmError

SamplerName = Literal[
    "ddim", "ddpm", "plms", "euler", "euler-a", "heun", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-sde", "unipc", "lcm"
]
ScheduleName = Literal["karras", "exponential", "sgm-uniform", "linspace", "leading", "trailing", "lcm"]

TAKES_ETA = ("ddim", "euler-a", "dpmpp-2m-sde", "dpmpp-sde")
"""The samplers that have an `eta`."""

DEFAULT_STEPS = 24
DEFAULT_SAMPLER: SamplerName = "dpmpp-2m"
DEFAULT_GUIDANCE = 5.0
DEFAULT_STRENGTH = 0.75

MAX_PIXELS = 2048 * 1536
MAX_SEED = 2**63 - 1
MAX_JSON = 40 * 2**20

Side = Annotated[
    int | None,
    Field(ge=64, le=2048, multiple_of=8, description="a whole number from 64 to 2048 that is a multiple of 8"),
]
Text = Annotated[str, Field(max_length=4000, description="a text of at most 4000 characters")]


_STANDARD_ALPHABET = str.maketrans("-_", "+/")  # pydantic writes base64 as URLs have it


def _bytes_of_base64(value: object) -> object:
    """JSON has no bytes: base64 text, also as a `data:` URL, stands for them. No text is ever taken as a path."""
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()).translate(_STANDARD_ALPHABET), validate=True)
    except ValueError:
        raise LdmError("image: found text that is not base64, expected the bytes of a picture") from None


def _tuple(value: object) -> object:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


PictureBytes = Annotated[bytes, BeforeValidator(_bytes_of_base64), Field(description="a picture's bytes")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]


class Control(BaseModel):
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

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", ser_json_bytes="base64")

    network: Annotated[str, Field(min_length=1, max_length=255, description="the name of a control network")]
    image: PictureBytes
    weight: Annotated[float, Field(ge=0, le=2, description="a number from 0 to 2")] = 1.0
    start: Share = 0.0
    end: Share = 1.0
    guess: bool = False
    canny: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise LdmError(f"control: {_describe(error, cls.model_fields)}") from None

    @model_validator(mode="after")
    def _fits_together(self) -> Control:
        if self.start >= self.end:
            raise LdmError(f"control: start: found {self.start:g}, expected less than end, {self.end:g}")
        if self.canny and importlib.util.find_spec("cv2") is None:
            raise LdmError("control: canny: needs OpenCV, which is not installed; pip install opencv-python-headless")
        from ldm.pipeline.images import read_picture

        try:
            read_picture(self.image)
        except LdmError as error:
            raise LdmError(f"control: {error}") from None
        return self

    def record(self) -> dict[str, Any]:
        """What a picture's metadata keeps: every field, with the hash of `image` in its place."""
        digest = hashlib.sha256(self.image).hexdigest()
        return self.model_dump(mode="json", exclude={"image"}) | {"image_sha256": digest}


class GenerateRequest(BaseModel):
    """One request for pictures; frozen, and valid once it exists.

    prompt, negative: what is wanted and what is not
    width, height:    in pixels; None: the model's own size, in the shape of `image`, or of the first control's picture,
                      where there is one
    steps:            of the sampler, 1..1000
    sampler:          a key of `ldm.samplers.SAMPLERS`
    schedule:         a key of `ldm.diffusion.sigmas.SCHEDULES`; None: what suits the sampler and the model
    guidance:         0..50, how far the result leans towards the prompt; 1 leaves guidance and `negative` out
    rescale:          0..1, how much of the contrast that guidance adds is taken back
    eta:              0..1, how much noise a sampler of TAKES_ETA adds on the way; None: its own
    seed:             of the first picture, picture i has seed + i; None or -1: one is drawn, and recorded
    count:            how many pictures
    image:            a PNG, JPEG or WebP file's bytes (or base64 text) to start from
    strength:         0..1, the share of the steps that are run over `image`, rounded down; None: 0.75
    clip_skip:        the text layer that is looked at, counted from the last one, 1; None: as the model was trained
    empty_negative:   what an empty `negative` is: the encoded empty text, or zeros (as SDXL in diffusers)
    controls:         pictures that the result is held to; several add up

    Anything out of range, of another type or of another name raises `LdmError`, in one line.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", ser_json_bytes="base64")

    prompt: Text
    negative: Text = ""
    width: Side = None
    height: Side = None
    steps: Annotated[int, Field(ge=1, le=1000, description="a whole number from 1 to 1000")] = DEFAULT_STEPS
    sampler: SamplerName = DEFAULT_SAMPLER
    schedule: ScheduleName | None = None
    guidance: Annotated[float, Field(ge=0, le=50, description="a number from 0 to 50")] = DEFAULT_GUIDANCE
    rescale: Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")] = 0.0
    eta: Annotated[float | None, Field(ge=0, le=1, description="a number from 0 to 1")] = None
    seed: Annotated[
        int | None, Field(ge=-1, le=MAX_SEED, description="a whole number from 0 to 2^63 - 1, or -1 for a random one")
    ] = None
    count: Annotated[int, Field(ge=1, le=64, description="a whole number from 1 to 64")] = 1
    image: Annotated[bytes | None, BeforeValidator(_bytes_of_base64), Field(description="a picture's bytes")] = None
    strength: Annotated[float | None, Field(gt=0, le=1, description="a number above 0, at most 1")] = None
    clip_skip: Annotated[int | None, Field(ge=1, le=32, description="a whole number from 1 to 32")] = None
    empty_negative: Literal["encoded", "zeros"] = "encoded"
    controls: Annotated[
        tuple[Control, ...], BeforeValidator(_tuple), Field(max_length=8, description="a list of at most 8 controls")
    ] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise LdmError(_describe(error, cls.model_fields)) from None

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
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise LdmError(f"seed: found {self.seed} for {self.count} pictures, expected seed + count - 1 below 2^63")
        if self.eta is not None and self.sampler not in TAKES_ETA:
            raise LdmError(f"eta: the sampler {self.sampler} takes none; those that do: {', '.join(TAKES_ETA)}")
        self._check_image()
        return self

    def _check_image(self) -> None:
        if self.image is None:
            if self.strength is not None:
                raise LdmError("strength: found without an image, expected one to start from; give image")
            return
        from ldm.pipeline.images import read_picture

        read_picture(self.image)
        if self.steps_to_run < 1:
            raise LdmError(
                f"strength: {self.strength} of {self.steps} steps is less than one step,"
                f" expected at least {math.ceil(1000 / self.steps) / 1000}; raise strength or steps"
            )

    @property
    def steps_to_run(self) -> int:
        """How many of the steps are run: all, or for image-to-image `strength` of them, rounded down."""
        if self.image is None:
            return self.steps
        share = DEFAULT_STRENGTH if self.strength is None else self.strength
        return math.floor(share * self.steps + 1e-9)  # 0.29 * 100 is a hair below 29

    def changed(self, **fields: Any) -> GenerateRequest:
        """A copy with other values, validated again."""
        return GenerateRequest(**(dict(self) | fields))

    def record(self) -> dict[str, Any]:
        """What a picture's metadata keeps: every field, with the hash of each picture in its place."""
        kept = self.model_dump(mode="json", exclude={"image", "controls"})
        kept["controls"] = tuple(control.record() for control in self.controls)
        if self.image is not None:
            kept["image_sha256"] = hashlib.sha256(self.image).hexdigest()
        return kept


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


Fields = Mapping[str, FieldInfo]


def _describe(error: ValidationError, fields: Fields) -> str:
    """The first fault, in one line: the field, what was found, what was expected."""
    fault = error.errors()[0]
    name, found = str(fault["loc"][0]) if fault["loc"] else "request", fault["input"]
    field = fields.get(name)
    choices = _choices(field)
    if fault["type"] == "extra_forbidden":
        return f"{shown(name)}: no such field{_closest(name, list(fields))}; the fields are {', '.join(fields)}"
    if fault["type"] == "missing":
        return f"{name}: found none, expected {fields[name].description}"
    if fault["type"] == "literal_error":
        return f"{name}: found {shown(found)}, expected one of {', '.join(choices)}{_closest(str(found), choices)}"
    if fault["type"] == "string_too_long":
        return f"{name}: found {len(found)} characters, expected {_expected(field)}; shorten it"
    if fault["type"] == "string_unicode":
        return f"{name}: found characters that are not valid Unicode, expected {_expected(field)}"
    hint = f"; the nearest is {_nearest(found)}" if fault["type"] == "multiple_of" else ""
    return f"{name}: found {shown(found)}, expected {_expected(field)}{hint}"


def _expected(field: FieldInfo | None) -> str:
    """The description of a field, which pydantic keeps where the annotation stood."""
    if field is None:
        return "a request"
    return f"one of {', '.join(choices)}" if (choices := _choices(field)) else field.description or "another value"


def _choices(field: FieldInfo | None) -> list[str]:
    """The choices of a field that has choices."""
    annotation = None if field is None else field.annotation
    members = [annotation, *get_args(annotation)]
    return [name for member in members for name in get_args(member) if isinstance(name, str)]


def _closest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest(side: int) -> int:
    return min(2048, max(64, 8 * round(side / 8)))


def shown(value: object) -> str:
    """A value as one short, harmless line, for messages."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, int) and abs(value) > 10**50:
        return "a huge number"
    text = json.dumps(value) if value is None or isinstance(value, bool | str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
