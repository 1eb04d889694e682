"""Textual-inversion embeddings: a few vectors that stand in a prompt for a word of their own (Gal et al. 2022).

| written by              | tensors                                            | name              |
|-------------------------|----------------------------------------------------|-------------------|
| AUTOMATIC1111 .pt       | string_to_param.* (n, d)                           | the file's        |
| AUTOMATIC1111 picture   | the same as JSON, in a text chunk or in the pixels | in the JSON       |
| diffusers               | one tensor (d) or (n, d)                           | the tensor's name |
| kohya                   | emb_params (n, d); SDXL: clip_l, clip_g            | the file's        |
| OneTrainer              | emp_params (n, d); SDXL: clip_l, clip_g            | the file's        |
| bundled with a LoRA     | bundle_emb.NAME. and any of these                  | in the tensors'   |

n vectors, d the width of a text tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import TEXT_WIDTHS
from ldm.weights.embedding_pictures import PICTURES, read_embedding_picture
from ldm.weights.io import printable
from ldm.weights.save import IMPLEMENTATION, write_tensors
from ldm.weights.source import raw_source

BUNDLE = "bundle_emb."
"""What stands before an embedding's name and tensors in a LoRA file."""

MAX_VECTORS = 75
"""A prompt has no more places, without start and end."""

OUTPUTS = ("emp_params_out", "clip_l_out", "clip_g_out")
"""OneTrainer's vectors that are added behind the text tower; no other program uses them, nor do we."""

ARCHITECTURES: Mapping[tuple[int, ...], str] = {
    (768,): "stable-diffusion-v1", (1024,): "stable-diffusion-v2-512", (768, 1280): "stable-diffusion-xl-v1-base",
    (1280,): "stable-diffusion-xl-v1-refiner",
}  # fmt: skip
"""ModelSpec's names of the published families, by the widths of their text towers."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """An embedding as it lies in a file.

    name:    the word that it is used by
    vectors: (n, d) float32 for each text tower, SDXL's CLIP-L before its bigG
    hash:    the file's SHA-256, in hexadecimal
    steps:   how long it was trained, where the file says so; base: the name of the model that it was trained on
    unused:  tensors of the file that drawing does without
    """

    name: str
    vectors: tuple[Tensor, ...]
    hash: str
    steps: int | None = None
    base: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def places(self) -> int:
        """How many places it takes in a prompt."""
        return len(self.vectors[0])

    @property
    def widths(self) -> tuple[int, ...]:
        """d of each tower."""
        return tuple(vectors.shape[1] for vectors in self.vectors)

    @property
    def made_for(self) -> str:
        """The family it fits, in words."""
        widths = " and ".join(map(str, self.widths))
        return f"{TEXT_WIDTHS.get(sum(self.widths), 'a model')} (text {widths} wide)"


def read_embedding(path: str | Path, *, allow_pickle: bool = False) -> Embedding:
    """The embedding in a .safetensors, .png or .webp file or, where `allow_pickle`, in a .pt or .bin file.

    Raises LdmError where there is none, where there are several, or where its numbers are no vectors of a text tower.
    """
    embeddings = read_embeddings(path, allow_pickle=allow_pickle)
    if len(embeddings) != 1:
        names = ", ".join(printable(embedding.name) for embedding in embeddings)
        raise _error(
            Path(path), f"holds {len(embeddings)} embeddings ({names}), expected one; read_embeddings reads all"
        )
    return embeddings[0]


def read_embeddings(path: str | Path, *, allow_pickle: bool = False) -> tuple[Embedding, ...]:
    """All embeddings in a file: one, or as many as a LoRA file has bundled. Raises LdmError as `read_embedding`."""
    path = Path(path)
    if path.suffix.lower() in PICTURES:
        tensors, facts = read_embedding_picture(path)
        groups: dict[str | None, dict[str, Tensor]] = {facts.get("name"): tensors}
    else:
        source = raw_source(path, allow_pickle=allow_pickle)
        facts = source.metadata
        bundled = [name for name in source.tensors if name.startswith(BUNDLE)]
        groups = _by_word(source.read(bundled)) if bundled else {None: dict(source.read(source.tensors))}
    embeddings = [_embedding(path, tensors, facts, word) for word, tensors in groups.items()]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return tuple(replace(embedding, hash=digest) for embedding in embeddings)


def write_embedding(
    path: str | Path,
    embedding: Embedding,
    *,
    layout: Literal["kohya", "diffusers"] = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write .safetensors in kohya's form, which every program reads: `emb_params`, or `clip_l` and `clip_g` for SDXL.

    The word is then the file's name, for most programs; in diffusers' form it is the tensor's name. Of SDXL that one is
    kohya's too. dtype: None: float32; metadata: more entries, which win over ours. Raises LdmError where the file
    cannot be written.
    """
    names = {1: ("emb_params",), 2: ("clip_l", "clip_g")}[len(embedding.vectors)]
    if layout == "diffusers" and len(embedding.vectors) == 1:
        names = (embedding.name,)
    elif embedding.widths == (1280,):
        names = ("clip_g",)
    base = ARCHITECTURES.get(embedding.widths, "latent-diffusion")
    described = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base}/textual-inversion",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": embedding.name,
        "modelspec.trigger_phrase": embedding.name,
    }
    facts = {"ss_steps": embedding.steps, "ss_sd_model_name": embedding.base}
    described |= {key: str(value) for key, value in facts.items() if value is not None}
    write_tensors(path, dict(zip(names, embedding.vectors, strict=True)), described | dict(metadata or {}), dtype)


def _by_word(tensors: Iterable[tuple[str, Tensor]]) -> dict[str | None, dict[str, Tensor]]:
    """Bundled tensors by the embedding that they are of."""
    groups: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        word, _, rest = name.removeprefix(BUNDLE).partition(".")
        groups.setdefault(word, {})[rest] = tensor
    return groups


def _embedding(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], word: str | None) -> Embedding:
    """One embedding of a file's tensors, yet without the hash; word: what it is called where no tensor's name says."""
    unused = tuple(name for name in OUTPUTS if name in tensors)
    names, token = _choose(path, tensors.keys() - unused)
    vectors = tuple(_vectors(path, name, tensors[name]) for name in names)
    if len({len(tower) for tower in vectors}) > 1:
        counts = " and ".join(str(len(tower)) for tower in vectors)
        raise _error(path, f"has {counts} vectors for its two text towers, expected as many for each")
    steps = facts.get("step") or facts.get("ss_steps") or ""
    return Embedding(
        name=word or token or path.stem,
        vectors=vectors,
        hash="",
        steps=int(steps) if steps.isascii() and steps.isdigit() and len(steps) < 10 else None,
        base=facts.get("sd_checkpoint_name") or facts.get("ss_sd_model_name") or None,
        unused=unused,
    )


def _choose(path: Path, found: Set[str]) -> tuple[tuple[str, ...], str | None]:
    """The tensors that hold the vectors, a name for each text tower, and the word where a tensor's name is it."""
    trained = tuple(name for name in found if name.startswith("string_to_param."))
    if found == {"clip_l", "clip_g"}:
        return ("clip_l", "clip_g"), None
    if len(trained) == 1:
        return trained, None
    if len(found) != 1:
        raise _error(
            path, f"is no textual-inversion embedding: it holds {len(found)} tensors, expected one or clip_l and clip_g"
        )
    (name,) = found
    return (name,), None if name in ("emb_params", "emp_params", "clip_l", "clip_g", "*") else name


def _vectors(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor as (n, d) float32."""
    if tensor.ndim == 1:
        tensor = tensor[None]
    shown = f"{printable(name)} {tuple(tensor.shape)}"
    if tensor.ndim != 2 or not tensor.is_floating_point() or not 1 <= len(tensor) <= MAX_VECTORS:
        raise _error(path, f"{shown} are not the vectors of an embedding; expected (n, width), n at most {MAX_VECTORS}")
    tensor = tensor.float().clone()  # small, and so not mapped any more
    if not torch.isfinite(tensor).all():
        raise _error(path, f"{shown} holds numbers that are not finite; the file is damaged")
    return tensor


def _error(path: Path, message: str) -> LdmError:
    return LdmError(f"{printable(str(path))}: {message}")
