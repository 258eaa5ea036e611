"""Answers to a benchmark's conversations, and the files that questions, answers and judgments are read from."""

import csv
import gzip
import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model

from grkd_trl.evaluation.answers import write_answers
from grkd_trl.evaluation.files import read_rows
from grkd_trl.evaluation.mt_bench import mt_bench_turns


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
        ended = tiny_model("llama", len(tokenizer))  # the same weights, which end at any token
        ended.generation_config.eos_token_id = list(range(len(tokenizer)))
        assert write_answers(ended, tokenizer, conversations, cache_path=path, **settings)[0] != whole[0]
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
