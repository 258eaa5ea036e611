"""Fields that nothing reads beside another field's value: a warning names them, and a run is the same without them."""

import pytest
from good_input import make_trainer

from grkd_trl import GRKDConfig, SeqKDConfig
from grkd_trl.classification import GRKDForClassificationConfig


OTHER_VALUES = {
    "relative_top_k": 3,
    "soft_label_temperature": 2.0,
    "alpha_start": 0.5,
    "alpha_end": 0.9,
    "alpha_schedule": "cosine",
    "num_completions": 8,
    "num_teacher_completions": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "max_completion_length": 3,
    "generate_every": 2,
    "reuse_groups": 2,
    "log_completions": 1,
    "vllm_mode": "server",
    "vllm_server_base_url": "http://localhost:8000",
    "vllm_tensor_parallel_size": 2,
    "vllm_gpu_memory_utilization": 0.9,
}
DECLARED = [
    (name, *where)
    for where, names in GRKDConfig.unread_with.items()
    for name in names
    if where[0] != "completion_source" or where[1] == "dataset"  # of a dataset alone, to be quick
]


def test_every_declared_field_is_tested():
    assert {name for name, _, _ in DECLARED} == set(OTHER_VALUES)


@pytest.mark.parametrize("name, other, value", DECLARED)
def test_run_is_the_same(tmp_path, warnings, tokenizer, name, other, value):
    losses = []
    for given in ({}, {name: OTHER_VALUES[name]}):
        config = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, other: value} | given
        trainer = make_trainer(tmp_path, tokenizer, config=config)
        trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
        said = [message for message in warnings if f"With `{other}={value!r}` nothing reads" in message]
        assert len(said) == len(given)
    assert said == [f"With `{other}={value!r}` nothing reads `{name}={OTHER_VALUES[name]!r}`."]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


@pytest.mark.parametrize(
    "config_class, fields, message",
    [
        (
            GRKDConfig,
            {"num_completions": 8, "top_p": 0.9},
            "With `completion_source='dataset'` nothing reads `num_completions=8`, `top_p=0.9`.",
        ),
        (
            GRKDConfig,
            {"completion_source": "student", "num_teacher_completions": 2},
            "With `completion_source='student'` nothing reads `num_teacher_completions=2`.",
        ),
        (
            SeqKDConfig,
            {"decoding": "greedy", "temperature": 0.7},
            "With `decoding='greedy'` nothing reads `temperature=0.7`.",
        ),
        (
            SeqKDConfig,
            {"decoding": "sampling", "num_beams": 2},
            "With `decoding='sampling'` nothing reads `num_beams=2`.",
        ),
        (
            GRKDForClassificationConfig,
            {"sampling_temperature": 0.1},
            "With `sampled_classes=None` nothing reads `sampling_temperature=0.1`.",
        ),
    ],
)
def test_warning(tmp_path, warnings, config_class, fields, message):
    config_class(output_dir=tmp_path, **fields)
    assert warnings == [message]


@pytest.mark.parametrize(
    "config_class, fields",
    [
        (GRKDConfig, {}),
        (GRKDConfig, {"completion_source": "mixed", "num_completions": 8, "num_teacher_completions": 2, "top_p": 0.9}),
        (GRKDConfig, {"relative_level": "tokens", "relative_top_k": 3, "soft_label_temperature": 2.0}),
        (SeqKDConfig, {"num_beams": 2}),
        (SeqKDConfig, {"decoding": "sampling", "temperature": 0.7, "top_p": 0.9}),
        (GRKDForClassificationConfig, {"sampled_classes": 3, "sampling_temperature": 0.1}),
    ],
)
def test_no_warning_where_they_are_read(tmp_path, warnings, config_class, fields):
    config_class(output_dir=tmp_path, **fields)
    assert warnings == []
