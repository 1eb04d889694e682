"""What each method trains: parts of a model with gradients, the rest of it without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.layers.in_bytes import full_state
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.text_encoder import TextTower
from ldm.models.unet import UNet
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.training.engine.loop_config import Precision
from ldm.training.engine.precision import DTYPES
from ldm.training.engine.split import is_split, whole
from ldm.training.text_states import caption_ids, text_states
from ldm.training.textual_inversion import NewWord, new_word
from ldm.training.tune.settings import Tuning
from ldm.weights.layout import build

CONTROL = "tuned"
"""What requests call the control network that is trained."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model of which some parameters want gradients, and no others.

    networks: all that a loss goes through; word, control: the new part, where the method makes one
    """

    model: LatentDiffusion
    networks: nn.ModuleList
    word: NewWord | None = None
    control: ControlNet | None = None


def trained_of(base: LatentDiffusion, tuning: Tuning) -> Trained:
    """The model to train; the base stays as it is but for gradients, which none of its tensors wants.

    Where all of a network is trained it is the base's own, in float32: two would not fit where one does.
    Raises LdmError where the model has not what the method trains.
    """
    word, control, model = None, None, base
    if tuning.by_adapter:
        from ldm.training.adapters import add_adapter  # here, since peft takes seconds to import

        rank = tuning.adapter.text_rank or (tuning.adapter.rank if tuning.text else None)
        model = add_adapter(base, replace(tuning.adapter, text_rank=rank), tuning.seed)
    elif tuning.method == "embedding":
        word = new_word(base, tuning.word, tuning.vectors, tuning.like)
        model = base.with_embeddings([*base.embeddings, word.live()])
    elif tuning.method == "controlnet":
        control = new_control(base, tuning.seed)
        model = replace(base, controls={CONTROL: control})
    else:
        for network in (base.unet, *(map(_module, base.text) if tuning.text else ())):
            network.float().requires_grad_(True)
        model = replace(base, dtype=torch.float32)
        if tuning.text:
            _leave_what_is_not_read(model)
    parts = [model.unet, *map(_module, model.text), *([word] if word else []), *([control] if control else [])]
    return Trained(model, nn.ModuleList(parts), word, control)


def put_together(trained: Trained, keep: bool) -> Trained:
    """The same with the networks that are split as they would be without, on the CPU, to be written and not run.

    All processes ask for it at once; keep: whether this one gets the numbers, and does not only lend its parts
    """
    if not is_split(trained.networks):
        return trained
    model, built = trained.model, build(trained.model.config)
    pairs = zip((model.unet, *map(_module, model.text)), (built.unet, *built.text), strict=True)
    unet, *text = (_put_together(network, like, keep) for network, like in pairs)
    model = replace(model, unet=cast("UNet", unet), text=cast("tuple[TextTower, ...]", tuple(text)))
    return replace(trained, model=model)


def _put_together(network: nn.Module, like: nn.Module, keep: bool) -> nn.Module:
    if not is_split(network):
        return network
    state = whole(network.state_dict(), keep)
    if keep:
        like.load_state_dict(state, strict=True, assign=True)
    return like


def base_dtype(tuning: Tuning, device: torch.device, precision: Precision) -> torch.dtype:
    """In which dtype the base is loaded: as few bytes as the method allows. precision: of the run, not "auto"."""
    return torch.float32 if tuning.all_of_it or device.type != "cuda" else DTYPES[precision]


def new_control(base: LatentDiffusion, seed: int) -> ControlNet:
    """A control network that begins as a copy of the U-Net's contracting half, and changes nothing yet; float32.

    Zhang et al. 2023, section 3.1. Raises LdmError for a U-Net that looks at other pictures itself.
    """
    unet, channels = base.unet.config, base.config.autoencoder.latent_channels
    if unet.in_channels != channels:
        raise LdmError(f"controlnet: the U-Net takes {unet.in_channels} channels, expected {channels}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        control = ControlNet(ControlNetConfig.usual(unet, base.config.autoencoder.downsampling))
    given = full_state(base.unet)
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            if name in given:
                parameter.copy_(given[name])
    return control.to(base.device).eval()


def _leave_what_is_not_read(model: LatentDiffusion) -> None:
    """Let nothing of the text towers be trained that the U-Net is told nothing of: blocks behind the one that is read,
    a projection. Processes that train together wait for the gradient of every parameter that wants one."""
    parameters = [p for tower in model.text for p in _module(tower).parameters()]
    with torch.enable_grad():
        said = text_states(model, caption_ids(model, [""]).to(model.device))
        total = said.states.sum() + (0 if said.pooled is None else said.pooled.sum())
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _module(tower: object) -> nn.Module:
    assert isinstance(tower, nn.Module)
    return tower
