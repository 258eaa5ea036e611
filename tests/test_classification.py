"""GRKD and its rivals over the classes of a classifier: the step, the rows, the teacher, evaluation."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs_of_classifiers import (
    CLASSES,
    TOKENIZER,
    Gradients,
    assert_same,
    batch_of,
    make_model,
    make_rows,
    make_teacher,
    make_trainer,
    trainer_of_a_launch,
    with_logits,
)
from transformers import (
    AutoModelForImageClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
    ViTConfig,
)

from grkd_trl import DistillationForClassificationTrainer, GRKDForClassificationConfig, GRKDForClassificationTrainer
from grkd_trl.classification.metrics import rank_correlation
from grkd_trl.classification.outputs import add_teacher_outputs, classify
from grkd_trl.losses import (
    dist_loss,
    group_relative_loss,
    group_soft_label_loss,
    pld_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sample_classes,
)


class TestStep:
    def test_a_stream_has_the_steps_of_a_dataset(self, tmp_path):
        """The last step of a pass has fewer micro-batches, and leaves nothing to the next pass."""
        found = []
        for rows in (make_rows(10), make_rows(10).to_iterable_dataset()):
            given = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 7}
            trainer = make_trainer(tmp_path, rows, train_sampling_strategy="sequential", **given)
            trainer.train()
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            found.append([(entry["loss"], entry["grad_norm"]) for entry in logs])
        assert found[0] == found[1] and len(found[0]) == 7

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"hard_label_weight": 0.3, "label_smoothing_factor": 0.1},
            {"ranking_temperature": 0.5, "min_gap": 0.2, "soft_label_temperature": 3.0},
            {"target_temperature": 2.0, "pair_weights": "probability", "standardize": True},
            {"weigh_by_doubt": True, "hard_label_weight": 0.3, "soft_label_temperature": 0.5},
            {"alpha_start": 1.0, "alpha_schedule": "constant", "alpha_end": 1.0, "hard_label_weight": 1.0},
        ],
        ids=str,
    )
    def test_loss_and_gradients_are_those_of_the_equation(self, tmp_path, fields):
        rows, student, teacher, seen = make_rows(4), make_model(), make_teacher(), Gradients()
        given = {"alpha_start": 0.25} | fields
        trainer = make_trainer(
            tmp_path, rows, model=copy.deepcopy(student), teacher=teacher, callbacks=[seen], max_steps=1, **given
        )
        trainer.train()

        inputs = batch_of(rows)
        labels = inputs.pop("labels")
        logits, teacher_logits = student(**inputs).logits, teacher(**inputs).logits.detach()
        relative = group_relative_loss(
            logits,
            teacher_logits,
            temperature=given.get("ranking_temperature", 1.0),
            target_temperature=given.get("target_temperature", 0.0),
            weights=teacher_logits.softmax(-1) if "pair_weights" in given else None,
            min_gap=given.get("min_gap", 0.0),
            standardize=given.get("standardize", False),
        )
        soft_temperature = given.get("soft_label_temperature", 1.0)
        soft = group_soft_label_loss(logits, teacher_logits, temperature=soft_temperature)
        weights = torch.ones(4)
        if "weigh_by_doubt" in given:
            weights = torch.tensor([reference.doubt_weight(row, soft_temperature) for row in teacher_logits.tolist()])
        relative, soft = (weights * relative).mean(), (weights * soft).mean()
        hard = F.cross_entropy(logits, labels, label_smoothing=given.get("label_smoothing_factor", 0.0))
        alpha, share = given["alpha_start"], given.get("hard_label_weight", 0.0)
        loss = share * hard + (1 - share) * ((1 - alpha) * soft + alpha * relative)
        loss.backward()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(seen.steps[0], {name: p.grad for name, p in student.named_parameters()}, 1e-5)

    def test_every_parameter_moves_and_the_teacher_does_not(self, tmp_path):
        student, teacher = make_model(), make_teacher()
        before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]
        make_trainer(tmp_path, model=student, teacher=teacher, hard_label_weight=0.1).train()
        for name, value in student.state_dict().items():
            assert value.isfinite().all() and (value != before[0][name]).any(), name
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, before[1][name]), name
        assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training

    @pytest.mark.parametrize("trainer_class", [GRKDForClassificationTrainer, DistillationForClassificationTrainer])
    def test_a_batch_may_be_split(self, tmp_path, trainer_class):
        rows, found = make_rows(8), []
        rival = trainer_class is DistillationForClassificationTrainer
        loss = {
            "loss_func": lambda student, teacher, labels: group_relative_loss(
                student.logits, teacher.logits, target_temperature=1.0
            )
        }
        for size, steps in [(8, 1), (3, 3)]:  # 3 + 3 + 2 rows: micro-batches of different sizes
            seen = Gradients()
            split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
            trainer = make_trainer(
                tmp_path, rows, trainer_class=trainer_class, callbacks=[seen], hard_label_weight=0.2, **split,
                **(loss if rival else {"alpha_start": 0.5}),
            )  # fmt: skip
            trainer.train()
            found.append((trainer.state.log_history[0], seen.steps[0]))
        (whole, gradients), (parts, part_gradients) = found
        for name in set(whole) - {"grad_norm", "epoch", "learning_rate"}:
            assert parts[name] == pytest.approx(whole[name], rel=1e-5), name
        assert_same(part_gradients, gradients, 1e-5)

    def test_resuming_continues_the_run(self, tmp_path):
        given = {"max_steps": 4, "sampled_classes": 3, "save_strategy": "steps", "save_steps": 2}
        whole = make_trainer(tmp_path / "whole", **given)
        whole.train()
        resumed = make_trainer(tmp_path / "whole", model=make_model(5), **given)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
        assert_same(resumed.model.state_dict(), whole.model.state_dict())
        kept = ("loss", "alpha", "loss/relative", "loss/soft")
        for first, second in zip(whole.state.log_history[:4], resumed.state.log_history[:4], strict=True):
            assert {k: first[k] for k in kept} == {k: second[k] for k in kept}
        assert [round(entry["alpha"], 3) for entry in whole.state.log_history[:4]] == [0.0, 0.15, 0.3, 0.45]

    def test_draws_depend_on_seed_and_step_alone(self, tmp_path):
        def losses(checkpoint=None, **kwargs):
            given = {"max_steps": 4, "sampled_classes": 2, "learning_rate": 0.0, "data_seed": 42}
            split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            trainer = make_trainer(tmp_path, **given | split | kwargs)
            trainer.train(resume_from_checkpoint=checkpoint)
            return [entry["loss/relative"] for entry in trainer.state.log_history[:4]]

        class DrawsToo(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                torch.rand(7)

        whole = losses(save_strategy="steps", save_steps=2)
        assert losses(callbacks=[DrawsToo()]) == whole
        (tmp_path / "checkpoint-2/rng_state.pth").unlink()  # where torch's global generator stood
        assert losses(checkpoint=str(tmp_path / "checkpoint-2")) == whole
        assert losses(seed=1) != whole

    def test_batches_draw_for_themselves_and_an_evaluation_as_the_last(self, tmp_path):
        trainer, logits = make_trainer(tmp_path), torch.zeros(50, CLASSES)

        def drawn():
            return sample_classes(logits, 3, generator=trainer.step_generator(logits.device))

        trainer.model.train()
        first, second = drawn(), drawn()
        assert not torch.equal(first, second)
        trainer.model.eval()
        assert torch.equal(drawn(), drawn())
        trainer.state.global_step = 1
        trainer.model.train()
        assert not torch.equal(drawn(), first)
        trainer.state.global_step = 0
        assert torch.equal(drawn(), first) and torch.equal(drawn(), second)

    def test_sampled_classes_are_what_is_ranked(self, tmp_path):
        found = {}
        for drawn in (None, 2, CLASSES):
            trainer = make_trainer(tmp_path, sampled_classes=drawn, alpha_start=1.0, alpha_end=1.0)
            trainer.train()
            found[drawn] = trainer.state.log_history[0]["loss/relative"]
        assert found[CLASSES] == pytest.approx(found[None], rel=1e-5)
        assert found[2] != pytest.approx(found[None], rel=1e-3)

    def test_lora(self, tmp_path):
        lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=CLASSES)
        student = make_model()
        before = copy.deepcopy(student.state_dict())
        trainer = make_trainer(tmp_path, model=student, peft_config=lora)
        trainer.train()
        moved = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert all("lora" in name or "modules_to_save" in name for name in moved)
        base = trainer.model.get_base_model().state_dict()
        assert torch.equal(
            base["bert.embeddings.word_embeddings.weight"], before["bert.embeddings.word_embeddings.weight"]
        )
        head = base["classifier.modules_to_save.default.weight"]
        assert (head != before["classifier.weight"]).any()

    def test_embeddings_of_an_adapted_head_are_what_it_reads(self):
        batch = batch_of(make_rows(3))
        expected = classify(make_model(), batch).embeddings
        adapted = get_peft_model(make_model(), LoraConfig(target_modules=["classifier"], r=4))
        torch.testing.assert_close(classify(adapted, batch).embeddings, expected)


class TestTeacher:
    def test_columns_are_as_good_as_the_teacher(self, tmp_path):
        rows, found = make_rows(8), []
        for given in ({"rows": rows}, {"rows": with_logits(rows), "teacher": None}):
            trainer = make_trainer(tmp_path, hard_label_weight=0.1, **given)
            trainer.train()
            found.append(trainer)
        assert found[1].teacher_model is None
        assert_same(found[1].model.state_dict(), found[0].model.state_dict(), 1e-5)

    def test_a_teacher_is_not_kept_where_all_rows_bring_its_logits(self, tmp_path):
        assert make_trainer(tmp_path, with_logits(make_rows())).teacher_model is None

    def test_rows_need_no_labels_without_a_share_of_them(self, tmp_path):
        make_trainer(tmp_path, make_rows().remove_columns("labels")).train()

    def test_a_teacher_without_embeddings_is_named(self):
        """Its head reads every token."""
        config = LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_labels=CLASSES, pad_token_id=TOKENIZER.pad_token_id,
        )  # fmt: skip
        teacher, collator = LlamaForSequenceClassification(config), DataCollatorWithPadding(TOKENIZER)
        with pytest.raises(ValueError, match="`LlamaForSequenceClassification` has none: no last linear layer"):
            add_teacher_outputs(make_rows(3), teacher, collator, embeddings=True, progress=False)
        rows = add_teacher_outputs(make_rows(3), teacher, collator, progress=False)
        assert "teacher_embeddings" not in rows.column_names and len(rows["teacher_logits"][0]) == CLASSES

    def test_embeddings_are_what_the_head_reads(self):
        same_width = make_model(hidden_size=16, num_labels=16).eval()  # a layer as wide as the classes is no head
        for model in (same_width, make_teacher()):
            outputs = classify(model, batch_of(make_rows(5)))
            torch.testing.assert_close(model.classifier(outputs.embeddings), outputs.logits)
        assert outputs.embeddings.shape == (5, 32)
        rows = with_logits(make_rows(5)).with_format("torch")
        torch.testing.assert_close(rows["teacher_logits"][:], outputs.logits.detach())
        torch.testing.assert_close(rows["teacher_embeddings"][:], outputs.embeddings.detach())

    def test_loads_both_from_paths(self, tmp_path):
        make_model().save_pretrained(tmp_path / "student")
        make_teacher().save_pretrained(tmp_path / "teacher")
        trainer = make_trainer(tmp_path, model=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))
        assert type(trainer.teacher_model) is type(trainer.model) is type(make_model())
        trainer.train()

    def test_images(self, tmp_path):
        shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "intermediate_size": 8}
        config = ViTConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=CLASSES, **shape)
        student, teacher = (AutoModelForImageClassification.from_config(config) for _ in range(2))
        rows = Dataset.from_dict({"pixel_values": np.random.rand(8, 1, 8, 8).tolist(), "labels": [0, 1, 2, 3] * 2})
        trainer = make_trainer(
            tmp_path,
            rows.with_format("torch"),
            model=student,
            teacher=teacher,
            processing_class=None,
            sampled_classes=3,
        )
        trainer.train()
        assert trainer.state.global_step == 2


RIVALS = {
    "soft": lambda s, t, y: group_soft_label_loss(s.logits, t.logits, temperature=2.0),
    "ranknet": lambda s, t, y: group_relative_loss(s.logits, t.logits, target_temperature=1.0),
    "dist": lambda s, t, y: dist_loss(s.logits, t.logits),
    "pld": lambda s, t, y: pld_loss(s.logits, t.logits, y),
    "rkd_distance": lambda s, t, y: rkd_distance_loss(s.embeddings, t.embeddings),
    "rkd_angle": lambda s, t, y: rkd_angle_loss(s.embeddings, t.embeddings),
}


class TestRivals:
    @pytest.mark.parametrize("columns", [False, True], ids=["teacher", "columns"])
    @pytest.mark.parametrize("name", RIVALS)
    def test_loss_and_gradients(self, tmp_path, name, columns):
        rows, student, teacher, seen = make_rows(4), make_model(), make_teacher(), Gradients()
        trainer = make_trainer(
            tmp_path,
            with_logits(rows) if columns else rows,
            trainer_class=DistillationForClassificationTrainer,
            model=copy.deepcopy(student),
            teacher=None if columns else teacher,
            loss_func=RIVALS[name],
            callbacks=[seen],
            max_steps=1,
            hard_label_weight=0.5,
            distillation_weight=3.0,
        )
        trainer.train()
        inputs = batch_of(rows)
        outputs = classify(student, inputs)
        hard = F.cross_entropy(outputs.logits, inputs["labels"])
        with torch.no_grad():
            taught = classify(teacher, inputs)
        distillation = RIVALS[name](outputs, taught, inputs["labels"]).mean()
        (0.5 * hard + 3.0 * distillation).backward()
        log = trainer.state.log_history[0]
        assert log["loss/hard"] == pytest.approx(hard.item(), rel=1e-5)
        assert log["loss/distillation"] == pytest.approx(distillation.item(), rel=1e-4)
        assert_same(seen.steps[0], {name: p.grad for name, p in student.named_parameters()}, 1e-5)

    def test_needs_a_loss(self, tmp_path):
        with pytest.raises(TypeError, match="`loss_func` must be a function of student, teacher and labels, got None"):
            make_trainer(tmp_path, trainer_class=DistillationForClassificationTrainer)


WORKER = """
import sys
import torch
from runs import end_process
from runs_of_classifiers import trainer_of_a_launch

trainer = trainer_of_a_launch(sys.argv[1])
trainer.train()
found = trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save((trainer.model.state_dict(), trainer.state.log_history[:2], found), sys.argv[1] + "/found.pt")
trainer.accelerator.wait_for_everyone()
end_process()
"""


@pytest.mark.distributed
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, tmp_path / "worker.py", tmp_path], check=True, env=environment, timeout=300)
    weights, logs, metrics = torch.load(tmp_path / "found.pt", weights_only=False)
    alone = trainer_of_a_launch(tmp_path, per_device_train_batch_size=8)
    alone.train()
    assert_same(weights, alone.model.state_dict(), 1e-4)
    for ours, theirs in zip(logs, alone.state.log_history[:2], strict=True):
        for name in ("loss", "loss/hard", "loss/soft", "loss/relative", "alpha", "rank/agreement"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name, value in alone.evaluate().items():
        if name in ("eval_loss", "eval_accuracy", "eval_macro_f1", "eval_rank/spearman"):
            assert metrics[name] == pytest.approx(value, rel=1e-3), name


class TestEvaluation:
    @pytest.mark.parametrize("weigh", [False, True])
    def test_metrics_are_those_of_all_rows(self, tmp_path, weigh):
        rows, student, teacher = make_rows(13), make_model(), make_teacher()
        trainer = make_trainer(
            tmp_path, model=student, teacher=teacher, eval_dataset=rows, hard_label_weight=0.2,
            per_device_eval_batch_size=4, alpha_start=0.5, weigh_by_doubt=weigh,
        )  # fmt: skip
        found = trainer.evaluate()
        inputs = batch_of(rows)
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits, taught = student.eval()(**inputs).logits, teacher(**inputs).logits
        weights = 1 / taught.softmax(-1).norm(dim=-1) if weigh else torch.ones(13)
        soft, relative = (
            (weights * loss(logits, taught)).mean() for loss in (group_soft_label_loss, group_relative_loss)
        )
        expected = 0.2 * F.cross_entropy(logits, labels) + 0.8 * (0.5 * soft + 0.5 * relative)
        assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert found["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
        agreement = (logits.argmax(-1) == taught.argmax(-1)).float().mean().item()
        assert found["eval_rank/agreement"] == pytest.approx(agreement)
        assert found["eval_rank/spearman"] == pytest.approx(rank_correlation(logits, taught).mean().item(), rel=1e-5)


def test_default_config_is_named_after_the_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = GRKDForClassificationTrainer(make_model(), make_teacher(), train_dataset=make_rows())
    assert trainer.args.output_dir.endswith("-GRKDForClassification")


def test_config_survives_its_own_json(tmp_path):
    args = GRKDForClassificationConfig(
        str(tmp_path), sampled_classes=8, teacher_model_init_kwargs='{"dtype": "float32"}'
    )
    assert args.teacher_model_init_kwargs == {"dtype": "float32"}
    assert json.loads(args.to_json_string())["sampled_classes"] == 8
