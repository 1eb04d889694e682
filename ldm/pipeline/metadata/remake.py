"""What it takes to make a picture again, whichever program's words it was read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.errors import LdmError
from ldm.pipeline.request import GenerateRequest

PICTURES = ("image", "mask", "depth", "vary")
"""The fields of a request that hold a picture. Metadata has at most its hash: a person must give the file again."""


@dataclass(frozen=True)
class Remake:
    """What was read, unchecked: `request` checks it. Nothing here opens a file or loads a model.

    source:     the program that wrote it
    fields:     of a `GenerateRequest`, but for pictures and controls
    pictures:   a field of PICTURES -> the SHA-256 of the file that is needed there, None where only the need is known
    controls:   the fields of each `Control`, with "image_sha256" in place of its image
    model, model_hash: the model's name, and the first digits of its file's SHA-256 (or the 8 of the old short hash)
    misses:     a line for each thing that cannot be matched
    """

    source: str
    fields: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str | None] = field(default_factory=dict)
    controls: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    model_hash: str | None = None
    misses: tuple[str, ...] = ()

    def request(self, pictures: Mapping[str, bytes] | None = None, controls: Sequence[bytes] = ()) -> GenerateRequest:
        """The request, with the files' bytes of the pictures it needs, and one for each control.

        Raises `LdmError` where one is missing or too many, or where a field is not what it may be.
        """
        given = dict(pictures or {})
        for name, digest in self.pictures.items():
            if name not in given:
                known = f" (SHA-256 {digest})" if digest else ""
                raise LdmError(f"{name}: found none, expected the file that the picture was made from{known}; give it")
        if spare := [name for name in given if name not in self.pictures]:
            raise LdmError(f"{spare[0]}: found one, but the picture was made without; leave it out")
        if len(controls) != len(self.controls):
            raise LdmError(
                f"control images: found {len(controls)}, expected the {len(self.controls)} that the picture was made"
                " from, in their order"
            )
        fields: dict[str, Any] = {**self.fields, **given}
        held: Any = tuple(
            {name: value for name, value in known.items() if name != "image_sha256"} | {"image": image}
            for known, image in zip(self.controls, controls, strict=True)
        )
        return GenerateRequest(**fields, controls=held)
