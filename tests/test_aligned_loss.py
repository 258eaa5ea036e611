"""The loss of one position across tokenizers: tokens by their strings, and the rest by sorted mass."""

from types import SimpleNamespace

import pytest
import torch
from aligned_runs import slow_loss

from grkd_trl.losses import aligned_soft_label_loss


class TestLoss:
    PAIRS = [(0, 3), (4, 1), (2, 8)]
    IDS = dict(zip(("student_ids", "teacher_ids"), torch.tensor(PAIRS).unbind(-1), strict=True))

    def draw(self, *shape, seed):
        return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("sizes", [(6, 11), (12, 9)])
    def test_value(self, sizes, temperature):
        student, teacher = (self.draw(5, size, seed=size) for size in sizes)
        losses = aligned_soft_label_loss(student, teacher, temperature=temperature, **self.IDS)
        for ours, *rows in zip(losses, student, teacher, strict=True):
            chances = [(row / temperature).softmax(-1).tolist() for row in rows]
            assert ours.item() == pytest.approx(slow_loss(*chances, self.PAIRS), abs=1e-12)

    def test_gradcheck(self):
        student, teacher = self.draw(3, 6, seed=0).requires_grad_(), self.draw(3, 11, seed=1)
        loss = lambda logits: aligned_soft_label_loss(logits, teacher, temperature=2.0, **self.IDS)  # noqa: E731
        assert torch.autograd.gradcheck(loss, student)

    def test_one_vocabulary_is_total_variation(self):
        student, teacher = self.draw(4, 7, seed=0), self.draw(4, 7, seed=1)
        every = torch.arange(7)
        losses = aligned_soft_label_loss(student, teacher, student_ids=every, teacher_ids=every)
        torch.testing.assert_close(losses, (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1))
        assert (aligned_soft_label_loss(student, student, student_ids=every, teacher_ids=every) == 0).all()

    def test_order_of_the_rest_does_not_matter(self):
        student, teacher = self.draw(4, 6, seed=0), self.draw(4, 11, seed=1)
        moved = teacher[:, [10, 1, 9, 3, 7, 6, 5, 4, 8, 2, 0]]  # 1, 3 and 8 stay
        given = self.IDS
        torch.testing.assert_close(
            aligned_soft_label_loss(student, moved, **given), aligned_soft_label_loss(student, teacher, **given)
        )

    def test_no_position(self):
        assert aligned_soft_label_loss(torch.zeros(0, 6), torch.zeros(0, 11), **self.IDS).shape == (0,)

    def test_extreme_logits_are_finite(self):
        student = torch.tensor([[1e4, -1e4, 0.0, -torch.inf, 0.0]], requires_grad=True)
        loss = aligned_soft_label_loss(student, torch.tensor([[0.0] * 8 + [-torch.inf]]), **self.IDS)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all() and gradient.isfinite().all()

    @pytest.mark.parametrize(
        "change, error",
        [
            ({"temperature": 0.0}, "`temperature`"),
            ({"teacher_ids": torch.tensor([1])}, "one shape"),
            ({}, "leading dimensions"),
        ],
    )
    def test_refusals(self, change, error):
        with pytest.raises(ValueError, match=error):
            aligned_soft_label_loss(torch.zeros(2 if change else 3, 6), torch.zeros(2, 11), **self.IDS | change)

    def test_is_trls_gold_on_the_rest(self):
        """Its sorted part is the same; its shared part is a Jensen-Shannon divergence with a weight, ours a distance."""
        gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
        fields = (
            "uld_crossentropy_weight",
            "uld_distillation_weight",
            "uld_student_temperature",
            "uld_teacher_temperature",
        )
        config = SimpleNamespace(
            **dict(zip(fields, (0.0, 1.0, 2.0, 2.0), strict=True)), uld_skip_student_eos=False, uld_skip_teacher_eos=False,
            use_extended_uld=False, uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=False, beta=0.5,
        )  # fmt: skip
        theirs = gold.ULDLoss(config)
        student, teacher = self.draw(1, 8, 6, seed=0), self.draw(1, 8, 11, seed=1)
        labels = torch.full((1, 8), -100)
        labels[:, 3:] = 1  # a prompt of three tokens
        none = torch.zeros(0, dtype=torch.long)
        ours = aligned_soft_label_loss(
            student[:, 2:-1], teacher[:, 2:-1], student_ids=none, teacher_ids=none, temperature=2.0
        )
        expected = theirs(student, teacher, labels, labels, labels.clamp(min=0), labels.clamp(min=0))
        torch.testing.assert_close(ours.mean(), expected)

        theirs.mapping_tensor = torch.full((11,), -1)
        theirs.mapping_tensor[self.IDS["teacher_ids"]] = self.IDS["student_ids"]
        theirs._teacher_matched_ids, theirs._student_matched_ids = (
            set(self.IDS["teacher_ids"].tolist()),
            set(self.IDS["student_ids"].tolist()),
        )
        both = [(logits[0, 2:-1] / 2.0).softmax(-1) for logits in (student, teacher)]
        theirs._compute_hybrid_uld_loss(*both)
        ours = aligned_soft_label_loss(student[0, 2:-1], teacher[0, 2:-1], temperature=2.0, **self.IDS)
        shared = (both[0][:, self.IDS["student_ids"]] - both[1][:, self.IDS["teacher_ids"]]).abs().sum(-1)
        torch.testing.assert_close((ours - shared).mean(), theirs.last_unmatched_loss)
