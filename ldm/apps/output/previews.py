"""`--preview`: a file in which the pictures are watched while they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.apps.flags.shared import Model, Output
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, names_file

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline.latent_diffusion import LatentDiffusion
    from ldm.pipeline.preview import Look


@dataclass(frozen=True)
class Preview:
    """A file that every few steps shows what is in sight of a batch's pictures, side by side.

    look: latents -> pictures, see `ldm.pipeline.preview`
    """

    path: Path
    every: int
    look: Look

    def show(self, done: int, denoised: Tensor) -> None:
        """After `done` steps; denoised (B, z, h, w), the estimate of the latents. The file is always a whole one."""
        if done % self.every:
            return
        import torch
        from PIL import Image

        from ldm.pipeline.images import to_image
        from ldm.weights.atomic import replacing

        image = to_image(torch.cat(list(self.look(denoised)), dim=2))
        with replacing(self.path) as file:
            image.save(file, Image.registered_extensions()[self.path.suffix.lower()])


def check_preview(output: Output) -> None:
    """Raise `LdmError` early where the flags ask for a preview that cannot be."""
    if output.preview is None:
        if output.preview_vae is not None:
            raise LdmError("--preview-vae: expected --preview PATH too, the file to show the pictures in")
        return
    if not names_file(output.preview):
        raise LdmError(f"{output.preview}: expected a name that ends in .png, .jpg or .webp, for --preview")
    if output.preview_every < 1:
        raise LdmError(f"--preview-every: found {output.preview_every}, expected 1 step or more")
    check_output(output.preview)


def preview_of(output: Output, given: Model, model: LatentDiffusion) -> Preview | None:
    """What the flags ask for, of a model that is loaded. Raises `LdmError` where --preview-vae is none that fits."""
    if output.preview is None:
        return None
    from ldm.pipeline.preview import colours_look, tiny_look

    if output.preview_vae is None:
        look = colours_look(model)
    else:
        files = given.models or None
        look = tiny_look(model, output.preview_vae, allow_pickle=given.allow_pickle, models=files)
    output.preview.parent.mkdir(parents=True, exist_ok=True)
    return Preview(output.preview, output.preview_every, look)
