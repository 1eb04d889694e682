"""`ldm train-clip`: a CLIP of any open_clip config, trained on pictures with captions."""

from __future__ import annotations

from ldm.apps.flags.commands import TrainClip
from ldm.training.clip.run import ClipRun, train_clip
from ldm.training.engine.loop import LoopConfig
from ldm.training.engine.ranks import rank_and_ranks

WARMUP = 0.05
"""The share of the steps over which the rate rises."""


def run(command: TrainClip) -> None:
    """Train as the command says; progress goes to the log, the written file's path to stdout. Raises `LdmError`."""
    steps = command.steps
    loop = LoopConfig(
        steps=steps,
        batch=command.batch,
        rate=command.rate,
        warmup=max(1, round(WARMUP * steps)) if command.warmup is None else command.warmup,
        schedule="cosine",
        ema=command.ema,
        weight_decay=command.weight_decay,
        decayed="matrices",  # Radford et al. 2021, section 2.5
        betas=(0.9, 0.98),
        precision=command.precision,
        seed=command.seed,
        save_every=command.save_every,
        evaluate_every=command.evaluate_every,
        log_every=command.log_every,
    )
    task = ClipRun(
        data=command.data,
        config=command.config,
        output=command.output,
        loss=command.loss,
        chunks=command.accumulate,
        text_model=command.text_model,
        labels=command.labels,
        held_out=command.held_out,
        mirror=command.mirror,
    )
    path = train_clip(task, loop)
    if rank_and_ranks()[0] == 0:
        print(path)
