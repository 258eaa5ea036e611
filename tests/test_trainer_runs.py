"""Runs of the trainer: resuming, adapters, the log, the progress bar and the model card."""

import resource
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from runs import Recorder, logged, make_rows, make_student, make_teacher, make_trainer, train, weights
from transformers import TrainerCallback

from grkd_trl import GRKDConfig


# Resuming


class TestResume:
    """Ten groups in steps of two micro-batches of two: six steps in two epochs, the checkpoint in the first."""

    FIELDS = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "disable_dropout": False,  # so that the state of the generators matters
    }

    def run(self, folder, checkpoint=None, **kwargs):
        torch.manual_seed(99)  # whatever was drawn before
        student = make_student("qwen3", attention_dropout=0.2)
        trainer = make_trainer(folder, make_rows(10), model=student, **self.FIELDS | kwargs)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer

    @pytest.mark.parametrize(
        "fields", [{}, {"soft_label": "none", "relative_level": "tokens"}, {"alpha_schedule": "cosine"}], ids=str
    )
    @pytest.mark.parametrize("step", [2, 4])
    def test_gives_the_same_weights_bit_for_bit(self, tmp_path, fields, step):
        whole = self.run(tmp_path / "whole", **fields)
        assert whole.state.global_step == 6
        resumed = self.run(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{step}", **fields)
        for name, value in weights(whole.model).items():
            assert torch.equal(resumed.model.get_parameter(name), value), name
        for name in ("loss", "alpha", "grad_norm", "rank/accuracy", "learning_rate"):
            assert logged(resumed, name) == logged(whole, name), name
            assert len(logged(whole, name)) == 6
        alphas = logged(whole, "alpha")
        assert len(set(alphas)) == (1 if "soft_label" in fields else 6)

    @pytest.mark.parametrize("step", [2, 4, 6])
    def test_a_stream_resumes_in_the_pass_that_it_was_in(self, tmp_path, step):
        """Three steps in a pass, the last one of a single micro-batch."""

        def run(folder, checkpoint=None):
            stream = Dataset.from_list(make_rows(10)).to_iterable_dataset().shuffle(seed=3, buffer_size=10)
            given = {"max_steps": 8, "save_steps": 1, "save_strategy": "steps", "lr_scheduler_type": "cosine"}
            given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            trainer = make_trainer(folder, train_dataset=stream, **given)
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer

        whole = run(tmp_path / "whole")
        assert len(set(logged(whole, "loss"))) == 8
        resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name in ("loss", "grad_norm", "epoch"):
            assert logged(resumed, name) == logged(whole, name), name

    @pytest.mark.parametrize("method", ["GRKD", "SimPO", "MiniLLM"])
    def test_a_stream_has_the_steps_of_a_dataset(self, tmp_path, method):
        """The last step of a pass has fewer micro-batches, and leaves nothing to the next pass."""
        rows, found = Dataset.from_list(make_rows(10)), []
        for dataset in (rows, rows.to_iterable_dataset()):
            given = {"method": method, "max_steps": 7, "per_device_train_batch_size": 2}
            trainer = make_trainer(tmp_path, train_dataset=dataset, gradient_accumulation_steps=2, **given)
            trainer.train()
            found.append([logged(trainer, name) for name in ("loss", "grad_norm", "completions/mean_length")])
        assert found[0] == found[1]

    def test_dpo_leaves_an_incomplete_step_of_a_stream_out(self, tmp_path, caplog):
        """TRL's loss takes no micro-batch without pairs. The first step of the next pass is its own."""
        rows, found = make_rows(10), []
        for dataset in (
            Dataset.from_list(rows).to_iterable_dataset(),
            Dataset.from_list(rows[:9]),
        ):  # of eight pairs, since one group is tied
            given = {"method": "DPO", "max_steps": 4, "per_device_train_batch_size": 2}
            trainer = make_trainer(tmp_path, train_dataset=dataset, gradient_accumulation_steps=2, **given)
            trainer.train()
            found.append([logged(trainer, name) for name in ("loss", "grad_norm")])
        assert found[0] == found[1] and len(found[0][0]) == 4
        assert "The stream ends after 1 of the 2 micro-batches" in caplog.text

    def test_a_run_over_a_stream_goes_on_with_more_steps(self, tmp_path):
        """In its first pass, where it ended."""

        def run(folder, max_steps, checkpoint=None):
            given = {"max_steps": max_steps, "save_steps": 1, "save_strategy": "steps", "alpha_schedule": "constant"}
            given |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
            trainer = make_trainer(
                folder, train_dataset=Dataset.from_list(make_rows(8)).to_iterable_dataset(), **given
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            return logged(trainer, "loss")

        run(tmp_path, 2)
        assert run(tmp_path, 4, str(tmp_path / "checkpoint-2")) == run(tmp_path / "whole", 4)


class TestCutOff:
    """A checkpoint whose writing was cut off; killed for real in tests/test_dying.py."""

    FIELDS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}

    def run(self, folder, checkpoint=None, callback=None):
        models = {"model": make_student(dtype=torch.float32), "teacher_model": make_teacher(dtype=torch.float32)}
        recorder = Recorder()
        callbacks = [recorder] if callback is None else [recorder, callback]
        trainer = make_trainer(folder, make_rows(8), **models, **self.FIELDS, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, len(recorder.gradients)

    @pytest.mark.parametrize("how", ["state missing", "state cut", "sentinel"])
    def test_the_last_whole_one_is_taken(self, tmp_path, how):
        whole, _ = self.run(tmp_path)
        state = tmp_path / "checkpoint-4" / "trainer_state.json"
        if how == "sentinel":
            (tmp_path / "checkpoint-4" / "checkpoint-is-incomplete.txt").touch()
        else:
            state.write_text(state.read_text()[:40]) if how == "state cut" else state.unlink()
        resumed, steps = self.run(tmp_path, True)
        assert steps == 1 and logged(resumed, "loss") == logged(whole, "loss")
        for name, value in weights(whole.model).items():
            assert torch.equal(resumed.model.get_parameter(name), value), name
        assert self.run(tmp_path, True)[1] == 0  # it is whole now

    @pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
    def test_a_full_disk(self, tmp_path, file):
        """From the third checkpoint on files cannot become as large as one of its files: the second is resumed from."""
        whole, _ = self.run(tmp_path / "whole")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        class Full(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    size = (tmp_path / "whole/checkpoint-3" / file).stat().st_size
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 50, limits[1]))

        try:
            with pytest.raises(
                OSError, match="Cannot write the checkpoint .*-3 .*checkpoint-2 is complete and intact"
            ):
                self.run(tmp_path / "full", callback=Full())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        resumed, steps = self.run(tmp_path / "full", True)
        assert steps == 2 and logged(resumed, "loss") == logged(whole, "loss")

    def test_errors(self, tmp_path):
        self.run(tmp_path)
        for step in range(1, 5):
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
        with pytest.raises(
            ValueError, match="checkpoint-2 is incomplete.*Delete it, and set `resume_from_checkpoint`"
        ):
            self.run(tmp_path, str(tmp_path / "checkpoint-2"))
        with pytest.raises(ValueError, match="Every checkpoint in .* is incomplete.*saving .*checkpoint-4"):
            self.run(tmp_path, True)
        with pytest.raises(ValueError, match="No valid checkpoint found"):  # of transformers
            self.run(tmp_path / "empty", True)


# Adapters


def lora(**kwargs):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | kwargs)


def wrapped():
    """A student that is a `PeftModel` already, its second adapter matrices away from zero."""
    torch.manual_seed(5)
    return get_peft_model(make_student(dtype=torch.float32), lora(init_lora_weights=False))


ADAPTERS = {
    "peft_config": lambda: {"model": make_student(dtype=torch.float32), "peft_config": lora()},
    "PeftModel": lambda: {"model": wrapped()},
    "head": lambda: {
        "model": make_student(dtype=torch.float32),
        "peft_config": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    },
    "DoRA": lambda: {"model": make_student(dtype=torch.float32), "peft_config": lora(use_dora=True)},
}
LIGHT = {"bf16": True, "gradient_checkpointing": True}
PROMPT = torch.tensor([[4, 5, 6, 7, 8, 9]])


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=PROMPT).logits.float()


class TestLoRA:
    @pytest.mark.parametrize("fields", [{}, LIGHT], ids=["plain", "bf16 and checkpointing"])
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_only_adapters_move_and_come_back(self, tmp_path, adapter, fields):
        base = make_student(dtype=torch.float32)
        trainer = make_trainer(
            tmp_path,
            make_rows(8, scores=False),
            **ADAPTERS[adapter](),
            teacher_model=make_teacher(dtype=torch.float32),
            num_train_epochs=2,
            learning_rate=1e-2,
            **fields,
        )
        model, before = trainer.model, weights(trainer.model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable and all("lora_" in name or "modules_to_save" in name for name in trainable)
        trainer.train()
        for name, value in weights(model).items():
            assert value.isfinite().all(), name
            assert torch.equal(value, before[name]) == (name not in trainable), name

        trainer.save_model()
        assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
        # In float32: accelerate's wrapper would run the forward in bf16.
        trained = logits_of(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
        assert (trained - logits_of(base)).abs().max() > 0.1
        reloaded = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits_of(reloaded), trained, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits_of(reloaded.merge_and_unload()), trained, rtol=0, atol=1e-4)

    def test_gradients_are_those_of_the_same_weights_merged(self, tmp_path):
        """LoRA's gradient is that of the full weight W, by the chain rule: dB = scaling dW A^T, dA = scaling B^T dW."""
        adapted = wrapped().double()
        merged = wrapped().double().merge_and_unload().requires_grad_(True)
        rows, teacher = make_rows(), {"teacher_model": make_teacher}
        _, (ours,) = train(tmp_path / "a", rows, model=adapted, **teacher)
        _, (full,) = train(tmp_path / "b", rows, model=merged, **teacher)
        fresh, scaling = weights(wrapped().double()), 16 / 4
        checked = 0
        for name, gradient in full.items():
            path = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.default.weight" in ours:
                a, b = (fresh[f"{path}.lora_{side}.default.weight"] for side in "AB")
                expected = {"A": scaling * b.T @ gradient, "B": scaling * gradient @ a.T}
                for side, value in expected.items():
                    torch.testing.assert_close(
                        ours[f"{path}.lora_{side}.default.weight"], value, rtol=1e-8, atol=1e-10
                    )
                checked += 1
        assert checked == 14

    def test_resumes(self, tmp_path):
        fields = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
        models = {"teacher_model": make_teacher(dtype=torch.float32)}
        whole, _ = train(tmp_path / "whole", make_rows(8), **ADAPTERS["peft_config"](), **models, **fields)
        resumed = make_trainer(tmp_path / "more", make_rows(8), **ADAPTERS["peft_config"](), **models, **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for name, value in weights(whole.model).items():
            assert torch.equal(resumed.model.get_parameter(name), value), name


# What a user sees

METRICS = [
    "loss/relative",
    "loss/soft",
    "alpha",
    "scores/student",
    "scores/teacher",
    "scores/gap",
    "rank/accuracy",
    "rank/kendall_tau",
    "rank/pairs_per_group",
    "rank/tied_ratio",
    "completions/mean_length",
    "completions/best_length",
    "completions/worst_length",
    "completions/clipped_ratio",
    "completions/padding_ratio",
    "num_tokens",
    "entropy",
    "mean_token_accuracy",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    fields = {"logging_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.0, "max_length": 7}
    return train(tmp_path_factory.mktemp("log"), make_rows(8), alpha_start=0.2, alpha_end=0.8, **fields)[0]


class TestLog:
    @pytest.mark.parametrize("name", METRICS)
    def test_has_every_metric_once_a_window(self, trainer, name):
        values = logged(trainer, name)
        assert len(values) == 2 and all(isinstance(value, float) for value in values)

    def test_has_no_other_names(self, trainer):
        own = {name for name in trainer.state.log_history[0] if name not in ("epoch", "step", "learning_rate")}
        assert own == {*METRICS, "loss", "grad_norm", "memory/peak_gib"}

    def test_averages_over_the_window(self, trainer):
        """The weights stand still: windows are means over their groups and completions, loops over the rows tell."""
        rows = make_rows(8)
        assert logged(trainer, "alpha") == pytest.approx([0.275, 0.575])
        for window, part in enumerate((rows[:4], rows[4:])):
            scores = [score for row in part for score in row["teacher_scores"]]
            pairs = [sum(a > b for a in row["teacher_scores"] for b in row["teacher_scores"]) for row in part]
            kept = [min(len((row["prompt"] + text).split()) + 1, 7) for row in part for text in row["completions"]]
            prompts = [len(row["prompt"].split()) for row in part for _ in row["completions"]]
            lengths = [total - prompt for total, prompt in zip(kept, prompts, strict=True)]
            whole = [len((row["prompt"] + text).split()) + 1 for row in part for text in row["completions"]]
            expected = {
                "scores/teacher": sum(scores) / len(scores),
                "rank/pairs_per_group": sum(pairs) / 4,
                "completions/mean_length": sum(lengths) / len(lengths),
                "completions/clipped_ratio": sum(length > 7 for length in whole) / len(whole),
            }
            assert {name: logged(trainer, name)[window] for name in expected} == pytest.approx(expected)

    def test_is_on_the_progress_bar(self, tmp_path, capfd):
        train(tmp_path, make_rows(), disable_tqdm=False)
        written = "".join(capfd.readouterr())
        assert "1/1" in written  # the bar itself
        for name in METRICS:
            assert f"'{name}'" in written, name

    def test_reports_length_of_best_and_worst(self, tmp_path):
        rows = [
            {"prompt": "a ", "completions": ["b c d", "e", "f g"], "teacher_scores": [-3.0, -1.0, -2.0]},
            {"prompt": "a b ", "completions": ["c", "d e f g h"], "teacher_scores": [-3.0, -1.0]},
        ]
        trainer, _ = train(tmp_path, rows, soft_label="none", per_device_train_batch_size=2)
        assert logged(trainer, "completions/best_length") == [(2 + 6) / 2]  # with EOS
        assert logged(trainer, "completions/padding_ratio") == [1 - (5 + 3 + 4 + 4 + 8) / 40]
        assert logged(trainer, "completions/worst_length") == [(4 + 2) / 2]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    fields = {"soft_label": "group", "ranking_temperature": 0.25, "min_gap": 0.125}
    trainer, _ = train(folder, make_rows(), **fields)
    trainer.create_model_card(model_name="student-of-the-test")
    return (folder / "README.md").read_text(encoding="utf-8"), trainer.args


OF_ONLINE_GROUPS = ["num_completions", "num_teacher_completions", "temperature", "top_p", "max_completion_length"]
OF_ONLINE_GROUPS += ["generate_every", "reuse_groups", "log_completions", "soft_label_top_k", "use_vllm", "vllm_mode"]
OF_ONLINE_GROUPS += ["vllm_server_base_url", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"]


class TestModelCard:
    def test_names_paper_equation_and_versions(self, card):
        text, _ = card
        assert "# Model Card for student-of-the-test" in text
        assert "trained with GRKD" in text
        assert "https://huggingface.co/papers/2504.20482" in text
        assert "Group Relative Knowledge Distillation: Learning from Teacher's Relational Inductive Bias" in text
        assert "Chao Li and Changhua Zhou and Jia Chen" in text  # to cite
        assert "- grkd" in text.split("---")[1]  # the tag
        assert text.count("$$ L = (1 - \\alpha) L_{soft} + \\alpha L_{relative}") == 1
        assert all(f": {version(package)}" in text for package in ("trl", "torch", "grkd_trl"))

    @pytest.mark.parametrize("field", list(GRKDConfig.__annotations__))
    def test_has_every_field_that_was_read_with_its_value(self, card, field):
        text, args = card
        if not field.startswith("_"):
            row = f"| `{field}` | `{getattr(args, field)}` |"
            assert (row in text) == (field not in OF_ONLINE_GROUPS and getattr(args, field) is not None)

    def test_is_written_with_a_checkpoint(self, tmp_path):
        train(tmp_path, make_rows(), save_strategy="steps", save_steps=1)
        assert "2504.20482" in (tmp_path / "README.md").read_text(encoding="utf-8")
