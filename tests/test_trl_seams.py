"""What we stand on in TRL and transformers that they do not promise: names, signatures, attributes."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from tiny import tiny_model, tiny_tokenizer
from transformers import Trainer
from trl import DPOTrainer, SFTConfig, SFTTrainer

from grkd_trl import GRKDConfig, GRKDTrainer, _trl
from grkd_trl.trainers import GroupTrainer


ROOT = Path(__file__).resolve().parents[1]

AT_LEAST_1_16 = Version(_trl.INSTALLED_TRL) >= Version("1.16")

# How the package calls each name of `_trl.py`: positional arguments, keyword arguments.
CALLS = {
    "tokenize": [
        (["processing_class", "text"], []),
        (
            ["processing_class", "messages"],
            ["add_generation_prompt", "continue_final_message", "tools", "enable_thinking"],
        ),
    ],
    "disable_dropout_in_model": [(["model"], [])],
    "common_prefix_length": [(["ids", "other_ids"], [])],
    "create_model_from_path": [(["path"], ["dtype", "attn_implementation", "revision"])],
    "get_config_model_id": [(["config"], [])],
    "global_then_local_main_first": [([], [])],
    "pad": [(["tensors"], []), (["tensors"], ["padding_value", "padding_side", "pad_to_multiple_of"])],
    "prepare_deepspeed": [(["model", "accelerator"], [])],
    "prepare_fsdp": [(["model", "accelerator"], [])],
    "print_prompt_completions_sample": [
        (["prompts", "completions", "rewards", "advantages", "step", "num_samples"], ["extra"])
    ],
    "remove_none_values": [(["example"], [])],
    "_unwrap_model_for_generation": [
        (["model", "accelerator"], ["gradient_checkpointing_kwargs"] if AT_LEAST_1_16 else []),
    ],
    "VLLMGeneration": [
        (
            ["model", "accelerator", "processing_class"],
            [
                "mode",
                "server_base_url",
                "tensor_parallel_size",
                "gpu_memory_utilization",
                "temperature",
                "top_p",
                "max_completion_length",
                "logprobs",
            ],
        )
    ],
}


def seams():
    """(module, name in TRL, name in the package) of every TRL import of `_trl.py`."""
    for node in ast.walk(ast.parse(Path(_trl.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl":
            yield from ((node.module, alias.name, alias.asname or alias.name) for alias in node.names)


def parameters(function):
    return list(inspect.signature(function).parameters.values())


def names(function):
    return [parameter.name for parameter in parameters(function)]


class TestNames:
    def test_every_name_has_its_calls_here(self):
        assert {own for _, _, own in seams()} == {*CALLS, "sft_trainer"}

    @pytest.mark.parametrize(
        "module, name, own", [seam for seam in seams() if seam[2] in CALLS], ids=lambda part: str(part)
    )
    def test_exists_and_takes_what_we_give(self, module, name, own):
        function = getattr(importlib.import_module(module), name)
        assert getattr(_trl, own) is function
        for args, kwargs in CALLS[own]:
            inspect.signature(function).bind(*args, **dict.fromkeys(kwargs))  # a TypeError if it does not

    def test_every_keyword_we_use_is_among_the_calls(self):
        """A keyword that the package gives to one of these names, and the table above does not know."""
        for path in set((ROOT / "grkd_trl").rglob("*.py")) - {ROOT / "grkd_trl/_trl.py"}:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
                    given = {keyword.arg for keyword in node.keywords if keyword.arg}
                    known = {name for _, kwargs in CALLS[node.func.id] for name in kwargs}
                    assert given <= known, f"{path.name}:{node.lineno}"

    @pytest.mark.skipif(Version(_trl.INSTALLED_TRL) < Version("1.15"), reason="TRL before 1.15 does not refuse them")
    def test_refusal_of_adapters_on_the_head_is_lifted_within(self):
        refused = _trl.sft_trainer.BaseTunerLayer
        source = inspect.getsource(SFTTrainer.__init__)
        assert (
            source.count("BaseTunerLayer") == 1 == source.count("isinstance(model.get_output_embeddings(), BaseTuner")
        )
        with pytest.raises(KeyError), _trl.accept_adapters_on_head():
            assert not isinstance(torch.nn.Linear(1, 1), _trl.sft_trainer.BaseTunerLayer)
            raise KeyError
        assert _trl.sft_trainer.BaseTunerLayer is refused and inspect.isclass(refused)

    def test_pad_pads_masks_with_false(self):
        padded = _trl.pad([torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)])
        assert padded.dtype == torch.bool
        assert padded.tolist() == [[True, True], [True, False]]

    def test_oldest_is_the_one_that_pip_installs(self):
        (declared,) = re.findall(r'"trl(>=[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert declared == f">={_trl.OLDEST_TRL}"  # and no upper bound: TRL releases every two weeks

    @pytest.mark.parametrize("name", ["IterableDatasetShard", "SeedableRandomSampler", "LengthGroupedSampler"])
    def test_names_of_accelerate_and_transformers(self, name):
        assert inspect.isclass(getattr(_trl, name))


class TestVersions:
    def test_too_old(self):
        with pytest.raises(ImportError, match=r'needs trl 1.14.2 or newer, but trl 1.13.0 .*pip install -U "trl>='):
            _trl.check_trl_version("1.13.0")

    @pytest.mark.parametrize("installed", ["1.14.2", "1.15.0", "1.16.0", "1.16.3"])
    def test_tested(self, installed, caplog):
        _trl.check_trl_version(installed)
        _trl.warn_of_untested_trl(installed)
        assert not caplog.records

    def test_newer_is_one_warning(self, monkeypatch):
        said = []
        monkeypatch.setattr(_trl.logger, "warning", said.append)
        _trl.check_trl_version("1.17.0")
        _trl.warn_of_untested_trl("1.17.0")
        assert len(said) == 1 and "tested with trl 1.14.2 to 1.16.0" in said[0]

    def test_too_old_is_said_before_anything_of_it_is_imported(self):
        code = (
            "import importlib.metadata as metadata, sys\n"
            "version = metadata.version\n"
            "metadata.version = lambda name: '1.13.0' if name == 'trl' else version(name)\n"
            "for name in ['', '.classification', '.data', '.generation', '.teacher', '.trainers']:\n"
            "    try:\n"
            "        exec(f'from grkd_trl{name} import ' + ('*' if name else 'GRKDTrainer'))\n"
            "    except ImportError as error:\n"
            "        print('trl' in sys.modules, error)\n"
        )
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        lines = run.stdout.splitlines()
        assert len(lines) == 6
        assert all(line.startswith("False grkd_trl needs trl 1.14.2 or newer") for line in lines), lines

    def test_missing_name_is_named(self):
        """A TRL without one of the names, as a process of its own sees it."""
        code = "import trl.trainer.utils as utils; del utils.pad; from grkd_trl import GRKDTrainer"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert run.returncode != 0
        assert re.search(r"lacks a name that grkd_trl uses: cannot import name 'pad'.*pip install \"trl==", run.stderr)


class TestSFTTrainer:
    def test_prepare_dataset(self):
        theirs = names(SFTTrainer._prepare_dataset)
        assert theirs == "self dataset processing_class args packing formatting_func dataset_name".split()
        assert names(GroupTrainer._prepare_dataset) == theirs

    def test_constructor_takes_every_keyword_we_pass(self):
        tree = ast.parse(textwrap.dedent(inspect.getsource(GroupTrainer.__init__)))
        (call,) = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"
        )
        assert not call.args
        passed = {keyword.arg for keyword in call.keywords}
        assert {"model", "args", "train_dataset", "eval_dataset", "processing_class", "peft_config"} <= passed
        assert passed <= set(names(SFTTrainer.__init__))

    @pytest.mark.parametrize(
        "field",
        "max_length truncation_mode pad_to_multiple_of dataset_num_proc shuffle_dataset model_init_kwargs packing "
        "padding_free assistant_only_loss completion_only_loss loss_type label_smoothing_factor "
        "router_aux_loss_coef".split(),
    )
    def test_config_has_the_fields_we_read(self, field):
        assert field in SFTConfig.__dataclass_fields__

    @pytest.mark.parametrize(
        "function, taken",
        [
            ("create_model_card", "self model_name dataset_name tags"),
            ("_set_signature_columns_if_needed", "self"),
            ("compute_loss", "self model inputs return_outputs num_items_in_batch"),
        ],
    )
    def test_methods_we_override(self, function, taken):
        assert names(getattr(SFTTrainer, function)) == taken.split()
        assert names(getattr(GRKDTrainer, function)) == taken.split()

    def test_trl_leaves_train_to_transformers(self):
        assert SFTTrainer.train is DPOTrainer.train is Trainer.train

    @pytest.mark.parametrize("attribute", ["_tag_names", "_name", "_paper"])
    def test_card_is_made_from_these(self, attribute):
        assert hasattr(SFTTrainer, attribute)
        assert getattr(GRKDTrainer, attribute) != getattr(SFTTrainer, attribute)


class TestTrainer:
    @pytest.mark.parametrize(
        "function, taken",
        [
            ("get_batch_samples", "self epoch_iterator num_batches device"),
            ("_get_train_sampler", "self train_dataset"),
            ("evaluation_loop", "self dataloader description prediction_loss_only ignore_keys metric_key_prefix"),
            ("prediction_step", "self model inputs prediction_loss_only ignore_keys"),
            ("log", "self logs start_time"),
            ("train", "self resume_from_checkpoint trial ignore_keys_for_eval"),
            (
                "_init_training_state",
                "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
            ),
        ],
    )
    def test_methods_we_override(self, function, taken):
        assert names(getattr(Trainer, function)) == taken.split()
        assert names(getattr(GRKDTrainer, function)) == taken.split()


@pytest.fixture
def trainer(tmp_path):
    tokenizer = tiny_tokenizer()
    args = GRKDConfig(tmp_path, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    return GRKDTrainer(
        model=tiny_model("llama", len(tokenizer)),
        teacher_model=tiny_model("llama", len(tokenizer), seed=1),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "a b ", "completions": ["c", "d e", "f g a"]}] * 4),
        processing_class=tokenizer,
    )


class TestTrainerObject:
    def test_attributes_we_rely_on(self, trainer):
        assert trainer.aux_loss_enabled is False
        assert trainer.router_aux_loss_coef == 0.0
        assert trainer._tokenizer is trainer.processing_class
        assert trainer._tokenizer.pad_token_id is not None

    def test_signature_columns_decide_what_the_collator_sees(self, trainer):
        batch = next(iter(trainer.get_train_dataloader()))
        assert set(batch) == {"group_mask", "input_ids", "attention_mask", "completion_mask", "clipped"}
        assert set(trainer.train_dataset.column_names) > {"prompt", "completions"}

    def test_loss_is_scaled_for_ga_is_read_by_the_training_step(self, trainer):
        """`Trainer` divides the loss by the accumulation steps unless the class says it is scaled already."""
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = 4
        losses = []
        for scaled in (True, False):
            trainer.loss_is_scaled_for_ga = scaled
            losses.append(trainer.training_step(trainer.model, dict(batches[0]), count).item())
        assert GRKDTrainer.loss_is_scaled_for_ga is True
        assert losses[0] == pytest.approx(4 * losses[1], rel=1e-5)
        assert losses[0] > 0
