"""The report on a tuning run: one HTML page without scripts or other files, that says what happened and shows it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError, printable
from ldm.evaluation.curves import Curves
from ldm.evaluation.estimate import mean
from ldm.evaluation.verdict import Verdict
from ldm.weights.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS = 320
"""The longer side of a picture on the page."""

COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--train)",
    "#010205": "var(--held-out)",
    "#010206": "var(--faint)",
}
"""Colours that a plot is drawn in, and what the page's style knows them by, so that they follow light and dark."""

TEXT, TRAIN, HELD_OUT, FAINT = COLOURS


@dataclass(frozen=True, eq=False)
class Samples:
    """What one caption gave at each stage; None where it was not drawn."""

    caption: str
    pictures: tuple[Image.Image | None, ...]


@dataclass(frozen=True, eq=False)
class Pair:
    """A sample, the training picture that it is nearest to, and how near that is in words."""

    words: str
    sample: Image.Image
    picture: Image.Image


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows.

    stages:   when samples were drawn ("before", "step 500", "after"), as many as each of `samples` has pictures
    notes:    what else is to be said of the result, in sentences; pairs: samples and the pictures nearest to them
    settings: of the run; costs: time and memory; left_out: what of the data was not used, and why
    """

    title: str
    verdict: Verdict
    curves: Curves
    stages: tuple[str, ...] = ()
    samples: tuple[Samples, ...] = ()
    notes: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    settings: Mapping[str, str] | None = None
    costs: Mapping[str, str] | None = None
    left_out: tuple[str, ...] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write the page, whole or not at all; it takes the place of one that is there.

    Raises LdmError where samples and stages differ in number, where it cannot be written, and without jinja2 and
    matplotlib.
    """
    for row in report.samples:
        if len(row.pictures) != len(report.stages):
            raise LdmError(f"samples: {len(row.pictures)} pictures of a caption; expected one of each stage")
    page = _page(report)
    with replacing(path) as file:
        file.write(page.encode())


def _page(report: Report) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise LdmError("jinja2 is not installed, which reports are written with; pip install 'ldm[tune]'") from error

    def plain(value: object) -> object:
        return printable(value) if type(value) is str else value  # file names may hold what no page can

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain,
    )
    plots = [(title, Markup(svg), words) for title, svg, words in _plots(report)]
    return environment.get_template("report.html").render(report=report, plots=plots, data=_data, zip=zip)


def _data(image: Image.Image) -> str:
    """The picture as a PNG in a link, no larger than the page needs."""
    small = image.convert("RGB")
    small.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    small.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _plots(report: Report) -> list[tuple[str, str, str]]:
    """Title, picture and words of each plot."""
    curves = report.curves
    held_out = curves.held_out.shape[1] > 0
    return [
        (
            "Loss over the run",
            _svg("loss", lambda axes: _loss(axes, curves, report.verdict)),
            "Change of the loss since before the first step, each picture told its own caption; the bands are one "
            "standard error over pictures.",
        ),
        (
            "By noise level",
            _svg("levels", lambda axes: _levels(axes, curves, report.verdict)),
            "Change of the loss at each timestep: low ones decide on detail, high ones on what is where.",
        ),
        (
            "What captions tell",
            _svg("captions", lambda axes: _captions(axes, curves)),
            f"How much greater the loss on {'held-out' if held_out else 'training'} pictures is when another picture's "
            "caption is told. Captions that fit keep it above 0.",
        ),
    ]


def _loss(axes: Axes, curves: Curves, verdict: Verdict) -> None:
    for losses, colour, label in ((curves.train, TRAIN, "training"), (curves.held_out, HELD_OUT, "held out")):
        if losses.shape[1]:
            _curve(
                axes, curves.steps, losses / losses[0].mean(dim=0) - losses[0] / losses[0].mean(dim=0), colour, label
            )
    for step, label in ((verdict.best_step, "best"), (verdict.gap_step, "gap")):
        if step is not None:
            axes.axvline(step, color=TEXT, linewidth=0.8, linestyle=":")
            axes.annotate(
                label, (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                color=TEXT, ha="center", fontsize=9,
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="change of the loss, %")


def _levels(axes: Axes, curves: Curves, verdict: Verdict) -> None:
    best = int((curves.steps - verdict.best_step).abs().argmin())
    last = int(curves.train.isfinite().flatten(1).all(dim=1).nonzero()[-1])
    lines = [(curves.train, last, TRAIN, "training, end", "-"), (curves.held_out, last, HELD_OUT, "held out, end", "-")]
    if best not in (0, last):
        lines.append((curves.held_out, best, HELD_OUT, "held out, best", "--"))
    for losses, look, colour, label, style in lines:
        if losses.shape[1]:
            change = 100 * (losses[look].mean(dim=0) / losses[0].mean(dim=0) - 1)
            axes.plot(curves.timesteps, change, color=colour, label=label, linestyle=style, marker="o", markersize=3)
    axes.set(xlabel="timestep (noise level)", ylabel="change of the loss, %")


def _captions(axes: Axes, curves: Curves) -> None:
    own, swapped, colour, label = curves.held_out, curves.held_out_swapped, HELD_OUT, "held out"
    if not own.shape[1]:
        own, swapped, colour, label = curves.train, curves.train_swapped, TRAIN, "training"
    _curve(axes, curves.steps, (swapped / own).log(), colour, label)
    axes.set(xlabel="step", ylabel="greater by, %")


def _curve(axes: Axes, steps: Tensor, values: Tensor, colour: str, label: str) -> None:
    """Means of (S, N, T) in percent, with their standard errors, where they are numbers."""
    estimates = [mean(look) for look in values]
    middle = torch.tensor([100 * e.value for e in estimates])
    error = torch.tensor([100 * e.error for e in estimates]).nan_to_num(0, posinf=0)
    middle[~middle.isfinite()] = torch.nan
    axes.plot(steps, middle, color=colour, label=label, marker="o", markersize=3)
    axes.fill_between(steps, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    """A plot as SVG that can stand inside of a page: no names of its own, no addresses, the page's colours."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LdmError("matplotlib is not installed, which reports are drawn by; pip install 'ldm[tune]'") from error

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(4.2, 3), layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=TEXT, color=FAINT)
        axes.xaxis.label.set_color(TEXT)
        axes.yaxis.label.set_color(TEXT)
        axes.legend(frameon=False, labelcolor=TEXT)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"| xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    for drawn, known in COLOURS.items():
        svg = svg.replace(drawn, known)
    return svg
