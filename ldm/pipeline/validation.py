"""What every record that a user fills in shares: strict frozen fields, faults in one line, a form for metadata.

Nothing here imports torch, so that a wrong request is answered at once.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ldm.errors import LdmError

_STANDARD_ALPHABET = str.maketrans("-_", "+/")  # pydantic writes base64 as URLs have it


def bytes_of_base64(value: object) -> object:
    """JSON has no bytes: base64 text, also as a `data:` URL, stands for them. No text is ever taken as a path."""
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()).translate(_STANDARD_ALPHABET), validate=True)
    except ValueError:
        raise LdmError("image: found text that is not base64, expected the bytes of a picture") from None


def tuple_of_list(value: object) -> object:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


PictureBytes = Annotated[bytes, BeforeValidator(bytes_of_base64), Field(description="a picture's bytes")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Text = Annotated[str, Field(max_length=4000, description="a text of at most 4000 characters")]


class Record(BaseModel):
    """A validated, frozen record. Whatever is out of range, of another type or name raises `LdmError`, in one line.

    title: what its messages begin with; empty for the request itself
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", ser_json_bytes="base64")
    title: ClassVar[str] = ""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise cls.fault(_describe(error, cls.model_fields)) from None

    @classmethod
    def fault(cls, text: str) -> LdmError:
        """An error about this record."""
        return LdmError(f"{cls.title}: {text}" if cls.title else text)

    def record(self) -> dict[str, Any]:
        """What a picture's metadata keeps: every field, with the hash of each picture in its place."""
        kept: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, bytes):
                kept[f"{name}_sha256"] = hashlib.sha256(value).hexdigest()
            elif isinstance(value, Record):
                kept[name] = value.record()
            elif isinstance(value, tuple):
                kept[name] = tuple(item.record() if isinstance(item, Record) else item for item in value)
            else:
                kept[name] = value
        return kept


Fields = Mapping[str, FieldInfo]


def _describe(error: ValidationError, fields: Fields) -> str:
    """The first fault, in one line: the field, what was found, what was expected."""
    fault = error.errors()[0]
    name, found = str(fault["loc"][0]) if fault["loc"] else "request", fault["input"]
    field = fields.get(name)
    choices = _choices(field)
    if fault["type"] == "extra_forbidden":
        return f"{shown(name)}: no such field{_closest(name, list(fields))}; the fields are {', '.join(fields)}"
    if fault["type"] == "missing":
        return f"{name}: found none, expected {fields[name].description}"
    if fault["type"] == "literal_error":
        return f"{name}: found {shown(found)}, expected one of {', '.join(choices)}{_closest(str(found), choices)}"
    if fault["type"] == "string_too_long":
        return f"{name}: found {len(found)} characters, expected {_expected(field)}; shorten it"
    if fault["type"] == "string_unicode":
        return f"{name}: found characters that are not valid Unicode, expected {_expected(field)}"
    hint = f"; the nearest is {_nearest(found)}" if fault["type"] == "multiple_of" else ""
    return f"{name}: found {shown(found)}, expected {_expected(field)}{hint}"


def _expected(field: FieldInfo | None) -> str:
    """The description of a field, which pydantic keeps where the annotation stood."""
    if field is None:
        return "a request"
    if choices := _choices(field):
        return f"one of {', '.join(choices)}"
    inner = (mark for member in get_args(field.annotation) for mark in getattr(member, "__metadata__", ()))
    described = (mark.description for mark in (field, *inner) if isinstance(mark, FieldInfo))
    return next((text for text in described if text), "another value")


def _choices(field: FieldInfo | None) -> list[str]:
    """The choices of a field that has choices."""
    annotation = None if field is None else field.annotation
    members = [annotation, *get_args(annotation)]
    return [name for member in members for name in get_args(member) if isinstance(name, str)]


def _closest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest(side: int) -> int:
    return min(2048, max(64, 8 * round(side / 8)))


def shown(value: object) -> str:
    """A value as one short, harmless line, for messages."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, int) and abs(value) > 10**50:
        return "a huge number"
    text = json.dumps(value) if value is None or isinstance(value, bool | str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
