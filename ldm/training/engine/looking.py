"""Looking at a run on its way: the objective's own evaluation, its figures kept, and the best weights with them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from ldm.training.engine.figures import Figures, append_figures, in_words, read_figures
from ldm.training.engine.run import Run
from ldm.training.engine.state import BEST, RunState, save_state

log = logging.getLogger(__name__)


def evaluate(run: Run, step: int) -> None:
    """Let the objective look at itself with the averaged weights. A failure is logged: the run outlives it.

    Of weights that are split all processes look together, and where one of them fails none can go on.
    """
    run.update_average()
    run.average.swap()
    run.objective.eval()
    try:
        # Compiling the network anew for the few shapes of an evaluation would cost minutes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            figures = run.objective.evaluate(run.output, step)
    except Exception:
        if run.split:
            raise
        log.warning("step %d: its evaluation failed, training goes on", step, exc_info=True)
        return
    finally:
        run.objective.train()
        run.average.swap()
    if not run.first:
        return
    log.info("step %d  %s", step, in_words(figures))
    if run.config.best is not None:
        _keep_best(run, step, figures, run.config.best)
    append_figures(run.output, Figures(step, "evaluation", figures))


def was_evaluated(output: Path, step: int) -> bool:
    """Whether there are figures of this step."""
    return any(figures.step == step and figures.of == "evaluation" for figures in read_figures(output))


def _keep_best(run: Run, step: int, figures: dict[str, float], name: str) -> None:
    """Save the averaged weights if the figure of this name is the least of all so far."""
    if name not in figures:
        log.warning("step %d: best: found no figure %r, only %s", step, name, ", ".join(figures) or "none")
        return
    before = [f.values[name] for f in read_figures(run.output) if f.of == "evaluation" and name in f.values]
    if figures[name] < min((value for value in before if not math.isnan(value)), default=math.inf):
        state = RunState(step, run.facts(), {"ema": run.average.state_dict()}, {name: figures[name]})
        save_state(run.output / BEST, state, keep=1)
