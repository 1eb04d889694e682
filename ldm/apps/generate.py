"""`ldm generate` and its kin (img2img, inpaint, ...): prompts and pictures in, pictures out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from ldm.apps.flags.commands import Depth2Img, TaskCommand, Upscale, Variations
from ldm.apps.flags.controls import control_files
from ldm.apps.flags.requests import picture, requests_of
from ldm.apps.flags.shared import Details, Model
from ldm.apps.output.previews import Preview, check_preview, preview_of
from ldm.apps.output.progress import Bar, Stopwatch, progress_bar, to_stderr
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, output_path, sha256_of
from ldm.pipeline.request import GenerateRequest

if TYPE_CHECKING:
    from ldm.apps.flags.adapters import Wanted
    from ldm.pipeline.latent_diffusion import LatentDiffusion
    from ldm.pipeline.picture import Picture
    from ldm.tasks import Task
    from ldm.weights.adapters.read import Adapter
    from ldm.weights.embeddings import Embedding


def generate(command: TaskCommand) -> None:
    """Draw all pictures that the command asks for; each is on disk before the next prompt begins.

    Prompts with the same adapters are drawn one after another, so that these are put on once.
    """
    watch = Stopwatch()
    requests = requests_of(command)
    check_output(command.output.output)
    check_preview(command.output)
    with progress_bar(sum(request.count for request in requests)) as bar:
        groups, adapters = with_their_adapters(requests, command.model)
        if isinstance(command, Depth2Img) and command.depth_model is not None:
            depth = _estimated(command.depth_model, picture(command.image))
            groups = {key: [request.changed(depth=depth) for request in group] for key, group in groups.items()}
        given = with_decoder(command.model) if isinstance(command, Variations) else command.model
        plain = load_plain(given, watch, command.details, requests, adapted=any(groups))
        task, preview = _task_of(command), preview_of(command.output, given, plain)
        for rule in plain.origin.rules if command.output.verbose else ():
            to_stderr(f"model: {rule}")
        model_hash = hash_in_background(plain.origin.path)
        done = 0
        for wanted, group in groups.items():
            model = adapted(plain, wanted, adapters)
            watch.mark("loading")
            for request in group:
                for drawn in draw(model, request, bar, watch, done, task, preview):
                    path = output_path(command.output.output, request.prompt, drawn.seed)
                    path = drawn.save(path, model_hash=model_hash.result())
                    watch.mark("saving")
                    bar.say(_line(drawn, path, command.output.json))
                done += request.count
    if command.output.verbose:
        to_stderr(f"time: {watch}")


def with_their_adapters(
    requests: list[GenerateRequest], model: Model
) -> tuple[dict[tuple[Wanted, ...], list[GenerateRequest]], dict[Path, Adapter]]:
    """The requests by the adapters that the flags and each prompt ask for, and these as they were read."""
    if not model.lora and not any("<" in request.prompt for request in requests):
        return {(): requests}, {}
    from ldm.apps.flags.adapters import read_files, wanted_by, wanted_by_flags

    by_flags = wanted_by_flags(model.lora, model.models)
    groups: dict[tuple[Wanted, ...], list[GenerateRequest]] = {}
    for request in requests:
        groups.setdefault(wanted_by(by_flags, request, model.models), []).append(request)
    return groups, read_files((one for key in groups for one in key), allow_pickle=model.allow_pickle)


def adapted(model: LatentDiffusion, wanted: tuple[Wanted, ...], adapters: dict[Path, Adapter]) -> LatentDiffusion:
    """The model with these adapters, of those that were read."""
    if not wanted:
        return model
    from ldm.apps.flags.adapters import choices

    return model.with_adapters(choices(wanted, adapters))


def with_decoder(model: Model) -> Model:
    """The flags, with the decoder that ships with this package as the model where they name none."""
    from ldm.pipeline.load import shipped_decoder

    return model if model.file is not None else replace(model, file=shipped_decoder())


def load_model(model: Model, watch: Stopwatch) -> LatentDiffusion:
    """The model with all that its flags name."""
    loaded = load_plain(model, watch, adapted=bool(model.lora))
    if model.lora:
        from ldm.apps.flags.adapters import read_adapters

        loaded = loaded.with_adapters(read_adapters(model.lora, model.models, allow_pickle=model.allow_pickle))
        watch.mark("loading")
    return loaded


def load_plain(
    model: Model,
    watch: Stopwatch,
    details: Details | None = None,
    requests: Sequence[GenerateRequest] = (),
    *,
    adapted: bool = False,
) -> LatentDiffusion:
    """Import torch and all that is ours, then load the model, without its adapters; its helpers are in `details`.

    requests: whose pictures are to fit into memory; none: those of the model's own size
    adapted:  whether adapters will be put on, which are to fit too
    """
    import ldm.tasks  # noqa: F401 - for its time to count as imports

    watch.mark("imports")
    prior = None if details is None else details.asking.prior
    given = model if prior is None else with_decoder(model)
    beside = 0 if details is None else _bytes_beside(details, model.models)
    loaded = _loaded(given, requests, beside, adapted=adapted)
    if prior is not None:
        loaded = loaded.with_prior(prior)
    if model.embedding:
        loaded = loaded.with_embeddings(_embeddings(model))
    if details is not None and (files := control_files(details.controls)):
        loaded = loaded.with_controls(files, allow_pickle=model.allow_pickle, models=model.models or None)
    if details is not None and details.refining.refiner is not None:
        other = Model(
            file=details.refining.refiner,
            models=model.models,
            allow_pickle=model.allow_pickle,
            device=model.device,
            dtype=model.dtype,
            vae_tile=model.vae_tile,
            offload=model.offload,
            store=model.store,
            compile=model.compile,
        )
        loaded = loaded.with_refiner(_loaded(other, requests))
    if model.compile:
        to_stderr("compiling: the first step takes longer")
    watch.mark("loading")
    return loaded


def _bytes_beside(details: Details, models: Sequence[Path]) -> int:
    """The size of the files of other networks, which will take about as much of a GPU's memory."""
    from ldm.weights.find import locate, model_roots

    roots = model_roots(models or None)
    paths = [locate("controlnet", file, roots) for file in control_files(details.controls).values()]
    if details.refining.refiner is not None:
        paths.append(locate("checkpoint", details.refining.refiner, roots))
    return sum(file.stat().st_size for path in paths for file in ([path] if path.is_file() else path.rglob("*")))


def _loaded(
    model: Model, requests: Sequence[GenerateRequest] = (), beside: int = 0, *, adapted: bool = False
) -> LatentDiffusion:
    from ldm.pipeline.load import Room, load

    if model.compile:
        from ldm.models.compiled import check_compiler
        from ldm.pipeline.device import choose_device

        check_compiler(choose_device(model.device))
    loaded = load(
        model.file,
        vae=model.vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        device=model.device,
        dtype=model.dtype,
        prediction=None if model.prediction == "auto" else model.prediction,
        vae_tile=model.vae_tile,
        offload=model.offload,
        store=model.store,
        room=Room(requests, beside, adapted),
        allow_pickle=model.allow_pickle,
        models=model.models or None,
    )
    if model.attention == "xformers" and loaded.device.type != "cuda":
        raise LdmError(f"attention xformers: needs a CUDA GPU, and the model is on {loaded.device}; use auto or sdpa")
    for warning in loaded.origin.warnings:
        to_stderr(f"warning: {warning}")
    if model.compile:
        as_parts = model.offload == "auto" and loaded.offload == "blocks"  # which cannot be compiled
        loaded = (loaded.offloaded("parts") if as_parts else loaded).compiled()
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


def draw(
    model: LatentDiffusion,
    request: GenerateRequest,
    bar: Bar,
    watch: Stopwatch,
    done: int,
    task: Task | None = None,
    preview: Preview | None = None,
) -> Iterator[Picture]:
    """The request's pictures as they come, the bar moving with the steps; `done` pictures came before.

    task:    by default what the request's fields ask for
    preview: where the steps are shown
    """
    from ldm.pipeline.sample import Progress
    from ldm.tasks import run

    for event in (task or run)(model, request):
        if isinstance(event, Progress):
            watch.mark("denoising" if event.done else "text")
            pictures = done + event.first + event.count * event.done / event.steps
            bar.at(f"{_shortened(request.prompt)}  step {event.done}/{event.steps}", pictures)
            if preview is not None and event.step is not None:
                preview.show(event.done, event.step.denoised)
                watch.mark("previews")
            continue
        watch.mark("decoding")
        for note in event.notes:
            to_stderr(f"note: {note}")
        yield event


def _task_of(command: TaskCommand) -> Task | None:
    """A command's own task, where the same request might ask another model for another one."""
    if not isinstance(command, Upscale):
        return None
    from ldm.tasks.upscale import upscale

    return upscale


def _estimated(model: Path, image: bytes) -> bytes:
    """The depth map of a picture, as a PNG file's bytes."""
    from ldm.models.depth import estimate
    from ldm.pipeline.images import read_picture

    buffer = io.BytesIO()
    estimate(model, read_picture(image)).save(buffer, "PNG")
    return buffer.getvalue()


def hash_in_background(path: Path | None) -> Future[str | None]:
    """The SHA-256 of the model's file, computed while it draws; None if there is no file to read."""
    future: Future[str | None] = Future()
    if path is None:
        future.set_result(None)
        return future

    def compute() -> None:
        try:
            future.set_result(sha256_of(path))
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
