"""Entries that are -inf to student and teacher: a masked vocabulary is the vocabulary without them, in value and gradient."""

from functools import partial

import pytest
import torch

from grkd_trl.losses import (
    dist_loss,
    forward_kl,
    group_relative_loss,
    group_soft_label_loss,
    pld_loss,
    ranking,
    reverse_kl,
    token_relative_loss,
    token_soft_label_loss,
    topk_soft_label_loss,
)


SIZE, MASKED = 7, [2, 5]
KEPT = [index for index in range(SIZE) if index not in MASKED]


def from_top(k):
    """Of the teacher's k most likely: with 6 a masked one is among them, with 5 nothing is left over."""

    def loss(student, teacher):
        top = teacher.log_softmax(-1).topk(min(k, teacher.shape[-1]))
        return topk_soft_label_loss(student, top.indices, top.values)

    return loss


LOSSES = {
    "token_soft_label": token_soft_label_loss,
    "group_soft_label": group_soft_label_loss,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "group_relative": group_relative_loss,
    "token_relative": lambda student, teacher: token_relative_loss(student, teacher, top_k=6),
    "ranknet": partial(group_relative_loss, target_temperature=1.0),
    "pld": lambda student, teacher: pld_loss(student, teacher, torch.tensor([0, 1, 0])),
    "top 3": from_top(3),
    "top 5": from_top(5),
    "top 6": from_top(6),
}


def draw(dtype):
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, SIZE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    masked = [values.clone() for values in whole]
    for values in masked:
        values[:, MASKED] = -torch.inf
    return [values[:, KEPT] for values in whole], masked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_is_removed(name, dtype, monkeypatch):
    (student, teacher), (masked_student, masked_teacher) = draw(dtype)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for dense in (2**18, 0):  # all pairs at once, and in blocks
        monkeypatch.setattr(ranking, "_MAX_DENSE", dense)
        removed, masked = student.clone().requires_grad_(), masked_student.clone().requires_grad_()
        expected, loss = LOSSES[name](removed, teacher), LOSSES[name](masked, masked_teacher)
        torch.testing.assert_close(loss, expected, **tolerance)
        expected.sum().backward()
        loss.sum().backward()
        torch.testing.assert_close(masked.grad[:, KEPT], removed.grad, **tolerance)
        assert (masked.grad[:, MASKED] == 0).all()


def test_correlation_is_finite():
    """DIST reads a masked class as one of probability 0 to both."""
    _, (student, teacher) = draw(torch.float32)
    student.requires_grad_()
    loss = dist_loss(student, teacher)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_stays(name):
    (student, teacher), _ = draw(torch.float32)
    teacher[1, 0] = torch.nan
    assert LOSSES[name](student, teacher).isnan().tolist() == [False, True, False]
