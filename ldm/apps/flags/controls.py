"""The flags of ControlNets: which files, which pictures, and how strongly."""

from __future__ import annotations

from pathlib import Path

from ldm.apps.flags.shared import Controls
from ldm.errors import LdmError
from ldm.pipeline.files import read_file
from ldm.pipeline.request import Control
from ldm.weights.find import without_suffix

MAX_PICTURE_FILE = 20 * 2**20


def control_files(controls: Controls) -> dict[str, str]:
    """Each network's name in a request -> its file, or what is looked for in --models."""
    files: dict[str, str] = {}
    for given in controls.control:
        if files.setdefault(control_name(given), given) != given:
            raise LdmError(f"control: two files are called {control_name(given)}; rename one")
    return files


def control_name(given: str) -> str:
    """A file's name without its suffix."""
    name = Path(given).name or given
    return without_suffix(name) or name


def controls_of(given: Controls) -> tuple[Control, ...]:
    """A validated control for each --control. Raises `LdmError` where the flags do not go together."""
    count = len(given.control)
    if len(given.control_image) != count:
        raise LdmError(f"control-image: found {len(given.control_image)} for {count} --control, expected one for each")
    if not count and given != Controls():
        raise LdmError(
            "control: found none for the flags that go with it, expected a ControlNet's file; give --control"
        )
    return tuple(
        Control(
            network=control_name(file),
            image=read_file(image, MAX_PICTURE_FILE),
            weight=weight,
            start=start,
            end=end,
            guess=given.guess,
            canny=given.canny,
        )
        for file, image, weight, start, end in zip(
            given.control,
            given.control_image,
            _for_each("control-weight", given.control_weight, count, 1.0),
            _for_each("control-start", given.control_start, count, 0.0),
            _for_each("control-end", given.control_end, count, 1.0),
            strict=True,
        )
    )


def _for_each(flag: str, values: tuple[float, ...], count: int, default: float) -> tuple[float, ...]:
    """A value for each control: given for each, once for all, or not at all."""
    if len(values) < 2:
        return (values or (default,)) * count
    if len(values) != count:
        raise LdmError(f"{flag}: found {len(values)} for {count} --control, expected one for all or one for each")
    return values
