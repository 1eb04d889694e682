"""What captions say in training is what they say at generation, for whole batches and with gradients."""

from __future__ import annotations

import pytest
import torch

from ldm.models.presets import sd1, sd2, sdxl, sdxl_refiner, small, small_decoder, tiny
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.text.states import size_numbers, told
from ldm.training.adapter_options import AdapterOptions
from ldm.training.adapters import add_adapter
from ldm.training.text_states import caption_ids, text_states
from ldm.weights.embeddings import Embedding

LAYOUTS = {
    "sd1": sd1, "sd2": sd2, "sdxl": sdxl, "refiner": sdxl_refiner, "small": small, "decoder": small_decoder,
}  # fmt: skip
CAPTIONS = ("a (red:1.4) [apple] BREAK", "", "toy on a table", "1girl, name_(series), <Toy>")
SIZES = ((64, 96), (96, 64), (64, 64), (128, 64))
ORIGINAL_SIZES = ((640, 480), (512, 512), (300, 200), (1000, 700))
CROPS = ((0, 0), (3, 5), (16, 0), (1, 2))


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    models = {name: random_system(tiny(preset())) for name, preset in LAYOUTS.items()}
    generator = torch.Generator().manual_seed(3)
    return {
        name: model.with_embeddings([
            Embedding("<Toy>", tuple(torch.randn(3, 32, generator=generator) for _ in model.text), "")
        ])
        for name, model in models.items()
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_what_prompts_say(layout, models):
    model = models[layout]
    shown = list(zip(SIZES, ORIGINAL_SIZES, CROPS, strict=True))
    sizes = torch.tensor([size_numbers(model.config, *each) for each in shown])
    with torch.no_grad():
        cond = told(model, text_states(model, caption_ids(model, CAPTIONS)), sizes)
    for index, (caption, ((width, height), original_size, crop)) in enumerate(zip(CAPTIONS, shown, strict=True)):
        alone = model.encode_prompt(
            caption, width=width, height=height, original_size=original_size, crop=crop, emphasis="literal"
        )
        for ours, expected in ((cond.cross, alone.cross), (cond.vector, alone.vector)):
            assert (ours is None) == (expected is None)
            if ours is not None and expected is not None:
                torch.testing.assert_close(ours[index : index + 1], expected, rtol=1e-4, atol=1e-5)
    assert (cond.vector is None) == (layout in ("sd1", "sd2"))


def test_longer_captions_and_their_fellows(models):
    """Each is what a prompt says; behind a shorter one come chunks that say nothing, like the empty prompt's."""
    model = models["sdxl"]
    captions = ("a dog " * 100, "a cat")
    ids = caption_ids(model, captions)
    assert ids.shape == (2, 2, 3, 77)
    assert caption_ids(model, captions[1:], chunks=3).shape == (1, 2, 3, 77)
    with torch.no_grad():
        said = text_states(model, ids)
    expected = [model.encode_prompt(caption, emphasis="literal") for caption in (*captions, "")]
    long, short, empty = (cond.cross for cond in expected)
    assert long is not None and short is not None and empty is not None
    torch.testing.assert_close(said.states[:1], long, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.states[1:], torch.cat([short, empty, empty], dim=1), rtol=1e-4, atol=1e-5)
    assert said.pooled is not None
    for row, cond in zip(said.pooled, expected, strict=False):
        assert cond.vector is not None
        torch.testing.assert_close(row, cond.vector[0, : len(row)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl", "small"])
def test_gradients_of_a_batch_are_those_of_its_rows(layout, models):
    """And each layer of every tower's adapter has one: none is behind what the U-Net is told."""
    model = add_adapter(models[layout], AdapterOptions(rank=2, text_rank=2))
    trained = [p for tower in model.text for p in tower.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))

    def loss(captions: tuple[str, ...]) -> torch.Tensor:
        said = text_states(model, caption_ids(model, captions))
        pooled = 0 if said.pooled is None else said.pooled.square().sum()
        return said.states.square().sum() + pooled

    whole = torch.autograd.grad(loss(CAPTIONS), trained)
    rows = [torch.autograd.grad(loss((caption,)), trained) for caption in CAPTIONS]
    for batch, *single in zip(whole, *rows, strict=True):
        assert batch.any()
        torch.testing.assert_close(batch, torch.stack(single).sum(dim=0), rtol=1e-3, atol=1e-3)
