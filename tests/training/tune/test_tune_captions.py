"""What the network is told of captions: against what a prompt is told as at generation."""

from __future__ import annotations

import pytest
import torch

from ldm.data.buckets import Crop
from ldm.data.captions import CaptionRules
from ldm.data.example import Example
from ldm.data.file_at import FileAt
from ldm.errors import LdmError
from ldm.models.presets import sd1, sdxl, small, tiny
from ldm.pipeline.load import random_system
from ldm.training.tune.cache import Cache
from ldm.training.tune.captions import LiveCaptions, kept_captions, vary

CAPTIONS = ("a red apple (ripe)", "", "word " * 100)
CROPS = [Crop((640, 480), (171, 128), (128, 128), 21, 0)] * 3
LAYOUTS = {"sd1": sd1, "sdxl": sdxl, "small": small}


def examples(rules: CaptionRules) -> list[Example]:
    return [Example(str(i), FileAt(__file__), (text,), rules) for i, text in enumerate(CAPTIONS)]  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_and_live_captions_are_what_prompts_are(layout, tmp_path):
    model = random_system(tiny(LAYOUTS[layout]()))
    kept = kept_captions(model, examples(CaptionRules()), Cache(tmp_path))
    for captions in (kept, kept_captions(model, examples(CaptionRules()), Cache(tmp_path)), LiveCaptions(model, False)):
        cond = captions.cond(captions.batch(CAPTIONS, CROPS))
        assert cond.cross is not None and cond.cross.shape[1] == 2 * 77  # the longest caption takes two chunks
        for row, text in enumerate(CAPTIONS):
            theirs = model.encode_prompt(
                text, width=128, height=128, original_size=(640, 480), crop=(21, 0), emphasis="literal"
            )
            own = theirs.cross
            assert own is not None
            assert torch.allclose(cond.cross[row, : own.shape[1]], own[0], atol=1e-5)
            if own.shape[1] == 77:  # filled up with a chunk that says nothing
                empty = model.encode_prompt("").cross
                assert empty is not None and torch.allclose(cond.cross[row, 77:], empty[0], atol=1e-5)
            if layout == "sdxl":
                assert theirs.vector is not None and cond.vector is not None
                assert torch.allclose(cond.vector[row], theirs.vector[0], atol=1e-4)


def test_states_that_are_no_numbers_are_not_kept(tmp_path):
    """As of a tower that half precision is too small for."""
    model = random_system(tiny(sd1()))
    (tower,) = model.text
    with torch.no_grad():
        next(iter(tower.parameters())).fill_(torch.nan)  # type: ignore[attr-defined]
    with pytest.raises(LdmError, match="caption '': its text states are not finite; give --precision no"):
        kept_captions(model, examples(CaptionRules()), Cache(tmp_path))
    assert not list(tmp_path.iterdir())


def test_gradients_reach_the_towers_only_where_they_are_trained():
    model = random_system(tiny(sd1()))
    (tower,) = model.text
    tower.requires_grad_(True)  # type: ignore[attr-defined]
    for trained in (True, False):
        captions = LiveCaptions(model, trained)
        cross = captions.cond(captions.batch(CAPTIONS[:1], CROPS[:1])).cross
        assert cross is not None and cross.requires_grad == trained


def test_which_rules_make_captions_vary():
    assert not vary(examples(CaptionRules(prefix="x", drop=0.5)))
    for rules in (CaptionRules(shuffle=True), CaptionRules(drop_tags=0.1), CaptionRules(wildcards=True)):
        assert vary(examples(rules))
