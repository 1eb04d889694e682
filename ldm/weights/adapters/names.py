"""Which weight a module of an adapter stands for: every spelling that trainers use, generated from a model's config.

Trainers name a module after diffusers' path of it or after the original one, with dots or (kohya, LyCORIS) with
underscores, behind a prefix that tells the network. Here all is spelled with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.models.presets import SystemConfig
from ldm.weights.architecture import Shapes
from ldm.weights.layout import UNET, text_prefix
from ldm.weights.rename import Names, Piece, text_names, unet_names

Network = Literal["unet", "text"]
Layout = Literal["kohya", "diffusers"]


@dataclass(frozen=True)
class Target:
    """Where a change goes: a tensor by its name in a single file, whole, some of its rows, or turned round.

    shape: of what is changed, as an adapter sees it.
    """

    network: Network
    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that is changed, as a view in the adapter's shape."""
        part = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return part.T if self.transposed else part


Targets = dict[str, dict[str, Target]]
"""Module, spelled with underscores -> "weight" or "bias" -> its target."""

UNET_PREFIXES = ("lora_unet_", "unet_", "diffusion_model_", "model_diffusion_model_")
FIRST_TOWER = ("lora_te_", "lora_te1_", "text_encoder_", "text_encoders_clip_l_transformer_",
               "text_encoders_clip_h_transformer_")  # fmt: skip
SECOND_TOWER = ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_")
"""Also that of the SDXL refiner, which has no first tower."""

ANY_PREFIXES = ("lycoris_", "base_model_model_", "")
"""What stands before modules of whichever network was trained alone."""


def targets(config: SystemConfig, shapes: Shapes) -> Targets:
    """Every spelling of every module of a system's U-Net and text towers. shapes: of its tensors, names as in a file.

    Tensors that are not in `shapes` are left out.
    """
    found: Targets = {}
    _add(found, "unet", UNET, (*UNET_PREFIXES, *ANY_PREFIXES), unet_names(config.unet), shapes)
    for index, use in enumerate(config.text):
        second = config.sizes_in_vector > 0 and use.tower.names == "open_clip"
        prefixes = (*(SECOND_TOWER if second else FIRST_TOWER), *(ANY_PREFIXES if len(config.text) == 1 else ()))
        _add(found, "text", text_prefix(config, index), prefixes, text_names(use.tower), shapes)
    return found


def modules(config: SystemConfig, wanted: Iterable[Target], layout: Layout) -> dict[Target, str]:
    """What a file of this layout calls the module of each of these weights: one of the names that `targets` knows.

    kohya: "lora_unet_down_blocks_0_...", "lora_te_...", of SDXL "lora_te1_..." and "lora_te2_..."; diffusers:
    "unet.down_blocks.0...", "text_encoder...", "text_encoder_2...".
    """
    kohya = layout == "kohya"
    networks = [(UNET_PREFIXES[0] if kohya else "unet.", UNET, unet_names(config.unet))]
    for index, use in enumerate(config.text):
        second = config.sizes_in_vector > 0 and use.tower.names == "open_clip"
        if kohya:
            prefix = SECOND_TOWER[0] if second else FIRST_TOWER[config.sizes_in_vector > 0]
        else:
            prefix = "text_encoder_2." if second else "text_encoder."
        networks.append((prefix, text_prefix(config, index), text_names(use.tower)))
    pieces = {home + ours: (prefix, piece) for prefix, home, names in networks for ours, piece in names.items()}
    found = {}
    for target in wanted:
        prefix, piece = pieces[target.name]
        path = piece.names[target.rows[0] // target.shape[0] if target.rows else 0].removesuffix(".weight")
        found[target] = prefix + (path.replace(".", "_") if kohya else path)
    return found


def spelled(module: str) -> str:
    """A module's name with underscores, and as it is called today where older files call it otherwise."""
    name = module.replace(".", "_").replace("_processor_", "_")
    name = re.sub(r"_self_attn_to_(q|k|v|out)$", r"_self_attn_\1_proj", name)
    return f"{name}_0" if name.endswith("_to_out") else name


def _add(found: Targets, network: Network, home: str, prefixes: tuple[str, ...], names: Names, shapes: Shapes) -> None:
    """Add the spellings of one network. home: where its tensors lie in a single file."""
    for ours, piece in names.items():
        if home + ours not in shapes:
            continue
        for theirs, target in _targets(network, home + ours, shapes[home + ours], piece):
            own = (ours,) if piece.form == "same" else ()
            for path in {theirs, theirs.removeprefix("text_model."), *own}:
                module, _, field = path.rpartition(".")
                for prefix in prefixes:
                    found.setdefault(prefix + module.replace(".", "_"), {})[field] = target


def _targets(network: Network, name: str, shape: tuple[int, ...], piece: Piece) -> Iterator[tuple[str, Target]]:
    """The other layout's names of a tensor, and what each is of it."""
    match piece.form:
        case "rows":
            height = shape[0] // len(piece.names)
            for index, theirs in enumerate(piece.names):
                rows = (index * height, (index + 1) * height)
                yield theirs, Target(network, name, (height, *shape[1:]), rows=rows)
        case "transposed":
            yield piece.names[0], Target(network, name, shape[::-1], transposed=True)
        case _:
            yield piece.names[0], Target(network, name, shape)
