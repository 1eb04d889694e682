"""`python -m ldm`: the same as the `ldm` command."""

from __future__ import annotations

import sys
from pathlib import Path


def _leave_working_folder() -> None:
    """`python -m` looks for modules in the working folder first, where a file torch.py would pass for torch."""
    here, package = Path.cwd(), Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == here.resolve() != package.parent:
        del sys.path[0]


if __name__ == "__main__":
    _leave_working_folder()
    from ldm.apps.cli import main

    sys.exit(main())
