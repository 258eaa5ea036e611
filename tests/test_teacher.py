import random

import pytest
import torch
from datasets import Dataset
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model, tiny_tokenizer

from grkd_trl.scoring import rows as scoring_rows
from grkd_trl.teacher import batches, load_teacher, score_groups


def make_model(architecture, vocab_size, **kwargs):
    """Far from uniform, so that a temperature and a cache can be seen in what is written."""
    return tiny_model(architecture, vocab_size, **{"initializer_range": 0.3} | kwargs).eval()


def chat_tokenizer(template):
    tokenizer = byte_tokenizer()
    if tokenizer.bos_token is None:  # the templates of Llama-3 and Gemma-2 write it
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    return tokenizer


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
            for module in (batches, scoring_rows):
                monkeypatch.setattr(module, "check_packed_rows_on_all_ranks", lambda model, device: "it is not to")
        scored(model, tokenizer, groups, tokens_per_batch=100)
        assert all(size <= 100 for size in sizes)
        assert 100 < sum(sizes)
        assert len(sizes) < len(groups)
        sizes.clear()
        scored(model, tokenizer, groups, tokens_per_batch=1)  # a group is never split
        assert len(sizes) == len(groups)

    def test_a_prompt_that_is_shared_counts_once(self, model, monkeypatch):
        groups = [{"prompt_ids": [3] * 50, "completion_ids": [[4] * 5] * 4}] * 4
        made = lambda: [len(rows) for rows in batches.token_batches(model, groups, 150, progress=False)]  # noqa: E731
        assert made() == [2, 2]
        monkeypatch.setattr(batches, "check_packed_rows_on_all_ranks", lambda model, device: "it is not to")
        assert made() == [1, 1, 1, 1]

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
        assert sorted(new.column_names) == ["clipped", "completions", "prompt", "scored_prompt_hash", "teacher_scores"]
        assert new.remove_columns(["teacher_scores", "scored_prompt_hash"]).to_list() == groups.to_list()
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
