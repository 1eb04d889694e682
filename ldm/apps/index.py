"""`ldm index FOLDER`: embed pictures for `ldm search`; alone, or by as many processes as a launcher starts."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

from ldm.apps.flags.clip_inputs import clip_of_command
from ldm.apps.flags.commands import Index
from ldm.apps.output.progress import in_one_line, progress_bar, to_stderr
from ldm.errors import LdmError
from ldm.search import Report, Share, update
from ldm.search.build import update_share
from ldm.search.store import PLACE, REPORT


def index(command: Index) -> None:
    """Make or update the index and print one line, or an object, about it. Raises `LdmError` for what cannot be."""
    share = share_of(command.shard)
    if share is not None and command.rebuild:
        raise LdmError("rebuild: found --shard too, expected one of them; delete the index folder first")
    if not command.folder.is_dir():
        raise LdmError(f"{command.folder}: is no folder, expected one with pictures")
    place = command.index or command.folder / PLACE
    begun = time.perf_counter()
    ranks = _of_launcher("WORLD_SIZE", 1)
    if ranks > 1 and share is not None:
        raise LdmError("shard: found a launcher's RANK too, expected one of them; start it without the launcher")
    report = _by_ranks(command, place, ranks) if ranks > 1 else _alone(command, place, share)
    if report is not None:
        _say(command, place, report, share, time.perf_counter() - begun)


def share_of(shard: str) -> Share | None:
    """ "2/8" -> the second of eight shares; None for an empty text. Raises `LdmError` for anything else."""
    if not shard:
        return None
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard, flags=re.ASCII)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise LdmError(f"shard: found {shard!r}, expected one as 2/8, the second of eight")
    return Share(int(numbers[1]), int(numbers[2]))


def _of_launcher(name: str, alone: int) -> int:
    """The number that a launcher puts into the environment, or `alone`. Raises `LdmError` where it is none."""
    found = os.environ.get(name, str(alone))
    if re.fullmatch(r"\d{1,6}", found, flags=re.ASCII) is None:
        raise LdmError(f"{name}: found {found[:40]!r} in the environment, expected a launcher's number; unset it")
    return int(found)


def _alone(command: Index, place: Path, share: Share | None) -> Report:
    with progress_bar(1) as bar:
        bar.at("loading", 0)
        clip = clip_of_command(command.clip)
        if share is not None:
            return update_share(command.folder, place, clip, share, progress=bar.at)
        return update(command.folder, place, clip, rebuild=command.rebuild, texts=_usual_texts(), progress=bar.at)


def _by_ranks(command: Index, place: Path, ranks: int) -> Report | None:
    """Embed this rank's share, on a GPU of its own where there are some; rank 0 then makes one index of all."""
    import torch
    import torch.distributed as together

    rank = _of_launcher("RANK", 0)
    device = command.clip.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{_of_launcher('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    clip = clip_of_command(replace(command.clip, device=device))
    together.init_process_group("gloo", timeout=timedelta(days=30))  # a share may take that long

    def meet() -> None:
        try:
            together.barrier()
        except RuntimeError:
            raise LdmError(f"rank {rank}: another rank has ended; start again, what is embedded is kept") from None

    try:
        share = Share(rank + 1, ranks)
        if rank:
            update_share(command.folder, place, clip, share, meet=meet)
            return None
        with progress_bar(1) as bar:
            return update(
                command.folder,
                place,
                clip,
                rebuild=command.rebuild,
                texts=_usual_texts(),
                progress=bar.at,
                share=share,
                meet=meet,
            )
    finally:
        together.destroy_process_group()


def _usual_texts() -> list[str]:
    """What an approximate index is tried with."""
    from ldm.data.heldout import read_prompts

    return [record["prompt"] for record in read_prompts()]


def _say(command: Index, place: Path, report: Report, share: Share | None, seconds: float) -> None:
    if command.json:
        print(json.dumps({"index": str(place), **asdict(report), "seconds": round(seconds, 2)}))
        return
    if share is not None:
        told = f"share {share.number} of {share.of}: {report.embedded} pictures embedded; ldm index joins the shares"
    else:
        told = (
            f"{report.pictures} pictures: {report.added} added, {report.changed} changed, {report.removed} removed;"
            f" {report.embedded} embedded"
        )
    if report.embedded:
        told += f", {report.embedded / seconds:.0f} a second"
    print(in_one_line(f"{place}  {told}  {seconds:.1f} s"))
    if report.bad:
        first = report.bad[0]
        told = f"{len(report.bad)} could not be read, as {first.path}: {first.reason}"
        to_stderr(told if share is not None else f"{told}; {place / REPORT} names them all")
