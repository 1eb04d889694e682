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
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.data.packed import open_packed
from ldm.data.records import KIND_SHARES, Record, may_flip
from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.image_conditioner import ImageTokens
from ldm.models.image_encoder import ImageTower
from ldm.models.presets import SystemConfig, decoder_of
from ldm.models.prior import Codes, Prior, PriorConfig
from ldm.models.text_encoder import OpenCLIPText
from ldm.models.tokenizer import tokenize
from ldm.models.unet import UNet
from ldm.pipeline.clip.components import components_of
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import save_checkpoint
from ldm.pipeline.request import GenerateRequest
from ldm.training.autoencoder import AutoencoderLoss, AutoencoderObjective, VAEDecoderObjective
from ldm.training.clip.data import Pairs
from ldm.training.clip.model import small_clip
from ldm.training.clip.objective import CLIPObjective, Pixels
from ldm.training.dalle2.decoder import (
    DROP_TEXT,
    DecoderObjective,
    augmentor_of,
    first_tokens,
    kept_embeddings,
    plain_tokens,
    widened,
)
from ldm.training.dalle2.prior import CodesObjective, PriorObjective
from ldm.training.dalle2.prior_data import (
    PriorPictures,
    caption_lengths,
    fold_text,
    kept_components,
    prior_pictures,
    set_speller,
    set_statistics,
)
from ldm.training.diffusion import DiffusionObjective, LatentPictures
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.latents import centre_latents, encode_captions, encode_pictures, open_latents
from ldm.training.sheets import save_sheet
from ldm.training.whitening import fold, folded, unfold
from ldm.weights.layout import Networks
from ldm.weights.part import save_part
from ldm.weights.prior import clip_mark, save_prior
from ldm.weights.save import write_tensors

log = logging.getLogger(__name__)

CHECKPOINT = "ldm-small.safetensors"
DECODER = "ldm-decoder.safetensors"
PRIOR = "ldm-prior.safetensors"
PRIOR_AR = "ldm-prior-ar.safetensors"
KEPT_VARIANCE = 0.99
"""Of the embeddings, in the components that the autoregressive prior spells."""
CLIP_UNSEEN = 0.5
"""Of a picture's patches, those that CLIP is not shown in a training step: twice the pairs in the time (Li et al. 2023,
"Scaling language-image pre-training via masking"), and no two looks at a picture are alike."""
HELD_OUT_EVERY = 70
"""Every 70th picture of the packed set is never trained on: it is what the losses are watched on."""
SAME_CAPTION = 0.99
"""The cosine of a caption's vectors, one of them rounded to bfloat16, above which one tower made both."""
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
    train(objective, loop, work.stage("autoencoder")).swap()
    centre_latents(autoencoder.eval().cpu(), pictures[::29])
    _save(autoencoder, work.stage("autoencoder") / "autoencoder.safetensors")


def train_vae_decoder(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn the autoencoder's decoder further, on noised latents; the latents stay as they are."""
    assert loop is not None
    pictures, records = open_packed(work.pictures, work.config.size)
    autoencoder = _autoencoder(work)
    objective = VAEDecoderObjective(autoencoder, pictures, *_split(records), AutoencoderLoss())
    train(objective, loop, work.stage("vae-decoder")).swap()
    _save(autoencoder, work.stage("vae-decoder") / "autoencoder.safetensors")


def train_clip(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn both towers; keep their averaged weights."""
    assert loop is not None
    pictures, records = open_packed(work.pictures, work.config.size)
    use, image = work.config.text[0], work.config.clip_image
    assert image is not None
    flips = np.array([may_flip(record) for record in records])
    pairs = Pairs(pictures, [r["key"] for r in records], [r["texts"] for r in records], flips, *_split(records))

    def tokens(texts: list[str]) -> Tensor:
        return torch.tensor([tokenize(text, use.tower.tokens, use.padding) for text in texts])

    torch.manual_seed(loop.seed)
    model = small_clip(use.tower, image, CLIP_UNSEEN)
    objective = CLIPObjective(model, pairs, tokens, Pixels(image.size, image.mean, image.deviation))
    train(objective, loop, work.stage("clip")).swap()
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
    train(objective, loop, work.stage("unet")).swap()
    fold(model.unet, data.whitening)
    _save(model.unet, work.stage("unet") / "unet.safetensors")


def train_decoder(work: Workspace, loop: LoopConfig | None) -> None:
    """Go on with the finished network, told CLIP image embeddings besides; write what it has of its own.

    Its autoencoder and CLIP are the checkpoint's, which must lie beside it to draw (`ldm.weights.part`).
    """
    assert loop is not None
    pictures, records = open_packed(work.pictures, work.config.size)
    data, embeddings = _latents(work, records), _embeddings(work, pictures)
    kept, held_out = _split(records)
    base, config = _finished(work), decoder_of(work.config)
    assert config.image is not None
    torch.manual_seed(loop.seed)
    unet = widened(base.unet, config.unet)
    unfold(unet, data.whitening)
    paddings = data.whitening.states(torch.from_numpy(data.states[-1, -config.image.tokens :].astype(np.float32)))
    model = replace(
        base, config=config, unet=unet, image=_image(work), augmentor=augmentor_of(embeddings[kept]),
        image_tokens=first_tokens(config.image.tower.projection, paddings),
    )  # fmt: skip
    assert model.image_tokens is not None and model.augmentor is not None
    previews = [Image.fromarray(pictures[i]) for i in held_out[:: max(1, len(held_out) // PREVIEWS)]][:PREVIEWS]

    def preview(unet: UNet, tokens: ImageTokens, path: Path) -> None:
        plain = plain_tokens(tokens, data.whitening.states)
        with folded(unet, data.whitening):
            _preview(replace(model, unet=unet, image_tokens=plain), previews, path)

    diffusion = DiffusionObjective(
        unet, model.schedule, config.prediction, data, held_out.tolist(), share=_shares(records), drop=DROP_TEXT
    )
    objective = DecoderObjective(diffusion, model.image_tokens, model.augmentor, embeddings, preview=preview)
    train(objective, loop, work.stage("decoder")).swap()
    fold(unet, data.whitening)
    tokens = plain_tokens(model.image_tokens, data.whitening.states)
    text = (cast(OpenCLIPText, base.text[0]),)
    networks = Networks(config, unet, base.autoencoder, text, model.image, model.augmentor, tokens)
    save_part(work.runs / DECODER, networks)


def train_prior(work: Workspace, loop: LoopConfig | None) -> None:
    """Learn from captions to image embeddings by diffusion; write the averaged weights as a file of their own."""
    assert loop is not None
    data, kept, held_out, share = _prior_pictures(work)
    torch.manual_seed(loop.seed)
    prior = Prior(_prior_config(work))
    set_statistics(prior, torch.from_numpy(data.embeddings[kept, 0]).float())
    objective = PriorObjective(prior, data, held_out, share=share)
    train(objective, loop, work.stage("prior")).swap()
    fold_text(prior, data.whitening)
    save_prior(work.runs / PRIOR, prior, dtype=torch.float16)


def train_prior_ar(work: Workspace, loop: LoopConfig | None) -> None:
    """The same code by code, of the principal components."""
    assert loop is not None
    data, kept, held_out, share = _prior_pictures(work)
    embeddings = torch.from_numpy(data.embeddings[kept, 0]).float()
    found = components_of(embeddings)
    codes = Codes(kept_components(found.variances, KEPT_VARIANCE))
    torch.manual_seed(loop.seed)
    prior = AutoregressivePrior(replace(_prior_config(work), codes=codes))
    set_speller(prior, found, embeddings, data.vectors(data.first[kept].tolist()))
    objective = CodesObjective(prior, data, held_out, share=share)
    train(objective, loop, work.stage("prior-ar")).swap()
    fold_text(prior, data.whitening)
    save_prior(work.runs / PRIOR_AR, prior, dtype=torch.float16)


def assemble(work: Workspace, loop: None) -> None:
    """Write one checkpoint, float16, in the Stable Diffusion layout, the image tower included."""
    model = _finished(work)
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


def _preview(model: LatentDiffusion, asked: Sequence[str | Image.Image], path: Path) -> None:
    """Draw each prompt, or a variation of each picture, with the first seed, on the device where the U-Net is."""
    device = next(model.unet.parameters()).device
    model = replace(
        model,
        device=device,
        autoencoder=model.autoencoder.to(device),
        text=tuple(cast(OpenCLIPText, tower).to(device) for tower in model.text),
        image=None if model.image is None else model.image.to(device),
        augmentor=None if model.augmentor is None else model.augmentor.to(device),
        image_tokens=None if model.image_tokens is None else model.image_tokens.to(device),
    )
    requests = [
        GenerateRequest(prompt=one, seed=0, steps=15)
        if isinstance(one, str)
        else GenerateRequest(prompt="", vary=picture_bytes(one), seed=0, steps=15)
        for one in asked
    ]
    pictures = [model.generate(request)[0] for request in requests]
    images = [torch.from_numpy(np.array(p.image)).permute(2, 0, 1) / 127.5 - 1 for p in pictures]
    save_sheet(torch.stack(images), path, columns=8)


def _system(work: Workspace) -> LatentDiffusion:
    """The system with its trained first stage and text tower, and a U-Net that is yet to be trained."""
    config = work.config
    torch.manual_seed(0)
    unet = UNet(config.unet)
    return LatentDiffusion(config, unet, _autoencoder(work), (_text(work),), torch.device("cpu"), torch.float32)


def _finished(work: Workspace) -> LatentDiffusion:
    """The system with all that was trained of it: what the checkpoint holds."""
    model = _system(work)
    model.unet.load_state_dict(load_file(_needed(work.stage("unet") / "unet.safetensors")))
    model.autoencoder.load_state_dict(load_file(_needed(work.stage("vae-decoder") / "autoencoder.safetensors")))
    return model


def _autoencoder(work: Workspace) -> AutoencoderKL:
    autoencoder = AutoencoderKL(work.config.autoencoder)
    autoencoder.load_state_dict(load_file(_needed(work.stage("autoencoder") / "autoencoder.safetensors")))
    return autoencoder.to(memory_format=torch.channels_last).eval()


def _text(work: Workspace) -> OpenCLIPText:
    tower = OpenCLIPText(work.config.text[0].tower)
    saved = load_file(_needed(work.stage("clip") / "clip.safetensors"))
    tower.load_state_dict({name: saved[name] for name in tower.state_dict()})
    return tower.eval()


def _image(work: Workspace) -> ImageTower:
    assert work.config.clip_image is not None
    tower = ImageTower(work.config.clip_image)
    saved = load_file(_needed(work.stage("clip") / "clip.safetensors"))
    tower.load_state_dict({name: saved[f"visual.{name}"] for name in tower.state_dict()})
    return tower.eval().requires_grad_(False)


def _embeddings(work: Workspace, pictures: np.ndarray) -> np.ndarray:
    """What the image tower says of all pictures, kept beside their latents: encoding those anew forgets it."""
    return kept_embeddings(work.stage("latents") / "embeddings.npy", _image(work), pictures)


def _prior_pictures(work: Workspace) -> tuple[PriorPictures, np.ndarray, list[int], np.ndarray]:
    """What a prior is trained on, the numbers of the pictures kept and held out, and how likely each is drawn."""
    pictures, records = open_packed(work.pictures, work.config.size)
    data, (kept, held_out) = _latents(work, records), _split(records)
    found = prior_pictures(data, _embeddings(work, pictures), caption_lengths(work.config.text[0], records))
    return found, kept, held_out.tolist(), _shares(records)


def _latents(work: Workspace, records: list[Record]) -> LatentPictures:
    """The encoded pictures and captions. Raises LdmError where they are others, or were encoded by another text tower.

    Where image embeddings are asked for beside them, those must be of the same CLIP as the captions.
    """
    folder, use = work.stage("latents"), work.config.text[0]
    data = open_latents(folder)
    ids = torch.tensor([tokenize(records[0]["texts"][0], use.tower.tokens, use.padding)])
    with torch.inference_mode():
        pooled = _text(work)(ids, pooled=True).pooled
    assert pooled is not None
    stored = torch.from_numpy(data.pooled[:1]).float()
    if len(data) != len(records) or torch.cosine_similarity(pooled, stored) < SAME_CAPTION:
        raise LdmError(f"{folder}: not of these pictures by this CLIP; encode them again (ldm train small-latents)")
    return data


def _prior_config(work: Workspace) -> PriorConfig:
    tower = work.config.text[0].tower
    text = _text(work)
    assert tower.projection is not None and text.text_projection is not None
    return PriorConfig(tower.projection, tower.width, tower.tokens, clip=clip_mark(text.text_projection))


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise LdmError(f"{path}: not found; run the stage that makes it first (see ldm.training.recipes)")
    return path


def _save(module: nn.Module, path: Path) -> None:
    write_tensors(path, module.state_dict(), {})
