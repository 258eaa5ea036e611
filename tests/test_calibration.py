"""Which of two answers a teacher picks, against a plain forward a question."""

import doctest
import json
import math

import pytest
import torch
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model

from grkd_trl.examples.benchmarks import preferences
from grkd_trl.teacher import CalibratedTeacher, LocalTeacher, calibrate_scores, calibration, selection_probs


PROMPT = [{"role": "user", "content": "Name a colour."}]
COMPLETIONS = ["Red.", "I would say that it is blue.", [{"role": "assistant", "content": "Green"}], "x"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["qwen"]
    return tokenizer


def make_model(architecture, tokenizer, **kwargs):
    return tiny_model(architecture, len(tokenizer), initializer_range=0.3, **kwargs).eval()


@torch.no_grad()
def plain_probs(model, tokenizer, prompt, texts, orders):
    """One question at a time, nothing shared."""
    chances = [[] for _ in texts]
    letters = [tokenizer(letter)["input_ids"][0] for letter in "AB"]
    for pair in orders:
        question = calibration.SELECTION_TEMPLATE.format(prompt=prompt, first=texts[pair[0]], second=texts[pair[1]])
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        probs = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(-1)[letters]
        for position, chance in zip(pair, (probs / probs.sum()).tolist(), strict=True):
            chances[position].append(chance)
    return [sum(row) / len(row) for row in chances]


class TestSelectionProbs:
    @pytest.mark.parametrize(
        "architecture, kwargs", [("llama", {}), ("qwen2", {}), ("gemma2", {"sliding_window": 64})]
    )
    @pytest.mark.parametrize("share_prefix, tokens_per_batch", [(True, 16384), (True, 700), (False, 16384)])
    def test_equals_a_forward_a_question(self, tokenizer, architecture, kwargs, share_prefix, tokens_per_batch):
        model = make_model(architecture, tokenizer, **kwargs)
        texts = [text if isinstance(text, str) else text[0]["content"] for text in COMPLETIONS]
        orders = [(i, j) for i in range(4) for j in range(4) if i != j]
        expected = plain_probs(model, tokenizer, "Name a colour.", texts, orders)
        given = selection_probs(
            model,
            tokenizer,
            PROMPT,
            COMPLETIONS,
            share_prefix=share_prefix,
            tokens_per_batch=tokens_per_batch,
        )
        assert given == pytest.approx(expected, abs=1e-5)
        assert sum(given) == pytest.approx(len(COMPLETIONS) / 2)  # of each pair the two chances sum to 1
        assert max(given) - min(given) > 1e-3

    def test_prompt_is_read_once(self, tokenizer, monkeypatch):
        model, shapes = make_model("llama", tokenizer), []
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda **kwargs: shapes.append(kwargs["input_ids"].shape) or forward(**kwargs)
        )
        prompt = "p" * 300
        selection_probs(model, tokenizer, prompt, ["a", "b", "c"])
        (once, prefix), (rows, rest) = shapes
        assert (once, rows) == (1, 6)
        assert prefix > 300 > rest

    def test_one_order_keeps_the_bias_of_the_place(self, tokenizer):
        model = make_model("llama", tokenizer)
        one = selection_probs(model, tokenizer, PROMPT, ["Red", "Blue"], both_orders=False)
        other = selection_probs(model, tokenizer, PROMPT, ["Blue", "Red"], both_orders=False)
        both = selection_probs(model, tokenizer, PROMPT, ["Red", "Blue"])
        assert abs(one[0] - other[1]) > 1e-3
        assert both == pytest.approx([(one[0] + other[1]) / 2, (one[1] + other[0]) / 2], abs=1e-5)

    def test_without_a_chat_template(self):
        tokenizer = byte_tokenizer()
        probs = selection_probs(make_model("llama", tokenizer), tokenizer, "Name a colour.", ["Red", "Blue"])
        assert sum(probs) == pytest.approx(1.0)

    def test_refusals(self, tokenizer):
        model = make_model("llama", tokenizer)
        with pytest.raises(ValueError, match="no pair to pick from"):
            selection_probs(model, tokenizer, PROMPT, ["Red"])
        with pytest.raises(ValueError, match="do not part"):
            selection_probs(model, tokenizer, PROMPT, ["Red", "Blue"], letters=("A", "A"))


class TestCalibrateScores:
    def test_docstring(self):
        (test,) = [
            test for test in doctest.DocTestFinder().find(calibration) if test.name.endswith(".calibrate_scores")
        ]
        result = doctest.DocTestRunner().run(test)
        assert result.attempted == 3 and not result.failed

    def test_value(self):
        scores = calibrate_scores(torch.tensor([[-2.0, -1.0]]), torch.tensor([[0.25, 0.75]]), ratio=0.3)
        expected = [0.3 * -2 + 0.7 * math.log(0.25), 0.3 * -1 + 0.7 * math.log(0.75)]
        assert scores[0].tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("ratio", [0.0, 1.0])
    def test_never_picked_is_finite(self, ratio):
        scores = calibrate_scores(torch.tensor([-2.0, -1.0]), torch.tensor([0.0, 1.0]), ratio=ratio)
        assert torch.isfinite(scores).all()
        assert scores[0] < scores[1]

    @pytest.mark.parametrize(
        "logps, probs, ratio, error",
        [([0.0], [0.5, 0.5], 0.5, "one shape"), ([0.0], [1.5], 0.5, "in 0..1"), ([0.0], [0.5], 2.0, "`ratio`")],
    )
    def test_refusals(self, logps, probs, ratio, error):
        with pytest.raises(ValueError, match=error):
            calibrate_scores(torch.tensor(logps), torch.tensor(probs), ratio=ratio)


class TestCalibratedTeacher:
    def test_scores(self, tokenizer):
        model = make_model("llama", tokenizer)
        plain = LocalTeacher(model, tokenizer)
        teacher = CalibratedTeacher(plain, ratio=0.4)
        scores = teacher.score([PROMPT], [COMPLETIONS]).scores[0]
        mean_logps = torch.tensor(plain.score([PROMPT], [COMPLETIONS]).scores[0])
        probs = torch.tensor(selection_probs(model, tokenizer, PROMPT, COMPLETIONS))
        assert scores == pytest.approx((0.4 * mean_logps + 0.6 * probs.log()).tolist(), abs=1e-5)
        assert teacher.describe()["calibration"]["ratio"] == 0.4
        assert teacher.generate([PROMPT], 2, seed=1, max_new_tokens=3) == plain.generate(
            [PROMPT], 2, seed=1, max_new_tokens=3
        )

    def test_a_single_completion_has_no_score(self, tokenizer):
        teacher = CalibratedTeacher(LocalTeacher(make_model("llama", tokenizer), tokenizer))
        assert math.isnan(teacher.score([PROMPT], [["Red"]]).scores[0][0])

    def test_takes_means(self, tokenizer):
        with pytest.raises(ValueError, match='`score="sum"`'):
            CalibratedTeacher(LocalTeacher(make_model("llama", tokenizer), tokenizer, score="sum"))


def test_how_often_a_teacher_is_right_about_preferences(tokenizer, tmp_path, capsys):
    """`examples/benchmarks/preferences.py` with pairs and with ranked answers, on a tiny model."""
    assert preferences.right_share([1.0, 2.0, 3.0], [2, 1, 0]) == 1.0
    assert preferences.right_share([1.0, 2.0, 3.0], [0, 1, 2]) == 0.0
    assert (
        preferences.right_share([1.0, 1.0, 3.0], [1, 0, 1]) == 0.25
    )  # a tie is half right, and equal ranks are no pair
    make_model("llama", tokenizer, max_position_embeddings=2048).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = [
        {"prompt": "why", "chosen": "so it is", "rejected": "no"},
        {"prompt": "x" * 999, "chosen": "a", "rejected": "b"},
    ]
    ranked = [{"prompt": PROMPT, "completions": ["Red.", "Blue", "x"], "ranks": [0, 1, 2]}]
    for name, given in (("pairs", rows), ("ranked", ranked)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)))
        preferences.main(["--teacher", str(tmp_path / "teacher"), "--pairs", str(tmp_path / f"{name}.jsonl")])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["rows"] == 1  # the long one is left out
        assert found["longer"]["mean"] == {"pairs": 1.0, "ranked": pytest.approx(5 / 6, abs=1e-3)}[name]
        assert all(0 <= found[score]["mean"] <= 1 for score in ("log-probability", "picks"))
