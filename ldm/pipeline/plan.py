"""What drawing will take of memory, before anything is drawn: phase by phase, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.layers.in_bytes import Store, keep_in_bytes
from ldm.layers.sharing import copy_on, weights_of
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.offloading import OFFLOADS, Anything, Offload, block_by_block, blocks_of
from ldm.models.presets import SystemConfig
from ldm.models.tiled import decode_tiled
from ldm.pipeline.device import Precision, available_memory
from ldm.pipeline.first_stage import TILE
from ldm.pipeline.live_memory import META, live_memory
from ldm.pipeline.load import Room, fill
from ldm.pipeline.prepare import size_of
from ldm.pipeline.request import GenerateRequest
from ldm.types import Conditioning
from ldm.weights.io import TORCH_DTYPES, WINDOW, StoredTensor, TensorInfo, in_groups
from ldm.weights.layout import Networks, build
from ldm.weights.source import Source

LOADING = 40 * 10**6
RUNNING = 70 * 10**6
"""What loading and running take on a CPU besides tensors: pages of libraries that are then used for the first time, the
kernels that oneDNN makes, the tokenizer's tables. Measured with torch 2.15; hardly any of it grows with a model."""

FILLED = 0.9
"""How much of a GPU's free memory may be planned with: its libraries want some, and the allocator leaves gaps."""

KEPT_BACK = 64 * 2**20
"""What the C library's allocator keeps of freed tensors once a network has run: its largest trim threshold."""


@dataclass(frozen=True)
class Phase:
    """A part of a run, and the most bytes that are held while it lasts, those of the networks among them."""

    name: str
    peak: int


@dataclass(frozen=True)
class Work:
    """What is to be drawn, of which model, and how.

    tensors:       of the model's file, see `Source.tensors`
    width, height: of the pictures; batch: of how many are denoised at once
    guided:        whether the network is asked twice, in one batch
    from_picture:  whether a picture is encoded first
    vae_tile:      the side of tiles to decode in, None: whole
    offload:       what waits beside the device
    store:         how the U-Net's blocks keep their weights
    adapted:       whether adapters change its weights, which are then there twice, changed and as they were
    controls:      how many ControlNets look on
    """

    config: SystemConfig
    tensors: Mapping[str, TensorInfo]
    device: torch.device
    precision: Precision
    width: int
    height: int
    batch: int = 1
    guided: bool = True
    from_picture: bool = False
    vae_tile: int | None = None
    offload: Offload = "none"
    store: Store = "full"
    adapted: bool = False
    controls: int = 0


def tensors_of(config: SystemConfig, dtype: str = "F16") -> dict[str, TensorInfo]:
    """The tensors that a single file of a system has. dtype: in the format's words."""
    return {
        prefix + name: TensorInfo(dtype, tuple(tensor.shape))
        for prefix, network in build(config).by_prefix().items()
        for name, tensor in network.state_dict().items()
    }


def unread(tensors: Mapping[str, TensorInfo]) -> Source:
    """A file of these tensors, which have no numbers."""
    return Source(Path(), tensors, {}, partial(_read, tensors))


def plan_drawing(work: Work) -> tuple[Phase, ...]:
    """What each phase of drawing holds at its peak, in the order of the phases; see `Work`.

    Counted is what the process holds more than before it loaded the model: on a GPU, of the GPU's memory.
    """
    phases: list[Phase] = []
    networks, controls, staying = build(work.config), _controls(work), 0
    if work.store == "int8":
        keep_in_bytes(blocks_of(networks.unet))
    if on_gpu := work.device.type != "cpu":  # where the file's pages are not counted
        with META:
            fill(networks, unread(work.tensors), META, work.precision)
        each = networks.by_prefix().values() if work.offload == "none" else ()
        staying = sum(tensor.nbytes for network in each for tensor in weights_of(network))
        if work.offload == "none" and work.adapted:
            staying += sum(tensor.nbytes for tensor in _adapted(networks))
    if work.offload == "none":
        staying += sum(tensor.nbytes for control in controls for tensor in weights_of(control))
    with live_memory(work.device) as memory, torch.no_grad():

        def ended(name: str, besides: int = RUNNING + KEPT_BACK) -> None:
            phases.append(Phase(name, staying + memory.peak + (0 if on_gpu else besides)))
            memory.restart()

        if not on_gpu:
            fill(networks, unread(work.tensors), work.device, work.precision)
        changed = [torch.empty_like(tensor) for tensor in _adapted(networks)] if work.adapted and not on_gpu else []
        ended("load", LOADING)
        cond = _told(networks, work)
        ended("text", RUNNING)
        precision, f = work.precision, work.config.autoencoder.downsampling
        make = partial(torch.empty, device=work.device)
        if work.from_picture:
            _present(networks.autoencoder, work).encode(
                make(1, 3, work.height, work.width, dtype=precision.autoencoder)
            )
            ended("encode")
        latents = make(work.batch, work.config.autoencoder.latent_channels, work.height // f, work.width // f)
        rows = len(latents) * (2 if work.guided else 1)
        x = latents.repeat(rows // len(latents), 1, 1, 1).to(precision.unet)
        _denoise(networks.unet, controls, x, cond.repeat(rows), work)
        ended("denoise")
        latent = latents[:1].to(precision.autoencoder)
        autoencoder = _present(networks.autoencoder, work)
        if work.vae_tile is not None and isinstance(autoencoder, AutoencoderKL):
            pixels = decode_tiled(autoencoder, latent, work.vae_tile)
        else:
            pixels = autoencoder.decode(latent)
        pixels.float().clamp(-1, 1)
        ended("decode")
        del changed
    return tuple(phases)


def _denoise(unet: nn.Module, controls: Sequence[nn.Module], x: Tensor, cond: Conditioning, work: Work) -> None:
    """One step of all rows of `x`: the ControlNets one by one, then the U-Net, told the sum of what they say."""
    present = partial(block_by_block, device=work.device) if work.offload == "blocks" else partial(_present, work=work)
    unet, *looking = (present(network) for network in (unet, *controls))
    shown = [x.new_empty(1, 3, work.height, work.width) for _ in looking]
    timestep = torch.empty(len(x), device=x.device)
    told: tuple[Tensor, ...] = ()
    for control, picture in zip(looking, shown, strict=True):
        said = tuple(residual * 1.0 for residual in control(x, timestep, cond, picture))
        told = tuple(a + b for a, b in zip(told, said, strict=True)) if told else said
    unet(x, timestep, cond.with_(control=told))


def peak(phases: Iterable[Phase]) -> int:
    """The most bytes of any phase."""
    return max(phase.peak for phase in phases)


def choose_offload(work: Work, room: Room) -> tuple[Offload, str]:
    """The fastest way to draw that fits into what is free of a GPU's memory, and why it is taken, "" for the first.

    work: of a picture of the model's own size, for where `room` has no requests; it is decoded in tiles where it must
    be. On a CPU, where nothing is elsewhere, and where the system does not tell, it is "none".
    """
    free = available_memory(work.device)
    if room.requests:
        sizes = (_largest_pass(request, work.config.size) for request in room.requests)
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        guided = any(request.guidance != 1 for request in room.requests)
        work = replace(work, width=width, height=height, guided=guided)
    work = replace(work, vae_tile=work.vae_tile or TILE, adapted=room.adapted)
    if work.device.type != "cuda" or free is None or _plenty(work) + room.beside <= FILLED * free:
        return "none", ""
    found, more = OFFLOADS[0], list[str]()
    for found in OFFLOADS:
        takes = peak(plan_drawing(replace(work, offload=found))) + (room.beside if found == "none" else 0)
        if takes <= FILLED * free:
            break
        more.append(f"{found} takes {takes / 2**30:.1f} GiB")
    return found, f"{', '.join(more)}; {free / 2**30:.1f} GiB are free" if more else ""


def _largest_pass(request: GenerateRequest, side: int) -> tuple[int, int]:
    """(width, height) of the larger one where there are two passes over a picture. side: of the model's own pictures"""
    width, height = size_of(request, side)
    scale = 1.0 if request.highres is None else max(1.0, request.highres.scale)
    return round(width * scale), round(height * scale)


def _plenty(work: Work) -> int:
    """More bytes than drawing takes, for sure, and found at once: the weights once too often, and room for pixels."""
    weights = sum(info.count for info in work.tensors.values()) * work.precision.unet.itemsize
    return (3 if work.adapted else 2) * weights + 8192 * work.width * work.height * work.batch


def _controls(work: Work) -> list[ControlNet]:
    """ControlNets of the usual kind for this model, in the precision of its U-Net."""
    config = ControlNetConfig.usual(work.config.unet, work.config.autoencoder.downsampling)
    with META:
        return [ControlNet(config).to(work.precision.unet) for _ in range(work.controls)]


def _adapted(networks: Networks) -> list[Tensor]:
    """The weights that adapters may change: matrices and convolutions of the U-Net and of the text towers."""
    changing = (networks.unet, *networks.text)
    return [tensor for network in changing for tensor in network.parameters() if tensor.dim() > 1]


def _present(network: Anything, work: Work) -> Anything:
    """A network where it is run."""
    return network if work.offload == "none" or not isinstance(network, nn.Module) else copy_on(network, work.device)


def _told(networks: Networks, work: Work) -> Conditioning:
    """What the U-Net is told of one picture, once the text towers have been asked."""
    config, dtype = work.config, work.precision.unet
    make = partial(torch.empty, device=work.device)
    states = []
    for tower, use in zip(networks.text, config.text, strict=True):
        ids = make(1, use.tower.tokens, dtype=torch.int64)
        states.append(_present(tower, work)(ids, use.skip, use.final_norm, use.pooled).states)
    unet = config.unet
    vector = None if unet.vector_width is None else make(1, unet.vector_width, dtype=dtype)
    extra = unet.in_channels - config.autoencoder.latent_channels
    f = config.autoencoder.downsampling
    return Conditioning(
        cross=torch.cat(states, dim=-1).to(dtype) if states else None,
        vector=vector if unet.classes is None else make(1, dtype=torch.int64),
        concat=make(1, extra, work.height // f, work.width // f, dtype=dtype) if extra else None,
    )


def _read(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """As `ldm.weights.io.read_tensors` maps them: windows of a file, held as long as one tensor in them is."""
    for window in in_groups(sorted(names, key=partial(_begin, tensors)), tensors, WINDOW):
        ends = [0]
        for name in window:
            info = tensors[name]
            ends.append(ends[-1] + -(-info.count * TORCH_DTYPES[info.dtype].itemsize // 8) * 8)
        mapped = torch.empty(ends[-1], dtype=torch.uint8)
        for name, begin in zip(window, ends, strict=False):
            info = tensors[name]
            size = info.count * TORCH_DTYPES[info.dtype].itemsize
            yield name, mapped[begin : begin + size].view(TORCH_DTYPES[info.dtype]).view(info.shape)


def _begin(tensors: Mapping[str, TensorInfo], name: str) -> int:
    info = tensors[name]
    return info.begin if isinstance(info, StoredTensor) else 0
