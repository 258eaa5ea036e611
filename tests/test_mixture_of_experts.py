"""Mixtures of experts, whose configuration asks for router logits or not: TRL saves each that it trains with it."""

import importlib
import math
from contextlib import nullcontext

import architectures
import pytest
import torch
from datasets import Dataset
from runs import METHODS, VOCAB, logged, make_rows, make_trainer
from test_architectures import logps_alone
from test_prompt_sharing import make_batch
from tiny import tiny_tokenizer

from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.scoring import score_completions
from grkd_trl.teacher import LocalTeacher, sample_from_mixture
from grkd_trl.teacher.writing import write_completions


WITH_LOSS = ["gpt_oss", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe"]
WITHOUT_LOSS = ["deepseek_v2", "deepseek_v3"]  # their configuration has the field, their forward no loss
OURS = [method for method in METHODS if method != "DPO"]  # whose forward is TRL's
COEFFICIENT = 0.5


def make_experts(family, *, router_logits=True, seed=0, **kwargs):
    model = architectures.build(family, vocab_size=VOCAB, seed=seed, pad_token_id=0, eos_token_id=1, **kwargs)
    model.config.output_router_logits = router_logits
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model


def make_ids():
    batch = make_batch()
    batch["input_ids"] = batch["input_ids"] % VOCAB
    return batch


@pytest.fixture
def balanced(monkeypatch):
    """Models' load-balancing losses that were computed, as they were given out."""
    values = []
    for family in WITH_LOSS:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        original = module.load_balancing_loss_func

        def load_balancing_loss_func(*args, original=original):
            values.append(original(*args))
            return values[-1]

        monkeypatch.setattr(module, "load_balancing_loss_func", load_balancing_loss_func)
    return values


@pytest.mark.parametrize("router_logits", [True, False])
@pytest.mark.parametrize("family", WITH_LOSS + WITHOUT_LOSS)
class TestOneModel:
    def test_scores(self, family, router_logits, balanced):
        model, batch = make_experts(family), make_ids()
        model.config.output_router_logits = False
        expected = logps_alone(model, batch)
        model.config.output_router_logits = router_logits
        for sharing in ("off", "on", "auto"):
            scores = score_completions(model, batch, prompt_sharing=sharing)
            torch.testing.assert_close(scores.per_token_logps, expected, rtol=0, atol=1e-4)
            assert scores.aux_loss is None
        assert not balanced

    def test_balancing_loss_is_that_of_every_row(self, family, router_logits):
        model, batch = make_experts(family, router_logits=router_logits), make_ids()
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for sharing in ("off", "on", "auto"):
            scores = score_completions(model, batch, prompt_sharing=sharing, output_router_logits=True)
            if family in WITHOUT_LOSS:
                assert scores.aux_loss is None
                continue
            own = model(**ids, output_router_logits=True, use_cache=False).aux_loss
            torch.testing.assert_close(scores.aux_loss, own, rtol=0, atol=1e-6)
            gradients = [
                torch.autograd.grad(loss, model.parameters(), allow_unused=True) for loss in (scores.aux_loss, own)
            ]
            assert any(gradient is not None and gradient.abs().max() > 1e-4 for gradient in gradients[1])
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)

    def test_writes(self, family, router_logits, balanced):
        settings = {"max_new_tokens": 5, "top_p": 1.0, "batch_size": 2}
        prompts = [[3, 4, 5], [6, 7]]
        written = []
        for flag in (router_logits, False):
            model = make_experts(family, router_logits=flag)
            for num_completions, temperature, seeds in ((1, 0.0, None), (2, 1.0, [1, 2])):
                options = settings | {"num_completions": num_completions, "temperature": temperature, "seeds": seeds}
                written.append(write_completions(model, tiny_tokenizer(), prompts, **options))
        assert written[:2] == written[2:]
        assert not balanced

    def test_writes_with_a_teacher(self, family, router_logits, balanced):
        def sample(flag):
            student, teacher = (make_experts(family, router_logits=flag, seed=seed) for seed in range(2))
            ids = torch.tensor([[3, 4, 5], [0, 6, 7]])
            return sample_from_mixture(
                student,
                lambda: nullcontext(teacher),
                ids,
                (ids > 0).long(),
                teacher_share=0.3,
                max_new_tokens=5,
                eos_token_ids=[1],
                vocab_size=VOCAB,
                numbers=torch.linspace(0.1, 0.9, 10, dtype=torch.float64).view(2, 5),
            )

        assert sample(router_logits) == sample(False)
        assert not balanced


class TestTraining:
    @pytest.mark.parametrize("sharing", ["auto", "on", "off"])
    @pytest.mark.parametrize("method", OURS)
    def test_student_and_teacher(self, tmp_path, method, sharing, balanced):
        models = {"model": make_experts("qwen3_moe"), "teacher_model": make_experts("gpt_oss", seed=1)}
        fields = {"router_aux_loss_coef": COEFFICIENT, "per_device_train_batch_size": 2, "prompt_sharing": sharing}
        trainer = make_trainer(tmp_path, make_rows(scores=False), method=method, **models, **fields)
        trainer.train()
        assert trainer.state.global_step == 2
        assert len(balanced) == 2  # the student's, once a step
        assert logged(trainer, "aux_loss") == pytest.approx([value.item() for value in balanced], abs=1e-6)
        if method != "GRKD":  # whose share of each loss is another by the time of the log
            for log in trainer.state.log_history[:2]:
                assert log["loss"] == pytest.approx(trainer.mean_loss(log) + COEFFICIENT * log["aux_loss"], abs=1e-4)

    @pytest.mark.parametrize("method", OURS)
    def test_a_stream_has_the_steps_of_a_dataset(self, tmp_path, method):
        """The micro-batch that fills up the last step of a pass has no load-balancing loss, though it repeats a row."""
        rows = [row | {"written_by": ["teacher"] * len(row["completions"])} for row in make_rows(10)]
        rows, found = Dataset.from_list(rows), []
        for dataset in (rows, rows.to_iterable_dataset()):
            models = {"model": make_experts("mixtral"), "teacher_model": make_experts("mixtral", seed=1)}
            fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
            fields |= {"router_aux_loss_coef": COEFFICIENT, "train_dataset": dataset}
            trainer = make_trainer(tmp_path, method=method, **models, **fields)
            trainer.train()
            found.append([logged(trainer, name) for name in ("loss", "grad_norm", "aux_loss")])
        assert len(found[0][2]) == 4
        for values, expected in zip(*found, strict=True):
            assert values == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("family", WITH_LOSS + WITHOUT_LOSS)
    @pytest.mark.parametrize("router_logits", [True, False])
    def test_every_family_on_both_sides(self, tmp_path, family, router_logits, balanced):
        models = {
            "model": make_experts(family, router_logits=router_logits),
            "teacher_model": make_experts(family, router_logits=router_logits, seed=1),
        }
        trainer = make_trainer(tmp_path, make_rows(scores=False), **models)
        trainer.train()
        assert trainer.state.global_step == 1
        assert len(logged(trainer, "aux_loss")) == len(balanced) == (1 if family in WITH_LOSS else 0)

    @pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
    def test_online(self, tmp_path, family):
        student, teacher = make_experts(family), make_experts(family, seed=1)
        rows = [{"prompt": row["prompt"]} for row in make_rows(num=8)]
        own = {"completion_source": "mixed", "num_completions": 4, "max_completion_length": 4}
        trainer = make_trainer(tmp_path, rows, model=student, teacher_model=teacher, **own)
        trainer.train()
        assert trainer.state.global_step == 2

    def test_offline(self, tmp_path):
        student, teacher = (LocalTeacher(make_experts("qwen3_moe", seed=seed), tiny_tokenizer()) for seed in range(2))
        config = GroupsConfig(str(tmp_path / "groups"), num_completions=3, max_completion_length=4)
        prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in make_rows()])
        groups = generate_groups(prompts, config, student=student, teacher=teacher)
        assert all(math.isfinite(score) for row in groups["teacher_scores"] for score in row)
        trainer = make_trainer(tmp_path, groups.to_list(), model=student.model, teacher_model=teacher.model)
        trainer.train()
        assert trainer.state.global_step == 1

    def test_evaluation_holds_the_balancing_loss(self, tmp_path, balanced):
        trainer = make_trainer(
            tmp_path,
            model=make_experts("mixtral"),
            router_aux_loss_coef=COEFFICIENT,
            eval_dataset=Dataset.from_list(make_rows()),
            per_device_eval_batch_size=4,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_aux_loss"] == pytest.approx(balanced[0].item(), abs=1e-6)
        means = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        expected = trainer.mean_loss(means) + COEFFICIENT * balanced[0].item()
        assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)

    def test_a_coefficient_without_a_loss_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, model=make_experts("deepseek_v3"), router_aux_loss_coef=0.1)
        with pytest.raises(ValueError, match="`router_aux_loss_coef` is 0.1, and the forward of the student gives no"):
            trainer.train()

    def test_a_default_coefficient_without_a_loss_is_left_out(self, tmp_path):
        trainer = make_trainer(tmp_path, model=make_experts("llama4_text"))
        assert trainer.aux_loss_enabled
        trainer.train()
        assert trainer.state.global_step == 1 and not logged(trainer, "aux_loss")
