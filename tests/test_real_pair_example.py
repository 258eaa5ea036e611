"""`examples/real_pair.py` on a tiny model: what it trains on, what it measures, and the command."""

import json

import pytest
from datasets import load_from_disk
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.data import encode_prompt
from grkd_trl.evaluation.results import read_results
from grkd_trl.examples import real_pair
from grkd_trl.examples.regime_study import real_pair as study
from grkd_trl.examples.regime_study.grid import PAIR_ONLINE, PAIR_RATES
from grkd_trl.examples.regime_study.run import training_data
from grkd_trl.teacher import LocalTeacher


pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
MEASURES = {"score of samples", "ROUGE-L", "new trigrams", "length", "teacher's text", "rank accuracy", "preferences"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    size = {"initializer_range": 0.3, "max_position_embeddings": 1024, "num_hidden_layers": 4}
    tiny_model("llama", len(tokenizer), seed=1, **size).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    long = "so it is " * 20
    rows = {"train": [(f"why {letter}", long) for letter in "abcdefghij"] + [("short k", "yes"), ("why z", long)]}
    rows["eval"] = [(f"why {letter}", long) for letter in "uvwxyz"]
    for name, known in rows.items():
        lines = [json.dumps({"prompt": prompt, "chosen": answer, "rejected": "no"}) for prompt, answer in known]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def command(given, folder, *more):
    files = ["--prompts", str(given / "train.jsonl"), "--held_out", str(given / "eval.jsonl")]
    sizes = ["--drop", "middle:2", "--max_steps", "2", "--max_new_tokens", "6", "--seeds", "0", "--tune", "1"]
    return [*files, *sizes, "--model_name_or_path", str(given / "teacher"), "--output_dir", str(folder), *more]


def test_the_command_goes_on_and_reports(given, tmp_path):
    real_pair.main(command(given, tmp_path, "--methods", "kd", "sft"))
    real_pair.main(command(given, tmp_path, "--methods", "kd", "sft", "grkd", "seqkd"))
    rows = read_results(tmp_path / "results.jsonl")
    methods = [row["method"] for row in rows]
    assert len(methods) == len(set(methods)), "a run was repeated"
    assert {row["method"]: row["status"] for row in rows} == dict.fromkeys(
        ["student before", "teacher", "kd", "sft", "grkd", "seqkd"], "done"
    )
    assert all(set(row["metrics"]) == MEASURES | {"cpu_seconds"} for row in rows)
    assert {row["metrics"]["rank accuracy"] for row in rows if row["method"] == "teacher"} == {1.0}
    report = tmp_path / "report"
    assert "| ranking | grkd | kd |" in (report / "verdicts.md").read_text()
    assert str(given) not in (report / "results.jsonl").read_text()
    assert (report / "real_pair_ultrafeedback.png").exists()


def test_a_teacher_that_is_shown_how_the_answer_begins(given, tmp_path, monkeypatch):
    monkeypatch.setitem(PAIR_ONLINE, "generate_every", 2)  # of two steps
    real_pair.main(command(given, tmp_path, "--shown", "reference", "--methods", "kd", "sft", "grkd online"))
    rows = {row["method"]: row for row in read_results(tmp_path / "results.jsonl")}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        ["student before", "teacher", "kd", "sft", "grkd online"], "done"
    )
    assert all(set(row["metrics"]) == MEASURES | {"reference", "cpu_seconds"} for row in rows.values())
    assert rows["teacher"]["metrics"]["rank accuracy"] == 1.0, "the teacher reads its groups as it scored them"
    groups = load_from_disk(next((tmp_path / "models").glob("shown-groups-0-*")) / "done")
    tokenizer = AutoTokenizer.from_pretrained(given / "teacher")
    teacher = LocalTeacher(AutoModelForCausalLM.from_pretrained(given / "teacher"), tokenizer)
    columns = {name: list(groups[name]) for name in ("clipped", "completion_ids", "tokenizer_hash")}
    columns |= {"prompt_ids": [encode_prompt(tokenizer, prompt) for prompt in groups["teacher_prompt"]]}
    again = teacher.score(list(groups["teacher_prompt"]), list(groups["completions"]), columns=columns).scores
    assert again == [pytest.approx(known, abs=1e-5) for known in groups["teacher_scores"]]
    assert all("so it is" in prompt[0]["content"] for prompt in groups["teacher_prompt"])
    learned = training_data(study.make_start(rows["sft"]["settings"], 0), "reference")
    assert learned["completion"][0] == [{"role": "assistant", "content": "so it "}]


def test_lora_trains_at_its_own_rates(given, tmp_path):
    real_pair.main(command(given, tmp_path, "--methods", "grkd lora"))
    (row,) = [row for row in read_results(tmp_path / "results.jsonl") if row["method"] == "grkd lora"]
    assert row["status"] == "done" and row["settings"]["learning_rate"] in [10 * rate for rate in PAIR_RATES]


def test_what_is_tested_is_not_trained_on(given, tmp_path):
    settings = {"model": str(given / "teacher"), "drop": "middle:2", "work_dir": str(tmp_path), "num_prompts": 8}
    settings |= {"data": [str(given / f"{name}.jsonl") for name in ("train", "eval")], "max_new_tokens": 4}
    settings["teacher"] = "same_tokenizer"
    start = study.make_start(settings, 0)
    prompts = {prompt[0]["content"] for prompt in start.groups["prompt"]}
    held_out = {row["prompt"][0]["content"] for split in start.items.values() for row in split}
    assert len(start.groups) == 8 and len(held_out) == sum(map(len, start.items.values())) == 6
    assert not prompts & (held_out | {"short k"})
    assert AutoModelForCausalLM.from_pretrained(start.student).config.num_hidden_layers == 2
    assert all({"student", "teacher"} >= set(names) and len(names) > 1 for names in start.groups["written_by"])


def test_repetition_and_rouge():
    assert study._new_trigrams("a b c d") == 1.0
    assert study._new_trigrams("a b a b a b") == 0.5
    assert study._new_trigrams("a") == 1.0
    rouge = study.RougeScorer(["rougeL"])
    assert study._rouge(rouge, "one two", "one two three four") == 1.0  # to as many words
    assert study._rouge(rouge, "", "one two") == 0.0


@pytest.mark.parametrize("shown, methods", [("reference", ["kd", "dpo"]), ("prompt", ["grdk"])])
def test_unknown_methods(given, tmp_path, capsys, shown, methods):
    with pytest.raises(SystemExit):
        real_pair.main(command(given, tmp_path, "--shown", shown, "--methods", *methods))
    assert f"--methods has {methods[-1:]}" in capsys.readouterr().err
