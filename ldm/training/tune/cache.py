"""Tensors worked out once and kept on disk, by what they were worked out from.

An entry's name is the digest of all that it depends on, and the file says all of it again, with the digest of its own
numbers: one that is cut, changed or of something else is made anew. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.hashes import MODELSPEC_HASH, full_hashes
from ldm.weights.io import printable, read_header, read_tensors
from ldm.weights.save import write_tensors

log = logging.getLogger(__name__)

KEY = "ldm.key"
"""The metadata entry with what an entry was worked out from, as JSON."""

Key = Mapping[str, str | int | float | bool | None]


class CacheError(LdmError):
    """The cache itself fails, and not one picture of many."""


@dataclass(frozen=True)
class Cache:
    """A folder of such tensors."""

    folder: Path

    def get(self, key: Key, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of this key, on the CPU; made and written where there is no whole file of them.

        Raises CacheError where the folder cannot be written to, and what `make` raises.
        """
        held = self.read(key)
        if held is None:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            self._write(self.path(key), held, key)
        return held

    def _write(self, path: Path, tensors: dict[str, Tensor], key: Key) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors, {KEY: _text(key)})
        except (OSError, LdmError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            why = (cause.strerror or str(cause)).lower()
            raise CacheError(
                f"cache {printable(str(self.folder))}: cannot be written ({why}); make room, or give another "
                "--cache or --output, and start again: what is encoded stays"
            ) from error

    def read(self, key: Key) -> dict[str, Tensor] | None:
        """The tensors of this key; None where there is no whole file of them."""
        path = self.path(key)
        try:
            if not path.exists():
                return None
            header = read_header(path)
            tensors = {name: tensor.clone() for name, tensor in read_tensors(header, header.tensors)}
            whole = header.metadata.get(MODELSPEC_HASH) == f"0x{full_hashes(header).numbers}"
        except (LdmError, OSError) as error:
            log.warning("%s; it is made anew", error)
            return None
        if not whole or header.metadata.get(KEY) != _text(key):
            log.warning("%s: is not what was written there; it is made anew", path)
            return None
        return tensors

    def path(self, key: Key) -> Path:
        """Where the entry of a key lies."""
        name = hashlib.sha256(_text(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _text(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)
