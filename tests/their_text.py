"""transformers' tokenizer and text towers with our weights, and diffusers' loader of embeddings for them."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils as converters
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.models.presets import TextUse
from ldm.models.tokenizer import END, START


def tokenizer_files(folder: Path) -> Path:
    """Their tokenizer's files, of open_clip's table."""
    table = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(word, word): i for word, i in table.encoder.items()}))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in table.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges))
    return folder


def their_tokenizer(folder: Path, use: TextUse) -> CLIPTokenizer:
    pad = "<|endoftext|>" if use.padding == END else "!"
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77, local_files_only=True)


def their_tower(tower: nn.Module, use: TextUse) -> nn.Module:
    """transformers' tower with the same weights; `eos_token_id` lets it find the end token among added ones."""
    config = use.tower
    theirs = CLIPTextConfig(
        hidden_size=config.width, intermediate_size=4 * config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, hidden_act=config.activation,
        projection_dim=config.projection or config.width, vocab_size=config.vocabulary,
        bos_token_id=START, eos_token_id=END, pad_token_id=use.padding,
    )  # fmt: skip
    text = (CLIPTextModelWithProjection if use.pooled else CLIPTextModel)(theirs)
    ours = tower.state_dict()
    if config.names == "open_clip":
        ours = converters.convert_open_clip_checkpoint(text, {f"x.{n}": t for n, t in ours.items()}, prefix="x.")
    bare = not any(name.startswith("text_model.") for name in text.state_dict())
    ours = {name.removeprefix("text_model.") if bare else name: tensor for name, tensor in ours.items()}
    text.load_state_dict({name: tensor for name, tensor in ours.items() if "position_ids" not in name}, strict=False)
    return text.eval()


def their_loader(tokenizer: CLIPTokenizer, text: nn.Module) -> TextualInversionLoaderMixin:
    parts = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(tokenizer=tokenizer, text_encoder=text, requires_safety_checker=False, **parts)
