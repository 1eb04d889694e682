"""Loading any CLIP: the vectors that open_clip's own loader, preprocessing and tokenizer give, or transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, XLMRobertaConfig

from ldm.errors import LdmError
from ldm.models.image_encoder import ImageTower
from ldm.models.presets import SystemConfig, sd1, sd2_unclip, small, tiny
from ldm.models.text_encoder import OpenCLIPText
from ldm.models.tokenizer import tokenize
from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.clip.model import CLIP, clip_pixels
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.weights.clip import open_clip_file
from ldm.weights.clip_config import inferred_towers, named_description, standard_towers
from ldm.weights.layout import unfilled

TEXT = {"context_length": 12, "width": 32, "heads": 4, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXTS = ["a cat", "an owl on a red tree, at night!", "word " * 30, ""]


def described(vision: Mapping[str, Any], text: Mapping[str, Any] = TEXT, **model: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": dict(vision), "text_cfg": dict(text), **model}


SIGLIP = described(
    {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"},
    {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
     "tokenizer_kwargs": {"clean": "canonicalize"}},
    init_logit_bias=-10, custom_text=True,
)  # fmt: skip
STANDARD = {
    "vit": described(VIT),
    "quick gelu": described(VIT, quick_gelu=True),
    "told biases": described(VIT, init_logit_bias=-3.0, init_logit_scale=2.0),
}
OTHERS = {
    "average pool": described(VIT | {"pool_type": "avg", "no_ln_pre": True}),
    "wider mlp": described(VIT | {"mlp_ratio": 4.9}),
    "custom text": described(VIT, custom_text=True),
    "resnet": described({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}),
    "convnext": described({"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "avg"}),
    "siglip": SIGLIP,
}
COLOURS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
SQUASHED = {**COLOURS, "resize_mode": "squash", "interpolation": "bilinear"}


def filled(model: nn.Module, seed: int = 0) -> Any:
    """Small random weights in every tensor, the running means of norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in ("logit_scale", "logit_bias") or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
            else:
                tensor.copy_((0.1 * noise).abs() + 0.5 if name.endswith(("weight", "running_var")) else 0.1 * noise)
    return model.eval()


def written(folder: Path, config: Mapping[str, Any], preprocess: Mapping[str, Any] | None = None) -> Path:
    """A folder as open_clip's models are published, with random weights."""
    custom = config.get("custom_text", False)
    options = {key: value for key, value in config.items() if key != "custom_text"}
    model = filled((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**options))
    save_file({n: t.clone() for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    told = {"model_cfg": config} | ({"preprocess_cfg": preprocess} if preprocess else {})
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


def pictures() -> list[Image.Image]:
    """Wide, tall, small and square, rough and smooth."""
    rng = np.random.default_rng(0)
    rough = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((90, 41), (37, 200), (9, 9))]
    return [*rough, rough[0].resize((300, 300), Image.Resampling.BICUBIC)]


@torch.inference_mode()
def their_vectors(folder: Path) -> tuple[Tensor, Tensor, Any]:
    """By open_clip's own loader of a folder: pictures, texts, the model."""
    name = f"local-dir:{folder}"
    loaded: Any = open_clip.create_model_and_transforms(name)
    model, _, transform = loaded
    model.eval()
    ids = open_clip.get_tokenizer(name)(TEXTS)
    pixels = torch.stack([transform(picture) for picture in pictures()])
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True), model


def assert_equal(clip: CLIP, images: Tensor, texts: Tensor) -> None:
    assert (clip.image_vectors(pictures()) - images).abs().max() < 1e-4
    assert (clip.text_vectors(TEXTS) - texts).abs().max() < 1e-4
    assert clip.width == images.shape[1]
    assert (images[0] - images[3]).abs().max() > 1e-3, "or else nothing would be compared"
    assert (texts[0] - texts[1]).abs().max() > 1e-3


@pytest.mark.parametrize("preprocess", [None, COLOURS, SQUASHED], ids=["usual", "colours", "squashed"])
@pytest.mark.parametrize("config", STANDARD.values(), ids=STANDARD)
def test_standard_towers_equal_open_clip(config, preprocess, tmp_path):
    folder = written(tmp_path, config, preprocess)
    clip = load_clip(folder, device="cpu")
    images, texts, model = their_vectors(folder)
    assert_equal(clip, images, texts)
    assert clip.scale == pytest.approx(model.logit_scale.exp().item())
    assert clip.bias == (config.get("init_logit_bias") or 0) and clip.english
    ours = open_clip_file(folder).towers is not None
    assert ours == (preprocess is not SQUASHED), "open_clip is imported only where it is needed"


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_models_equal_open_clip(config, tmp_path):
    folder = written(tmp_path, config, COLOURS)
    assert open_clip_file(folder).towers is None
    clip = load_clip(folder, device="cpu")
    assert_equal(clip, *their_vectors(folder)[:2])
    assert clip.bias == config.get("init_logit_bias", 0) and clip.sigmoid == (config is SIGLIP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_in_float32(dtype, tmp_path):
    folder = written(tmp_path, STANDARD["vit"])
    path = folder / "open_clip_model.safetensors"
    model = filled(open_clip.CLIP(**STANDARD["vit"])).to(dtype)  # pyright: ignore[reportArgumentType]
    save_file({n: t.clone() for n, t in model.state_dict().items()}, path)
    clip = load_clip(path, device="cpu")
    assert_equal(clip, *their_vectors(folder)[:2])


WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "cat", "猫", "кошка", "an", "owl", "word", "on", "red"]


def multilingual(folder: Path) -> tuple[dict[str, Any], Any]:
    """A folder with a text tower of transformers, its config and tokenizer; and open_clip's model of it."""
    text = XLMRobertaConfig(
        vocab_size=100_000, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=90, pad_token_id=1,
    )  # fmt: skip
    text.save_pretrained(folder)
    raw = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    marks = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **marks).save_pretrained(folder)
    config = described(
        VIT, {"hf_model_name": "xlm-roberta-base", "hf_tokenizer_name": "xlm-roberta-base",
              "hf_pooler_type": "mean_pooler", "context_length": 20},
    )  # fmt: skip
    local = {**config["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
    model = filled(open_clip.CustomTextCLIP(24, config["vision_cfg"], local))  # pyright: ignore[reportArgumentType]
    save_file({n: t.clone() for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return config, model


@torch.inference_mode()
def test_a_multilingual_model_equals_open_clip(tmp_path):
    _, model = multilingual(tmp_path)
    clip = load_clip(tmp_path, device="cpu")
    texts = ["a cat", "猫", "кошка on red", "unknown"]
    expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts), normalize=True)
    assert (clip.text_vectors(texts) - expected).abs().max() < 1e-4
    assert not clip.english and list(clip.notes_on(texts)) == []


@pytest.mark.parametrize("gone", ["config.json", "tokenizer.json"])
def test_nothing_is_downloaded(gone, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    multilingual(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(LdmError, match=r"xlm-roberta-base.*missing, and nothing is downloaded; put"):
        load_clip(tmp_path, device="cpu")


def test_a_text_config_never_names_code(tmp_path, monkeypatch):
    """What a config of transformers may say of code or kernels does not reach transformers."""
    multilingual(tmp_path)
    path = tmp_path / "config.json"
    evil = {
        "auto_map": {"AutoConfig": "evil.Evil"},
        "_attn_implementation_internal": "some/kernel",
        "attn_implementation": "x/y",
    }
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    assert not load_clip(tmp_path, device="cpu").english
    assert not (tmp_path / "canary").exists()
    path.write_text(json.dumps({"model_type": "mine"} | evil))
    with pytest.raises(LdmError, match="found the model_type 'mine', expected one of"):
        load_clip(tmp_path, device="cpu")


def test_towers_are_read_off_the_tensors(tmp_path):
    """Heads 64 wide; a note says that the activation was guessed."""
    config = described(VIT | {"width": 128, "head_width": 64}, TEXT | {"width": 128, "heads": 2})
    folder = written(tmp_path, config)
    images, texts, _ = their_vectors(folder)
    (folder / "open_clip_config.json").unlink()
    clip = load_clip(folder / "open_clip_model.safetensors", device="cpu")
    assert_equal(clip, images, texts)
    assert len(clip.notes) == 1 and "read off its tensors, with GELU; --config" in clip.notes[0]
    told = tmp_path / "told.json"
    told.write_text(json.dumps(config))
    again = load_clip(folder, config=str(told), device="cpu")
    assert_equal(again, images, texts)
    assert again.notes == () and again.identity != clip.identity


def test_the_rule_for_heads_holds_for_published_models():
    """Every config that open_clip ships and our towers hold is found again from its shapes, but for the activation."""
    checked = 0
    for name in open_clip.list_models():
        towers = standard_towers(named_description(name))
        if towers is None:
            continue
        text, image = unfilled(lambda t=towers: OpenCLIPText(t.text)), unfilled(lambda t=towers: ImageTower(t.image))
        shapes = {n: tuple(t.shape) for n, t in text.state_dict().items()}
        shapes |= {f"visual.{n}": tuple(t.shape) for n, t in image.state_dict().items()}
        found = inferred_towers(shapes)
        assert found is not None
        assert (found.text.heads, found.image.heads) == (towers.text.heads, towers.image.heads), name
        assert (found.image.size, found.image.layers) == (towers.image.size, towers.image.layers), name
        checked += 1
    assert checked > 20


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_layout_equals_transformers(activation, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
            "projection_dim": 24, "hidden_act": activation, "max_position_embeddings": 12,
            "eos_token_id": 49407}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6,
              "image_size": 32, "patch_size": 8, "projection_dim": 24, "hidden_act": activation}  # fmt: skip
    model = filled(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))
    model.save_pretrained(tmp_path)
    clip = load_clip(tmp_path, device="cpu")
    towers = open_clip_file(tmp_path).towers
    assert towers is not None
    pixels = torch.cat([clip_pixels(picture, towers.image) for picture in pictures()])
    ids = torch.tensor([tokenize(text, 12) for text in TEXTS])
    theirs = model(input_ids=ids, pixel_values=pixels)
    assert_equal(clip, F.normalize(theirs.image_embeds, dim=-1), F.normalize(theirs.text_embeds, dim=-1))
    assert clip.scale == pytest.approx(model.logit_scale.exp().item())


def with_image_tower(config: SystemConfig, path: Path, prefix: str) -> Path:
    """A checkpoint with random weights that has a whole CLIP: ours, or SD 2.1 unCLIP's."""
    system = random_system(config)
    extra = {"cond_stage_model.model.logit_scale": torch.tensor(2.0)}
    if config.clip_image is not None:
        tower = filled(ImageTower(config.clip_image))
        extra |= {f"{prefix}{name}": tensor for name, tensor in tower.state_dict().items()}
    save_checkpoint(system, path, extra=extra)
    return path


def test_our_checkpoint(tmp_path):
    config = tiny(small())
    path = with_image_tower(config, tmp_path / "ours.safetensors", "cond_stage_model.model.visual.")
    model = load(path, device="cpu", dtype="float32")
    clip = model.clip
    assert clip is model.clip, "read once"
    assert (clip.name, clip.width, clip.english) == ("ours", 32, True)
    assert clip.scale == pytest.approx(np.exp(2.0))
    ids = torch.tensor([tokenize(text) for text in TEXTS])
    with torch.inference_mode():
        pooled = model.text[0](ids, pooled=True).pooled
    assert pooled is not None
    assert (clip.text_vectors(TEXTS) - F.normalize(pooled, dim=-1)).abs().max() < 1e-5
    scores = model.score(pictures(), TEXTS[:2])
    assert torch.equal(scores.cosines, clip.image_vectors(pictures()) @ clip.text_vectors(TEXTS[:2]).T)
    found = model.classify(pictures()[:1], ["cat", "dog"])
    assert {match.label for match in found[0]} == {"cat", "dog"}


def test_sd_unclip_is_a_clip(tmp_path):
    """Its text tower and the image tower that its U-Net is told by were trained together; sizes are the tensors'."""
    system = random_system(tiny(sd2_unclip(), width=64))
    path = tmp_path / "unclip.safetensors"
    save_checkpoint(system, path, extra={"cond_stage_model.model.logit_scale": torch.tensor(1.0)})
    towers = open_clip_file(path).towers
    assert towers is not None and (towers.text.width, towers.image.width, towers.image.heads) == (64, 64, 1)
    assert load_clip(path, device="cpu").image_vectors(pictures()).shape == (4, 64)


def test_pickles_only_where_that_is_allowed(tmp_path):
    folder = written(tmp_path, STANDARD["vit"])
    expected = load_clip(folder, device="cpu").text_vectors(TEXTS)
    model = filled(open_clip.CLIP(**STANDARD["vit"]))  # pyright: ignore[reportArgumentType]
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(LdmError, match="--allow-pickle"):
        load_clip(folder, device="cpu")
    assert torch.equal(load_clip(folder, device="cpu", allow_pickle=True).text_vectors(TEXTS), expected)


def test_a_file_without_an_image_tower(tiny_file: Callable[[SystemConfig], Path]):
    with pytest.raises(LdmError, match="has a text tower but no image tower"):
        load_clip(tiny_file(tiny(sd1())), device="cpu")


def broken(name: str, tensors: dict[str, Tensor]) -> None:
    match name:
        case "missing":
            del tensors["visual.ln_post.weight"]
        case "unexpected":
            tensors["visual.more"] = torch.ones(1)
        case "of another shape":
            tensors["text_projection"] = torch.ones(32, 5)
        case "no logit_scale":
            del tensors["logit_scale"]
        case "not finite":
            tensors["visual.proj"][0, 0] = torch.nan


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape", "no logit_scale", "not finite"])
@pytest.mark.parametrize("kind", ["vit", "average pool"])
def test_broken_files(fault, kind, tmp_path):
    folder = written(tmp_path, (STANDARD | OTHERS)[kind])
    model = filled(open_clip.CLIP(**STANDARD["vit"]))  # pyright: ignore[reportArgumentType]
    if kind != "vit":
        model = filled(open_clip.CLIP(**OTHERS[kind]))  # pyright: ignore[reportArgumentType]
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    broken(fault, tensors)
    save_file(tensors, folder / "open_clip_model.safetensors")
    said = "logit_scale" if fault == "no logit_scale" else fault
    with pytest.raises(LdmError, match=said) as caught:
        load_clip(folder, device="cpu").image_vectors(pictures())
    assert "\n" not in str(caught.value)


def bad_configs() -> dict[str, tuple[Any, str]]:
    return {
        "no object": ([1], "no JSON object"),
        "no towers": ({"embed_dim": 4}, "has no 'vision_cfg'"),
        "a tower that is none": (described(VIT) | {"text_cfg": 3}, "must be objects"),
        "huge": (described(VIT | {"layers": 9999}), "found 9999 layers"),
        "wide": (described(VIT | {"width": 10**9}), "found the number 1000000000"),
        "heads": (described(VIT, TEXT | {"heads": 5}), "5 heads do not divide a text tower's width 32"),
        "patches": (described(VIT | {"patch_size": 64}), "patches of 64 do not fit pictures of 32"),
        "an unknown field": (described(VIT | {"evil": 1}), "open_clip cannot build its config"),
        "an address": (described({"timm_model_name": "hf-hub:some/model"}), "expected a model of timm"),
        "no such network": (described({"timm_model_name": "no_such_net"}), "open_clip cannot build"),
        "a tokenizer's code": (
            described(VIT, TEXT | {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}), "'bpe_path', which is not read",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_configs())
def test_broken_configs(name, tmp_path):
    config, said = bad_configs()[name]
    folder = written(tmp_path, STANDARD["vit"])
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(LdmError, match=said) as caught:
        load_clip(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_told(tmp_path):
    folder = written(tmp_path, OTHERS["resnet"])
    path = folder / "open_clip_model.safetensors"
    with pytest.raises(LdmError, match=r"config ViT-B-23: open_clip has none of that name; perhaps .*ViT-B-32"):
        load_clip(path, config="ViT-B-23", device="cpu")
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(LdmError, match=r"put its open_clip_config\.json beside it, or name .* --config"):
        load_clip(path, device="cpu")
    path.unlink()
    with pytest.raises(LdmError, match=r"is a folder without a CLIP; expected open_clip_model\.safetensors"):
        load_clip(folder, device="cpu")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(LdmError, match="holds no CLIP"):
        load_clip(path, device="cpu")
