"""The stages of the priors at the smallest size: from encoded pictures and captions to files that load and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.data.packed import write_packed
from ldm.data.records import KIND_SHARES
from ldm.errors import LdmError
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.image_encoder import ImageTower
from ldm.models.presets import small, tiny
from ldm.models.prior import Prior
from ldm.models.text_encoder import OpenCLIPText
from ldm.models.tokenizer import tokenize
from ldm.pipeline.clip.prior import image_embeddings, load_prior, tell
from ldm.training import recipes, stages
from ldm.training.engine.loop import LoopConfig
from ldm.training.latents import encode_captions
from ldm.training.stages import Workspace
from ldm.weights.save import write_tensors

LOOP = LoopConfig(steps=2, batch=4, rate=1e-3, warmup=1, precision="no", save_every=2, evaluate_every=2)
SIZE, PICTURES = 64, 75
CONFIG = tiny(small(SIZE))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Pictures, a CLIP without training and the captions that it encoded; the latents themselves are not looked at."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("priors")
    generator = np.random.default_rng(0)
    records: list[Any] = [
        {"texts": [f"number {i}", "a picture of it"], "kind": list(KIND_SHARES)[i % len(KIND_SHARES)], "key": str(i)}
        for i in range(PICTURES)
    ]
    pixels = generator.integers(0, 256, (PICTURES, SIZE, SIZE, 3), dtype=np.uint8)
    write_packed(iter(list(zip(pixels, records, strict=True))), folder, SIZE, "pictures")
    work = Workspace(folder, folder / "runs", CONFIG)
    latents = work.stage("latents")
    assert CONFIG.clip_image is not None
    text, image = OpenCLIPText(CONFIG.text[0].tower).eval(), ImageTower(CONFIG.clip_image)
    work.stage("clip").mkdir(parents=True)
    towers = text.state_dict() | {f"visual.{name}": t for name, t in image.state_dict().items()}
    write_tensors(work.stage("clip") / "clip.safetensors", towers, {})
    encode_captions(text, CONFIG.text[0], records, latents)
    np.save(latents / "latents.npy", np.zeros((PICTURES, 4, 2, 2), np.float16))
    np.save(latents / "flips.npy", np.zeros(PICTURES, bool))
    return work


@pytest.mark.parametrize("kind", ["prior", "prior-ar"])
def test_a_stage_writes_a_prior_that_samples(work: Workspace, kind: str) -> None:
    run = {"prior": stages.train_prior, "prior-ar": stages.train_prior_ar}[kind]
    run(work, LOOP)
    path = work.runs / {"prior": stages.PRIOR, "prior-ar": stages.PRIOR_AR}[kind]
    prior = load_prior(path, device="cpu")
    assert isinstance(prior, Prior if kind == "prior" else AutoregressivePrior)
    tower = OpenCLIPText(CONFIG.text[0].tower).eval()
    clip = load_file(work.stage("clip") / "clip.safetensors")
    with pytest.raises(LdmError, match="another CLIP"):
        tell(prior, tower, CONFIG.text[0], ["number 3"])
    tower.load_state_dict({name: clip[name] for name in tower.state_dict()})
    told = tell(prior, tower, CONFIG.text[0], ["number 3"])
    assert image_embeddings(prior, told, steps=2).shape == (1, 32)
    assert (work.stage(kind) / "step-00000002" / "manifest.json").is_file()


def test_what_is_told_in_training_is_what_is_told_afterwards(work: Workspace) -> None:
    data, kept, held_out, share = stages._prior_pictures(work)
    assert held_out == [0, 70] and len(kept) == PICTURES - 2 and len(share) == PICTURES
    tower = stages._text(work)
    texts = ["number 2", "a picture of it"]
    told = tell(Prior(stages._prior_config(work)), tower, CONFIG.text[0], texts)
    ((cond, _),) = told.parts
    found = data.told([4, 5])
    assert cond.cross is not None and found.cross is not None and cond.words is not None and found.words is not None
    assert cond.vector is not None and found.vector is not None
    assert torch.equal(found.words, cond.words) and found.words[0].sum() == np.count_nonzero(tokenize("number 2"))
    shown = cond.words[..., None]
    torch.testing.assert_close(found.cross * shown, cond.cross * shown, rtol=0.02, atol=0.05)  # stored in bfloat16
    torch.testing.assert_close(found.vector, cond.vector, rtol=0.02, atol=0.05)


def test_captions_of_another_tower_are_refused(work: Workspace, tmp_path: Path) -> None:
    other = Workspace(work.pictures, tmp_path, CONFIG)
    (tmp_path / "latents").symlink_to(work.stage("latents"))
    (tmp_path / "clip").mkdir()
    assert CONFIG.clip_image is not None
    torch.manual_seed(5)
    write_tensors(tmp_path / "clip" / "clip.safetensors", OpenCLIPText(CONFIG.text[0].tower).state_dict(), {})
    with pytest.raises(LdmError, match="encode them again"):
        stages.train_prior(other, LOOP)


def test_the_recipes_name_both() -> None:
    for family in ("small", "gpu"):
        assert recipes.RECIPES[f"{family}-prior"].run is stages.train_prior
        assert recipes.RECIPES[f"{family}-prior-ar"].run is stages.train_prior_ar
