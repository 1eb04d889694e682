"""What an adapter is, told from names and shapes: its kind, rank and alpha, what it changes, and the base it is for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.adapters.family import meant_for
from ldm.weights.adapters.kinds import IA3, Dora, Full, Kind, Loha, Lokr, Lora, Product
from ldm.weights.adapters.names import FIRST_TOWER, SECOND_TOWER, UNET_PREFIXES, spelled
from ldm.weights.adapters.peft import config_of, read_peft_configs
from ldm.weights.adapters.read import Adapter
from ldm.weights.adapters.roles import Part, part_of, role_of
from ldm.weights.embeddings import BUNDLE
from ldm.weights.io import TORCH_DTYPES, printable
from ldm.weights.source import Source

KINDS: dict[type, str] = {
    Lora: "LoRA", Loha: "LoHa", Lokr: "LoKr", IA3: "(IA)^3", Full: "full difference", Dora: "DoRA",
}  # fmt: skip

TARGETS = (
    ("attention", r"attn"),
    ("feed-forward", r"_ff_|mlp"),
    ("projections", r"proj_in|proj_out"),
    ("norms", r"norm|_ln_"),
    ("time embedding", r"time_emb|emb_layers"),
    ("convolutions", r"conv|resnets|samplers|in_layers|out_layers|_op$"),
)
"""What a module is, and a pattern that is somewhere in its name; the first that fits."""

STYLES = (
    ("kohya, original block names", r"lora_unet_(input|middle|output)_block"),
    ("kohya", r"lora_(unet|te\d?)_"),
    ("LyCORIS", r"lycoris_"),
    ("peft", r"base_model\.model\."),
    ("diffusers", r"(unet|text_encoder(_2)?)\."),
    ("ComfyUI", r"(diffusion_model|text_encoders)\."),
)
"""Whose way of naming modules it is, and how such names start."""

READ_FOR_REAL = ("alpha", "on_input")
"""Roles of single numbers, which are read; of all other tensors the shape is enough."""


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is.

    kinds: "LoRA" ... -> how many modules; style: whose names it uses; ranks, alphas: those that occur;
    networks: "U-Net", "text encoder" ... -> how many modules; targets: kinds of layers; base: what it is made for, and
    what tells it; bundled: how many embeddings ride along; fault: what is wrong with it, in one line.
    """

    kinds: Mapping[str, int]
    style: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    networks: Mapping[str, int]
    targets: tuple[str, ...]
    base: str | None
    bundled: tuple[str, ...]
    fault: str | None

    @property
    def title(self) -> str:
        """The kind in a few words."""
        convolutions = " with convolutions (LoCon)" if "LoRA" in self.kinds and "convolutions" in self.targets else ""
        return " and ".join(self.kinds) + convolutions if self.kinds else "a kind that is not read (OFT, GLoRA ...)"


def adapter_facts(source: Source, *, whole: bool = True) -> AdapterFacts:
    """Look at an adapter's names and shapes, and read its alphas; where the file is not `whole`, not even these."""
    modules, unknown = _modules(source.tensors)
    numbers = _numbers(source, [n for roles in modules.values() for n in roles.values()], whole)
    parts: dict[str, Part] = {}
    alphas: set[float] = set()
    faults = [f"{len(unknown)} of its tensors are of no kind that is read, as {unknown[0]}"] if unknown else []
    try:
        configs = read_peft_configs(source.metadata, source.path)
    except (ValueError, LdmError) as error:
        configs = {}
        faults.append(str(error))
    for module, roles in modules.items():
        tensors = {role: numbers[name] for role, name in roles.items()}
        if "alpha" in tensors:
            alphas.add(round(float(tensors["alpha"]), 4))
        try:
            parts[module] = part_of(module, tensors, config_of(module, configs))
        except (ValueError, RuntimeError) as error:
            faults.append(str(error))
    if any(alpha != alpha or abs(alpha) == float("inf") for alpha in alphas):
        faults.append("an alpha is not finite")
    names = {module: spelled(module) for module in modules}
    kinds = [part.weight or part.bias for part in parts.values()]
    looked_at = Adapter(source.path, source.path.stem, "", source.metadata, parts)
    return AdapterFacts(
        kinds=dict(Counter(KINDS[type(kind)] for kind in kinds if kind is not None).most_common()),
        style=next((style for style, start in STYLES if any(re.match(start, m) for m in modules)), "unknown names"),
        ranks=tuple(sorted({rank for kind in kinds if (rank := _rank(kind)) is not None})),
        alphas=tuple(sorted(alphas)),
        networks=dict(sorted(Counter(_network(name) for name in names.values()).items())),
        targets=tuple(what for what, _ in TARGETS if any(_target(name) == what for name in names.values())),
        base=meant_for(looked_at),
        bundled=tuple(sorted({name.split(".")[1] for name in source.tensors if name.startswith(BUNDLE)})),
        fault=None if not faults else printable(faults[0]) + (f" (and {len(faults) - 1} more)" if faults[1:] else ""),
    )


def _modules(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module -> role -> tensor's name; and the tensors that no adapter has."""
    names = {name for name in names if not name.startswith(BUNDLE)}
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for name in sorted(names):
        module, role = role_of(name) or ("", "")
        if not module or (role == "factors" and f"{module}.on_input" not in names):
            unknown.append(name)
        else:
            modules.setdefault(module, {})[role] = name
    return modules, unknown


def _numbers(source: Source, names: Iterable[str], whole: bool) -> dict[str, Tensor]:
    """Tensors of the right shape without numbers, but for the single numbers that tell something.

    These are read one by one: they are strewn over the file, and whatever lies between them should stay unread.
    """
    empty, small = {}, []
    for name in names:
        info = source.tensors[name]
        role = role_of(name)
        if role and role[1] in READ_FOR_REAL and info.count == 1:
            small.append(name)
        else:
            empty[name] = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
    return empty | {name: next(iter(source.read([name])))[1] if whole else torch.ones(()) for name in small}


def _rank(kind: Kind | None) -> int | None:
    match kind:
        case Lora(product) | Loha(product):
            return product.rank
        case Lokr(first, second):
            return next((half.rank for half in (first, second) if isinstance(half, Product)), None)
        case Dora(inner):
            return _rank(inner)
        case _:
            return None


def _network(name: str) -> str:
    """The network that a module, spelled with underscores, belongs to."""
    if name.startswith(SECOND_TOWER):
        return "text encoder 2"
    if name.startswith(FIRST_TOWER) or re.search(r"self_attn|text_model|encoder_layers", name):
        return "text encoder"
    known = name.startswith((*UNET_PREFIXES, "lycoris_", "base_model_model_", "down_blocks", "up_blocks", "mid_block"))
    return "U-Net" if known else "another network"


def _target(name: str) -> str:
    return next((what for what, pattern in TARGETS if re.search(pattern, name)), "other layers")
