"""Text towers against open_clip's and transformers' own models, holding the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, get_model_config
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.models.presets import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H
from ldm.models.text_encoder import CLIPText, OpenCLIPText, TextConfig, text_tower
from ldm.models.tokenizer import END, tokenize

OPEN_CLIP = TextConfig(32, 3, 2, projection=24, names="open_clip", activation="gelu")
HUGGING_FACE = TextConfig(32, 3, 2)
TEXTS = ("", "a red apple", "a blue bird and a big green tree under the sky " * 9)
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)], ids=["float32", "float64"]
)
"""The second shows what float32 hides, such as the eps of a norm."""


@pytest.fixture(params=[0, END], ids=["padded with 0", "padded with the end"])
def ids(request) -> Tensor:
    return torch.tensor([tokenize(text, padding=request.param) for text in TEXTS])


def open_clip_model(config: TextConfig) -> CLIP:
    """open_clip's model with a text tower of these widths, and the least of image towers."""
    text = CLIPTextCfg(config.tokens, config.vocabulary, width=config.width, heads=config.heads, layers=config.layers)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=8)
    return CLIP(config.projection or config.width, vision, text, quick_gelu=config.activation == "quick_gelu")


def text_part(model: CLIP) -> dict[str, Tensor]:
    """The tensors of an open_clip model that its text tower holds."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith(("visual.", "logit_scale"))}


def hugging_face_config(config: TextConfig) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection,
    )


def on_disk(model: CLIPTextModel) -> dict[str, Tensor]:
    """transformers' tensors as checkpoints name them: some versions of it leave `text_model.` away."""
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.state_dict().items()}


@PRECISIONS
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.inference_mode()
def test_open_clip_tower_equals_open_clip(activation, ids, dtype, tolerance, randomize, relative_error):
    config = TextConfig(32, 3, 2, projection=24, names="open_clip", activation=activation)
    theirs, ours = randomize(open_clip_model(config)).to(dtype), OpenCLIPText(config).to(dtype)
    ours.load_state_dict(text_part(theirs))
    expected = theirs.encode_text(ids)
    for final_norm in (True, False):
        states = theirs.forward_intermediates(text=ids, normalize_intermediates=final_norm)["text_intermediates"]
        assert len(states) == config.layers
        for skip in range(config.layers):
            encoded = ours(ids, skip, final_norm, pooled=True)
            assert relative_error(encoded.states, states[-1 - skip]) < tolerance
            assert encoded.pooled is not None and relative_error(encoded.pooled, expected) < tolerance


@PRECISIONS
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.inference_mode()
def test_clip_tower_equals_transformers(activation, ids, dtype, tolerance, randomize, relative_error):
    config = TextConfig(32, 3, 2, activation=activation)
    theirs, ours = randomize(CLIPTextModel(hugging_face_config(config))).to(dtype), CLIPText(config).to(dtype)
    ours.load_state_dict(on_disk(theirs))
    expected = theirs(ids, output_hidden_states=True)
    assert relative_error(ours(ids).states, expected.last_hidden_state) < tolerance
    for skip in range(config.layers):
        raw = expected.hidden_states[-1 - skip]
        encoded = ours(ids, skip, final_norm=False, pooled=True)
        assert relative_error(encoded.states, raw) < tolerance
        assert relative_error(ours(ids, skip).states, theirs.final_layer_norm(raw)) < tolerance
        assert encoded.pooled is not None and relative_error(encoded.pooled, expected.pooler_output) < tolerance


@PRECISIONS
@torch.inference_mode()
def test_open_clip_tower_equals_the_projected_tower_of_diffusers(ids, dtype, tolerance, randomize, relative_error):
    """SDXL's second tower: diffusers holds it as transformers' CLIPTextModelWithProjection."""
    config = TextConfig(32, 3, 2, projection=32, names="open_clip", activation="gelu")
    ours = randomize(OpenCLIPText(config)).to(dtype)
    theirs = CLIPTextModelWithProjection(hugging_face_config(config)).eval().to(dtype)
    prefix = "conditioner.embedders.1.model."
    checkpoint = {prefix + name: tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(convert_open_clip_checkpoint(theirs, checkpoint, prefix=prefix))
    expected, encoded = theirs(ids, output_hidden_states=True), ours(ids, skip=1, final_norm=False, pooled=True)
    assert relative_error(encoded.states, expected.hidden_states[-2]) < tolerance
    assert encoded.pooled is not None and relative_error(encoded.pooled, expected.text_embeds) < tolerance


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("config", "name", "millions"), [(OPENCLIP_H, "ViT-H-14", 354.03), (OPENCLIP_BIGG, "ViT-bigG-14", 694.66)]
)
def test_full_size_open_clip_names_and_shapes(config, name, millions):
    published = get_model_config(name)
    with torch.device("meta"):
        ours, theirs = text_tower(config), CLIP(**published)
    assert shapes(ours.state_dict()) == shapes(text_part(theirs))
    assert config.heads == published["text_cfg"]["heads"]
    assert parameters(ours) == pytest.approx(millions, abs=0.006)


def test_full_size_clip_names_and_shapes():
    with torch.device("meta"):
        published = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        ours, theirs = text_tower(CLIP_L), CLIPTextModel(published)
    assert shapes(ours.state_dict()) == shapes(on_disk(theirs))
    assert (CLIP_L.heads, CLIP_L.activation) == (published.num_attention_heads, published.hidden_act)
    assert parameters(ours) == pytest.approx(123.06, abs=0.006)


def parameters(network: nn.Module) -> float:
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize("config", [OPEN_CLIP, HUGGING_FACE], ids=["open_clip", "hugging_face"])
@torch.inference_mode()
def test_words_after_a_place_cannot_change_it(config, randomize):
    """Causal attention: shorter texts may be computed without their padding."""
    tower = randomize(text_tower(config))
    whole = torch.tensor([tokenize("a red apple")])
    short = whole[:, :6]
    assert torch.allclose(tower(whole).states[:, :6], tower(short).states, atol=1e-5)
    first, second = tower(whole, pooled=True).pooled, tower(short, pooled=True).pooled
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("config", [OPEN_CLIP, HUGGING_FACE], ids=["open_clip", "hugging_face"])
def test_pooled_is_given_only_when_asked_for(config):
    tower, ids = text_tower(config), torch.tensor([tokenize("x")])
    assert tower(ids).pooled is None
    assert tower(ids, pooled=True).pooled.shape == (1, config.projection or config.width)


@pytest.mark.parametrize("skip", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(skip):
    with pytest.raises(ValueError, match=f"skip {skip}: this text tower has 3 layers"):
        text_tower(OPEN_CLIP)(torch.tensor([tokenize("x")]), skip)


def test_hugging_face_names_have_no_projection():
    with pytest.raises(ValueError, match="no projection"):
        TextConfig(projection=768)
