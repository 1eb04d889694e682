"""The file that a run is for: a LoRA, an embedding, a control network or a checkpoint, of the best step so far."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.errors import LdmError
from ldm.pipeline.files import sha256_of
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import save_checkpoint
from ldm.training.adapter_options import network_facts
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.tune.pictures import Prepared
from ldm.training.tune.settings import Tuning
from ldm.training.tune.trained import Trained
from ldm.weights.adapters.write import write_adapter
from ldm.weights.controlnet_write import write_control
from ldm.weights.embeddings import write_embedding
from ldm.weights.io import read_header

HALF = torch.float16


def result_path(tuning: Tuning) -> Path:
    """Where the result goes. An embedding's word is its file's name, for most programs."""
    name = tuning.word if tuning.method == "embedding" else tuning.output.resolve().name
    return tuning.output / f"{name}.safetensors"


def step_of_result(tuning: Tuning) -> int | None:
    """Of which step the file is that is there; None where there is none, or none that says so."""
    try:
        told = read_header(result_path(tuning)).metadata.get("ss_steps", "")
    except (LdmError, OSError):
        return None
    return int(told) if told.isascii() and told.isdigit() else None


def write_result(tuning: Tuning, trained: Trained, base: LatentDiffusion, facts: dict[str, str], step: int) -> Path:
    """Write what is trained as it is now; what was there is replaced. Raises LdmError where it cannot be written."""
    path, told = result_path(tuning), facts | {"ss_steps": str(step)}
    if trained.word is not None:
        word = trained.word.embedding(step, base.origin.name)
        write_embedding(path, word, layout=tuning.layout, metadata=told)
    elif trained.control is not None:
        write_control(path, trained.control, base.config, dtype=HALF, metadata=told)
    elif tuning.by_adapter:
        from ldm.training.adapters import trained_parts  # here, since peft takes seconds to import

        told = network_facts(tuning.adapter, base.config) | told
        write_adapter(path, trained_parts(trained.model), base.config, layout=tuning.layout, metadata=told)
    else:
        save_checkpoint(trained.model, path, title=path.stem, dtype=HALF, metadata=told)
    return path


def run_facts(
    tuning: Tuning, loop: LoopConfig, base: LatentDiffusion, kept: Sequence[Prepared], held_out: int, ranks: int
) -> dict[str, str]:
    """What a file says of its run, in the words of kohya's scripts, which other programs show."""
    regular = sum(picture.example.regular for picture in kept)
    tags = Counter(tag.strip() for picture in kept for tag in picture.caption.split(",") if tag.strip())
    buckets = Counter(picture.bucket for picture in kept)
    folder, text_rate = tuning.pictures.name, loop.rate if tuning.text_rate is None else tuning.text_rate
    facts: dict[str, object] = {
        "ss_output_name": result_path(tuning).stem,
        "ss_learning_rate": loop.rate,
        "ss_unet_lr": loop.rate,
        "ss_text_encoder_lr": text_rate if tuning.text or tuning.method == "embedding" else None,
        "ss_num_train_images": sum(picture.example.repeats for picture in kept) - regular,
        "ss_num_reg_images": regular,
        "ss_num_validation_images": held_out,
        "ss_max_train_steps": loop.steps,
        "ss_gradient_accumulation_steps": loop.accumulate * ranks,
        "ss_gradient_checkpointing": tuning.checkpointing,
        "ss_lr_warmup_steps": loop.warmup,
        "ss_lr_scheduler": "cosine" if loop.schedule == "cosine" else "constant_with_warmup",
        "ss_mixed_precision": loop.precision,
        "ss_seed": tuning.seed,
        "ss_cache_latents": True,
        "ss_noise_offset": tuning.noising.offset or None,
        "ss_ip_noise_gamma": tuning.noising.perturbation or None,
        "ss_zero_terminal_snr": tuning.noising.zero_terminal_snr,
        "ss_min_snr_gamma": tuning.min_snr,
        "ss_prior_loss_weight": tuning.noising.prior,
        "ss_loss_type": "l2" if tuning.huber is None else "huber",
        "ss_optimizer": loop.optimizer,
        "ss_max_grad_norm": loop.clip,
        "ss_sd_model_name": None if base.origin.path is None else base.origin.path.name,
        "ss_new_sd_model_hash": None if base.origin.path is None else sha256_of(base.origin.path),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": len(kept)}}),
        "ss_tag_frequency": json.dumps({folder: dict(tags.most_common(500))}),
        "ss_bucket_info": json.dumps(
            {
                "buckets": {
                    str(i): {"resolution": size, "count": n} for i, (size, n) in enumerate(sorted(buckets.items()))
                }
            }
        ),
    }
    return {name: str(value) for name, value in facts.items()}
