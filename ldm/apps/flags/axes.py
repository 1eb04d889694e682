"""`FIELD=V1,V2,...`: what changes along an axis of a grid, typed by the request's own fields."""

from __future__ import annotations

import csv
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ldm.apps.flags.requests import size_of
from ldm.errors import LdmError
from ldm.pipeline.request import Apg, GenerateRequest, HighRes, PriorUse
from ldm.pipeline.validation import shown

MAX_CELLS = 400

NESTED: Mapping[str, type[HighRes | Apg | PriorUse]] = {"highres": HighRes, "apg": Apg, "prior": PriorUse}

NUMBER = r"([+-]?[0-9]{1,19}(?:\.[0-9]{1,19})?)"
RANGE = re.compile(rf"{NUMBER}\s*-\s*{NUMBER}(?:\s*\(\s*{NUMBER}\s*\)|\s*\[\s*([0-9]{{1,9}})\s*\])?")
"""From-to, from-to (step), from-to [how many]: as AUTOMATIC1111's grids have them."""


@dataclass(frozen=True)
class Axis:
    """A field and its values. field: of the request, with a dot inside those of `NESTED`; or size, model, lora."""

    field: str
    values: tuple[Any, ...]

    @property
    def shown(self) -> list[str]:
        """The values as words; of a model its file's name, without folders."""
        return [_word(self.field, value) for value in self.values]

    @property
    def labels(self) -> list[str]:
        """What stands beside each column or row."""
        name = re.sub(r"[._]", " ", self.field)
        return [f"{name} {word}".strip() for word in self.shown]


NO_AXIS = Axis("", (None,))


def axis_of(text: str) -> Axis:
    """FIELD=V1,V2,... with numbers, ranges or words as the field has them, "default" for what it is by default.

    Fields are called as in `GenerateRequest` or as their flags are. A value with a comma stands in double quotes. A
    seed of -1 is drawn. Raises `LdmError` for another field, or values that are none of its kind.
    """
    given, equals, listed = text.partition("=")
    field = _field(given.strip())
    if not equals or not listed.strip():
        raise LdmError(f"{given}: found no values, expected FIELD=V1,V2,... as steps=6,12,24")
    try:
        words = [word.strip() for word in next(csv.reader([listed], skipinitialspace=True, strict=True))]
    except csv.Error as error:
        raise LdmError(f"{field}: found {shown(listed)}, expected V1,V2,... ({error})") from None
    values = tuple(value for word in words for value in _values(field, word))
    if len(values) > MAX_CELLS:
        raise _too_many(field, len(values))
    return Axis(field, values)


def request_at(base: Mapping[str, Any], values: Mapping[str, Any], firsts: Mapping[str, Any]) -> GenerateRequest:
    """A request's fields with these values in their places.

    firsts: the first value of each axis, which those of `prompt` take the place of, in the prompt and the negative
    """
    fields = dict(base)
    for name, value in values.items():
        record, _, inner = name.partition(".")
        if name == "prompt":
            fields |= {text: fields[text].replace(firsts[name], value) for text in ("prompt", "negative")}
        elif name == "size":
            fields |= {"width": value[0], "height": value[1]}
        elif inner:
            kind = NESTED[record]
            fields[record] = kind(**(dict(fields.get(record) or kind()) | {inner: value}))
        elif name not in ("", "model", "lora"):
            fields[name] = value
    return GenerateRequest(**fields)


def _fields() -> dict[str, type]:
    """The request's fields that hold one number or word, and which."""
    fields = {name: _kind(field.annotation) for name, field in GenerateRequest.model_fields.items() if name != "count"}
    for record, kind in NESTED.items():
        fields |= {f"{record}.{name}": _kind(field.annotation) for name, field in kind.model_fields.items()}
    return {name: kind for name, kind in fields.items() if kind is not None} | {
        "size": str,
        "model": str,
        "lora": float,
    }


def _kind(annotation: Any) -> type | None:
    """int, float, bool or str of a field that holds such a thing, or None of any other."""
    if annotation in (int, float, bool, str):
        return annotation
    if get_origin(annotation) is Literal:
        return str
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next((kind for member in get_args(annotation) if (kind := _kind(member)) is not None), None)
    return None


def _field(given: str) -> str:
    """highres-strength, highres_strength, highres.strength -> highres.strength; `highres` is its scale."""
    plain = re.sub(r"[-.]", "_", given.lower())
    fields = {name.replace(".", "_"): name for name in _fields()} | {"highres": "highres.scale"}
    if plain not in fields:
        raise LdmError(f"{shown(given)}: is no field of a grid; expected one of {', '.join(_fields())}")
    return fields[plain]


def _values(field: str, word: str) -> list[Any]:
    """The values that one word stands for: several for a range."""
    kind = _fields()[field]
    if not word and field != "negative":
        raise LdmError(f"{field}: found an empty value, expected V1,V2,...")
    if field == "size":
        return [size_of("size", word)]
    if word == "default" and field not in ("prompt", "negative", "model", "lora", "seed"):
        record, _, inner = field.rpartition(".")
        return [(NESTED[record] if record else GenerateRequest).model_fields[inner].default]
    if kind is str:
        return [word]
    if kind is bool:
        if word not in ("true", "false"):
            raise LdmError(f"{field}: found {shown(word)}, expected true or false")
        return [word == "true"]
    number = _number(word, kind)
    numbers = [number] if number is not None else _range(field, word, kind)
    return [secrets.randbelow(2**32) if field == "seed" and value == -1 else value for value in numbers]


def _number(word: str, kind: type) -> int | float | None:
    if kind is int:
        return int(word) if re.fullmatch("[+-]?[0-9]{1,30}", word) else None
    try:
        return float(word)
    except ValueError:
        return None


def _range(field: str, word: str, kind: type) -> list[int | float]:
    found = RANGE.fullmatch(word)
    if found is None or (kind is int and any("." in (part or "") for part in found.groups())):
        what = "a whole number" if kind is int else "a number"
        raise LdmError(f"{field}: found {shown(word)}, expected {what} or a range, as 1-5, 1-10 (+3) or 1-10 [4]")
    start, end = Fraction(found[1]), Fraction(found[2])
    if found[4]:
        count = int(found[4])
        step = (end - start) / max(1, count - 1)
    else:
        step = Fraction(found[3]) if found[3] else Fraction(1 if end >= start else -1)
        count = (end - start) // step + 1 if step else 0
    if count < 1:
        raise LdmError(f"{field}: found {shown(word)}, expected a range that leads from its first number to its second")
    if count > MAX_CELLS:
        raise _too_many(field, count)
    return [kind(start + index * step) for index in range(count)]


def _too_many(field: str, count: int) -> LdmError:
    return LdmError(f"{field}: found {shown(count)} values, expected at most {MAX_CELLS}")


def _word(field: str, value: Any) -> str:
    if value is None:
        return "default" if field else ""
    if field == "size":
        return "x".join(str(side) for side in value)
    if field == "model":
        return Path(value).stem
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
