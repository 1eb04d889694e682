"""The prompts of the honest contact sheet: captions that training never saw, drawn by a seed and not chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from random import Random

from ldm.data.records import KIND_SHARES, Record

SHEET_SPLITS = ("test_concept", "test_pair", "test_attr", "test_comp")
"""All that is left out but the style kept for fine-tuning, which no prompt could ask for."""

PROMPTS_FILE = "heldout_prompts.json"


def sheet_prompts(records: Sequence[Record], count: int = 64, seed: int = 0) -> list[Record]:
    """Draw `count` left-out captions, spread over the kinds as training is.

    records: of left-out pictures, with `split`; those of other splits are passed over. Returns, kind by kind,
    {"prompt", "kind", "split", "key"}, where the prompt is the first caption of a drawn record. A caption that two
    records share counts once. Raises ValueError if a kind has too few records.
    """
    drawn: list[Record] = []
    for kind, number in allot(count, KIND_SHARES).items():
        of_kind = {
            record["texts"][0]: record
            for record in records
            if record["kind"] == kind and record.get("split") in SHEET_SPLITS
        }
        for prompt in Random(f"{seed} {kind}").sample(sorted(of_kind), number):
            record = of_kind[prompt]
            drawn.append({"prompt": prompt, "kind": kind, "split": record["split"], "key": record["key"]})
    return drawn


def allot(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Share `count` out as whole numbers, by largest remainders."""
    total = sum(shares.values())
    exact = {name: count * share / total for name, share in shares.items()}
    allotted = {name: int(number) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: allotted[name] - exact[name])
    for name in by_remainder[: count - sum(allotted.values())]:
        allotted[name] += 1
    return allotted


def read_prompts() -> list[Record]:
    """The 64 prompts of the published contact sheet, as `sheet_prompts` drew them."""
    return json.loads(files("ldm.data").joinpath(PROMPTS_FILE).read_text(encoding="utf-8"))


def write_prompts(prompts: Sequence[Record], path: Path) -> None:
    """Write prompts as JSON, one a line."""
    lines = ",\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
