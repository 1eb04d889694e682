"""The hand-over to a refiner: a second model finishes what the first began (Podell et al. 2023, section 2.5).

SDXL's refiner was trained on the low noise levels alone, so it takes the state over as it is: nothing is noised again.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ldm.diffusion.noise import PerImageNoise
from ldm.errors import LdmError
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import as_trained, told_over
from ldm.pipeline.request import Control, GenerateRequest, whole_steps
from ldm.pipeline.sample import Stage
from ldm.pipeline.text.prompt import adapters_in


def handed_over(stage: Stage) -> tuple[Stage, ...]:
    """The stage, or where `request.refine_at` asks for it its first steps, and the rest of them by the model's refiner.

    The sampler begins anew there, so one of several steps forgets those before. Shares of the steps, those of the
    prompt, of guidance and of controls, are still of all of them. A control acts on the refiner where this was given
    a network of that name. Raises `LdmError` where there is no refiner, or no step for one of the two.
    """
    request, steps = stage.request, stage.steps
    if request.refine_at is None:
        return (stage,)
    refiner = stage.model.refiner
    if refiner is None:
        raise LdmError(
            f"refine_at: found {request.refine_at:g} with a model that has no refiner, expected one to hand over to;"
            " give it by --refiner, or by with_refiner"
        )
    done = whole_steps(request.refine_at, steps)
    if not 0 < done < steps:
        lacking = "refiner" if done else "model before the refiner"
        raise LdmError(
            f"refine_at: {request.refine_at:g} of {steps} steps leaves none for the {lacking},"
            " expected at least one for each; change it, or raise steps"
        )
    theirs = _asked_of(refiner, request)
    tell, _ = as_trained(refiner, theirs)
    before = replace(stage, request=_within(request, steps, 0, done), sigmas=stage.sigmas[: done + 1])
    after = replace(
        stage,
        model=refiner,
        request=_within(theirs, steps, done, steps),
        told=told_over(refiner, theirs, stage.sigmas, tell),
        sigmas=stage.sigmas[done:],
        start=_as_it_is,
    )
    return before, after


def _as_it_is(_: PerImageNoise, x: Tensor | None) -> Tensor:
    """The state that the stage before ended with."""
    assert x is not None
    return x


def _asked_of(refiner: LatentDiffusion, request: GenerateRequest) -> GenerateRequest:
    """The request without what is meant for the first model: its adapters, and controls that the refiner has not."""
    controls = tuple(control for control in request.controls if control.network in refiner.controls)
    texts = {"prompt": request.prompt, "negative": request.negative}
    if request.emphasis != "literal":
        texts = {name: adapters_in(text)[0] for name, text in texts.items()}
    return request.model_copy(update={"controls": controls, **texts})


def _within(request: GenerateRequest, steps: int, first: int, last: int) -> GenerateRequest:
    """The request for the steps first ... last - 1 alone: its shares of all `steps` become shares of these.

    The result may say what no user can: an interval of length 0, in which nothing acts.
    """

    def share(of_all: float) -> float:
        within = round(of_all * steps - first, 9) / (last - first)  # 0.29 * 100 is a hair below 29
        return min(1.0, max(0.0, within))

    def shifted(control: Control) -> Control:
        return control.model_copy(update={"start": share(control.start), "end": share(control.end)})

    start, end = share(request.guidance_start), share(request.guidance_end)
    controls = tuple(shifted(control) for control in request.controls)
    return request.model_copy(update={"guidance_start": start, "guidance_end": end, "controls": controls})
