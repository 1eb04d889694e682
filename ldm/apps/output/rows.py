"""Lines of a name and a value, as `ldm info` and `ldm check` print them. Light."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from ldm.errors import printable

Rows = Iterable[tuple[str, str]]


def grid(rows: Rows) -> Table | None:
    """Names and values in two columns; None without rows."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True, min_width=12, max_width=24, overflow="ellipsis")
    lines.add_column(overflow="fold")
    for name, value in rows:
        lines.add_row(Text(printable(name)), Text(printable(value), style="bold red" if name == "PROBLEM" else ""))
    return lines if lines.rows else None
