"""Pictures that are drawn on the way, always of the same prompts with the same seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.pipeline.images import to_image
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import Control, GenerateRequest
from ldm.training.tune.pictures import Prepared
from ldm.training.tune.settings import Tuning, buckets_for
from ldm.training.tune.trained import CONTROL, Trained
from ldm.weights.atomic import replacing

COUNT = 4
"""So many where the user names none."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is drawn: a request for each picture."""

    model: LatentDiffusion
    requests: tuple[GenerateRequest, ...]

    def draw(self) -> list[Image.Image]:
        """All pictures, with the model as it is now."""
        return [self.model.generate(request)[0].image for request in self.requests]

    def save(self, images: Sequence[Image.Image], folder: Path, step: int) -> None:
        """Write each as FOLDER/samples/step-N-i.png."""
        for path, image in zip(self.paths(folder, step), images, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            with replacing(path) as file:
                file.write(buffer.getvalue())

    def paths(self, folder: Path, step: int) -> list[Path]:
        """Where the pictures of a step lie."""
        return [folder / "samples" / f"step-{step:08d}-{i}.png" for i in range(len(self.requests))]


def samples_for(tuning: Tuning, trained: Trained, pictures: Sequence[Prepared]) -> Samples:
    """The user's prompts, else captions of these pictures; for a control network what it is shown of each, too."""
    side = buckets_for(tuning, trained.model.config).side
    plain = GenerateRequest(prompt="", seed=tuning.seed, width=side // 8 * 8, height=side // 8 * 8)
    if trained.control is None:
        prompts = tuning.samples or tuple(dict.fromkeys(picture.caption for picture in pictures))[:COUNT]
        return Samples(trained.model, tuple(plain.changed(prompt=prompt) for prompt in prompts))
    requests = []
    for i, picture in enumerate(pictures[: len(tuning.samples) or COUNT]):
        prompt = tuning.samples[i] if tuning.samples else picture.caption
        width, height = picture.bucket
        requests.append(plain.changed(prompt=prompt, width=width, height=height, controls=(control_of(picture),)))
    return Samples(trained.model, tuple(requests))


def control_of(picture: Prepared) -> Control:
    """A picture's hint as what a request asks of the control network."""
    buffer = io.BytesIO()
    to_image(picture.view(0)["hint"].float() / 127.5 - 1).save(buffer, "PNG")
    return Control(network=CONTROL, image=buffer.getvalue())
