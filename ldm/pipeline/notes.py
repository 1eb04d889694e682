"""What of a request could not be done, and is no fault: a line each, for the metadata of its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldm.models.unet import finest_transformers
from ldm.pipeline.control import steps_between
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import begun_between, negative_spans, prompt_spans
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.validation import shown

Runs = Sequence[tuple[GenerateRequest, int]]
"""The runs of the sampler: the request of each, and how many steps it has."""


def notes_on(model: LatentDiffusion, request: GenerateRequest, runs: Runs) -> Iterator[str]:
    """The notes on a resolved request that is drawn in these runs."""
    yield from _words_left_out(model, request)
    yield from _unused(model, request)
    yield from _without_guidance(model, request)
    yield from _idle(request, runs)


def _words_left_out(model: LatentDiffusion, request: GenerateRequest) -> Iterator[str]:
    """A line for each prompt of which a part, at some step, is too long even for chunks."""
    parts = [text for part, _ in prompt_spans(model, request, request.steps) for _, text in part]
    negative = [text for _, text in negative_spans(model, request, request.steps)]
    for name, texts in (("prompt", parts), ("negative", negative)):
        if cut := next(filter(None, (model.words_cut(text, request.emphasis) for text in dict.fromkeys(texts))), ""):
            yield f"{name}: too long; left out from here on: {shown(cut)}"


def _unused(model: LatentDiffusion, request: GenerateRequest) -> Iterator[str]:
    """A line for each field that was changed and that this kind of model has no use for."""
    models = [model] if model.refiner is None or request.refine_at is None else [model, model.refiner]
    use = {
        "original_size": any(one.config.sizes_in_vector for one in models),
        "crop": any(one.config.sizes_in_vector for one in models),
        "upscale_noise": model.config.unet.classes is not None,
        "merge_tokens": request.merge_tokens == 0 or any(finest_transformers(one.unet) for one in models),
    }
    for name, used in use.items():
        if not used and getattr(request, name) != GenerateRequest.model_fields[name].default:
            yield f"{name}: this model has no use for it; it did not act"


def _without_guidance(model: LatentDiffusion, request: GenerateRequest) -> Iterator[str]:
    """A line for each thing that only guidance makes use of, where there is none."""
    if request.guidance != 1:
        return
    ordinary = [weight for _, weight in prompt_spans(model, request, request.steps)] == [1]
    found = {
        "negative": ordinary and request.negative != "",
        "apg": request.apg is not None,
        "rescale": request.rescale != 0 and request.perturbed == 0,
    }
    yield from (f"{name}: there is no guidance, which is 1; it did not act" for name, idle in found.items() if idle)


def _idle(request: GenerateRequest, runs: Runs) -> Iterator[str]:
    """A line for each thing that acts on none of the steps, since its share of them is too short."""
    guides = request.guidance != 1 or request.perturbed != 0
    if guides and not any(begun_between(steps, run.guidance_start, run.guidance_end) for run, steps in runs):
        between = f"from {request.guidance_start:g} to {request.guidance_end:g}"
        yield f"guidance: {between} no step begins; it did not act"
    acting = {one.network for run, steps in runs for one in run.controls if steps_between(steps, one.start, one.end)}
    for one in request.controls:
        if one.network not in acting:
            yield f"control {one.network}: from {one.start:g} to {one.end:g} there is no whole step; it did not act"
