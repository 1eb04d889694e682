from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path
from random import Random

import pytest

from ldm.data.heldout import SHEET_SPLITS, allot, read_prompts, sheet_prompts, write_prompts
from ldm.data.records import KIND_SHARES, Record


def left_out(per_kind: int = 40) -> list[Record]:
    return [
        {"texts": [f"{kind} {i}", "second caption"], "kind": kind, "split": SHEET_SPLITS[i % 4], "key": f"{kind}:{i}"}
        for kind in KIND_SHARES
        for i in range(per_kind)
    ]


def test_a_sheet_depends_on_its_seed_alone() -> None:
    records = left_out()
    drawn = sheet_prompts(records)
    Random(1).shuffle(records)
    assert sheet_prompts(records) == drawn
    assert sheet_prompts(records, seed=1) != drawn


def test_a_sheet_is_spread_as_training_is() -> None:
    kinds = Counter(prompt["kind"] for prompt in sheet_prompts(left_out()))
    # 64 times 0.40, 0.18, 0.08, 0.08, 0.07, 0.07, 0.05, 0.04, 0.03: 59 whole, and 5 to the largest remainders
    assert kinds == {
        "emoji": 26, "parametric": 12, "background": 5, "pair": 5, "silhouette": 4, "recolor": 4, "scene": 3,
        "count": 3, "shapes": 2,
    }  # fmt: skip


def test_every_prompt_is_the_first_caption_of_a_left_out_picture() -> None:
    records = left_out() + [
        {"texts": [f"seen {i}"], "kind": "emoji", "split": split, "key": "x"}
        for i, split in enumerate(["train", "heldout_style"] * 100)
    ]
    drawn = sheet_prompts(records)
    first = {record["key"]: record["texts"][0] for record in left_out()}
    assert all(prompt["prompt"] == first[prompt["key"]] for prompt in drawn)
    assert len({prompt["prompt"] for prompt in drawn}) == 64


def test_a_caption_that_many_records_share_counts_once() -> None:
    records = left_out(30)
    assert sheet_prompts(records + records) == sheet_prompts(records)


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match="larger than population"):
        sheet_prompts(left_out(10))


@pytest.mark.parametrize("count", [0, 1, 10, 64, 1000])
def test_allotted_numbers_add_up_and_are_near_their_shares(count: int) -> None:
    allotted = allot(count, KIND_SHARES)
    assert sum(allotted.values()) == count
    assert all(abs(allotted[kind] - count * share) < 1 for kind, share in KIND_SHARES.items())


def test_the_published_prompts_are_such_a_sheet(tmp_path: Path) -> None:
    prompts = read_prompts()
    assert Counter(prompt["kind"] for prompt in prompts) == allot(64, KIND_SHARES)
    assert {prompt["split"] for prompt in prompts} <= set(SHEET_SPLITS)
    assert len({prompt["prompt"] for prompt in prompts}) == 64
    published = Path(str(files("ldm.data"))) / "heldout_prompts.json"
    write_prompts(prompts, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == published.read_bytes()
