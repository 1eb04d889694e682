"""The one error class a user ever sees."""

from __future__ import annotations


class LdmError(Exception):
    """Something the caller can mend.

    The message is one line that names the file or field, what was found, what was expected and the
    remedy. The command line prints it and exits with 2; the server answers 4xx with the same text.
    """


def printable(text: str) -> str:
    """The text on one line, with everything that a terminal would obey instead of show written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
