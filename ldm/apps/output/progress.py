"""What is seen while pictures are drawn: a bar on the terminal, a line for each picture, and where the time went."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def to_stderr(text: str) -> None:
    """Say something that is no result, in one line whatever is in it."""
    print(f"ldm: {in_one_line(text)}", file=sys.stderr)


def in_one_line(text: str) -> str:
    """The text, with everything that a terminal would obey instead of show written as an escape."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


@dataclass
class Stopwatch:
    """Seconds by activity: each call of `mark` gives the time since the last one to a name."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.2f} s in all"


@dataclass(frozen=True)
class Bar:
    """A progress bar, or nothing where there is no terminal to draw it on."""

    rich: RichProgress | None = None
    task: TaskID | None = None

    def at(self, text: str, pictures: float) -> None:
        """Show `text`, and how many pictures are done, in fractions."""
        if self.rich is not None and self.task is not None:
            self.rich.update(self.task, description=text, completed=pictures)

    def say(self, line: str) -> None:
        """Print a line to stdout; above the bar, where both are on the same terminal."""
        if self.rich is not None and sys.stdout.isatty():
            self.rich.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


@contextmanager
def progress_bar(pictures: int) -> Iterator[Bar]:
    """A bar over so many pictures, on stderr, gone at the end."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False) as rich:
        yield Bar(rich, rich.add_task("loading", total=pictures))
