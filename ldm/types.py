"""The few records that cross folders.

Shapes: B batch, N tokens, D width, C channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

PredictionType = Literal["eps", "v", "x0"]
"""What a network predicts: the noise, the velocity (Salimans & Ho 2022) or the picture."""


class Context:
    """Text states that are looked at again and again, with what every attention has made of them.

    states: (B, N, D)
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self._made: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def made_by(self, attention: Hashable, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Its keys and values, of (B, N, D'), by `make` when they are asked for first."""
        if attention not in self._made:
            self._made[attention] = make(self.states)
        return self._made[attention]


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides the noisy latent. A part that is None is not given.

    cross:   (B, N, D) text states for cross-attention
    vector:  (B, D) pooled text, size or CLIP-image embedding; or (B,) int64 class labels
    concat:  (B, C, h, w) channels put beside the latent: mask, masked image, depth, low resolution
    control: residuals (B, C_i, h_i, w_i) added to the skips and the middle, from a control network
    controlled: (B, K) bool, which of K control networks are to act on each row; for what wraps a U-Net
    perturbed: (B,) bool, in which rows the self-attention in the middle of the U-Net looks nowhere but at itself
    words: (B, N) bool, which tokens of `cross` are text and not padding, for a network that tells them apart
    context: `cross` again, for a network that is asked about it more than once; goes with it when `cross` is changed
    """

    cross: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    control: tuple[Tensor, ...] = ()
    controlled: Tensor | None = None
    perturbed: Tensor | None = None
    words: Tensor | None = None
    context: Context | None = None

    @property
    def shown(self) -> Tensor | Context | None:
        """What cross-attention looks at."""
        return self.cross if self.context is None else self.context

    @property
    def row_shapes(self) -> tuple[object, ...]:
        """The shape of a row of each part, None where it is not given: what must agree for `stack`."""
        one = [getattr(self, f.name) for f in fields(self) if f.name not in ("control", "context")]
        return (*(None if t is None else t.shape[1:] for t in one), *(t.shape[1:] for t in self.control))

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every tensor held; a `context` is left behind."""
        one = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("control", "context")}
        mapped: dict[str, Any] = {name: None if value is None else function(value) for name, value in one.items()}
        return Conditioning(**mapped, control=tuple(function(c) for c in self.control))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor; `dtype` applies to floating-point tensors only."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def select(self, index: slice | Tensor) -> Conditioning:
        """Rows of the batch."""
        return self.map(lambda t: t[index])

    def repeat(self, times: int) -> Conditioning:
        """Each row `times` times in a row: (B, ...) -> (B * times, ...)."""
        return self.map(lambda t: t.repeat_interleave(times, dim=0))

    def with_(self, **parts: Tensor | tuple[Tensor, ...] | Context | None) -> Conditioning:
        """A copy with some parts replaced."""
        return replace(self, **({"context": None} if "cross" in parts else {}) | parts)

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch. All must hold the same kinds of tensors."""

        def join(tensors: Sequence[Tensor | None], name: str) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            if len(present) not in (0, len(tensors)):
                raise ValueError(f"cannot stack conditionings: only some have {name!r}")
            return torch.cat(present) if present else None

        if len({len(p.control) for p in parts}) > 1:
            raise ValueError("cannot stack conditionings: only some have 'control'")
        return Conditioning(
            cross=join([p.cross for p in parts], "cross"),
            vector=join([p.vector for p in parts], "vector"),
            concat=join([p.concat for p in parts], "concat"),
            control=tuple(torch.cat(level) for level in zip(*(p.control for p in parts), strict=True)),
            controlled=join([p.controlled for p in parts], "controlled"),
            perturbed=join([p.perturbed for p in parts], "perturbed"),
            words=join([p.words for p in parts], "words"),
        )


class Network(Protocol):
    """A raw network: its output means what the Denoiser's prediction type says it means."""

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), timestep (B,) in the units it was trained on -> (B, C', h, w)."""
        ...


@dataclass(frozen=True)
class Prediction:
    """A denoiser's answer: `denoised` = E[x0 | x], and the learned variance of the step where there is one."""

    denoised: Tensor
    variance: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One step of a sampler, as it is yielded.

    index: 0-based step number; sigma, sigma_next: noise levels before and after;
    x: state AFTER the step, in the variance-exploding scale x0 + sigma_next * noise;
    denoised: the estimate of x0 that the step used (for previews).
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), sigma (B,) float32) -> denoised (B, ...): all that a sampler knows of a model."""

NoiseSource = Callable[[float, float], Tensor]
"""noise(sigma, sigma_next) -> unit normal noise in the shape of x: where a sampler's randomness comes from."""
