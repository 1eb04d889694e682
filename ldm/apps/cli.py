"""The `ldm` command: parse, call, answer. Errors are one line and exit code 2; only the commands import torch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, TextIO, assert_never

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from ldm import __version__
from ldm.apps.flags.commands import (
    Bench,
    Check,
    Classify,
    Command,
    Convert,
    Depth2Img,
    Generate,
    Grid,
    Img2Img,
    Index,
    Info,
    Inpaint,
    Interpolate,
    Outpaint,
    Pca,
    Plan,
    PriorSheet,
    Redo,
    Score,
    Search,
    Sheet,
    Show,
    TextDiff,
    Train,
    TrainClip,
    Tune,
    Upscale,
    Variations,
)
from ldm.apps.flags.shared import Model
from ldm.apps.output.progress import to_stderr
from ldm.errors import LdmError

DESCRIPTION = f"""Pictures from text by latent diffusion: ldm generate "a red apple". Version {__version__}."""

_Parsed = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Img2Img, subcommand("img2img")]
    | Annotated[Inpaint, subcommand("inpaint")]
    | Annotated[Outpaint, subcommand("outpaint")]
    | Annotated[Upscale, subcommand("upscale")]
    | Annotated[Variations, subcommand("variations")]
    | Annotated[Depth2Img, subcommand("depth2img")]
    | Annotated[Interpolate, subcommand("interpolate")]
    | Annotated[TextDiff, subcommand("textdiff")]
    | Annotated[Pca, subcommand("pca")]
    | Annotated[PriorSheet, subcommand("prior")]
    | Annotated[Grid, subcommand("grid")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Redo, subcommand("redo")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Sheet, subcommand("sheet")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Train, subcommand("train")]
    | Annotated[TrainClip, subcommand("train-clip")]
    | Annotated[Tune, subcommand("tune")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Index, subcommand("index")]
    | Annotated[Search, subcommand("search")]
    | Annotated[Classify, subcommand("classify")]
    | Annotated[Score, subcommand("score")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for what the caller can mend, 130 when interrupted."""
    _mend_streams()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture is an error of ours, in one line
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except LdmError as error:
        to_stderr(str(error))
        return 2
    except KeyboardInterrupt:
        to_stderr("interrupted")
        return 130
    except (RuntimeError, MemoryError) as error:
        if (message := _no_room(error)) is None:
            raise
        to_stderr(message)
        return 2
    except BrokenPipeError:  # the reader of our output left: leave too, without a word
        sys.stdout = _nowhere()  # for what is flushed at exit
        return 141


def _run(arguments: Sequence[str]) -> int:
    if list(arguments) in (["--version"], ["-V"]):
        print(f"ldm {__version__}")
    else:
        command = parse(arguments)
        with _attention(command):
            _dispatch(command)
    sys.stdout.flush()
    return 0


def _attention(command: Command) -> AbstractContextManager[None]:
    """The command runs with the attention kernel that its --attention asks for, if it has one. Raises `LdmError`."""
    model = getattr(command, "model", None)
    if not isinstance(model, Model) or model.attention == "auto":
        return contextlib.nullcontext()
    from ldm.layers.attention import attention_backend

    return attention_backend(model.attention)


def _no_room(error: Exception) -> str | None:
    """What to tell where the machine, and not the program, gave up: no memory left, or a GPU that was lost."""
    from ldm.pipeline.device import is_out_of_memory

    said = next(iter(str(error).splitlines()), type(error).__name__)
    if is_out_of_memory(error):
        return f"no memory left ({said}); free some, draw smaller pictures, or try another device"
    if "CUDA error" in said:
        return f"the GPU failed ({said}); try again, or --device cpu"
    return None


def _dispatch(command: Command) -> None:
    """Each command imports what it needs."""
    match command:
        case Generate() | Img2Img() | Inpaint() | Outpaint() | Upscale() | Variations() | Depth2Img():
            from ldm.apps.generate import generate

            generate(command)
        case Grid():
            from ldm.apps.grid import grid

            grid(command)
        case Show():
            from ldm.apps.show import show

            show(command.image, as_json=command.json)
        case Redo():
            from ldm.apps.redo import redo

            redo(command)
        case Info():
            from ldm.apps.info import info

            info(command.file, as_json=command.json, deep=command.deep, allow_pickle=command.allow_pickle)
        case Convert():
            from ldm.apps.convert import convert

            convert(command)
        case Sheet():
            from ldm.apps.sheet import sheet

            sheet(command)
        case Check():
            from ldm.apps.check import check

            check(command)
        case Train() | TrainClip() | Tune():
            _train(command)
        case Bench():
            from ldm.apps.bench import bench

            bench(command)
        case Plan(tune=str()):
            _train(command)
        case Plan():
            from ldm.apps.plan import plan

            plan(command)
        case Index():
            from ldm.apps.index import index

            index(command)
        case Search():
            from ldm.apps.search import search

            search(command)
        case Classify():
            from ldm.apps.classify import classify

            classify(command)
        case Score():
            from ldm.apps.score import score

            score(command)
        case Interpolate():
            from ldm.apps.interpolate import interpolate

            interpolate(command)
        case TextDiff():
            from ldm.apps.textdiff import textdiff

            textdiff(command)
        case Pca():
            from ldm.apps.pca import pca

            pca(command)
        case PriorSheet():
            from ldm.apps.prior import prior

            prior(command)
        case other:
            assert_never(other)


def _train(command: Train | TrainClip | Tune | Plan) -> None:
    """Raises `LdmError` where the packages for training are not installed."""
    try:
        has_bar = isinstance(command, Tune) and sys.stderr.isatty()
        shown = logging.WARNING if has_bar or isinstance(command, Plan) else logging.INFO
        logging.basicConfig(level=shown, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's words on its own future
        match command:
            case TrainClip():
                from ldm.apps.train_clip import run as train_clip

                train_clip(command)
            case Tune():
                from ldm.apps.tune import tune

                tune(command)
            case Plan():
                from ldm.apps.plan_tune import plan_tune

                plan_tune(command)
            case Train():
                from ldm.training.recipes import run

                run(command.recipe, command.output, pictures=command.pictures, steps=command.steps)
    except ModuleNotFoundError as error:
        package = (error.name or "ldm").partition(".")[0]
        if package == "ldm":
            raise
        raise LdmError(f"train: the package {package} is not installed; pip install -e '.[train]'") from None


def parse(arguments: Sequence[str]) -> Command:
    """Arguments -> the command's record. Raises `LdmError` for what is not understood, SystemExit(0) after --help."""
    parsed: Callable[..., Any] = tyro.cli
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parsed(
                _Parsed,
                prog="ldm",
                description=DESCRIPTION,
                args=list(arguments),
                config=(OmitArgPrefixes, OmitSubcommandPrefixes, FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise LdmError(_one_line(said.getvalue(), next(iter(arguments), ""))) from None


def _one_line(box: str, command: str) -> str:
    """The parser draws a framed text of several parts: the first says what is wrong, another may suggest a flag."""
    rows = [re.sub(r"^[│|]\s?|\s*[│|]$", "", row) for row in box.splitlines() if not row.startswith(("╭", "╰"))]
    parts = [" ".join(part.split()) for part in re.split(r"^\s*[─-]{3,}\s*$", "\n".join(rows), flags=re.MULTILINE)]
    if (
        not box.startswith("╭") and len(parts) > 1
    ):  # where the terminal has no such characters, the title is a part of its own
        del parts[0]
    what = parts[0].partition(" Got errors:")[0].removeprefix("Error parsing ").rstrip(".")
    what = re.sub(
        r"no type matching \{None\}\|(\w+) could be instantiated from \[(.*)\]", r"found \2, expected \1", what
    )
    what = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"found \1, expected a whole number", what)
    what = re.sub(r"could not convert string to float: (.*)", r"found \1, expected a number", what)
    suggested = _closest(what, " ".join(parts).partition("Perhaps you meant:")[2])
    available = next((part for part in parts if part.startswith("Available subcommands")), "")
    hint = (
        f"did you mean {suggested}?"
        if suggested
        else available or f"see {'ldm' if command.startswith('-') else f'ldm {command}'.rstrip()} --help"
    )
    return f"{what}; {hint}"


def _closest(what: str, offered: str) -> str | None:
    """Of the flags offered, the one most like the first that was given; None where there is none."""
    given = re.search(r"--[\w-]+", what)
    flags = [flag for flag in re.findall(r"--[\w-]+", offered) if flag != "--help"]
    return max(flags, key=lambda flag: SequenceMatcher(None, given[0] if given else "", flag).ratio(), default=None)


def _mend_streams() -> None:
    """Have streams to write to that refuse no character, also where the shell closed them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # so that no file of ours becomes stdout
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w")
