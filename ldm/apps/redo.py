"""`ldm redo IMAGE`: make a picture again from what its file tells, and say how far the two differ.

What stands in a file is anyone's, so it never chooses what is opened. The model is the one that ships, where its hash
is the one told; else the one that --model names; else, in folders that --models names on this command line, the file
of the name told, where its hash is the one told. Adapters, embeddings and pictures are given again, or found by name
in those folders where the prompt names them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ldm.apps.flags.commands import Redo
from ldm.apps.flags.controls import MAX_PICTURE_FILE
from ldm.apps.flags.shared import Asking, Controls, Details, Model, Refining
from ldm.apps.generate import adapted, draw, load_plain, with_their_adapters
from ldm.apps.output.progress import Stopwatch, progress_bar, to_stderr
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, names_file, read_file, sha256_of, stem_of
from ldm.pipeline.images import read_picture
from ldm.pipeline.metadata.read import Metadata, read_metadata
from ldm.pipeline.metadata.remake import PICTURES, Remake
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.text.prompt import adapters_in
from ldm.pipeline.validation import shown

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SUFFIXES = {"JPEG": ".jpg", "WEBP": ".webp"}


@dataclass(frozen=True)
class Difference:
    """How far two pictures of one size differ, in 8-bit levels.

    psnr: in dB, the peak signal to noise ratio; None where they are the same bit for bit
    """

    identical: bool
    mean: float
    largest: int
    psnr: float | None


def difference(one: Image.Image, other: Image.Image) -> Difference | None:
    """The difference of two pictures' RGB levels; None where they are not of one size."""
    if one.size != other.size:
        return None
    levels = np.abs(np.asarray(one.convert("RGB"), dtype=int) - np.asarray(other.convert("RGB"), dtype=int))
    squared = float((levels.astype(float) ** 2).mean())
    psnr = 10 * math.log10(255**2 / squared) if squared else None
    return Difference(not levels.any(), float(levels.mean()), int(levels.max()), psnr)


def redo(command: Redo) -> None:
    """Draw the picture again; what cannot be matched is said first, and the difference last.

    Raises `LdmError` where the file tells nothing, or something is missing that has to be given.
    """
    watch = Stopwatch()
    check_output(command.output)
    found = read_metadata(command.original)
    remake = found.remake()
    if remake is None:
        raise LdmError(f"{command.original}: says nothing of how it was made that can be read; see ldm show")
    original = read_picture(read_file(command.original, MAX_PICTURE_FILE))
    request = request_of(command, remake)
    command = replace(command, prior=_prior_file(command, request, found))
    for line in remake.misses:
        to_stderr(f"cannot be matched: {line}")
    model = replace(command.model, file=model_file(command, remake), dtype=_dtype(command, found))
    request = _without_lost_adapters(request, model)
    place, size = _batch(found)
    with progress_bar(size) as bar:
        loaded = _loaded(command, model, request, watch)
        digest = None if loaded.origin.path is None else sha256_of(loaded.origin.path)
        for line in mismatches(loaded, digest, found, remake):
            to_stderr(f"warning: {line}")
        from ldm.pipeline.sample import together

        for drawn in draw(loaded, request if size == 1 else together(request, place, size), bar, watch, 0):
            if size > 1 and drawn.index != place:
                continue
            path = drawn.save(_target(command, found), model_hash=digest)
            bar.say(_line(path, difference(original, read_picture(read_file(path, MAX_PICTURE_FILE))), command, remake))


def request_of(command: Redo, remake: Remake) -> GenerateRequest:
    """The request, with the pictures given; a word about those that are other files than the ones told."""
    given = {name: getattr(command, name) for name in PICTURES}
    pictures = {name: read_file(path, MAX_PICTURE_FILE) for name, path in given.items() if path is not None}
    controls = [read_file(path, MAX_PICTURE_FILE) for path in command.control_image]
    request = remake.request(pictures, controls)
    if (request.refine_at is None) != (command.refiner is None):
        raise LdmError(
            "refiner: found one, but the picture was made without; leave it out"
            if command.refiner is not None
            else "refiner: found none, expected the model that drew the last steps; give it by --refiner"
        )
    if remake.controls and not command.control:
        raise LdmError("control: found none, expected each ControlNet that held the picture; give it by --control")
    if request.seed in (None, -1):
        to_stderr("cannot be matched: seed: none is told, so one is drawn")
    told = [(given[name], data, remake.pictures[name]) for name, data in pictures.items()]
    told += [
        (path, data, known.get("image_sha256"))
        for path, data, known in zip(command.control_image, controls, remake.controls, strict=True)
    ]
    for path, data, digest in told:
        if digest is not None and digest != hashlib.sha256(data).hexdigest():
            to_stderr(f"warning: {path}: is not the file that the picture was made from, whose SHA-256 is {digest}")
    return request


def model_file(command: Redo, remake: Remake) -> Path:
    """The model to load: one that ships, or one that is named or found. Raises `LdmError` where it has to be named."""
    from ldm.pipeline.load import shipped_decoder, shipped_model
    from ldm.weights.find import find, model_roots

    if command.model.file is not None:
        return command.model.file
    for shipped in (shipped_model, shipped_decoder):
        try:
            if same_file(path := shipped(), remake.model_hash):
                return path
        except LdmError:  # it is not there
            pass
    if command.model.models and remake.model:
        path = find("checkpoint", remake.model, model_roots(command.model.models))
        if same_file(path, remake.model_hash):
            return path
    digits = f"[{shown(remake.model_hash[:10])[1:-1]}]" if remake.model_hash else ""
    told = " ".join(filter(None, [shown(remake.model) if remake.model else "", digits])) or "not told"
    raise LdmError(f"model: the picture's is {told}, and none that ships; name its file by --model")


def _prior_file(command: Redo, request: GenerateRequest, found: Metadata) -> Path | None:
    """The prior that the request asks: the one that is named, or the one that ships. Raises `LdmError` without one."""
    if request.prior is None:
        if command.prior is not None:
            raise LdmError("prior: found one, but the picture was made without; leave it out")
        return None
    if command.prior is not None:
        return command.prior
    from ldm.pipeline.clip.prior import SHIPPED_PRIOR

    parts = None if found.record is None else found.record.get("parts")
    parts = parts if isinstance(parts, list) else []
    told = [part for part in parts if isinstance(part, dict) and part.get("kind") == "prior"]
    if any(isinstance(part.get("hash"), str) and same_file(SHIPPED_PRIOR, part["hash"]) for part in told):
        return SHIPPED_PRIOR
    known = f" ({_named(told[0])})" if told else ""
    raise LdmError(f"prior: found none, expected the one that was asked what to draw{known}; give it by --prior")


def same_file(path: Path, told: str | None) -> bool:
    """Whether a file has the hash told: the first digits of its SHA-256, or the web UI's old 8 digits."""
    if told is None or not re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{10,64}", told) or not path.is_file():
        return False
    if len(told) == 8:
        from ldm.weights.hashes import old_short_hash

        return old_short_hash(path) == told
    return (sha256_of(path) or "").startswith(told)


def _batch(found: Metadata) -> tuple[int, int]:
    """The picture's place among how many that were drawn at once, which decides how sums are rounded."""
    told = None if found.record is None else found.record.get("batch")
    if isinstance(told, list) and len(told) == 2 and all(isinstance(number, int) for number in told):
        return told[0], told[1]
    return 0, 1


def _dtype(command: Redo, found: Metadata) -> Dtype:
    """The precision told, where none is asked for and every machine has it."""
    told = None if found.record is None else found.record.get("dtype")
    return told if command.model.dtype == "auto" and told in ("float32", "bfloat16") else command.model.dtype


def _without_lost_adapters(request: GenerateRequest, model: Model) -> GenerateRequest:
    """The request without its <lora:...> where nothing says what they are."""
    text, named = adapters_in(request.prompt) if request.emphasis != "literal" else ("", ())
    if not named or model.models or model.lora:
        return request
    names = ", ".join(shown(adapter.name) for adapter in named[:20])
    to_stderr(f"warning: prompt: without its adapters ({names}); give them by --lora, or their folder by --models")
    return request.changed(prompt=text)


def _loaded(command: Redo, model: Model, request: GenerateRequest, watch: Stopwatch) -> LatentDiffusion:
    """The model with all that is given, and the adapters that the prompt names, where --models says where they are."""
    if not model.models:
        request = request.changed(prompt="", emphasis="literal")  # so that no folder of LDM_MODELS is searched
    groups, adapters = with_their_adapters([request], model)
    controls = Controls(control=command.control, control_image=command.control_image)
    details = Details(asking=Asking(prior=command.prior), controls=controls, refining=Refining(refiner=command.refiner))
    wanted = next(iter(groups))
    return adapted(load_plain(model, watch, details, [request], adapted=bool(wanted)), wanted, adapters)


def mismatches(model: LatentDiffusion, digest: str | None, found: Metadata, remake: Remake) -> Iterator[str]:
    """A line for each thing of the model that is not as it was told."""
    path = model.origin.path
    if remake.model_hash is None:
        yield "model: no hash was told to check it by"
    elif path is None or not same_file(path, remake.model_hash):
        yield f"model: is {(digest or 'unknown')[:10]}, but the picture's was {shown(remake.model_hash)}"
    if (record := found.record) is None:
        return
    if (dtype := str(model.dtype).removeprefix("torch.")) != (told := record.get("dtype")):
        yield f"dtype: is {dtype}, but the picture's was {shown(told)}; see --dtype"
    if (compiled := model.compiler is not None) != (told := record.get("compiled", False)):
        yield f"compiled: is {compiled}, but the picture's was {shown(told)}; see --compile"
    if (told := record.get("store", "full")) != model.store:
        yield f"store: is {model.store}, but the picture's was {shown(told)}; see --store"
    prior = () if model.prior is None else model.prior.parts
    others = (*model.origin.parts, *prior, *(() if model.refiner is None else model.refiner.origin.as_refiner))
    parts = [{"kind": part.kind, "name": part.name, "hash": part.hash} for part in others]
    embeddings = [{"name": embedding.name, "hash": embedding.hash} for embedding in model.embeddings]
    given = {"parts": parts, "adapters": [asdict(adapter) for adapter in model.adapters], "embeddings": embeddings}
    for kind, here in given.items():
        there = record.get(kind)
        there = there if isinstance(there, list) else []
        for missing in (one for one in there if one not in here):
            yield f"{kind}: the picture was made with {_named(missing)}, which is not given, or not as it was"
        for spare in (one for one in here if one not in there and kind != "embeddings"):
            yield f"{kind}: the picture was made without {_named(spare)}"


def _named(item: Any) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in item.items()) if isinstance(item, dict) else shown(item)


def _target(command: Redo, found: Metadata) -> Path:
    """Where the picture goes: a file of the original's kind beside no other, unless one is named."""
    if names_file(command.output):
        return command.output
    return command.output / f"{stem_of(command.original.stem)}-redo{SUFFIXES.get(found.format, '.png')}"


def _line(path: Path, between: Difference | None, command: Redo, remake: Remake) -> str:
    if command.json:
        facts = {"path": str(path), "original": str(command.original), "misses": list(remake.misses)}
        return json.dumps(facts | {"difference": None if between is None else asdict(between)})
    if between is None:
        return f"{path}  of another size than the original"
    if between.identical:
        return f"{path}  bit-identical to the original"
    psnr = f"PSNR {between.psnr:.1f} dB" if between.psnr is not None else ""
    return f"{path}  differs by {between.mean:.2f} levels of 255 on average, {between.largest} at most; {psnr}"
