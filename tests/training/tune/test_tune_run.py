"""Tuning from a folder to a file, by every method, on tiny models of random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from shallow import shallow

from ldm.data.example import Defaults
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError
from ldm.models.presets import sd1
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.training.adapter_options import AdapterOptions
from ldm.training.engine.loop import held, train
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.objective import Draw, step_generator
from ldm.training.engine.precision import DTYPES, precision_on
from ldm.training.tune.finish import finish, tuned_model
from ldm.training.tune.measure import load_measured, mark_of
from ldm.training.tune.objective import Noising
from ldm.training.tune.plan import plan
from ldm.training.tune.run import Run, prepare_run, tune
from ldm.training.tune.settings import Tuning, held_out_numbers
from ldm.types import Conditioning

LOOP = LoopConfig(
    steps=4, batch=2, rate=1e-2, warmup=1, ema=0.0, precision="no", save_every=2, evaluate_every=2, log_every=1
)
COLORS = ("red", "green", "blue", "white", "black", "gray")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    save_checkpoint(random_system(shallow(sd1())), path)
    return path


@pytest.fixture
def base(file) -> LatentDiffusion:
    return load(file, device="cpu", dtype="float32")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six squares of one colour each with some noise, 64 x 64 and larger."""
    where = tmp_path / "pictures"
    where.mkdir()
    for number, color in enumerate(COLORS):
        noise = np.random.default_rng(number).integers(0, 40, (64, 64, 3), dtype=np.uint8)
        image = Image.blend(Image.new("RGB", (64, 64), color), Image.fromarray(noise), 0.3)
        image.save(where / f"{number}.png")
        (where / f"{number}.txt").write_text(f"a {color} sks square")
    return where


def tuning(folder: Path, **fields) -> Tuning:
    return Tuning(pictures=folder, output=folder.parent / "out", **fields)


def ready(settings: Tuning, base: LatentDiffusion, loop: LoopConfig = LOOP) -> Run:
    return prepare_run(settings, read_pictures(settings.pictures, settings.defaults), base, lambda _: loop)


def said(model: LatentDiffusion, prompt: str = "a red sks square") -> torch.Tensor:
    """What the U-Net answers to a prompt."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.unet(x, torch.tensor([500]), Conditioning(cross=model.encode_prompt(prompt).cross.clone()))


METHODS = {
    "lora": {"adapter": AdapterOptions(rank=4)},
    "lora with text": {"adapter": AdapterOptions(rank=4), "text": True},
    "full": {"method": "full"},
    "full with text": {"method": "full", "text": True},
    "embedding": {"method": "embedding", "like": "thing", "vectors": 2},
    "dreambooth": {"method": "dreambooth", "adapter": AdapterOptions(rank=4)},
    "controlnet": {"method": "controlnet", "canny": True},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_file_draws_as_what_was_trained(name, folder, base):
    before, told = {key: tensor.clone() for key, tensor in base.unet.state_dict().items()}, said(base)
    run = ready(tuning(folder, **METHODS[name]), base)
    if run.trained.control is not None:  # which is looked at before the first step, without dropout too
        assert not any(module.training for module in run.trained.control.modules())
    measured = tune(run)
    assert not any(module.training for module in base.unet.modules())  # it draws without dropout, as before
    assert [seen.step for seen in measured] == [0, 2, 4]
    planned = plan(run.objective, run.loop, run.kept, len(run.held_out), 1)
    ended = finish(run, planned, 1.0)
    assert ended.verdict.sentences
    assert "<html" in ended.report.read_text()
    step = int(json.loads(json.dumps(load_metadata(ended.file)))["ss_steps"])
    assert step in (2, 4)
    model = tuned_model(run)
    if step == 4:  # the last weights, as the average of a decay of 0 is
        if run.trained.control is not None:
            written = model.controls["tuned"].state_dict()
            for key, tensor in run.trained.control.state_dict().items():
                assert torch.allclose(written[key], tensor, atol=2e-3), key
        else:
            assert torch.allclose(said(model), said(run.trained.model), atol=2e-2)
    if run.trained.control is None:
        assert not torch.allclose(said(model), told, atol=1e-5)
    if run.tuning.all_of_it:  # a second U-Net would not fit where one does
        assert run.trained.model.unet is base.unet
    else:
        assert all(torch.equal(before[key], tensor) for key, tensor in base.unet.state_dict().items())


def test_the_file_says_in_which_precision_it_was_trained(folder, base):
    loop = replace(LOOP, precision="auto", steps=1, save_every=1, evaluate_every=1)
    run = ready(tuning(folder, adapter=AdapterOptions(rank=2)), base, loop)
    tune(run)
    own = precision_on(base.device)
    assert run.loop.precision == own != "auto"
    assert load_metadata(run.tuning.output / "out.safetensors")["ss_mixed_precision"] == own
    with run.objective.lower_precision():
        assert torch.nn.Linear(1, 1)(torch.ones(1)).dtype == DTYPES[own]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("text_rate", [0.0, 4e-4, None])
def test_text_towers_have_a_rate_of_their_own(method, text_rate, folder, base):
    """Adam's first step moves a weight by the rate, whatever its gradient (Kingma & Ba 2015, section 2.1)."""
    settings = tuning(folder, method=method, adapter=AdapterOptions(rank=2), text=True, text_rate=text_rate)
    run = ready(settings, base, replace(LOOP, steps=3, warmup=2, rate=1e-3, save_every=3, evaluate_every=3))
    before = {name: p.detach().clone() for name, p in run.objective.named_parameters() if p.requires_grad}
    text = {id(p) for tower in run.trained.model.text for p in tower.parameters()}  # type: ignore[attr-defined]
    average = train(run.objective, replace(run.loop, steps=1, warmup=1, weight_decay=0.0), folder.parent / "one")
    moved = {
        name: float((p.detach() - before[name]).abs().max())
        for name, p in run.objective.named_parameters()
        if name in before
    }
    assert average.weights.keys() == moved.keys()
    of_text = [moved[name] for name, p in run.objective.named_parameters() if name in moved and id(p) in text]
    of_unet = [moved[name] for name, p in run.objective.named_parameters() if name in moved and id(p) not in text]
    assert max(of_unet) == pytest.approx(1e-3, rel=0.01)
    assert max(of_text) == pytest.approx(1e-3 if text_rate is None else text_rate, rel=0.01)
    if method == "lora":
        tune(run)
        told = load_metadata(run.tuning.output / "out.safetensors")
        assert float(told["ss_unet_lr"]) == float(told["ss_learning_rate"]) == 1e-3
        assert float(told["ss_text_encoder_lr"]) == (1e-3 if text_rate is None else text_rate)


def load_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_losses_fall_and_the_best_step_is_written(folder, base):
    loop = replace(LOOP, steps=30, batch=4, evaluate_every=10, save_every=30)
    run = ready(tuning(folder, method="full"), base, loop)
    measured = tune(run)
    assert measured[-1].train.mean() < 0.9 * measured[0].train.mean()
    assert load_measured(run.tuning.output, mark_of(run.objective), 10)[-1].step == 10


def test_what_was_measured_of_other_settings_is_passed_over(folder, base, caplog):
    """A run that was stopped before its first save leaves measurements behind, and nothing that refuses the next."""
    settings = [tuning(folder, adapter=AdapterOptions(rank=2), noising=Noising(offset=offset)) for offset in (0.0, 0.1)]
    runs = [ready(each, base, replace(LOOP, rate=0.0, steps=2)) for each in settings]
    first = tune(runs[0])
    output = runs[0].tuning.output
    for save in output.glob("step-*"):
        shutil.rmtree(save)
    measured = output / "measured"
    shutil.copy(measured / "step-00000002.safetensors", measured / "step-00000001.safetensors")
    seen = tune(runs[1])
    assert [each.step for each in first] == [0, 2] and [each.step for each in seen] == [0, 2]
    (line,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert line == f"{measured}: 3 measurements are of other settings, and are passed over"


def test_a_run_that_is_refused_writes_over_nothing_of_the_one_before(folder, base):
    first, other = (
        ready(tuning(folder, method="embedding", like="thing", min_snr=least), base, replace(LOOP, steps=2))
        for least in (None, 5.0)
    )
    tune(first)
    measured = sorted((first.tuning.output / "measured").iterdir())
    before = [path.read_bytes() for path in measured]
    with pytest.raises(LdmError, match=r"was begun with min_snr = None, now 5\.0"):
        tune(other)
    assert [path.read_bytes() for path in measured] == before


def test_a_base_in_bytes_is_refused(folder, base):
    with pytest.raises(LdmError, match="base: was loaded with store='int8', whose weights cannot be trained"):
        ready(tuning(folder), replace(base, store="int8"))


def test_nothing_is_measured_where_another_run_is_under_way(folder, base):
    run = ready(tuning(folder, method="embedding", like="thing"), base)
    with held(run.tuning.output), pytest.raises(LdmError, match="is being written by process"):
        tune(run)
    assert not (run.tuning.output / "measured").exists()


def test_a_base_on_the_cpu_is_tuned_there_where_there_is_a_gpu_too(folder, base, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as a new process, in which the first to ask decides
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        run = ready(tuning(folder, method="embedding"), base)
    assert PartialState().device == torch.device("cpu") and len(tune(run)) == 3


def test_a_run_goes_on_where_it_stopped(folder, base):
    straight = ready(tuning(folder), base)
    tune(straight)
    parts = replace(tuning(folder), output=folder.parent / "parts")
    tune(ready(parts, base, replace(LOOP, steps=2)))
    resumed = ready(parts, base)
    tune(resumed)
    theirs = dict(straight.objective.named_parameters())
    for name, parameter in resumed.objective.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_weights_of_an_earlier_end_give_way_to_later_ones(folder, base):
    """Where nothing is learned no step is better than none: the last one is written, and that of a longer run later."""
    settings = tuning(folder, adapter=AdapterOptions(rank=2))
    result = settings.output / "out.safetensors"
    for steps in (2, 4):
        tune(ready(settings, base, replace(LOOP, steps=steps, rate=0.0)))
        assert load_metadata(result)["ss_steps"] == str(steps)
    written = result.stat().st_mtime_ns
    tune(ready(settings, base, replace(LOOP, steps=4, rate=0.0)))
    assert result.stat().st_mtime_ns == written  # a finished run leaves it alone
    result.unlink()
    tune(ready(settings, base, replace(LOOP, steps=4, rate=0.0)))
    assert load_metadata(result)["ss_steps"] == "4"


def test_a_step_that_was_best_stays_when_later_ones_are_worse(folder, file):
    settings = tuning(folder, method="full", held_out=0.5)
    first = replace(LOOP, steps=20, batch=4, evaluate_every=20, save_every=20)
    tune(ready(settings, load(file, device="cpu"), first))
    assert load_metadata(settings.output / "out.safetensors")["ss_steps"] == "20"
    longer = replace(first, steps=24, evaluate_every=24, save_every=24, rate=1.0)  # too fast: it comes apart
    tune(ready(settings, load(file, device="cpu"), longer))
    assert load_metadata(settings.output / "out.safetensors")["ss_steps"] == "20"


@pytest.mark.parametrize("kind", ["masks", "hints"])
def test_other_masks_or_hints_are_another_run(kind, folder, base):
    where = folder.parent / kind
    where.mkdir()
    for number in range(len(COLORS)):
        Image.new("RGB", (64, 64), "white").save(where / f"{number}.png")
    method = {"method": "controlnet"} if kind == "hints" else {"adapter": AdapterOptions(rank=2)}
    settings = tuning(folder, defaults=Defaults(**{kind: where}), **method)
    before = ready(settings, base).objective.facts()
    assert ready(settings, base).objective.facts() == before
    Image.new("RGB", (64, 64), "gray").save(where / "3.png")
    after = ready(settings, base).objective.facts()
    assert [name for name in before if before[name] != after[name]] == ["masks and hints"]
    assert ready(tuning(folder), base).objective.facts()["masks and hints"] is None


def test_pictures_of_the_class_count_as_they_are_told(folder, base):
    of_class = folder.parent / "class"
    of_class.mkdir()
    Image.new("RGB", (64, 64), "yellow").save(of_class / "y.png")
    settings = tuning(folder, method="dreambooth", adapter=AdapterOptions(rank=2))
    settings = replace(settings, defaults=Defaults(regular=of_class, regular_tokens="a square"))
    settings = replace(settings, noising=replace(settings.noising, prior=0.25))
    run = ready(settings, base)
    batches = [run.objective.batch(Draw(2, n, step_generator(0, n))) for n in range(len(run.objective.epochs))]
    weights = torch.cat([batch["weight"] for batch in batches])
    assert set(weights.tolist()) == {0.25, 1.0} and abs(int((weights == 1).sum()) - len(weights) / 2) <= 1
    whole = replace(run.objective.noising, prior=1.0)
    batch = batches[0]
    plain = run.objective.loss({**batch, "weight": torch.ones(2)})
    assert torch.allclose(run.objective.loss(batch), plain * batch["weight"]) and whole.prior == 1


def test_offset_and_perturbation_are_drawn_as_they_say(folder, base):
    settings = tuning(folder, adapter=AdapterOptions(rank=2))
    plain = ready(settings, base).objective
    loud = ready(replace(settings, noising=replace(settings.noising, offset=0.5, perturbation=0.2)), base).objective
    offsets, more = [], []
    for number in range(40):
        batch = loud.batch(Draw(2, number, step_generator(0, number)))
        quiet = plain.batch(Draw(2, number, step_generator(0, number)))
        difference = batch["noise"] - quiet["noise"]
        assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
        offsets.append(difference[:, :, 0, 0].flatten())
        more.append((batch["shown"] - batch["noise"]).flatten())
    assert float(torch.cat(offsets).std()) == pytest.approx(0.5, rel=0.15)
    assert float(torch.cat(more).std()) == pytest.approx(0.2, rel=0.05)


def test_the_plan_counts_and_changes_nothing(folder, base):
    run = ready(tuning(folder, adapter=AdapterOptions(rank=4)), base)
    before = {name: p.clone() for name, p in run.objective.named_parameters()}
    planned = plan(run.objective, run.loop, run.kept, len(run.held_out), 1)
    assert (planned.pictures, planned.held_out, planned.regular) == (5, 1, 0)
    assert planned.buckets == {(64, 64): 5} and planned.epochs == pytest.approx(4 * 2 / 5)
    assert planned.trained == sum(p.numel() for p in run.objective.parameters() if p.requires_grad) > 0
    assert planned.seconds > 0 and len(planned.lines()) == 5
    assert all(torch.equal(before[name], p) for name, p in run.objective.named_parameters())
    assert all(p.grad is None for p in run.objective.parameters())


@pytest.mark.parametrize(("count", "share", "expected"), [(1, None, 0), (5, None, 1), (19, None, 1), (20, None, 4),
                                                          (1000, None, 32), (10, 0.5, 5), (10, 0.0, 0)])  # fmt: skip
def test_how_many_are_held_out(count, share, expected):
    chosen = held_out_numbers(count, share, 0)
    assert len(chosen) == expected == len(set(chosen)) and all(0 <= i < count for i in chosen)
