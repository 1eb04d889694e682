"""What trainers write of a training run (kohya's `ss_*` metadata, which others follow), in plain words.

Every value is a string that anybody may have written: what cannot be read is left out, and nothing here raises.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

BASES = {
    "sd_v1": "Stable Diffusion 1.x",
    "sd_v2": "Stable Diffusion 2.x",
    "sd_v2_v": "Stable Diffusion 2.x, v-prediction",
    "sdxl_base_v1-0": "Stable Diffusion XL",
    "sdxl_base_v0-9": "Stable Diffusion XL 0.9",
    "sd3": "Stable Diffusion 3",
    "flux1": "Flux 1",
}
"""`ss_base_model_version`, the names that kohya's trainer writes."""

NOTHING = ("", "None", "none", "null", "False", "0", "0.0", "[]", "{}")
"""How an option that was not used is written."""

OPTIONS = {
    "ss_noise_offset": "noise offset {}",
    "ss_multires_noise_iterations": "multires noise {} times",
    "ss_ip_noise_gamma": "input noise {}",
    "ss_min_snr_gamma": "min-SNR gamma {}",
    "ss_clip_skip": "clip skip {}",
    "ss_caption_dropout_rate": "captions dropped {}",
    "ss_loss_type": "{} loss",
    "ss_mixed_precision": "mixed precision {}",
    "ss_seed": "seed {}",
}
TAGS = 10
FOLDERS = 4


def training_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What -> what the metadata says of it, in the order of a report; empty where nothing is told."""
    found = (
        ("base", _base(metadata)),
        ("network", _network(metadata)),
        ("length", _length(metadata)),
        ("learning", _learning(metadata)),
        ("options", _options(metadata)),
        ("pictures", _pictures(metadata)),
        ("top tags", _tags(metadata)),
        ("time", _time(metadata)),
        ("comment", _text(metadata, "ss_training_comment")),
    )
    return {what: said for what, said in found if said}


def _base(metadata: Mapping[str, str]) -> str:
    version = _text(metadata, "ss_base_model_version")
    names = [_text(metadata, "ss_sd_model_name"), BASES.get(version, version)]
    if _text(metadata, "ss_v2") == "True" and not version:
        names.append(BASES["sd_v2"])
    if digits := _text(metadata, "ss_new_sd_model_hash") or _text(metadata, "ss_sd_model_hash"):
        names.append(f"hash {digits[:10]}")
    if (vae := _text(metadata, "ss_vae_name")) or _text(metadata, "ss_vae_hash"):
        names.append(f"VAE {vae or _text(metadata, 'ss_vae_hash')}")
    return _joined(names)


def _network(metadata: Mapping[str, str]) -> str:
    arguments = _json(metadata, "ss_network_args")
    told = arguments if isinstance(arguments, dict) else {}
    words = [_text(metadata, "ss_network_module"), str(told.get("algo", ""))]
    words += [_of(metadata, "ss_network_dim", "rank {}"), _of(metadata, "ss_network_alpha", "alpha {}")]
    if told.get("conv_dim"):
        words.append(f"convolutions rank {told['conv_dim']} alpha {told.get('conv_alpha', 1)}")
    words.append(_of(metadata, "ss_network_dropout", "dropout {}"))
    return _joined(words)


def _length(metadata: Mapping[str, str]) -> str:
    done, planned = _number(metadata, "ss_steps"), _number(metadata, "ss_max_train_steps")
    steps = f"{done:,.0f} steps" if done is not None else ""
    if planned is not None and planned != done:
        steps = f"{steps} of {planned:,.0f}" if steps else f"at most {planned:,.0f} steps"
    epoch, epochs = _text(metadata, "ss_epoch"), _text(metadata, "ss_num_epochs")
    words = [steps, f"epoch {epoch} of {epochs}" if epoch and epochs else ""]
    batch, accumulated = _text(metadata, "ss_total_batch_size"), _text(metadata, "ss_gradient_accumulation_steps")
    words.append(f"batches of {batch or _batch(metadata)}" if batch or _batch(metadata) else "")
    words.append(f"gradients of {accumulated} batches together" if accumulated not in (*NOTHING, "1") else "")
    return _joined(words)


def _learning(metadata: Mapping[str, str]) -> str:
    optimizer, _, arguments = _text(metadata, "ss_optimizer").partition("(")
    words = [optimizer.rpartition(".")[2] + (f"({arguments}" if arguments else "")]
    words.append(_of(metadata, "ss_learning_rate", "rate {}"))
    words += [_of(metadata, "ss_unet_lr", "U-Net {}"), _of(metadata, "ss_text_encoder_lr", "text encoder {}")]
    words += [_text(metadata, "ss_lr_scheduler"), _of(metadata, "ss_lr_warmup_steps", "{} steps of warm-up")]
    return _joined(words)


def _options(metadata: Mapping[str, str]) -> str:
    words = [_of(metadata, key, words) for key, words in OPTIONS.items()]
    terminal = _text(metadata, "ss_zero_terminal_snr") == "True"
    return _joined([*words, "zero terminal SNR" if terminal else ""])


def _pictures(metadata: Mapping[str, str]) -> str:
    folders = _folders(metadata)
    count, regular = _number(metadata, "ss_num_train_images"), _number(metadata, "ss_num_reg_images")
    words = [f"{count:,.0f} with repeats" if count else ""]
    words.append(f"{regular:,.0f} for regularization" if regular else "")
    for name, pictures, repeats in folders[:FOLDERS]:
        words.append(f"{name}: {pictures:,} x {repeats}")
    words.append(f"{len(folders) - FOLDERS} more folders" if len(folders) > FOLDERS else "")
    sizes = {_size(dataset.get("resolution")) for dataset in _datasets(metadata)} - {""}
    return _joined([*words, *sorted(sizes)])


def _folders(metadata: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """(name, pictures, repeats) of each folder, the largest first."""
    told: list[Any] = [_json(metadata, "ss_dataset_dirs"), *(set_.get("dirs") for set_ in _datasets(metadata))]
    found: dict[str, tuple[int, int]] = {}
    for name, facts in (item for folders in told if isinstance(folders, dict) for item in folders.items()):
        if isinstance(facts, dict) and all(_is_count(facts.get(key)) for key in ("img_count", "n_repeats")):
            found[name] = facts["img_count"], facts["n_repeats"]
    return sorted(((name, *counts) for name, counts in found.items()), key=lambda folder: (-folder[1], folder[0]))


def _tags(metadata: Mapping[str, str]) -> str:
    """The tags of most captions, over all folders."""
    counted: Counter[str] = Counter()
    for tag, times in _tag_counts(_json(metadata, "ss_tag_frequency")):
        counted[tag.strip()] += times
    return _joined([f"{tag} ({times:,})" for tag, times in counted.most_common(TAGS)])


def _tag_counts(folders: Any) -> Iterator[tuple[str, int]]:
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, times in tags.items() if isinstance(tags, dict) else ():
            if _is_count(times):
                yield tag, times


def _time(metadata: Mapping[str, str]) -> str:
    started, ended = (_number(metadata, f"ss_training_{what}_at") for what in ("started", "finished"))
    known = [moment for moment in (ended, started) if moment is not None and 0 < moment < 32503680000]  # year 3000
    if not known:
        return ""
    words = [f"{datetime.fromtimestamp(known[0], UTC):%Y-%m-%d}"]
    if len(known) == 2 and known[0] > known[1]:
        minutes = round((known[0] - known[1]) / 60)
        words.append(f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min")
    return _joined(words)


def _datasets(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    datasets = _json(metadata, "ss_datasets")
    return [item for item in datasets if isinstance(item, dict)] if isinstance(datasets, list) else []


def _batch(metadata: Mapping[str, str]) -> str:
    sizes = {item.get("batch_size_per_device") for item in _datasets(metadata)}
    size = sizes.pop() if len(sizes) == 1 else None
    return str(size) if _is_count(size) else ""


def _size(resolution: Any) -> str:
    """[512, 512] or 512 -> the size as people write it."""
    sides = resolution if isinstance(resolution, list) else [resolution, resolution]
    return f"at {sides[0]}x{sides[1]}" if len(sides) == 2 and all(map(_is_count, sides)) else ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _text(metadata: Mapping[str, str], key: str) -> str:
    """A value, "" where it is absent or says that there is none."""
    value = metadata.get(key, "").strip()
    return "" if value in NOTHING else value


def _of(metadata: Mapping[str, str], key: str, words: str) -> str:
    return words.format(value) if (value := _text(metadata, key)) else ""


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    try:
        number = float(metadata[key])
    except (KeyError, ValueError):
        return None
    return number if math.isfinite(number) and 0 <= number < 1e12 else None


def _json(metadata: Mapping[str, str], key: str) -> Any:
    """A value that is JSON itself, None where it is not."""
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None


def _joined(words: list[str]) -> str:
    return ", ".join(word for word in words if word)
