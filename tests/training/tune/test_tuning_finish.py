"""A run's end, where something fails."""

from __future__ import annotations

import pytest

from ldm.errors import LdmError
from ldm.training.tune import finish as module
from ldm.training.tune.finish import finish
from ldm.training.tune.plan import plan
from ldm.training.tune.run import Run, tune


@pytest.mark.parametrize(
    ("error", "why"),
    [(LdmError("the picture is too large"), "the picture is too large"), (MemoryError(), "memory ran out")],
)
def test_a_copy_check_that_fails_costs_no_verdict(
    small_run: Run, error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(small_run.objective, small_run.loop, small_run.kept, 0, 1)
    tune(small_run)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "tuned_model", fail)
    ended = finish(small_run, planned, 1.0)
    assert ended.verdict.sentences and ended.copies is None and ended.file.is_file()
    assert ended.copied == (f"Whether samples are copies was not looked at, as drawing them failed: {why}",)
    assert why in ended.report.read_text()
    monkeypatch.setattr(module, "tuned_model", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what nobody foresaw is not hidden
        finish(small_run, planned, 1.0)
