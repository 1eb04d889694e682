"""The priors' objectives: what they draw, and that they learn what can be worked out in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.guidance import Told
from ldm.diffusion.state import noised
from ldm.evaluation.retrieval import ridge
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.prior import Codes, Prior, PriorConfig
from ldm.pipeline.clip.components import components_of
from ldm.pipeline.clip.prior import image_embeddings
from ldm.training.dalle2.prior import CodesObjective, PriorObjective
from ldm.training.dalle2.prior_data import (
    PriorPictures,
    fold_text,
    kept_components,
    set_speller,
    set_statistics,
)
from ldm.training.dalle2.prior_retrieval import prior_retrieval, recall
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.objective import Draw
from ldm.training.whitening import TextWhitening, whitening_of
from ldm.types import Conditioning

P, D, TOKENS = 8, 6, 5
CONFIG = PriorConfig(projection=P, text_width=D, tokens=TOKENS, width=32, layers=2, heads=4)
LOOP = LoopConfig(
    steps=300, batch=64, rate=4e-3, warmup=20, schedule="cosine", weight_decay=0.0, ema=0.97, precision="no",
    save_every=10_000, evaluate_every=10_000,
)  # fmt: skip


def captions(classes: int, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    """States, pooled vectors of no special length and token counts of some captions, and last of no caption."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(classes + 1, TOKENS, D, generator=generator) * torch.tensor([3.0, 1, 1, 1, 0.3, 0.3]) + 1
    pooled = torch.randn(classes + 1, P, generator=generator) + 0.5
    return states, pooled, np.array([2 + i % (TOKENS - 1) for i in range(classes)] + [2])


def pictures_of(embeddings: Tensor, classes: Tensor, flips: bool = False) -> PriorPictures:
    """Pictures (N, P), each with the one caption of its class, and that caption again."""
    states, pooled, lengths = captions(int(classes.max()) + 1)
    rows = torch.cat([classes.repeat_interleave(2), torch.tensor([-1])])
    whitening = TextWhitening(whitening_of(states.flatten(0, 1)), whitening_of(F.normalize(pooled, dim=-1) * P**0.5))
    both = torch.stack([embeddings, -embeddings], dim=1)
    return PriorPictures(
        both.half().numpy(), np.full(len(embeddings), flips), states[rows].numpy(), pooled[rows].numpy(),
        lengths[rows.numpy()], np.arange(0, 2 * len(embeddings) + 1, 2), whitening,
    )  # fmt: skip


def told(data: PriorPictures, rows: list[int]) -> Told:
    cond = data.told([*rows, -1])
    return Told(((cond.select(slice(len(rows))), 1.0),), cond.select(torch.full((len(rows),), len(rows))))


def test_a_batch_is_drawn_as_asked() -> None:
    embeddings = torch.randn(40, P)
    data = pictures_of(embeddings, torch.arange(40) % 4, flips=True)
    held_out = [0, 8, 16]
    objective = PriorObjective(Prior(CONFIG), data, held_out, drop=0.25)
    batch = objective.batch(Draw(4000, 0, torch.Generator().manual_seed(0)))
    distance = torch.cdist(batch["embedding"], torch.cat([embeddings, -embeddings]))
    assert distance.amin(dim=1).max() < 0.02
    number = distance.argmin(dim=1)
    shown = number % 40
    assert not set(held_out) & set(shown.tolist())
    assert set(shown.tolist()) == set(range(40)) - set(held_out)
    assert (number >= 40).float().mean() == pytest.approx(0.5, abs=0.03), "half of what may be mirrored is"
    assert batch["dropped"].float().mean() == pytest.approx(0.25, abs=0.03)
    empty = data.white(data.told([-1]))
    own = data.white(data.told((2 * shown).tolist()))
    assert empty.vector is not None and own.vector is not None
    expected = torch.where(batch["dropped"][:, None], empty.vector, own.vector)
    torch.testing.assert_close(batch["vector"], expected)
    lengths = torch.from_numpy(data.lengths)[torch.where(batch["dropped"], -1, 2 * shown)]
    assert torch.equal(batch["words"].sum(dim=1), lengths)
    assert batch["timestep"].min() < 10 and batch["timestep"].max() > 989
    again = objective.batch(Draw(4000, 0, torch.Generator().manual_seed(0)))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    still = PriorObjective(Prior(CONFIG), replace(data, flips=np.zeros(40, bool)), held_out)
    batch = still.batch(Draw(200, 0, torch.Generator().manual_seed(0)))
    assert torch.cdist(batch["embedding"], embeddings).amin(dim=1).max() < 0.02


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_folding_changes_nothing_but_the_text_that_is_asked_for(kind: str) -> None:
    data = pictures_of(torch.randn(12, P), torch.arange(12) % 4)
    plain = data.told([0, 2, 4, -1])
    x, t = torch.randn(4, P), torch.tensor([1, 300, 600, 999])

    def answer(prior: Prior | AutoregressivePrior, cond: Conditioning) -> Tensor:
        if isinstance(prior, Prior):
            return prior(x, t, cond)
        return prior(torch.ones(4, 2, dtype=torch.long), torch.arange(4), cond)

    prior = Prior(CONFIG) if kind == "diffusion" else AutoregressivePrior(replace(CONFIG, codes=Codes(3, 5, 4)))
    with torch.no_grad():
        expected = answer(prior, data.white(plain))
        assert not torch.allclose(answer(prior, plain), expected, atol=1e-3)
        fold_text(prior, data.whitening)
        torch.testing.assert_close(answer(prior, plain), expected, rtol=1e-4, atol=1e-5)


def test_the_denoiser_learns_the_posterior_mean_of_a_mixture(tmp_path: Path) -> None:
    """Each caption's embeddings are two normal clouds; the ideal x0 given x and the caption is known."""
    generator = torch.Generator().manual_seed(0)
    centres, deviation = 1.5 * torch.randn(3, 2, P, generator=generator), 0.4
    classes = torch.arange(3000) % 3
    side = torch.randint(2, (3000,), generator=generator)
    embeddings = centres[classes, side] + deviation * torch.randn(3000, P, generator=generator)
    data = pictures_of(embeddings, classes)
    prior = Prior(CONFIG)
    set_statistics(prior, embeddings)
    torch.testing.assert_close(prior.to_unit(embeddings).std(dim=0), torch.ones(P))
    objective = PriorObjective(prior, data, [0])
    train(objective, LOOP, tmp_path).swap()
    denoiser = objective.denoiser
    spread = deviation / prior.data_std
    for sigma in (0.5, 1.5, 5.0):
        x0 = prior.to_unit(embeddings[:600])
        x = noised(x0, torch.randn(600, P, generator=generator), sigma)
        means = prior.to_unit(centres)[classes[:600]]  # (600, 2, P)
        variance = spread**2 + sigma**2
        weights = (-((x[:, None] - means) ** 2) / (2 * variance)).sum(dim=-1).softmax(dim=-1)
        each = means + spread**2 / variance * (x[:, None] - means)
        ideal = (weights[..., None] * each).sum(dim=1)
        with torch.no_grad():
            cond = data.white(data.told((2 * torch.arange(600)).tolist()))
            found = denoiser(x, torch.full((600,), sigma), cond).denoised
        error = (found - ideal).square().mean()
        blind = (prior.to_unit(centres.mean(dim=1))[classes[:600]] - ideal).square().mean()
        assert error < 0.06 and error < 0.5 * blind, f"sigma {sigma}: {error}, of the caption's mean {blind}"
    with torch.no_grad():
        figures = objective.evaluate(tmp_path, 1)
    assert 0 < figures["held_out"] < 2 and figures["recall@1"] == 1, "one held-out picture has no rival"


def table(classes: int = 25, copies: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, of length sqrt(P), that no line tells from their captions, their classes, the classes' centres."""
    generator = torch.Generator().manual_seed(4)
    centres = F.normalize(torch.randn(classes, P, generator=generator), dim=-1)
    numbers = torch.arange(classes).repeat(copies)
    points = centres[numbers] + 0.04 * torch.randn(len(numbers), P, generator=generator)
    return F.normalize(points, dim=-1) * P**0.5, numbers, centres * P**0.5


def test_a_prior_knows_pictures_that_simpler_guesses_do_not(tmp_path: Path) -> None:
    embeddings, classes, centres = table()
    data = pictures_of(embeddings, classes)
    gallery = list(range(25))  # the first picture of each class is left out
    prior = Prior(CONFIG)
    set_statistics(prior, embeddings[25:])
    objective = PriorObjective(prior, data, gallery)
    train(objective, LOOP, tmp_path).swap()
    with torch.no_grad():
        seen = objective.evaluate(tmp_path, 1)["recall@1"]
    fold_text(prior, data.whitening)
    known = data.vectors(data.first[25:-1].tolist()), embeddings[25:]
    found = prior_retrieval(
        prior, told(data, data.first[gallery].tolist()), embeddings[gallery], torch.arange(25), known, steps=8,
        guidance=(1.0, 1.5),
    )  # fmt: skip
    best = found["guidance 1, best of 1"]
    assert found.keys() == {
        *("chance", "text", "mean", "ridge", "expectation"),
        *(f"guidance {g}, best of {c}" for g in ("1", "1.5") for c in (1, 2)),
    }
    assert found["chance"] == pytest.approx(found["mean"]) == 1 / 25
    assert best >= 0.85 and found["expectation"] >= 0.85 and seen >= 0.85
    assert max(found["text"], found["mean"], found["ridge"]) < best - 0.2
    samples = image_embeddings(prior, told(data, [0]), count=40, guidance=1.0, steps=8, choose=1)
    assert F.cosine_similarity(samples, centres[:1]).median() > 0.9


def test_ridge_and_recall_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(200, P, generator=generator) + 1, torch.randn(P, P, generator=generator)
    y = x @ weights + 3
    torch.testing.assert_close(ridge(x, y, 1e-9)(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ridge(x, y, 1e12)(x), y.mean(dim=0).expand(200, -1), rtol=1e-4, atol=1e-4)
    centred, penalty = (x - x.mean(dim=0)).double(), 50.0
    rows = torch.cat([centred, penalty**0.5 * torch.eye(P).double()])  # as least squares with P more equations
    answers = torch.cat([(y - y.mean(dim=0)).double(), torch.zeros(P, P).double()])
    solved = centred @ torch.linalg.lstsq(rows, answers).solution + y.mean(dim=0)
    torch.testing.assert_close(ridge(x, y, penalty)(x), solved.float(), rtol=1e-4, atol=1e-4)
    gallery = torch.eye(4)
    guesses = torch.tensor([[5.0, 1, 0, 0], [2.0, 1, 0, 0], [3.0, 2, 1, 0]])
    own = torch.tensor([0, 1, 2])
    assert [recall(guesses, gallery, own, at) for at in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert recall(torch.full((3, 4), torch.nan), gallery, own) == 0, "what has diverged finds nothing"


def test_a_speller_takes_its_statistics_from_the_pictures() -> None:
    embeddings, classes, _ = table()
    data = pictures_of(embeddings, classes)
    found = components_of(embeddings)
    assert kept_components(torch.tensor([5.0, 3.0, 1.0, 1.0]), 0.8) == 2
    assert kept_components(torch.tensor([5.0, 3.0, 1.0, 1.0]), 0.81) == 3
    assert kept_components(torch.tensor([5.0, 3.0, 1.0, 1.0]), 1.0) == 4
    texts = data.vectors((2 * torch.arange(len(embeddings))).tolist())
    prior = AutoregressivePrior(replace(CONFIG, codes=Codes(P, 1024, 4)))
    set_speller(prior, found, embeddings, texts)
    speller = prior.speller
    codes = speller.encode(embeddings)
    assert codes.amin(dim=0).tolist() == [0] * P and codes.amax(dim=0).tolist() == [1023] * P
    assert (speller.decode(codes) - embeddings).abs().max() < 0.01, "with all components only rounding is lost"
    counts = speller.similarity(texts, embeddings).bincount(minlength=4)
    assert counts.min() > 0.2 * len(embeddings), "each similarity has its share"
    few = AutoregressivePrior(replace(CONFIG, codes=Codes(3, 1024, 4)))
    set_speller(few, found, embeddings, texts)
    error = (few.speller.decode(few.speller.encode(embeddings)) - embeddings).square().sum(dim=1).mean()
    assert float(error) == pytest.approx(float(found.variances[3:].sum()), rel=0.01), "what is left out is lost"


def test_the_autoregressive_prior_learns_a_distribution(tmp_path: Path) -> None:
    """A caption's picture is one of two, at 1 to 3; which two depends on the caption."""
    generator = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(6, P, generator=generator), dim=-1) * P**0.5
    classes = torch.arange(2400) % 3
    rare = torch.arange(2400) % 4 == 0
    embeddings = points[2 * classes + rare]
    data = pictures_of(embeddings, classes)
    found = components_of(embeddings)
    prior = AutoregressivePrior(replace(CONFIG, codes=Codes(len(found.variances), 16, 2)))
    # All similarities in one bucket, or they would tell which of the two it is.
    set_speller(prior, found, embeddings, data.vectors(data.first[:-1].tolist()))
    prior.speller.edges.fill_(2.0)
    objective = CodesObjective(prior, data, [0, 1, 2])
    assert objective.batch(Draw(8, 0, generator))["codes"].shape == (8, len(found.variances))
    train(objective, replace(LOOP, steps=200), tmp_path).swap()
    batch = objective.batch(Draw(2000, 0, generator))
    kept = {name: t[~batch["dropped"]] for name, t in batch.items()}
    with torch.no_grad():
        loss = float(objective(kept)["loss"]) * len(found.variances)
        assert objective.evaluate(tmp_path, 1).keys() == {"held_out", "recall@1"}
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert entropy - 0.05 < loss < entropy + 0.15
    assert set(batch["similarity"][batch["dropped"]].tolist()) == {2}, "no text, no similarity"
    assert set(kept["similarity"].tolist()) == {0}
    prior.speller.edges.fill_(-2.0)  # sampling asks for the upper half, which was never seen: see the next lines
    with torch.no_grad():
        prior.similarity_embedding.weight[1] = prior.similarity_embedding.weight[0]
    fold_text(prior, data.whitening)
    samples = image_embeddings(prior, told(data, [0, 2, 4]), count=300, guidance=1.0, choose=1)
    nearest = torch.cdist(samples, points).argmin(dim=1).view(3, 300)
    for caption in range(3):
        counts = nearest[caption].bincount(minlength=6)
        assert counts[2 * caption] + counts[2 * caption + 1] > 290
        assert float(counts[2 * caption + 1]) / 300 == pytest.approx(0.25, abs=0.08)
