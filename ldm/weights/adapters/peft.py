"""What peft writes beside its tensors: how strong an adapter is meant to be, which the tensors do not tell.

diffusers keeps peft's config as JSON in the file's metadata, an object for all networks whose keys start with the
network's name (`unet.lora_alpha`); peft itself writes `adapter_config.json` into the same folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.weights.source import read_json

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class PeftConfig:
    """alpha: the strength at rank 1, None: as much as the rank; alphas: that of single modules, by how they end;
    by_root: divided by the rank's square root instead of the rank (Kalajdzievski 2023); dora: has magnitudes."""

    alpha: float | None = None
    alphas: Mapping[str, float] | None = None
    by_root: bool = False
    dora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by."""
        own = (alpha for end, alpha in (self.alphas or {}).items() if f".{module}".endswith(f".{end}"))
        alpha = next(own, rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_peft_configs(metadata: Mapping[str, str], path: Path) -> dict[str, PeftConfig]:
    """What modules start with ("" is all of them) -> their config. path: the adapter's file.

    Raises ValueError for metadata that is no such config, and LdmError for such a file.
    """
    if (text := metadata.get(METADATA_KEY)) is not None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"its metadata {METADATA_KEY} is no JSON object; expected peft's config")
        return {f"{network}.": _config(_under(found, f"{network}.")) for network in NETWORKS}
    beside = path.with_name(CONFIG_FILE)
    return {"": _config(read_json(beside))} if beside.is_file() else {}


def config_of(module: str, configs: Mapping[str, PeftConfig]) -> PeftConfig:
    """The config of the network that a module belongs to."""
    return next((config for prefix, config in configs.items() if module.startswith(prefix)), PeftConfig())


def _under(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _config(entries: Mapping[str, Any]) -> PeftConfig:
    """LoRA calls it lora_alpha, peft's other kinds alpha."""
    alpha = entries.get("lora_alpha", entries.get("alpha"))
    patterns = entries.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("peft's alpha_pattern is no JSON object; expected modules and their alphas")
    return PeftConfig(
        alpha=None if alpha is None else _number(alpha),
        alphas={end.removeprefix("^"): _number(value) for end, value in patterns.items()},
        by_root=entries.get("use_rslora") is True,
        dora=entries.get("use_dora") is True,
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"peft's alpha is {str(value)[:40]!r}; expected a finite number")
    return float(value)
