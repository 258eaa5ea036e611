"""The scripts of the methods, and the recipes for them, parsed and run with tiny models in place of the real."""

import difflib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import runs
import yaml
from runs import TOKENIZER, logged, make_rows, make_student, make_teacher
from transformers import Trainer
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

import grkd_trl


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = {name.lower(): name for name in runs.METHODS}
IN_RECIPES = [method for method in METHODS if method != "ranknet"]  # those of the paper's table
RECIPES = sorted((EXAMPLES / "recipes").rglob("*.yaml"))
each_method = pytest.mark.parametrize("method", METHODS)
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def load(method):
    spec = importlib.util.spec_from_file_location(f"example_{method}", EXAMPLES / f"{method}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(module, method):
    classes = (getattr(module, f"{METHODS[method]}ScriptArguments"), getattr(grkd_trl, f"{METHODS[method]}Config"))
    return TrlParser((*classes, ModelConfig, DatasetMixtureConfig))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models, groups and text on disk."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = type(TOKENIZER).from_pretrained(_saved(folder))
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = make_rows(8, sizes=(3, 2), scores=False)
    for row in rows:
        row["teacher_scores"] = [-1.0 - place for place in range(len(row["completions"]))]
    with (folder / "groups.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "text.txt").write_text("a b c d\ne f g h\ni j k l\n")
    return folder


def _saved(folder):
    TOKENIZER.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def run(module, method, files, folder, config=None, *further):
    """Parse a command line, run the script's `main`, and give the trainer it made."""
    given = ["--config", str(config)] if config else []
    given += ["--model_name_or_path", str(files / "student"), "--teacher_model_name_or_path", str(files / "teacher")]
    given += (
        [] if config and "datasets:" in Path(config).read_text() else ["--dataset_name", str(files / "groups.jsonl")]
    )
    given += ["--output_dir", str(folder), "--report_to", "none"]
    given += ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--per_device_train_batch_size", "2"]
    given += ["--gradient_accumulation_steps", "1", "--logging_steps", "1", "--gradient_checkpointing", "false"]
    parsed = parser_of(module, method).parse_args_and_config([*given, *further])
    made, train = [], Trainer.train
    Trainer.train = lambda self, *args, **kwargs: made.append(self) or train(self, *args, **kwargs)
    try:
        module.main(*parsed)
    finally:
        Trainer.train = train
    return made[0]


class TestScripts:
    @each_method
    def test_a_diff_shows_the_method(self, method):
        """No more than the docstring, the names and, for MiniLLM, its plain text."""
        ours, grkd = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in (method, "grkd"))
        changed = [line for line in difflib.ndiff(grkd, ours) if line[0] in "+-"]
        assert len(changed) <= (30 if method == "minillm" else 20)
        sections = [re.findall(r"^    # (.*)", line) for line in grkd]
        assert [re.findall(r"^    # (.*)", line) for line in ours if line.startswith("    # ")] == [
            section for section in sections if section
        ]
        assert len(ours) <= 120

    @each_method
    def test_runs_with_adapters_and_evaluation(self, tmp_path, files, method):
        lora = ["--use_peft", "--lora_target_modules", "all-linear", "--learning_rate", "1e-2"]
        text = ["--text_file", str(files / "text.txt")] if method == "minillm" else []
        trainer = run(load(method), method, files, tmp_path, None, *lora, *text, *self.short(method))
        assert type(trainer) is getattr(grkd_trl, f"{METHODS[method]}Trainer")
        assert trainer.state.global_step == 1 and logged(trainer, "loss")
        assert (tmp_path / "adapter_model.safetensors").exists()
        assert trainer.equation in (tmp_path / "README.md").read_text(encoding="utf-8")
        if text:
            assert logged(trainer, "loss/text")[0] > 0

    def test_a_mixture_of_datasets_and_resuming(self, tmp_path, files):
        """Both as in TRL's scripts, and buffers that DDP is not to broadcast."""
        config = tmp_path / "mixture.yaml"
        part = f"  - path: json\n    data_files: {files / 'groups.jsonl'}\n"
        config.write_text(
            f"datasets:\n{part}    columns: [prompt, completions, teacher_scores]\n{part}test_split_size: 4\n"
        )
        module = load("simpo")
        checkpoints = ["--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--ignore_bias_buffers"]
        trainer = run(module, "simpo", files, tmp_path / "out", config, *checkpoints)
        assert len(trainer.train_dataset) == 12 and len(trainer.eval_dataset) == 4
        assert trainer.model._ddp_params_and_buffers_to_ignore == []  # this model has none
        further = ["--max_steps", "2", "--resume_from_checkpoint", "true"]
        trainer = run(module, "simpo", files, tmp_path / "out", config, *checkpoints, *further)
        assert trainer.state.global_step == 2 and len(logged(trainer, "loss")) == 2
        trainer = run(module, "simpo", files, tmp_path / "out", config, "--resume_from_checkpoint", "false")
        assert len(logged(trainer, "loss")) == 1

    @staticmethod
    def short(method):
        return ["--max_completion_length", "4"] if method in ("seqkd", "minillm") else []


class TestRecipes:
    def test_there_is_one_for_each_method_and_pair(self):
        found = {(path.parent.name, path.stem) for path in RECIPES}
        assert found == {(pair, method) for pair in ("gemma2_9b_to_2b", "llama3_8b_to_3b") for method in IN_RECIPES}

    @each_recipe
    def test_every_field_says_where_it_is_from(self, recipe):
        for line in recipe.read_text(encoding="utf-8").splitlines():
            assert not line or line.startswith("#") or re.fullmatch(r"\w+: .+  # .+", line), line

    @pytest.mark.parametrize("pair", ["gemma2_9b_to_2b", "llama3_8b_to_3b"])
    def test_methods_differ_in_their_own_fields_alone(self, pair):
        recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES if path.parent.name == pair}
        own = {
            name
            for method in IN_RECIPES
            for name in getattr(grkd_trl, f"{METHODS[method]}Config").__annotations__
            if name not in ("teacher_model_init_kwargs",)
        }
        shared = [
            {name: value for name, value in recipe.items() if name not in own | {"output_dir"}}
            for recipe in recipes.values()
        ]
        shared = [recipe | {"learning_rate": None} if "learning_rate" in recipe else recipe for recipe in shared]
        assert all(recipe == shared[0] for recipe in shared) and len(shared) == 7
        for recipe in recipes.values():
            assert 2 * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 128

    @each_recipe
    def test_parses_and_runs(self, tmp_path, files, recipe):
        method, given = recipe.stem, yaml.safe_load(recipe.read_text(encoding="utf-8"))
        module = load(method)
        _, args, model_args, _ = parser_of(module, method).parse_args_and_config(
            ["--config", str(recipe), "--bf16", "false", "--output_dir", str(tmp_path)]
        )
        for name in given.keys() - {"bf16", "output_dir", "report_to", "lr_scheduler_type", "save_strategy"}:
            holder = args if hasattr(args, name) else model_args
            if hasattr(holder, name):
                assert getattr(holder, name) == given[name], name
        trainer = run(module, method, files, tmp_path, recipe, *TestScripts.short(method))
        assert trainer.state.global_step == 1 and logged(trainer, "loss")
        for name in getattr(grkd_trl, f"{METHODS[method]}Config").__annotations__:
            if name in given and name != "max_completion_length":
                assert getattr(trainer.args, name) == given[name], name
