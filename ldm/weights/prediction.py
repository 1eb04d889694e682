"""What a U-Net was trained to predict, noise (eps) or velocity (v). No tensor says so; this is the order of evidence.

1. the caller; 2. our own config; 3. ModelSpec metadata; 4. marker tensors; 5. diffusers' scheduler_config.json; 6. a
.yaml file beside it; 7. the training step; 8. what is known of the family; 9. for SD 2.x, how far a norm's biases are
spread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.models.presets import SystemConfig
from ldm.types import PredictionType
from ldm.weights.architecture import under
from ldm.weights.layout import UNET
from ldm.weights.source import Source

WORDS: Mapping[str, PredictionType] = {
    "v": "v", "v_prediction": "v", "v-prediction": "v", "vscaling": "v",
    "eps": "eps", "epsilon": "eps", "epsscaling": "eps", "x0": "x0",
}  # fmt: skip
"""What tools write for the prediction types."""

STEPS: Mapping[str, PredictionType] = {"875000": "eps", "220000": "eps", "110000": "v"}
"""Training steps of published SD 2.x files: the base models' and the 768 v-model's."""

V_SPREAD = 0.09
"""Above this standard deviation of the last attention norm's biases an SD 2.x file predicts v; ComfyUI's threshold."""


@dataclass(frozen=True)
class Decision:
    """A prediction type and the rule that decided it, in words."""

    prediction: PredictionType
    rule: str


def decide(source: Source, config: SystemConfig) -> Decision:
    """The prediction type of a file that is not ours, by rules 3 to 9. Reads at most one small tensor."""
    return (
        _from_metadata(source.metadata)
        or _from_markers(source)
        or _from_facts(source.facts)
        or _from_sidecar(source.path)
        or _from_training_step(source.metadata)
        or _from_family(config)
        or _from_biases(source)
    )


def _from_metadata(metadata: Mapping[str, str]) -> Decision | None:
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if prediction := WORDS.get(metadata.get(key, "").strip().lower()):
            return Decision(prediction, f"metadata {key}")
    if "768-v" in metadata.get("modelspec.architecture", ""):
        return Decision("v", "metadata modelspec.architecture")
    return None


def _from_markers(source: Source) -> Decision | None:
    return Decision("v", "marker tensor v_pred") if "v_pred" in source.tensors else None


def _from_facts(facts: Mapping[str, str]) -> Decision | None:
    prediction = WORDS.get(facts.get("prediction", ""))
    return Decision(prediction, "its scheduler_config.json") if prediction else None


def _from_sidecar(path: Path) -> Decision | None:
    """`parameterization:` (LDM) or a scaling class (sgm) in the .yaml of the same name: searched, not parsed."""
    sidecar = path.with_suffix(".yaml")
    try:
        if not sidecar.is_file():
            return None
        with sidecar.open(encoding="utf-8", errors="replace") as file:
            text = file.read(64 * 1024)
    except OSError:  # a hint that cannot be read is none
        return None
    found = re.search(r"""^\s*parameterization:\s*["']?(\w+)|\.(VScaling|EpsScaling)\b""", text, re.MULTILINE)
    prediction = WORDS.get((found[1] or found[2]).lower()) if found else None
    return Decision(prediction, f"{sidecar.name} beside the file") if prediction else None


def _from_training_step(metadata: Mapping[str, str]) -> Decision | None:
    step = metadata.get("global_step", "")
    return Decision(STEPS[step], f"metadata: trained for {step} steps") if step in STEPS else None


def _from_family(config: SystemConfig) -> Decision | None:
    if config.family != "sd2":
        return Decision("eps", f"{config.family} files predict eps unless they say otherwise")
    if config.image is not None:
        return Decision("v", "SD 2.1 unCLIP predicts v")
    if config.unet.classes is not None:
        return Decision("v", "the x4 upscaler predicts v")
    if config.unet.in_channels != 4:
        return Decision("eps", f"SD 2.x models with {config.unet.in_channels} input channels predict eps")
    return None


def _from_biases(source: Source) -> Decision:
    stages = [int(name.split(".")[1]) for name in under(source.shapes, UNET) if _is_norm(name)]
    if not stages:
        return Decision("eps", "no evidence: taken as eps")
    name = f"{UNET}output_blocks.{max(stages)}.1.transformer_blocks.0.norm1.bias"
    ((_, bias),) = source.read([name])
    spread = float(bias.float().std(correction=0))
    return Decision(
        "v" if spread > V_SPREAD else "eps", f"spread of the last norm's biases, {spread:.3f} (v above {V_SPREAD})"
    )


def _is_norm(name: str) -> bool:
    return re.fullmatch(r"output_blocks\.\d+\.1\.transformer_blocks\.0\.norm1\.bias", name) is not None
