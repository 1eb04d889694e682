"""ComfyUI's graphs: the ones it begins with, and ones that are made up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.pipeline.images import picture_bytes
from ldm.pipeline.metadata.comfy_graph import read_graph

PNG = picture_bytes(Image.new("RGB", (64, 64), "red"))

# The graph that ComfyUI opens with, as its API has it.
DEFAULT: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip


def changed(**nodes: dict[str, Any]) -> dict[str, Any]:
    """The graph with other nodes, or with inputs of those it has."""
    graph = copy.deepcopy(DEFAULT)
    for name, node in nodes.items():
        name = name.removeprefix("n")
        if "class_type" in node:
            graph[name] = node
        else:
            graph[name]["inputs"] |= node
    return graph


def test_the_graph_it_opens_with():
    remake = read_graph(DEFAULT)
    assert remake is not None and remake.source == "ComfyUI"
    assert remake.fields == {
        "prompt": "a glass bottle", "negative": "text, watermark", "steps": 20, "guidance": 8,
        "seed": 156680208700286, "sampler": "euler", "schedule": "normal", "width": 512, "height": 768, "count": 1,
        "rng": "comfy", "emphasis": "comfy",
    }  # fmt: skip
    assert remake.model == "v1-5-pruned-emaonly.safetensors" and remake.model_hash is None
    assert len(remake.misses) == 1 and remake.misses[0].startswith("numbers:")
    assert remake.request().guidance == 8.0


def test_adapters_and_clip_skip():
    lora = {"lora_name": "../../detail.safetensors", "strength_model": 0.7, "strength_clip": 0.5}
    graph = changed(
        n10={"class_type": "LoraLoader", "inputs": {**lora, "model": ["4", 0], "clip": ["4", 1]}},
        n11={"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
        n3={"model": ["10", 0]}, n6={"clip": ["11", 0]}, n7={"clip": ["11", 0]},
    )  # fmt: skip
    remake = read_graph(graph)
    assert remake is not None and remake.fields["clip_skip"] == 2
    assert remake.model == "v1-5-pruned-emaonly.safetensors"
    assert any("detail.safetensors" in miss and "0.7, 0.5" in miss for miss in remake.misses)


@pytest.mark.parametrize(("steps", "denoise"), [(20, 0.5), (20, 0.87), (7, 0.3), (1, 0.9)])
def test_a_picture_to_start_from(steps, denoise):
    """All the steps asked are run: the last ones of a longer run."""
    graph = changed(
        n10={"class_type": "LoadImage", "inputs": {"image": "/etc/passwd"}},
        n11={"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}},
        n3={"latent_image": ["11", 0], "steps": steps, "denoise": denoise},
    )
    remake = read_graph(graph)
    assert remake is not None and remake.pictures == {"image": None}
    request = remake.request({"image": PNG})
    assert (request.steps, request.steps_to_run) == (int(steps / denoise), steps)


def test_the_advanced_sampler_names_its_steps():
    inputs = dict(DEFAULT["3"]["inputs"], noise_seed=7, start_at_step=5, end_at_step=10000, add_noise="enable")
    del inputs["seed"], inputs["denoise"]
    graph = changed(
        n3={"class_type": "KSamplerAdvanced", "inputs": inputs | {"latent_image": ["11", 0]}},
        n10={"class_type": "LoadImage", "inputs": {"image": "x.png"}},
        n11={"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0]}},
    )
    remake = read_graph(graph)
    assert remake is not None
    request = remake.request({"image": PNG})
    assert (request.seed, request.steps, request.steps_to_run) == (7, 20, 15)


def test_a_second_pass_is_told():
    again = dict(DEFAULT["3"]["inputs"], latent_image=["10", 0], denoise=0.5)
    graph = changed(
        n10={"class_type": "LatentUpscaleBy", "inputs": {"samples": ["3", 0], "scale_by": 2}},
        n11={"class_type": "KSampler", "inputs": again},
        n8={"samples": ["11", 0]},
    )
    remake = read_graph(graph)
    assert remake is not None and remake.pictures == {"image": None}
    told = "\n".join(remake.misses)
    assert "LatentUpscaleBy" in told and "only the last is run" in told


def test_a_value_from_another_node_and_nodes_nobody_knows():
    graph = changed(
        n10={"class_type": "PrimitiveInt", "inputs": {"value": 77}},
        n11={"class_type": "FreeU_V2", "inputs": {"model": ["4", 0], "b1": 1.3}},
        n12={"class_type": "Somewhere\x1b[2J else", "inputs": {}},
        n3={"seed": ["10", 0], "model": ["11", 0]},
    )
    remake = read_graph(graph)
    assert remake is not None and remake.fields["seed"] == 77 and remake.model is not None
    told = "\n".join(remake.misses)
    assert '"FreeU_V2": what it does to the model' in told
    assert "nodes that were not followed" in told and "\x1b" not in told


def test_circles_end():
    graph = changed(
        n8={"samples": ["8", 0]},
        n6={"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["7", 0]}},
        n7={"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0]}},
        n3={"model": ["3", 0], "latent_image": ["3", 0]},
    )
    assert read_graph(graph) is not None


@pytest.mark.parametrize(
    "graph", [{}, {"1": None}, {"1": {"class_type": 5}}, {"1": {"class_type": "SaveImage", "inputs": []}}]
)
def test_what_draws_nothing(graph):
    assert read_graph(graph) is None


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_inputs_are_read(data):
    graph = copy.deepcopy(DEFAULT)
    for node in graph.values():
        for name in node["inputs"]:
            if data.draw(st.booleans()):
                link = st.tuples(st.sampled_from(sorted(graph)), st.just(0)).map(list)
                node["inputs"][name] = data.draw(link | junk)
    read_graph(graph)
