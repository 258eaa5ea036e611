"""The rivals' trainers: each step equal to a slow restatement, to TRL's own where it has one, and to itself."""

import inspect
import random

import pytest
import reference_rivals as slow
import torch
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from runs import (
    METHODS,
    OTHERS,
    PAIRS,
    RANKED,
    TOKENIZER,
    VOCAB,
    logged,
    make_rows,
    make_student,
    make_teacher,
    make_trainer,
    to_ids,
    train,
    weights,
)
from transformers import HfArgumentParser

import grkd_trl
from grkd_trl.generation.core import draw_seed
from grkd_trl.scoring import check_packed_rows_on_all_ranks
from grkd_trl.teacher import LocalTeacher


LOSSES = {method: getattr(slow, method.lower()) for method in [*RANKED, *OTHERS]}
each_method = pytest.mark.parametrize("method", LOSSES)
each_trainer = pytest.mark.parametrize("method", [*LOSSES, "MiniLLM"])  # whose samples test_minillm.py looks into


def rows_for(method, num=4, **kwargs):
    """Groups that the method takes, without ties; those of SeqKD say that the teacher wrote them."""
    rows = make_rows(num, **kwargs)
    for index, row in enumerate(rows):
        scores = [-3.0, -1.5, -1.0, -0.25, -2.25]
        row["teacher_scores"] = random.Random(index).sample(scores, len(row["completions"]))
    if method == "SeqKD":
        rows = [row | {"written_by": ["teacher"] * len(row["completions"])} for row in rows]
    return rows


def relative_error(ours, theirs):
    return (ours - theirs).norm() / theirs.norm()


def assert_equals_the_loops(method, folder, rows, tolerance=1e-6, *, batch=2, **fields):
    """One optimizer step of two micro-batches against `reference_rivals`; norms of the models are in float32."""
    step = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}
    trainer, (gradients,) = train(folder, rows, method=method, **step, **fields)
    teacher = fields.pop("teacher_model", None) or make_teacher()
    options = slow.Options(vocab_size=VOCAB, max_length=fields.pop("max_length", 1024))
    if method == "DPO":
        fields["reference"] = make_student()
    loss, expected = slow.loss_and_gradients(
        LOSSES[method], make_student(), teacher, [to_ids(row) for row in rows], options, **fields
    )
    assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-6)]
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < tolerance, name
    assert min(gradient.norm() for gradient in expected.values()) > 1e-6
    return trainer


class TestWholeStep:
    @pytest.mark.parametrize("max_length", [1024, 7], ids=["whole", "truncated"])
    @pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (3, 2, 5, 2)], ids=["even", "ragged"])
    @each_method
    def test_loss_and_every_gradient(self, tmp_path, method, sizes, max_length):
        assert_equals_the_loops(method, tmp_path, rows_for(method, sizes=sizes), max_length=max_length)

    @pytest.mark.parametrize(
        "method, fields",
        [
            ("DPO", {"beta": 0.5}),
            ("SimPO", {"beta": 10.0, "gamma_beta_ratio": 0.3}),
            ("SimPO", {"beta": 10.0, "simpo_gamma": 0.7, "label_smoothing": 0.2}),
            ("SimPO", {"alpha": 0.25, "cpo_alpha": 0.5}),
            ("SimPO", {"alpha": -0.5, "pairs": "all", "cpo_alpha": 1.0, "batch": 11}),
            ("PRO", {"reward_temperature": False}),
            ("PRO", {"sft_weight": 0.0}),
            ("RankNet", {"temperature": 0.5}),
            ("KD", {"temperature": 3.0}),
            ("KD", {"hard_label_weight": 0.3, "temperature": 0.7}),
        ],
        ids=str,
    )
    def test_every_field(self, tmp_path, method, fields):
        assert_equals_the_loops(method, tmp_path, rows_for(method), **fields)

    @pytest.mark.parametrize("method", PAIRS)
    def test_all_pairs(self, tmp_path, method):
        """Each pair is a row, so a step of as many rows as there are pairs sees every group."""
        rows = make_rows(sizes=(3,), num=2)
        for row in rows:
            row["teacher_scores"] = [-1.0, -3.0, -2.0]
        trainer = assert_equals_the_loops(method, tmp_path, rows, pairs="all", batch=3)
        assert len(trainer.train_dataset) == 6

    @pytest.mark.parametrize("method", RANKED)
    def test_teacher_scores_where_the_groups_do_not(self, tmp_path, method):
        teacher = make_teacher()
        before = weights(teacher)
        rows = make_rows(scores=False)
        trainer = assert_equals_the_loops(method, tmp_path, rows, teacher_model=teacher)
        assert getattr(trainer, "teacher_model", None) is None  # freed
        assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())

    def test_teacher_of_another_vocabulary_size(self, tmp_path):
        assert_equals_the_loops("KD", tmp_path, make_rows(), teacher_model=make_teacher(vocab_size=VOCAB + 7))

    @pytest.mark.parametrize("method", [method for method in METHODS if method != "GRKD"])
    def test_preferences_are_groups_of_two(self, tmp_path, method):
        """And prompts to the methods whose text is written anew."""
        groups = [row | {"teacher_scores": [1.0, 0.0]} for row in make_rows(sizes=(2,))]
        names = ("prompt", "chosen", "rejected")
        preferences = [dict(zip(names, (row["prompt"], *row["completions"]), strict=True)) for row in groups]
        length = {"max_completion_length": 5} if method in ("SeqKD", "MiniLLM") else {}
        (first, gradients), (second, others) = (
            train(tmp_path, rows, method=method, **length) for rows in (groups, preferences)
        )
        assert logged(first, "loss") == logged(second, "loss")
        assert all(torch.equal(gradient, others[0][name]) for name, gradient in gradients[0].items())


class TestInvariance:
    @each_method
    def test_splitting_the_batch_changes_nothing(self, tmp_path, method):
        """Ten groups of unequal size in steps of four; the last step is of two."""
        runs = []
        for batch, accumulation in [(4, 1), (1, 4)]:
            split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            runs.append(train(tmp_path, rows_for(method, 10), method=method, **split))
        (whole, whole_gradients), (parts, parts_gradients) = runs
        assert whole.state.global_step == parts.state.global_step == 3
        assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
        for ours, theirs in zip(parts_gradients, whole_gradients, strict=True):
            assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-6
        for name in ("rank/accuracy", "scores/student", "completions/mean_length"):
            assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-9)
        moved = [
            (value - make_student().get_parameter(name)).abs().max() for name, value in weights(whole.model).items()
        ]
        assert min(moved) > 1e-4

    @each_trainer
    def test_resuming_equals_going_on(self, tmp_path, method):
        rows, fields = rows_for(method, 12), {"method": method, "train_sampling_strategy": "random"}
        whole, _ = train(tmp_path / "whole", rows, **fields)
        stopped = make_trainer(tmp_path / "parts", rows, save_strategy="steps", save_steps=2, **fields)
        stopped.train()
        resumed = make_trainer(tmp_path / "parts", rows, **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        assert resumed.state.global_step == 3
        assert logged(resumed, "loss")[-1] == pytest.approx(logged(whole, "loss")[-1], rel=1e-9)
        for name, value in weights(whole.model).items():
            torch.testing.assert_close(resumed.model.get_parameter(name), value, rtol=0, atol=1e-12)

    @each_trainer
    def test_lora_trains_the_adapter_alone(self, tmp_path, method):
        model, before = make_student(), weights(make_student())
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        kwargs = {"ref_model": None} if method == "DPO" else {}
        trainer, _ = train(tmp_path, rows_for(method), method=method, model=model, peft_config=lora, **kwargs)
        assert trainer.model.peft_config
        for name, value in trainer.model.named_parameters():
            if "lora" in name:
                assert value.requires_grad and value.isfinite().all()
            else:
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                assert torch.equal(value, before[plain]) and not value.requires_grad
        trainer.save_model()
        assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()

    @each_trainer
    def test_every_parameter_moves_in_bf16_too(self, tmp_path, method):
        models = {"model": make_student(dtype=torch.float32), "teacher_model": make_teacher(dtype=torch.float32)}
        if method == "DPO":
            models["ref_model"] = make_student(dtype=torch.float32)
        before = weights(models["model"])
        fields = {"bf16": True, "gradient_checkpointing": True, "num_train_epochs": 2}
        trainer, gradients = train(tmp_path, rows_for(method), method=method, **models, **fields)
        for name, value in weights(trainer.model).items():
            assert value.isfinite().all() and not torch.equal(value, before[name]), name
            assert all(step[name].isfinite().all() for step in gradients), name

    @pytest.mark.parametrize("method", ["KD", "MiniLLM"])
    def test_teacher_is_untouched(self, tmp_path, method):
        teacher = make_teacher(attention_dropout=0.5).train()
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        trainer, _ = train(tmp_path, method=method, teacher_model=teacher, num_train_epochs=3)
        assert trainer.teacher_model is teacher and not teacher.training
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class TestEvaluation:
    @each_method
    def test_loss_is_that_of_the_groups_however_batched(self, tmp_path, method):
        rows, found = rows_for(method, 5, sizes=(3, 2, 4)), []
        for batch in (1, 4):
            datasets = {"held_out": Dataset.from_list(rows)}
            trainer = make_trainer(
                tmp_path, rows_for(method), method=method, eval_dataset=datasets, per_device_eval_batch_size=batch
            )
            found.append(trainer.evaluate())
        fields = {"reference": make_student()} if method == "DPO" else {}
        options, groups = slow.Options(vocab_size=VOCAB, max_length=1024), [to_ids(row) for row in rows]
        with torch.no_grad():
            expected = LOSSES[method](make_student(), make_teacher(), groups, options, **fields)
        for metrics in found:
            assert metrics["eval_held_out_loss"] == pytest.approx(expected.item(), rel=1e-6)
        if method != "DPO":
            for name in [name for name in found[0] if "/" in name and "padding" not in name]:
                assert found[0][name] == pytest.approx(found[1][name], rel=1e-9), name

    @pytest.mark.parametrize("method", [method for method in METHODS if method not in ("GRKD", "DPO")])
    def test_metrics_of_the_user(self, tmp_path, method):
        seen = []

        def compute_metrics(prediction):
            seen.append(prediction)
            return {"shape": prediction.predictions.shape[0]}

        rows = rows_for(method)
        trainer = make_trainer(
            tmp_path, rows, method=method, eval_dataset=Dataset.from_list(rows), compute_metrics=compute_metrics
        )
        has_labels = method != "SeqKD"  # which has no scores of the teacher
        metrics = trainer.evaluate()
        assert bool(seen) == has_labels
        if has_labels:
            assert metrics["eval_shape"] == 4 and seen[0].label_ids.shape == seen[0].predictions.shape


class TestForwards:
    """Forwards a completion, as README's table of methods has them."""

    COUNTS = {method: (1, method in ("GRKD", "DPO", "KD")) for method in METHODS if method != "MiniLLM"}  # + other

    @pytest.mark.parametrize("method", COUNTS)
    def test_count(self, tmp_path, method):
        rows = rows_for(method, 8, sizes=(2,))
        for row in rows:
            row["teacher_scores"] = [-1.0, -2.0]
        counts = {"student": 0, "other": 0}
        other = "ref_model" if method == "DPO" else "teacher_model"
        models = {"model": make_student(), other: make_student(seed=2)}
        for name, model in zip(counts, models.values(), strict=True):

            def count(module, args, kwargs, name=name):
                counts[name] += len(kwargs["input_ids"])

            model.register_forward_pre_hook(count, with_kwargs=True)
        fields = {} if method == "DPO" else {"prompt_sharing": "off"}  # or rows would not be rows
        train(tmp_path, rows, method=method, **models, **fields)
        assert counts == {name: 16 * each for name, each in zip(counts, self.COUNTS[method], strict=True)}

    def test_minillm_reads_what_it_wrote_once_more(self, tmp_path):
        counts = {"student": [], "teacher": []}
        models = {"model": make_student(), "teacher_model": make_teacher()}
        for name, model in zip(counts, models.values(), strict=True):

            def count(module, args, kwargs, name=name):
                counts[name].append(kwargs.get("use_cache"))

            check_packed_rows_on_all_ranks(model, model.device)  # else made before the first batch
            model.register_forward_pre_hook(count, with_kwargs=True)
        train(tmp_path, method="MiniLLM", **models)
        for seen in counts.values():
            assert seen.count(False) == 1 and 1 <= seen.count(True) <= 5  # the step, and a token each

    @pytest.mark.parametrize("method", RANKED)
    def test_scoring_before_training_is_one_forward_more(self, tmp_path, method):
        count, teacher, rows = [], make_teacher(), make_rows(sizes=(2,), scores=False)
        check_packed_rows_on_all_ranks(teacher, teacher.device)
        teacher.lm_head.register_forward_hook(lambda _, __, logits: count.append(logits.shape[:-1].numel()))
        train(tmp_path, rows, method=method, teacher_model=teacher, num_train_epochs=3)
        assert sum(count) == sum(len(ids) for row in rows for ids in to_ids(row)["completion_ids"])


class TestSeqKD:
    PROMPTS = [{"prompt": row["prompt"]} for row in make_rows(4)]

    @pytest.mark.parametrize("decoding", ["greedy", "beam", "sampling"])
    def test_teacher_writes(self, tmp_path, decoding):
        teacher = make_teacher()
        fields = {"method": "SeqKD", "decoding": decoding, "num_beams": 3, "max_completion_length": 5}
        trainer, _ = train(tmp_path, self.PROMPTS, teacher_model=teacher, **fields)
        again = make_trainer(tmp_path, self.PROMPTS, **fields)
        assert again.train_dataset["completion_ids"] == trainer.train_dataset["completion_ids"]
        if decoding == "sampling":  # a row's index decides its draws, and no process
            seeds = [draw_seed(42, 0, "teacher") + index for index in range(4)]
            prompts = [row["prompt"] for row in self.PROMPTS]
            drawn = LocalTeacher(teacher, TOKENIZER).generate(prompts, 1, seed=seeds, max_new_tokens=5)
            assert trainer.train_dataset["completion_ids"][:] == drawn.completion_ids
            return
        for row in trainer.train_dataset:
            written = teacher.generate(
                torch.tensor([row["prompt_ids"]]),
                max_new_tokens=5,
                do_sample=False,
                num_beams=3 if decoding == "beam" else 1,
            )[0, len(row["prompt_ids"]) :].tolist()
            ended = 1 in written
            written = written[: written.index(1) + 1] if ended else written
            assert row["completion_ids"] == [written]  # every token that it wrote
            assert row["clipped"] == [not ended]

    def test_takes_what_the_teacher_wrote_alone(self, tmp_path):
        rows = make_rows(sizes=(3,))
        for row in rows:
            row["written_by"] = ["student", "teacher", "student"]
        rows[0]["written_by"] = ["student"] * 3
        trainer = make_trainer(tmp_path, rows, method="SeqKD", teacher_model=None)
        assert len(trainer.train_dataset) == 3
        ids = [to_ids(row)["completion_ids"][1:2] for row in rows[1:]]
        assert trainer.train_dataset["completion_ids"][:] == ids


class TestInterface:
    @pytest.mark.parametrize("method", METHODS)
    def test_constructor_is_that_of_trls_dpo_with_a_teacher_for_the_reference(self, method):
        ours = inspect.signature(getattr(grkd_trl, f"{method}Trainer").__init__).parameters
        theirs = inspect.signature(trl.DPOTrainer.__init__).parameters
        reference = "ref_model" if method == "DPO" else "teacher_model"  # a script of TRL's DPO runs as it is
        theirs = {name.replace("ref_model", reference): parameter.default for name, parameter in theirs.items()}
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [ours[name].default for name in theirs] == list(theirs.values())
        extra = {"DPO": {"teacher_model"}, "MiniLLM": {"text_dataset"}, "GRKD": {"completion_fn", "score_fn"}}
        assert set(ours) - set(theirs) == extra.get(method, set())

    @each_trainer
    def test_command_line(self, tmp_path, method):
        config_class = getattr(grkd_trl, f"{method}Config")
        own = [name for name in config_class.__annotations__ if name != "_VALID_DICT_FIELDS"]
        documented = config_class.__doc__
        assert [name for name in own if f"{name} (" not in documented and name != "learning_rate"] == []
        given = ["--output_dir", str(tmp_path), "--bf16", "false"]
        given += ["--teacher_model_init_kwargs", '{"dtype": "bfloat16"}']
        (args,) = HfArgumentParser(config_class).parse_args_into_dataclasses(given)
        assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
        assert args.learning_rate == 1e-6

    def test_defaults_are_the_papers(self, tmp_path):
        simpo, pro = (config(tmp_path, bf16=False) for config in (grkd_trl.SimPOConfig, grkd_trl.PROConfig))
        assert (simpo.beta, simpo.gamma_beta_ratio) == (2.0, 0.25)
        assert (pro.sft_weight, pro.reward_temperature) == (0.05, True)

    @each_trainer
    def test_card_says_what_was_minimised(self, tmp_path, method):
        trainer = make_trainer(tmp_path, rows_for(method), method=method)
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert trainer.equation in card and trainer._paper["citation"].split("\n")[0] in card
        for name in getattr(grkd_trl, f"{method}Config").__annotations__:
            assert (f"| `{name}` |" in card) == (getattr(trainer.args, name) is not None)

    @each_trainer
    def test_evaluation_datasets_by_name(self, tmp_path, method):
        rows = rows_for(method)
        datasets = DatasetDict(a=Dataset.from_list(rows), b=Dataset.from_list(rows[:2]))
        trainer = make_trainer(tmp_path, rows, method=method, eval_dataset=datasets)
        metrics = trainer.evaluate()
        assert {"eval_a_loss", "eval_b_loss"} <= set(metrics)
