"""ComfyUI's graphs, as its pictures carry them: from the picture back to the prompt, the seed and the model's name.

A graph is {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "model": ["4", 0], ...}}, ...}; a list of a node's
name and a number is a link. It may hold anything, so no walk takes a node twice, and what is not known is told.
Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from ldm.pipeline.metadata.remake import Remake
from ldm.pipeline.names import SamplerName, ScheduleName, nearest_sampler, sampler_named, schedule_named
from ldm.pipeline.validation import shown

SOURCE = "ComfyUI"
ENDS = ("SaveImage", "PreviewImage", "SaveAnimatedWEBP", "SaveAnimatedPNG")
SAMPLERS = ("KSampler", "KSamplerAdvanced")
CHECKPOINTS = ("CheckpointLoaderSimple", "CheckpointLoader", "UNETLoader")
ADAPTERS = ("LoraLoader", "LoraLoaderModelOnly")
PASSED = ("VAEDecode", "VAEDecodeTiled", "VAELoader")
"""Nodes that are passed without a word."""

MAX_NODES = 5000

Node = dict[str, Any]


@dataclass
class _Walk:
    """A graph being read: the nodes seen so far, what was found, and what cannot be matched."""

    graph: dict[str, Node]
    seen: set[str] = field(default_factory=set)
    fields: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str | None] = field(default_factory=dict)
    model: str | None = None
    misses: list[str] = field(default_factory=list)

    def behind(self, node: Node, *names: str) -> Iterator[tuple[str, Node]]:
        """The nodes behind a node's input, nearest first, none twice: (class, inputs).

        names: the inputs that lead on; of a node that has several of them, the first.
        """
        passed: set[str] = set()
        while True:
            link = next((node[name] for name in names if isinstance(node.get(name), list)), None)
            place = str(link[0]) if link else ""
            if place not in self.graph or place in passed:
                return
            passed.add(place)
            self.seen.add(place)
            node = _inputs(self.graph[place])
            yield _class(self.graph[place]), node

    def value(self, node: Node, name: str, kind: type | tuple[type, ...]) -> Any:
        """An input's value, also where a node that holds nothing else gives it; None, and a line, for another type."""
        value = node.get(name)
        if isinstance(value, list):
            source = self.graph.get(str(value[0]), {}) if value else {}
            self.seen.add(str(value[0]) if value else "")
            value = next(iter(_inputs(source).values()), None) if len(_inputs(source)) == 1 else None
        if not isinstance(value, kind) or isinstance(value, bool) or value != value:
            self.misses.append(f"{name}: no value that can be read")
            return None
        return value

    def set(self, field_name: str, value: Any) -> None:
        if value is not None:
            self.fields[field_name] = value


def read_graph(graph: dict[str, Any]) -> Remake | None:
    """The request that a graph describes, unchecked; None where it draws nothing that we know.

    The sampler nearest to the picture counts; others, and nodes not known, are named in `misses`. The model, adapters
    and pictures are named only: nothing is opened.
    """
    nodes = {name: node for name, node in graph.items() if isinstance(node, dict) and _class(node)}
    if len(nodes) > MAX_NODES:
        return None
    walk = _Walk(nodes, fields={"emphasis": "comfy", "rng": "comfy"})
    if (sampler := _sampler_node(walk)) is None:
        return None
    _sampling(walk, sampler)
    _latent(walk, sampler)
    _conditioning(walk, sampler, "positive", "prompt")
    _conditioning(walk, sampler, "negative", "negative")
    _model(walk, sampler)
    left = sorted({_class(node) for name, node in nodes.items() if name not in walk.seen} - {*ENDS, *PASSED})
    if left:
        walk.misses.append(f"nodes that were not followed: {', '.join(map(shown, left[:20]))}")
    walk.misses.append("numbers: another program's picture comes out alike, not the same")
    return Remake(
        source=SOURCE,
        fields={"prompt": ""} | walk.fields,
        pictures=walk.pictures,
        model=walk.model,
        misses=tuple(dict.fromkeys(walk.misses)),
    )


def _class(node: Node) -> str:
    name = node.get("class_type")
    return name if isinstance(name, str) else ""


def _inputs(node: Node) -> Node:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _sampler_node(walk: _Walk) -> Node | None:
    """The inputs of the sampler behind the first end of the graph, or of any where there is no way from an end."""
    for name, node in walk.graph.items():
        if _class(node) not in ENDS:
            continue
        walk.seen.add(name)
        for kind, inputs in walk.behind(_inputs(node), "images", "image", "samples", "pixels"):
            if kind in SAMPLERS:
                return inputs
            if kind not in PASSED:
                walk.misses.append(f"{shown(kind)}: what it does to the picture")
    for name, node in walk.graph.items():
        if _class(node) in SAMPLERS and name not in walk.seen:
            walk.seen.add(name)
            return _inputs(node)
    return None


def _sampling(walk: _Walk, node: Node) -> None:
    """Steps, seed, guidance, sampler and schedule.

    A denoise d below 1 is the last `steps` of a run of steps / d: what a request calls a strength of steps / (steps /
    d) over that longer run. KSamplerAdvanced names the first and the last step itself.
    """
    steps = walk.value(node, "steps", int)
    walk.set("steps", steps)
    walk.set("guidance", walk.value(node, "cfg", (int, float)))
    walk.set("seed", walk.value(node, "noise_seed" if "noise_seed" in node else "seed", int))
    _named(walk, node)
    if "start_at_step" in node and steps:
        start, end = node.get("start_at_step"), node.get("end_at_step")
        if isinstance(start, int) and 0 < start < steps:
            walk.set("strength", (steps - start) / steps)
        if isinstance(end, int) and end < steps:
            walk.misses.append(f"end_at_step: {shown(end)}; all steps are run")
        if node.get("add_noise") == "disable":
            walk.misses.append("add_noise: disabled; noise is added")
    elif "denoise" in node and steps and steps > 0:
        denoise = walk.value(node, "denoise", (int, float))
        if denoise is not None and 0 < denoise < 1 and math.isfinite(steps / denoise):
            longer = max(steps, int(steps / denoise))
            walk.fields |= {"steps": longer, "strength": steps / longer}


def _named(walk: _Walk, node: Node) -> None:
    """The names of the sampler and of the schedule, which ComfyUI calls a scheduler."""
    if (given := walk.value(node, "sampler_name", str)) is not None:
        name, _ = sampler_named(given)
        if name not in get_args(SamplerName):
            nearest = nearest_sampler(given)
            name, instead = nearest, f"the nearest, {nearest}," if nearest else "the default"
            walk.misses.append(f"sampler_name: {shown(given)} is not known here; {instead} takes its place")
        walk.set("sampler", name)
    if (given := walk.value(node, "scheduler", str)) is not None:
        schedule = "beta-timesteps" if given == "beta" else schedule_named(given)  # its own is over the timesteps
        if schedule in get_args(ScheduleName):
            walk.set("schedule", schedule)
        else:
            walk.misses.append(f"scheduler: {shown(given)} is not known here; what suits the sampler takes its place")


def _latent(walk: _Walk, sampler: Node) -> None:
    """What the sampler starts from: nothing, of a size, or a picture, perhaps with a mask."""
    for kind, node in walk.behind(sampler, "latent_image", "samples", "latent", "pixels", "image"):
        if kind in SAMPLERS:
            walk.misses.append(f"{kind}: one before the last; only the last is run, from its result as the image")
            walk.pictures["image"] = None
            return
        if kind == "EmptyLatentImage":
            for name in ("width", "height"):
                walk.set(name, walk.value(node, name, int))
            walk.set("count", walk.value(node, "batch_size", int))
            if walk.fields.pop("strength", None) is not None:
                walk.misses.append("denoise: below 1 without a picture; all steps are run")
                walk.set("steps", walk.value(sampler, "steps", int))
            return
        if kind in ("VAEEncodeForInpaint", "SetLatentNoiseMask"):
            walk.pictures |= {"image": None, "mask": None}
            if kind == "VAEEncodeForInpaint":
                walk.set("mask_fill", "noise")
            walk.misses.append(f"{kind}: its mask is not grown or blurred as there")
        elif kind in ("VAEEncode", "VAEEncodeTiled", "LoadImage"):
            walk.pictures["image"] = None
        else:
            walk.misses.append(f"{shown(kind)}: what it does to the picture to start from")


def _conditioning(walk: _Walk, sampler: Node, side: str, field_name: str) -> None:
    """The text of one side, and what stands between it and the sampler."""
    for kind, node in walk.behind(sampler, side, "conditioning", "conditioning_1", "conditioning_to"):
        if kind in ("CLIPTextEncode", "CLIPTextEncodeSDXL"):
            walk.set(field_name, walk.value(node, "text" if kind == "CLIPTextEncode" else "text_g", str))
            if kind == "CLIPTextEncodeSDXL":
                _sizes(walk, node)
            _clip(walk, node)
            return
        if kind == "ConditioningZeroOut":
            walk.fields |= {field_name: "", "empty_negative": "zeros"}
            return
        walk.misses.append(f"{shown(kind)}: what it does to the {field_name}")


def _sizes(walk: _Walk, node: Node) -> None:
    """What SDXL is told of a picture's sizes."""
    if node.get("text_l") != node.get("text_g"):
        walk.misses.append("text_l: another text for the first of the text encoders")
    for field_name, first, second in (("original_size", "width", "height"), ("crop", "crop_w", "crop_h")):
        sides = walk.value(node, first, int), walk.value(node, second, int)
        if None not in sides:
            walk.set(field_name, sides)


def _clip(walk: _Walk, node: Node) -> None:
    """Which layer of the text encoder is looked at: -2 is the one before the last, a clip skip of 2."""
    for kind, inputs in walk.behind(node, "clip"):
        if kind == "CLIPSetLastLayer":
            layer = walk.value(inputs, "stop_at_clip_layer", int)
            walk.set("clip_skip", None if layer is None else -layer)
        elif kind not in (*CHECKPOINTS, *ADAPTERS):
            walk.misses.append(f"{shown(kind)}: what it does to the text encoder")


def _model(walk: _Walk, sampler: Node) -> None:
    """The name of the model, and what was done to it."""
    for kind, node in walk.behind(sampler, "model"):
        if kind in CHECKPOINTS:
            name = node.get("ckpt_name", node.get("unet_name"))
            walk.model = name if isinstance(name, str) else None
        elif kind in ADAPTERS:
            weights = ", ".join(shown(node[name]) for name in ("strength_model", "strength_clip") if name in node)
            walk.misses.append(
                f"{kind}: {shown(node.get('lora_name'))} at {weights} is a file that has to be given again"
            )
        else:
            walk.misses.append(f"{shown(kind)}: what it does to the model")
