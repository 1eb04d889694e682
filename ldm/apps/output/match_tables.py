"""What CLIP finds, on the terminal: labels as bars, cosines as a shaded matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ldm.apps.output.heat_map import ink_on, shade
from ldm.apps.output.progress import in_one_line
from ldm.tasks.classify import Match

BAR = 28
"""Letters of a bar that is full."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
CELL = 9
"""Letters of a cell of the matrix, with the gap before it."""


def print_matches(path: Path, matches: Sequence[Match], console: Console | None = None) -> None:
    """A picture's labels, the best first, each with its probability as a bar and as a number, and its cosine."""
    console = console or Console()
    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=max(12, console.width - BAR - 22), no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="dim")
    for place, match in enumerate(matches):
        style = "bold" if place == 0 else ""
        bar = Text(bar_of(match.probability, ascii_only=_plain(console)), style="cyan")
        percent = Text(f"{100 * match.probability:.1f} %", style=style)
        table.add_row(Text(f"  {in_one_line(match.label)}", style=style), bar, percent, f"{match.cosine:.3f}")
    console.print(Text(in_one_line(str(path))), soft_wrap=True)
    console.print(table)


def bar_of(share: float, width: int = BAR, *, ascii_only: bool = False) -> str:
    """A share from 0 to 1 as a bar of always `width` letters, to an eighth of one where there are such letters."""
    if ascii_only:
        return ("#" * round(share * width)).ljust(width)
    whole, part = divmod(round(share * width * 8), 8)
    return ("█" * whole + (EIGHTHS[part] if part else "")).ljust(width)


def print_scores(
    paths: Sequence[Path], texts: Sequence[str], cosines: Sequence[Sequence[float]], console: Console | None = None
) -> None:
    """The matrix, a row for each text and a column for each picture, whose best text is underlined."""
    console = console or Console()
    low, high = min(map(min, cosines)), max(map(max, cosines))
    shaded = console.color_system in ("256", "truecolor")  # sixteen colours are no scale
    longest = max(len(text) for text in texts)
    left = min(longest, max(24, console.width - CELL * len(paths)))
    across = max(1, (console.width - left) // CELL)
    for start in range(0, len(paths), across):
        table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False)
        table.add_column(width=left)
        columns = range(start, min(start + across, len(paths)))
        for column in columns:
            name = _short(in_one_line(paths[column].stem), CELL - 1)
            table.add_column(Text(name), justify="right", width=CELL - 1, no_wrap=True)
        for row, text in enumerate(texts):
            cells = [_cell(cosines[column], row, low, high, shaded=shaded) for column in columns]
            table.add_row(Text(in_one_line(text)), *cells)
        console.print(table)


def _cell(column: Sequence[float], row: int, low: float, high: float, *, shaded: bool) -> Text:
    """A cosine, in the colour that it has in the heat map where the terminal has such."""
    colour = shade(column[row], low, high)
    style = Style(color=Color.from_rgb(*ink_on(colour)), bgcolor=Color.from_rgb(*colour)) if shaded else Style()
    if column[row] == max(column) and len(column) > 1:
        style += Style(bold=True, underline=True)
    return Text(f"{column[row]:.3f}".rjust(CELL - 1), style=style)


def _short(name: str, width: int) -> str:
    """The end of a name, which tells numbered files apart."""
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
