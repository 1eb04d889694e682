"""Diffusers' folders: diffusers loads what we write and draws the same pictures, and we read what diffusers writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.diffusion.state import finish_state
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sd_x4_upscaler, sdxl, sdxl_refiner, small, tiny
from ldm.models.unet import UNet
from ldm.pipeline.load import load
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import run
from ldm.weights.detect import detect
from ldm.weights.diffusers_write import held_config, write_component, write_folder
from ldm.weights.io import TensorInfo
from ldm.weights.layout import FIRST_STAGE, UNET
from ldm.weights.source import Source, open_source

WITHOUT_POOLED = replace(
    small(),
    unet=replace(small().unet, vector_width=None),
    text=tuple(replace(use, pooled=False) for use in small().text),
)

SYSTEMS: dict[str, SystemConfig] = {
    "sd1": tiny(sd1()),
    "sd1-inpainting": tiny(sd1(9)),
    "sd2-v": tiny(sd2("v")),
    "sd2-inpainting": tiny(sd2(in_channels=9)),
    "sdxl": replace(tiny(sdxl()), prediction="v", zero_terminal_snr=True),
    "sdxl-inpainting": tiny(sdxl(9)),
    "sdxl-refiner": tiny(sdxl_refiner()),
    "upscaler": tiny(sd_x4_upscaler()),
    "ours-without-pooled-text": tiny(WITHOUT_POOLED),
}
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-v": "StableDiffusionPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpainting": "StableDiffusionXLInpaintPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
    "ours-without-pooled-text": "StableDiffusionPipeline",
}


@pytest.fixture(scope="module")
def folders(tiny_file: Callable[[SystemConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a system -> its single file and the folder that we wrote of it."""
    root, written = tmp_path_factory.mktemp("folders"), {}

    def folder(name: str) -> tuple[Path, Path]:
        if name not in written:
            source = open_source(single := tiny_file(SYSTEMS[name]))
            left = write_folder(root / name, source, detect(source).config)
            written[name] = single, root / name, left
        return written[name][:2]

    return folder


def tensors(source: Source) -> dict[str, Tensor]:
    return dict(source.read(source.tensors))


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def held(single: Path, config: SystemConfig) -> dict[str, Tensor]:
    """What a folder holds of a file: all but the text blocks behind the states that are used, and the projection."""
    everything = tensors(open_source(single))
    if config.sizes_in_vector:
        return everything
    (use,), (cut,) = config.text, held_config(config).text
    dropped = tuple(f"resblocks.{index}." for index in range(cut.tower.layers, use.tower.layers))
    return {
        name: t for name, t in everything.items() if not any(part in name for part in (*dropped, "text_projection"))
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_writes(name: str, folders: Any, tmp_path: Path) -> None:
    single, folder = folders(name)
    expected = held(single, SYSTEMS[name])
    assert_equal(tensors(open_source(folder)), expected)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float16)
    assert type(pipeline).__name__ == PIPELINES[name]
    pipeline.save_pretrained(tmp_path / "again")
    assert_equal(tensors(open_source(tmp_path / "again")), expected)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_known_of_a_system_comes_back(name: str, folders: Any) -> None:
    _, folder = folders(name)
    source = open_source(folder)
    assert detect(source).config == held_config(SYSTEMS[name])
    if name not in (
        "ours-without-pooled-text",
        "upscaler",
    ):  # whose norms, schedule or scale no file of diffusers' tells us
        others = replace(source, metadata={})
        assert detect(others).config == held_config(SYSTEMS[name])


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl", "ours-without-pooled-text"])
def test_their_picture_is_ours(name: str, folders: Any) -> None:
    """Their pipeline, started from our folder with the scheduler that it names, ends at our latents."""
    single, folder = folders(name)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    spacing = "trailing" if SYSTEMS[name].zero_terminal_snr else "leading"
    request = GenerateRequest(
        prompt="a red apple, isn't it?", negative="blurry", width=64, height=64, steps=8, guidance=4.0, seed=5,
        sampler="euler" if name == "sdxl" else "ddim", schedule=spacing,
    )  # fmt: skip
    theirs = pipeline(
        prompt=request.prompt, negative_prompt=request.negative, width=64, height=64, num_inference_steps=8,
        guidance_scale=4.0, generator=torch.Generator().manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    for path in (single, folder):
        ours = latents(path, request)
        scale = float(theirs.abs().max())
        assert scale > 0.1
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale)


def latents(path: Path, request: GenerateRequest) -> Tensor:
    steps = [event.step for event in run(load(path, dtype="float32"), request) if isinstance(event, Progress)]
    assert steps[-1] is not None
    return finish_state(steps[-1].x, steps[-1].sigma_next)


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl"])
def test_their_single_file_reader_takes_our_folder_as_config(name: str, folders: Any) -> None:
    single, folder = folders(name)
    kind = getattr(diffusers, PIPELINES[name])
    pipeline = kind.from_single_file(single, config=str(folder), local_files_only=True, torch_dtype=torch.float16)
    assert_equal(pipeline.unet.state_dict(), load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
    assert_equal(pipeline.vae.state_dict(), load_file(folder / "vae/diffusion_pytorch_model.safetensors"))
    assert pipeline.scheduler.config.prediction_type == ("epsilon" if name == "sd1" else "v_prediction")


def test_shards_variants_and_older_names(folders: Any, tmp_path: Path) -> None:
    single, folder = folders("sd1")
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float16)
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="1MB", variant="fp16")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder", variant="fp16")
    (tmp_path / "vae").mkdir()
    autoencoder = {former(name): t for name, t in pipeline.vae.state_dict().items()}
    save_file(autoencoder, tmp_path / "vae/diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert_equal(tensors(open_source(tmp_path)), held(single, SYSTEMS["sd1"]))


def former(name: str) -> str:
    for new, old in {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}.items():
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl"])
def test_each_network_alone(name: str, folders: Any) -> None:
    single, folder = folders(name)
    expected = held(single, SYSTEMS[name])
    prefixes = {"unet": UNET, "vae": FIRST_STAGE}
    for part in ("unet", "vae", *(path.name for path in folder.glob("text_encoder*"))):
        (file,) = (folder / part).glob("*.safetensors")
        found = tensors(open_source(file))
        prefix = prefixes.get(part, "cond_stage_model.")
        if name == "sdxl" and part.startswith("text"):  # a tower alone does not tell that it is one of SDXL's
            found = {f"conditioner.embedders.{'_2' in part:d}.{n.removeprefix(prefix)}": t for n, t in found.items()}
            prefix = f"conditioner.embedders.{'_2' in part:d}."
        assert_equal(found, {n: t for n, t in expected.items() if n.startswith(prefix)})
        assert_equal(tensors(open_source(folder / part)), dict(open_source(file).read(open_source(file).tensors)))


def test_an_autoencoder_alone_is_written(tiny_file: Callable[[SystemConfig], Path], tmp_path: Path) -> None:
    source = open_source(tiny_file(SYSTEMS["sdxl"]))
    config = SYSTEMS["sdxl"].autoencoder
    left = write_component(tmp_path / "vae", source, FIRST_STAGE, config)
    assert f"{UNET}out.2.weight" in left
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", local_files_only=True, torch_dtype=torch.float16)
    assert theirs.config.scaling_factor == config.scale_factor
    back = open_source(tmp_path / "vae")
    assert_equal(tensors(back), {n: t for n, t in tensors(source).items() if n.startswith(FIRST_STAGE)})
    assert back.facts["scale_factor"] == "0.13025"


@pytest.mark.parametrize(("width", "form"), [(2048, "projection"), (2816, None)])
def test_a_unet_alone_has_the_form_that_its_vector_asks_for(width: int, form: str | None, tmp_path: Path) -> None:
    """unCLIP's vector is a picture's embedding, SDXL's pooled text and sizes: diffusers has a place for each."""
    config = replace(tiny(sd2()).unet, vector_width=width)
    unet = {UNET + name: tensor for name, tensor in UNet(config).state_dict().items()}
    infos = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in unet.items()}
    source = Source(tmp_path, infos, {}, lambda names: ((name, unet[name]) for name in names))
    write_component(tmp_path / "unet", source, UNET, config)
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "unet", local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.class_embed_type == form
    embedding = theirs.add_embedding if form is None else theirs.class_embedding
    assert torch.equal(embedding.linear_1.weight, unet[f"{UNET}label_emb.0.0.weight"])
    assert_equal(tensors(open_source(tmp_path / "unet")), unet)


def test_what_has_no_place_is_named(tiny_file: Callable[[SystemConfig], Path], tmp_path: Path) -> None:
    source = open_source(tiny_file(SYSTEMS["sd2-v"]))
    left = write_folder(tmp_path / "x", source, SYSTEMS["sd2-v"])
    assert len(left) == 13  # of the last text block 12, and the projection
    assert all(".resblocks.1." in name or name.endswith("text_projection") for name in left)


def test_a_system_that_diffusers_has_no_pipeline_for(tiny_file: Callable[[SystemConfig], Path], tmp_path: Path) -> None:
    config = tiny(small())
    with pytest.raises(LdmError, match=r"no folder of diffusers is written of ldm .* a vector of 32; choose a single"):
        write_folder(tmp_path / "x", open_source(tiny_file(config)), config)
    assert not (tmp_path / "x").exists()


def test_nothing_is_replaced_and_nothing_is_left_behind(folders: Any, tmp_path: Path) -> None:
    single, _ = folders("sd1")
    source, config = open_source(single), SYSTEMS["sd1"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(LdmError, match="exists already"):
        write_folder(tmp_path / "taken", source, config)

    def broken(names: Any) -> Any:
        raise LdmError("the disk is gone")

    with pytest.raises(LdmError, match="the disk is gone"):
        write_folder(tmp_path / "new", replace(source, read=broken), config)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_configs_are_plain_data(folders: Any, tmp_path: Path) -> None:
    """Keys that name code, and values of a wrong kind, are not looked at."""
    _, folder = folders("sd1")
    (tmp_path / "unet").mkdir()
    weights = "unet/diffusion_pytorch_model.safetensors"
    (tmp_path / weights).write_bytes((folder / weights).read_bytes())
    config = {"auto_map": {"X": "evil.X"}, "_target_": "os.system", "attention_head_dim": "x", "block_out_channels": 3}
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    assert open_source(tmp_path / weights).facts == {}
    (tmp_path / "unet/config.json").write_text("[1]")
    with pytest.raises(LdmError, match=r"config\.json"):
        open_source(tmp_path / weights)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="model_index"):
        open_source(tmp_path)
    (tmp_path / "unet").mkdir()
    with pytest.raises(LdmError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        open_source(tmp_path)
