"""Token soft labels from the teacher's k most likely tokens, cached with the groups."""

import math

import pytest
import reference
import torch
from datasets import Dataset, load_dataset
from interrupted import make_prompts
from tiny import tiny_model, tiny_tokenizer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.data import DataCollatorForGroups
from grkd_trl.losses import forward_kl, reverse_kl, token_soft_label_loss, topk_kl, topk_soft_label_loss
from grkd_trl.teacher import cache_soft_labels, score_groups


VOCAB = 20  # of the tiny tokenizer


def make_model(seed):
    return tiny_model("llama", VOCAB, seed=seed, initializer_range=0.3)


def make_groups(num=8):
    texts = ["a b c", "d", "e f g a b", "c c"]
    rows = [
        {
            "prompt": prompt,
            "completions": texts[: 2 + index % 3],
            "clipped": [index % 2 == 0, *[False] * (1 + index % 3)],
        }
        for index, prompt in enumerate(make_prompts(num)["prompt"])
    ]
    return Dataset.from_list(rows)


def draw(*shape, seed):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLoss:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("k", [1, 4, 8])
    def test_value(self, k, temperature):
        student, teacher = draw(3, 5, 9, seed=0), draw(3, 5, 9, seed=1)
        logps, ids = teacher.log_softmax(-1).topk(k)
        losses = topk_soft_label_loss(student, ids, logps, temperature=temperature)
        for row in range(3):
            for place in range(5):
                given = (student[row, place].tolist(), ids[row, place].tolist(), logps[row, place].tolist())
                expected = reference.topk_soft_label(*given, temperature).real
                assert losses[row, place].item() == pytest.approx(expected, abs=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_whole_vocabulary_is_the_full_loss(self, dtype):
        student, teacher = (draw(7, 9, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
        logps, ids = teacher.detach().log_softmax(-1).topk(9)
        losses = [topk_soft_label_loss(student, ids, logps), token_soft_label_loss(student, teacher)]
        gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)

    def test_grows_with_k_to_the_full_loss(self):
        student, teacher = draw(50, 300, seed=0), draw(50, 300, seed=1)
        full = token_soft_label_loss(student, teacher)
        last = torch.zeros(50)
        for k in (1, 16, 64, 256, 299):
            logps, ids = teacher.log_softmax(-1).topk(k)
            loss = topk_soft_label_loss(student, ids, logps)
            assert (loss > last).all() and (loss <= full + 1e-12).all()
            last = loss

    def test_gradcheck(self):
        logps, ids = draw(2, 6, seed=1).log_softmax(-1).topk(3)
        student = draw(2, 6, seed=0).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda logits: topk_soft_label_loss(logits, ids, logps, temperature=2.0), student
        )

    def test_extreme_logits_are_finite(self):
        student = torch.tensor([[1e4, -1e4, 0.0, 0.0]], requires_grad=True)
        loss = topk_soft_label_loss(student, torch.tensor([[0, 1]]), torch.tensor([[0.0, -200.0]]))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("k", [1, 4, 9])
    def test_divergence(self, k, reverse):
        """That of the k + 1 classes, restated; of the whole vocabulary at k = V."""
        student, teacher = draw(5, 9, seed=0), draw(5, 9, seed=1)
        logps, ids = teacher.log_softmax(-1).topk(k)
        losses = topk_kl(student, ids, logps, temperature=2.0, reverse=reverse)
        for row in range(5):
            classes = []
            for logits in (student[row], teacher[row]):
                chances = [math.exp(value) for value in logits.log_softmax(-1).tolist()]
                own = [chances[token] for token in ids[row].tolist()]
                own = [chance**0.5 for chance in ([*own, 1 - sum(own)] if k < 9 else own)]
                classes.append([chance / sum(own) for chance in own])
            p, q = classes if reverse else classes[::-1]
            assert losses[row].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        if k == 9:
            divergence = reverse_kl if reverse else forward_kl
            torch.testing.assert_close(losses, divergence(student, teacher, temperature=2.0))
        grad = lambda logits: topk_kl(logits, ids, logps, temperature=2.0, reverse=reverse)  # noqa: E731
        assert torch.autograd.gradcheck(grad, student.requires_grad_())

    @pytest.mark.parametrize("known", [[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    def test_tokens_that_the_student_lacks_count_among_the_others(self, known):
        """A teacher's vocabulary may be padded further than the student's."""
        student, known = draw(1, 9, seed=0).requires_grad_(), torch.tensor(known).bool()
        ids, logps = torch.tensor([0, 4, 8]), draw(1, 5, seed=1).log_softmax(-1)[0, :3]
        own = student, ids[known][None], logps[known][None]
        padded = student, torch.where(known, ids, torch.tensor([11, 9, 20]))[None], logps[None]
        for loss in (topk_soft_label_loss, topk_kl, lambda *args: topk_kl(*args, reverse=True)):
            if known.any():
                expected = loss(*own)
            else:  # all of the mass is that of the others
                expected = torch.zeros(1, dtype=torch.float64)
            torch.testing.assert_close(loss(*padded), expected)
            (gradient,) = torch.autograd.grad(loss(*padded).sum(), student)
            assert gradient.isfinite().all()
            if known.any():
                torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])

    @pytest.mark.parametrize("reverse", [False, True])
    def test_divergence_of_a_sure_teacher_is_finite(self, reverse):
        """In float32 nothing is left over."""
        student = torch.tensor([[1.0, 0.0, 3.0]], requires_grad=True)
        loss = topk_kl(student, torch.tensor([[0, 1]]), torch.tensor([[0.0, -40.0]]), reverse=reverse)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all() and loss.item() > 0

    @pytest.mark.parametrize(
        "student, ids, temperature, error",
        [((2, 5), (2, 3), 0.0, "`temperature`"), ((3, 5), (2, 3), 1.0, "leading dimensions")],
    )
    def test_refusals(self, student, ids, temperature, error):
        with pytest.raises(ValueError, match=error):
            topk_soft_label_loss(
                torch.zeros(student), torch.zeros(ids, dtype=torch.long), torch.zeros(ids), temperature=temperature
            )


class TestCache:
    def test_columns(self):
        teacher, tokenizer, groups = make_model(1), tiny_tokenizer(), make_groups()
        cached = cache_soft_labels(teacher, tokenizer, groups, k=5, tokens_per_batch=60, progress=False)
        assert (
            cached.remove_columns([n for n in cached.column_names if n.startswith(("teacher", "scored_"))]).to_list()
            == groups.to_list()
        )
        scored = score_groups(teacher, tokenizer, groups, progress=False)["teacher_scores"]
        for row, scores in zip(cached, scored, strict=True):
            assert row["teacher_scores"] == pytest.approx(scores, abs=1e-5)
            for text, cut, ids, top_ids, top_logps in zip(
                row["completions"], row["clipped"], row["teacher_token_ids"], row["teacher_top_ids"],
                row["teacher_top_logps"], strict=True,
            ):  # fmt: skip
                assert ids == tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (not cut)
                prompt_ids = tokenizer(row["prompt"])["input_ids"]
                with torch.no_grad():
                    logits = teacher.eval()(input_ids=torch.tensor([prompt_ids + ids])).logits[0]
                logps, expected = logits[len(prompt_ids) - 1 : -1].log_softmax(-1).topk(5)
                assert top_ids == expected.tolist()
                torch.testing.assert_close(torch.tensor(top_logps), logps, rtol=0, atol=1e-5)

    def test_a_prompt_that_merges_into_its_completions_has_no_labels(self):
        """Nothing predicts their first token, and the labels of the others would be taken for those of the next ones."""
        rows = Dataset.from_list([{"prompt": "b", "completions": ["g", "a b"], "clipped": [False, False]}])
        with pytest.raises(ValueError, match="row 0 holds .* position 0, .* a token of the prompt"):
            cache_soft_labels(make_model(1), tiny_tokenizer(), rows, k=4, progress=False)

    def test_survives_parquet(self, tmp_path):
        cached = cache_soft_labels(make_model(1), tiny_tokenizer(), make_groups(), k=3, progress=False)
        cached.to_parquet(tmp_path / "groups.parquet")
        loaded = load_dataset("parquet", data_files=str(tmp_path / "groups.parquet"), cache_dir=str(tmp_path))["train"]
        assert loaded.to_list() == cached.to_list()

    @pytest.mark.parametrize("k", [0, VOCAB + 1])
    def test_k(self, k):
        with pytest.raises(ValueError, match=f"between 1 and the vocabulary's {VOCAB}, got {k}"):
            cache_soft_labels(make_model(1), tiny_tokenizer(), make_groups(), k=k)

    @pytest.mark.parametrize("truncation_mode, kept", [("keep_start", [10, 11]), ("keep_end", [11, 12])])
    def test_truncation_keeps_what_is_predicted(self, truncation_mode, kept):
        row = {
            "prompt_ids": [1], "completion_ids": [[2, 3, 4]] * 2, "teacher_top_ids": [[[10], [11], [12]]] * 2,
            "teacher_top_logps": [[[-0.1], [-0.2], [-0.3]]] * 2,
        }  # fmt: skip
        batch = DataCollatorForGroups(0, max_length=3, truncation_mode=truncation_mode)([row])
        assert (
            batch["teacher_top_ids"].flatten().tolist() == [*kept, *kept][: 2 * batch["completion_mask"][0, 1:].sum()]
        )
        assert len(batch["teacher_top_logps"]) == batch["completion_mask"][:, 1:].sum()


class TestTraining:
    def make_trainer(self, folder, dataset, teacher=None, **kwargs):
        args = GRKDConfig(
            str(folder), max_steps=2, learning_rate=1e-3, logging_steps=1, per_device_train_batch_size=4, bf16=False,
            use_cpu=True, report_to="none", gradient_checkpointing=False, save_strategy="no", **kwargs,
        )  # fmt: skip
        return GRKDTrainer(
            model=make_model(0),
            teacher_model=teacher,
            args=args,
            train_dataset=dataset,
            processing_class=tiny_tokenizer(),
        )

    @pytest.mark.parametrize("max_length", [1024, 5])
    def test_the_whole_vocabulary_trains_as_the_teacher_does(self, tmp_path, max_length):
        """Without a teacher, and bit for bit the same batches: the same losses."""
        cached = cache_soft_labels(make_model(1), tiny_tokenizer(), make_groups(), k=VOCAB, progress=False)
        losses = []
        for dataset, teacher in ((cached, None), (make_groups(), make_model(1))):
            if teacher is not None:  # the scores of whole completions, which truncation does not change
                dataset = dataset.add_column("teacher_scores", cached["teacher_scores"])
            trainer = self.make_trainer(tmp_path, dataset, teacher, max_length=max_length)
            trainer.train()
            assert (trainer.teacher_model is None) == (teacher is None)
            names = ("loss", "loss/soft", "loss/relative")
            losses.append([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])
        assert len(losses[0]) == 2
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-4)

    def test_a_teacher_is_needed_to_rank_tokens(self, tmp_path):
        cached = cache_soft_labels(make_model(1), tiny_tokenizer(), make_groups(), k=4, progress=False)
        with pytest.raises(ValueError, match="No `teacher_model` was given"):
            self.make_trainer(tmp_path, cached, relative_level="tokens")

    def test_labels_of_other_tokens_are_refused(self, tmp_path):
        cached = cache_soft_labels(make_model(1), tiny_tokenizer(), make_groups(), k=4, progress=False)
        changed = cached.map(lambda row: {"clipped": [not cut for cut in row["clipped"]]})
        with pytest.raises(ValueError, match="`teacher_top_ids` of row 0 belong to other tokens"):
            self.make_trainer(tmp_path, changed)
