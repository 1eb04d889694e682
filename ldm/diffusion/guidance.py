"""Guidance: what a network says under several conditions becomes one denoiser that leans towards what is wanted.

Shapes: x (B, ...), sigma (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import from_denoised, to_denoised
from ldm.diffusion.state import at_least_float32, spread
from ldm.types import Conditioning, Denoise, Prediction

Predict = Callable[[Tensor, Tensor], Prediction]
"""A `Denoise` that also tells the learned variance."""


@dataclass(frozen=True, eq=False)
class Told:
    """What the network is told between two levels, each of batch B.

    parts:   what is wanted, with a weight each: one with weight 1 is ordinary, several are joined by AND
    uncond:  what is not; may be None where nothing is compared with it: one part of weight 1, and a scale of 1
    """

    parts: tuple[tuple[Conditioning, float], ...]
    uncond: Conditioning | None = None

    @property
    def ordinary(self) -> bool:
        """Whether the wanted answer is that of the one part itself."""
        return len(self.parts) == 1 and self.parts[0][1] == 1


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): what guidance adds is tamed, of each sample alone.

    parallel: how much is kept of its part along the wanted answer, which oversaturates (the paper's eta)
    norm:     what its norm is at most (the paper's r); 0 sets no limit
    momentum: how much of what was added in the calls before is added again (the paper's beta); negative: taken off

    Projection(1, 0, 0) changes nothing.
    """

    parallel: float = 0.0
    norm: float = 7.5
    momentum: float = -0.75


@dataclass(frozen=True)
class Guidance:
    """How far the answer leans, and where.

    scale:     of classifier-free guidance (Ho and Salimans 2022); 1 means none
    rescale:   0..1, how much of the contrast that guidance adds is taken back (see `rescaled`)
    interval:  (low, high) sigmas, ends included, between which guidance of any kind acts (Kynkaanniemi et al. 2024);
               outside the network runs on what is wanted alone, at half the cost
    perturbed: the scale of perturbed-attention guidance (Ahn et al. 2024); 0 means none
    apg:       how what `scale` adds is tamed; None: not at all
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    perturbed: float = 0.0
    apg: Projection | None = None


def always(cond: Conditioning, uncond: Conditioning | None = None) -> tuple[tuple[float, Told], ...]:
    """One ordinary prompt at all levels, as `guided` takes it."""
    return ((torch.inf, Told(((cond, 1.0),), uncond)),)


def guided(denoiser: Denoiser, told: Sequence[tuple[float, Told]], guidance: Guidance) -> Denoise:
    """A denoiser that leans towards the parts of the prompt, as all samplers but a few want it.

    told: (the sigma from which on downwards it holds, what is told), of falling sigma, the first one inf. The level of
          the batch's first row decides, since a sampler's batch is at one level.

        wanted = uncond + sum_i weight_i * (cond_i - uncond)            (Liu et al. 2022, eq. 11)
        denoised = uncond + scale * (wanted - uncond) + perturbed * sum_i weight_i * (cond_i - cond_i perturbed)

    Everything the network is asked in a call goes through it in one batch, but for conditionings of another number of
    tokens, which have a batch of their own. `Guidance.apg` remembers from call to call: the result is for one run.

    Raises ValueError when something must be compared with `uncond` and it is missing, or `told` does not begin at inf.
    """
    predict = guided_prediction(denoiser, told, guidance)
    return lambda x, sigma: predict(x, sigma).denoised


def guided_prediction(denoiser: Denoiser, told: Sequence[tuple[float, Told]], guidance: Guidance) -> Predict:
    """`guided`, with the learned variance that the network gives under the first part."""
    _check(told, guidance)
    low, high = guidance.interval or (0.0, torch.inf)
    added = torch.zeros(())  # what guidance added so far, of which `Projection.momentum` keeps a share

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        nonlocal added
        now = next(one for start, one in reversed(told) if float(sigma[0]) <= start)
        acts = (low <= sigma) & (sigma <= high)
        leans = guidance.scale != 1 and bool(acts.any())
        perturbs = guidance.perturbed != 0 and bool(acts.any())
        said = _ask(denoiser, x, sigma, now, leans=leans, perturbs=perturbs)
        denoised = said.wanted
        if leans:
            assert said.without is not None
            scales = spread(torch.where(acts, guidance.scale, 1.0), denoised)
            difference = said.wanted - said.without
            if guidance.apg is None:
                denoised = said.without + scales * difference
            else:
                added = difference + guidance.apg.momentum * added.to(difference)
                denoised = said.wanted + (scales - 1) * projected(added, said.wanted, guidance.apg)
        if perturbs:
            denoised = denoised + spread(torch.where(acts, guidance.perturbed, 0.0), denoised) * said.structure
        if guidance.rescale and (leans or perturbs):
            denoised = _rescaled_denoised(denoiser, denoised, said.wanted, x, sigma, guidance.rescale)
        return Prediction(denoised, said.variance)

    return predict


def rescaled(output: Tensor, output_cond: Tensor, amount: float) -> Tensor:
    """`output`, guided, with its standard deviation brought towards that of `output_cond` (Lin et al. 2023, eq. 15-16).

    Both are network outputs, (B, ...); the deviation is taken over each sample. `amount` 0 changes nothing.
    """
    axes = tuple(range(1, output.ndim))
    ratio = output_cond.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True)
    return output * (1 + amount * (ratio - 1))


def projected(difference: Tensor, wanted: Tensor, projection: Projection) -> Tensor:
    """What guidance adds, within a norm and with its part along `wanted` damped; `momentum` is not looked at.

    Both are estimates of x0, (B, ...), as in the paper, where alone "along" means more saturated.
    """
    axes = tuple(range(1, difference.ndim))
    if projection.norm > 0:
        length = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
        difference = difference * (projection.norm / length).clamp(max=1)
    square = (wanted * wanted).sum(dim=axes, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
    parallel = (difference * wanted).sum(dim=axes, keepdim=True) / square * wanted
    return difference - (1 - projection.parallel) * parallel


@dataclass(frozen=True, eq=False)
class _Said:
    """The network's answers at one state: `structure` is what self-attention in the middle adds to the wanted one."""

    wanted: Tensor
    without: Tensor | None
    structure: Tensor
    variance: Tensor | None


def _ask(denoiser: Denoiser, x: Tensor, sigma: Tensor, told: Told, *, leans: bool, perturbs: bool) -> _Said:
    conds, weights = zip(*told.parts, strict=True)
    asked: list[Conditioning] = list(conds)
    if leans or not told.ordinary:
        assert told.uncond is not None
        asked.append(told.uncond)
    if perturbs:
        rows = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        asked = [cond.with_(perturbed=rows) for cond in asked]
        asked += [cond.with_(perturbed=~rows) for cond in conds]
    answers = _predictions(denoiser, x, sigma, asked)
    parts, rest = answers[: len(conds)], [answer.denoised for answer in answers[len(conds) :]]
    wanted, structure = parts[0].denoised, torch.zeros(())
    if perturbs:
        pairs = zip(weights, parts, rest[-len(conds) :], strict=True)
        structure = torch.stack([weight * (part.denoised - without) for weight, part, without in pairs]).sum(dim=0)
        rest = rest[: -len(conds)]
    if not told.ordinary:
        differences = [weight * (part.denoised - rest[0]) for weight, part in zip(weights, parts, strict=True)]
        wanted = rest[0] + torch.stack(differences).sum(dim=0)
    return _Said(wanted, rest[0] if rest else None, structure, parts[0].variance)


def _predictions(denoiser: Denoiser, x: Tensor, sigma: Tensor, conds: Sequence[Conditioning]) -> list[Prediction]:
    """The answer under each of the conditionings: those of equal shapes in one batch."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, cond in enumerate(conds):
        groups.setdefault(cond.row_shapes, []).append(index)
    found: dict[int, Prediction] = {}
    for members in groups.values():
        times = len(members)
        cond = Conditioning.stack([conds[index] for index in members])
        answer = denoiser(torch.cat([x] * times), torch.cat([sigma] * times), cond)
        variances = [None] * times if answer.variance is None else answer.variance.chunk(times)
        found |= zip(members, map(Prediction, answer.denoised.chunk(times), variances), strict=True)
    return [found[index] for index in range(len(conds))]


def _check(told: Sequence[tuple[float, Told]], guidance: Guidance) -> None:
    starts = [start for start, _ in told]
    if not starts or starts[0] != torch.inf or starts != sorted(starts, reverse=True):
        raise ValueError("what is told must begin at sigma inf and fall from there")
    for _, one in told:
        if one.uncond is None and guidance.scale != 1:
            raise ValueError("guidance with a scale other than 1 needs an unconditional conditioning")
        if one.uncond is None and not one.ordinary:
            raise ValueError("parts of a prompt with weights need an unconditional conditioning to weigh them against")


def _rescaled_denoised(
    denoiser: Denoiser, denoised: Tensor, with_cond: Tensor, x: Tensor, sigma: Tensor, amount: float
) -> Tensor:
    """Rescaling is defined on what the network says, so `denoised` goes there and comes back."""
    x = at_least_float32(x)
    output = from_denoised(denoiser.prediction, denoised, x, sigma)
    output_cond = from_denoised(denoiser.prediction, with_cond, x, sigma)
    return to_denoised(denoiser.prediction, rescaled(output, output_cond, amount), x, sigma)
