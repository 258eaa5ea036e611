"""What a launch, a step and the first log are checked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from runs import FIELDS, METHODS, RANKED, TOKENIZER, make_rows, make_student, make_teacher, make_trainer
from transformers.utils import is_torch_bf16_gpu_available

from grkd_trl import DPOConfig, GRKDConfig, SimPOConfig
from grkd_trl.teacher import LocalTeacher
from grkd_trl.trainers import checks


ROOT = Path(__file__).resolve().parents[1]
WORDS_OF_ROWS = {"rows": make_rows(8)}


def broken(model):
    """A model whose logits are NaN."""
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    return model


class TestFinite:
    """The step in which a number is no number ends the run before the optimizer moves anything."""

    @pytest.mark.parametrize("prompt_sharing", ["on", "off"])
    @pytest.mark.parametrize(
        "method, fields",
        [
            ("GRKD", {}),
            ("GRKD", {"soft_label": "group"}),
            ("GRKD", {"relative_level": "tokens", "soft_label": "none"}),
            ("KD", {}),
        ],
    )
    def test_teacher(self, tmp_path, method, fields, prompt_sharing):
        rows = make_rows(8, scores=False)
        trainer = make_trainer(
            tmp_path,
            rows,
            method=method,
            teacher_model=broken(make_teacher()),
            prompt_sharing=prompt_sharing,
            **fields,
        )
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with pytest.raises(ValueError, match=r"The teacher's logits are not finite in rows 0.*Usual causes"):
            trainer.train()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert not [entry for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize("method", [method for method in METHODS if method not in ("DPO", "MiniLLM")])
    def test_student(self, tmp_path, method):
        rows = [row | {"written_by": ["teacher"] * len(row["completions"])} for row in make_rows(8)]
        trainer = make_trainer(tmp_path, rows, method=method, model=broken(make_student()))
        with pytest.raises(ValueError, match="The student's logits are not finite in rows .* of a batch of"):
            trainer.train()

    def test_evaluation(self, tmp_path):
        trainer = make_trainer(
            tmp_path, make_rows(8), teacher_model=broken(make_teacher()), eval_dataset=Dataset.from_list(make_rows(4))
        )
        with pytest.raises(ValueError, match="The teacher's logits are not finite"):
            trainer.evaluate()

    @pytest.mark.parametrize(
        "method, fields, masked",
        [("GRKD", {}, "model"), ("KD", {}, "model"), ("KD", {"divergence": "reverse"}, "teacher_model")],
        ids=str,
    )
    def test_a_token_that_one_model_masks(self, tmp_path, method, fields, masked):
        """The student has probability 0 for a token that the teacher may choose, or the other way round."""
        models = {"model": make_student(), "teacher_model": make_teacher()}
        models[masked].lm_head.register_forward_hook(
            lambda _, args, logits: logits.index_fill(-1, torch.tensor([19]), -torch.inf)
        )
        rows = [{"prompt": "a b ", "completions": ["c d", "e"]}] * 4
        trainer = make_trainer(tmp_path, rows, method=method, **models, **fields)
        with pytest.raises(ValueError, match="Not finite: the loss .*mask both vocabularies alike"):
            trainer.train()

    def test_large_numbers_are_finite(self):
        checks.check_finite(student=torch.full((2, 2), -3e38))  # whose sum is not


class TestPrecision:
    @pytest.mark.parametrize("config_class", [GRKDConfig, SimPOConfig, DPOConfig])
    def test_follows_machine_and_launcher(self, tmp_path, config_class, monkeypatch):
        fields = {"use_cpu": True, "report_to": "none"}
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        assert config_class(tmp_path, **fields).bf16 is False
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` says where nobody chose
        assert config_class(tmp_path, report_to="none").bf16 is is_torch_bf16_gpu_available()
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert config_class(tmp_path, **fields).bf16 is True
        with pytest.raises(ValueError, match="`bf16=False`.*ACCELERATE_MIXED_PRECISION=bf16.*--mixed_precision no"):
            config_class(tmp_path, bf16=False, **fields)

    def test_default_trains_on_this_machine(self, tmp_path):
        """TRL's own default asks for bf16 on a GPU, and ends a run on a CPU."""
        seen = []
        fields = {name: value for name, value in FIELDS.items() if name not in ("bf16", "use_cpu")}
        student = make_student(dtype=torch.float32)
        student.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        trainer = make_trainer(
            tmp_path, bf16=None, use_cpu=False, model=student, teacher_model=make_teacher(dtype=torch.float32)
        )
        trainer.train()
        assert fields and set(seen) == {torch.bfloat16 if is_torch_bf16_gpu_available() else torch.float32}


@pytest.mark.slow
class TestLaunch:
    SCRIPT = (
        "import os, torch; from grkd_trl import GRKDConfig; "
        "from grkd_trl.trainers.config import resolve_args; "
        "args = GRKDConfig('out', use_cpu=True, report_to='none'); resolve_args(args, GRKDConfig, 'model'); "
        "os.write(1, f'processes {args.world_size}\\n'.encode()); "  # at once: `print` may write a line in parts
        "torch.distributed.is_initialized() and torch.distributed.barrier(); os._exit(0)"
    )

    def launch(self, tmp_path, *command, **env):
        script = tmp_path / "script.py"
        script.write_text(self.SCRIPT)
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | env
        return subprocess.run(
            [sys.executable, "-m", *command, str(script)], env=env, capture_output=True, text=True, timeout=300
        )

    def test_one_process_in_place_of_two_is_refused(self, tmp_path):
        given = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
        run = self.launch(tmp_path, *given, "--num_machines", "1", "--dynamo_backend", "no")
        assert run.returncode != 0
        assert "asked for several processes, but this process trains alone" in run.stderr
        assert "torchrun --nproc_per_node" in run.stderr

    def test_what_was_asked_for_passes(self, tmp_path):
        run = self.launch(
            tmp_path, "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"
        )
        assert "processes 1" in run.stdout, run.stderr
        run = self.launch(
            tmp_path, "torch.distributed.run", "--nproc_per_node", "2", "--standalone", OMP_NUM_THREADS="1"
        )
        assert run.stdout.count("processes 2") == 2, run.stderr


class TestWarnings:
    def test_ties(self, tmp_path, warnings):
        rows = [row | {"teacher_scores": [0.0] * len(row["completions"])} for row in make_rows(4)]
        rows[0]["teacher_scores"][0] = 1.0
        trainer = make_trainer(tmp_path, rows * 2, per_device_train_batch_size=4)
        trainer.train()
        assert [said for said in warnings if said.startswith("75% of the groups at the first logging step")]
        assert trainer.state.log_history[0]["rank/tied_ratio"] == 0.75
        assert len([said for said in warnings if "rank/tied_ratio" in said]) == 1  # once, not in every log

    def test_ties_online(self, tmp_path, warnings):
        rows = [{"prompt": row["prompt"]} for row in make_rows(4)]
        fields = {"completion_source": "student", "num_completions": 3, "max_completion_length": 4}
        trainer = make_trainer(
            tmp_path,
            rows,
            score_fn=lambda prompts, completions, **_: [[0.0] * len(group) for group in completions],
            **fields,
        )
        trainer.train()
        assert [said for said in warnings if said.startswith("100% of the groups")]

    def test_cut(self, tmp_path, warnings):
        make_trainer(tmp_path, make_rows(4), max_length=4).train()
        assert [said for said in warnings if "completions/clipped_ratio" in said]

    def test_student_near_random(self, tmp_path, warnings):
        rows = [{"prompt": row["prompt"]} for row in make_rows(4)]
        fields = {"completion_source": "student", "num_completions": 3, "max_completion_length": 4}
        make_trainer(tmp_path / "random", rows, model=make_student(initializer_range=1e-3), **fields).train()
        assert [said for said in warnings if "writes nearly at random" in said]
        warnings.clear()
        make_trainer(tmp_path / "sure", rows, model=make_student(initializer_range=1.0), **fields).train()
        assert not [said for said in warnings if "random" in said]

    @pytest.mark.parametrize("method", RANKED)
    def test_teacher_that_is_not_used(self, tmp_path, method, warnings):
        make_trainer(tmp_path, make_rows(4), method=method)
        assert [said for said in warnings if said.startswith("`teacher_model` is not used")]

    def test_teacher_that_is_not_used_by_grkd(self, tmp_path, warnings):
        make_trainer(tmp_path, make_rows(4), soft_label="none")
        assert [said for said in warnings if said.startswith("`teacher_model` is used for nothing")]
        warnings.clear()
        make_trainer(tmp_path, make_rows(4))
        assert not warnings
        online = {"completion_source": "student", "num_completions": 3, "max_completion_length": 4}
        rows = [{"prompt": row["prompt"]} for row in make_rows(4)]
        asked = {"teacher_model": LocalTeacher(make_student(), TOKENIZER), "score_fn": len, "soft_label": "none"}
        make_trainer(tmp_path, rows, **asked, **online)
        assert [said for said in warnings if said.startswith("`teacher_model` is used for no group")]


class TestSampling:
    def test_refused(self, tmp_path):
        with pytest.raises(ValueError, match='batch_rebalance.*Use "random"'):
            make_trainer(tmp_path, train_sampling_strategy="batch_rebalance")
        stream = Dataset.from_list(make_rows(8)).to_iterable_dataset()
        with pytest.raises(ValueError, match="group_by_length.*got a stream.*Load it without"):
            make_trainer(
                tmp_path, train_dataset=stream, train_sampling_strategy="group_by_length", max_steps=2, method="SimPO"
            )
