"""`ldm interpolate`: a sheet of the pictures between two."""

from __future__ import annotations

from ldm.apps.flags.commands import Interpolate
from ldm.apps.flags.requests import picture
from ldm.apps.generate import load_model, with_decoder
from ldm.apps.output.progress import Stopwatch, progress_bar
from ldm.apps.sequences import Axes, check_sheet, drawn, list_of, request_of, save_sheet, say

OWN_NOISE = "own"
"""The row that begins in the noise of both pictures."""


def interpolate(command: Interpolate) -> None:
    """Draw the sheet and write it as PNG. Raises `LdmError` for what cannot be."""
    rows = list_of("rows", command.rows, {OWN_NOISE: None})
    count = len(rows) * command.frames
    check_sheet(command.output, count)
    request = request_of(command.decoding)
    ends = picture(command.first), picture(command.second)
    watch = Stopwatch()
    with progress_bar(count) as bar:
        model = load_model(with_decoder(command.model), watch)
        from ldm.tasks.interpolate import interpolate as task

        events = task(model, ends, request, frames=command.frames, rows=rows)
        pictures = list(drawn(events, count, bar, watch))
        columns = [f"{index / (command.frames - 1):.2f}" for index in range(command.frames)]
        axes = Axes(columns, ["own noise" if row is None else f"seed {row}" for row in rows])
        record = {"command": "interpolate", "frames": command.frames, "rows": rows, "model": pictures[0].model}
        path = save_sheet([one.image for one in pictures], axes, command.output, record, pictures[0].request)
        say(bar, path, count, watch, command.json)
