"""A teacher that reads a prompt of its own: the same completions, after other context."""

import copy

import pytest
import reference_rivals
import reference_step
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs import (
    TOKENIZER,
    VOCAB,
    logged,
    make_rows,
    make_student,
    make_teacher,
    make_trainer,
    shown_rows,
    to_ids,
    train,
    weights,
)
from teacher_server import serve
from tiny import WORDS, tiny_tokenizer

from grkd_trl.data import tokenize_group
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import (
    CalibratedTeacher,
    CallableScorer,
    LocalTeacher,
    ServerTeacher,
    cache_soft_labels,
    selection_probs,
)


STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "alpha_start": 0.3}

KEEP_END = {"max_length": 6, "truncation_mode": "keep_end"}
CUTS = [
    pytest.param({}, id="whole"),
    pytest.param({"max_length": 7}, id="keep_start"),
    pytest.param(KEEP_END, id="keep_end", marks=pytest.mark.slow),
]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_step(trainer, gradients, loss, expected, tolerance):
    assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-6)]
    assert set(gradients) == set(expected)
    assert max(relative_error(gradients[name], expected[name]) for name in expected) < tolerance


class TestWholeStep:
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize(
        "soft_label, level",
        [("token", "completions"), ("group", "completions"), ("none", "completions"), ("token", "tokens")],
    )
    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_grkd(self, tmp_path, sharing, soft_label, level, cut):
        rows, fields = shown_rows(), {"soft_label": soft_label, "relative_level": level, **cut}
        options = reference_step.Options(vocab_size=VOCAB, **fields)
        groups = [to_ids(row) for row in rows]
        loss, expected = reference_step.loss_and_gradients(make_student(), make_teacher(), groups, options)
        trainer, (gradients,) = train(tmp_path, rows, prompt_sharing=sharing, **STEP, **fields)
        assert_step(trainer, gradients, loss, expected, 1e-6)
        plain = [{key: value for key, value in group.items() if key != "teacher_prompt_ids"} for group in groups]
        assert abs(reference_step.loss_of(make_student(), make_teacher(), plain, options).item() - loss) > 1e-3

    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_experts(self, tmp_path, sharing):
        models = [make_student("mixtral", dtype=torch.float32, seed=seed, **EXPERTS) for seed in (0, 1)]
        groups, options = [to_ids(row) for row in shown_rows()], reference_step.Options(vocab_size=VOCAB)
        loss, expected = reference_step.loss_and_gradients(*map(copy.deepcopy, models), groups, options)
        given = {"model": models[0], "teacher_model": models[1], "router_aux_loss_coef": 0.0}
        trainer, (gradients,) = train(tmp_path, shown_rows(), prompt_sharing=sharing, **given, **STEP)
        assert_step(trainer, gradients, loss, expected, 1e-4)

    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_kd(self, tmp_path, sharing):
        rows, options = shown_rows(), reference_step.Options(vocab_size=VOCAB)
        given = (make_student(), make_teacher(), [to_ids(row) for row in rows], options)
        loss, expected = reference_rivals.loss_and_gradients(reference_rivals.kd, *given, temperature=2.0)
        fields = {"prompt_sharing": sharing, "temperature": 2.0, "per_device_train_batch_size": 2}
        trainer, (gradients,) = train(tmp_path, rows, method="KD", gradient_accumulation_steps=2, **fields)
        assert_step(trainer, gradients, loss, expected, 1e-6)

    @pytest.mark.parametrize("method", ["SimPO", "PRO", "RankNet", "DPO"])
    def test_scores_before_training(self, tmp_path, method):
        """Methods without a teacher in the step learn from its scores after its own prompts."""
        rows = shown_rows()
        trainer, (gradients,) = train(tmp_path, rows, method=method)
        rows = [row | {"teacher_scores": scores} for row, scores in zip(rows, slow_scores(rows), strict=True)]
        rows = [{name: value for name, value in row.items() if name != "teacher_prompt"} for row in rows]
        scored, (expected,) = train(tmp_path, rows, method=method, teacher_model=None)
        assert logged(trainer, "loss") == [pytest.approx(logged(scored, "loss")[0], rel=1e-6)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-6
        assert "teacher_prompt_ids" not in trainer.train_dataset.column_names

    def test_a_stream_is_the_same(self, tmp_path):
        rows, fields = shown_rows(), {"max_steps": 1, **STEP}
        whole, (expected,) = train(tmp_path, rows, **fields)
        trainer, (gradients,) = train(tmp_path, train_dataset=Dataset.from_list(rows).to_iterable_dataset(), **fields)
        assert logged(trainer, "loss") == logged(whole, "loss")
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)

    def test_resume_equals_uninterrupted(self, tmp_path):
        fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
        whole, _ = train(tmp_path / "whole", shown_rows(), **fields)
        resumed = make_trainer(tmp_path / "resumed", shown_rows(), **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(resumed.model).items())

    def test_evaluation_reads_it(self, tmp_path):
        rows = shown_rows()
        trainer = make_trainer(tmp_path, rows, eval_dataset=Dataset.from_list(rows))
        options = reference_step.Options(vocab_size=VOCAB, alpha=trainer.alpha)
        loss = reference_step.loss_of(make_student(), make_teacher(), [to_ids(row) for row in rows], options)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


class TestSelfDistillation:
    """The teacher is the student's start, shown more: its adapters off, or a frozen copy."""

    @pytest.mark.parametrize("method", ["GRKD", "KD"])
    def test_base_of_the_adapters(self, tmp_path, method):
        base = make_student()
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        student = get_peft_model(copy.deepcopy(base), adapters)
        slow, groups = copy.deepcopy(student), [to_ids(row) for row in shown_rows()]
        fields = {"alpha_start": 0.3} if method == "GRKD" else {}
        trainer, (gradients,) = train(
            tmp_path, shown_rows(), method=method, model=student, teacher_model=student.get_base_model(), **fields
        )
        assert trainer.teacher_model is trainer.model
        options = reference_step.Options(vocab_size=VOCAB)
        if method == "GRKD":
            loss, expected = reference_step.loss_and_gradients(slow, base, groups, options)
        else:
            loss, expected = reference_rivals.loss_and_gradients(reference_rivals.kd, slow, base, groups, options)
        assert_step(trainer, gradients, loss, expected, 1e-6)

    def test_frozen_copy(self, tmp_path):
        """Without a prompt of its own the copy teaches nothing; with one it does."""
        plain = [row | {"teacher_prompt": None} for row in make_rows(scores=False)]
        same, (zero,) = train(tmp_path, plain, method="KD", teacher_model=make_student)
        shown, (gradients,) = train(tmp_path, shown_rows(), method="KD", teacher_model=make_student)
        assert max(gradient.norm() for gradient in zero.values()) < 1e-9
        assert min(gradient.norm() for gradient in gradients.values()) > 1e-6


def slow_scores(rows, model=None):
    """The teacher's mean log-probabilities, one forward a completion."""
    model, groups = model or make_teacher(), [to_ids(row) for row in rows]
    options = reference_step.Options(vocab_size=VOCAB)
    with torch.no_grad():
        return [
            [reference_step.read_as_teacher(model, group, ids, options)[0].item() for ids in group["completion_ids"]]
            for group in groups
        ]


class TestScoring:
    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_local_teacher(self, sharing):
        rows = shown_rows()
        teacher = LocalTeacher(make_teacher(), TOKENIZER, prompt_sharing=sharing)
        columns = {"teacher_prompt": [row["teacher_prompt"] for row in rows]}
        scores = teacher.score(*([row[name] for row in rows] for name in ("prompt", "completions")), columns=columns)
        for ours, expected in zip(scores.scores, slow_scores(rows), strict=True):
            assert ours == pytest.approx(expected, rel=1e-6)

    def test_server(self, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        rows, model = shown_rows(), make_teacher(dtype=torch.float32)
        with serve(model, TOKENIZER) as server:
            url = f"http://127.0.0.1:{server.server_address[1]}/v1"
            teacher = ServerTeacher(url, "tiny", TOKENIZER, server="vllm", context_length=64)
            columns = {"teacher_prompt": [row["teacher_prompt"] for row in rows]}
            texts = ([row[name] for row in rows] for name in ("prompt", "completions"))
            scores = teacher.score(*texts, columns=columns)
        for ours, expected in zip(scores.scores, slow_scores(rows, model), strict=True):
            assert ours == pytest.approx(expected, abs=1e-4)

    def test_calibration_asks_with_it(self):
        tokenizer = tiny_tokenizer([*WORDS, "A", "B"])
        rows = shown_rows()
        teacher = LocalTeacher(make_teacher(vocab_size=len(tokenizer)), tokenizer)
        given = {"template": "{prompt} a {first} b {second}"}
        columns = {"teacher_prompt": [row["teacher_prompt"] for row in rows]}
        scores = CalibratedTeacher(teacher, **given).score(
            [row["prompt"] for row in rows], [row["completions"] for row in rows], columns=columns
        )
        for row, ours in zip(rows, scores.scores, strict=True):
            asked = row["teacher_prompt"] or row["prompt"]
            chances = selection_probs(teacher.model, tokenizer, asked, row["completions"], **given)
            assert ours == pytest.approx(torch.tensor(chances).log().tolist(), rel=1e-4)

    @pytest.mark.parametrize("source", ["dataset", "student", "teacher"])
    def test_groups_keep_it_and_are_scored_with_it(self, tmp_path, source):
        rows = shown_rows()
        dataset = (
            Dataset.from_list(rows) if source == "dataset" else Dataset.from_list(rows).remove_columns("completions")
        )
        config = {"num_completions": 3, "num_drawn": 3, "max_completion_length": 6, "completion_source": source}
        teacher = LocalTeacher(make_teacher(), TOKENIZER)
        roles = {"student": LocalTeacher(make_student(), TOKENIZER), "teacher": teacher}
        groups = list(generate_groups(dataset, GroupsConfig(str(tmp_path / "groups"), **config), **roles))
        assert [group["teacher_prompt"] for group in groups] == [row["teacher_prompt"] for row in rows]
        for group in groups:
            ids = tokenize_group(group, 0, processing_class=TOKENIZER)
            if source != "dataset":
                assert ids["completion_ids"] == group["completion_ids"]
            ids = {name: ids[name] for name in ("prompt_ids", "completion_ids", "teacher_prompt_ids")}
            options = reference_step.Options(vocab_size=VOCAB)
            for completion, score in zip(ids["completion_ids"], group["teacher_scores"], strict=True):
                with torch.no_grad():
                    slow, _ = reference_step.read_as_teacher(teacher.model, ids, completion, options)
                assert score == pytest.approx(slow.item(), rel=1e-6)
        if source == "teacher":  # groups are written from the prompt
            plain = generate_groups(
                dataset.remove_columns("teacher_prompt"),
                GroupsConfig(str(tmp_path / "plain"), **config),
                teacher=teacher,
            )
            assert [group["completions"] for group in groups] == plain["completions"][:]

    def test_a_function_is_given_the_column(self):
        seen = {}

        def score(prompts, completions, teacher_prompt, **columns):
            seen.update(prompts=prompts, shown=teacher_prompt)
            return [[0.0] * len(group) for group in completions]

        CallableScorer(score).score(["a "], [["b", "c"]], columns={"teacher_prompt": ["d "]})
        assert seen == {"prompts": ["a "], "shown": ["d "]}


class TestCache:
    def test_equals_the_teacher_in_the_step(self, tmp_path):
        rows = shown_rows()
        cached = cache_soft_labels(make_teacher(), TOKENIZER, Dataset.from_list(rows), k=VOCAB, progress=False)
        for ours, expected in zip(cached["teacher_scores"], slow_scores(rows), strict=True):
            assert ours == pytest.approx(expected, rel=1e-6)
        for fields in ({}, {"max_length": 7}):
            whole, (expected,) = train(tmp_path, rows, **STEP, **fields)
            if fields:  # the cached scores are of whole completions
                scores = list(cached["teacher_scores"])
                whole, (expected,) = train(
                    tmp_path,
                    [row | {"teacher_scores": own} for row, own in zip(rows, scores, strict=True)],
                    **STEP,
                    **fields,
                )
            trainer, (gradients,) = train(tmp_path, train_dataset=cached, teacher_model=None, **STEP, **fields)
            assert logged(trainer, "loss") == [pytest.approx(logged(whole, "loss")[0], rel=1e-5)]
            assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5


class TestOnline:
    @pytest.mark.parametrize("soft_label", ["token", "group", "none"])
    def test_whole_step(self, tmp_path, soft_label):
        rows = shown_rows(sizes=(3,))
        texts = {row["prompt"]: row["completions"] for row in rows}
        trainer, (gradients,) = train(
            tmp_path,
            train_dataset=Dataset.from_list(rows).remove_columns("completions"),
            completion_fn=lambda prompts, **_: [texts[prompt] for prompt in prompts],
            completion_source="student",
            num_completions=3,
            max_completion_length=8,
            soft_label=soft_label,
            max_steps=1,
            **STEP,
        )
        options = reference_step.Options(vocab_size=VOCAB, soft_label=soft_label)
        loss, expected = reference_step.loss_and_gradients(
            make_student(), make_teacher(), [to_ids(row) for row in rows], options
        )
        assert_step(trainer, gradients, loss, expected, 1e-6)

    @pytest.mark.parametrize("source", ["teacher", "student"])
    def test_written_from_the_prompt(self, tmp_path, source):
        rows = Dataset.from_list(shown_rows()).remove_columns("completions")
        fields = {"completion_source": source, "num_completions": 3, "max_completion_length": 6, "max_steps": 1}
        seen = {}
        for name, dataset in {"shown": rows, "plain": rows.remove_columns("teacher_prompt")}.items():
            trainer = make_trainer(tmp_path, train_dataset=dataset, **fields)
            (seen[name],) = trainer.online._make(list(trainer.train_dataset), 0, [0, 1, 2, 3], "train")
        for shown, plain in zip(seen["shown"], seen["plain"], strict=True):
            assert shown["completion_ids"] == plain["completion_ids"] and shown["prompt_ids"] == plain["prompt_ids"]
            assert "teacher_prompt_ids" in shown and "teacher_prompt_ids" not in plain


class TestSeqKD:
    def test_teacher_writes_from_its_own_prompt(self, tmp_path):
        rows = [{name: row[name] for name in ("prompt", "teacher_prompt")} for row in shown_rows()]
        trainer = make_trainer(tmp_path, rows, method="SeqKD", max_completion_length=6, decoding="greedy")
        teacher = LocalTeacher(make_teacher(), TOKENIZER)
        read = [row["teacher_prompt"] or row["prompt"] for row in rows]
        written = teacher.generate(read, 1, seed=0, max_new_tokens=6, temperature=0.0)
        plain = teacher.generate([row["prompt"] for row in rows], 1, seed=0, max_new_tokens=6, temperature=0.0)
        assert written.completion_ids != plain.completion_ids
        assert trainer.train_dataset["completion_ids"][:] == written.completion_ids
        assert trainer.train_dataset["prompt_ids"][:] == plain.prompt_ids

    def test_without_room_to_write(self, tmp_path):
        rows = [{"prompt": "a ", "teacher_prompt": "a " * 30}]
        teacher = make_teacher(max_position_embeddings=32)
        with pytest.raises(ValueError, match="`teacher_prompt` of row 0 has 30 tokens"):
            make_trainer(tmp_path, rows, method="SeqKD", max_completion_length=6, teacher_model=teacher)
