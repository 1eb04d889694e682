"""What several tasks share: what they refuse, and pictures that are each told something of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ldm.diffusion.guidance import Told
from ldm.errors import LdmError
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import Tell
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, alone, run

ToldOver = Sequence[tuple[float, Told]]
"""What `Stage.told` is."""


def refuse(request: GenerateRequest, names: Sequence[str], task: str) -> None:
    """Raise `LdmError` where the request has a field that the task, here in words, can do nothing with."""
    for name in names:
        if getattr(request, name) not in (None, ()):
            raise LdmError(f"{name}: found together with {task}, expected none; leave it out")


def seeing(told: Told, see: Tell) -> Told:
    """The wanted side is told a picture besides; the other one keeps the zeros that it has, of no picture."""
    return Told(tuple((see(cond), weight) for cond, weight in told.parts), told.uncond)


def one_by_one(
    model: LatentDiffusion, job: Job, tell: Callable[[ToldOver, GenerateRequest], ToldOver]
) -> Iterator[Progress | Picture]:
    """Run a job picture by picture, since what the U-Net is told differs from one to the next.

    tell: what a stage's U-Net is told, and the request of one picture alone -> what it is told for this one; a
          refiner, which is another model, is told nothing more
    """
    for index in range(job.request.count):
        request = alone(job.request, index)
        stages = [
            replace(stage, told=tell(stage.told, request)) if stage.model is model else stage for stage in job.stages
        ]
        for event in run(model, replace(job, request=request, stages=stages)):
            yield replace(event, index=index) if isinstance(event, Picture) else replace(event, first=index)


def other_seed(request: GenerateRequest) -> int:
    """A seed that follows from a resolved request's, for noise that must not repeat the start noise."""
    assert request.seed is not None
    return request.seed ^ 0x9E3779B9  # within the lower 32 bits, the only ones that PyTorch's generator looks at
