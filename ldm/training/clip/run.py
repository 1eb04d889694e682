"""Training a CLIP of any open_clip config on one's own pictures: from files to files."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldm.errors import LdmError
from ldm.pipeline.device import choose_device
from ldm.pipeline.files import read_file
from ldm.training.clip.data import Pairs, open_pairs
from ldm.training.clip.model import MODEL_FILE, ClipConfig, build, export, read_config, tokenizer
from ldm.training.clip.objective import CLIPObjective, Contrast, Labelled
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.precision import precision_on, slowness
from ldm.training.engine.ranks import first_rank_first, rank_and_ranks
from ldm.weights.io import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipRun:
    """What is trained, on what, and where it goes.

    data, held_out, mirror: as in `ldm.training.clip.data.open_pairs`; config, text_model: as in
    `ldm.training.clip.model.read_config`; chunks: as in `CLIPObjective`.
    labels: a JSON file {picture's name: label} of which the held-out ones are classified while training goes on.
    """

    data: Path
    config: str
    output: Path
    loss: Contrast = "softmax"
    chunks: int = 1
    text_model: Path | None = None
    labels: Path | None = None
    held_out: float = 0.05
    mirror: bool = False


def train_clip(run: ClipRun, loop: LoopConfig) -> Path:
    """Train, or resume what `run.output` holds; returns the file of the averaged weights, beside it its config.

    open_clip loads both: `open_clip.create_model("local-dir:OUTPUT")`. Raises LdmError for bad input, before a model is
    built, and as `ldm.training.engine.loop.train` does.
    """
    _check(run, loop)
    config = read_config(run.config, run.loss, run.text_model)
    _check_output(run, config)
    with first_rank_first():
        pairs = open_pairs(
            run.data, run.output / "data", config.fit, held_out=run.held_out, mirror=run.mirror, seed=loop.seed
        )
    share = len(pairs.kept) // rank_and_ranks()[1]
    if loop.batch > share:
        raise LdmError(f"batch: found {loop.batch}, expected at most {share}, the pictures to train on; give --batch")
    labelled = None if run.labels is None else read_labels(run.labels, pairs)
    tokens = tokenizer(config)
    torch.manual_seed(loop.seed)
    model = build(config)
    objective = CLIPObjective(
        model, pairs, tokens, config.pixels,
        loss=run.loss, chunks=run.chunks, labelled=labelled, config=config.digest(),
    )  # fmt: skip
    log.info("%s: %.1f M parameters, %d pictures", config.name, _millions(model), len(pairs.kept))
    average = train(objective, loop, run.output)
    average.swap()
    if rank_and_ranks()[0] == 0:
        export(run.output, model, config)
    return run.output / MODEL_FILE


def read_labels(path: Path, pairs: Pairs) -> Labelled:
    """The held-out pictures that a JSON object {name: label} names. Raises LdmError where it names none of them."""
    try:
        told = json.loads(read_file(path, 2**28))
    except (ValueError, RecursionError) as error:
        raise LdmError(f"labels: {printable(str(path))}: is not JSON ({error})") from None
    if not isinstance(told, dict) or not all(isinstance(label, str) and label for label in told.values()):
        raise LdmError(f"labels: {printable(str(path))}: expected a JSON object of pictures' names and their labels")
    classes = sorted(set(told.values()))
    number = {label: i for i, label in enumerate(classes)}
    found = [(i, number[told[pairs.names[i]]]) for i in pairs.held_out.tolist() if pairs.names[i] in told]
    if not found:
        example = printable(pairs.names[int(pairs.held_out[0])])
        raise LdmError(f"labels: {printable(str(path))}: names no held-out picture; their names are like {example}")
    pictures, labels = np.array(found).T
    return Labelled(classes, pictures, labels)


def _check(run: ClipRun, loop: LoopConfig) -> None:
    """Raise LdmError for numbers that no run can have."""
    numbers = {
        "batch": loop.batch, "steps": loop.steps, "accumulate": run.chunks, "save-every": loop.save_every,
        "evaluate-every": loop.evaluate_every, "log-every": loop.log_every,
    }  # fmt: skip
    for name, number in numbers.items():
        if number < 1:
            raise LdmError(f"{name}: found {number}, expected 1 or more")
    if loop.batch < 2:
        raise LdmError("batch: found 1, expected 2 at least: there has to be something to tell a picture from")
    if run.chunks > loop.batch:
        raise LdmError(f"accumulate: found {run.chunks}, expected at most the batch, {loop.batch}")
    if not 0 < run.held_out < 1:
        raise LdmError(f"held-out: found {run.held_out}, expected a share between 0 and 1")
    if not 0 < loop.rate < 1:
        raise LdmError(f"rate: found {loop.rate}, expected above 0 and below 1")
    if not 0 <= loop.ema < 1:
        raise LdmError(f"ema: found {loop.ema}, expected 0 or more, and below 1")
    if not 0 <= loop.weight_decay < math.inf:
        raise LdmError(f"weight-decay: found {loop.weight_decay}, expected 0 or more")
    for name, number in (("warmup", loop.warmup), ("seed", loop.seed)):
        if number < 0:
            raise LdmError(f"{name}: found {number}, expected 0 or more")
    if note := slowness(choose_device(), precision_on(choose_device(), loop.precision)):
        log.warning(note)


def _check_output(run: ClipRun, config: ClipConfig) -> None:
    """Raise LdmError where the run's files would take the place of somebody's."""
    output, shown = run.output.resolve(), printable(str(run.output))
    sources = [*config.folders(), *([] if run.text_model is None else [run.text_model])]
    if output in (folder.resolve() for folder in sources):
        raise LdmError(f"output: found {shown}, where the text model lies and would be overwritten; choose another")
    if (output / MODEL_FILE).exists() and not any(output.glob("step-*")):
        raise LdmError(f"output: {shown} holds {MODEL_FILE}, which no run here has made; choose another")


def _millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
