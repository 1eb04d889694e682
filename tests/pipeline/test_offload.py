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
from ldm.layers.convolution import fastest_layout
from ldm.layers.sharing import shared_copy, weights_of
from ldm.models.compiled import BlockCompiler
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.offloading import BLOCKS, Offload, block_by_block, here
from ldm.models.presets import SystemConfig, sd1, sd2_unclip, sdxl, sdxl_refiner, small_decoder, tiny
from ldm.models.unet import UNet
from ldm.pipeline import plan, sample
from ldm.pipeline.device import Precision
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.live_memory import DEVICE, LiveMemory, no_scratch
from ldm.pipeline.load import Room, load, random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.plan import Phase, Work, tensors_of
from ldm.pipeline.request import Control, GenerateRequest

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


def away_tensor(tensor: Tensor) -> Tensor:
    """The same tensor, elsewhere."""
    return tensor.detach().as_subclass(Away)  # pyright: ignore[reportArgumentType]


def away(network: Any) -> Any:
    """The same network with all its weights elsewhere."""
    if not isinstance(network, nn.Module):
        return network
    network = shared_copy(network)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else away_tensor(tensor)
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
    assert asked == ["parts", "parts", "blocks"]  # two pictures at once again
    monkeypatch.undo()
    for one, other in zip(text_to_image(plain), found, strict=True):
        assert np.array_equal(np.array(one.image), np.array(other.image))
        assert "offload blocks: with whole networks there was no memory left" in other.notes


def test_blocks_of_a_unet_do_not_help_where_decoding_finds_no_memory(monkeypatch):
    asked: list[Offload] = []
    denoising = LatentDiffusion.denoising
    monkeypatch.setattr(
        LatentDiffusion, "denoising", lambda self, net: (asked.append(self.offload), denoising(self, net))[1]
    )

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(sample, "decode", full)
    with pytest.raises(LdmError, match="no memory left on cpu for one picture"):
        text_to_image(waiting(random_system(tiny(sd1())), "parts"))
    assert asked == ["parts", "parts"]


@pytest.mark.parametrize(("free", "expected"), [(9.5, "none"), (6.0, "parts"), (2.0, "blocks"), (0.5, "blocks")])
def test_a_gpu_gets_as_little_as_has_to_wait(monkeypatch, free: float, expected: Offload):
    config = sdxl()
    half = Precision(torch.float16, torch.float16, torch.float16)
    work = Work(config, tensors_of(config), torch.device("cuda"), half, 1024, 1024)
    monkeypatch.setattr(plan, "available_memory", lambda device: int(free * 2**30))
    offload, why = plan.choose_offload(work, Room())
    assert offload == expected
    assert why == "" if expected == "none" else "none takes " in why and f"{free} GiB are free" in why


@pytest.mark.parametrize(
    ("asked", "beside", "adapted", "expected"),
    [
        ([], 0, False, "none"),
        ([], 0, True, "parts"),
        ([], 3, False, "parts"),
        ([{}], 3, False, "parts"),
        ([{"width": 512, "height": 512}], 3, False, "none"),
        ([{"width": 512, "height": 512}, {}], 3, False, "parts"),
        ([{"width": 512, "height": 512}, {"highres": {"scale": 2.0}}], 0, False, "blocks"),
        ([{"width": 512, "height": 512, "highres": {"scale": 2.0}}], 2, False, "none"),
    ],
)
def test_what_is_asked_for_and_what_is_beside_has_to_fit(
    monkeypatch, asked, beside: int, adapted: bool, expected: Offload
):
    """Of 10 GiB 9 may be planned with; a picture of a million pixels takes 2 GiB, and the networks 5, 3 or 1."""

    def planned(work: Work) -> tuple[Phase, ...]:
        networks = {"none": 5, "parts": 3, "blocks": 1}[work.offload]
        assert work.vae_tile is not None  # it is decoded in tiles where it must be
        networks += 5 if work.adapted and work.offload == "none" else 0
        return (Phase("denoise", networks * 2**30 + 2**11 * work.width * work.height),)

    config = tiny(sdxl())
    half = Precision(torch.float16, torch.float16, torch.float16)
    work = Work(replace(config, size=1024), tensors_of(config), torch.device("cuda"), half, 1024, 1024)
    monkeypatch.setattr(plan, "available_memory", lambda device: 10 * 2**30)
    monkeypatch.setattr(plan, "plan_drawing", planned)
    monkeypatch.setattr(plan, "_plenty", lambda work: 2**40)
    requests = [GenerateRequest(prompt="", **fields) for fields in asked]
    assert plan.choose_offload(work, Room(requests, beside * 2**30, adapted))[0] == expected


def test_a_model_goes_to_wait_and_comes_back():
    plain = with_lines(random_system(tiny(sd1())))
    there = replace(waiting(plain, "none"), device=ELSEWHERE, originals={"a": away_tensor(torch.ones(2))})
    waits = there.offloaded("parts")
    assert (waits.offload, waits.home) == ("parts", torch.device("cpu"))
    networks = [(m.unet, m.autoencoder, *m.text, m.controls["lines"]) for m in (plain, waits)]
    for one, other in zip(*networks, strict=True):
        for mine, copied in zip(weights_of(one), weights_of(other), strict=True):
            assert not isinstance(copied.data, Away) and torch.equal(mine, copied)
    assert waits.originals["a"].device.type == "cpu"
    with pytest.raises(LdmError, match="offload: found 'auto', expected none, parts or blocks"):
        there.offloaded("auto")  # pyright: ignore[reportArgumentType]


def test_blocks_that_come_and_go_are_not_compiled():
    model = replace(random_system(tiny(sd1())), device=ELSEWHERE)
    with pytest.raises(LdmError, match="offload blocks: the blocks of a compiled model must stay"):
        replace(model, compiler=BlockCompiler("eager")).offloaded("blocks")
    with pytest.raises(LdmError, match="compile: found offload blocks"):
        replace(model, offload="blocks").compiled("eager")


def test_a_refiner_is_where_the_model_is():
    model, refiner = random_system(tiny(sdxl())), random_system(tiny(sdxl_refiner()))
    with pytest.raises(LdmError, match="refiner: found on cuda:0, expected cpu"):
        model.with_refiner(replace(refiner, device=ELSEWHERE))


def test_weights_are_laid_out_for_the_device_that_computes():
    weight = torch.empty(1280, 1280, 3, 3)
    assert not fastest_layout(weight).is_contiguous()  # for products on a CPU
    assert fastest_layout(weight, ELSEWHERE).is_contiguous()


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
    without_weights = nn.Identity()
    assert here(without_weights, ELSEWHERE) is without_weights


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
    with pytest.raises(LdmError, match="offload: found 'all', expected none, parts or blocks"):
        load(file, device="cpu", offload="all")  # pyright: ignore[reportArgumentType]
