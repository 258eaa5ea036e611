"""Fields of `GRKDConfig` that cannot be: an error which names the field, what was given and what is accepted."""

import math

import pytest
from good_input import make_config


NAN, INF = math.nan, math.inf


class TestConfig:
    @pytest.mark.parametrize("value", [0.0, -1.0, NAN, -INF])
    @pytest.mark.parametrize("name", ["ranking_temperature", "soft_label_temperature"])
    def test_temperatures(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be above 0, got {value}"):
            make_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF])
    @pytest.mark.parametrize("name", ["alpha_start", "alpha_end"])
    def test_alpha(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=rf"`{name}` is a share and must lie in 0\.\.1, got {value}"):
            make_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_alpha_may_be_at_the_ends(self, tmp_path, value):
        assert make_config(tmp_path, alpha_start=value, alpha_end=value).alpha_end == value

    @pytest.mark.parametrize("value", [-0.5, NAN])
    @pytest.mark.parametrize("name", ["min_gap", "target_temperature"])
    def test_not_negative(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be 0 or above, got {value}"):
            make_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [1, 0, -3])
    def test_top_k(self, tmp_path, value):
        with pytest.raises(ValueError, match=f"`relative_top_k` must be at least 2 to make a pair, got {value}"):
            make_config(tmp_path, relative_top_k=value)

    @pytest.mark.parametrize(
        "name, choices",
        [
            ("soft_label", ["token", "aligned", "group", "none"]),
            ("relative_level", ["completions", "tokens"]),
            ("alpha_schedule", ["linear", "cosine", "constant"]),
            ("score", ["mean", "sum"]),
        ],
    )
    def test_choices(self, tmp_path, name, choices):
        for choice in choices:
            assert getattr(make_config(tmp_path, **{name: choice}), name) == choice
        for value in ("tokn", None):
            with pytest.raises(ValueError) as caught:
                make_config(tmp_path, **{name: value})
            assert f"`{name}` must be one of {choices}, got {value!r}" in str(caught.value)

    @pytest.mark.parametrize(
        "name, value",
        [
            ("packing", True),
            ("padding_free", True),
            ("assistant_only_loss", True),
            ("completion_only_loss", False),
            ("loss_type", "dft"),
            ("label_smoothing_factor", 0.1),
        ],
    )
    def test_fields_of_sft_that_train_on_something_else(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"`{name}`.*`GRKDConfig`.*whole completions.*Leave it at its default"):
            make_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [{"skip_prepare_dataset": True}, '{"skip_prepare_dataset": true}'], ids=str)
    def test_skipped_preparation(self, tmp_path, value):
        """Rows that are never checked nor tokenized would fail in the first batch, without a word of why."""
        with pytest.raises(ValueError, match="`dataset_kwargs`.*`GRKDConfig`"):
            make_config(tmp_path, dataset_kwargs=value)
