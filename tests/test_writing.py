"""Completions that a model writes: greedy ones against a plain loop, sampled ones against the distribution."""

import random
from contextlib import nullcontext
from functools import wraps

import pytest
import torch
from scipy.stats import chisquare
from test_teacher import chat_tokenizer, make_model
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_tokenizer

from grkd_trl.teacher import generate_completions, prompt_cache, sample_from_mixture, selection_probs
from grkd_trl.teacher.draws import ManyEnded, row_numbers


@pytest.fixture
def model(tokenizer):
    return make_model("llama", len(tokenizer))


def make_prompts(words):
    draw = random.Random(1)
    return [" ".join(draw.choice(words) for _ in range(length)) for length in (3, 7, 1, 5, 2, 7, 4)]


@torch.no_grad()
def argmax_loop(model, tokenizer, prompt_ids, max_new_tokens, ends):
    """Text and whether it was cut, token by token and without a cache."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + max_new_tokens:
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in ends:
            break
    text, cut = tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True), ids[-1] not in ends
    return text.rstrip("\ufffd") if cut else text, cut  # without the bytes of a character that was cut


def write(model, tokenizer, prompts, **kwargs):
    return generate_completions(model, tokenizer, prompts, **{"max_new_tokens": 12, "progress": False} | kwargs)


def likely_end(model, tokenizer, bias):
    """Raise the logit of EOS, so that some completions end and some are cut."""
    head = model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with torch.no_grad():
        head.bias[tokenizer.eos_token_id] = bias
    return model


class TestGreedy:
    @pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
    def test_equals_a_loop_of_argmax(self, tokenizer, words, architecture):
        model, prompts = make_model(architecture, len(tokenizer)), make_prompts(words)
        texts, clipped = write(model, tokenizer, prompts, temperature=0.0)
        for prompt, text, cut in zip(prompts, texts, clipped, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            assert (text[0], cut[0]) == argmax_loop(model, tokenizer, ids, 12, {tokenizer.eos_token_id})
        assert len(set(map(tuple, texts))) > 3

    def test_ends(self, tokenizer, words, model):
        """EOS ends a completion, and so does what the generation config of a chat model adds."""
        prompts, eos = make_prompts(words), tokenizer.eos_token_id
        for bias in range(10):  # until some end and some are cut
            likely_end(model, tokenizer, bias / 2)
            if len(set(map(tuple, write(model, tokenizer, prompts, temperature=0.0)[1]))) == 2:
                break
        other = argmax_loop(model, tokenizer, tokenizer(prompts[1])["input_ids"], 1, ())[0]
        turn = tokenizer.convert_tokens_to_ids(other)
        flags = []
        for ends in ({eos}, {eos, turn}):
            model.generation_config.eos_token_id = sorted(ends)
            texts, clipped = write(model, tokenizer, prompts, temperature=0.0)
            for prompt, text, cut in zip(prompts, texts, clipped, strict=True):
                expected = argmax_loop(model, tokenizer, tokenizer(prompt)["input_ids"], 12, ends)
                assert (text[0], cut[0]) == expected
            flags.append([cut[0] for cut in clipped])
        assert set(flags[0]) == {True, False}  # some end and some are cut, and by another end others
        assert flags[0] != flags[1]

    def test_end_at_the_last_token_is_not_cut(self, tokenizer, words, model):
        likely_end(model, tokenizer, 1e4)
        assert write(model, tokenizer, words[:2], temperature=0.0, max_new_tokens=1) == ([[""], [""]], [[False]] * 2)
        likely_end(model, tokenizer, -1e4)
        assert write(model, tokenizer, words[:2], temperature=0.0, max_new_tokens=1)[1] == [[True]] * 2

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_batches_do_not_matter(self, tokenizer, words, model, batch_size):
        prompts = make_prompts(words)
        whole = write(model, tokenizer, prompts, temperature=0.0)
        assert write(model, tokenizer, prompts, temperature=0.0, batch_size=batch_size) == whole
        turned = write(model, tokenizer, prompts[::-1], temperature=0.0, batch_size=batch_size)
        assert turned == (whole[0][::-1], whole[1][::-1])

    @pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
    def test_conversations(self, template):
        tokenizer = chat_tokenizer(template)
        model = make_model("llama", len(tokenizer))
        prompts = [[{"role": "user", "content": text}] for text in ("Hi.", "What is 2 + 2?")]
        texts, clipped = write(model, tokenizer, prompts, temperature=0.0)
        ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
        for prompt, text, cut in zip(prompts, texts, clipped, strict=True):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            assert (text[0], cut[0]) == argmax_loop(model, tokenizer, ids, 12, ends)

    def test_tokenizer_without_a_pad_token(self, model, words):
        tokenizer, prompts = tiny_tokenizer(), make_prompts(words)
        expected = write(model, tokenizer, prompts, temperature=0.0)
        tokenizer.pad_token = None
        assert write(model, tokenizer, prompts, temperature=0.0) == expected

    @pytest.mark.parametrize("training", [True, False])
    def test_evaluates_and_restores_the_mode(self, tokenizer, words, training):
        model, prompts = make_model("llama", len(tokenizer), attention_dropout=0.9), make_prompts(words)
        expected = write(model, tokenizer, prompts, temperature=0.0)
        model.train(training)
        assert write(model, tokenizer, prompts, temperature=0.0) == expected
        assert {module.training for module in model.modules()} == {training}

    def test_no_prompts(self, tokenizer, model):
        assert write(model, tokenizer, []) == ([], [])


DRAWS = 4000


@torch.no_grad()
def first_token_pvalue(model, tokenizer, temperature, *, expected_temperature=None, top_p=1.0, nucleus=None):
    """Chi-square test of the first words drawn against the model's probabilities."""
    prompt = min(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    torch.manual_seed(0)
    texts, _ = write(
        model,
        tokenizer,
        [prompt] * 4,
        num_completions=DRAWS // 4,
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
    )
    logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    probabilities = (logits / (expected_temperature or temperature)).softmax(-1)
    if nucleus is not None:
        probabilities = torch.where(nucleus(probabilities), probabilities, 0.0)
        probabilities /= probabilities.sum()
    by_text = {}
    for token, probability in enumerate(probabilities.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)  # "" for every special token
        by_text[text] = by_text.get(text, 0.0) + probability
    drawn = [text for group in texts for text in group]
    assert len(drawn) == DRAWS
    impossible = [text for text in drawn if by_text[text] == 0]
    if impossible:
        return 0.0
    counts = {text: drawn.count(text) for text in by_text}
    rare = [text for text, probability in by_text.items() if DRAWS * probability < 10]
    common = [text for text in by_text if text not in rare]
    bins = [[text] for text in common] + [rare] * (sum(map(by_text.get, rare)) * DRAWS >= 10)
    observed = [sum(map(counts.get, texts)) for texts in bins]
    expected = [DRAWS * sum(map(by_text.get, texts)) for texts in bins]
    assert len(bins) > 3
    return chisquare(observed, [value * sum(observed) / sum(expected) for value in expected]).pvalue


def nucleus_of(top_p):
    def nucleus(probabilities):
        values, order = probabilities.sort(descending=True)
        keep = values.cumsum(0) - values < top_p
        return torch.zeros_like(keep).scatter(0, order, keep)

    return nucleus


class TestSampling:
    @pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
    def test_follows_the_model(self, model, tokenizer, temperature):
        assert first_token_pvalue(model, tokenizer, temperature) > 1e-3

    def test_top_p(self, model, tokenizer):
        assert first_token_pvalue(model, tokenizer, 1.0, top_p=0.6, nucleus=nucleus_of(0.6)) > 1e-3
        assert first_token_pvalue(model, tokenizer, 1.0, top_p=0.6) < 1e-3
        assert first_token_pvalue(model, tokenizer, 1.0, nucleus=nucleus_of(0.6)) == 0

    @pytest.mark.parametrize(
        "setting",
        [
            {"temperature": 0.1},
            {"top_k": 2},
            {"top_p": 0.3},
            {"repetition_penalty": 3.0},
            {"min_p": 0.5},
            {"typical_p": 0.3},
            {"epsilon_cutoff": 0.1},
            {"suppress_tokens": [3, 4, 5, 6]},
            {"num_beams": 2},
        ],
        ids=str,
    )
    def test_settings_of_the_checkpoint_do_not_leak(self, model, tokenizer, setting):
        """Chat models come with sampling settings of their own in their generation config."""
        model.generation_config.update(do_sample=True, **setting)
        kept = model.generation_config.to_dict()
        assert first_token_pvalue(model, tokenizer, 1.0) > 1e-3
        assert model.generation_config.to_dict() == kept

    @pytest.mark.parametrize(
        "setting",
        [
            {"min_new_tokens": 6},
            {"min_length": 30},
            {"guidance_scale": 1.5},
            {"bad_words_ids": [[5]]},
            {"sequence_bias": [[[5], 3.0]]},
            {"begin_suppress_tokens": [5, 6, 7]},
            {"forced_eos_token_id": 5},
            {"exponential_decay_length_penalty": (2, 1.5)},
            {"encoder_repetition_penalty": 2.0},
            {"encoder_no_repeat_ngram_size": 2},
            {"top_h": 0.3},
            {"max_time": 1e-9},
            {"return_dict_in_generate": True},
        ],
        ids=str,
    )
    def test_what_a_checkpoint_asks_for_changes_no_draw(self, tokenizer, words, model, setting):
        written = []
        for asked in ({}, setting):
            model.generation_config.update(**asked)
            torch.manual_seed(0)
            written.append(write(likely_end(model, tokenizer, 1.0), tokenizer, make_prompts(words), num_completions=4))
        assert written[0] == written[1]

    def test_layout(self, tokenizer, words, model):
        """Each prompt's completions stand in its row: the model is made so sure that sampling is greedy."""
        with torch.no_grad():
            model.lm_head.weight *= 1e3
        prompts = make_prompts(words)
        greedy, greedy_clipped = write(model, tokenizer, prompts, temperature=0.0)
        texts, clipped = write(model, tokenizer, prompts, num_completions=3, batch_size=2)
        assert texts == [group * 3 for group in greedy]
        assert clipped == [group * 3 for group in greedy_clipped]

    def test_completions_of_a_group_are_drawn_apart(self, tokenizer, words, model):
        texts, _ = write(model, tokenizer, make_prompts(words), num_completions=4)
        assert all(len(set(group)) > 1 for group in texts)

    def test_beams_draw_nothing(self, tokenizer, words, model):
        with pytest.raises(ValueError, match=r"`temperature=0.5` with `num_beams=2`"):
            write(model, tokenizer, words[:1], num_beams=2, temperature=0.5)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_batches_do_not_matter(self, tokenizer, words, model, batch_size):
        drawn = []
        for size in (64, batch_size):
            torch.manual_seed(0)
            drawn.append(write(model, tokenizer, make_prompts(words), num_completions=2, batch_size=size))
        assert drawn[0] == drawn[1]

    def test_draws_come_from_the_global_generator(self, tokenizer, words, model):
        prompts, drawn = make_prompts(words), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(write(model, tokenizer, prompts, num_completions=2))
        assert drawn[0] == drawn[1] != drawn[2]

    def test_clipped_flags_go_with_their_texts(self, tokenizer, words, model):
        likely_end(model, tokenizer, 2.0)
        torch.manual_seed(0)
        texts, clipped = write(model, tokenizer, make_prompts(words), num_completions=4, max_new_tokens=6)
        lengths = [
            (len(text.split()), cut)
            for texts, cuts in zip(texts, clipped, strict=True)
            for text, cut in zip(texts, cuts, strict=True)
        ]
        assert {cut for _, cut in lengths} == {True, False}
        special = len(tokenizer.all_special_tokens) > 1  # an unknown or padding token may be drawn, and leaves no text
        assert all(length < 6 for length, cut in lengths if not cut)
        assert all(length == 6 or special for length, cut in lengths if cut)
        assert sum(length == 6 for length, cut in lengths if cut) > 0


class TestSharedPrompts:
    """A prompt is read once for the completions of its group, and they are those of a prompt read once each."""

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3", "qwen3", "opt", "mistral"])
    def test_same_completions_as_reading_every_row(self, tokenizer, words, architecture, monkeypatch):
        model, prompts = make_model(architecture, len(tokenizer)), make_prompts(words)
        written, read = [], []
        for share in (True, False):
            monkeypatch.setattr(prompt_cache, "_proved", {} if share else {model: False})
            model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
            torch.manual_seed(0)
            written.append(write(model, tokenizer, prompts, num_completions=3, batch_size=3))
            if share:
                assert prompt_cache._proved == {model: True}
                assert max(len(ids) for ids in read if ids.shape[1] > 1) == 3  # prompts, not rows
        assert written[0] == written[1] and len({text for group in written[0][0] for text in group}) > 9

    def test_a_model_that_goes_on_otherwise_reads_every_row(self, tokenizer, words, model, monkeypatch):
        prompts, forward = make_prompts(words), model.forward
        expected = write(model, tokenizer, prompts, num_completions=2, temperature=0.0)

        @wraps(forward)
        def shifted(**kwargs):
            outputs = forward(**kwargs)
            outputs.logits = outputs.logits + (kwargs["input_ids"].shape[1] == 1)  # and no other token is chosen
            return outputs

        monkeypatch.setattr(prompt_cache, "_proved", {})
        model.forward = shifted
        assert write(model, tokenizer, prompts, num_completions=2, temperature=0.0) == expected
        assert prompt_cache._proved == {model: False}

    @pytest.mark.parametrize("kind", ["static", "hybrid"])
    def test_a_checkpoint_that_asks_for_another_cache(self, tokenizer, words, model, kind):
        prompts = make_prompts(words)
        expected = write(model, tokenizer, prompts, num_completions=2, temperature=0.0)
        model.generation_config.cache_implementation = kind
        assert write(model, tokenizer, prompts, num_completions=2, temperature=0.0) == expected

    def test_state_that_is_no_cache_of_keys_reads_every_row(self, tokenizer, words):
        model, prompts = make_model("mamba", len(tokenizer)), make_prompts(words)
        texts, _ = write(model, tokenizer, prompts, num_completions=2, temperature=0.0)
        assert texts == [group * 2 for group in write(model, tokenizer, prompts, temperature=0.0)[0]]


class TestRowsThatEnded:
    """They leave the batch, and the others go on as if they had not."""

    @pytest.mark.parametrize(("num_completions", "temperature"), [(1, 0.0), (3, 1.0)])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3", "qwen3", "opt", "mistral"])
    def test_same_completions(self, tokenizer, words, architecture, temperature, num_completions, monkeypatch):
        window = {"sliding_window": 4} if architecture in ("gemma2", "gemma3", "mistral") else {}
        model, prompts = make_model(architecture, len(tokenizer), **window), make_prompts(words)
        written, read = [], []
        ends = [tokenizer.eos_token_id, *range(4, 12)]  # a third of the vocabulary
        model.generation_config.eos_token_id = ends
        for leave in (True, False):
            if not leave:
                monkeypatch.setattr(ManyEnded, "__call__", lambda self, ids, *_: ids[:, 0] < 0)
            torch.manual_seed(0)
            read.append([])
            keep = lambda _, args, kwargs: read[-1].append(kwargs["input_ids"].shape)  # noqa: E731
            hook = model.register_forward_pre_hook(keep, with_kwargs=True)
            settings = {"num_completions": num_completions, "temperature": temperature, "batch_size": 5}
            written.append(write(model, tokenizer, prompts, **settings))
            hook.remove()
        assert written[0] == written[1]
        batches = [[rows for rows, length in sizes if length == 1] for sizes in read]
        assert sum(batches[0]) < 0.8 * sum(batches[1])


class TestMixturesOfExperts:
    """Config that asks for router logits, as TRL saves it: writing needs no load-balancing loss."""

    @staticmethod
    def make(kind, tokenizer, **kwargs):
        experts = {"num_local_experts": 4} if kind in ("gpt_oss", "mixtral") else {"num_experts": 4}
        experts |= {"moe_intermediate_size": 32} if kind == "qwen3_moe" else {}
        return make_model(kind, len(tokenizer), num_experts_per_tok=2, **experts, **kwargs)

    @pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
    def test_writes_as_without(self, tokenizer, words, kind):
        prompts = make_prompts(words)
        plain = write(self.make(kind, tokenizer), tokenizer, prompts, temperature=0.0)
        asked = self.make(kind, tokenizer, output_router_logits=True)
        assert write(asked, tokenizer, prompts, temperature=0.0) == plain

    def test_mixture_of_student_and_teacher(self, tokenizer, words):
        ids = torch.tensor([tokenizer(" ".join(words[:3]))["input_ids"], tokenizer(" ".join(words[3:6]))["input_ids"]])
        written = []
        for asks in (False, True):
            model = self.make("qwen3_moe", tokenizer, output_router_logits=asks)
            written.append(
                sample_from_mixture(
                    model,
                    lambda model=model: nullcontext(model),
                    ids,
                    torch.ones_like(ids),
                    teacher_share=0.5,
                    max_new_tokens=5,
                    eos_token_ids=[tokenizer.eos_token_id],
                    vocab_size=len(tokenizer),
                    numbers=row_numbers(0, 2, 5),
                )
            )
        assert written[0] == written[1]

    def test_calibration(self):
        tokenizer = byte_tokenizer()
        picked = [
            selection_probs(self.make("qwen3_moe", tokenizer, output_router_logits=asks), tokenizer, "a", ["b", "c"])
            for asks in (False, True)
        ]
        assert picked[0] == picked[1]
