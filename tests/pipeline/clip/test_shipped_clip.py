"""The CLIP in the model that ships: no file is named for it, and it knows plain drawn things it was not trained on."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.load import SHIPPED
from ldm.tasks.classify import classify

pytestmark = pytest.mark.skipif(not SHIPPED.exists(), reason="the model that ships is not there")


def circle(color: str) -> Image.Image:
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((24, 24, 104, 104), fill=color)
    return picture


def heart() -> Image.Image:
    picture = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 26, 68, 74), fill="red")
    draw.ellipse((60, 26, 108, 74), fill="red")
    draw.polygon(((23, 60), (105, 60), (64, 112)), fill="red")
    return picture


def star() -> Image.Image:
    points = ((64, 14), (78, 50), (116, 52), (86, 76), (97, 112), (64, 91), (31, 112), (42, 76), (12, 52), (50, 50))
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).polygon(points, fill="gold")
    return picture


def test_colours_are_told_apart() -> None:
    colors = {"red": "#e02a3c", "blue": "#3b82d0", "green": "#5aae4a", "yellow": "#fccd3c", "brown": "#8a5a3c"}
    labels = [f"{name} circle" for name in colors]
    found = classify(load_clip(device="cpu"), [circle(color) for color in colors.values()], labels)
    assert [matches[0].label for matches in found] == labels


def test_things_are_told_apart() -> None:
    found = classify(load_clip(device="cpu"), [heart(), star()], ["heart", "star", "cat", "car", "apple", "house"])
    assert [matches[0].label for matches in found] == ["heart", "star"]
