"""From a file to a ready model: find out what it is, build its networks, give them the file's tensors.

Networks are built on `meta` and take the mapped tensors over, each cast on its own where the dtype differs: no weight
is initialised to be overwritten, and memory holds one copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.errors import LdmError
from ldm.layers.convolution import fastest_layout
from ldm.layers.in_bytes import Store, full_state, in_bytes, keep_in_bytes, layers_in_bytes
from ldm.models.offloading import Offload, block_by_block, blocks_of, check_offload, here
from ldm.models.presets import Family, SystemConfig
from ldm.models.tiled import check_tile
from ldm.models.unet import UNet
from ldm.pipeline.device import Precision, check_dtype, choose_device, choose_precision
from ldm.pipeline.files import reason
from ldm.pipeline.latent_diffusion import LatentDiffusion, Origin
from ldm.pipeline.picture import OtherPart
from ldm.types import Conditioning, PredictionType
from ldm.weights.detect import Detection, detect
from ldm.weights.find import locate, model_roots
from ldm.weights.io import printable, some
from ldm.weights.layout import FIRST_STAGE, TEXT, UNET, Comparison, Networks, build, compare
from ldm.weights.part import is_part, rest_path, with_rest
from ldm.weights.save import save_networks
from ldm.weights.source import Source, open_source, with_part
from ldm.weights.tiny_autoencoder import whole_tiny

if TYPE_CHECKING:
    from ldm.models.text_encoder import CLIPText, OpenCLIPText
    from ldm.pipeline.request import GenerateRequest

PartKind = Literal["unet", "vae", "text encoder"]

MODEL_VARIABLE = "LDM_MODEL"
"""The environment variable with the path of the model to load where none is named."""

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "ldm-small.safetensors"
"""The model that comes with the repository, beside the package."""

SHIPPED_DECODER = SHIPPED.with_name("ldm-decoder.safetensors")
"""The decoder of CLIP image embeddings that does."""

SHIPPED_COMPONENTS = SHIPPED.with_name("ldm-decoder-pca.safetensors")
"""The principal components of such embeddings, by `ldm pca --write`."""

PREFIXES: Mapping[PartKind, str] = {"unet": UNET, "vae": FIRST_STAGE, "text encoder": TEXT}
"""The parts that may come from files of their own, and where a checkpoint has them."""


@dataclass(frozen=True)
class Room:
    """For what a GPU's memory is to suffice.

    requests: of whose pictures one at a time has to fit; none: one of the model's own size
    beside:   bytes of other networks: ControlNets, a refiner
    adapted:  whether adapters will change weights, which are then there twice, changed and as they were
    """

    requests: Sequence[GenerateRequest] = ()
    beside: int = 0
    adapted: bool = False


def load(
    path: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    text_encoder: str | Path | Sequence[str | Path] = (),
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    prediction: PredictionType | Literal["probe"] | None = None,
    vae_tile: int | None = None,
    offload: Offload | Literal["auto"] = "auto",
    room: Room | None = None,
    store: Store = "full",
    allow_pickle: bool = False,
    models: Sequence[str | Path] | None = None,
) -> LatentDiffusion:
    """A model of ours, SD 1.x, SD 2.x or SDXL, told apart by what is in it.

    path:         a file in any layout that `open_source` reads, a diffusers folder, or a name to look for in `models`;
                  None: the file that `LDM_MODEL` names, else the model that ships with this package
    vae, unet, text_encoder: files to take these parts from instead (SDXL may be given two text encoders); `vae` may be
                  a tiny autoencoder's, of latents with as many channels
    device:       "auto" (a CUDA GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps"
    dtype:        "auto", "float32", "bfloat16" or "float16"; see `choose_precision`
    prediction:   overrides what the file says of itself; "probe" runs an SD 2.x U-Net once to find out
    vae_tile:     the side of tiles, in positions, in which the autoencoder works, with the same result and less memory;
                  None: where it would not fit otherwise
    offload:      what waits in the machine's memory while a GPU does not use it, see `Offload`; "auto": as little as
                  has to for the pictures of `room`
    room:         for what a GPU's memory is to suffice; None: one picture of the model's own size
    store:        "int8": the weights of the U-Net's blocks are kept in bytes, which takes half the memory of half
                  precision and changes pictures a little
    allow_pickle: whether .ckpt, .pt and .bin are read, by a reader that runs nothing that is in them
    models:       folders with model files, laid out as by other programs; None: those that `LDM_MODELS` lists

    Weights that need no cast stay mapped: nothing is copied, so leave the file as it is while the model is in use
    (replacing it by renaming is safe). Raises LdmError, in one line, for everything wrong with the file or the choices.
    """
    place = choose_device(device)
    check_dtype(dtype, place)
    check_tile(vae_tile)
    if offload != "auto":
        check_offload(offload, place)
    path, roots = shipped_model() if path is None else path, model_roots(models)
    source, rules = open_source(locate("checkpoint", path, roots), allow_pickle=allow_pickle), []
    if is_part(source):
        rest = rest_path(source, SHIPPED)
        source = with_rest(source, open_source(rest))
        rules.append(f"autoencoder and CLIP: from {printable(str(rest))}, with which it was trained")
    others: list[OtherPart] = []
    for kind, given in _parts(unet, vae, text_encoder):
        part = open_source(locate(kind, given, roots), allow_pickle=allow_pickle)
        if kind == "vae":
            part = whole_tiny(part, allow_pickle=allow_pickle)
        source = with_part(source, PREFIXES[kind], part)
        rules.append(f"{kind}: from {printable(str(part.path))}")
        others.append(OtherPart(kind, part.path))
    detection = detect(source, None if prediction == "probe" else prediction)
    config = detection.config
    if config.schedule not in NOISE_SCHEDULES:
        raise _error(
            source, f"its noise schedule {config.schedule!r} is not known; expected {', '.join(NOISE_SCHEDULES)}"
        )
    networks = _build(source, config)
    comparison = compare(source.tensors, networks)
    if not comparison.fits:
        raise _error(source, _misfit(comparison, config.family))
    precision = choose_precision(dtype, place, config.family)
    warnings = warnings_of(detection, comparison)
    if config.tiny_autoencoder is not None:
        precision = replace(precision, autoencoder=precision.unet)  # it overflows nowhere
        if vae_tile is not None:
            warnings = (*warnings, "--vae-tile: the tiny autoencoder takes little memory, and works whole all the same")
    if store == "int8":
        keep_in_bytes(blocks_of(networks.unet))
    if offload == "auto":
        offload = "none"
        if place.type == "cuda":
            from ldm.pipeline.plan import Work, choose_offload

            side = config.size
            drawn = Work(config, source.tensors, place, precision, side, side, vae_tile=vae_tile, store=store)
            offload, why = choose_offload(drawn, room or Room())
            rules.extend([f"offload: {offload} ({why})"] if why else [])
    fill(networks, source, place if offload == "none" else torch.device("cpu"), precision, runs_on=place)
    if prediction == "probe":
        running = block_by_block(networks.unet, place) if offload == "blocks" else here(networks.unet, place)
        config = replace(config, prediction=_probe(running, place, source))
        detection = replace(detection, config=config, prediction_rule="one step of its U-Net")
    return LatentDiffusion(
        config=config,
        unet=networks.unet,
        autoencoder=networks.autoencoder,
        text=networks.text,
        image=networks.image,
        augmentor=networks.augmentor,
        image_tokens=networks.image_tokens,
        device=place,
        dtype=precision.unet,
        vae_tile=vae_tile,
        offload=offload,
        store=store,
        origin=Origin(
            path=source.path,
            rules=(*describe(detection), *rules, f"device: {place} ({precision})"),
            warnings=warnings,
            parts=tuple(others),
        ),
    )


def _parts(
    unet: str | Path | None, vae: str | Path | None, text: str | Path | Sequence[str | Path]
) -> list[tuple[PartKind, str | Path]]:
    """The parts that are given, and of what kind each is."""
    parts: list[tuple[PartKind, str | Path | None]] = [("unet", unet), ("vae", vae)]
    parts.extend(("text encoder", tower) for tower in ([text] if isinstance(text, str | Path) else text))
    return [(kind, path) for kind, path in parts if path is not None]


def shipped_model() -> Path:
    """The path of the model to load where none is named. Raises LdmError where it is not there."""
    if named := os.environ.get(MODEL_VARIABLE):
        try:
            Path(named).stat()
        except OSError as error:
            raise LdmError(
                f"{printable(named)}: {reason(error)}; it is named by the environment variable {MODEL_VARIABLE}"
            ) from None
        return Path(named)
    if not SHIPPED.exists():
        raise LdmError(
            f"{printable(str(SHIPPED))}: the model that ships with this package is missing; get it from the repository "
            f"(checkpoints/), or name another by --model or the environment variable {MODEL_VARIABLE}"
        )
    return SHIPPED


def shipped_decoder() -> Path:
    """The path of the model that is told pictures where none is named. Raises LdmError where it is not there."""
    if os.environ.get(MODEL_VARIABLE):
        return shipped_model()
    if not SHIPPED_DECODER.exists():
        raise LdmError(
            f"{printable(str(SHIPPED_DECODER))}: the decoder that ships with this package is missing; get it from the"
            f" repository (checkpoints/), or name it or an SD 2.1 unCLIP checkpoint by --model"
        )
    return SHIPPED_DECODER


def save_checkpoint(
    model: LatentDiffusion,
    path: str | Path,
    *,
    title: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as one .safetensors file that `load` and other programs read; see `save_networks`."""
    if model.store != "full":
        raise LdmError("store int8: this model's weights were rounded to a byte; load it without, and save that one")
    towers = cast("tuple[OpenCLIPText | CLIPText, ...]", model.text)
    networks = Networks(
        model.config, model.unet, model.autoencoder, towers, model.image, model.augmentor, model.image_tokens
    )
    save_networks(path, networks, title=title, dtype=dtype, metadata=metadata, extra=extra)


def random_system(config: SystemConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    """A system on the CPU with small random weights, none of them zero: for tests, and for trying things.

    The same config and seed give the same weights, whatever else has been drawn.
    """
    networks = build(config)
    generator = torch.Generator().manual_seed(seed)
    for network in networks.by_prefix().values():
        state = {
            name: fastest_layout(_random(name, t.shape, generator).to(dtype))
            for name, t in network.state_dict().items()
        }
        network.load_state_dict(state, strict=True, assign=True)
        network.eval().requires_grad_(False)
    return LatentDiffusion(
        config, networks.unet, networks.autoencoder, networks.text, torch.device("cpu"), dtype,
        image=networks.image, augmentor=networks.augmentor, image_tokens=networks.image_tokens,
    )  # fmt: skip


def describe(detection: Detection) -> tuple[str, ...]:
    """What was found out about a file and by which rules, a line each."""
    config = detection.config
    return (
        f"family: {config.family}, {detection.variant} ({detection.family_rule})",
        f"prediction: {config.prediction} ({detection.prediction_rule})",
        *detection.notes,
    )


def warnings_of(detection: Detection, comparison: Comparison) -> tuple[str, ...]:
    """What a user should be told unasked about a file that loads."""
    if not comparison.unknown:
        return detection.warnings
    names = f"{len(comparison.unknown)} tensors belong to no network and were left out: {some(comparison.unknown)}"
    return (*detection.warnings, names)


def _build(source: Source, config: SystemConfig) -> Networks:
    try:
        return build(config)
    except LdmError as error:
        raise _error(source, str(error)) from None


def fill(
    networks: Networks,
    source: Source,
    device: torch.device,
    precision: Precision,
    *,
    runs_on: torch.device | None = None,
) -> None:
    """Give every network, built on `meta`, its tensors, which are known to fit, cast and laid out as they are run.

    device: where they are kept; runs_on: where they are computed with, None: there
    """
    for prefix, network in networks.by_prefix().items():
        dtype = {UNET: precision.unet, FIRST_STAGE: precision.autoencoder}.get(prefix, precision.text)
        kept = {f"{prefix}{name}.weight" for name, _ in layers_in_bytes(network)}
        state = dict[str, Tensor]()
        for name, tensor in source.read([prefix + name for name in full_state(network)]):
            own = name.removeprefix(prefix)
            tensor = fastest_layout(tensor.to(device=device, dtype=dtype), runs_on)
            if name in kept:
                stem = own.removesuffix("weight")
                state[stem + "codes"], state[stem + "scale"] = in_bytes(tensor)
            else:
                state[own] = tensor
        network.load_state_dict(state, strict=True, assign=True)
        network.eval().requires_grad_(False)


def _misfit(comparison: Comparison, family: Family) -> str:
    """What is wrong between file and networks: counts, and ten names at most."""
    kinds = (
        ("missing", comparison.missing),
        ("unexpected", comparison.unexpected),
        ("of another shape or type", comparison.misshapen),
    )
    shown = max(1, 10 // sum(bool(names) for _, names in kinds))
    lists = [f"{len(names)} {kind}: {some(names, shown)}" for kind, names in kinds if names]
    return f"its tensors do not fit the networks of {family}; {'; '.join(lists)}"


@torch.inference_mode()
def _probe(unet: UNet, device: torch.device, source: Source) -> PredictionType:
    """Whether an SD 2.x U-Net predicts eps or v, by what it makes of a constant at the last timestep.

    Almost all of its input is noise there: an eps model gives it back, a v model what is far below (the test that
    AUTOMATIC1111's web UI makes, with its threshold).
    """
    config = unet.config
    if config.in_channels != 4 or config.context_width is None or config.vector_width or config.classes:
        raise _error(source, "its prediction type cannot be probed; only that of SD 2.x text-to-image models can")
    dtype = next(unet.parameters()).dtype
    x = torch.full((1, 4, 8, 8), 0.5, device=device, dtype=dtype)
    cross = torch.full((1, 2, config.context_width), 0.5, device=device, dtype=dtype)
    answer = unet(x, torch.tensor([999], device=device), Conditioning(cross=cross))
    return "v" if float((answer - x).float().mean()) < -1 else "eps"


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """One random weight: norms near 1, biases near 0, matrices that keep the size of what goes through them."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise * (shape.numel() / shape[0]) ** -0.5
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise


def _error(source: Source, message: str) -> LdmError:
    return LdmError(f"{printable(str(source.path))}: {message}")
