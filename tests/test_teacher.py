import random

import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model, tiny_tokenizer

from grkd_trl.scoring import rows as scoring_rows
from grkd_trl.teacher import generate_completions, load_teacher, local, score_groups


def make_model(architecture, vocab_size, **kwargs):
    """Far from uniform, so that a temperature and a cache can be seen in what is written."""
    return tiny_model(architecture, vocab_size, **{"initializer_range": 0.3} | kwargs).eval()


def chat_tokenizer(template):
    tokenizer = byte_tokenizer()
    if tokenizer.bos_token is None:  # the templates of Llama-3 and Gemma-2 write it
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def words(tokenizer):
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


@pytest.fixture
def model(tokenizer):
    return make_model("llama", len(tokenizer))


def make_groups(words, num=9):
    draw = random.Random(0)

    def text(low, high):
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    rows = []
    for _ in range(num):
        completions = [text(1, 9) for _ in range(draw.randint(2, 5))]
        clipped = [draw.random() < 0.3 for _ in completions]
        rows.append({"prompt": text(1, 8) + " ", "completions": completions, "clipped": clipped})
    assert any(any(row["clipped"]) for row in rows) and not all(all(row["clipped"]) for row in rows)
    return Dataset.from_list(rows)


@torch.no_grad()
def plain_score(model, prompt_ids, completion_ids, score="mean"):
    logits = model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0]
    logps = logits.log_softmax(-1)
    total = sum(
        logps[position - 1, token].item()
        for position, token in enumerate(prompt_ids + completion_ids)
        if position >= len(prompt_ids)
    )
    return total / len(completion_ids) if score == "mean" else total


def plain_scores(model, tokenizer, groups, score="mean"):
    """One completion at a time, tokenized by hand: words, then EOS unless it was cut."""

    def ids(text):
        return tokenizer.convert_tokens_to_ids(text.split())

    starts = tokenizer("")["input_ids"]  # a BOS, if the tokenizer adds one
    return [
        [
            plain_score(
                model, starts + ids(row["prompt"]), ids(text) + [tokenizer.eos_token_id] * (not clipped), score
            )
            for text, clipped in zip(row["completions"], row["clipped"], strict=True)
        ]
        for row in groups
    ]


def scored(model, tokenizer, groups, **kwargs):
    return score_groups(model, tokenizer, groups, progress=False, **kwargs)["teacher_scores"]


def assert_close(scores, expected):
    scores = list(scores)
    assert [len(row) for row in scores] == [len(row) for row in expected]
    for row, expected_row in zip(scores, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=0, abs=1e-5)


class TestScoreGroups:
    @pytest.mark.parametrize("tokens_per_batch", [1, 37, 100, 16384])
    @pytest.mark.parametrize("score", ["mean", "sum"])
    def test_equals_one_completion_at_a_time(self, model, tokenizer, words, tokens_per_batch, score):
        groups = make_groups(words)
        scores = scored(model, tokenizer, groups, score=score, tokens_per_batch=tokens_per_batch)
        assert_close(scores, plain_scores(model, tokenizer, groups, score))

    def test_other_architecture(self, tokenizer, words):
        groups, teacher = make_groups(words), make_model("gemma2", len(tokenizer), seed=4)
        assert_close(scored(teacher, tokenizer, groups), plain_scores(teacher, tokenizer, groups))

    def test_order_does_not_matter(self, model, tokenizer, words):
        groups = make_groups(words)
        order = [4, 8, 0, 3, 7, 1, 6, 2, 5]
        scores = list(scored(model, tokenizer, groups, tokens_per_batch=100))
        assert_close(scored(model, tokenizer, groups.select(order), tokens_per_batch=100), [scores[i] for i in order])

    @pytest.mark.parametrize("shares", [True, False])
    def test_batches_hold_so_many_tokens(self, model, tokenizer, words, monkeypatch, shares):
        groups, sizes = make_groups(words), []
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda **kwargs: sizes.append(kwargs["input_ids"].numel()) or forward(**kwargs)
        )
        if not shares:
            for module in (local, scoring_rows):
                monkeypatch.setattr(module, "why_not_shared", lambda model: "it is not to")
        scored(model, tokenizer, groups, tokens_per_batch=100)
        assert all(size <= 100 for size in sizes)
        assert 100 < sum(sizes)
        assert len(sizes) < len(groups)
        sizes.clear()
        scored(model, tokenizer, groups, tokens_per_batch=1)  # a group is never split
        assert len(sizes) == len(groups)

    def test_a_prompt_that_is_shared_counts_once(self, model, monkeypatch):
        groups = [{"prompt_ids": [3] * 50, "completion_ids": [[4] * 5] * 4}] * 4
        batches = lambda: [len(rows) for rows in local.token_batches(model, groups, 150, progress=False)]  # noqa: E731
        assert batches() == [2, 2]
        monkeypatch.setattr(local, "why_not_shared", lambda model: "it is not to")
        assert batches() == [1, 1, 1, 1]

    def test_eos_counts_unless_clipped(self, model, tokenizer, words):
        rows = [{"prompt": f"{words[0]} ", "completions": [words[1]] * 2, "clipped": [False, True]}]
        ended, cut = scored(model, tokenizer, Dataset.from_list(rows), score="sum")[0]
        prompt_ids = tokenizer(f"{words[0]} ")["input_ids"]
        token = tokenizer.convert_tokens_to_ids(words[1])
        assert cut == pytest.approx(plain_score(model, prompt_ids, [token], "sum"), abs=1e-5)
        eos = plain_score(model, [*prompt_ids, token], [tokenizer.eos_token_id], "sum")
        assert ended - cut == pytest.approx(eos, abs=1e-5)

    def test_takes_the_place_of_older_scores(self, model, tokenizer, words):
        groups = make_groups(words)
        old = groups.add_column("teacher_scores", [[None] * len(row) for row in groups["completions"]])
        new = score_groups(model, tokenizer, old, progress=False)
        assert_close(new["teacher_scores"], plain_scores(model, tokenizer, groups))
        assert sorted(new.column_names) == ["clipped", "completions", "prompt", "teacher_scores"]
        assert new.remove_columns("teacher_scores").to_list() == groups.to_list()
        assert old["teacher_scores"][0][0] is None

    @pytest.mark.parametrize("training", [True, False])
    def test_evaluates_and_restores_the_mode(self, tokenizer, words, training):
        groups = make_groups(words)
        model = make_model("llama", len(tokenizer), attention_dropout=0.9)
        expected = plain_scores(model.eval(), tokenizer, groups)
        model.train(training)
        assert_close(scored(model, tokenizer, groups), expected)
        assert {module.training for module in model.modules()} == {training}
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_mode_is_restored_after_an_error(self, tokenizer, words):
        model = make_model("llama", 4).train()  # too small for the tokens
        with pytest.raises(IndexError):
            scored(model, tokenizer, make_groups(words))
        assert model.training

    def test_conversations(self, model):
        tokenizer = chat_tokenizer("qwen")
        teacher = make_model("llama", len(tokenizer))
        prompt = [{"role": "user", "content": "Hi."}]
        groups = Dataset.from_list([{"prompt": prompt, "completions": ["Hello", "Yes?"]}])
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        expected = []
        for text in ("Hello", "Yes?"):
            ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}])["input_ids"]
            assert ids[: len(prompt_ids)] == prompt_ids
            expected.append(plain_score(teacher, prompt_ids, ids[len(prompt_ids) :]))
        assert_close(scored(teacher, tokenizer, groups), [expected])

    def test_bad_rows_are_named(self, model, tokenizer, words):
        groups = make_groups(words).to_list()
        groups[5]["completions"] = groups[5]["completions"][:1]
        with pytest.raises(ValueError, match="`completions` of row 5 has 1 entries"):
            scored(model, tokenizer, Dataset.from_list(groups))

    def test_tokenizer_without_a_pad_token(self, model, words):
        """Llama-3's has none."""
        tokenizer = tiny_tokenizer()
        groups = make_groups(words)
        expected = plain_scores(model, tokenizer, groups)
        tokenizer.pad_token = None
        assert_close(scored(model, tokenizer, groups), expected)
        assert tokenizer.pad_token is None


class TestLoadTeacher:
    def test_is_frozen(self, tokenizer, tmp_path):
        model = make_model("gpt_neox", len(tokenizer), hidden_dropout=0.5).train()
        model.save_pretrained(tmp_path)
        for teacher in (load_teacher(model), load_teacher(str(tmp_path))):
            assert not any(module.training for module in teacher.modules())
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            assert [module.p for module in teacher.modules() if isinstance(module, torch.nn.Dropout)]
            assert not any(module.p for module in teacher.modules() if isinstance(module, torch.nn.Dropout))
        assert load_teacher(model) is model

    def test_dtype(self, tokenizer, tmp_path):
        make_model("llama", len(tokenizer), dtype=torch.bfloat16).save_pretrained(tmp_path)
        assert load_teacher(str(tmp_path)).dtype == torch.float32
        assert load_teacher(str(tmp_path), {"dtype": "bfloat16"}).dtype == torch.bfloat16


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
    return tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True), ids[-1] not in ends


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
        assert True in flags[0] and False in flags[0]
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

    def test_test_sees_a_wrong_temperature(self, model, tokenizer):
        assert first_token_pvalue(model, tokenizer, 1.0, expected_temperature=1.2) < 1e-3
        assert first_token_pvalue(model, tokenizer, 1.0, expected_temperature=0.8) < 1e-3

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
