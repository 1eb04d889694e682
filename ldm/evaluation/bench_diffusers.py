"""Diffusers' side of `ldm bench`: their modules with a model's tensors, run as their own pipelines run them.

The model is a folder that `ldm.weights.diffusers_write` wrote. Nothing of ours is imported that takes time, for this
module is also what a process of its own runs: `python -m ldm.evaluation.bench_diffusers JSON`.

Shapes: z latent channels, h and w latent sides, N tokens, D width of the text states, S = 1000 timesteps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.evaluation.bench_inputs import GUIDANCE, NEGATIVE, PROMPT, SEED, TIMESTEP, Setting, TuneBatch, Work
from ldm.evaluation.bench_process import Fresh

Run = Callable[[], Tensor]


def installed() -> str | None:
    """The version of diffusers, None where it or transformers is not installed."""
    return version("diffusers") if find_spec("diffusers") and find_spec("transformers") else None


def settings(device: str) -> tuple[Setting, ...]:
    """What is tried. The first is their default: what a plain script of their documentation does on such a device.

    On a CPU that has no instructions for bfloat16 that is left out: a single step could take hours.
    """
    from ldm.pipeline.device import multiplies_bfloat16  # here, for a process of its own must not pay for this import

    if torch.device(device).type == "cpu":
        plain = (Setting("float32"), Setting("float32", True))
        lower = (Setting("bfloat16"), Setting("bfloat16", True))
        return plain + lower if multiplies_bfloat16(torch.device(device)) else plain
    return (Setting("float16"), Setting("float16", True), Setting("bfloat16", True))


def step(folder: Path, setting: Setting, work: Work) -> Run:
    """A turn of their pipeline's loop: both sides of guidance in one batch, then the scheduler. -> x0 (1, z, h, w)."""
    unet = _of_diffusers("UNet2DConditionModel").from_pretrained(folder / "unet", torch_dtype=setting.torch_dtype)
    return _step_of(_placed(unet, setting, work), folder, setting, work)


def _step_of(unet: Any, folder: Path, setting: Setting, work: Work) -> Run:
    told = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = _of_diffusers("DDIMScheduler").from_config(told, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    latents = work.noise().to(setting.torch_dtype)
    # Their order: what is not wanted comes first.
    states = work.states().flip(0).to(setting.torch_dtype)
    added = None
    if work.pooled:
        sizes = torch.tensor([[work.size, work.size, 0, 0, work.size, work.size]] * 2, device=work.device)
        pooled = work.pooled_states().flip(0).to(setting.torch_dtype)
        added = {"text_embeds": pooled, "time_ids": sizes.to(setting.torch_dtype)}

    def run() -> Tensor:
        pair = scheduler.scale_model_input(torch.cat([latents] * 2), TIMESTEP)
        answer = unet(pair, TIMESTEP, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]
        unwanted, wanted = answer.chunk(2)
        guided = unwanted + GUIDANCE * (wanted - unwanted)
        return scheduler.step(guided, TIMESTEP, latents).pred_original_sample

    return run


def decode(folder: Path, setting: Setting, work: Work) -> Run:
    """Their autoencoder's decoder, as their pipeline calls it. -> (1, 3, H, W) in [-1, 1]."""
    loaded = _of_diffusers("AutoencoderKL").from_pretrained(folder / "vae", torch_dtype=setting.torch_dtype)
    autoencoder = _placed(loaded, setting, work)
    latents = work.noise().to(setting.torch_dtype)

    def run() -> Tensor:
        scaled = latents / autoencoder.config.scaling_factor + (autoencoder.config.shift_factor or 0)
        return autoencoder.decode(scaled, return_dict=False)[0].float().clamp(-1, 1)

    return run


def text(folder: Path, setting: Setting, work: Work) -> Run:
    """Their tokenizers and text towers, on a prompt and a negative one. -> (2, N, D)."""
    pipeline = _pipeline(folder, setting, work, unet=None, vae=None)

    def run() -> Tensor:
        asked = {"device": work.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        said = pipeline.encode_prompt(prompt=PROMPT, negative_prompt=NEGATIVE, **asked)
        return torch.cat(said[:2])

    return run


def picture(folder: Path, setting: Setting, work: Work) -> Run:
    """Their whole pipeline, from the prompt to a picture. -> (1, 3, H, W) in [-1, 1]."""
    return _picture_of(_pipeline(folder, setting, work), work)


def _picture_of(pipeline: Any, work: Work) -> Run:
    def run() -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        asked = {"num_inference_steps": work.steps, "guidance_scale": GUIDANCE, "generator": generator}
        size = {"width": work.size, "height": work.size}
        image = pipeline(PROMPT, negative_prompt=NEGATIVE, output_type="np", **asked, **size).images[0]
        return torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1

    return run


LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
"""Their names of the layers that kohya's scripts, and we, put a LoRA at."""


def lora_steps(
    folder: Path, setting: Setting, batches: Sequence[TuneBatch], rate: float, clip: float
) -> Callable[[], float]:
    """What takes the next step of training a LoRA of rank 16, as their example script does, and tells its loss.

    setting: weights stay in float32, and its dtype is that of autocast; clip: the norm of gradients at most.
    """
    from peft import LoraConfig

    device = batches[0].latents.device
    unet: Any = _of_diffusers("UNet2DConditionModel").from_pretrained(folder / "unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=LORA_LAYERS))
    unet.to(device, memory_format=torch.channels_last if setting.channels_last else torch.preserve_format).train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.999), weight_decay=1e-2)
    told = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = _of_diffusers("DDPMScheduler").from_config(told)
    lower = torch.autocast(device.type, setting.torch_dtype, enabled=setting.dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=setting.dtype == "float16")
    following = iter(batches)

    def step() -> float:
        batch = next(following)
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timestep)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timestep) if velocity else batch.noise
        with lower:
            answer = unet(noisy, batch.timestep, batch.states, return_dict=False)[0]
        square = torch.nn.functional.mse_loss(answer.float(), target, reduction="none")
        loss = (square.mean(dim=(1, 2, 3)) * batch.weight).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(learned, clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _pipeline(folder: Path, setting: Setting, work: Work, **parts: None) -> Any:
    """Their pipeline from the folder; parts: those that are left out."""
    loaded = _of_diffusers("DiffusionPipeline").from_pretrained(folder, torch_dtype=setting.torch_dtype, **parts)
    return _ready(loaded, setting, work)


def _ready(pipeline: Any, setting: Setting, work: Work) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _placed(part, setting, work)
    if setting.frugal:
        pipeline.enable_attention_slicing()
        pipeline.vae.enable_slicing()
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _placed(network: Any, setting: Setting, work: Work) -> Any:
    layout = torch.channels_last if setting.channels_last else torch.preserve_format
    return network.eval().to(work.device, memory_format=layout)


def _of_diffusers(name: str) -> Any:
    """A class of theirs, with no more imported of the package, which is large, than a script would import."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return getattr(diffusers, name)


@torch.inference_mode()
def run_fresh(told: Fresh) -> None:
    """Load as a script of theirs does, `from_single_file` where the model is one, then take steps or draw."""
    index = json.loads((told.folder / "model_index.json").read_text())
    kind = _of_diffusers(index["_class_name"])
    if told.file.is_file():
        pipeline = kind.from_single_file(
            str(told.file), config=str(told.folder), torch_dtype=told.setting.torch_dtype, local_files_only=True
        )
    else:
        pipeline = kind.from_pretrained(told.folder, torch_dtype=told.setting.torch_dtype)
    pipeline = _ready(pipeline, told.setting, told.work)
    if told.task == "picture":
        _picture_of(pipeline, told.work)()
        told.tell(time.monotonic() - told.begun)
        return
    run = _step_of(pipeline.unet, told.folder, told.setting, told.work)
    run().cpu()
    first = time.monotonic()
    run().cpu()
    told.tell(2 * first - time.monotonic() - told.begun)


if __name__ == "__main__":
    task = Fresh.from_json(sys.argv[1])
    torch.set_num_threads(task.threads)
    run_fresh(task)
