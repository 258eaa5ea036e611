"""Batches of prompts by the tokens that their completions can come to, and searches with beams."""

import pytest
from test_teacher import make_model

from grkd_trl.teacher import LocalTeacher, generate_completions, writing


@pytest.mark.parametrize("budget", [60, 1, 10_000])
def test_a_batch_has_room_for_its_longest_rows(tokenizer, words, budget, monkeypatch):
    model, batches = make_model("llama", len(tokenizer)), []
    prompts = [" ".join(words[:length]) for length in (2, 9, 3, 2, 2, 30)]

    def generate(**kwargs):
        return LocalTeacher(model, tokenizer, **kwargs).generate(prompts, 2, seed=0, max_new_tokens=5)

    expected = generate()
    lengths = sorted(map(len, expected.prompt_ids), reverse=True)
    original = writing.prompt_cache
    monkeypatch.setattr(writing, "prompt_cache", lambda *args: batches.append(tuple(args[1].shape)) or original(*args))
    assert generate(written_tokens_per_batch=budget).completion_ids == expected.completion_ids
    assert sum(num for num, _ in batches) == len(prompts)
    while batches:
        num, longest = batches.pop(0)
        room = budget // (2 * (longest + 5))
        assert longest == lengths[0] and num == min(max(room, 1), len(lengths))
        lengths = lengths[num:]


def test_refusals(tokenizer, words):
    model = make_model("llama", len(tokenizer))
    with pytest.raises(ValueError, match="room for a prompt: got `batch_size=64` and `tokens_per_batch=0`"):
        generate_completions(model, tokenizer, words[:2], tokens_per_batch=0)
    with pytest.raises(ValueError, match="room for a prompt: got `batch_size=0`"):
        generate_completions(model, tokenizer, words[:2], batch_size=0)
    model.lm_head.weight.ds_id = 0  # DeepSpeed's mark of a shard
    with pytest.raises(ValueError, match="as many batches on every process"):
        generate_completions(model, tokenizer, words[:2], tokens_per_batch=100)


@pytest.mark.parametrize("setting", [{"length_penalty": -9.0}, {"early_stopping": True}], ids=str)
def test_beams_are_ranked_as_no_checkpoint_asks_for(tokenizer, words, setting):
    model = make_model("llama", len(tokenizer))
    prompts = [" ".join(words[:length]) for length in (2, 9, 3)]
    search = {"num_beams": 4, "num_completions": 2, "temperature": 0.0, "max_new_tokens": 12}
    expected = generate_completions(model, tokenizer, prompts, **search)
    model.generation_config.update(**setting)
    assert generate_completions(model, tokenizer, prompts, **search) == expected
