"""What tuning will take of memory, before anything is tuned: phase by phase, from shapes alone.

The networks, adapters, gradients and optimizers of a real run, on tensors without numbers: `ldm.pipeline.live_memory`.
Shapes: B batch, z latent channels, h and w latent height and width, H and W picture height and width.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.layers.sharing import weights_of
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.live_memory import META, LiveMemory, backward, live_memory
from ldm.pipeline.load import fill
from ldm.pipeline.plan import KEPT_BACK, LOADING, RUNNING, Phase, Work, unread
from ldm.training.engine.ema import EMA
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.lowered import lowered
from ldm.training.engine.memory_saving import checkpointed
from ldm.training.engine.objective import Batch, learning
from ldm.training.engine.optimizers import averages_itself, optimizer_for, take_average
from ldm.training.engine.precision import DTYPES
from ldm.training.engine.prefetch import AHEAD
from ldm.training.text_states import caption_ids, text_states
from ldm.training.tune.captions import KeptCaptions, LiveCaptions
from ldm.training.tune.epochs import Epochs
from ldm.training.tune.objective import TuneObjective
from ldm.training.tune.results import HALF
from ldm.training.tune.settings import Tuning, text_share, weighing
from ldm.training.tune.trained import Trained, trained_of
from ldm.weights.layout import Networks, build


@dataclass(frozen=True)
class TuneWork:
    """What is to be tuned, and how.

    drawn:  the model as it is loaded, and one picture of the size that is trained on and drawn on the way
    loop:   its precision is not "auto"
    varied: whether captions come out differently each time, so that the text towers are asked about each
    """

    drawn: Work
    tuning: Tuning
    loop: LoopConfig
    varied: bool = False


def plan_tuning(work: TuneWork) -> tuple[Phase, ...]:
    """What each phase of tuning holds at its peak, in the order of the phases.

    Counted is what the process holds more than before it loaded the model: on a GPU, of the GPU's memory. Raises
    LdmError where the model cannot be tuned so.
    """
    drawn, tuning, device = work.drawn, work.tuning, work.drawn.device
    phases: list[Phase] = []

    def ended(name: str, besides: int = RUNNING + KEPT_BACK) -> None:
        phases.append(Phase(name, memory.peak + (besides if device.type == "cpu" else 0)))
        memory.restart()

    networks = build(drawn.config)
    if device.type != "cpu":
        with META:
            fill(networks, unread(drawn.tensors), META, drawn.precision)
    if work.loop.optimizer == "adamw8bit":
        make_tables(work.loop)
    timestep = torch.zeros(work.loop.batch, dtype=torch.int64)  # with numbers, as the schedule's are
    with live_memory(device) as memory:
        base = _loaded(drawn, networks, memory)
        ended("load", LOADING)
        trained = trained_of(base, tuning)
        with torch.no_grad():
            pixels = torch.empty(1, 3, drawn.height, drawn.width, dtype=drawn.precision.autoencoder)
            base.autoencoder.encode(pixels)
            if base.text:
                text_states(base, caption_ids(base, [""]))
        ended("encode", RUNNING)
    objective = _objective(work, trained)  # outside, for its schedule has numbers
    with live_memory(device, memory), learning(objective):
        batch = _batch(work, objective, timestep)
        waiting = [_batch(work, objective, timestep) for _ in range(_waiting(work))]
        optimizer = optimizer_for(objective.groups(), work.loop)
        average = EMA(objective, work.loop.ema)
        saving = checkpointed(trained.networks, compare=False) if tuning.checkpointing else nullcontext()
        with saving, torch.compiler.set_stance("force_eager"):
            _steps(objective, work, optimizer, batch)
        ended("step")
        _look(objective, work, batch)
        ended("look")
        if averages_itself(optimizer):
            take_average(optimizer, objective, average)
        _write(trained, work)
        ended("save")
        del waiting
    return tuple(phases)


def caption_bytes(work: TuneWork) -> int:
    """What a caption of one chunk takes of the machine's memory as long as the run lasts; 0 where towers are asked."""
    if work.varied or work.tuning.text or work.tuning.method == "embedding":
        return 0
    return sum(4 * use.tower.tokens * use.tower.width for use in work.drawn.config.text)


def _loaded(drawn: Work, networks: Networks, memory: LiveMemory) -> LatentDiffusion:
    """The model on its device; a GPU's memory holds no pages of the file."""
    if drawn.device.type == "cpu":
        fill(networks, unread(drawn.tensors), drawn.device, drawn.precision)
    else:
        for network in networks.by_prefix().values():
            for tensor in weights_of(network):
                memory.hold(tensor)
    return LatentDiffusion(
        drawn.config, networks.unet, networks.autoencoder, networks.text, drawn.device, drawn.precision.unet,
        image=networks.image, augmentor=networks.augmentor, image_tokens=networks.image_tokens,
    )  # fmt: skip


def _objective(work: TuneWork, trained: Trained) -> TuneObjective:
    """The loss, on no pictures: batches are made here."""
    live = work.varied or work.tuning.text or trained.word is not None
    with_gradients = work.tuning.text or trained.word is not None
    captions = LiveCaptions(trained.model, with_gradients) if live else KeptCaptions(trained.model, {})
    return TuneObjective(
        trained.model,
        trained.networks,
        (),
        Epochs((), work.loop.batch, 0),
        captions,
        noising=work.tuning.noising,
        weighing=weighing(work.tuning, work.drawn.config),
        control=trained.control,
        text_share=text_share(work.tuning, work.loop.rate),
        facts={},
    )


def _batch(work: TuneWork, objective: TuneObjective, timestep: Tensor) -> Batch:
    """What `TuneObjective.batch` gives, of captions of one chunk."""
    drawn, config, rows = work.drawn, work.drawn.config, work.loop.batch
    f = config.autoencoder.downsampling
    latents = torch.empty(rows, config.autoencoder.latent_channels, drawn.height // f, drawn.width // f)
    batch = {
        "latents": latents,
        "noise": torch.empty_like(latents),
        "timestep": timestep,
        "weight": torch.empty(rows),
        "sizes": torch.empty(rows, config.sizes_in_vector),
    }
    if objective.control is not None:
        batch["hint"] = torch.empty(rows, 3, drawn.height, drawn.width)
    if isinstance(objective.captions, LiveCaptions):
        return batch | {"ids": caption_ids(objective.model, [""] * rows)}
    with torch.no_grad():
        said = text_states(objective.model, caption_ids(objective.model, [""]))
    pooled = {} if said.pooled is None else {"pooled": said.pooled.float().expand(rows, -1).contiguous()}
    return batch | {"states": said.states.float().expand(rows, -1, -1).contiguous(), **pooled}


def _waiting(work: TuneWork) -> int:
    """How many batches are prepared meanwhile: they wait in the machine's memory."""
    return AHEAD * work.loop.workers if work.drawn.device.type == "cpu" else 0


def make_tables(loop: LoopConfig) -> None:
    """Let torchao make the tables that it keeps for good while there are numbers."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    with torch.compiler.set_stance("force_eager"):
        optimizer_for([([weight], 1.0)], loop).step()


def _steps(objective: TuneObjective, work: TuneWork, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """A step that is not the first: the optimizer has its state, and where batches are accumulated there are gradients.

    `ldm.training.engine.loop` takes it so.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    if work.loop.accumulate == 1:
        optimizer.zero_grad()
    device, dtype = work.drawn.device, DTYPES[work.loop.precision]
    with lowered(device, dtype):
        loss = objective(batch)["loss"]
    with lowered(device, dtype, keep=False):  # for activations that are worked out again
        backward(loss)
    nn.utils.clip_grad_norm_(parameters, work.loop.clip)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _look(objective: TuneObjective, work: TuneWork, batch: Batch) -> None:
    """The loss of a batch, and a picture that is drawn with guidance."""
    drawn, model = work.drawn, objective.model
    with lowered(drawn.device, DTYPES[work.loop.precision]):
        objective.loss(batch)
        one = {name: tensor[:1] for name, tensor in batch.items()}
        latent = one["latents"].to(model.dtype)
        network, cond = objective.network(one), objective.captions.cond(one).to(dtype=model.dtype)
        network(latent.repeat(2, 1, 1, 1), torch.empty(2), cond.repeat(2))
        model.autoencoder.decode(latent.to(drawn.precision.autoencoder)).float().clamp(-1, 1)


@torch.no_grad()
def _write(trained: Trained, work: TuneWork) -> None:
    """Tensors are written one after another, in the order and precision that files have them in."""
    for network in trained.networks:
        for tensor in weights_of(network):
            tensor.contiguous().to(HALF)
