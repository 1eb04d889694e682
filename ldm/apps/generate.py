"""`ldm generate` and `ldm img2img`: prompts in, PNG files out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from ldm.apps.controls import MAX_PICTURE_FILE, control_files, controls_of
from ldm.apps.options import Generate, Img2Img, Model, Prompts, Sampling
from ldm.apps.progress import Bar, Stopwatch, progress_bar, to_stderr
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, output_path, read_file
from ldm.pipeline.request import GenerateRequest, shown

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion
    from ldm.pipeline.picture import Picture
    from ldm.weights.embeddings import Embedding

MAX_PROMPT_FILE = 16 * 2**20


def generate(command: Generate | Img2Img) -> None:
    """Draw all pictures that the command asks for; each is on disk before the next prompt begins."""
    watch = Stopwatch()
    requests = requests_of(command)
    check_output(command.output.output)
    with progress_bar(sum(request.count for request in requests)) as bar:
        model = load_model(command.model, watch)
        if files := control_files(command.controls):
            pickles, folders = command.model.allow_pickle, command.model.models or None
            model = model.with_controls(files, allow_pickle=pickles, models=folders)
            watch.mark("loading")
        for rule in model.origin.rules if command.output.verbose else ():
            to_stderr(f"model: {rule}")
        model_hash = _hash_in_background(model.origin.path)
        done = 0
        for request in requests:
            for picture in draw(model, request, bar, watch, done):
                path = output_path(command.output.output, request.prompt, picture.seed)
                path = picture.save(path, model_hash=model_hash.result())
                watch.mark("saving")
                bar.say(_line(picture, path, command.output.json))
            done += request.count
    if command.output.verbose:
        to_stderr(f"time: {watch}")


def requests_of(command: Generate | Img2Img) -> list[GenerateRequest]:
    """A validated request for each prompt. Raises `LdmError` before anything slow has begun."""
    fields = request_fields(command.sampling)
    fields |= {"seed": command.prompts.seed, "count": command.prompts.count}
    fields |= {"controls": controls_of(command.controls)}
    if isinstance(command, Img2Img):
        fields |= {"image": read_file(command.image, MAX_PICTURE_FILE), "strength": command.strength}
    return [GenerateRequest(prompt=prompt, **fields) for prompt in _prompts(command.prompts)]


def request_fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of a request that these flags name."""
    width, height = _size(sampling.size)
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


def load_model(model: Model, watch: Stopwatch) -> LatentDiffusion:
    """Import torch and all that is ours, then load the model."""
    import ldm.tasks  # noqa: F401 - for its time to count as imports
    from ldm.pipeline.load import load

    watch.mark("imports")
    prediction = None if model.prediction == "auto" else model.prediction
    loaded = load(
        model.file,
        vae=model.vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        device=model.device,
        dtype=model.dtype,
        prediction=prediction,
        allow_pickle=model.allow_pickle,
        models=model.models or None,
    )
    for warning in loaded.origin.warnings:
        to_stderr(f"warning: {warning}")
    if model.lora:
        from ldm.apps.adapters import read_adapters

        loaded = loaded.with_adapters(read_adapters(model.lora, model.models, allow_pickle=model.allow_pickle))
    if model.embedding:
        loaded = loaded.with_embeddings(_embeddings(model))
    watch.mark("loading")
    return loaded


def _embeddings(model: Model) -> list[Embedding]:
    """Those of the files named, each said by its name, which a file may give."""
    from ldm.weights.embeddings import read_embeddings
    from ldm.weights.find import locate, model_roots
    from ldm.weights.io import printable

    found = []
    for given in model.embedding:
        path = locate("embedding", given, model_roots(model.models or None))
        for embedding in read_embeddings(path, allow_pickle=model.allow_pickle):
            to_stderr(f"embedding: {printable(embedding.name)}, {embedding.places} tokens ({printable(str(path))})")
            for name in embedding.unused:
                to_stderr(f"warning: {printable(embedding.name)}: {name} is left out, it acts behind the text encoder")
            found.append(embedding)
    return found


def draw(model: LatentDiffusion, request: GenerateRequest, bar: Bar, watch: Stopwatch, done: int) -> Iterator[Picture]:
    """The request's pictures as they come, the bar moving with the steps; `done` pictures came before."""
    from ldm.pipeline.sample import Progress
    from ldm.tasks import run

    for event in run(model, request):
        if isinstance(event, Progress):
            watch.mark("denoising" if event.done else "text")
            pictures = done + event.first + event.count * event.done / event.steps
            bar.at(f"{_shortened(request.prompt)}  step {event.done}/{event.steps}", pictures)
            continue
        watch.mark("decoding")
        for note in event.notes:
            to_stderr(f"note: {note}")
        yield event


def _prompts(given: Prompts) -> list[str]:
    prompts = list(given.prompts)
    if given.prompt_file is not None:
        try:
            text = read_file(given.prompt_file, MAX_PROMPT_FILE).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise LdmError(f"{given.prompt_file}: is not UTF-8 text, expected a prompt on each line") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise LdmError('prompt: found none, expected what to draw; try: ldm generate "a red apple"')
    return prompts


def _size(text: str) -> tuple[int | None, int | None]:
    """ "128x96" -> (128, 96); "128" -> a square; "" -> the model's own."""
    if not text:
        return None, None
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and len(side) < 10 for side in sides):
        raise LdmError(f"size: found {shown(text)}, expected WIDTHxHEIGHT, as 128x128")
    return int(sides[0]), int(sides[-1])


def _hash_in_background(path: Path | None) -> Future[str | None]:
    """The SHA-256 of the model's file, computed while it draws; None if there is no file to read."""
    future: Future[str | None] = Future()
    if path is None:
        future.set_result(None)
        return future

    def compute() -> None:
        try:
            with path.open("rb") as file:
                future.set_result(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            future.set_result(None)
        except BaseException as error:  # or who asks for the result would wait for ever
            future.set_exception(error)

    Thread(target=compute, daemon=True).start()
    return future


def _line(picture: Picture, path: Path, as_json: bool) -> str:
    if not as_json:
        return f"{path}  seed {picture.seed}  {picture.seconds:.1f} s"
    facts = {
        "path": str(path),
        "seed": picture.seed,
        "seconds": round(picture.seconds, 3),
        "prompt": picture.request.prompt,
        "width": picture.image.width,
        "height": picture.image.height,
        "notes": list(picture.notes),
    }
    return json.dumps(facts)


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 40 else line[:39] + "…"
