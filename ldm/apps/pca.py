"""`ldm pca`: a sheet of pictures, each from the first principal components of what CLIP sees in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldm.apps.flags.commands import Pca
from ldm.apps.flags.requests import picture
from ldm.apps.generate import load_model, with_decoder
from ldm.apps.output.progress import Stopwatch, progress_bar, to_stderr
from ldm.apps.sequences import Axes, check_sheet, drawn, list_of, request_of, save_sheet, say
from ldm.errors import LdmError
from ldm.pipeline.files import PICTURE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ldm.pipeline.clip.components import Components
    from ldm.pipeline.latent_diffusion import LatentDiffusion

USUAL = (1, 2, 5, 10, 20, 40, 80)
"""How many components are kept where the command does not say, as far as there are so many; and all of the vector."""

ALL = "all"


def pca(command: Pca) -> None:
    """Draw the sheet and write it as PNG; the pictures themselves stand at the right. Raises `LdmError`."""
    counts = list_of("components", command.components, {ALL: None}) if command.components else None
    check_sheet(command.output, len(command.images) * (len(counts or USUAL) + 1))
    if command.write is not None and (command.write.exists() or command.write.is_symlink()):
        raise LdmError(f"{command.write}: exists already, and nothing is overwritten; give another name to --write")
    if command.of is not None and command.statistics is not None:
        raise LdmError("statistics: found together with --of, expected one of them; leave one out")
    request = request_of(command.decoding)
    images = [picture(path) for path in command.images]
    watch = Stopwatch()
    with progress_bar(len(images) * len(counts or USUAL)) as bar:
        model = load_model(with_decoder(command.model), watch)
        from ldm.pipeline.clip.components import save_components
        from ldm.pipeline.images import fit, read_picture
        from ldm.tasks.pca import pca as task

        components = _components(model, command, images)
        if command.write is not None:
            save_components(components, command.write)
        usual = [*(count for count in USUAL if count <= len(components.components)), None]
        counts = usual if counts is None else counts
        total = len(images) * len(counts)
        events = task(model, images, request, counts, components=components, inverted=command.inverted)
        pictures = list(drawn(events, total, bar, watch))
        tiles = []
        for row, data in enumerate(images):
            own = [one.image for one in pictures[row * len(counts) : (row + 1) * len(counts)]]
            tiles += [*own, fit(read_picture(data), *own[0].size)]
        labels = [*(ALL if count is None else str(count) for count in counts), "picture"]
        record = {"command": "pca", "components": counts, "model": pictures[0].model}
        axes = Axes(labels, [path.stem for path in command.images])
        path = save_sheet(tiles, axes, command.output, record, pictures[0].request)
        say(bar, path, total, watch, command.json)


def _components(model: LatentDiffusion, command: Pca, images: Sequence[bytes]) -> Components:
    """Those of the file or the folder that is named, of the file that goes with the decoder, or of the pictures."""
    import torch

    from ldm.pipeline.clip.components import components_of, read_components
    from ldm.pipeline.load import SHIPPED_COMPONENTS, SHIPPED_DECODER

    if command.statistics is not None:
        return read_components(command.statistics)
    if command.of is not None:
        return components_of(torch.cat(_embedded(model, command.of)))
    path = model.origin.path
    if path is not None and path.resolve() == SHIPPED_DECODER.resolve() and SHIPPED_COMPONENTS.exists():
        return read_components(SHIPPED_COMPONENTS)
    return components_of(torch.cat([model.image_embedding(data).float() for data in images]))


def _embedded(model: LatentDiffusion, folder: Path) -> list[Tensor]:
    """What the model sees in each picture of a folder, and of those below; a file that is none is named and left out.

    Raises `LdmError` where there is no picture.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    found = []
    for path in paths:
        try:
            found.append(model.image_embedding(path).float())
        except LdmError as error:
            to_stderr(f"warning: {path}: {error}; left out")
    if not found:
        raise LdmError(f"{folder}: found no PNG, JPEG or WebP picture, expected a folder with some; check the path")
    return found
