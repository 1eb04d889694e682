"""The prior, ready to use: a text -> CLIP embeddings of pictures that it may describe, for the decoder to draw.

    prompt --plain_words--> text --tell--> what the prior is told --image_embeddings--> the best of C --> the decoder

Ramesh et al. 2022, section 2.2. Shapes: B texts, P width of CLIP's space, C candidates of each embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, Told, guided
from ldm.diffusion.noise import per_image_noise
from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.diffusion.sigmas import trailing
from ldm.diffusion.state import start_state
from ldm.errors import LdmError
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.presets import TextUse
from ldm.models.prior import Prior
from ldm.models.text_encoder import OpenCLIPText, TextTower
from ldm.models.tokenizer import END, tokenize
from ldm.pipeline.clip.unclip import as_told, in_scale
from ldm.pipeline.device import choose_device
from ldm.pipeline.load import SHIPPED
from ldm.pipeline.picture import OtherPart
from ldm.pipeline.request import GenerateRequest, PriorUse
from ldm.pipeline.text.prompt import Emphasis
from ldm.pipeline.text.prompt_weights import parse_weights
from ldm.samplers import SAMPLERS
from ldm.types import Conditioning
from ldm.weights.io import printable
from ldm.weights.prior import is_marked, read_prior

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion

SHIPPED_PRIOR = SHIPPED.with_name("ldm-prior.safetensors")

USUAL = PriorUse()

OWN_NOISE = 0x7F4A7C15
"""What sets the seed of a prior's noise apart from the one that its picture begins with."""

AnyPrior = Prior | AutoregressivePrior


@dataclass(frozen=True, eq=False)
class PriorBeside:
    """The prior that a model has, and its file, as metadata names it; path: None of one made in memory."""

    network: AnyPrior
    path: Path | None

    @property
    def parts(self) -> tuple[OtherPart, ...]:
        """The file, if there is one."""
        return () if self.path is None else (OtherPart("prior", self.path),)


def load_prior(path: str | Path | None = None, *, device: str | torch.device = "auto") -> AnyPrior:
    """The prior in a file of ours, of either kind; None: the one that ships with this package.

    Raises LdmError where the file is not there, or is no prior, or a damaged one.
    """
    place = choose_device(device)
    path = SHIPPED_PRIOR if path is None else Path(path)
    prior = read_prior(path, device=place)
    if prior.config.schedule not in NOISE_SCHEDULES:
        known = ", ".join(NOISE_SCHEDULES)
        found = printable(prior.config.schedule)
        raise LdmError(f"{printable(str(path))}: its noise schedule {found!r} is not known; expected {known}")
    return prior


def beside(model: LatentDiffusion, prior: str | Path | AnyPrior | None) -> PriorBeside:
    """A prior for a decoder; see `LatentDiffusion.with_prior`."""
    image, name = model.config.image, printable(str(model.origin.path or "model"))
    if image is None or not model.text:
        raise LdmError(
            f"{name}: is told no CLIP embeddings, which a prior makes; expected this package's decoder"
            " (checkpoints/ldm-decoder.safetensors) or an SD 2.1 unCLIP checkpoint; use another model, or no prior"
        )
    if isinstance(prior, str | Path | None):
        path = SHIPPED_PRIOR if prior is None else Path(prior)
        found = PriorBeside(load_prior(path, device=model.home), path)
    else:
        found = PriorBeside(prior, None)
    try:
        _text_projection(found.network, model.text[0])
    except LdmError as error:
        raise LdmError(f"{printable(str(found.path))}: {error}" if found.path else str(error)) from None
    if (width := found.network.config.projection) != image.tower.projection:
        raise LdmError(
            f"prior: its embeddings have {width} numbers, expected {image.tower.projection}, as {name} is told them;"
            " use the two that belong together"
        )
    return found


def imagined(model: LatentDiffusion, prompt: str, request: GenerateRequest) -> Tensor:
    """What the model's prior makes of a text of the prompt, (1, P), as long as the model is told embeddings.

    prompt: what the prompt says at one step, its weights included; request: resolved, of one picture, with a `prior`
    """
    use = request.prior
    assert use is not None and model.prior is not None and request.seed is not None
    seed = (request.seed + request.batch_index) ^ OWN_NOISE
    told = tell_words(model, prompt, request.emphasis)
    found = image_embeddings(
        model.present(model.prior.network),
        told,
        seed=seed,
        guidance=use.guidance,
        steps=use.steps,
        choose=use.choose,
    )
    return as_told(model, found.to(model.device))


def tell_words(model: LatentDiffusion, prompt: str, emphasis: Emphasis) -> Told:
    """What the model's prior is told of a prompt, or of what this says at one step: its plain words."""
    assert model.prior is not None
    words = [plain_words(prompt, emphasis)]
    return tell(model.prior.network, model.present(model.text[0]), model.config.text[0], words, device=model.device)


def plain_words(prompt: str, emphasis: Emphasis = "a1111") -> str:
    """A prompt without the marks that weigh words; what changes with the steps is for `ldm.pipeline.text.prompt`."""
    return " ".join(piece.text for pieces in parse_weights(prompt, emphasis) for piece in pieces)


def tell(
    prior: AnyPrior,
    tower: TextTower,
    use: TextUse,
    texts: Sequence[str],
    without: str = "",
    *,
    device: torch.device | None = None,
) -> Told:
    """Texts as a prior is told them, one row each, and what guidance leads away from.

    tower, use: the text tower of the CLIP that the prior was trained for (`model.text[0]`, `model.config.text[0]`)
    device:     on which the prior will be asked; None: where it is

    Raises LdmError where the tower is another one.
    """
    wanted, found, projection = prior.config, tower.config, _text_projection(prior, tower)
    ids = torch.tensor([tokenize(text, min(found.tokens, wanted.tokens), use.padding) for text in (*texts, without)])
    ids = ids[:, : int(text_lengths(ids).max())].to(projection.device)
    with torch.inference_mode():
        said = tower(ids, use.skip, use.final_norm, pooled=True)
    assert said.pooled is not None
    words = torch.arange(ids.shape[1])[None] < text_lengths(ids.cpu())[:, None]
    cond = Conditioning(cross=said.states.float(), vector=in_scale(said.pooled.float()), words=words)
    cond = cond.to(device=device or next(prior.parameters()).device)
    rows = torch.full((len(texts),), len(texts))
    return Told(((cond.select(slice(len(texts))), 1.0),), cond.select(rows))


def _text_projection(prior: AnyPrior, tower: TextTower) -> Tensor:
    """The tower's projection to CLIP's space. Raises LdmError where the prior was not trained for this tower."""
    wanted, found = prior.config, tower.config
    projection = tower.text_projection if isinstance(tower, OpenCLIPText) else None
    if projection is None or (found.width, projection.shape[1]) != (wanted.text_width, wanted.projection):
        widths = f"{found.width} wide with a projection to {found.projection or 'nothing'}"
        raise LdmError(
            f"prior: the text tower is {widths}, expected {wanted.text_width} to {wanted.projection}; "
            "use the model that the prior was made for"
        )
    if not is_marked(projection, wanted.clip):
        raise LdmError("prior: it was trained for another CLIP than this model's; use the two that belong together")
    return projection


def text_lengths(ids: Tensor) -> Tensor:
    """How many of each row's ids (B, N) are text, its start and end among them: (B,)."""
    return (ids == END).int().argmax(dim=1) + 1


@torch.inference_mode()
def image_embeddings(
    prior: AnyPrior,
    told: Told,
    *,
    seed: int = 0,
    count: int = 1,
    guidance: float = USUAL.guidance,
    steps: int = USUAL.steps,
    choose: int = USUAL.choose,
    sampler: str = "ddpm",
) -> Tensor:
    """`count` embeddings of each text, (B * count, P) of length sqrt(P), float32: those of the first text come first.

    told:     what `tell` gave; embedding i depends on the text it is of and on seed + i alone
    guidance: the scale of classifier-free guidance, 1 for none
    steps:    of the sampler; an autoregressive prior takes one for each code, and looks at neither
    choose:   C: of so many candidates the one is kept that is most like its text by CLIP (section 2.2: two)

    Raises LdmError for a number out of range.
    """
    limits = NOISE_SCHEDULES[prior.config.schedule]()
    for name, value, most in (("count", count, 65536), ("steps", steps, len(limits)), ("choose", choose, 64)):
        if not 1 <= value <= most:
            raise LdmError(f"{name}: found {value}, expected 1 to {most}")
    if not math.isfinite(guidance):
        raise LdmError(f"guidance: found {guidance:g}, expected a finite number")
    if sampler not in SAMPLERS:
        raise LdmError(f"sampler: found {printable(sampler)!r}, expected one of {', '.join(SAMPLERS)}")
    ((cond, _),) = told.parts
    assert cond.vector is not None and told.uncond is not None
    seeds = range(seed, seed + count * len(cond.vector))
    each = count * choose
    rows = Told(((cond.repeat(each), 1.0),), told.uncond.repeat(each))
    if isinstance(prior, Prior):
        found = _diffused(prior, rows, seeds, guidance, steps, sampler)
    else:
        found = _spelled(prior, rows, seeds, guidance)
    candidates = in_scale(found).unflatten(0, (len(seeds), choose))
    likeness = F.cosine_similarity(candidates, cond.vector.repeat_interleave(count, dim=0)[:, None], dim=-1)
    return candidates[torch.arange(len(seeds)), likeness.argmax(dim=1).cpu()].cpu()


def _diffused(prior: Prior, rows: Told, seeds: Sequence[int], guidance: float, steps: int, sampler: str) -> Tensor:
    """Candidates (len(seeds) * C, P) of a diffusion prior, of rows as many; not of their length yet."""
    ((cond, _),) = rows.parts
    assert cond.vector is not None
    width, choose = prior.config.projection, len(cond.vector) // len(seeds)
    denoiser = Denoiser(prior, NOISE_SCHEDULES[prior.config.schedule](), "x0")
    solver = SAMPLERS[sampler]
    noise = per_image_noise((choose, width), seeds, device=cond.vector.device, brownian=solver.brownian)
    # Of other programs' habits in spacing none holds for vectors; this one starts at pure noise, as training knew it.
    sigmas = trailing(denoiser.schedule, steps)
    denoise = guided(denoiser, ((torch.inf, rows),), Guidance(guidance))
    x = start_state(noise.start.flatten(0, 1), float(sigmas[0]))
    for step in solver.sample(denoise, x, sigmas, lambda high, low: noise(high, low).flatten(0, 1)):
        x = step.x
    return prior.from_unit(x)


def _spelled(prior: AutoregressivePrior, rows: Told, seeds: Sequence[int], guidance: float) -> Tensor:
    """Candidates (len(seeds) * C, P) of an autoregressive prior, drawn code by code; guidance is that of the logits.

    As in the paper, the similarity is one of the upper half of those in the training set.
    """
    ((cond, _),) = rows.parts
    assert cond.vector is not None and rows.uncond is not None
    choose, device = len(cond.vector) // len(seeds), cond.vector.device
    count, buckets = prior.codes.components, prior.codes.similarities
    draws = [torch.rand(choose, count + 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draw = torch.cat(draws).to(device)
    similarity = buckets // 2 + (draw[:, 0] * (buckets - buckets // 2)).long()
    codes = torch.zeros(len(draw), 0, dtype=torch.long, device=device)
    for position in range(count):
        logits = prior(codes, similarity, cond)[:, -1]
        if guidance != 1:
            without = prior(codes, torch.full_like(similarity, buckets), rows.uncond)[:, -1]
            logits = without + guidance * (logits - without)
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        chosen = torch.searchsorted(cumulative, draw[:, [position + 1]] * cumulative[:, -1:])
        codes = torch.cat([codes, chosen.clamp(max=prior.codes.buckets - 1)], dim=1)
    return prior.speller.decode(codes)
