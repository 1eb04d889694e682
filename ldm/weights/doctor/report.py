"""What is known of a model file, as plain records: `describe` fills them in, `ldm info` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm.weights.doctor.adapter import AdapterFacts
from ldm.weights.layout import Comparison


@dataclass(frozen=True)
class PartReport:
    """One network's share of a file. size: in bytes."""

    name: str
    tensors: int
    parameters: int
    size: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class System:
    """What a checkpoint was found to be, and which rules decided."""

    family: str
    family_rule: str
    variant: str
    prediction: str
    prediction_rule: str
    zero_terminal_snr: bool
    resolution: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class EmbeddingFacts:
    """A textual-inversion embedding. name: the word; vectors: how many; widths: of each text tower's vectors."""

    name: str
    vectors: int
    widths: tuple[int, ...]
    steps: int | None
    base: str | None


@dataclass(frozen=True)
class Hashes:
    """Hashes in the words of the programs that show them; None: only a deep look tells. checks: what the file says of
    itself -> whether that is right."""

    old_short: str | None = None
    auto_v2: str | None = None
    auto_v3: str | None = None
    sha256: str | None = None
    numbers_sha256: str | None = None
    checks: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Numbers:
    """What only all of the numbers tell: tensors with NaN or infinity; matrices and kernels of nothing but zeros."""

    non_finite: tuple[str, ...]
    all_zero: tuple[str, ...]


@dataclass(frozen=True)
class PickleReport:
    """What a pickle names. readable: whether the restricted reader takes it."""

    dangerous: tuple[str, ...]
    foreign: tuple[str, ...]
    complete: bool
    readable: bool
    verdict: str


@dataclass(frozen=True)
class Remedy:
    """What can be mended or had, and the command for it."""

    what: str
    command: str


@dataclass(frozen=True)
class Finding:
    """What one kind of file told of itself.

    family: sd1, sd2, sdxl, sdxl-refiner, ldm, where known; base: what it works with, in words, and what tells it;
    variant: what the U-Net's channels are for; problem: why nobody should load it, in one line.
    """

    family: str | None = None
    base: str | None = None
    variant: str | None = None
    system: System | None = None
    adapter: AdapterFacts | None = None
    embeddings: tuple[EmbeddingFacts, ...] = ()
    fit: Comparison | None = None
    problem: str | None = None


@dataclass(frozen=True)
class FileReport:
    """All that is known of a file.

    size, needed: its bytes, and those that it has when it is whole; layout: how it lies on disk; problem: why nobody
    should load it, in one line; warnings: what everybody should know; training: what the metadata tell of it, in words;
    read_by: other programs too; cautions: what these get wrong by themselves.
    """

    path: str
    size: int
    needed: int
    layout: str
    kind: str
    found: Finding
    parts: tuple[PartReport, ...]
    ema: bool
    problem: str | None
    warnings: tuple[str, ...]
    metadata: Mapping[str, str]
    training: Mapping[str, str]
    hashes: Hashes
    numbers: Numbers | None
    pickle: PickleReport | None
    read_by: tuple[str, ...]
    cautions: tuple[str, ...]
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True)
class FolderEntry:
    """A line of a folder's table. name: the path inside the folder."""

    name: str
    size: int
    kind: str
    family: str | None
    problem: str | None
