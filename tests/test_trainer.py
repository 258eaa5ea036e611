"""The training step of GRKD: equal to a slow restatement of it, and to itself however a batch is split."""

import copy
from itertools import product

import pytest
import reference
import reference_step
import torch
from runs import TOKENIZER, VOCAB, logged, make_rows, make_student, make_teacher, make_trainer, to_ids, train, weights
from transformers import TrainerCallback


SOFT_LABELS, LEVELS = ["token", "group", "none"], ["completions", "tokens"]
NO_PAIR = [-1.0, -1.0, -1.0]


def needs_logits(fields):
    return fields.get("soft_label", "token") == "token" or fields.get("relative_level") == "tokens"


def relative_error(ours, theirs):
    return (ours - theirs).norm() / theirs.norm()


# Of the step in float64. Llama's norms round to float32, and shared prompts reach them in another order.
TOLERANCES = {"off": 1e-9, "on": 1e-6}


def assert_equals_the_loops(folder, rows, fields, tolerance, *, dtype=torch.float64, teacher_vocab=VOCAB, **kwargs):
    """One optimizer step of two micro-batches against `reference_step`."""
    models = {"model": make_student(dtype=dtype), "teacher_model": make_teacher(dtype=dtype, vocab_size=teacher_vocab)}
    student, teacher = (copy.deepcopy(model).double() for model in models.values())
    step = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "alpha_start": 0.3}
    trainer, (gradients,) = train(folder, rows, **models, **step, **fields, **kwargs)

    options = reference_step.Options(vocab_size=min(VOCAB, teacher_vocab), **fields)
    if all("teacher_scores" in row for row in rows) and not needs_logits(fields):
        teacher = None
        assert trainer.teacher_model is None
    loss, expected = reference_step.loss_and_gradients(student, teacher, [to_ids(row) for row in rows], options)
    assert logged(trainer, "loss") == [pytest.approx(loss, rel=max(tolerance, 1e-6))]  # `Trainer` sums it in float32
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < tolerance, name
    assert min(gradient.norm() for gradient in expected.values()) > 1e-6
    return trainer


class TestWholeStep:
    @pytest.mark.parametrize("scores", [True, False], ids=["scores", "no scores"])
    @pytest.mark.parametrize("max_length", [None, 7], ids=["whole", "truncated"])
    @pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (3, 2, 5, 2)], ids=["even", "ragged"])
    @pytest.mark.parametrize("soft_label, level", list(product(SOFT_LABELS, LEVELS)))
    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_loss_and_every_gradient(self, tmp_path, sharing, soft_label, level, sizes, max_length, scores):
        rows = make_rows(sizes=sizes, scores=scores)
        fields = {"soft_label": soft_label, "relative_level": level, "max_length": max_length}
        # Llama's norms round to float32, once for each time that a prompt is read.
        tolerance = 1e-6 if soft_label == "group" or sharing == "on" else 1e-9
        trainer = assert_equals_the_loops(tmp_path, rows, fields, tolerance, prompt_sharing=sharing)
        assert (logged(trainer, "completions/clipped_ratio")[0] > 0) == (max_length is not None)

    @pytest.mark.parametrize("scores", [True, False], ids=["scores", "no scores"])
    @pytest.mark.parametrize(
        "fields",
        [
            {"score": "sum"},
            {"score": "sum", "soft_label": "group", "soft_label_temperature": 20.0, "ranking_temperature": 10.0},
            {"ranking_temperature": 0.1},
            {"sft_weight": 0.7},
            {"sft_weight": 2.0, "score": "sum", "soft_label": "none"},
            {"soft_label_temperature": 3.0},
            {"soft_label": "group", "soft_label_temperature": 0.2},
            {"min_gap": 0.6},
            {"relative_level": "tokens", "relative_top_k": 2},
            {"relative_level": "tokens", "relative_top_k": 64, "min_gap": 0.05, "ranking_temperature": 0.5},
            {"target_temperature": 0.5},
            {"target_temperature": 2.0, "min_gap": 0.6, "soft_label": "none"},
            {"pair_weights": "probability", "standardize": True, "ranking_temperature": 0.5},
            {
                "relative_level": "tokens",
                "target_temperature": 1.5,
                "pair_weights": "probability",
                "standardize": True,
            },
            {"max_length": 7, "truncation_mode": "keep_end"},
            {"max_length": 5, "truncation_mode": "keep_end", "soft_label": "group"},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
    def test_every_field(self, tmp_path, fields, scores):
        assert_equals_the_loops(tmp_path, make_rows(scores=scores), fields, 1e-6)

    @pytest.mark.parametrize("soft_label, level", list(product(SOFT_LABELS, LEVELS)))
    def test_float32(self, tmp_path, soft_label, level):
        fields = {"soft_label": soft_label, "relative_level": level}
        assert_equals_the_loops(tmp_path, make_rows(scores=False), fields, 1e-5, dtype=torch.float32)

    @pytest.mark.parametrize("level", LEVELS)
    def test_teacher_with_a_padded_vocabulary(self, tmp_path, level):
        fields = {"relative_level": level, "relative_top_k": 64}
        for sharing, tolerance in TOLERANCES.items():
            options = {"teacher_vocab": VOCAB + 7, "prompt_sharing": sharing}
            assert_equals_the_loops(tmp_path / sharing, make_rows(scores=False), fields, tolerance, **options)

    @pytest.mark.parametrize("soft_label", SOFT_LABELS)
    def test_with_a_group_without_a_pair(self, tmp_path, soft_label):
        rows = make_rows(sizes=(3,))
        rows[1]["teacher_scores"] = rows[2]["teacher_scores"] = NO_PAIR
        trainer = assert_equals_the_loops(tmp_path, rows, {"soft_label": soft_label}, 1e-6)
        assert logged(trainer, "rank/pairs_per_group")[0] < 2

    def test_gradient_checkpointing(self, tmp_path):
        checkpointing = {"gradient_checkpointing": True}
        for sharing, tolerance in TOLERANCES.items():
            options = checkpointing | {"prompt_sharing": sharing}
            assert_equals_the_loops(tmp_path / sharing, make_rows(), {"soft_label": "token"}, tolerance, **options)


class TestGroupsWithoutAPair:
    def test_no_pair_at_all_is_zero_with_zero_gradient(self, tmp_path):
        rows = [row | {"teacher_scores": NO_PAIR} for row in make_rows(sizes=(3,))]
        trainer, gradients = train(tmp_path, rows, soft_label="none", weight_decay=0.0)
        assert logged(trainer, "loss") == [0.0] and logged(trainer, "grad_norm") == [0.0]
        assert all((gradient == 0).all() for gradient in gradients[0].values())
        assert logged(trainer, "rank/pairs_per_group") == [0.0]
        assert not logged(trainer, "rank/accuracy")  # no pair, so no share of them
        for name, value in weights(make_student()).items():
            assert torch.equal(trainer.model.get_parameter(name), value)

    def test_it_counts_in_the_mean_over_groups(self, tmp_path):
        rows = make_rows(sizes=(3,))
        for row in rows:
            row["teacher_scores"] = [-1.0, -2.0, -3.0]
        alone, _ = train(tmp_path, rows[:2], soft_label="none")
        with_ties, _ = train(
            tmp_path, rows[:2] + [row | {"teacher_scores": NO_PAIR} for row in rows[2:]], soft_label="none"
        )
        assert logged(with_ties, "loss")[0] == pytest.approx(logged(alone, "loss")[0] / 2, rel=1e-6)


SPLITS = [(4, 1), (2, 2), (1, 4)]
OF_THE_SPLIT = ["completions/padding_ratio", "memory/peak_gib"]  # what is no property of the groups


class TestBatchSplit:
    @pytest.mark.parametrize(
        "soft_label, level", [("token", "completions"), ("group", "completions"), ("none", "tokens")]
    )
    def test_changes_nothing(self, tmp_path, soft_label, level):
        """Ten groups of unequal size in steps of four: the last step is of two, and one group has no pair."""
        rows = make_rows(10)
        rows[5]["teacher_scores"] = [-1.0, -1.0]
        runs = []
        for batch, accumulation in SPLITS:
            fields = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            trainer, gradients = train(tmp_path, rows, soft_label=soft_label, relative_level=level, **fields)
            assert trainer.state.global_step == 3
            runs.append((trainer, gradients))
        (first, first_gradients), *others = runs
        for trainer, gradients in others:
            for name in first.state.log_history[0]:
                if name not in ("epoch", "step", "learning_rate", *OF_THE_SPLIT):
                    assert logged(trainer, name) == pytest.approx(logged(first, name), rel=1e-6, abs=1e-6), name
            for ours, theirs in zip(gradients, first_gradients, strict=True):
                assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-6
            for name, value in weights(first.model).items():
                torch.testing.assert_close(trainer.model.get_parameter(name), value, rtol=0, atol=1e-6)
        moved = [
            (value - make_student().get_parameter(name)).abs().max() for name, value in weights(first.model).items()
        ]
        assert min(moved) > 1e-3  # that the weights compared are those of a run


class TestAlpha:
    @pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
    def test_moves_by_optimizer_steps(self, tmp_path, schedule):
        """The weights stand still, so the loss of each step is a mean of the same two parts."""
        rows = make_rows(4) * 5
        fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
        ends = {"alpha_start": 0.2, "alpha_end": 0.9, "alpha_schedule": schedule}
        trainer, _ = train(tmp_path, rows, **fields, **ends)
        expected = [reference.alpha(step / 5, 0.2, 0.9, schedule) for step in range(5)]
        assert logged(trainer, "alpha") == pytest.approx(expected, abs=1e-12)
        relative, soft = logged(trainer, "loss/relative"), logged(trainer, "loss/soft")
        assert relative == pytest.approx([relative[0]] * 5) and soft == pytest.approx([soft[0]] * 5)
        losses = [a * relative[0] + (1 - a) * soft[0] for a in expected]
        assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
        assert abs(relative[0] - soft[0]) > 0.1

    def test_is_one_without_soft_labels(self, tmp_path):
        trainer, _ = train(tmp_path, soft_label="none", alpha_start=0.1, alpha_end=0.2)
        assert logged(trainer, "alpha") == [1.0]
        assert logged(trainer, "loss") == pytest.approx(logged(trainer, "loss/relative"))


class Watch(TrainerCallback):
    """What the teacher's forward runs under."""

    def __init__(self, teacher):
        self.seen = []
        teacher.register_forward_pre_hook(
            lambda module, _: self.seen.append((module.training, torch.is_grad_enabled()))
        )


class TestTeacher:
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_is_frozen_and_bit_identical(self, tmp_path, mode):
        teacher = getattr(make_teacher(attention_dropout=0.5), mode)()
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        watch = Watch(teacher)
        trainer, _ = train(tmp_path, make_rows(scores=False), teacher_model=teacher, num_train_epochs=3)
        assert watch.seen == [(False, False)] * (3 + 3)  # three where packed rows are compared with plain ones
        assert trainer.teacher_model is teacher and not teacher.training
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    def test_is_not_in_the_checkpoint(self, tmp_path):
        trainer, _ = train(tmp_path, make_rows(scores=False), save_strategy="steps", save_steps=1, save_total_limit=1)
        trainer.save_model()
        student_bytes = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        for folder in (tmp_path, tmp_path / "checkpoint-1"):
            (saved,) = folder.glob("*.safetensors")
            assert saved.stat().st_size < 1.1 * student_bytes + 10_000
            reloaded = type(trainer.model).from_pretrained(folder, dtype=torch.float64)
            for name, value in trainer.model.state_dict().items():
                assert torch.equal(reloaded.state_dict()[name], value), name
        names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert not [name for name in names if "teacher" in name]
        optimizer = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt")
        assert len(optimizer["state"]) == len(list(trainer.model.parameters()))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_from_a_folder(self, tmp_path, dtype):
        teacher = make_teacher(dtype=getattr(torch, dtype))
        teacher.save_pretrained(tmp_path / "teacher")
        TOKENIZER.save_pretrained(tmp_path / "teacher")
        kwargs = {"teacher_model_init_kwargs": {"dtype": dtype}}
        loaded, _ = train(tmp_path / "a", make_rows(scores=False), teacher_model=str(tmp_path / "teacher"), **kwargs)
        given, _ = train(tmp_path / "b", make_rows(scores=False), teacher_model=teacher)
        assert loaded.teacher_model.dtype == getattr(torch, dtype)
        assert logged(loaded, "loss") == logged(given, "loss")
        assert logged(loaded, "scores/teacher") == logged(given, "scores/teacher")

    @pytest.mark.parametrize("fields", [{"soft_label": "group"}, {"soft_label": "none"}])
    def test_is_not_loaded_where_rows_have_scores(self, tmp_path, fields):
        trainer, _ = train(tmp_path, make_rows(), teacher_model=str(tmp_path / "nowhere"), **fields)
        assert trainer.teacher_model is None
        assert trainer.state.global_step == 1

    def test_scores_of_the_rows_come_before_those_of_the_teacher(self, tmp_path):
        rows = make_rows()
        trainer, _ = train(tmp_path, rows)
        scores = [score for row in rows for score in row["teacher_scores"]]
        assert logged(trainer, "scores/teacher") == [pytest.approx(sum(scores) / len(scores))]


class TestDropout:
    def test_is_off_in_the_student(self, tmp_path):
        losses = [logged(train(tmp_path, model=make_student(attention_dropout=p))[0], "loss") for p in (0.0, 0.7)]
        assert losses[0] == losses[1]

    def test_can_be_left_on(self, tmp_path):
        models = {"model": make_student(attention_dropout=0.7), "disable_dropout": False}
        assert logged(train(tmp_path, **models)[0], "loss") != logged(train(tmp_path)[0], "loss")


class TestPreferences:
    """TRL's own rows are groups of two."""

    @staticmethod
    def as_groups(rows):
        scores = [[row.get("score_chosen", 1.0), row.get("score_rejected", 0.0)] for row in rows]
        return [
            {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "teacher_scores": score}
            for row, score in zip(rows, scores, strict=True)
        ]

    @staticmethod
    def rows(**scores):
        return [
            {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]} | scores
            for row in make_rows(sizes=(2,))
        ]

    @pytest.mark.parametrize("scores", [{}, {"score_chosen": 2.0, "score_rejected": 7.0}], ids=str)
    @pytest.mark.parametrize("soft_label", SOFT_LABELS)
    def test_equal_groups_of_two(self, tmp_path, soft_label, scores):
        rows = self.rows(**scores)
        options = reference_step.Options(vocab_size=VOCAB, soft_label=soft_label)
        groups = [to_ids(row) for row in self.as_groups(rows)]
        loss, expected = reference_step.loss_and_gradients(make_student(), make_teacher(), groups, options)
        trainer, (gradients,) = train(tmp_path, rows, soft_label=soft_label, alpha_start=0.3)
        assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-6)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-6
        assert logged(trainer, "rank/pairs_per_group") == [1.0]

    def test_without_soft_labels_no_teacher_is_needed(self, tmp_path):
        trainer, _ = train(tmp_path, self.rows(), teacher_model=None, soft_label="none")
        assert trainer.teacher_model is None and logged(trainer, "loss")[0] > 0

    def test_implicit_prompt_in_messages(self, tmp_path):
        tokenizer = type(TOKENIZER).from_pretrained(self.save(tmp_path))
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %} {% endfor %}"
        )
        turns = [
            {
                "chosen": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"]},
                ],
                "rejected": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["rejected"]},
                ],
            }
            for row in self.rows()
        ]
        in_messages, _ = train(tmp_path, turns, processing_class=tokenizer)
        in_text, _ = train(tmp_path, self.rows())
        assert logged(in_messages, "loss") == logged(in_text, "loss")

    @staticmethod
    def save(folder):
        TOKENIZER.save_pretrained(folder / "tokenizer")
        return folder / "tokenizer"


class TestMixtureOfExperts:
    EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}

    def student(self):
        return make_student("mixtral", dtype=torch.float32, **self.EXPERTS)  # experts know no float64

    @pytest.mark.parametrize("batch, accumulation", [(4, 1), (2, 2)])
    def test_balancing_loss_is_added_once(self, tmp_path, batch, accumulation):
        rows = make_rows()
        groups = [to_ids(row) for row in rows]
        options = reference_step.Options(vocab_size=VOCAB)
        student = self.student()
        loss = reference_step.loss_of(student, make_teacher(), groups, options)
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, rows)
        for start in range(0, 4, batch):  # the balance of a micro-batch is that of its rows together
            inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(start, start + batch)])
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            loss = loss + 0.5 / accumulation * student(**ids, output_router_logits=True).aux_loss
        loss.backward()
        trainer, (gradients,) = train(tmp_path, rows, model=self.student(), alpha_start=0.3, **split)
        assert trainer.aux_loss_enabled
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
        for name, parameter in student.named_parameters():
            assert relative_error(gradients[name], parameter.grad) < 1e-5, name

    def test_can_be_turned_off(self, tmp_path):
        trainer, _ = train(tmp_path, model=self.student(), router_aux_loss_coef=0.0, alpha_start=0.3)
        groups, options = [to_ids(row) for row in make_rows()], reference_step.Options(vocab_size=VOCAB)
        loss = reference_step.loss_of(self.student(), make_teacher(), groups, options)
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]


ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4},
    "gemma3": {},
    "mistral": {},
    "mixtral": TestMixtureOfExperts.EXPERTS,
}


class TestEveryParameter:
    @pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_moves_and_is_finite(self, tmp_path, architecture, bf16):
        models = {
            "model": make_student(architecture, dtype=torch.float32, **ARCHITECTURES[architecture]),
            "teacher_model": make_teacher(dtype=torch.float32),
        }
        before = weights(models["model"])
        fields = {"bf16": bf16, "gradient_checkpointing": bf16, "num_train_epochs": 2}
        trainer, gradients = train(tmp_path, make_rows(scores=False), **models, **fields)
        for name, value in weights(trainer.model).items():
            assert value.isfinite().all(), name
            assert not torch.equal(value, before[name]), name
            assert all(step[name].isfinite().all() and step[name].any() for step in gradients), name
