"""Models whose weights wait elsewhere. That elsewhere is played here by tensors that no kernel takes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.layers.sharing import shared_copy
from ldm.models.compiled import BlockCompiler
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.offloading import BLOCKS, Offload, block_by_block, here
from ldm.models.presets import SystemConfig, sd1, sd2_unclip, sdxl, sdxl_refiner, small_decoder, tiny
from ldm.models.unet import UNet
from ldm.pipeline import plan
from ldm.pipeline.device import Precision
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.live_memory import DEVICE, LiveMemory, no_scratch
from ldm.pipeline.load import load, random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.plan import Work, tensors_of
from ldm.pipeline.request import Control

ELSEWHERE = torch.device("cuda:0")


class Away(Tensor):
    """A tensor on another device: it may be looked at and copied to this one, and nothing else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        if func == DEVICE:
            return ELSEWHERE
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.detach:
                return args[0]
            if func is Tensor.to:
                return args[0].as_subclass(Tensor).clone()
            if getattr(func, "__name__", "") in ("__get__", "is_floating_point", "element_size", "numel"):
                return func(*args, **(kwargs or {}))
        raise AssertionError(f"{func} was given a weight that lies elsewhere")


def away(network: Any) -> Any:
    """The same network with all its weights elsewhere."""
    if not isinstance(network, nn.Module):
        return network
    network = shared_copy(network)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else tensor.detach().as_subclass(Away)  # pyright: ignore
    return network


def waiting(model: LatentDiffusion, offload: Offload) -> LatentDiffusion:
    """The model with everything elsewhere, and the CPU in the role of the GPU."""
    return replace(
        model,
        offload=offload,
        unet=away(model.unet),
        autoencoder=away(model.autoencoder),
        text=tuple(away(tower) for tower in model.text),
        image=away(model.image),
        augmentor=away(model.augmentor),
        image_tokens=away(model.image_tokens),
        controls={name: away(network) for name, network in model.controls.items()},
        refiner=None if model.refiner is None else waiting(model.refiner, offload),
    )


def a_picture(side: int = 64) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def text_to_image(model: LatentDiffusion) -> list[Picture]:
    return model.generate("a cat", negative="a dog", count=2, steps=3, seed=1)


def image_to_image(model: LatentDiffusion) -> list[Picture]:
    return model.image_to_image("a cat", a_picture(), steps=4, strength=0.5, seed=1)


def inpainted(model: LatentDiffusion) -> list[Picture]:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return model.inpaint("a cat", a_picture(), mask, steps=2, seed=1)


def twice_as_large(model: LatentDiffusion) -> list[Picture]:
    return model.generate("a cat", steps=3, seed=1, highres={"scale": 2.0, "upscale": "lanczos"})


def varied(model: LatentDiffusion) -> list[Picture]:
    return model.variations("a cat", a_picture(), steps=2, seed=1)


def changed_by_words(model: LatentDiffusion) -> list[Picture]:
    return model.textdiff(a_picture(), "a cat", "a dog", frames=2, steps=2, seed=1)


def controlled(model: LatentDiffusion) -> list[Picture]:
    control = Control(network="lines", image=a_picture())
    return model.generate("a cat", steps=3, seed=1, controls=[control], reuse=2, merge_tokens=0.5)


def refined(model: LatentDiffusion) -> list[Picture]:
    return model.generate("a cat", steps=4, seed=1, refine_at=0.5)


def with_lines(model: LatentDiffusion) -> LatentDiffusion:
    torch.manual_seed(3)
    network = ControlNet(ControlNetConfig(model.config.unet)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # no zero convolutions
    return replace(model, controls={"lines": network})


CASES: dict[str, tuple[SystemConfig, Callable[[LatentDiffusion], list[Picture]]]] = {
    "text": (sd1(), text_to_image),
    "picture": (sd1(), image_to_image),
    "mask": (sd1(in_channels=9), inpainted),
    "larger": (sd1(), twice_as_large),
    "control": (sd1(), controlled),
    "refiner": (sdxl(), refined),
    "unclip": (sd2_unclip(), varied),
    "decoder": (small_decoder(), varied),
    "words": (small_decoder(), changed_by_words),
}


@pytest.mark.parametrize("offload", ["parts", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_pictures_are_the_same_bit_for_bit(case: str, offload: Offload):
    config, draw = CASES[case]
    model = random_system(tiny(config))
    if case == "refiner":
        model = model.with_refiner(random_system(tiny(sdxl_refiner())))
    if case == "control":
        model = with_lines(model)
    expected, found = draw(model), draw(waiting(model, offload))
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(np.array(one.image), np.array(other.image))


def test_weights_elsewhere_are_not_computed_with():
    model = random_system(tiny(sd1()))
    with pytest.raises(AssertionError, match="lies elsewhere"):
        away(model.autoencoder).decode(torch.zeros(1, 4, 8, 8))


def bytes_of(network: Any) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def held(run: Callable[[], Any]) -> int:
    """The most bytes of new tensors while something runs."""
    with torch.inference_mode(), LiveMemory(no_scratch) as memory:
        run()
    return memory.peak


def test_one_network_is_there_at_a_time_and_one_block():
    model = random_system(tiny(sd1(), width=128))
    sizes = [bytes_of(network) for network in (model.unet, model.autoencoder, *model.text)]
    blocks = [bytes_of(block) for block in model.unet.modules() if isinstance(block, BLOCKS)]
    drawing = held(lambda: text_to_image(model))

    def peak(offload: Offload) -> int:
        return held(lambda: text_to_image(waiting(model, offload))) - drawing

    parts, in_blocks = peak("parts"), peak("blocks")
    assert max(sizes) * 0.95 < parts < max(sizes) * 1.05 < sum(sizes) * 0.8
    rest = sizes[0] - sum(blocks)
    assert in_blocks < max(rest + max(blocks), *sizes[1:]) * 1.05
    assert in_blocks < parts


@pytest.mark.parametrize("compiled", [False, True])
def test_without_memory_for_whole_networks_they_come_in_blocks(monkeypatch, compiled: bool):
    plain = random_system(tiny(sd1()))
    model = waiting(plain, "parts")
    if compiled:
        model = replace(model, compiler=BlockCompiler("eager"))
    asked: list[Offload] = []

    def scarce(model: LatentDiffusion, network: UNet) -> UNet:
        asked.append(model.offload)
        if model.offload == "parts":
            raise torch.OutOfMemoryError("out of memory")
        return block_by_block(network, model.device)

    monkeypatch.setattr(LatentDiffusion, "denoising", scarce)
    if compiled:
        with pytest.raises(LdmError, match="no memory left on cpu for one picture of 64x64"):
            text_to_image(model)
        assert asked == ["parts", "parts"]  # two pictures, then one
        return
    found = text_to_image(model)
    assert asked == ["parts", "parts", "blocks", "blocks"]
    monkeypatch.undo()
    for one, other in zip(text_to_image(plain), found, strict=True):  # two in a batch, and one after another
        assert np.allclose(np.array(one.image, dtype=int), np.array(other.image), atol=1)
        assert "offload blocks: with whole networks there was no memory left" in other.notes


@pytest.mark.parametrize(("free", "expected"), [(9.5, "none"), (6.0, "parts"), (2.0, "blocks"), (0.5, "blocks")])
def test_a_gpu_gets_as_little_as_has_to_wait(monkeypatch, free: float, expected: Offload):
    config = sdxl()
    half = Precision(torch.float16, torch.float16, torch.float16)
    work = Work(config, tensors_of(config), torch.device("cuda"), half, 1024, 1024)
    monkeypatch.setattr(plan, "available_memory", lambda device: int(free * 2**30))
    offload, why = plan.choose_offload(work)
    assert offload == expected
    assert why == "" if expected == "none" else "none takes " in why and f"{free} GiB are free" in why


def test_blocks_leave_the_network_as_it_is():
    unet = random_system(tiny(sd1())).unet
    kinds = [type(module) for module in unet.modules()]
    visiting = block_by_block(unet, torch.device("cpu"))
    assert [type(module) for module in unet.modules()] == kinds
    shared = {id(tensor) for tensor in unet.parameters()}
    mine = [isinstance(module, BLOCKS) for module in visiting.modules()]
    assert sum(mine) == sum(isinstance(module, BLOCKS) for module in unet.modules()) > 0
    for module, is_block in zip(visiting.modules(), mine, strict=True):
        if is_block:
            assert all(id(tensor) in shared for tensor in module.parameters())
    with pytest.raises(ValueError, match="no blocks"):
        block_by_block(nn.Linear(2, 2), torch.device("cpu"))


def test_what_is_there_is_not_copied():
    network = nn.Linear(2, 2)
    assert here(network, torch.device("cpu")) is network
    assert here(nn.Identity(), ELSEWHERE).training  # has no weights to bring


@pytest.fixture
def file(tiny_file) -> Iterator[Any]:
    yield tiny_file(tiny(sd1()))


def test_on_a_cpu_there_is_nowhere_to_wait(file):
    for offload in ("parts", "blocks"):
        with pytest.raises(LdmError, match=f"offload {offload}: the model runs on the CPU"):
            load(file, device="cpu", offload=offload)
        with pytest.raises(LdmError, match=f"offload {offload}: the model runs on the CPU"):
            load(file, device="cpu").offloaded(offload)
    assert load(file, device="cpu").offload == "none"
    with pytest.raises(LdmError, match="offload: found 'all', expected auto, none, parts or blocks"):
        load(file, device="cpu", offload="all")  # pyright: ignore[reportArgumentType]
