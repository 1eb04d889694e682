"""What is asked of a model on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.training.tune.measure import losses, question
from ldm.training.tune.objective import TuneObjective
from ldm.training.tune.run import Run


def test_questions_come_in_batches_that_training_has_and_the_answers_are_the_same(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, rows = small_run.objective, list[int]()
    asked = question(objective, [0, 1])
    loss = TuneObjective.loss
    monkeypatch.setattr(TuneObjective, "loss", lambda *told: (rows.append(len(told[1]["noise"])), loss(*told))[1])
    answers = []
    for batch in (1, 3, 1000):
        rows.clear()
        objective.epochs = replace(objective.epochs, batch=batch)
        answers.append(losses(objective, asked.pictures, asked.own, 4))
        assert max(rows) == min(batch, 4 * answers[0].shape[1]) and sum(rows) == 4 * answers[0].numel()
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-5, atol=1e-6)
