"""All stages in order at the smallest size: from packed pictures to a checkpoint that loads and draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.data.packed import open_packed, write_packed
from ldm.data.records import KIND_SHARES
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, decoder_of, small, tiny
from ldm.pipeline.load import load
from ldm.training import recipes, stages
from ldm.training.engine.loop import LoopConfig
from ldm.training.stages import Workspace
from ldm.weights.clip import read_clip

LOOP = LoopConfig(steps=2, batch=4, rate=1e-3, warmup=1, precision="no", save_every=2, evaluate_every=2)
SIZE = 64


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("train")
    generator = np.random.default_rng(0)
    kinds = list(KIND_SHARES)

    def picture(i: int) -> tuple[np.ndarray, dict]:
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        return pixels, {"texts": [f"number {i}", "a picture"], "kind": kinds[i % len(kinds)], "key": str(i)}

    write_packed((picture(i) for i in range(80)), folder, SIZE, "pictures")
    return Workspace(folder, folder / "runs", _config())


def _config() -> SystemConfig:
    config = tiny(small(SIZE))
    return replace(config, autoencoder=replace(config.autoencoder, base_channels=8))


def test_every_stage_makes_what_the_next_one_needs(work: Workspace) -> None:
    with pytest.raises(LdmError, match="run the stage that makes it first"):
        stages.encode_all(work, None)
    stages.train_autoencoder(work, LOOP)
    stages.train_clip(work, LOOP)
    stages.encode_all(work, None)
    stages.train_unet(work, LOOP)
    stages.train_vae_decoder(work, LOOP)
    stages.assemble(work, None)
    path = work.runs / stages.CHECKPOINT
    model = load(path, device="cpu", dtype="float32")
    picture = model.generate("a picture", seed=1, steps=2)[0].image
    assert picture.size == (SIZE, SIZE)
    assert any(name.startswith("visual.") for name in read_clip(path)), "the image tower ships too"
    first, second = (load_file(work.stage(name) / "autoencoder.safetensors") for name in ("autoencoder", "vae-decoder"))
    learned = {name.split(".")[0] for name, tensor in second.items() if not torch.equal(tensor, first[name])}
    assert learned == {"decoder", "post_quant_conv"}, "the latents stay"
    latents = np.load(work.stage("latents") / "latents.npy")
    assert latents.std() == pytest.approx(1.0, abs=0.2)
    assert (work.stage("unet") / "samples-000002.png").exists()


def test_the_decoder_goes_on_from_there(work: Workspace) -> None:
    stages.train_decoder(work, LOOP)
    decoder = load(work.runs / stages.DECODER, device="cpu", dtype="float32")
    assert decoder.config == decoder_of(work.config)
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    (drawn,) = decoder.variations("", Image.fromarray(pixels), seed=1, steps=2)
    assert drawn.image.size == (SIZE, SIZE)
    assert (work.stage("decoder") / "samples-000002.png").exists()
    seen = np.load(work.stage("latents") / "embeddings.npy")
    ours = decoder.image_embedding(Image.fromarray(open_packed(work.pictures, SIZE)[0][3]))
    np.testing.assert_allclose(seen[3, 0], ours[0].numpy(), atol=0.05)


def test_resuming_a_finished_stage_takes_no_step(work: Workspace) -> None:
    before = (work.stage("autoencoder") / "autoencoder.safetensors").read_bytes()
    torch.manual_seed(123)
    stages.train_autoencoder(work, LOOP)
    assert (work.stage("autoencoder") / "autoencoder.safetensors").read_bytes() == before


def test_recipes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="expected one of small-autoencoder"):
        recipes.run("medium", tmp_path)
    with pytest.raises(LdmError, match="no training loop"):
        recipes.run("small-assemble", tmp_path, steps=3)
    with pytest.raises(LdmError, match="pack the shards first"):
        recipes.run("small-autoencoder", tmp_path, pictures=tmp_path)
