"""Which pictures are only measured on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.picture_set import read_pictures
from ldm.training.tune.run import Run, prepare_run
from ldm.training.tune.settings import Tuning


def test_equal_pictures_stay_on_one_side(small_run: Run, tmp_path: Path) -> None:
    """Eight pictures, each three times under other names: by lot alone they would part."""
    folder = tmp_path / "doubles"
    folder.mkdir()
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        for copy in "ab":
            shutil.copy(folder / f"{number}.png", folder / f"{number}{copy}.png")
        for name in (f"{number}", f"{number}a", f"{number}b"):
            (folder / f"{name}.txt").write_text(f"noise {number}")
    for seed in range(4):
        tuning = Tuning(folder, tmp_path / "doubled", adapter=small_run.tuning.adapter, held_out=0.25, seed=seed)
        loop = small_run.loop
        run = prepare_run(tuning, read_pictures(folder, tuning.defaults), small_run.base, lambda _, loop=loop: loop)
        sides = [{run.objective.pictures[i].content for i in side} for side in (run.kept, run.held_out)]
        assert not sides[0] & sides[1] and len(sides[1]) == 2 and len(run.held_out) == 6
        assert "pictures that are there already, under another name: 16; ldm check names them" in run.notes
