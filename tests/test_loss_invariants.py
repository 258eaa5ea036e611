"""What must hold of every loss of a list, whatever the numbers: the paper's, those beyond it and those of rivals."""

import math
from functools import partial

import pytest
import torch
from loss_cases import F64, close, differentiate, draw

from grkd_trl.losses import (
    alpha_at,
    forward_kl,
    group_relative_loss,
    group_soft_label_loss,
    pro_loss,
    reverse_kl,
    token_relative_loss,
    token_soft_label_loss,
)


NAN, INF = math.nan, math.inf


# Partial, so that what a loss is can be asked. A group has a mask.
GROUP_LOSSES = [
    partial(group_relative_loss),
    partial(group_relative_loss, temperature=0.3, min_gap=0.4),
    partial(group_relative_loss, target_temperature=1.0),
    partial(group_relative_loss, standardize=True),
    partial(group_soft_label_loss),
    partial(pro_loss),
    partial(pro_loss, reward_temperature=False),
]
LOSSES = [
    *GROUP_LOSSES,
    partial(token_soft_label_loss),
    partial(token_relative_loss, top_k=3),
    partial(forward_kl),
    partial(reverse_kl),
]


def name_of(loss):
    return " ".join([loss.func.__name__, *(f"{name}={value}" for name, value in loss.keywords.items())])


each_group_loss = pytest.mark.parametrize("loss", GROUP_LOSSES, ids=name_of)
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=name_of)


class TestInvariants:
    @each_loss
    def test_permuting(self, loss):
        student, teacher = draw(6, 5)
        order = torch.tensor([3, 0, 4, 1, 2])
        value, gradient = differentiate(loss, student, teacher)
        close(differentiate(loss, student[:, order], teacher[:, order]), (value, gradient[:, order]))

    @pytest.mark.parametrize("constants", [(5.0, 0.0), (0.0, -3.0), (-700.0, 900.0)], ids=str)
    @each_loss
    def test_a_constant_on_the_scores(self, loss, constants):
        """PRO scales the student's scores, so there it is one on the rewards alone."""
        student, teacher = draw(6, 5)
        on_student = 0.0 if loss.func is pro_loss else constants[0]
        shifted = differentiate(loss, student + on_student, teacher + constants[1])
        close(shifted, differentiate(loss, student, teacher), 1e-11)

    @pytest.mark.parametrize("fill", [0.0, 1e30, NAN, INF, -INF])
    @each_group_loss
    def test_masked_is_removed(self, loss, fill):
        student, teacher = draw(6, 5)
        mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)) > 0.4
        assert mask.sum(-1).unique().numel() > 2
        with_rubbish = [scores.detach().masked_fill(~mask, fill) for scores in (student, teacher)]
        values, gradients = differentiate(loss, *with_rubbish, mask=mask)
        assert (gradients[~mask] == 0).all()
        for row, present in enumerate(mask):
            value, gradient = differentiate(loss, student[row : row + 1, present], teacher[row : row + 1, present])
            close(values[row : row + 1], value)
            close(gradients[row, present], gradient[0])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
    @each_group_loss
    def test_dtype_of_the_mask(self, loss, dtype):
        student, teacher = draw(2, 4)
        mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
        close(loss(student, teacher, mask=mask.to(dtype)), loss(student, teacher, mask=mask.bool()), 0)

    @pytest.mark.parametrize("fill", [0.0, NAN, INF, -INF])
    @each_group_loss
    def test_all_masked_is_zero_with_zero_gradient(self, loss, fill):
        rubbish = torch.full((2, 3), fill, dtype=F64)
        value, gradient = differentiate(loss, rubbish, rubbish, mask=torch.zeros(2, 3))
        assert (value == 0).all() and (gradient == 0).all()

    @each_group_loss
    def test_one_member_is_zero_with_zero_gradient(self, loss):
        value, gradient = differentiate(loss, *draw(4, 1))
        assert (value == 0).all() and (gradient == 0).all()

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e4, 1e30])
    @each_loss
    def test_extreme_scores_are_finite(self, loss, size, dtype):
        if loss.func is pro_loss or "standardize" in loss.keywords:
            size = min(size, 1e15)  # whose squares are still in float32
        student = torch.tensor([[size, -size, 0.0], [-size, size, size], [size, size, size]], dtype=dtype)
        for teacher in (student, -student, student.flip(-1)):
            value, gradient = differentiate(loss, student, teacher)
            assert value.isfinite().all() and (value >= 0).all()
            assert gradient.isfinite().all()

    def test_extreme_margins_are_linear(self):
        student, teacher = torch.tensor([[-1e4, 1e4]], dtype=F64), torch.tensor([[1.0, 0.0]]).double()
        value, gradient = differentiate(group_relative_loss, student, teacher)
        assert value.item() == 2e4 and gradient.tolist() == [[-1.0, 1.0]]

    def test_an_infinite_lead_is_worth_nothing(self):
        """And the pairs left out, inf - inf among them, leave no NaN in the gradient."""
        student, teacher = torch.tensor([[INF, 0.0]], dtype=F64), torch.tensor([[1.0, 0.0]]).double()
        value, gradient = differentiate(group_relative_loss, student, teacher)
        assert value.item() == 0.0 and gradient.tolist() == [[0.0, 0.0]]

    @pytest.mark.parametrize("side", ["student", "teacher"])
    @each_loss
    def test_nan_stays_nan_in_its_list_alone(self, loss, side):
        student, teacher = (scores.detach().clone() for scores in draw(4, 5))
        expected = loss(student, teacher)
        broken = student if side == "student" else teacher
        broken[2, teacher[2].argmax()] = NAN
        value = loss(student, teacher)
        assert value[2].isnan()
        close(value[[0, 1, 3]], expected[[0, 1, 3]], 0)

    @pytest.mark.parametrize("masked", [NAN, INF])
    @pytest.mark.parametrize("at_once", [0, 2**18])
    @pytest.mark.parametrize("target_temperature", [0.0, 0.7])
    def test_a_nan_weight_stays_unless_it_is_masked(self, target_temperature, at_once, masked, monkeypatch):
        monkeypatch.setattr("grkd_trl.losses.ranking._MAX_DENSE", at_once)
        student, teacher = draw(2, 4)
        weights, mask = torch.ones(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        weights[:, 3] = torch.tensor([masked, NAN])
        kwargs = {"target_temperature": target_temperature, "mask": mask}
        value, gradient = differentiate(group_relative_loss, student, teacher, weights=weights, **kwargs)
        assert value[1].isnan() and gradient[1].isnan().any()
        close(value[0], group_relative_loss(student, teacher, **kwargs)[0])
        assert gradient[0].isfinite().all()

    @pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5])
    def test_a_pair_is_the_pairwise_logistic_loss(self, temperature):
        student, teacher = draw(8, 2)
        margin = (student[:, 0] - student[:, 1]) * (teacher[:, 0] - teacher[:, 1]).sign()
        expected = torch.log1p(torch.exp(-margin / temperature))
        close(group_relative_loss(student, teacher, temperature=temperature), expected)

    @pytest.mark.parametrize("min_gap", [0.0, 0.5])
    def test_a_group_without_a_pair_is_exactly_zero(self, min_gap):
        student, _ = draw(3, 4)
        teacher = torch.full((3, 4), -1.5, dtype=F64)
        teacher[1] += torch.tensor([0.0, min_gap, min_gap / 2, 0.0])
        value, gradient = differentiate(group_relative_loss, student, teacher, min_gap=min_gap)
        assert (value == 0).all() and (gradient == 0).all()
        value, gradient = differentiate(token_relative_loss, student, teacher, top_k=3, min_gap=min_gap)
        assert (value == 0).all() and (gradient == 0).all()

    @pytest.mark.parametrize("at_once", [2**18, -1])  # in memory at once, and in blocks
    @pytest.mark.parametrize("target_temperature", [0.0, 1.0])
    def test_a_gap_of_min_gap_makes_no_pair(self, monkeypatch, target_temperature, at_once):
        monkeypatch.setattr("grkd_trl.losses.ranking._MAX_DENSE", at_once)
        student, teacher = draw(3, 3)[0], torch.tensor([[3.0, 2.0, 1.0]] * 3, dtype=F64)
        found = group_relative_loss(student, teacher, target_temperature=target_temperature, min_gap=1.0)
        ends = student[:, [0, 2]], teacher[:, [0, 2]]  # the only pair left
        close(found, group_relative_loss(*ends, target_temperature=target_temperature))

    @pytest.mark.parametrize("loss", [group_soft_label_loss, token_soft_label_loss, forward_kl, reverse_kl])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_identical_models_are_at_the_minimum(self, loss, temperature):
        student, _ = draw(6, 5)
        value, gradient = differentiate(loss, student, student.detach(), temperature=temperature)
        distribution = torch.distributions.Categorical(logits=student.detach() / temperature)
        close(value, 0 * value if loss in (forward_kl, reverse_kl) else distribution.entropy())
        close(gradient, torch.zeros_like(gradient), 1e-15)


class TestErrors:
    @each_loss
    def test_shapes(self, loss):
        with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 4\): pass one teacher value"):
            loss(torch.zeros(2, 3), torch.zeros(2, 4))

    @pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
    @pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.func is not pro_loss], ids=name_of)
    def test_temperature(self, loss, temperature):
        with pytest.raises(ValueError, match=f"`temperature` must be above 0, got {temperature}"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)

    @pytest.mark.parametrize("min_gap", [-0.1, NAN])
    def test_min_gap(self, min_gap):
        with pytest.raises(ValueError, match=f"`min_gap` must be 0 or above, got {min_gap}"):
            group_relative_loss(torch.zeros(2, 3), torch.zeros(2, 3), min_gap=min_gap)

    @each_group_loss
    def test_mask(self, loss):
        with pytest.raises(ValueError, match=r"`mask` must have the scores' shape \(2, 3\), got \(3,\)"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(3))

    def test_top_k(self):
        with pytest.raises(ValueError, match="`top_k` must be at least 2 to make a pair, got 1"):
            token_relative_loss(torch.zeros(2, 3), torch.zeros(2, 3), top_k=1)

    def test_schedule(self):
        with pytest.raises(ValueError, match="'linear', 'cosine' or 'constant', got 'sqrt'"):
            alpha_at(0.5, start=0.0, end=1.0, schedule="sqrt")
