"""`--lora FILE[:WEIGHT[:WEIGHT]]`: adapters as they are named on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm.apps.progress import to_stderr
from ldm.weights.adapters.read import Adapter, read_adapter
from ldm.weights.find import locate, model_roots
from ldm.weights.io import printable


def read_adapters(
    given: Iterable[str], models: Sequence[Path] = (), *, allow_pickle: bool = False
) -> list[tuple[Adapter, float, float]]:
    """Each adapter with its weights for the U-Net and for the text towers. Raises LdmError for one that is not there.

    models: folders in which names are looked for; none: those of LDM_MODELS
    """
    roots = model_roots(models or None)
    choices = []
    for text in given:
        name, unet, tower = split_weights(text)
        adapter = read_adapter(locate("lora", name, roots), allow_pickle=allow_pickle)
        if adapter.bundled:
            names = printable(", ".join(adapter.bundled))
            to_stderr(f"warning: {printable(str(adapter.path))}: holds embeddings too, which are left out: {names}")
        choices.append((adapter, unet, tower))
    return choices


def split_weights(text: str) -> tuple[str, float, float]:
    """FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT-WEIGHT -> file and weights for the U-Net and the text towers."""
    parts = text.split(":")
    weights: list[float] = []
    while len(parts) > 1 and len(weights) < 2 and (weight := _number(parts[-1])) is not None:
        weights.insert(0, weight)
        parts.pop()
    weights = weights or [1.0]
    return ":".join(parts), weights[0], weights[-1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
