"""The page of `ldm check`: every picture small, with what is cut off, its caption and its faults; HTML or PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from ldm.apps.output.tiles import centred, compose
from ldm.data.buckets import Crop
from ldm.data.check import Checked, Seen
from ldm.errors import printable

THUMBNAIL = 192
"""The longer side of a picture on the page, in pixels."""

BLUE, RED = "#0a7cff", "#b3261e"

MOST = {".html": 2000, ".png": 400}
"""How many pictures a page shows, those with faults first."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ checked.root }}</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222;
         background: #fafafa; overflow-wrap: anywhere; }
  h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
  table { border-collapse: collapse; } td, th { padding: .1rem 1.4rem .1rem 0; text-align: right; }
  ul { padding-left: 1.2rem; } .left-out li, .fault { color: #b3261e; }
  .all { display: grid; grid-template-columns: repeat(auto-fill, minmax({{ side }}px, 1fr)); gap: 1.2rem .9rem; }
  figure { margin: 0; } .frame { position: relative; width: fit-content; overflow: hidden; line-height: 0; }
  .crop { position: absolute; outline: 2px solid #0a7cff; outline-offset: -2px; box-shadow: 0 0 0 999px #ffffffa8; }
  .caption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; overflow: hidden; }
  figcaption { font-size: .82rem; margin-top: .3rem; } .name, .remark { color: #777; } p { margin: .3rem 0; }
</style>
</head>
<body>
<h1>{{ checked.root }}</h1>
<p>{{ checked.pictures | length }} pictures can be used, {{ checked.left_out | length }} files left out.</p>
<table>
<tr><th>bucket</th><th>pictures</th><th>in an epoch</th></tr>
{% for bucket in checked.buckets -%}
<tr><td>{{ bucket.width }} x {{ bucket.height }}</td><td>{{ bucket.pictures }}</td><td>{{ bucket.shown }}</td></tr>
{% endfor %}</table>
{% if checked.left_out %}<h2>Left out</h2>
<ul class="left-out">{% for line in checked.left_out %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if checked.notes %}<h2>Notes</h2>
<ul>{% for line in checked.notes %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% for title, figures in sections if figures %}<h2>{{ title }}</h2>
<div class="all">
{% for seen, picture, frame in figures -%}
<figure>
<div class="frame"><img src="data:image/jpeg;base64,{{ picture }}" alt="{{ seen.name }}"
  loading="lazy"><div class="crop" style="{{ frame }}"></div></div>
<figcaption>
{% for caption in seen.captions -%}
<p class="caption" title="{{ caption }}">{{ caption or '(no caption)' }}</p>
{%- endfor %}
{% for fault in seen.faults %}<p class="fault">{{ fault }}</p>{% endfor %}
{% for remark in seen.remarks %}<p class="remark">{{ remark }}</p>{% endfor %}
<p class="name">{{ seen.name }}, {{ seen.crop.original | join("x") }}, in {{ seen.crop.bucket | join("x") }}
{%- if seen.repeats > 1 %}, {{ seen.repeats }} times{% endif %}{% if seen.regular %}, of the class{% endif %}</p>
</figcaption>
</figure>
{% endfor %}</div>{% endfor %}
{% if more %}<p>{{ more }} more pictures are not shown.</p>{% endif %}
</body>
</html>
"""


def thumbnail(picture: Image.Image) -> bytes:
    """A picture as a small JPEG."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=3.0)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def page_bytes(checked: Checked, thumbnails: Mapping[str, bytes], suffix: str) -> bytes:
    """The page as .html, which needs nothing beside it, or as .png."""
    ordered = sorted(checked.pictures, key=lambda seen: not seen.faults)
    shown = ordered[: MOST[suffix]]
    if suffix == ".png":
        return _png(shown, thumbnails)
    return _html(checked, shown, thumbnails)


def crop_shares(crop: Crop) -> tuple[float, float, float, float]:
    """Left, top, width and height of what is kept, as shares of the whole picture."""
    (width, height), (across, down) = crop.scaled, crop.bucket
    return crop.left / width, crop.top / height, across / width, down / height


def _html(checked: Checked, shown: Sequence[Seen], thumbnails: Mapping[str, bytes]) -> bytes:
    from jinja2 import Environment

    def figure(seen: Seen) -> tuple[Seen, str, str]:
        shares = zip(("left", "top", "width", "height"), crop_shares(seen.crop), strict=True)
        frame = ";".join(f"{name}:{share:.2%}" for name, share in shares)
        return seen, base64.b64encode(thumbnails[seen.name]).decode(), frame

    faulty = [figure(seen) for seen in shown if seen.faults]
    others = [figure(seen) for seen in shown if not seen.faults]
    said: dict[str, Any] = {
        "checked": checked,
        "side": THUMBNAIL,
        "sections": [("To look at", faulty), ("All others" if faulty else "All pictures", others)],
        "more": len(checked.pictures) - len(shown),
    }
    return Environment(autoescape=True).from_string(_PAGE).render(said).encode("utf-8", "backslashreplace")


def _png(shown: Sequence[Seen], thumbnails: Mapping[str, bytes]) -> bytes:
    tiles = [centred(_framed(thumbnails[seen.name], seen), (THUMBNAIL, THUMBNAIL)) for seen in shown]
    labels = [printable(f"{seen.name}: {'; '.join(seen.faults) or seen.captions[0] or 'no caption'}") for seen in shown]
    buffer = io.BytesIO()
    compose(tiles, min(8, math.ceil(len(tiles) ** 0.5)), labels, margin=8).save(buffer, "PNG")
    return buffer.getvalue()


def _framed(data: bytes, seen: Seen) -> Image.Image:
    """A thumbnail with what is cut off made pale, and a line around the rest: red where there are faults."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, width, height = crop_shares(seen.crop)
    box = (
        round(left * picture.width),
        round(top * picture.height),
        round((left + width) * picture.width),
        round((top + height) * picture.height),
    )
    pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.66)
    pale.paste(picture.crop(box), box[:2])
    ImageDraw.Draw(pale).rectangle(
        (box[0], box[1], box[2] - 1, box[3] - 1), outline=RED if seen.faults else BLUE, width=2
    )
    return pale
