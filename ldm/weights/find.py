"""Model files by name, in the folders that people have: those of AUTOMATIC1111's web UI, of ComfyUI, or a flat one.

A name is a file's name or its path inside one of the kind's folders, with or without the suffix. It never leads out of
the folders: neither by `..`, nor by a drive, nor by a link.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ldm.errors import LdmError
from ldm.weights.io import printable

Kind = Literal["checkpoint", "lora", "vae", "controlnet", "embedding", "unet", "text encoder"]

MODELS_VARIABLE = "LDM_MODELS"
"""The environment variable that lists folders with model files, separated as in PATH."""

FOLDERS: dict[Kind, tuple[str, ...]] = {
    "checkpoint": ("Stable-diffusion", "checkpoints", "diffusers"),
    "lora": ("Lora", "LyCORIS", "loras"),
    "vae": ("VAE", "vae", "VAE-taesd", "vae_approx"),
    "controlnet": ("ControlNet", "controlnet"),
    "embedding": ("embeddings",),
    "unet": ("unet", "diffusion_models"),
    "text encoder": ("text_encoders", "clip"),
}
"""Where the two programs keep each kind, inside the program's folder, its folder `models`, or both.

A kind for which there is none is looked for all over the program's folder, but for the folders of other kinds.
"""

SUFFIXES = (".safetensors", ".index.json", ".ckpt", ".pt", ".pth", ".bin")
"""What model files end in; where two differ in this alone, the first is meant."""

MAX_FILES = 20_000


@dataclass(frozen=True)
class ModelFile:
    """A file, or a folder that diffusers wrote. name: its path inside the folder of its kind, with slashes."""

    name: str
    path: Path
    root: Path

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return without_suffix(self.name)


def model_roots(given: Sequence[str | Path] | None = None) -> list[Path]:
    """The folders to search: those given, else those of LDM_MODELS. Raises LdmError for what is no folder."""
    listed = os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if given is None else given
    roots = [Path(folder).expanduser() for folder in listed if str(folder)]
    for root in roots:
        if not os.path.isdir(root):  # noqa: PTH112 (says no, where Path raises, of a name that is too long)
            whence = f"; it is named by the environment variable {MODELS_VARIABLE}" if given is None else ""
            raise LdmError(f"{printable(str(root))}: is no folder; expected one with model files{whence}")
    return roots


def locate(kind: Kind, given: str | Path, roots: Sequence[Path]) -> Path:
    """The file that a person means: what lies at this path, else what `find` finds. Without roots, the path itself."""
    return Path(given) if not roots or os.path.lexists(given) else find(kind, str(given), roots)


def find(kind: Kind, name: str, roots: Sequence[Path], *, follow: bool = False) -> Path:
    """The one file of this kind that a name stands for.

    Looked for in turn: the path inside a folder, the same without suffix, the file's name, the same without suffix;
    then all four again whatever the case. follow: whether links may lead out of the roots. Raises LdmError where no
    file fits, with those that are close, or where several do, with all of them.
    """
    files = listing(kind, roots, follow=follow)
    if _is_safe(name):
        for fold in (str, str.casefold):
            for view in VIEWS:
                fitting = [file for file in files if fold(view(file)) == fold(name)]
                if fitting := _best_suffix(fitting):
                    return _only(name, fitting)
    stems = {file.stem.casefold(): file.name for file in files}
    close = difflib.get_close_matches(without_suffix(name).casefold(), stems, n=5, cutoff=0.5)
    places = ", ".join(printable(str(root)) for root in roots)
    hint = f"; close to it: {', '.join(printable(stems[stem]) for stem in close)}" if close else ""
    raise LdmError(f"{printable(name)[:200]}: no such file, and no {kind} of that name under {places}{hint}")


VIEWS: tuple[Callable[[ModelFile], str], ...] = (
    lambda file: file.name,
    lambda file: file.stem,
    lambda file: file.path.name,
    lambda file: without_suffix(file.path.name),
)
"""What a person may call a file."""


def listing(kind: Kind, roots: Sequence[Path], *, follow: bool = False) -> list[ModelFile]:
    """All files of this kind under the roots, sorted by name; each once. At most 20,000, hidden ones left out."""
    files: dict[Path, ModelFile] = {}
    for root in roots:
        known = _known_folders(root)
        others = {folder for folders in known.values() for folder in folders}
        for folder in known[kind] or [root]:
            for path in _walk(folder, kind, others):
                real = path.resolve()
                if (follow or real.is_relative_to(root.resolve())) and real not in files:
                    files[real] = ModelFile(path.relative_to(folder).as_posix(), path, root)
                if len(files) > MAX_FILES:
                    raise LdmError(f"{printable(str(root))}: holds more than {MAX_FILES} model files")
    return sorted(files.values(), key=lambda file: file.name)


def _known_folders(root: Path) -> dict[Kind, list[Path]]:
    """The folders of each kind that are there under a root."""
    return {
        kind: [place / name for place in (root, root / "models") for name in FOLDERS[kind] if (place / name).is_dir()]
        for kind in get_args(Kind)
    }


def _walk(folder: Path, kind: Kind, others: Set[Path]) -> Iterator[Path]:
    """Model files in a folder and those inside it but for `others`, and for checkpoints the folders of diffusers."""
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and Path(place, name) not in others)
        if "model_index.json" in names:
            inner.clear()
            if kind == "checkpoint":
                yield Path(place)
            continue
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(place, name)


def _is_safe(name: str) -> bool:
    """Whether a name stays inside a folder on every system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and name.isprintable() and not set(name) & set("\\:") and "/" not in parts and ".." not in parts


def _best_suffix(files: list[ModelFile]) -> list[ModelFile]:
    """Of files that differ in their suffix alone, the one whose suffix comes first."""
    best: dict[Path, ModelFile] = {}
    for file in sorted(files, key=_suffix_rank):
        best.setdefault(file.path.with_name(without_suffix(file.path.name)), file)
    return list(best.values())


def _suffix_rank(file: ModelFile) -> int:
    suffixes = (index for index, suffix in enumerate(SUFFIXES) if file.name.lower().endswith(suffix))
    return next(suffixes, len(SUFFIXES))


def _only(name: str, files: list[ModelFile]) -> Path:
    if len(files) > 1:
        paths = ", ".join(printable(str(file.path)) for file in files[:10])
        raise LdmError(f"{printable(name)[:200]}: {len(files)} files have this name: {paths}; give the path of one")
    return files[0].path


def without_suffix(name: str) -> str:
    """A model file's name without what tells its format; other dots stay."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]
