"""Stopping a run when a signal says so, at a moment when nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """Turn the first SIGINT or SIGTERM into a number that is asked for, 0 before; the second acts as ever, at once."""
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        restore()
