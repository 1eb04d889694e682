"""The stages that `ldm.training.recipes` names, one function each: (workspace, loop) -> None."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.data.packed import open_packed
from ldm.data.records import KIND_SHARES, Record, may_flip
from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.presets import SystemConfig
from ldm.models.text_encoder import OpenCLIPText
from ldm.models.tokenizer import tokenize
from ldm.models.unet import UNet
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import save_checkpoint
from ldm.training.autoencoder import AutoencoderLoss, AutoencoderObjective
from ldm.training.clip import CLIPObjective, small_clip
from ldm.training.diffusion import DiffusionObjective
from ldm.training.latents import centre_latents, encode_captions, encode_pictures, open_latents
from ldm.training.loop import LoopConfig, train
from ldm.training.sheets import save_sheet
from ldm.training.whitening import fold, folded
from ldm.weights.save import write_tensors

log = logging.getLogger(__name__)

CHECKPOINT = "ldm-small.safetensors"
HELD_OUT_EVERY = 70
"""Every 70th picture of the packed set is never trained on: it is what the losses are watched on."""
PREVIEWS = 32
"""Captions of held-out pictures that are drawn while the network trains; none is on the published sheet."""


@dataclass(frozen=True)
class Workspace:
    """Where a recipe reads and writes, and what it builds.

    pictures: folder of a packed set (`ldm.data.packed`) of `config.size` pixels;
    runs: folder with one folder per stage below it.
    """

    pictures: Path
    runs: Path
    config: SystemConfig

    def stage(self, name: str) -> Path:
        """The folder of a stage of this recipe's family."""
        return self.runs / name


def train_autoencoder(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn on crops, a quarter of a picture each; keep the averaged weights, their latents centred."""
    assert loop is not None
    pictures, records = open_packed(work.pictures, work.config.size)
    kept, held_out = _split(records)
    torch.manual_seed(loop.seed)
    autoencoder = AutoencoderKL(work.config.autoencoder)
    crop = work.config.size // 2
    objective = AutoencoderObjective(autoencoder, pictures, kept, held_out, crop, AutoencoderLoss())
    train(objective, loop, work.stage("autoencoder")).swap(objective)
    centre_latents(autoencoder.eval().cpu(), pictures[::29])
    _save(autoencoder, work.stage("autoencoder") / "autoencoder.safetensors")


def train_clip(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn both towers; keep their averaged weights."""
    assert loop is not None
    pictures, records = open_packed(work.pictures, work.config.size)
    use = work.config.text[0]
    ids = [np.array([tokenize(text, use.tower.tokens, use.padding) for text in r["texts"]]) for r in records]
    flips = np.array([may_flip(record) for record in records])
    kept, held_out = _split(records)
    torch.manual_seed(loop.seed)
    model = small_clip(use.tower)
    objective = CLIPObjective(model, pictures, ids, flips, kept, held_out)
    train(objective, loop, work.stage("clip")).swap(objective)
    _save(model, work.stage("clip") / "clip.safetensors")


def encode_all(work: Workspace, loop: None) -> None:
    """Encode what the network is trained on, once."""
    pictures, records = open_packed(work.pictures, work.config.size)
    folder = work.stage("latents")
    unfinished = folder.with_suffix(".tmp")
    encode_pictures(_autoencoder(work), pictures, records, unfinished)
    encode_captions(_text(work), work.config.text[0], records, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def train_unet(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn the network on the encoded pictures, drawn by the shares of their kinds."""
    assert loop is not None
    _, records = open_packed(work.pictures, work.config.size)
    data = open_latents(work.stage("latents"))
    _, held_out = _split(records)
    previews = [records[i]["texts"][0] for i in held_out[:: max(1, len(held_out) // PREVIEWS)]][:PREVIEWS]
    if len(data) != len(records):
        raise LdmError(f"{work.stage('latents')}: {len(data)} latents for {len(records)} pictures; encode them again")
    model = _system(work)

    def preview(unet: UNet, path: Path) -> None:
        with folded(unet, data.whitening):
            _preview(replace(model, unet=unet), previews, path)

    objective = DiffusionObjective(
        model.unet,
        model.schedule,
        model.config.prediction,
        data,
        held_out.tolist(),
        share=_shares(records),
        preview=preview,
    )
    train(objective, loop, work.stage("unet")).swap(objective)
    fold(model.unet, data.whitening)
    _save(model.unet, work.stage("unet") / "unet.safetensors")


def assemble(work: Workspace, loop: None) -> None:
    """Write one checkpoint, float16, in the Stable Diffusion layout, the image tower included."""
    model = _system(work)
    model.unet.load_state_dict(load_file(_needed(work.stage("unet") / "unet.safetensors")))
    clip = load_file(_needed(work.stage("clip") / "clip.safetensors"))
    extra = {f"cond_stage_model.model.{k}": v for k, v in clip.items() if k.startswith("visual.") or k == "logit_scale"}
    save_checkpoint(model, work.runs / CHECKPOINT, dtype=torch.float16, extra=extra)


def _split(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pictures that are trained on, and of those that never are."""
    numbers = np.arange(len(records))
    held_out = numbers % HELD_OUT_EVERY == 0
    return numbers[~held_out], numbers[held_out]


def _shares(records: list[Record]) -> np.ndarray:
    """The probability of each picture: its kind's share of training, over the pictures of that kind."""
    counts = Counter(record["kind"] for record in records)
    return np.array([KIND_SHARES[record["kind"]] / counts[record["kind"]] for record in records])


def _preview(model: LatentDiffusion, prompts: Sequence[str], path: Path) -> None:
    """Draw each prompt with the first seed, on the device where the U-Net is."""
    device = next(model.unet.parameters()).device
    model = replace(
        model,
        device=device,
        autoencoder=model.autoencoder.to(device),
        text=tuple(cast(OpenCLIPText, tower).to(device) for tower in model.text),
    )
    pictures = [model.generate(prompt, seed=0, steps=15)[0] for prompt in prompts]
    images = [torch.from_numpy(np.array(p.image)).permute(2, 0, 1) / 127.5 - 1 for p in pictures]
    save_sheet(torch.stack(images), path, columns=8)


def _system(work: Workspace) -> LatentDiffusion:
    """The system with its trained first stage and text tower, and a U-Net that is yet to be trained."""
    config = work.config
    torch.manual_seed(0)
    unet = UNet(config.unet)
    return LatentDiffusion(config, unet, _autoencoder(work), (_text(work),), torch.device("cpu"), torch.float32)


def _autoencoder(work: Workspace) -> AutoencoderKL:
    autoencoder = AutoencoderKL(work.config.autoencoder)
    autoencoder.load_state_dict(load_file(_needed(work.stage("autoencoder") / "autoencoder.safetensors")))
    return autoencoder.to(memory_format=torch.channels_last).eval()


def _text(work: Workspace) -> OpenCLIPText:
    tower = OpenCLIPText(work.config.text[0].tower)
    saved = load_file(_needed(work.stage("clip") / "clip.safetensors"))
    tower.load_state_dict({name: saved[name] for name in tower.state_dict()})
    return tower.eval()


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise LdmError(f"{path}: not found; run the stage that makes it first (see ldm.training.recipes)")
    return path


def _save(module: nn.Module, path: Path) -> None:
    write_tensors(path, module.state_dict(), {})
