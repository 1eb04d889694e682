"""`ldm textdiff`: a sheet of a picture that changes as one caption does into another."""

from __future__ import annotations

from ldm.apps.flags.commands import TextDiff
from ldm.apps.flags.requests import picture
from ldm.apps.generate import load_model, with_decoder
from ldm.apps.output.progress import Stopwatch, progress_bar
from ldm.apps.sequences import Axes, check_sheet, drawn, request_of, save_sheet, say


def textdiff(command: TextDiff) -> None:
    """Draw the sheet and write it as PNG. Raises `LdmError` for what cannot be."""
    check_sheet(command.output, command.frames)
    request = request_of(command.decoding)
    data = picture(command.image)
    watch = Stopwatch()
    with progress_bar(command.frames) as bar:
        model = load_model(with_decoder(command.model), watch)
        from ldm.tasks.textdiff import textdiff as task

        captions = command.source, command.target
        events = task(model, data, request, *captions, frames=command.frames, theta=command.theta)
        pictures = list(drawn(events, command.frames, bar, watch))
        thetas = [command.theta * index / (command.frames - 1) for index in range(command.frames)]
        axes = Axes([f"{theta:.2f}" for theta in thetas], [" to ".join(captions)])
        record = {"command": "textdiff", "from": captions[0], "to": captions[1], "thetas": thetas}
        record |= {"model": pictures[0].model}
        path = save_sheet([one.image for one in pictures], axes, command.output, record, pictures[0].request)
        say(bar, path, len(pictures), watch, command.json)
