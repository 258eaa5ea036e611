"""Answers that a judge compares: how they are read, paired and counted."""

import json

import pytest

from grkd_trl.evaluation.judge import (
    pair_answers,
    read_answers,
    summarize_shares,
)


def test_reads_the_answers_of_each_benchmark(tmp_path):
    rows = [
        {"instruction": "p", "output": "a"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": {"answer": "a"}}]},
        {"prompt": "p", "completion": "a"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_answers(tmp_path / "a.json") == [("p", "a")] * 3
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match="Row 0 of the answers lacks `prompt`"):
        read_answers(tmp_path / "a.json")


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "a", "completion": None}, "Row 0 of the answers: `completion` must be text, got None"),
        ({"instruction": "a", "output": 7}, "`output` must be text, got 7"),
        ({"messages": [{"content": "a"}, {"content": None}]}, "`messages` must be text, got None"),
        ({"messages": [{"content": "a"}]}, "`messages` must end with a prompt and an answer"),
        ({"messages": [{"content": "a"}, {"role": "assistant"}]}, "`messages` must end with a prompt and an answer"),
    ],
)
def test_answers_that_are_no_text(tmp_path, row, says):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=says):
        read_answers(tmp_path / "a.json")


def test_answers_in_csv_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffprompt,completion\nIs it?,None\nAgent?,007\n", encoding="utf-8")
    assert read_answers(tmp_path / "a.csv") == [("Is it?", "None"), ("Agent?", "007")]


class TestPairingOfAnswers:
    def test_the_same_prompt_twice_is_paired_by_place(self):
        answers, baseline = [("p", "1"), ("q", "2"), ("p", "3")], [("q", "x"), ("p", "y"), ("p", "z"), ("r", "w")]
        assert pair_answers(answers, baseline) == (["p", "q", "p"], ["1", "2", "3"], ["y", "x", "z"])

    def test_a_baseline_of_one_answer_is_compared_with_each(self):
        assert pair_answers([("p", "1"), ("p", "2"), ("p", "3")], [("p", "x")])[2] == ["x", "x", "x"]

    @pytest.mark.parametrize(
        "baseline, says",
        [
            ([("q", "x")], "no answer to 1 of 1 prompts, for instance 'p'"),
            ([("p", "x")] * 2, "has 2 answers to a prompt that was answered 3 times, 'p'"),
        ],
    )
    def test_refuses(self, baseline, says):
        with pytest.raises(ValueError, match=says):
            pair_answers([("p", "1")] * 3, baseline)


class TestSummary:
    def test_bounds_hold_what_refused_pairs_may_be(self):
        rate = summarize_shares([1.0, 0.5, None, 0.0, None])
        assert (rate["pairs"], rate["without_verdict"], rate["share_without_verdict"]) == (5, 2, 0.4)
        assert (rate["won_if_others_lost"], rate["won"], rate["won_if_others_won"]) == (0.3, 0.5, 0.7)
        assert rate["low"] < 0.5 < rate["high"]

    def test_without_any_verdict(self):
        rate = summarize_shares([None, None])
        assert rate["won"] is rate["low"] is rate["high"] is None
        assert (rate["won_if_others_lost"], rate["won_if_others_won"]) == (0, 1)
