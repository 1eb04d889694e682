"""What a CLIP image embedding says to a U-Net: the tokens, against the sums that define them, and who has room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.models.image_conditioner import ImageTokens
from ldm.models.presets import decoder_of, sd2_unclip, small, small_decoder, tiny
from ldm.weights.config_json import check_config, config_from_json, config_to_json
from ldm.weights.layout import build


def test_tokens_are_a_linear_map_of_embedding_and_level(randomize):
    tokens = randomize(ImageTokens(embedding=3, tokens=2, width=5), 0).double().requires_grad_(False)
    seen = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, bias = tokens.proj.weight, tokens.proj.bias
    got = tokens(seen)
    assert got.shape == (4, 2, 5)
    for row in range(4):
        for token in range(2):
            for place in range(5):
                want = bias[5 * token + place] + sum(weight[5 * token + place, i] * seen[row, i] for i in range(6))
                assert float(got[row, token, place]) == pytest.approx(float(want), rel=1e-12)


def test_of_no_picture_they_are_the_bias(randomize):
    tokens = randomize(ImageTokens(3, 2, 5), 0)
    assert torch.equal(tokens(torch.zeros(1, 6)).flatten(), tokens.proj.bias)


@pytest.mark.parametrize(
    "config", [small_decoder(), small_decoder(256), tiny(small_decoder()), decoder_of(tiny(small()))]
)
def test_the_decoder_has_room_for_pooled_text_embedding_and_level(config):
    assert config.image is not None and config.unet.vector_width is not None
    pooled, embedding = config.text[0].tower.projection, config.image.tower.projection
    assert config.unet.vector_width == pooled + 2 * embedding
    networks = build(config)
    assert networks.unet.state_dict()["label_emb.0.0.weight"].shape[1] == config.unet.vector_width
    assert networks.image_tokens is not None
    assert networks.image_tokens.proj.weight.shape == (4 * config.unet.context_width, 2 * embedding)
    assert config_from_json(config_to_json(config)) == config


def test_unclip_has_no_tokens():
    networks = build(tiny(sd2_unclip()))
    assert networks.image_tokens is None and networks.augmentor is not None
    assert not any(name.startswith("image_tokens.") for name in networks.by_prefix())


def test_a_config_whose_u_net_lacks_the_room_is_refused():
    config = small_decoder()
    assert config.image is not None
    with pytest.raises(ValueError, match=r"vector_width is 192, text and image give 576"):
        check_config(replace(config, unet=replace(config.unet, vector_width=192)))
    with pytest.raises(ValueError, match=r"image.tokens is -1, expected 0..64"):
        check_config(replace(config, image=replace(config.image, tokens=-1)))
