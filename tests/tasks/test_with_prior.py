"""Text -> prior -> decoder: what the decoder is told, in every way of drawing, and that it can be made again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.presets import sd1, sd2_unclip, small_decoder, tiny
from ldm.models.prior import Codes, Prior, PriorConfig
from ldm.models.text_encoder import OpenCLIPText
from ldm.pipeline.clip.prior import OWN_NOISE, image_embeddings, plain_words, tell
from ldm.pipeline.clip.unclip import as_told
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.metadata.infotext import parse
from ldm.pipeline.metadata.infotext_fields import remake_of
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.request import GenerateRequest, HighRes, PriorUse
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks import run
from ldm.types import Conditioning
from ldm.weights.prior import clip_mark, save_prior

CONFIG = PriorConfig(projection=32, text_width=32, width=32, layers=1, heads=2)
USE = PriorUse(steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def decoder() -> LatentDiffusion:
    return random_system(tiny(small_decoder()))


def prior(seed: int = 1, **changes: Any) -> Prior:
    torch.manual_seed(seed)
    return Prior(replace(CONFIG, **changes)).eval()


@pytest.fixture(scope="module")
def model(decoder: LatentDiffusion) -> LatentDiffusion:
    return decoder.with_prior(prior())


def asking(**fields: Any) -> GenerateRequest:
    given = {"prompt": "a pear", "steps": 2, "sampler": "euler", "seed": 5, "width": 64, "height": 64, "prior": USE}
    return GenerateRequest(**(given | fields))


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image)


def expected(model: LatentDiffusion, words: str, seed: int) -> Tensor:
    """The embedding as the library's parts make it, one by one."""
    assert model.prior is not None
    told = tell(model.prior.network, model.text[0], model.config.text[0], [words])
    return image_embeddings(model.prior.network, told, seed=seed ^ OWN_NOISE, guidance=3.0, steps=3, choose=2)


def told_to_the_unet(model: LatentDiffusion, request: GenerateRequest) -> list[Conditioning]:
    told: list[Conditioning] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        told.append(cond)
        return model.unet(x, timestep, cond)

    list(run(replace(model, unet=watching), request))  # pyright: ignore[reportArgumentType]
    return told


def test_the_decoder_is_told_what_the_prior_makes_of_the_plain_words(model):
    request = asking(prompt="a (pear:1.4), [green]", negative="blurry", guidance=4.0)
    wanted = model.tell_image(model.encode_prompt(request.prompt), expected(model, "a pear , green", 5))
    for cond in told_to_the_unet(model, request):
        assert cond.vector is not None and cond.cross is not None
        torch.testing.assert_close(cond.vector[:1], wanted.vector)
        torch.testing.assert_close(cond.cross[:1], wanted.cross)
        torch.testing.assert_close(cond.vector[1:], model.encode_prompt("blurry").vector)


@pytest.mark.parametrize(
    ("prompt", "emphasis", "words"),
    [
        ("a (red:1.2) apple BREAK on [a] table", "a1111", "a red apple on a table"),
        (r"a \(red\) apple", "no-norm", "a (red) apple"),
        ("a (red:1.2) apple", "literal", "a (red:1.2) apple"),
        ("a (red:1.2) apple BREAK", "comfy", "a red apple BREAK"),
        ("a red++ apple", "compel", "a red apple"),
        ("", "a1111", ""),
    ],
)
def test_plain_words(prompt, emphasis, words):
    assert plain_words(prompt, emphasis) == words


def test_each_text_of_a_prompt_has_an_embedding_of_its_own(model):
    """One that changes on the way, and two that guide together; both from the picture's one seed."""
    first, second = told_to_the_unet(model, asking(prompt="a [pear:plum:0.5]", guidance=1.0))
    for cond, words in ((first, "a pear"), (second, "a plum")):
        wanted = model.tell_image(model.encode_prompt(words), expected(model, words, 5))
        torch.testing.assert_close(cond.vector, wanted.vector)
    (both, *_) = told_to_the_unet(model, asking(prompt="a pear AND a plum"))
    assert both.vector is not None and len(both.vector) == 3
    assert not torch.allclose(both.vector[0, 32:64], both.vector[1, 32:64], atol=0.1)


def test_a_picture_of_several_is_that_of_its_seed_alone(model):
    events = list(run(model, asking(count=2)))
    first, second = (event for event in events if isinstance(event, Picture))
    assert [first.index, second.index] == [0, 1] and [first.batch, second.batch] == [(0, 1)] * 2
    assert {event.first for event in events if isinstance(event, Progress)} == {0, 1}
    assert np.array_equal(pixels(second), pixels(model.generate(asking(seed=6))[0]))
    assert not np.array_equal(pixels(first), pixels(second))
    row, other = (model.generate(asking(rng="comfy", batch_index=place))[0] for place in (0, 1))
    assert not np.array_equal(pixels(row), pixels(other))


def test_it_draws_in_other_ways_too(model):
    """From a picture, within a mask, with a second pass, and beside a refiner, which is told the text alone."""
    picture = picture_bytes(Image.linear_gradient("L").resize((64, 64)))
    mask = picture_bytes(Image.new("L", (64, 64), 255))
    for fields in ({"image": picture}, {"image": picture, "mask": mask}, {"highres": HighRes(scale=1.5, strength=0.5)}):
        (with_it,), (without,) = model.generate(asking(**fields)), model.generate(asking(prior=None, **fields))
        assert not np.array_equal(pixels(with_it), pixels(without))
        assert not [note for note in with_it.notes if "varies pictures" in note]
    refined = model.with_refiner(random_system(tiny(sd1()), seed=1)).generate(asking(refine_at=0.5))
    assert len(refined) == 1


def test_an_autoregressive_prior_does_as_well(decoder):
    torch.manual_seed(1)
    spelling = AutoregressivePrior(replace(CONFIG, codes=Codes(components=4, buckets=8, similarities=4))).eval()
    model = decoder.with_prior(spelling)
    one, again = (model.generate(asking())[0] for _ in range(2))
    assert np.array_equal(pixels(one), pixels(again))


def test_settings_change_the_picture_and_are_kept(model, tmp_path):
    (usual,) = model.generate(asking())
    for use in (PriorUse(steps=5, guidance=3.0), PriorUse(steps=3, guidance=9.0), PriorUse(steps=3, choose=5)):
        assert not np.array_equal(pixels(model.generate(asking(prior=use))[0]), pixels(usual))
    found = read_metadata(usual.save(tmp_path / "a.png"))
    remake = found.remake()
    assert remake is not None and found.parameters is not None
    assert remake.request().prior == USE
    assert np.array_equal(pixels(model.generate(remake.request())[0]), pixels(usual))
    text = parse(found.parameters)
    assert text.settings["Prior CFG scale"] == "3" and text.settings["Prior steps"] == "3"
    assert remake_of(text).request().prior == USE, "from the text alone as well"


def test_the_file_is_named(decoder, tmp_path):
    save_prior(tmp_path / "mine.safetensors", prior())
    model = decoder.with_prior(tmp_path / "mine.safetensors")
    (picture,) = model.generate(asking())
    assert [(part.kind, part.name) for part in picture.parts] == [("prior", "mine.safetensors")]
    assert model.generate(asking(prior=None))[0].parts == ()
    found = read_metadata(picture.save(tmp_path / "a.png"))
    assert found.record is not None and found.parameters is not None
    assert found.record["parts"] == [{"kind": "prior", "name": "mine.safetensors", "hash": picture.parts[0].hash}]
    text = parse(found.parameters)
    assert text.settings["Prior"] == f"mine [{picture.parts[0].hash}]"
    assert any(miss.startswith("Prior: ") for miss in remake_of(text).misses)


def test_an_embedding_has_the_length_that_the_model_is_told(decoder):
    """Ours sqrt(P); SD 2.1 unCLIP the root mean square of those that it was trained on."""
    vectors = torch.randn(3, 32)
    torch.testing.assert_close(as_told(decoder, vectors).norm(dim=1), torch.full((3,), 32**0.5))
    theirs = random_system(tiny(sd2_unclip()))
    assert theirs.augmentor is not None and theirs.config.image is not None
    width = theirs.config.image.tower.projection
    mean, std = torch.full((1, width), 0.3), torch.linspace(0.5, 2, width)[None]
    theirs.augmentor.data_mean, theirs.augmentor.data_std = mean, std
    drawn = mean + std * torch.randn(20_000, width)
    length = float(drawn.square().sum(dim=1).mean().sqrt())
    assert float(as_told(theirs, vectors[:, :1].expand(-1, width)).norm(dim=1)[0]) == pytest.approx(length, rel=0.01)


def test_what_is_refused(decoder, model, tmp_path):
    with pytest.raises(LdmError, match="prior: found with a model that has none, expected one; give it by --prior"):
        decoder.generate(asking())
    picture = picture_bytes(Image.new("RGB", (64, 64)))
    with pytest.raises(LdmError, match="prior: found together with vary, expected one of them"):
        asking(vary=picture)
    with pytest.raises(LdmError, match=r"model: is told no CLIP embeddings, .* expected this package's decoder"):
        random_system(tiny(sd1())).with_prior(prior())
    with pytest.raises(LdmError, match="prior: the text tower is 32 wide with a projection to 32, expected 32 to 16"):
        decoder.with_prior(prior(projection=16))
    tower = decoder.text[0]
    assert isinstance(tower, OpenCLIPText) and tower.text_projection is not None
    assert decoder.with_prior(prior(clip=clip_mark(tower.text_projection))).prior is not None
    save_prior(tmp_path / "other.safetensors", prior(clip=clip_mark(-tower.text_projection)))
    with pytest.raises(LdmError, match=r"other\.safetensors: prior: it was trained for another CLIP than this model's"):
        decoder.with_prior(tmp_path / "other.safetensors")
    with pytest.raises(LdmError, match=r"missing\.safetensors"):
        decoder.with_prior(tmp_path / "missing.safetensors")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"guidance": 51.0}, "prior: guidance: found 51.0, expected a number from 0 to 50"),
        ({"steps": 0}, "prior: steps: found 0, expected a whole number from 1 to 1000"),
        ({"choose": 65}, "prior: choose: found 65, expected a whole number from 1 to 64"),
    )
    for fields, message in wrong:
        with pytest.raises(LdmError, match=message):
            PriorUse(**fields)
