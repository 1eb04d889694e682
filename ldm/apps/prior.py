"""`ldm prior`: a sheet of prompts drawn without a prior, told CLIP's vector of the text, and with a prior."""

from __future__ import annotations

from ldm.apps.flags.commands import PriorSheet
from ldm.apps.flags.requests import prior_use, sampling_fields
from ldm.apps.generate import load_model, with_decoder
from ldm.apps.output.progress import Stopwatch, progress_bar
from ldm.apps.sequences import Axes, check_sheet, drawn, save_sheet, say
from ldm.errors import LdmError
from ldm.pipeline.request import GenerateRequest


def prior(command: PriorSheet) -> None:
    """Draw the sheet and write it as PNG. Raises `LdmError` for what cannot be."""
    if not command.prompts:
        raise LdmError('prompt: found none, expected what to draw; try: ldm prior "a red apple"')
    use = prior_use(command.asking)
    fields = sampling_fields(command.sampling) | {"seed": command.seed, "prior": use}
    request, *_ = [GenerateRequest(prompt=prompt, **fields) for prompt in command.prompts]
    count = 3 * len(command.prompts)
    check_sheet(command.output, count)
    watch = Stopwatch()
    with progress_bar(count) as bar:
        model = load_model(with_decoder(command.model), watch).with_prior(command.asking.prior)
        from ldm.tasks.side_by_side import COLUMNS, side_by_side

        pictures = list(drawn(side_by_side(model, command.prompts, request), count, bar, watch))
        parts = () if model.prior is None else model.prior.parts
        record = {"command": "prior", "prompts": command.prompts, "prior": use.record(), "model": pictures[0].model}
        record |= {"prior_file": [{"name": part.name, "hash": part.hash} for part in parts]}
        axes = Axes(COLUMNS, command.prompts)
        path = save_sheet([one.image for one in pictures], axes, command.output, record, pictures[0].request)
        say(bar, path, count, watch, command.json)
