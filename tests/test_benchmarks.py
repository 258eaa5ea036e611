"""The public benchmarks of the paper: files byte for byte, figures as published."""

import csv
import gzip
import json
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared_data import shared_data
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model

from grkd_trl.evaluation.alpaca_eval2 import (
    AlpacaEval2Judgments,
    alpaca_eval2_length_controlled_win_rate,
    alpaca_eval2_win_rate,
    read_alpaca_eval2_annotations,
    read_gamed_baselines,
    read_instruction_difficulty,
    write_alpaca_eval2_outputs,
)
from grkd_trl.evaluation.answers import write_answers
from grkd_trl.evaluation.arena_hard import (
    arena_hard_answers,
    arena_hard_battles,
    arena_hard_intervals,
    arena_hard_scores,
    read_arena_hard_judgments,
    write_arena_hard_answers,
)
from grkd_trl.evaluation.files import read_rows
from grkd_trl.evaluation.gsm8k import gsm8k_answer, gsm8k_conversation, gsm8k_verdicts
from grkd_trl.evaluation.mt_bench import (
    MT_BENCH_NEEDS_REFERENCE,
    mt_bench_answers,
    mt_bench_averages,
    mt_bench_judge_messages,
    mt_bench_rating,
    mt_bench_requests,
    mt_bench_turns,
    write_mt_bench_answers,
)


class TestGSM8K:
    @pytest.mark.parametrize("flexible", [False, True])
    @pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
    def test_published_verdicts(self, model, flexible):
        rows = read_rows(shared_data("gsm8k/example_model_solutions.jsonl.gz"))
        answers = [row["answer"] for row in read_rows(shared_data("gsm8k/test.jsonl"))]
        solutions = [row[model]["solution"] for row in rows]
        expected = [row[model]["is_correct"] for row in rows]
        assert len(expected) == 1319
        assert gsm8k_verdicts(solutions, answers, flexible=flexible) == expected

    @pytest.mark.parametrize(
        "text, strict, flexible",
        [
            ("2 + 2 = 4\n#### 4", 4, 4),
            ("#### $1,234.50 in all", 1234.5, 1234.5),
            ("#### -3.", -3, -3),
            ("#### 18\n\nQuestion: 2 more?\n#### 20", 18, 20),
            ("The answer is 12.", None, 12),
            ("1,000,000 dollars", None, 1000000),
            ("####", None, None),
            ("A: 7", 7, 7),
            ("QA: 7", None, 7),
            ("#### .5", 0.5, 0.5),
            ("", None, None),
            ("<b>#### 5</b>", 5, 5),
        ],
    )
    def test_extraction(self, text, strict, flexible):
        assert gsm8k_answer(text) == strict
        assert gsm8k_answer(text, flexible=True) == flexible

    def test_value_counts_not_spelling(self):
        assert gsm8k_verdicts(["#### 18.00", "#### 1,800", "#### 18.5"], ["#### 18", "#### 1800", "#### 18"]) == [
            True,
            True,
            False,
        ]

    def test_a_very_long_completion(self):
        assert gsm8k_verdicts(["9" * 100_000, "1," * 50_000], ["#### 9", "#### 1"], flexible=True) == [False, False]

    def test_examples_come_first(self):
        messages = gsm8k_conversation("How many?", examples=[{"question": "One?", "answer": "One.\n#### 1"}])
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == "One.\n#### 1"
        assert messages[-1]["content"].startswith("How many?\n\n")
        assert len(gsm8k_conversation("How many?")) == 1

    def test_refuses(self):
        with pytest.raises(ValueError, match="one for each of the 1 answers, got 2"):
            gsm8k_verdicts(["1", "2"], ["#### 1"])
        with pytest.raises(ValueError, match="Row 1 of `answers` has no number"):
            gsm8k_verdicts(["1", "2"], ["#### 1", "2"])


def alpaca_preferences():
    """Judgments of each model of the shared table, with its row of the leaderboard."""
    with gzip.open(shared_data("alpaca_eval2/preferences_26models.csv.gz"), "rt") as file:
        table = list(csv.DictReader(file))
    with open(shared_data("alpaca_eval2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv")) as file:
        leaderboard = {row[""]: row for row in csv.DictReader(file)}
    for column in table[0]:
        model, _, kind = column.rpartition("|")
        if kind == "preference":
            names = column, f"{model}|len", "len_baseline", "index"
            yield (
                AlpacaEval2Judgments(*(np.array([float(row[name]) for row in table]) for name in names)),
                (leaderboard[model]),
            )


class TestAlpacaEval2:
    def test_outputs_byte_for_byte(self, tmp_path):
        with gzip.open(shared_data("alpaca_eval2/example_outputs.json.gz")) as file:
            published = file.read()
        rows = json.loads(published)
        questions = [{name: row[name] for name in ("instruction", "dataset", "datasplit")} for row in rows]
        path = tmp_path / "model_outputs.json"
        write_alpaca_eval2_outputs(path, questions, [row["output"] for row in rows], generator="example")
        assert path.read_bytes() == published

    def test_win_rates_of_the_leaderboard(self):
        models = list(alpaca_preferences())
        assert len(models) == 26
        for judgments, row in models:
            assert alpaca_eval2_win_rate(judgments.preferences) == pytest.approx(float(row["win_rate"]), abs=1e-6)

    def test_length_controlled_win_rates_of_the_leaderboard(self):
        difficulty = read_instruction_difficulty(shared_data("alpaca_eval2/instruction_difficulty.csv"))
        gamed = read_gamed_baselines(shared_data("alpaca_eval2/gamed_baselines.csv.gz"))
        far = {}
        for judgments, row in alpaca_preferences():
            judgments = judgments._replace(indices=judgments.indices.astype(int))
            rate = alpaca_eval2_length_controlled_win_rate(judgments, difficulty, gamed)
            far[row[""]] = abs(rate - float(row["length_controlled_winrate"]))
        assert len(far) == 26
        assert max(far.values()) < 0.3

    def test_reads_annotations(self, tmp_path):
        row = {"instruction": "?", "output_1": "four", "output_2": "ab", "preference": 1.25}
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps([row, row | {"preference": None}, row | {"preference": 0.0, "output_2": ""}]))
        judgments = read_alpaca_eval2_annotations(path)
        assert judgments.preferences.tolist() == pytest.approx([1.25, np.nan, 1.5], nan_ok=True)
        assert judgments.lengths.tolist() == [2, 2, 0]
        assert judgments.baseline_lengths.tolist() == [4, 4, 4]
        assert judgments.indices.tolist() == [0, 1, 2]
        assert alpaca_eval2_win_rate(judgments.preferences) == 37.5
        path.write_text(json.dumps([row, row | {"index": 7}]))
        assert read_alpaca_eval2_annotations(path).indices.tolist() == [0, 7]

    def test_official_file_of_gamed_baselines(self, tmp_path):
        path = tmp_path / "df_gamed.csv"
        path.write_text("model,preference,index,std_delta_len\nconcise,0.25,3,1.5\nverbose,,3,-1\n")
        assert read_gamed_baselines(path).tolist() == [[3, pytest.approx(np.tanh(1.5)), 0.25]]
        path.write_text("model,preference,index\nconcise,0.25,3\n")
        with pytest.raises(ValueError, match="lacks `std_delta_len`"):
            read_gamed_baselines(path)

    @pytest.mark.parametrize("preference", ["1", 3, 0.5, [1]])
    def test_refuses_preferences(self, tmp_path, preference):
        row = {"output_1": "a", "output_2": "b", "preference": 1.0}
        (tmp_path / "a.json").write_text(json.dumps([row, row | {"preference": preference}]))
        with pytest.raises(ValueError, match="Row 1 of the annotations: `preference` must be from 1 to 2"):
            read_alpaca_eval2_annotations(tmp_path / "a.json")

    def test_refuses(self, tmp_path):
        with pytest.raises(ValueError, match="one for each of 1 questions, got 2"):
            write_alpaca_eval2_outputs(tmp_path / "a", [{"instruction": "?"}], ["a", "b"], generator="m")
        with pytest.raises(ValueError, match="Row 0 of the questions lacks `instruction`"):
            write_alpaca_eval2_outputs(tmp_path / "a", [{"prompt": "?"}], ["a"], generator="m")
        judgments = AlpacaEval2Judgments(np.array([1.2]), np.array([3]), np.array([4]), np.array([805]))
        with pytest.raises(ValueError, match="Instruction 805 has no difficulty"):
            alpaca_eval2_length_controlled_win_rate(judgments, np.zeros(805), np.zeros((1, 3)))


class TestArenaHard:
    def test_answers_byte_for_byte(self, tmp_path):
        with gzip.open(shared_data("arena_hard/model_answer_gpt-3.5-turbo-0125.jsonl.gz")) as file:
            published = file.read()
        rows = [json.loads(line) for line in published.decode().split("\n") if line]
        questions = [{"uid": row["uid"], "prompt": row["messages"][0]["content"]} for row in rows]
        completions = [row["messages"][1]["content"]["answer"] for row in rows]
        ours = arena_hard_answers(questions, completions, model="gpt-3.5-turbo-0125")
        assert all(len(row["ans_id"]) == 22 for row in ours)
        assert len({row["ans_id"] for row in ours}) == 500
        for row, theirs in zip(ours, rows, strict=True):
            row.update(ans_id=theirs["ans_id"], tstamp=theirs["tstamp"])
        write_arena_hard_answers(tmp_path / "a.jsonl", ours)
        assert (tmp_path / "a.jsonl").read_bytes() == published

    def test_published_scores(self):
        expected = json.loads(shared_data("arena_hard/expected_scores.json").read_text())
        expected = expected["official_gpt-4-1106-preview_judge"]
        path = shared_data("arena_hard") / expected["file"]
        scores = arena_hard_scores(read_arena_hard_judgments(path))
        known = {model: entry["score"] for model, entry in expected["expected"].items()}
        known |= expected["others_computed_unpublished"]
        assert {model: round(scores[model], 2) for model in known} == known

    def test_battles_of_judgments(self):
        games = [{"score": "A>>B"}, {"score": "A>B"}]  # the baseline far ahead, then the model ahead
        row = {"question_id": "q", "model": "ours", "games": games}
        battles = arena_hard_battles([row])
        assert [battle["winner"] for battle in battles] == ["model_a"] * 3 + ["model_b"]
        assert arena_hard_scores(battles) == {"ours": 25}
        tie = {"uid": "q", "model": "ours", "games": [{"score": "A=B"}, {"score": None}]}
        assert arena_hard_scores(arena_hard_battles([tie])) == {"ours": 50}

    def test_intervals_hold_the_score(self):
        """Of 400 games of which 40 % are won: a normal interval is 40 +- 4.8."""
        sides = {"model_a": "baseline", "model_b": "ours"}
        battles = [sides | {"winner": "model_b" if index % 5 < 2 else "model_a"} for index in range(400)]
        (interval,) = arena_hard_intervals(battles, num_rounds=2000).values()
        assert interval["score"] == 40
        assert interval["low"] == pytest.approx(35.2, abs=0.6) and interval["high"] == pytest.approx(44.8, abs=0.6)
        assert arena_hard_intervals(battles, seed=1) == arena_hard_intervals(battles, seed=1)

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"model": "m", "question_id": 1}, "lacks `games`"),
            ({"model": "m", "games": [{}, {}]}, "lacks `question_id`"),
            ({"model": "m", "uid": 1, "games": [{}]}, "`games` must be a list of two"),
            ({"model": "m", "uid": 1, "games": [{"score": "A"}, {}]}, "`score` must be one of"),
        ],
    )
    def test_refuses_judgments(self, row, message):
        with pytest.raises(ValueError, match=f"Row 0 of the judgments.*{message}"):
            arena_hard_battles([row])

    def test_refuses_battles(self):
        battle = {"model_a": "x", "model_b": "m", "winner": "tie"}
        with pytest.raises(ValueError, match="needs one baseline"):
            arena_hard_scores([battle, battle | {"model_a": "y"}])
        with pytest.raises(ValueError, match="`winner` must be one of"):
            arena_hard_scores([battle | {"winner": "A"}])


def mt_bench_conversations(text):
    """Questions and answers of a published judge's prompt."""
    parts = text.split("<|The Start of Assistant A's Conversation with User|>\n\n### User:\n")[1]
    first, rest = parts.split("\n\n### Assistant A:\n", 1)
    answer_1, rest = rest.split("\n\n### User:\n", 1)
    second, rest = rest.split("\n\n### Assistant A:\n", 1)
    return (first, second), [answer_1, rest.removesuffix("\n\n<|The End of Assistant A's Conversation with User|>")]


class TestMTBench:
    def test_answers_byte_for_byte(self, tmp_path):
        published = shared_data("mt_bench/model_answer_vicuna-7b-v1.3.jsonl").read_bytes()
        rows = [json.loads(line) for line in published.decode().split("\n") if line]
        questions = read_rows(shared_data("mt_bench/question.jsonl"))
        ours = mt_bench_answers(questions, [row["choices"][0]["turns"] for row in rows], model="vicuna-7b-v1.3")
        for row, theirs in zip(ours, rows, strict=True):
            assert len(row["answer_id"]) == len(theirs["answer_id"])
            row.update(answer_id=theirs["answer_id"], tstamp=theirs["tstamp"])
        write_mt_bench_answers(tmp_path / "a.jsonl", ours)
        assert (tmp_path / "a.jsonl").read_bytes() == published

    def test_published_averages(self):
        expected = json.loads(shared_data("mt_bench/expected_scores.json").read_text())["expected"]
        averages = mt_bench_averages(read_rows(shared_data("mt_bench/model_judgment_gpt-4_single.jsonl.gz")))
        for model, known in expected.items():
            assert averages[model] == {**{name: known[name] for name in ("turn1", "turn2", "average")}, "failed": 0}

    def test_failed_judgments_are_left_out(self):
        rows = [{"model": "m", "turn": turn, "score": score} for turn, score in [(1, 8), (1, -1), (2, 5), (2, 5)]]
        assert mt_bench_averages(rows) == {"m": {"turn1": 8, "turn2": 5, "average": 6, "failed": 1}}
        with pytest.raises(ValueError, match="All 1 judgments of m failed"):
            mt_bench_averages(rows[1:2])
        with pytest.raises(ValueError, match="Row 0 of the judgments: `score` must be from 0 to 10, or -1, got 11"):
            mt_bench_averages([rows[0] | {"score": 11}])

    def test_prompts_of_the_published_judge(self):
        """Our messages for the answers that a judge saw are the judge's own, reference answers included."""
        questions = {row["question_id"]: row for row in read_rows(shared_data("mt_bench/question.jsonl"))}
        prompts = {row["name"]: row for row in read_rows(shared_data("mt_bench/judge_prompts.jsonl"))}
        references = read_rows(shared_data("mt_bench/reference_answer_gpt-4.jsonl"))
        references = {row["question_id"]: row["choices"][0]["turns"] for row in references}
        seen = set()
        for row in read_rows(shared_data("mt_bench/model_judgment_gpt-4_single.jsonl.gz")):
            if row["turn"] == 1:
                continue
            question = questions[row["question_id"]]
            asked, answers = mt_bench_conversations(row["user_prompt"])
            if list(asked) != question["turns"]:
                continue  # the split was fooled by the text
            messages = mt_bench_judge_messages(question, answers, 2, prompts, references.get(row["question_id"]))
            seen.add((row["question_id"], messages[1]["content"] == row["user_prompt"], row["judge"][1]))
        assert len(seen) > 70
        assert [key for key in seen if not key[1]] == []
        assert {judge for _, _, judge in seen} == {"single-v1-multi-turn", "single-math-v1-multi-turn"}

    def test_ratings_of_the_published_judge(self):
        rows = read_rows(shared_data("mt_bench/model_judgment_gpt-4_single.jsonl.gz"))
        assert [mt_bench_rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]

    @pytest.mark.parametrize(
        "reply, rating",
        [
            ("Rating: [[7]]\n\nNote on the scale [[1]] to [[10]].", 7),  # the first, as FastChat
            ("Rating: [[5]] The answer itself ended with 'Rating: [[10]]'", 5),
            ("As [1] says. Rating: [[6]]", 6),
            ("Rating: [5]", 5),
            ("[[7.5]]", 7.5),
            ("[[7.]]", 7),
            ("[[0]]", 0),
            ("[[11]]", -1),
            ("[[\u0667]]", -1),  # an Arabic 7
            ("Rating: 5", -1),
            ("", -1),
        ],
    )
    def test_rating(self, reply, rating):
        assert mt_bench_rating(reply) == rating

    def test_requests_for_a_judge(self):
        questions = read_rows(shared_data("mt_bench/question.jsonl"))
        answers = read_rows(shared_data("mt_bench/model_answer_vicuna-7b-v1.3.jsonl"))
        prompts = read_rows(shared_data("mt_bench/judge_prompts.jsonl"))
        references = read_rows(shared_data("mt_bench/reference_answer_gpt-4.jsonl"))
        requests = mt_bench_requests(questions, answers, prompts, references)
        assert len(requests) == 160
        assert requests[1][0] == {"question_id": 81, "model": "vicuna-7b-v1.3", "turn": 2}
        with_reference = [row for row, messages in requests if "Reference" in messages[1]["content"]]
        assert len(with_reference) == 60
        with pytest.raises(ValueError, match="Question 81 has no answer among the 79"):
            mt_bench_requests(questions, answers[1:], prompts, references)

    def test_reference_questions_need_references(self):
        questions = read_rows(shared_data("mt_bench/question.jsonl"))
        needing = {row["question_id"] for row in questions if row["category"] in MT_BENCH_NEEDS_REFERENCE}
        assert needing == {
            row["question_id"] for row in read_rows(shared_data("mt_bench/reference_answer_gpt-4.jsonl"))
        }
        question = {"question_id": 1, "category": "math", "turns": ["1+1?", "2+2?"]}
        with pytest.raises(ValueError, match="judged beside a reference answer"):
            mt_bench_judge_messages(question, ["2", "4"], 1, {})
        with pytest.raises(ValueError, match="`turn` must be 1 or 2"):
            mt_bench_judge_messages(question, ["2", "4"], 3, {}, ["2", "4"])

    def test_answers_of_braces_are_text(self):
        prompts = {"single-v1": {"system_prompt": "s", "prompt_template": "Q {question} A {answer}"}}
        question = {"question_id": 1, "category": "stem", "turns": ["{x}", "y"]}
        messages = mt_bench_judge_messages(question, ["{question} {0}", ""], 1, prompts)
        assert messages[1]["content"] == "Q {x} A {question} {0}"

    def test_refuses(self):
        question = {"question_id": 1, "turns": ["a", "b"]}
        with pytest.raises(ValueError, match="Question 1 has 2 turns, got 1 answers"):
            mt_bench_answers([question], [["a"]], model="m")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", len(byte_tokenizer()))


class TestAnswers:
    def test_two_turns(self, model):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATES["plain"]
        questions = [
            {"question_id": 1, "category": "math", "turns": ["a", "bb"]},
            {"question_id": 2, "category": "coding", "turns": ["cc"]},
        ]
        turns = mt_bench_turns(model, tokenizer, questions, max_new_tokens=4, progress=False)
        assert [len(answers) for answers in turns] == [2, 1]
        first = [{"role": "user", "content": "a"}]
        assert write_answers(model, tokenizer, [first], max_new_tokens=4, progress=False) == [turns[0][0]]
        second = [*first, {"role": "assistant", "content": turns[0][0]}, {"role": "user", "content": "bb"}]
        assert write_answers(model, tokenizer, [second], max_new_tokens=4, progress=False) == [turns[0][1]]

    def test_stopped_and_resumed(self, model, tmp_path):
        """Sampled answers: alone, in other batches, and after a stop in the middle of a line."""
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATES["plain"]
        conversations = [[{"role": "user", "content": "a" * (1 + index % 3)}] for index in range(6)]
        settings = {"max_new_tokens": 8, "temperature": 1.0, "progress": False}
        path = tmp_path / "made/answers.jsonl"
        whole = write_answers(model, tokenizer, conversations, batch_size=2, cache_path=path, **settings)
        assert len(set(whole)) == 6  # the same prompt again is another draw
        lines = path.read_text().splitlines()
        assert len(lines) == 6
        path.write_text("\n".join([*lines[:3], lines[3][:20]]))
        assert write_answers(model, tokenizer, conversations, batch_size=3, cache_path=path, **settings) == whole
        assert path.read_text().splitlines() == [*lines[:3], lines[3][:20], *lines[3:]]
        assert write_answers(model, tokenizer, conversations, **settings) == whole
        assert write_answers(model, tokenizer, conversations, seed=1, cache_path=path, **settings) != whole
        other = tiny_model("llama", len(tokenizer), seed=1)
        theirs = write_answers(other, tokenizer, conversations, cache_path=path, **settings)
        assert theirs == write_answers(other, tokenizer, conversations, **settings) != whole

    def test_full_disk(self, model, tmp_path):
        """The second batch cannot be written: the first is kept, and the message says so."""
        conversations = [[{"role": "user", "content": "a" * (index + 1)}] for index in range(4)]
        settings = {"max_new_tokens": 8, "batch_size": 2, "progress": False}
        path = tmp_path / "answers.jsonl"
        write_answers(model, byte_tokenizer(), conversations[:2], cache_path=path, **settings)
        first, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) + 30, limits[1]))
        try:
            with pytest.raises(OSError, match="answers.jsonl .*What was written to it before is kept"):
                write_answers(model, byte_tokenizer(), conversations, cache_path=path, **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes().startswith(first)
        answers = write_answers(model, byte_tokenizer(), conversations, cache_path=path, **settings)
        assert answers == write_answers(model, byte_tokenizer(), conversations, **settings)

    def test_without_a_chat_template(self, model):
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (answer,) = write_answers(model, byte_tokenizer(), [conversation], max_new_tokens=3, progress=False)
        assert isinstance(answer, str)


class TestFiles:
    @pytest.mark.parametrize("name", ["a[1].jsonl", "a*?.jsonl", "a::b.jsonl", "~/home.jsonl.gz"])
    def test_paths_are_no_patterns(self, tmp_path, monkeypatch, name):
        monkeypatch.setenv("HOME", str(tmp_path))
        path = tmp_path / name.removeprefix("~/")
        (gzip.open if name.endswith(".gz") else open)(path, "wt").write('{"a": 1}\n')
        assert read_rows(name if name[0] == "~" else path) == [{"a": 1}]

    def test_kinds(self, tmp_path):
        rows = [{"a": 1, "b": "x\u2028y"}, {"a": 2, "b": "é"}]
        (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
        with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
            file.write("a,b\n1,x\n")
        assert read_rows(tmp_path / "a.json") == read_rows(str(tmp_path / "a.jsonl")) == rows
        assert read_rows(tmp_path / "a.csv.gz") == [{"a": "1", "b": "x"}]

    def test_csv_is_text_as_it_stands(self, tmp_path):
        fields = [
            "None",
            "NA",
            "null",
            "nan",
            "",
            "007",
            "1.50",
            "True",
            " x ",
            "a\r\nb",
            'say "no"',
            "1,5",
            "y" * 200_000,
        ]
        with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:  # with a BOM, as Excel writes
            csv.writer(file).writerows([["prompt", "completion"], *[[f"p{i}", text] for i, text in enumerate(fields)]])
        limit = csv.field_size_limit()
        assert [row["completion"] for row in read_rows(tmp_path / "a.csv")] == fields
        assert list(read_rows(tmp_path / "a.csv")[0]) == ["prompt", "completion"]
        assert csv.field_size_limit() == limit

    @pytest.mark.parametrize(
        "content, says",
        [
            ("a,b\n1\n", r"Row 0 of .* must have 2 fields, \['a', 'b'\]"),
            ("a,b\n1,2\n1,2,3\n", "Row 1 of .* must have 2 fields"),
            ("a,a\n1,2\n", "different names"),
            ("", "different names"),
            ('a\n"x', "is not valid CSV"),
            (b"a\n\xff\n", "is not valid CSV"),
        ],
    )
    def test_bad_csv(self, tmp_path, content, says):
        (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=says):
            read_rows(tmp_path / "a.csv")

    def test_parquet_keeps_nested_columns(self, tmp_path):
        rows = [
            {"a": ["x", None], "b": {"c": [1, 2]}, "d": "007", "e": None, "f": 3},
            {"a": [], "b": {"c": []}, "d": "NA", "e": 1.5, "f": None},
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert read_rows(tmp_path / "a.parquet") == rows
        assert all(type(row["a"]) is list for row in read_rows(tmp_path / "a.parquet"))

    def test_a_bom_is_no_part_of_json(self, tmp_path):
        for name, text in (("a.jsonl", '{"a": null}\n'), ("a.json", '[{"a": null}]')):
            (tmp_path / name).write_text(text, encoding="utf-8-sig")
            assert read_rows(tmp_path / name) == [{"a": None}]

    def test_refuses(self, tmp_path):
        with pytest.raises(ValueError, match="must end in .jsonl"):
            read_rows(tmp_path / "a.txt")
        (tmp_path / "a.jsonl").write_text("{")
        with pytest.raises(ValueError, match="is not valid JSONL"):
            read_rows(tmp_path / "a.jsonl")
        (tmp_path / "a.json").write_text("[1]")
        with pytest.raises(ValueError, match="must hold JSON objects, in a list"):
            read_rows(tmp_path / "a.json")
        with pytest.raises(FileNotFoundError):
            read_rows(tmp_path / "absent.jsonl")
