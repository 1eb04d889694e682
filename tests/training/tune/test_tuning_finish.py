"""A run's end, where something fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.training.tune import finish as module
from ldm.training.tune.finish import Finished, finish
from ldm.training.tune.plan import plan
from ldm.training.tune.run import Run, tune


def ended_of(run: Run) -> Finished:
    return finish(run, plan(run.objective, run.loop, run.kept, 0, 1), 1.0)


class Colours:
    """A CLIP that knows pictures by their colours and captions by nothing; with an error, one that fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def image_vectors(self, images: Sequence[Image.Image]) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        colours = torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images])
        return torch.nn.functional.normalize(colours.float(), dim=1)

    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.eye(3)[: len(texts)]


@pytest.mark.parametrize(
    ("error", "why"),
    [(LdmError("the picture is too large"), "the picture is too large"), (MemoryError(), "memory ran out")],
)
def test_a_copy_check_that_fails_costs_no_verdict(
    small_run: Run, error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(small_run)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "tuned_model", fail)
    ended = ended_of(small_run)
    assert ended.verdict.sentences and ended.copies is None and ended.file.is_file()
    assert ended.notes == (f"Whether samples are copies could not be looked at: {why}",)
    assert why in ended.report.read_text()
    monkeypatch.setattr(module, "tuned_model", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what nobody foresaw is not hidden
        ended_of(small_run)


def test_pictures_that_are_gone_cost_no_verdict(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they were encoded to is kept, so whether samples are copies can still be told."""
    monkeypatch.setattr(module, "load_clip", lambda *_, **__: Colours())
    tune(small_run)
    whole = ended_of(small_run)
    assert whole.copies is not None and whole.notes == whole.copies.sentences
    assert "of the usual distance" in whole.report.read_text()
    for path in small_run.tuning.pictures.iterdir():
        path.unlink()
    ended = ended_of(small_run)
    assert ended.verdict.sentences and ended.copies is not None and len(ended.notes) == len(whole.notes) + 2
    for note, what in zip(ended.notes[-2:], ("What CLIP says of captions", "The pictures nearest"), strict=True):
        assert note.startswith(what) and note.endswith(".png: not found; check the path"), note
        assert what in ended.report.read_text()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), LdmError("no")])
def test_a_clip_that_fails_costs_no_verdict(small_run: Run, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_clip", lambda *_, **__: Colours(error))
    tune(small_run)
    ended = ended_of(small_run)
    why = "no" if isinstance(error, LdmError) else "memory ran out"
    assert ended.verdict.sentences and ended.copies is not None
    assert f"What CLIP says of captions could not be looked at: {why}" in ended.notes


def test_a_sample_that_is_gone_or_damaged_costs_no_verdict(small_run: Run):
    tune(small_run)
    first, last = (small_run.samples.paths(small_run.tuning.output, step) for step in (0, 2))
    first[0].write_bytes(first[0].read_bytes()[:60])
    first[1].unlink()
    last[0].write_bytes(b"no picture")
    ended = ended_of(small_run)
    assert ended.verdict.sentences and "<html" in ended.report.read_text()


def test_a_measurement_that_is_damaged_costs_its_step_alone(small_run: Run, caplog: pytest.LogCaptureFixture):
    """What can be measured again is: the base is there still, the weights of a step are not."""
    first = tune(small_run)
    assert [seen.step for seen in first] == [0, 2]
    for path in (small_run.tuning.output / "measured").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert [seen.step for seen in tune(small_run)] == [0]
    assert "passed over" in caplog.text
