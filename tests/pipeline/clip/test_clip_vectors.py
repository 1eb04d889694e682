"""The vectors of a CLIP do not depend on what else is in the batch, or on what a text is made of."""

from __future__ import annotations

import pytest
import torch

from ldm.models.image_encoder import ImageTower
from ldm.models.presets import small, tiny
from ldm.models.text_encoder import OpenCLIPText
from ldm.models.tokenizer import tokenize
from ldm.pipeline.clip.model import clip_of


@pytest.mark.parametrize("text", ["no!%", "wow!~", "!@#", "a cat !;", "a cat", ""])
def test_a_text_has_the_vector_of_its_end_token_in_every_batch(text: str) -> None:
    """The token of "!" has the number of the padding, 0."""
    torch.manual_seed(0)
    config = tiny(small())
    assert config.clip_image is not None
    tower = OpenCLIPText(config.text[0].tower).eval()
    clip = clip_of(tower, ImageTower(config.clip_image), name="tiny", identity="", scale=1.0)
    with torch.inference_mode():
        want = tower(torch.tensor([tokenize(text)]), pooled=True).pooled
    assert want is not None
    want = torch.nn.functional.normalize(want, dim=-1)
    for batch in ([text], [text, "a much longer text that goes on and on"]):
        assert torch.allclose(clip.text_vectors(batch)[:1], want, atol=1e-5)
