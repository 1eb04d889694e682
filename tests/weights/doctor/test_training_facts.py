"""Training facts: from metadata as kohya's trainer writes it, and from metadata that somebody made up."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.weights.doctor.training_facts import training_facts

KOHYA = {
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "v1-5-pruned.safetensors",
    "ss_new_sd_model_hash": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    "ss_v2": "False",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "32",
    "ss_network_alpha": "16.0",
    "ss_network_args": json.dumps({"conv_dim": "8", "conv_alpha": "4"}),
    "ss_steps": "1500",
    "ss_max_train_steps": "3000",
    "ss_epoch": "5",
    "ss_num_epochs": "10",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "5e-05",
    "ss_lr_scheduler": "cosine",
    "ss_lr_warmup_steps": "100",
    "ss_gradient_accumulation_steps": "1",
    "ss_num_train_images": "1200",
    "ss_num_reg_images": "0",
    "ss_noise_offset": "0.05",
    "ss_min_snr_gamma": "None",
    "ss_clip_skip": "2",
    "ss_zero_terminal_snr": "True",
    "ss_datasets": json.dumps([{
        "is_dreambooth": True, "batch_size_per_device": 4, "resolution": [768, 512],
        "dirs": {"10_cat": {"n_repeats": 10, "img_count": 100}, "4_dog": {"n_repeats": 4, "img_count": 50}},
    }]),
    "ss_tag_frequency": json.dumps({"10_cat": {"cat": 100, " outdoors ": 40}, "4_dog": {"dog": 50, "outdoors": 30}}),
    "ss_training_started_at": "1700000000.5",
    "ss_training_finished_at": "1700005400.5",
    "ss_training_comment": "None",
}  # fmt: skip


def test_a_training_run_in_words() -> None:
    assert training_facts(KOHYA) == {
        "base": "v1-5-pruned.safetensors, Stable Diffusion 1.x, hash 6ce0161689",
        "network": "networks.lora, rank 32, alpha 16.0, convolutions rank 8 alpha 4",
        "length": "1,500 steps of 3,000, epoch 5 of 10, batches of 4",
        "learning": "AdamW8bit(weight_decay=0.1), rate 0.0001, U-Net 0.0001, text encoder 5e-05, cosine, "
        "100 steps of warm-up",
        "options": "noise offset 0.05, clip skip 2, zero terminal SNR",
        "pictures": "1,200 with repeats, 10_cat: 100 x 10, 4_dog: 50 x 4, at 768x512",
        "top tags": "cat (100), outdoors (70), dog (50)",
        "time": "2023-11-14, 1 h 30 min",
    }


def test_nothing_told_nothing_said() -> None:
    assert training_facts({"format": "pt", "ss_clip_skip": "None"}) == {}


def test_what_kohya_keeps_without_metadata() -> None:
    told = {"ss_v2": "True", "ss_network_dim": "4", "ss_network_alpha": "1"}
    assert training_facts(told) == {"base": "Stable Diffusion 2.x", "network": "rank 4, alpha 1"}


def test_many_folders_and_tags_are_cut() -> None:
    folders = {f"{i}_x": {"n_repeats": 1, "img_count": i} for i in range(9)}
    facts = training_facts({
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps({"a": {f"t{i}": i for i in range(30)}}),
    })  # fmt: skip
    assert facts["pictures"] == "8_x: 8 x 1, 7_x: 7 x 1, 6_x: 6 x 1, 5_x: 5 x 1, 5 more folders"
    assert facts["top tags"].startswith("t29 (29), t28 (28)")
    assert facts["top tags"].count("(") == 10


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("dirs"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dirs", "resolution", "img_count", "n_repeats", "algo", "conv_dim", "a"]), inner, max_size=3
    ),
    max_leaves=8,
)  # fmt: skip
strings = any_json.map(json.dumps) | st.text(max_size=6) | st.sampled_from(["nan", "-inf", "1e400", "[" * 9999, "{"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*KOHYA, "ss_dataset_dirs", "ss_total_batch_size"]), strings, max_size=6))
def test_made_up_metadata_never_raises(metadata: dict[str, str]) -> None:
    assert all(type(said) is str and said for said in training_facts(metadata).values())
