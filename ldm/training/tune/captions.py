"""From the captions of a batch to what the network is told: looked up, or asked of the text towers each time.

Shapes: B batch, T towers, C chunks, N tokens, D text width, P width of all pooled states, S numbers of sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.data.buckets import Crop
from ldm.data.captions import whole
from ldm.data.example import Example
from ldm.errors import LdmError, printable
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import TextStates
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.text.states import size_numbers, told
from ldm.training.engine.objective import Batch
from ldm.training.text_states import caption_ids, text_states
from ldm.training.tune.cache import Cache, Key
from ldm.training.tune.pictures import network_mark
from ldm.types import Conditioning


@dataclass(frozen=True, eq=False)
class LiveCaptions:
    """The towers are asked about every batch: they, or words of theirs, are trained, or captions are never the same.

    trained: whether gradients are wanted
    """

    model: LatentDiffusion
    trained: bool

    def batch(self, captions: Sequence[str], crops: Sequence[Crop]) -> Batch:
        """ids (B, T, C, N), sizes (B, S)."""
        return {"ids": caption_ids(self.model, captions), "sizes": _sizes(self.model.config, crops)}

    def cond(self, batch: Batch) -> Conditioning:
        """What the towers say of them."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return told(self.model, text_states(self.model, batch["ids"]), batch["sizes"])


@dataclass(frozen=True, eq=False)
class KeptCaptions:
    """What the towers say of each caption there is was worked out once; "" is one of them.

    said: (N, D) states of as many chunks as the caption takes, and (P,) or none
    """

    model: LatentDiffusion
    said: Mapping[str, dict[str, Tensor]]

    def batch(self, captions: Sequence[str], crops: Sequence[Crop]) -> Batch:
        """states (B, N, D), pooled (B, P) where there are such, sizes (B, S).

        Shorter ones are filled up with chunks that say nothing, as `caption_ids` does.
        """
        found, empty = [self.said[caption] for caption in captions], self.said[""]["states"]
        longest = max(len(one["states"]) for one in found)
        states = [
            torch.cat([one["states"], *[empty] * ((longest - len(one["states"])) // len(empty))]) for one in found
        ]
        pooled = {"pooled": torch.stack([one["pooled"] for one in found])} if "pooled" in found[0] else {}
        return {"states": torch.stack(states), **pooled, "sizes": _sizes(self.model.config, crops)}

    def cond(self, batch: Batch) -> Conditioning:
        """What was looked up."""
        return told(self.model, TextStates(batch["states"], batch.get("pooled")), batch["sizes"])


@torch.no_grad()
def kept_captions(model: LatentDiffusion, examples: Iterable[Example], cache: Cache) -> KeptCaptions:
    """Ask the towers about every caption, or find in the cache what they said. The captions must not vary."""
    captions = {whole(caption, example.rules) for example in examples for caption in example.captions}
    mark = "+".join(network_mark(tower) for tower in model.text if isinstance(tower, torch.nn.Module))
    uses = hashlib.sha256(repr(model.config.text).encode()).hexdigest()[:16]
    device = model.device

    def ask(caption: str) -> dict[str, Tensor]:
        said = text_states(model, caption_ids(model, [caption]).to(device))
        if not said.states.isfinite().all():
            raise LdmError(f"caption {printable(caption[:60])!r}: its text states are not finite; give --precision no")
        pooled = {} if said.pooled is None else {"pooled": said.pooled[0].float()}
        return {"states": said.states[0].float(), **pooled}

    def key(caption: str) -> Key:
        return {"what": "text 1", "caption": caption, "towers": mark, "use": uses}

    return KeptCaptions(model, {c: cache.get(key(c), lambda c=c: ask(c)) for c in sorted({"", *captions})})


def vary(examples: Iterable[Example]) -> bool:
    """Whether captions come out differently each time, beyond being left out."""
    return any(e.rules.shuffle or e.rules.drop_tags or e.rules.wildcards for e in examples)


def _sizes(config: SystemConfig, crops: Sequence[Crop]) -> Tensor:
    """What SDXL is told of each picture's size, (B, S)."""
    return torch.tensor([size_numbers(config, c.bucket, c.original, (c.left, c.top)) for c in crops]).float()
