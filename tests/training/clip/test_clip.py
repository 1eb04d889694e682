"""CLIP's losses against their published formulas, its logits against open_clip's, its parts against the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

from ldm.models.image_encoder import ImageConfig
from ldm.models.text_encoder import TextConfig
from ldm.models.tokenizer import tokenize
from ldm.training.clip.data import Pairs
from ldm.training.clip.model import SIGMOID_START, small_config
from ldm.training.clip.objective import CLIPObjective, Contrast, Pixels, contrast, encode_text
from ldm.training.engine.objective import Draw

TEXT = TextConfig(32, 2, 2, projection=16, names="open_clip", activation="gelu")
IMAGE = ImageConfig(32, 2, 2, projection=16, patch=8, size=16)
COUNT = 12


def objective_of(
    loss: Contrast = "softmax", chunks: int = 1, kind: type[CLIPObjective] = CLIPObjective
) -> CLIPObjective:
    torch.manual_seed(0)
    start: dict[str, Any] = SIGMOID_START if loss == "sigmoid" else {}
    model = open_clip.CLIP(**small_config(TEXT, IMAGE), **start)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    texts = [[f"picture number {i}", f"{i} cats, of which some are grey"] for i in range(COUNT)]
    flips = np.arange(COUNT) % 2 == 0
    pairs = Pairs(pixels, [str(i) for i in range(COUNT)], texts, flips, np.arange(10), np.arange(10, COUNT))

    def tokens(texts: Any) -> Tensor:
        return torch.tensor([tokenize(text) for text in texts])

    return kind(model, pairs, tokens, Pixels(16), loss=loss, chunks=chunks)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients differ by rounding alone."""
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def unit(rows: int, seed: int) -> Tensor:
    vectors = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_softmax_loss_is_the_mean_of_both_cross_entropies() -> None:
    image, text, scale = unit(5, 0), unit(5, 1), torch.tensor(7.0, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        across = sum(np.exp(7.0 * float(image[i] @ text[j])) for j in range(5))
        down = sum(np.exp(7.0 * float(image[j] @ text[i])) for j in range(5))
        own = np.exp(7.0 * float(image[i] @ text[i]))
        total -= (np.log(own / across) + np.log(own / down)) / 2
    assert float(contrast(image, text, scale, None, "softmax")) == pytest.approx(total / 5, rel=1e-12)


def test_sigmoid_loss_is_the_mean_over_pictures_of_all_pairs() -> None:
    """Zhai et al. 2023, equation 2."""
    image, text = unit(5, 2), unit(5, 3)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (10.0, -4.0))
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = 1.0 if i == j else -1.0
            total -= np.log(1 / (1 + np.exp(-z * (10.0 * float(image[i] @ text[j]) - 4.0))))
    assert float(contrast(image, text, scale, bias, "sigmoid")) == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_objective_is_that_loss_of_open_clips_logits(loss: Contrast) -> None:
    objective = objective_of(loss)
    batch = objective.batch(Draw(6, 0, torch.Generator().manual_seed(3)))
    with torch.no_grad():
        got = objective(batch)
        images = objective.pixels.of(batch["images"])
        logits = objective.model.get_logits(images, batch["ids"])[0].double().numpy()
    if loss == "softmax":
        rows, columns = (np.log(np.exp(x).sum(axis=1)) - np.diag(x) for x in (logits, logits.T))
        want = (rows.mean() + columns.mean()) / 2
    else:
        want = np.log1p(np.exp(-(2 * np.eye(6) - 1) * logits)).sum() / 6
    assert float(got["loss"]) == pytest.approx(want, rel=1e-5)
    assert float(got["accuracy"]) == pytest.approx((logits.argmax(axis=1) == np.arange(6)).mean())


def test_logits_are_scaled_by_a_hundred_at_most() -> None:
    objective = objective_of()
    with torch.no_grad():
        objective.model.logit_scale.fill_(9.0)
        assert float(objective(objective.batch(Draw(2, 0, torch.Generator())))["scale"]) == pytest.approx(100)


def test_the_scale_comes_back_from_a_hundred() -> None:
    objective = objective_of()
    with torch.no_grad():
        objective.model.logit_scale.fill_(9.0)
    objective(objective.batch(Draw(4, 0, torch.Generator())))["loss"].backward()
    assert objective.model.logit_scale.grad is not None and float(objective.model.logit_scale.grad) != 0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_logits_are_not_rounded_by_autocast(loss: Contrast) -> None:
    image, text, scale, bias = unit(5, 0).float(), unit(5, 1).float(), torch.tensor(90.0), torch.tensor(-10.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = contrast(image, text, scale, bias, loss)
    assert torch.equal(rounded, contrast(image, text, scale, bias, loss))


def test_short_text_path_equals_open_clips_own() -> None:
    model = objective_of().model
    ids = torch.tensor([tokenize("a red apple"), tokenize("a much longer caption, of seven words or more")])
    with torch.no_grad():
        assert torch.allclose(encode_text(model, ids), model.encode_text(ids, normalize=True), atol=1e-6)


@pytest.mark.parametrize(
    "custom", [{"pool_type": "last"}, {"no_causal_mask": True}, {"proj_type": "none", "width": 16}]
)
def test_other_text_towers_are_left_to_open_clip(custom: dict[str, Any]) -> None:
    config = small_config(TEXT, IMAGE)
    config["text_cfg"] |= custom
    model, ids = open_clip.CLIP(**config), torch.tensor([tokenize("a red apple"), tokenize("a cat")])
    with torch.no_grad():
        assert torch.equal(encode_text(model, ids), model.encode_text(ids, normalize=True))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunks", [2, 4, 9])
def test_parts_give_the_gradients_of_the_whole_batch(loss: Contrast, chunks: int) -> None:
    whole, parts = objective_of(loss), objective_of(loss, chunks)
    batch = whole.batch(Draw(9, 0, torch.Generator().manual_seed(1)))
    kept = []
    for objective in (whole, parts):
        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: (held.append(t), t)[1], lambda t: t):
            result = objective(batch)["loss"]
        result.backward()
        kept.append((result.item(), sum(t.numel() for t in held if t.is_floating_point())))
    assert kept[0][0] == pytest.approx(kept[1][0], rel=1e-6)
    assert kept[1][1] < 0.02 * kept[0][1], "no activations wait for the backward pass"
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        assert a.grad.abs().sum() > 0 and close(a.grad, b.grad), name


def test_batches_keep_their_promises() -> None:
    objective = objective_of()
    pictures, seen, mirrored = objective.pairs.pictures.transpose(0, 3, 1, 2), set(), set()
    spoken = {tuple(objective.tokens([text])[0].tolist()): i for i, t in enumerate(objective.pairs.texts) for text in t}
    for seed in range(20):
        batch = objective.batch(Draw(8, 0, torch.Generator().manual_seed(seed)))
        numbers = [spoken[tuple(row)] for row in batch["ids"].tolist()]
        assert len(set(numbers)) == 8, "no picture twice, or it would count against itself"
        seen |= set(numbers)
        for i, image in zip(numbers, batch["images"].numpy(), strict=True):
            same, turned = np.array_equal(image, pictures[i]), np.array_equal(image, pictures[i][..., ::-1])
            assert same or turned, "the caption is the picture's own"
            mirrored |= {i} if turned else set()
    assert seen == set(range(10)), "all but the held-out pictures"
    assert mirrored == {0, 2, 4, 6, 8}


def test_pixels_are_normalised_and_averaged() -> None:
    picture = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).expand(1, 3, 2, 2)
    got = Pixels(1, (0.1, 0.2, 0.4), (0.5, 0.25, 0.2)).of(picture)
    assert got.flatten().tolist() == pytest.approx([(0.4 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, 0.0], abs=1e-6)


def test_evaluation_counts_what_the_towers_say() -> None:
    objective = objective_of()
    objective.pairs = replace(objective.pairs, held_out=np.arange(COUNT))
    with torch.no_grad():
        found = objective.evaluate(None, 0)  # type: ignore[arg-type]
        images = objective.pixels.of(torch.from_numpy(objective.pairs.pictures).permute(0, 3, 1, 2))
        logits = objective.model.get_logits(images, objective.tokens([t[0] for t in objective.pairs.texts]))[0]
    assert found["image-text@1"] == pytest.approx(float((logits.argmax(1) == torch.arange(COUNT)).float().mean()))
    assert found["text-image@1"] == pytest.approx(float((logits.argmax(0) == torch.arange(COUNT)).float().mean()))
