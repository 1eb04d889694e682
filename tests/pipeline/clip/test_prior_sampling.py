"""From texts to embeddings, and the file that a prior lies in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.guidance import Told
from ldm.errors import LdmError
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.presets import small, tiny
from ldm.models.prior import Codes, Prior, PriorConfig
from ldm.models.text_encoder import CLIPText, OpenCLIPText, TextConfig
from ldm.models.tokenizer import tokenize
from ldm.pipeline.clip.prior import SHIPPED_PRIOR, image_embeddings, load_prior, tell
from ldm.types import Conditioning
from ldm.weights.prior import PRIOR_KEY, clip_mark, save_prior
from ldm.weights.save import write_tensors

USE = tiny(small()).text[0]
CONFIG = PriorConfig(projection=32, text_width=32, width=32, layers=1, heads=2)
CODES = replace(CONFIG, codes=Codes(components=4, buckets=8, similarities=4))


@pytest.fixture(scope="module")
def tower() -> OpenCLIPText:
    torch.manual_seed(0)
    return OpenCLIPText(USE.tower).eval()


@pytest.fixture(scope="module", params=["diffusion", "autoregressive"])
def prior(request: pytest.FixtureRequest) -> Prior | AutoregressivePrior:
    torch.manual_seed(1)
    return Prior(CONFIG).eval() if request.param == "diffusion" else AutoregressivePrior(CODES).eval()


class Echo(Prior):
    """A prior that is sure of the picture's embedding: it is the text's vector."""

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        return self.to_unit(cond.vector)


def test_texts_are_told_as_the_tower_says_them(tower: OpenCLIPText) -> None:
    texts = ["a red car", "a small blue house beside a tree", ""]
    told = tell(Prior(CONFIG), tower, USE, texts, without="rain")
    ((cond, weight),) = told.parts
    assert weight == 1 and cond.cross is not None and cond.vector is not None and cond.words is not None
    with torch.no_grad():
        said = tower(torch.tensor([tokenize(t) for t in (*texts, "rain")]), USE.skip, pooled=True)
    assert said.pooled is not None
    lengths = [2 + 3, 2 + 7, 2]
    assert cond.words.sum(dim=1).tolist() == lengths and cond.cross.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        assert cond.words[row, :length].all()
        torch.testing.assert_close(cond.cross[row, :length], said.states[row, :length], rtol=1e-4, atol=1e-5)
    expected = F.normalize(said.pooled, dim=-1) * 32**0.5
    torch.testing.assert_close(cond.vector, expected[:3], rtol=1e-4, atol=1e-5)
    assert told.uncond is not None and told.uncond.vector is not None
    torch.testing.assert_close(told.uncond.vector, expected[3:].expand(3, -1), rtol=1e-4, atol=1e-5)


def test_an_embedding_depends_on_its_text_and_seed_alone(
    prior: Prior | AutoregressivePrior, tower: OpenCLIPText
) -> None:
    told = tell(prior, tower, USE, ["a red car", "two dogs"])
    both = image_embeddings(prior, told, seed=7, count=3, steps=4)
    assert both.shape == (6, 32) and both.dtype == torch.float32
    torch.testing.assert_close(both.norm(dim=1), torch.full((6,), 32**0.5))
    one = Told(((told.parts[0][0].select(slice(1, 2)), 1.0),), told.uncond.select(slice(1)) if told.uncond else None)
    alone = image_embeddings(prior, one, seed=7 + 4, steps=4)
    torch.testing.assert_close(alone[0], both[4], rtol=1e-3, atol=1e-3)
    assert (both[4] - both[3]).abs().max() > 0.01, "another seed, another picture"
    again = image_embeddings(prior, told, seed=7, count=3, steps=4)
    assert torch.equal(again, both)


def test_more_candidates_are_more_like_their_text(prior: Prior | AutoregressivePrior, tower: OpenCLIPText) -> None:
    told = tell(prior, tower, USE, ["a red car"])
    vector = told.parts[0][0].vector
    assert vector is not None
    means = [
        F.cosine_similarity(image_embeddings(prior, told, count=24, steps=2, choose=choose), vector).mean()
        for choose in (1, 2, 16)
    ]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "euler-a", "dpmpp-2m-sde"])
def test_guidance_leads_away_from_the_other_text(tower: OpenCLIPText, sampler: str) -> None:
    prior = Echo(CONFIG)
    prior.data_mean.normal_()
    prior.data_std.uniform_(0.5, 2.0)
    told = tell(prior, tower, USE, ["a red car"], without="two dogs")
    wanted, other = told.parts[0][0].vector, told.uncond and told.uncond.vector
    assert wanted is not None and other is not None
    for scale in (1.0, 3.0):
        expected = F.normalize(other + scale * (wanted - other), dim=-1) * 32**0.5
        found = image_embeddings(prior, told, guidance=scale, steps=6, choose=1, sampler=sampler)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_is_out_of_range_is_said(tower: OpenCLIPText) -> None:
    prior = Prior(CONFIG)
    told = tell(prior, tower, USE, ["a red car"])
    with pytest.raises(LdmError, match="count: found 0, expected 1 to"):
        image_embeddings(prior, told, count=0)
    with pytest.raises(LdmError, match="steps: found 1001, expected 1 to 1000"):
        image_embeddings(prior, told, steps=1001)
    with pytest.raises(LdmError, match="guidance: found nan, expected a finite number"):
        image_embeddings(prior, told, guidance=float("nan"))
    with pytest.raises(LdmError, match="sampler: found 'mine', expected one of ddim"):
        image_embeddings(prior, told, sampler="mine")


def test_a_tower_of_another_clip_is_refused(tower: OpenCLIPText) -> None:
    assert tower.text_projection is not None
    marked = Prior(replace(CONFIG, clip=clip_mark(tower.text_projection)))
    tell(marked, tower, USE, ["a"])
    rounded = OpenCLIPText(USE.tower)
    rounded.load_state_dict({name: t.bfloat16().float() for name, t in tower.state_dict().items()})
    tell(marked, rounded, USE, ["a"])
    with pytest.raises(LdmError, match="trained for another CLIP"):
        tell(marked, OpenCLIPText(USE.tower), USE, ["a"])
    with pytest.raises(LdmError, match="text tower is 32 wide with a projection to 32, expected 64 to 32"):
        tell(Prior(replace(CONFIG, text_width=64)), tower, USE, ["a"])
    with pytest.raises(LdmError, match="projection to nothing"):
        tell(marked, CLIPText(TextConfig(32, 1, 2)), USE, ["a"])


def test_a_file_gives_the_same_prior(prior: Prior | AutoregressivePrior, tower: OpenCLIPText, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    save_prior(path, prior, metadata={"modelspec.author": "somebody"})
    again = load_prior(path, device="cpu")
    assert again.config == prior.config and type(again) is type(prior)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in prior.state_dict().items())
    told = tell(prior, tower, USE, ["a red car"])
    assert torch.equal(image_embeddings(again, told, steps=2), image_embeddings(prior, told, steps=2))
    save_prior(path, prior, dtype=torch.float16)
    half = load_prior(path, device="cpu")
    assert {t.dtype for t in half.state_dict().values()} == {torch.float32}


def test_the_shipped_size_is_below_twelve_megabytes() -> None:
    with torch.device("meta"):
        tensors = Prior(PriorConfig()).state_dict().values()
    assert sum(2 * t.numel() for t in tensors) < 12e6
    assert SHIPPED_PRIOR.parent.name == "checkpoints"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 10**9, "a size is out of range"),
        ("width", 10**9, "a size is out of range"),
        ("heads", 3, "3 heads do not divide a width of 32"),
        ("heads", 0, "0 heads do not divide"),
        ("codes", {"components": 33}, "33 components of 32 numbers"),
        ("codes", {"components": 0}, "a size is out of range"),
        ("schedule", "mine", "noise schedule 'mine' is not known; expected"),
        ("width", "wide", "ldm.prior.width is 'wide'"),
        ("colour", 1, "unknown field 'colour'"),
        ("layers", 2, "resblocks.1.*is missing"),
        ("projection", 16, "expected"),
    ],
)
def test_a_file_that_lies_of_itself_is_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    described = {"projection": 32, "text_width": 32, "width": 32, "layers": 1, "heads": 2, field: value}
    write_tensors(path, Prior(CONFIG).state_dict(), {PRIOR_KEY: json.dumps(described)})
    with pytest.raises(LdmError, match=message) as caught:
        load_prior(path, device="cpu")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"missing\.safetensors"):
        load_prior(tmp_path / "missing.safetensors")
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(LdmError, match=r"is no prior: its metadata has no ldm\.prior"):
        load_prior(path)
    tensors = Prior(CONFIG).state_dict() | {"more": torch.zeros(1)}
    save = {PRIOR_KEY: '{"projection": 32, "text_width": 32, "width": 32, "layers": 1, "heads": 2}'}
    write_tensors(path, tensors, save)
    with pytest.raises(LdmError, match="more is not known"):
        load_prior(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LdmError, match=r"other\.safetensors"):
        load_prior(path)
