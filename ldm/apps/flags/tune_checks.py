"""What `ldm tune` refuses at once: flags that the run would not heed, and numbers that no run can have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ldm.apps.flags.tune import Learning
from ldm.data.example import PictureSet
from ldm.errors import LdmError
from ldm.training.engine.optimizers import PACKAGES

if TYPE_CHECKING:
    from ldm.apps.flags.commands import Tune


def check_command(command: Tune) -> None:
    """Raise LdmError for a flag that is given and would do nothing, and for numbers out of range."""
    for group, names, heeded, expected in _needs(command):
        if not heeded and (name := next(_given(group, *names), None)) is not None:
            raise LdmError(f"{name}: found with method {command.method}, expected {expected}; leave it away")
    _check_numbers(command.learning)
    if command.showing.repeats < 1:
        raise LdmError(f"repeats: found {command.showing.repeats}, expected 1 or more")


def check_packages(command: Tune) -> None:
    """Raise LdmError where a package that the run would need in the end, or for its method, is not installed."""
    by_adapter = command.method == "lora" or (command.method == "dreambooth" and not command.whole)
    optimizers = [package for name, package in PACKAGES.items() if name == command.learning.optimizer]
    needed = [*(["peft"] if by_adapter else []), *optimizers, "jinja2", "matplotlib"]  # the last two for the report
    if missing := [package for package in needed if find_spec(package) is None]:
        those = "packages that are" if len(missing) > 1 else "a package that is"
        raise LdmError(f"tune: needs {' and '.join(missing)}, {those} not installed; pip install 'ldm[tune]'")


def check_pictures(command: Tune, found: PictureSet) -> None:
    """Raise LdmError where the method needs pictures that there are not, or a flag is about such."""
    if command.method == "controlnet" and not command.canny and not any(e.hint is not None for e in found.examples):
        raise LdmError("hints: no picture has one, which a control network looks at; give --hints DIR, or --canny")
    drawn = command.method == "dreambooth" and command.pictures.class_caption is not None
    if not drawn and command.loss.prior_weight != 1 and not any(example.regular for example in found.examples):
        raise LdmError("prior-weight: found without pictures of the class; give --class-pictures, or leave it away")


def _needs(command: Tune) -> Iterator[tuple[object, tuple[str, ...], bool, str]]:
    """Flags of a group, whether they are heeded as the others are, and what they need to be."""
    method, learning, pictures = command.method, command.learning, command.pictures
    lora = method == "lora" or (method == "dreambooth" and not command.whole)
    own_average, all_of_it = learning.optimizer == "schedulefree", not lora and method in ("full", "dreambooth")
    of_a_lora = "a LoRA: --method lora, or dreambooth without --whole"
    yield command, ("whole",), method == "dreambooth", "dreambooth; method full trains all of the U-Net"
    yield command.adapting, ("kind", "rank", "alpha", "dropout", "conv_rank", "text_rank"), lora, of_a_lora
    yield command.adapting, ("text_rank",), command.text, "--text beside it"
    yield learning, ("text_rate",), command.text, "--text beside it"
    one_rate = learning.optimizer == "prodigy"
    yield learning, ("text_rate",), not one_rate, "another --optimizer than prodigy, which finds one rate for all"
    yield command.naming, ("word", "like", "vectors"), method == "embedding", "--method embedding"
    yield command, ("canny",), method == "controlnet", "--method controlnet"
    yield pictures, ("hints",), method == "controlnet", "--method controlnet"
    yield pictures, ("hints",), not command.canny, "no --canny beside it, which makes hints of the pictures"
    yield command, ("layout",), lora or method == "embedding", "a LoRA or an embedding, which have two layouts"
    with_class = method == "dreambooth" or pictures.class_pictures is not None
    yield pictures, ("class_caption",), with_class, "--method dreambooth, or --class-pictures beside it"
    varied = command.showing.shuffle or command.showing.drop_tags > 0
    yield command.showing, ("keep",), varied, "--shuffle or --drop-tags beside it"
    yield learning, ("ema",), not own_average, "another --optimizer than schedulefree, which averages by itself"
    yield learning, ("shard",), all_of_it, "--method full, or dreambooth with --whole"
    yield learning, ("shard",), learning.optimizer == "adamw", "--optimizer adamw"
    yield learning, ("shard",), learning.precision != "fp16", "--precision bf16 or no"
    yield learning, ("schedule",), not own_average, "another --optimizer than schedulefree, which needs none"


def _given(group: object, *names: str) -> Iterator[str]:
    """Of these fields of a record, those that are not as by default, as they are typed."""
    usual = {field.name: field.default for field in fields(group)}  # type: ignore[arg-type]
    return (name.replace("_", "-") for name in names if getattr(group, name) != usual[name])


def _check_numbers(asked: Learning) -> None:
    least_ones = {"steps": 1, "batch": 1, "accumulate": 1, "looks": 1, "save_every": 1, "warmup": 0, "workers": 0}
    for name, least in least_ones.items():
        if (number := getattr(asked, name)) is not None and number < least:
            raise LdmError(f"{name.replace('_', '-')}: found {number}, expected {least} or more")
    if not 0 <= asked.seed < 2**63:
        raise LdmError(f"seed: found {asked.seed}, expected a number from 0 to 2^63 - 1")
    for name, rate in (("rate", asked.rate), ("text-rate", asked.text_rate)):
        if rate is not None and not 0 <= rate <= 10:
            raise LdmError(f"{name}: found {rate}, expected 0 to 10")
    if asked.rate == 0 and asked.text_rate:
        raise LdmError("rate: found 0 beside a text-rate, which is measured by it; give a very small one, as 1e-9")
    if not 0 <= asked.ema < 1:
        raise LdmError(f"ema: found {asked.ema}, expected 0 or more, and below 1")
