"""The stage that trains the judge of `ldm.evaluation.judge`: packed pictures of one concept each -> which it is.

It is taught to overlook what a generator changes and a person would not mind: size and place, sides, brightness and
contrast, sharpness and a little noise. Shapes: N pictures, B batch, C classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.packed import open_packed
from ldm.data.records import Record, may_flip
from ldm.errors import LdmError
from ldm.evaluation.judge import GROUPS, Judge, JudgeConfig
from ldm.evaluation.retrieval import top_k
from ldm.training.autoencoder import to_unit
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.training.stages import HELD_OUT_EVERY, Workspace
from ldm.weights.config_json import record_from_json
from ldm.weights.io import printable, some
from ldm.weights.layout import compare_networks, unfilled
from ldm.weights.save import write_tensors
from ldm.weights.source import raw_source

JUDGE = "ldm-judge.safetensors"
JUDGE_KEY = "ldm.judge"
"""The metadata key that holds a `JudgeConfig` as JSON."""
LEAST = 12
"""A concept is taught where so many pictures show it and nothing else."""
UNKNOWN = -1
SMOOTHING = 0.1
"""Of labels: some concepts look alike, and some pictures show little (Szegedy et al. 2016, section 7)."""
SMALLEST = 0.7
"""The share of a picture's side that is seen at least."""


def train_judge(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn all concepts that are shown often enough; write the averaged weights as a file of their own."""
    assert loop is not None
    pictures, records = open_packed(work.pictures, work.config.size)
    concepts, names, labels = labelled(records, LEAST)
    numbers = np.flatnonzero(labels != UNKNOWN)
    held_out = numbers % HELD_OUT_EVERY == 0
    if len(concepts) < 2 or held_out.all():
        raise LdmError(f"{work.pictures}: {len(concepts)} concepts with {LEAST} pictures each, expected two or more")
    torch.manual_seed(loop.seed)
    judge = Judge(JudgeConfig(concepts, names))
    flips = np.array([may_flip(record) for record in records])
    objective = JudgeObjective(judge, pictures, labels, flips, numbers[~held_out], numbers[held_out])
    train(objective, loop, work.stage("judge")).swap()
    save_judge(work.runs / JUDGE, judge)


class JudgeObjective(Objective):
    """Cross-entropy over concepts that are drawn alike often, however many pictures each has."""

    def __init__(
        self,
        judge: Judge,
        pictures: np.ndarray,
        labels: np.ndarray,
        flips: np.ndarray,
        kept: np.ndarray,
        held_out: np.ndarray,
    ) -> None:
        """pictures: uint8 (N, size, size, 3), may be a memory map; labels: (N,) classes; flips: (N,) may be mirrored.

        kept, held_out: numbers of the pictures that are trained on, and of those that never are.
        """
        super().__init__()
        self.judge = judge.to(memory_format=torch.channels_last)
        self.pictures, self.labels, self.flips, self.held_out = pictures, labels, flips, held_out
        by_class = [kept[labels[kept] == number] for number in range(len(judge.config.concepts))]
        self.by_class = [numbers for numbers in by_class if len(numbers)]

    def facts(self) -> dict[str, object]:
        """The concepts that it is taught."""
        return {"concepts": len(self.judge.config.concepts)}

    def batch(self, draw: Draw) -> Batch:
        """Pictures (B, 3, size, size) in [-1, 1], each changed in its own way, and their labels (B,)."""
        draws = torch.rand(draw.count, 2, generator=draw.generator).double()
        chosen = []
        for one, other in draws.tolist():
            numbers = self.by_class[int(one * len(self.by_class))]
            chosen.append(int(numbers[int(other * len(numbers))]))
        plain = to_unit(np.stack([self.pictures[i] for i in chosen]))
        changed = altered(plain, torch.from_numpy(self.flips[chosen]), draw.generator)
        return {"pictures": changed, "labels": torch.from_numpy(self.labels[chosen])}

    def forward(self, batch: Batch) -> Batch:
        """-> loss, and the share of right answers."""
        logits = self.judge(batch["pictures"]).float()
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=SMOOTHING)
        return {"loss": loss, "right": (logits.argmax(dim=1) == batch["labels"]).float().mean()}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """The share of held-out pictures whose concept is the likeliest, and among the likeliest five."""
        return accuracy(self.judge, self.pictures, self.labels, self.held_out)


def altered(pictures: Tensor, flips: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W), each cut, mirrored where it may be, brightened, blurred and noised as a draw has it."""
    count, side = len(pictures), pictures.shape[-1]
    share, across, down, mirror, bright, contrast, blur, noise = torch.rand(8, count, generator=generator)
    share = 1 - (1 - SMALLEST) * share
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = share * torch.where(flips & (mirror < 0.5), -1.0, 1.0)
    theta[:, 1, 1] = share
    theta[:, 0, 2], theta[:, 1, 2] = (1 - share) * (2 * across - 1), (1 - share) * (2 * down - 1)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    seen = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    soft = F.interpolate(F.avg_pool2d(seen, 4), (side, side), mode="bilinear")
    seen = torch.lerp(seen, soft, blur[:, None, None, None])
    gain, lift = (0.8 + 0.4 * contrast)[:, None, None, None], (0.4 * bright - 0.2)[:, None, None, None]
    grain = torch.randn(seen.shape, generator=generator) * (0.1 * noise)[:, None, None, None]
    return (seen * gain + lift + grain).clamp(-1, 1)


def labelled(records: Sequence[Record], least: int) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """The concepts that `least` pictures or more show alone, their names, and each picture's class (N,) or UNKNOWN."""
    alone = [single_concept(record) for record in records]
    counts = Counter(concept for concept in alone if concept is not None)
    concepts = tuple(sorted(concept for concept, count in counts.items() if count >= least))
    numbers = {concept: number for number, concept in enumerate(concepts)}
    names = dict(zip(concepts, concepts, strict=True))
    for record, concept in zip(records, alone, strict=True):
        if concept in numbers and record.get("kind") == "emoji" and isinstance(label := record.get("label"), str):
            names[concept] = label.partition(":")[0]  # "woman standing: medium-dark skin tone"
    labels = np.array([UNKNOWN if concept is None else numbers.get(concept, UNKNOWN) for concept in alone])
    return concepts, tuple(names[concept] for concept in concepts), labels


def labels_of(judge: Judge, records: Sequence[Record]) -> np.ndarray:
    """The class of each picture for a judge that was taught, (N,); UNKNOWN of those that show something else."""
    numbers = {concept: number for number, concept in enumerate(judge.config.concepts)}
    return np.array([numbers.get(single_concept(record) or "", UNKNOWN) for record in records])


def single_concept(record: Record) -> str | None:
    """What a picture shows, once or several times; None where it shows several things, or nothing that has a name."""
    found = record.get("concept")
    concepts = {found} if isinstance(found, str) else set(found or [])
    return concepts.pop() if len(concepts) == 1 else None


@torch.no_grad()
def accuracy(judge: Judge, pictures: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> dict[str, float]:
    """The shares of these pictures whose class is the likeliest, and among the likeliest five; nothing of none."""
    if not len(numbers):
        return {}
    seen = to_unit(np.stack([pictures[i] for i in numbers]))
    found = top_k(judge.probabilities(seen), torch.from_numpy(labels[numbers]))
    return {"top1": found[1], "top5": found[5]}


def save_judge(path: Path, judge: Judge) -> None:
    """Write a judge, in float16; what was at `path` is replaced at the end, or stays."""
    write_tensors(path, judge.state_dict(), {JUDGE_KEY: json.dumps(asdict(judge.config))}, torch.float16)


def read_judge(path: str | Path) -> Judge:
    """A judge from a file that `save_judge` wrote, on the CPU. Raises LdmError where it is none, or a damaged one."""
    source = raw_source(Path(path))
    name = printable(str(path))
    if (text := source.metadata.get(JUDGE_KEY)) is None:
        raise LdmError(f"{name}: is no judge: its metadata has no {JUDGE_KEY}; run ldm train small-judge")
    try:
        config = record_from_json(JudgeConfig, text, JUDGE_KEY, _check)
    except LdmError as error:
        raise LdmError(f"{name}: {error}") from None
    judge = unfilled(lambda: Judge(config))
    found = compare_networks(source.tensors, {"": judge})
    if wrong := [*found.missing, *found.unexpected, *found.misshapen]:
        raise LdmError(f"{name}: does not hold the judge that its metadata describes: {some(wrong, 3)}; train it anew")
    state = {tensor: t.float() for tensor, t in source.read(judge.state_dict())}
    judge.load_state_dict(state, strict=True, assign=True)
    return judge.eval().requires_grad_(False)


def _check(config: JudgeConfig) -> None:
    """Nothing may be too large to lay out. Raises ValueError."""
    if not 0 < len(config.concepts) == len(config.names) <= 65536:
        raise ValueError(f"{len(config.names)} names for {len(config.concepts)} concepts")
    if not config.widths or any(width % GROUPS or not 0 < width <= 4096 for width in config.widths):
        raise ValueError(f"a width is out of range, or no multiple of {GROUPS}")
    if not (1 <= config.blocks <= 64 and len(config.widths) <= 6 and 2 ** len(config.widths) <= config.size <= 1024):
        raise ValueError("a size is out of range")
