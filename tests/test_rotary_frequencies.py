"""Writing with models whose rotary frequencies depend on the longest row of a batch, which may leave it first."""

import pytest
import torch
from test_teacher import make_model
from test_writing import make_prompts, write
from tiny import byte_tokenizer

from grkd_trl.teacher import prompt_cache


@pytest.mark.parametrize("unscaled", [40, 80])
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "dynamic"), ("phi3", "longrope")])
def test_same_completions_as_reading_every_row(architecture, kind, unscaled, monkeypatch):
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
