"""What a file is and what is wrong with it: the doctor behind `ldm info`, which prints nothing itself.

Headers are read, not gigabytes: names, shapes and metadata tell nearly all. Only a `deep` look reads the numbers.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from ldm.errors import LdmError
from ldm.weights.doctor.findings import family_of_pickle, find_out
from ldm.weights.doctor.kinds import ADAPTER, EMBEDDING, PART, kind_of_file, readers
from ldm.weights.doctor.pickle_scan import scan_pickle
from ldm.weights.doctor.remedies import remedies
from ldm.weights.doctor.report import FileReport, Finding, FolderEntry, Hashes, Numbers, PartReport, PickleReport
from ldm.weights.doctor.training_facts import training_facts
from ldm.weights.embedding_pictures import PICTURES
from ldm.weights.find import MAX_FILES, SUFFIXES
from ldm.weights.hashes import WINDOW_START, check_full, check_short, full_hashes, old_short_hash
from ldm.weights.io import ITEM_BYTES, Header, TensorInfo, is_pickle, open_regular, printable, read_header, read_tensors
from ldm.weights.part import is_part
from ldm.weights.pickles import ALLOWED
from ldm.weights.scaled import is_scaled, unscaled
from ldm.weights.source import Source, canonical_source, open_source

PARTS: tuple[tuple[str, str], ...] = (
    ("U-Net", r"model\.diffusion_model\."),
    ("image conditioning", r"noise_augmentor\.|image_tokens\."),
    ("autoencoder", r"first_stage_model\."),
    ("image encoder", r"cond_stage_model\.model\.visual\.|embedder\.model\.visual\."),
    ("text encoder", r"cond_stage_model\.|conditioner\.embedders\.0\."),
    ("text encoder 2", r"conditioner\.embedders\.\d\."),
    ("EMA weights", r"model_ema\."),
    ("control network", r"control_model\.|controlnet_|input_hint_block\."),
    ("U-Net", r"lora_unet_|unet\.|diffusion_model\.|lycoris_|(base_model\.model\.)?(down|mid|up)_blocks?\."),
    ("text encoder 2", r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g"),
    ("text encoder", r"lora_te1?_|text_encoder\.|text_encoders\.clip_l"),
    ("embeddings", r"bundle_emb\.|emb_params|emp_params|clip_[lg]$|string_to_param\."),
    ("all tensors", r""),
)
"""The networks that tensors belong to or change, each with a pattern of how names start; the first that fits."""


def describe(path: str | Path, *, deep: bool = False, allow_pickle: bool = False) -> FileReport:
    """Find out all about a file, or a folder that diffusers wrote, from headers alone; `deep` reads every number too.

    A model that does not load still gets a report, and so does a file whose end is missing. A pickle is looked at
    without being read, unless `allow_pickle`. Raises LdmError where the file is no model, or has no sound header.
    """
    path = Path(path)
    if path.is_dir() or path.name.endswith(".index.json"):
        return _report(open_source(path, allow_pickle=allow_pickle), None, deep=deep)
    if path.suffix.lower() in PICTURES:
        return _describe_picture(path, deep=deep)
    if is_pickle(path):
        return _describe_pickle(path, deep=deep, allow_pickle=allow_pickle)
    header = read_header(path, whole=False)
    raw = Source(path, header.tensors, header.metadata, partial(read_tensors, header))
    return _report(raw, header, deep=deep)


def is_one_model(path: Path) -> bool:
    """Whether a folder is a model that diffusers wrote, or a network of one, and not a collection of files."""
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return True
    weights = any(path.glob("diffusion_pytorch_model*")) or any(path.glob("model*.safetensors"))
    return weights and (path / "config.json").is_file()


def describe_folder(folder: str | Path) -> Iterator[FolderEntry]:
    """One entry for each model file below a folder, and for each folder that diffusers wrote, by name."""
    folder = Path(folder)
    for path in _files(folder):
        name = str(path.relative_to(folder))
        try:
            report = describe(path)
        except LdmError as error:
            yield FolderEntry(name, path.stat().st_size if path.exists() else 0, "not read", None, _said(error, path))
        else:
            kind = report.found.adapter.title if report.found.adapter else report.kind
            yield FolderEntry(name, report.size, kind, report.found.family, report.problem)


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if Path(place) != folder and is_one_model(Path(place)):
            inner.clear()
            names = [""]
        indexed = any(name.endswith(".index.json") for name in names)
        for name in sorted(names):
            shard = indexed and re.search(r"-\d{5}-of-\d{5}\.", name)
            if not name or (name.lower().endswith(SUFFIXES) and not name.startswith(".") and not shard):
                yield Path(place, name)
                count += 1
                if count == MAX_FILES:
                    raise LdmError(f"{printable(str(folder))}: holds more than {MAX_FILES} model files")


def _report(
    raw: Source,
    header: Header | None,
    *,
    kind: str | None = None,
    deep: bool = False,
    pickled: PickleReport | None = None,
) -> FileReport:
    """The report on tensors that can be read; header: of a single .safetensors file."""
    lost = header is not None and header.stamp.size < header.needed
    source, problem = _canonical(raw)
    kind = kind or (PART if is_part(source) else kind_of_file(source.tensors))
    found = find_out(source, kind, whole=not lost)
    numbers = _numbers(raw) if deep and not lost else None
    hashes = _hashes(raw.path, header, deep=deep and not lost)
    size = _size(raw.path) if header is None else header.stamp.size
    problem = problem or found.problem
    if header is not None and lost:
        problem = _lost(header)
    elif numbers and numbers.non_finite:
        problem = problem or f"{len(numbers.non_finite)} of its tensors hold numbers that are not finite"
    wrong = [f"{key} in its metadata does not agree with its numbers" for key, ok in hashes.checks.items() if not ok]
    report = FileReport(
        path=str(raw.path),
        size=size,
        needed=size if header is None else header.needed,
        layout=source.layout,
        kind=kind,
        found=found,
        parts=_parts(raw.tensors if is_scaled(raw.tensors) else source.tensors),
        ema=any(name.startswith("model_ema.") for name in source.tensors),
        problem=problem,
        warnings=(*(found.system.warnings if found.system else ()), *wrong),
        metadata=source.metadata,
        training=training_facts(source.metadata),
        hashes=hashes,
        numbers=numbers,
        pickle=pickled,
        read_by=_read_by(kind, source.layout, found) if not problem else (),
        cautions=_cautions(source, found),
        remedies=(),
    )
    return replace(report, remedies=remedies(report))


def _describe_picture(path: Path, *, deep: bool) -> FileReport:
    """The report on an embedding that lies in a picture. Raises LdmError where there is none in it."""
    open_regular(path).close()
    report = _report(Source(path, {}, {}, partial(_nothing), "picture"), None, kind=EMBEDDING)
    if report.problem:
        raise LdmError(f"{printable(str(path))}: {report.problem}")
    return replace(report, hashes=_hashes(path, None, deep=deep))


def _canonical(raw: Source) -> tuple[Source, str | None]:
    """The source under the names of a single file, and what is wrong where it cannot be."""
    try:
        return canonical_source(unscaled(raw)), None
    except LdmError as error:
        return raw, _said(error, raw.path)


def _describe_pickle(path: Path, *, deep: bool, allow_pickle: bool) -> FileReport:
    scan = scan_pickle(path)
    allowed = {".".join(name) for name in ALLOWED}
    readable = scan.complete and set(scan.names) <= allowed and zipfile.is_zipfile(path)
    verdict = scan.verdict
    if not readable and scan.complete and not scan.dangerous:
        verdict += "; it is not read: open it with the program that wrote it, and save it as .safetensors"
    pickled = PickleReport(scan.dangerous, scan.foreign, scan.complete, readable, verdict)
    problem = None if readable else f"is a pickle; risk: {verdict}"
    if allow_pickle and not problem:
        return _report(open_source(path, allow_pickle=True), None, deep=deep, pickled=pickled)
    kind = kind_of_file(scan.keys)
    found = Finding(family=family_of_pickle(scan.keys) if kind not in (ADAPTER, EMBEDDING) else None)
    size = path.stat().st_size
    report = FileReport(
        path=str(path),
        size=size,
        needed=size,
        layout="pickle",
        kind=kind,
        found=found,
        parts=(),
        ema=any(key.startswith("model_ema.") for key in scan.keys),
        problem=problem,
        warnings=(),
        metadata={},
        training={},
        hashes=_hashes(path, None, deep=deep),
        numbers=None,
        pickle=pickled,
        read_by=(),
        cautions=(),
        remedies=(),
    )
    return replace(report, remedies=remedies(report))


def _lost(header: Header) -> str:
    """What an interrupted download lacks."""
    have = header.stamp.size - header.data_start
    gone = sum(tensor.end > have for tensor in header.tensors.values())
    return (
        f"incomplete: have {header.stamp.size:,} of {header.needed:,} bytes ({header.needed - header.stamp.size:,} are "
        f"missing, in {gone:,} of {len(header.tensors):,} tensors); download or copy it again"
    )


def _read_by(kind: str, layout: str, found: Finding) -> tuple[str, ...]:
    adapter = f"{found.adapter.title}, {found.adapter.style}" if found.adapter else ""
    return readers(kind, layout=layout, family=found.family, variant=found.variant or "", adapter=adapter)


def _cautions(source: Source, found: Finding) -> tuple[str, ...]:
    """Which programs take a single file's prediction type for another one.

    diffusers takes SD 2.x for v unless its global_step is 875000, and all else for eps; ComfyUI goes by v_pred in SDXL.
    """
    if found.system is None or source.layout != "single file" or found.family not in ("sd1", "sd2", "sdxl"):
        return ()
    v, second = found.system.prediction == "v", found.family == "sd2"
    cautions = []
    if v != second and found.variant == "text to image":
        taken, right = ("eps", "v_prediction") if v else ("v", "epsilon")
        cautions.append(f'diffusers may take it for {taken}: give its scheduler prediction_type="{right}"')
    if v and found.family == "sdxl" and "v_pred" not in source.tensors:
        cautions.append("ComfyUI takes it for eps, for it has no tensor v_pred")
    return tuple(cautions)


def _parts(tensors: Mapping[str, TensorInfo]) -> tuple[PartReport, ...]:
    """Tensors by network, in the order of PARTS."""
    grouped: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        grouped.setdefault(_part_of(name), []).append(info)
    order = {name: index for index, (name, _) in reversed(list(enumerate(PARTS)))}
    everything = "all tensors" if len(grouped) == 1 else "other tensors"
    return tuple(
        PartReport(
            name=everything if part == "all tensors" else part,
            tensors=len(infos),
            parameters=sum(info.count for info in infos),
            size=sum(info.count * ITEM_BYTES[info.dtype] for info in infos),
            dtypes=tuple(sorted({info.dtype for info in infos})),
        )
        for part, infos in sorted(grouped.items(), key=lambda item: order[item[0]])
    )


@lru_cache(maxsize=50_000)
def _part_of(name: str) -> str:
    return next(part for part, pattern in PARTS if re.match(pattern, name))


def _hashes(path: Path, header: Header | None, *, deep: bool) -> Hashes:
    if path.is_dir() or path.name.endswith(".index.json"):
        return Hashes()
    short = old_short_hash(path) if path.stat().st_size > WINDOW_START else None  # else it is the hash of nothing
    if header is None:
        if not deep:
            return Hashes(short)
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        return Hashes(short, whole[:10], None, whole)
    if header.stamp.size < header.needed:
        return Hashes()
    checks = check_short(header)
    if not deep:
        return Hashes(short, checks=checks)
    full = full_hashes(header)
    return Hashes(short, full.auto_v2, full.auto_v3, full.sha256, full.numbers, {**checks, **check_full(header, full)})


def _numbers(source: Source) -> Numbers:
    """Look at every number, a tensor at a time."""
    non_finite, all_zero = [], []
    for name, tensor in source.read(source.tensors):
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if not torch.isfinite(values).all():
            non_finite.append(name)
        elif values.ndim > 1 and values.numel() and not values.any():
            all_zero.append(name)
    return Numbers(tuple(non_finite), tuple(all_zero))


def _size(path: Path) -> int:
    """Of a file, of a folder's files, or of an index with the shards beside it."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if path.name.endswith(".index.json"):
        stem = path.name.partition(".")[0]
        return sum(file.stat().st_size for file in path.parent.glob(f"{stem}*") if file.is_file())
    return path.stat().st_size


def _said(error: LdmError, path: Path) -> str:
    return str(error).removeprefix(f"{printable(str(path))}: ")


def _nothing(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ()
