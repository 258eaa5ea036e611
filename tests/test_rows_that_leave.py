"""Rows that ended leave a batch, with models that keep something of the whole batch beside their cache."""

import pytest
import torch
from test_teacher import make_model
from test_writing import make_prompts, write
from tiny import byte_tokenizer
from vision import make_processor, make_vision_model

from grkd_trl.teacher import prompt_cache


@pytest.mark.parametrize("unscaled", [40, 80])
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "dynamic"), ("phi3", "longrope")])
def test_rotary_frequencies_of_the_longest_row(architecture, kind, unscaled, monkeypatch):
    tokenizer, written = byte_tokenizer(), []
    rope, sizes = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}, {"max_position_embeddings": unscaled}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": unscaled}
        sizes = {"max_position_embeddings": 4 * unscaled, "original_max_position_embeddings": unscaled}
    model = make_model(architecture, len(tokenizer), rope_parameters=rope, **sizes)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, len(tokenizer), 6)]
    prompts = make_prompts(["alpha", "beta", "gamma", "delta", "eps", "zeta"])  # of up to 38 bytes
    for share in (True, False):
        monkeypatch.setattr(prompt_cache, "_proved", {} if share else {model: False})
        torch.manual_seed(0)
        written.append(write(model, tokenizer, prompts, num_completions=3, max_new_tokens=24, batch_size=5))
        assert prompt_cache._proved == {model: share}  # whose cache is shared where the batch is short enough
    assert written[0] == written[1]


def test_positions_of_images(monkeypatch):
    tokenizer, model, written = make_processor("qwen2_5_vl").tokenizer, make_vision_model("qwen2_5_vl").eval(), []
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, len(tokenizer), 4)]
    prompts = [" ".join(["w"] * length) for length in (3, 7, 1, 5, 2)]
    for share in (True, False):
        monkeypatch.setattr(prompt_cache, "_proved", {} if share else {model: False})
        torch.manual_seed(0)
        written.append(write(model, tokenizer, prompts, num_completions=3))
        assert prompt_cache._proved == {model: share}
    assert written[0] == written[1]
