"""The rivals of a classifier against `reference.py`, sampling and weights."""

import itertools
import math
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F

from grkd_trl.losses import (
    dist_loss,
    doubt_weights,
    group_relative_loss,
    pld_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sample_classes,
)


NAN, INF = math.nan, math.inf
LABELS = torch.tensor([2, 0, 3, 1])


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def gradient_of(values, student):
    return torch.autograd.grad(values.sum(), student)[0]


def pld_rows(students, teachers):
    return [reference.pld(*rows) for rows in zip(students, teachers, LABELS.tolist(), strict=True)]


# Ours, and the loop: a list of rows to a value for each
BATCH_LOSSES = {
    "pld": (partial(pld_loss, labels=LABELS), pld_rows),
    "dist": (dist_loss, reference.dist),
    "dist, softer and weighed": (
        partial(dist_loss, temperature=4.0, inter_weight=0.5, intra_weight=2.0),
        partial(reference.dist, temperature=4.0, inter_weight=0.5, intra_weight=2.0),
    ),
    "rkd_distance": (rkd_distance_loss, reference.rkd_distance),
    "rkd_angle": (rkd_angle_loss, reference.rkd_angle),
}
each_loss = pytest.mark.parametrize("ours, loop", BATCH_LOSSES.values(), ids=BATCH_LOSSES)


class TestRivals:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
    @each_loss
    def test_value_and_gradient(self, ours, loop, dtype, tolerance):
        student, teacher = draw(4, 5, dtype=dtype)
        values = ours(student, teacher)
        assert values.dtype == dtype and values.shape == (4,)

        def total(flat):
            return sum(loop([flat[row : row + 5] for row in range(0, 20, 5)], teacher.tolist()))

        expected = torch.tensor([complex(value).real for value in loop(student.tolist(), teacher.tolist())])
        _, gradient = reference.value_and_gradient(total, student.detach().flatten().tolist())
        torch.testing.assert_close(values.double(), expected.double(), rtol=max(tolerance, 1e-7), atol=tolerance)
        gradient = torch.tensor(gradient, dtype=torch.float64).view(4, 5)
        torch.testing.assert_close(gradient_of(values, student).double(), gradient, rtol=tolerance, atol=tolerance)

    @each_loss
    def test_gradcheck(self, ours, loop):
        student, teacher = draw(4, 3, seed=1)
        labels = {"labels": LABELS % 3} if "labels" in getattr(ours, "keywords", {}) else {}
        assert torch.autograd.gradcheck(lambda values: ours(values, teacher, **labels), student)

    @pytest.mark.parametrize("size", [1e4, 1e30])
    @each_loss
    def test_extreme_values_are_finite(self, ours, loop, size):
        size = min(size, 1e15) if "rkd" in str(ours) else size  # squares of distances overflow float32
        student = torch.tensor([[size, -size, 0.0, 1.0], [-size, size, 1.0, 0.0], [size] * 4, [0.0] * 4])
        for teacher in (student, -student, student.flip(-1)):
            student = student.detach().requires_grad_()
            values = ours(student, teacher)
            assert values.isfinite().all() and gradient_of(values, student).isfinite().all()

    @each_loss
    def test_bfloat16_is_computed_in_float32(self, ours, loop):
        student, teacher = draw(4, 8, dtype=torch.bfloat16)
        wide = ours(student.float(), teacher.float())
        torch.testing.assert_close(ours(student, teacher), wide.bfloat16(), rtol=0, atol=0)

    def test_pld_of_a_sure_teacher_is_cross_entropy(self):
        student, _ = draw(4, 5)
        teacher = 1e3 * F.one_hot(LABELS, 5).double()
        expected = F.cross_entropy(student, LABELS, reduction="none")
        torch.testing.assert_close(pld_loss(student, teacher, LABELS), expected)

    def test_pld_puts_the_label_first(self):
        student, teacher = draw(4, 5)
        assert (pld_loss(student, teacher, teacher.argmax(-1)) != pld_loss(student, teacher, teacher.argmin(-1))).all()

    @pytest.mark.parametrize("loss", [dist_loss, rkd_distance_loss, rkd_angle_loss])
    def test_identical_models_are_at_the_minimum(self, loss):
        student, _ = draw(5, 4)
        values = loss(student, student.detach())
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient_of(values, student), torch.zeros_like(student), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
    def test_rkd_does_not_see_place_scale_rotation_or_width(self, loss):
        student, teacher = draw(5, 4)
        rotation = torch.linalg.qr(draw(4, 4, seed=2)[1]).Q
        moved = F.pad(3 * teacher @ rotation + 1, (0, 2))
        torch.testing.assert_close(loss(student, moved), loss(student, teacher))

    @pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
    def test_rkd_of_equal_rows_has_a_finite_gradient(self, loss):
        _, teacher = draw(4, 3)
        for student in (torch.zeros(4, 3).double(), teacher[[0, 0, 1, 2]]):
            student = student.clone().requires_grad_()
            values = loss(student, teacher)
            assert values.isfinite().all() and gradient_of(values, student).isfinite().all()

    @pytest.mark.parametrize("loss, size", [(rkd_distance_loss, 1), (rkd_angle_loss, 2)])
    def test_rkd_needs_company(self, loss, size):
        student, teacher = draw(size, 4)
        values = loss(student, teacher)
        assert (values == 0).all() and (gradient_of(values, student) == 0).all()

    @pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
    def test_rkd_refuses_what_is_not_a_vector_an_example(self, loss):
        with pytest.raises(ValueError, match=r"equally many rows, got shapes \(2, 3\) and \(4, 3\): pass one vector"):
            loss(torch.zeros(2, 3), torch.zeros(4, 3))
        with pytest.raises(
            ValueError, match="no embeddings of the teacher.* a column `teacher_embeddings`: make it with"
        ):
            loss(torch.zeros(2, 3), None)

    @pytest.mark.parametrize("loss", [dist_loss, partial(pld_loss, labels=LABELS)])
    def test_errors(self, loss):
        with pytest.raises(ValueError, match="same shape"):
            loss(torch.zeros(4, 3), torch.zeros(4, 5))
        with pytest.raises(ValueError, match="`temperature` must be above 0"):
            loss(torch.zeros(4, 5), torch.zeros(4, 5), temperature=0.0)


class TestSampledClasses:
    def test_draws_are_distinct_classes(self):
        drawn = sample_classes(torch.randn(50, 9), 4)
        assert drawn.shape == (50, 4) and drawn.min() >= 0 and drawn.max() < 9
        assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()

    def test_all_classes_are_all_pairs(self):
        student, teacher = draw(5, 6)
        drawn = sample_classes(teacher, 99)
        assert drawn.shape == (5, 6)
        loss = group_relative_loss(student.gather(-1, drawn), teacher.gather(-1, drawn))
        torch.testing.assert_close(loss, group_relative_loss(student, teacher))

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    @pytest.mark.parametrize("num_classes", [2, 3])
    def test_unbiased_for_the_stated_target(self, num_classes, temperature):
        """The mean over many draws is the loss of the pairs, weighed by the chance that both are drawn: summed over all draws."""
        classes, num_draws = 5, 40_000
        student, teacher = (scores.detach()[0] / 2 for scores in draw(1, classes, seed=3))
        student.requires_grad_()
        p = (teacher / temperature).softmax(-1).tolist()
        together = torch.zeros(classes, classes, dtype=torch.float64)
        for order in itertools.permutations(range(classes), num_classes):
            chance, left = 1.0, 1.0
            for chosen in order:
                chance, left = chance * p[chosen] / left, left - p[chosen]
            for i, j in itertools.permutations(order, 2):
                together[i, j] += chance
        pairs = num_classes * (num_classes - 1) / 2
        losses = -F.logsigmoid(student.unsqueeze(1) - student.unsqueeze(0))
        ranked = teacher.unsqueeze(1) > teacher.unsqueeze(0)
        target = (losses * ranked * together).sum() / pairs

        generator = torch.Generator().manual_seed(0)
        drawn = sample_classes(
            teacher.expand(num_draws, -1), num_classes, temperature=temperature, generator=generator
        )
        copies = student.detach().expand(num_draws, -1).clone().requires_grad_()
        values = group_relative_loss(copies.gather(-1, drawn), teacher.expand(num_draws, -1).gather(-1, drawn))
        error = values.std() / num_draws**0.5
        assert abs(values.mean() - target) < 4 * error and error < 0.01
        slopes = gradient_of(values, copies)
        errors = slopes.std(0) / num_draws**0.5
        assert ((slopes.mean(0) - gradient_of(target, student)).abs() < 4 * errors + 1e-12).all()

    def test_generator_decides(self):
        teacher = torch.randn(8, 20)
        draws = [sample_classes(teacher, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()

    def test_errors(self):
        with pytest.raises(ValueError, match="`num_classes` must be at least 2 to make a pair, got 1"):
            sample_classes(torch.zeros(2, 5), 1)
        with pytest.raises(ValueError, match="`temperature` must be above 0"):
            sample_classes(torch.zeros(2, 5), 2, temperature=0.0)


class TestDoubtWeights:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_equals_the_loop(self, dtype, tolerance, temperature):
        _, teacher = draw(3, 4, 5, dtype=dtype)
        found = doubt_weights(teacher, temperature=temperature)
        assert found.dtype == dtype and found.shape == (3, 4)
        rows = teacher.double().view(-1, 5).tolist()
        expected = torch.tensor([reference.doubt_weight(row, temperature) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found.double().flatten(), expected, rtol=tolerance, atol=tolerance)

    def test_range_place_and_order(self):
        sure, unsure = torch.tensor([1e30, -1e30, 0.0, 1.0]), torch.full((4,), -1e30)
        assert doubt_weights(sure).item() == 1 and doubt_weights(unsure).item() == 2
        _, teacher = draw(50, 9)
        weights = doubt_weights(teacher)
        assert (weights > 1).all() and (weights < 3).all() and weights.std() > 0.1
        torch.testing.assert_close(doubt_weights(teacher.flip(-1) + 7), weights)
        assert (doubt_weights(teacher, temperature=2.0) > weights).all()  # softer is less sure

    def test_bfloat16_is_computed_in_float32_and_nan_stays_in_its_row(self):
        _, teacher = draw(4, 8, dtype=torch.bfloat16)
        torch.testing.assert_close(doubt_weights(teacher), doubt_weights(teacher.float()).bfloat16(), rtol=0, atol=0)
        teacher[1, 3] = NAN
        assert doubt_weights(teacher).isnan().tolist() == [False, True, False, False]

    def test_errors(self):
        with pytest.raises(ValueError, match="`temperature` must be above 0"):
            doubt_weights(torch.zeros(2, 5), temperature=0.0)
