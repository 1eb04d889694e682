"""From the tensors that a file has for one module to what they do together.

| kind    | its tensors' names end in                                                                              |
|---------|--------------------------------------------------------------------------------------------------------|
| LoRA    | lora_down, lora_up, lora_mid (kohya, LyCORIS); lora_A, lora_B (peft, diffusers); lora.down, lora.up (old) |
| LoHa    | hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b; hada_t1, hada_t2                                           |
| LoKr    | lokr_w1 or lokr_w1_a and _b; lokr_w2 or lokr_w2_a and _b; lokr_t2                                      |
| (IA)^3  | weight, on_input                                                                                       |
| full    | diff, diff_b; of norms w_norm, b_norm                                                                  |
| DoRA    | dora_scale, lora_magnitude_vector, magnitude; beside any of the others but (IA)^3                      |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm.weights.adapters.kinds import IA3, Dora, Full, Kind, Loha, Lokr, Lora, Product
from ldm.weights.adapters.peft import PeftConfig

Scale = Callable[[int], float]
"""The rank of a product -> what it is multiplied by."""

SUFFIXES: dict[str, str] = {
    **{f".lora_{role}.weight": role for role in ("down", "up", "mid")},
    **{f".lora_{letter}{end}": role for letter, role in (("A", "down"), ("B", "up"))
       for end in ("", ".weight", ".default.weight")},
    **{f"{start}.{role}.weight": role for role in ("down", "up")
       for start in ("_lora", ".lora", ".lora_linear_layer")},
    **{f".lora_{name}.bias": "up_bias" for name in ("B", "up")},
    **{f".lora_magnitude_vector{end}": "magnitude" for end in ("", ".weight", ".default.weight")},
    **{f".{role}": role for role in (
        "alpha", "dora_scale", "magnitude", "diff", "diff_b", "w_norm", "b_norm", "on_input",
        "hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
    ".weight": "factors",
}  # fmt: skip
"""How a tensor's name ends -> its role. The longest ending that fits counts."""

ENDINGS = tuple(sorted(SUFFIXES, key=len, reverse=True))


@dataclass(frozen=True, eq=False)
class Part:
    """What an adapter does to one module: to its weight, and to its bias."""

    weight: Kind | None
    bias: Full | None


def role_of(name: str) -> tuple[str, str] | None:
    """A tensor's name -> its module and its role there; None for a name that no adapter has."""
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    return None if ending is None else (name.removesuffix(ending), SUFFIXES[ending])


def part_of(module: str, roles: Mapping[str, Tensor], config: PeftConfig) -> Part:
    """What a module's tensors do, role -> tensor. Raises ValueError where they do not belong together."""
    left = dict(roles)
    alpha = left.pop("alpha", None)

    def scale(rank: int) -> float:
        if alpha is None:
            return config.scale(module, rank)
        return (float(alpha) or rank) / rank  # trainers take an alpha of 0 for "as much as the rank"

    try:
        bias = _bias(left, scale)
        weight = _decomposed(left, _weight(left, scale))
        if left:
            raise ValueError(f"has {', '.join(left)} without what belongs to it")
        if weight is None and bias is None:
            raise ValueError("has an alpha alone, which does nothing; the file is incomplete")
        if config.dora and isinstance(weight, Lora):
            raise ValueError("lacks the magnitude that DoRA needs; peft's config says use_dora")
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    return Part(weight, bias)


def _bias(left: dict[str, Tensor], scale: Scale) -> Full | None:
    """What is done to the bias; its tensor is taken out of `left`, as in the functions below."""
    if "up_bias" in left and "down" in left:
        return Full(left.pop("up_bias").float() * scale(left["down"].shape[0]))
    role = next((role for role in ("diff_b", "b_norm") if role in left), None)
    return None if role is None else Full(left.pop(role))


def _weight(left: dict[str, Tensor], scale: Scale) -> Lora | Loha | Lokr | Full | IA3 | None:
    """What is done to the weight, without its magnitude."""
    if left.keys() & {"up", "down"}:
        product = _product(_take(left, "up").flatten(1), _take(left, "down"), left.pop("mid", None))
        return Lora(product, scale(product.rank))
    if any(role.startswith("hada_") for role in left):
        first, second = (_pair(left, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        if first.size != second.size or first.rank != second.rank:
            raise ValueError(f"has products of sizes {first.size} and {second.size}, expected equal ones")
        return Loha(first, second, scale(first.rank))
    if any(role.startswith("lokr_") for role in left):
        first, second = (
            Full(left.pop(f"lokr_w{n}")) if f"lokr_w{n}" in left else _pair(left, f"lokr_w{n}", f"lokr_t{n}")
            for n in (1, 2)
        )
        rank = next((half.rank for half in (first, second) if isinstance(half, Product)), None)
        return Lokr(first, second, 1.0 if rank is None else scale(rank))  # LyCORIS: whole factors are not scaled
    if "on_input" in left:
        return IA3(_take(left, "factors"), bool(left.pop("on_input")))
    role = next((role for role in ("diff", "w_norm") if role in left), None)
    return None if role is None else Full(left.pop(role))


def _decomposed(left: dict[str, Tensor], weight: Lora | Loha | Lokr | Full | IA3 | None) -> Kind | None:
    """The same with its magnitude, if it has one.

    LyCORIS has magnitudes of outputs (O, 1, ...) and of inputs (1, I, ...); peft of outputs only, (O) or (1, O, 1, 1).
    """
    if not isinstance(weight, Lora | Loha | Lokr | Full):
        return weight
    if "magnitude" in left:
        return Dora(weight, left.pop("magnitude"), on_input=False)
    if "dora_scale" in left:
        magnitude = left.pop("dora_scale")
        return Dora(weight, magnitude, on_input=magnitude.ndim > 1 and magnitude.shape[0] == 1 < magnitude.shape[1])
    return weight


def _take(left: dict[str, Tensor], role: str) -> Tensor:
    if role not in left:
        raise ValueError(f"lacks its {role}; the file is incomplete")
    tensor = left.pop(role)
    if role != "factors" and tensor.ndim < 2:
        raise ValueError(f"its {role} has shape {tuple(tensor.shape)}, expected a matrix")
    return tensor


def _pair(left: dict[str, Tensor], name: str, core: str) -> Product:
    """LyCORIS' two factors; the first is transposed where there is a core."""
    up, down, middle = _take(left, f"{name}_a"), _take(left, f"{name}_b"), left.pop(core, None)
    return _product(up if middle is None else up.flatten(1).T, down, middle)


def _product(up: Tensor, down: Tensor, core: Tensor | None) -> Product:
    """A product whose factors go together. Raises ValueError where they do not."""
    product, rank = Product(up, down, core), down.shape[0]
    if up.ndim != 2 or up.shape[1] != rank:
        raise ValueError(f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not make a product")
    if core is not None and (core.ndim < 3 or core.shape[:2] != (rank, rank)):
        raise ValueError(f"the core between factors of rank {rank} has shape {tuple(core.shape)}")
    if rank > max(product.size):
        raise ValueError(f"has rank {rank} for a weight of {product.size}, expected at most its larger side")
    return product
