"""EXIF, where JPEG and WebP pictures keep what PNG keeps in text chunks.

| tag              | what we write                                       | who else reads it                |
|------------------|-----------------------------------------------------|----------------------------------|
| UserComment 9286 | AUTOMATIC1111's text: "UNICODE", then UTF-16,       | AUTOMATIC1111, Forge, sd-parsers |
|                  | the high byte first                                 |                                  |
| MakerNote 927C   | "ldm", then our JSON in UTF-8: the place for what a | no one                           |
|                  | maker notes for himself, which viewers do not show  |                                  |

ComfyUI's WebP files have `prompt:` and the graph's JSON in the camera's model, 0110.
"""

from __future__ import annotations

import struct

from PIL import Image

KEYWORD = "ldm"
"""The PNG text chunk that holds our JSON."""

EXIF, USER_COMMENT, MAKER_NOTE, CAMERA_MODEL = 0x8769, 0x9286, 0x927C, 0x0110
LONG, UNDEFINED = 4, 7
OURS = b"ldm\0"
JPEG_LIMIT = 65533
"""A JPEG segment counts its bytes, and the 2 of the count, with 16 bits."""

BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
"""What Pillow raises of an EXIF block that is cut or made up."""

_DIRECTORY, _ENTRY, _END = struct.Struct(">H"), struct.Struct(">HHII"), struct.Struct(">I")


def exif_bytes(text: str, record: str, limit: int | None = None) -> bytes:
    """An EXIF block with AUTOMATIC1111's text and our JSON; without the JSON where it would be above `limit` bytes."""
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    whole = _block({MAKER_NOTE: OURS + record.encode("utf-8", "backslashreplace"), USER_COMMENT: comment})
    return whole if limit is None or len(whole) <= limit else _block({USER_COMMENT: comment})


def _block(tags: dict[int, bytes]) -> bytes:
    """A TIFF file without a picture (Exif 3.0, 4.6): a directory whose one entry leads to that of these tags.

    Tags in rising order, each longer than 4 bytes. Pillow would write their type as BYTE, which piexif, by which
    AUTOMATIC1111 reads, does not take for a text; it has to be UNDEFINED.
    """
    start = 8 + _DIRECTORY.size + _ENTRY.size + _END.size
    places = start + _DIRECTORY.size + len(tags) * _ENTRY.size + _END.size
    first = _DIRECTORY.pack(1) + _ENTRY.pack(EXIF, LONG, 1, start) + _END.pack(0)
    second = _DIRECTORY.pack(len(tags))
    for tag, value in tags.items():
        second += _ENTRY.pack(tag, UNDEFINED, len(value), places)
        places += len(value)
    return b"Exif\0\0MM\0*" + _END.pack(8) + first + second + _END.pack(0) + b"".join(tags.values())


def read_exif(image: Image.Image) -> dict[str, str]:
    """What an EXIF block says, under the names that PNG chunks have: "parameters", "ldm", "prompt". {} for none."""
    try:
        exif = image.getexif()
        camera, inside = exif.get(CAMERA_MODEL), dict(exif.get_ifd(EXIF))
    except BROKEN:
        return {}
    found: dict[str, str] = {}
    comment, note = inside.get(USER_COMMENT), inside.get(MAKER_NOTE)
    if isinstance(comment, bytes) and (text := _text(comment)):
        found["parameters"] = text
    if isinstance(note, bytes) and note.startswith(OURS):
        found[KEYWORD] = note.removeprefix(OURS).decode("utf-8", "replace")
    if isinstance(camera, str) and camera.startswith("prompt:"):
        found["prompt"] = camera.removeprefix("prompt:")
    return found


def _text(comment: bytes) -> str:
    """A UserComment: 8 bytes that name the code, then the text. UTF-16 comes in either order, whatever the block's."""
    code, body = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return body.decode("utf-8", "replace").strip("\0 ")
    readings = [body.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
    return max(readings, key=lambda text: text.count("Steps: ")).strip("\0\ufeff")
