"""`examples/prune_and_distill.py` and `examples/benchmarks/learning_rates.py` on tiny models, and how layers are left out."""

import copy
import itertools
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.examples.pruning.layers import drop_layers, layers_to_drop
from grkd_trl.examples.pruning.prompts import PROMPTS, short_prompts


ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruning") / "teacher"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    size = {"initializer_range": 0.3, "max_position_embeddings": 1024, "num_hidden_layers": 4}
    tiny_model("llama", len(tokenizer), seed=1, **size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("drop", "num_layers", "expected"),
    [
        ("middle:6", 30, [12, 13, 14, 15, 16, 17]),
        ("middle:1", 4, [1]),
        ("middle:3", 4, [0, 1, 2]),
        ("every_second", 5, [1, 3]),
        ("every_second", 30, list(range(1, 30, 2))),
    ],
)
def test_layers_that_an_option_names(drop, num_layers, expected):
    assert layers_to_drop(drop, num_layers) == expected


@pytest.mark.parametrize("drop", ["middle:0", "middle:4", "middle", "every_third", "6"])
def test_other_options_are_refused(drop):
    with pytest.raises(ValueError, match=f"with N from 1 to 3.*got '{drop}'"):
        layers_to_drop(drop, 4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("drop", ["middle:2", "every_second"])
def test_student_is_the_model_without_these_layers(architecture, drop):
    """The same logits as the model whose layers are taken out by hand, and it is a model of its own."""
    model = tiny_model(architecture, 50, initializer_range=0.3, num_hidden_layers=4).eval()
    student = drop_layers(model, drop).eval()
    kept = {"middle:2": [0, 3], "every_second": [0, 2]}[drop]
    expected = copy.deepcopy(model)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[index] for index in kept)
    expected.config.num_hidden_layers = 2
    for number, layer in enumerate(expected.model.layers):
        layer.self_attn.layer_idx = number
    if getattr(model.config, "layer_types", None):
        expected.config.layer_types = [model.config.layer_types[index] for index in kept]
        assert student.config.layer_types == expected.config.layer_types
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(student(ids).logits, expected(ids, use_cache=False).logits)
    assert (student(ids).logits != model(ids).logits).any()
    student.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.any()


def test_prompts_that_are_short_enough(teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    assert len(PROMPTS) == len(set(PROMPTS)) > 250
    rows = ["a" * 50, "b", [{"role": "user", "content": "c"}]]
    short = short_prompts(rows, tokenizer, 40, 2, seed=0)["prompt"]
    assert sorted(prompt[0]["content"] for prompt in short) == ["b", "c"]
    with pytest.raises(ValueError, match="2 of 3 prompts have at most 40 tokens, and 3 are needed"):
        short_prompts(rows, tokenizer, 40, 3, seed=0)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "LoRA"])
def test_from_a_model_to_a_student(teacher, tmp_path, capsys, use_peft):
    sizes = (
        "--num_prompts 4 --num_held_out 2 --max_prompt_length 300 --max_completion_length 6 --drop middle:2".split()
    )
    sizes += ["--use_peft"] if use_peft else ["--learning_rate", "1e-2"]
    main = runpy.run_path(str(ROOT / "examples/prune_and_distill.py"))["main"]
    main(["--model_name_or_path", str(teacher), "--output_dir", str(tmp_path), *sizes])
    printed = capsys.readouterr().out
    made = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for name in ("before", "after"):
        for metric, value in made["results"][name].items():
            assert metric in printed and f"{value:.3f}" in printed
    assert made["results"]["before"]["loss/soft"] != made["results"]["after"]["loss/soft"]
    assert len(made["answers"]) == 2 and set(made["answers"][0]) == {"prompt", "before", "after", "teacher"}

    # the student loads, differs from its start, and an adapter names the model without layers
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert start.config.num_hidden_layers == 2
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.arange(5)[None]
    assert (student(ids).logits != start(ids).logits).any()
    if use_peft:
        adapted = PeftModel.from_pretrained(start, tmp_path / "student")
        assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "start")
        assert adapted.peft_config["default"].r == 16
    assert f"| Student | `{tmp_path / 'start'}`" in (tmp_path / "student/README.md").read_text(encoding="utf-8")


def test_methods_and_seeds_share_groups_and_tests(teacher, tmp_path, capsys):
    sizes = "--num_prompts 4 --num_held_out 2 --max_prompt_length 300 --max_completion_length 6 --drop middle:2"
    main = runpy.run_path(str(ROOT / "examples/prune_and_distill.py"))["main"]
    runs = {"": "", "kd-0": "--method kd", "seqkd-0": "--method seqkd", "grkd-1": "--training_seed 1"}
    made, groups, logits = {}, set(), []
    for name, given in runs.items():
        named = ["--name", name] if name else []
        main(
            [
                "--model_name_or_path",
                str(teacher),
                "--output_dir",
                str(tmp_path),
                *named,
                *sizes.split(),
                *given.split(),
            ]
        )
        made[name] = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        groups.add(tuple((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "groups/data").iterdir()))
        student = AutoModelForCausalLM.from_pretrained(tmp_path / name / "student")
        logits.append(student(torch.arange(5)[None]).logits)
    assert len(groups) == 1  # written once
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(logits, 2))
    before, after = ([run["results"][when] for run in made.values()] for when in ("before", "after"))
    assert before == [before[0]] * 4 and len({run["loss/soft"] for run in after}) == 4
    assert {run["results"]["teacher"]["teacher's score of its text"] for run in made.values()} == {
        made[""]["results"]["teacher"]["teacher's score of its text"]
    }
    (table,) = re.findall(r"\nrun .*\n((?:.+\n)+)", capsys.readouterr().out)[-1:]
    rows = [line.rsplit(None, 5) for line in table.splitlines()]
    assert [row[-5:-3] for row in rows] == [["grkd", "0"], ["grkd", "1"], ["kd", "0"], ["seqkd", "0"]]
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), "--name", "groups"])
    with pytest.raises(ValueError, match='made from .*"drop": "middle:2".*Choose another'):  # same size, same name
        main(
            [
                "--model_name_or_path",
                str(teacher),
                "--output_dir",
                str(tmp_path),
                *sizes.split(),
                "--drop",
                "every_second",
            ]
        )


@pytest.mark.slow
def test_sweep_of_learning_rates(teacher, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "examples/benchmarks/learning_rates.py"))["main"]
    main.__globals__.update(RATES={"full": (1e-2,), "LoRA": (1e-2,)}, MAX_PROMPT_LENGTH=300, MAX_COMPLETION_LENGTH=6)
    main.__globals__["drop_layers"] = lambda model, drop: drop_layers(model, "middle:2")  # it has four
    arguments = ["--model_name_or_path", str(teacher), "--output_dir", str(tmp_path), "--max_steps", "1"]
    main([*arguments, "--num_held_out", "2"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and {row["method"] for row in rows} == {"start", "GRKD", "DPO", "SimPO", "KD"}
    assert len({row["loss/soft"] for row in rows}) == 9
    capsys.readouterr()
    main([*arguments, "--num_held_out", "2"])
    assert "seconds" not in capsys.readouterr().out  # nothing is run again
