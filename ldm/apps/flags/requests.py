"""From flags to validated requests, before anything slow has begun."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, assert_never

from ldm.apps.flags.commands import Depth2Img, Generate, Img2Img, Inpaint, Outpaint, TaskCommand, Upscale, Variations
from ldm.apps.flags.controls import MAX_PICTURE_FILE, controls_of
from ldm.apps.flags.shared import Asking, Chance, Details, Prompts, Reading, Refining, Sampling, SecondPass, Steering
from ldm.errors import LdmError
from ldm.pipeline.files import read_file
from ldm.pipeline.request import DEFAULT_SAMPLER, Apg, GenerateRequest, HighRes, PriorUse
from ldm.pipeline.validation import shown

MAX_PROMPT_FILE = 16 * 2**20
REFINE_AT = 0.8
"""Where SDXL's refiner takes over (Podell et al. 2023, section 2.5: the last 200 of 1000 noise levels)."""


def requests_of(command: TaskCommand) -> list[GenerateRequest]:
    """A validated request for each prompt, or several where wildcards make its pictures' prompts differ.

    Raises `LdmError` for whatever is wrong with the flags, the prompts or the pictures.
    """
    fields = sampling_fields(command.sampling) | detail_fields(command.details) | _task_fields(command)
    fields |= {"seed": command.prompts.seed, "count": command.prompts.count}
    wordless = isinstance(command, Upscale | Variations)
    requests = [GenerateRequest(prompt=prompt, **fields) for prompt in _prompts(command.prompts, wordless)]
    folders = command.details.reading.wildcards
    return [drawn for request in requests for drawn in expanded(request, folders)]


def expanded(request: GenerateRequest, folders: Sequence[Path]) -> list[GenerateRequest]:
    """The request with every picture's wildcards replaced by that picture's seed; equal neighbours stay together."""
    from ldm.pipeline.text.wildcards import expand

    texts = (request.prompt, request.negative)
    if request.emphasis == "literal" or not any(mark in text for text in texts for mark in ("{", "__")):
        return [request]
    seed = secrets.randbelow(2**32) if request.seed in (None, -1) else request.seed
    assert seed is not None
    pictures = [(tuple(expand(text, seed + index, folders) for text in texts), index) for index in range(request.count)]
    requests = []
    for (prompt, negative), group in groupby(pictures, key=lambda picture: picture[0]):
        indices = [index for _, index in group]
        own: dict[str, Any] = {"prompt": prompt, "negative": negative, "count": len(indices)}
        if request.rng == "comfy":
            own |= {"seed": seed, "batch_index": request.batch_index + indices[0]}
        else:
            own |= {"seed": seed + indices[0]}
        if request.variation_seed not in (None, -1):
            own |= {"variation_seed": request.variation_seed + indices[0]}
        requests.append(request.changed(**own))
    return requests


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of a request that these flags name."""
    width, height = size_of("size", sampling.size) or (None, None)
    return {
        "negative": sampling.negative,
        "width": width,
        "height": height,
        "steps": sampling.steps,
        "sampler": sampling.sampler,
        "schedule": sampling.schedule or None,
        "guidance": sampling.guidance,
        "rescale": sampling.rescale,
        "eta": sampling.eta,
        "clip_skip": sampling.clip_skip,
    }


def detail_fields(details: Details) -> dict[str, Any]:
    """The fields that these flags name."""
    return (
        _reading_fields(details.reading)
        | _steering_fields(details.steering)
        | _chance_fields(details.chance)
        | {"refine_at": _refine_at(details.refining), "controls": controls_of(details.controls)}
        | {"prior": prior_use(details.asking) if asks(details.asking) else None}
    )


def asks(asking: Asking) -> bool:
    """Whether a prior is asked. Raises `LdmError` for flags that need --prior."""
    if asking.prior is None and asking != Asking():
        raise LdmError("prior: found none for the flags that go with it, expected its file; give --prior FILE")
    return asking.prior is not None


def prior_use(asking: Asking) -> PriorUse:
    """How these flags ask a prior."""
    return PriorUse(guidance=asking.prior_guidance, steps=asking.prior_steps, choose=asking.prior_choose)


def highres_of(given: SecondPass) -> HighRes | None:
    """The second pass, if there is one. Raises `LdmError` for flags that need --highres."""
    if given.highres is None:
        if given != SecondPass():
            raise LdmError("highres: found none for the flags that go with it, expected a scale; give --highres 2")
        return None
    return HighRes(
        scale=given.highres, upscale=given.highres_upscale, strength=given.highres_strength, steps=given.highres_steps
    )


def size_of(flag: str, text: str) -> tuple[int, int] | None:
    """ "128x96" -> (128, 96); "128" -> a square; "" -> None."""
    if not text:
        return None
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and len(side) < 10 for side in sides):
        raise LdmError(f"{flag}: found {shown(text)}, expected WIDTHxHEIGHT, as 128x128")
    return int(sides[0]), int(sides[-1])


def picture(path: Path) -> bytes:
    """A picture file's bytes, at most 20 MiB."""
    return read_file(path, MAX_PICTURE_FILE)


def _task_fields(command: TaskCommand) -> dict[str, Any]:
    """What each task has for itself."""
    match command:
        case Generate():
            return {"highres": highres_of(command.second_pass)}
        case Img2Img():
            return {"image": picture(command.image), "strength": command.strength}
        case Inpaint():
            return {
                "image": picture(command.image),
                "mask": picture(command.mask),
                "strength": command.strength,
                "mask_invert": command.mask_invert,
                "mask_blur": command.mask_blur,
                "mask_fill": command.mask_fill,
                "mask_soft": command.mask_soft,
                "only_masked": command.only_masked,
                "mask_padding": command.mask_padding,
            }
        case Outpaint():
            sides = (command.left, command.top, command.right, command.bottom)
            extend = tuple(side if side is not None else command.all or 0 for side in sides)
            if not any(extend):
                raise LdmError(
                    "outpaint: found no pixels to add, expected some on a side; give --all N, or --left N ..."
                )
            strength, blur = command.strength, command.mask_blur
            return {"image": picture(command.image), "extend": extend, "strength": strength, "mask_blur": blur}
        case Upscale():
            return {"image": picture(command.image), "upscale_noise": command.noise}
        case Variations():
            fields = {"vary": picture(command.image), "vary_noise": command.noise, "vary_inverted": command.inverted}
            backwards = command.inverted and command.sampling.sampler == DEFAULT_SAMPLER
            return fields | ({"sampler": "ddim"} if backwards else {})
        case Depth2Img():
            if (command.depth is None) == (command.depth_model is None):
                raise LdmError("depth: found both or neither, expected one of --depth FILE and --depth-model FOLDER")
            depth = None if command.depth is None else picture(command.depth)
            return {"image": picture(command.image), "strength": command.strength, "depth": depth}
        case other:
            assert_never(other)


def _reading_fields(reading: Reading) -> dict[str, Any]:
    crop = reading.crop.replace(" ", "").split(",") if reading.crop else ["0", "0"]
    if len(crop) != 2 or not all(side.isascii() and side.isdigit() and len(side) < 10 for side in crop):
        raise LdmError(f"crop: found {shown(reading.crop)}, expected LEFT,TOP, as 0,64")
    return {
        "emphasis": reading.emphasis,
        "empty_negative": reading.empty_negative,
        "original_size": size_of("original-size", reading.original_size),
        "crop": (int(crop[0]), int(crop[1])),
    }


def _steering_fields(steering: Steering) -> dict[str, Any]:
    given = {"parallel": steering.apg_parallel, "norm": steering.apg_norm, "momentum": steering.apg_momentum}
    given = {name: value for name, value in given.items() if value is not None}
    return {
        "guidance_start": steering.guidance_start,
        "guidance_end": steering.guidance_end,
        "perturbed": steering.perturbed,
        "apg": Apg(**given) if steering.apg or given else None,
        "reuse": steering.reuse,
        "merge_tokens": steering.merge_tokens,
    }


def _chance_fields(chance: Chance) -> dict[str, Any]:
    return {
        "variation_seed": chance.variation_seed,
        "variation_strength": chance.variation_strength,
        "rng": chance.rng,
        "batch_index": chance.batch_index,
    }


def _refine_at(refining: Refining) -> float | None:
    if refining.refiner is None:
        if refining.refine_at is not None:
            raise LdmError("refine-at: found without a refiner, expected its file; give --refiner")
        return None
    return REFINE_AT if refining.refine_at is None else refining.refine_at


def _prompts(given: Prompts, wordless: bool) -> list[str]:
    """wordless: whether a task needs no words."""
    prompts = list(given.prompts)
    if given.prompt_file is not None:
        try:
            text = read_file(given.prompt_file, MAX_PROMPT_FILE).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise LdmError(f"{given.prompt_file}: is not UTF-8 text, expected a prompt on each line") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts and not wordless:
        raise LdmError('prompt: found none, expected what to draw; try: ldm generate "a red apple"')
    return prompts or [""]
