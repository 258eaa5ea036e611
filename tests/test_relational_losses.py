"""The rivals of a classifier against `reference.py`, the blocked path of the relative loss, sampling and weights."""

import itertools
import math
import subprocess
import sys
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F

from grkd_trl.losses import (
    _pair_blocks,
    dist_loss,
    doubt_weights,
    group_relative_loss,
    pld_loss,
    ranking,
    ranknet_loss,
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


def by_row(loop):
    return lambda students, teachers: [loop(*rows) for rows in zip(students, teachers, strict=True)]


def pld_rows(students, teachers):
    return [reference.pld(*rows) for rows in zip(students, teachers, LABELS.tolist(), strict=True)]


# Ours, and the loop: a list of rows to a value for each
BATCH_LOSSES = {
    "ranknet": (ranknet_loss, by_row(reference.ranknet)),
    "ranknet, softer": (partial(ranknet_loss, temperature=3.0), by_row(partial(reference.ranknet, temperature=3.0))),
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

    @pytest.mark.parametrize("fill", [0.0, NAN, INF])
    def test_ranknet_removes_what_is_masked(self, fill):
        student, teacher = draw(3, 5)
        mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        rubbish = [scores.detach().masked_fill(mask == 0, fill) for scores in (student, teacher)]
        values = ranknet_loss(*rubbish, mask=mask)
        for row, present in enumerate(mask.bool()):
            expected = ranknet_loss(student[row, present], teacher[row, present])
            torch.testing.assert_close(values[row], expected, rtol=1e-12, atol=1e-12)

    def test_ranknet_of_a_sure_teacher_is_the_relative_loss(self):
        student, teacher = draw(6, 7)
        torch.testing.assert_close(ranknet_loss(student, teacher * 1e6), group_relative_loss(student, teacher))

    def test_ranknet_of_a_teacher_who_ties_pulls_the_classes_together(self):
        student, _ = draw(2, 4)
        gradient = gradient_of(ranknet_loss(student, torch.zeros(2, 4, dtype=torch.float64)), student)
        assert (student.detach().argsort(-1) == gradient.argsort(-1)).all()  # highest falls, lowest rises

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

    @pytest.mark.parametrize("loss", [ranknet_loss, dist_loss, partial(pld_loss, labels=LABELS)])
    def test_errors(self, loss):
        with pytest.raises(ValueError, match="same shape"):
            loss(torch.zeros(4, 3), torch.zeros(4, 5))
        with pytest.raises(ValueError, match="`temperature` must be above 0"):
            loss(torch.zeros(4, 5), torch.zeros(4, 5), temperature=0.0)


PEAK = """
import re, torch
from grkd_trl.losses import LOSS as loss
torch.set_num_threads(1)
student = torch.randn(32, 10_000, requires_grad=True)
loss(student, torch.randn(32, 10_000)).mean().backward()
assert student.grad.isfinite().all() and (student.grad != 0).any(-1).all()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)  # its own, not the parent's
"""


class TestAllPairsInBlocks:
    @pytest.fixture(params=[4, 60, 300, 2**18])
    def blocked(self, request, monkeypatch):
        """Everything in blocks, of one pair up to the whole batch."""
        monkeypatch.setattr(ranking, "_MAX_DENSE", -1)
        monkeypatch.setattr(_pair_blocks, "_BLOCK", {"cpu": request.param})

    @staticmethod
    def given(dtype):
        student, teacher = draw(3, 2, 37, dtype=dtype)
        teacher = teacher.mul(4).round().div(4)  # ties
        teacher[0, 0, 3:5], teacher[0, 1, 5] = INF, -INF
        mask = torch.rand(3, 2, 37, generator=torch.Generator().manual_seed(5)) < 0.7
        mask[1, 0], mask[1, 1] = False, torch.arange(37) == 8
        return student, teacher, mask

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
    @pytest.mark.parametrize("min_gap", [0.0, 0.3, 5.0, 99.0])
    def test_same_value_and_gradient(self, blocked, monkeypatch, min_gap, dtype, tolerance):
        student, teacher, mask = self.given(dtype)
        weights = torch.randn(3, 2, dtype=dtype, generator=torch.Generator().manual_seed(6))
        found = []
        for limit in (-1, 2**40):
            monkeypatch.setattr(ranking, "_MAX_DENSE", limit)
            loss = group_relative_loss(student, teacher, temperature=0.7, min_gap=min_gap, mask=mask)
            found.append((loss, gradient_of(loss * weights, student)))
        for blocks, dense in zip(*found, strict=True):
            torch.testing.assert_close(blocks, dense, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("fill", [NAN, INF, 1e30])
    def test_masked_is_removed(self, blocked, fill):
        student, teacher, mask = self.given(torch.float64)
        expected = group_relative_loss(student, teacher, mask=mask)
        rubbish = [scores.detach().masked_fill(~mask, fill).requires_grad_() for scores in (student, teacher)]
        loss = group_relative_loss(*rubbish, mask=mask)
        torch.testing.assert_close(loss, expected)
        assert (gradient_of(loss, rubbish[0])[~mask] == 0).all()

    def test_a_block_of_pairs_alone_may_hold_none_that_are_masked(self, blocked):
        student, teacher = draw(2, 24)
        mask = torch.arange(24).remainder(5).ne(3).expand(2, -1)
        loss = group_relative_loss(student, teacher, mask=mask)
        expected = group_relative_loss(student[:, mask[0]], teacher[:, mask[0]])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_stays_in_its_group(self, blocked, side):
        given = [scores.detach().clone() for scores in draw(3, 9)]
        expected = group_relative_loss(*given)
        given[side][1, 4] = NAN
        loss = group_relative_loss(*given)
        assert loss[1].isnan()
        torch.testing.assert_close(loss[[0, 2]], expected[[0, 2]])

    def test_negative_gap_is_refused(self, blocked):
        with pytest.raises(ValueError, match="`min_gap` must be 0 or above, got -1.0"):
            group_relative_loss(torch.zeros(2, 9), torch.zeros(2, 9), min_gap=-1.0)

    @pytest.mark.parametrize("size", [77, 200])
    def test_equals_the_loops_of_the_paper(self, size):
        student, teacher = draw(1600 // size, size)
        assert student.numel() * size > 2**14
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "_MAX_DENSE", -1)
            loss = group_relative_loss(student, teacher, temperature=0.5, min_gap=0.1)
            gradient = gradient_of(loss, student)
        for row in range(0, len(student), 4):
            lists = student[row].tolist(), teacher[row].tolist()
            assert loss[row].item() == pytest.approx(reference.group_relative(*lists, 0.5, 0.1).real, rel=1e-10)
            for index in (0, size // 2, size - 1):
                shifted = [value + 1e-30j * (position == index) for position, value in enumerate(lists[0])]
                slope = reference.group_relative(shifted, lists[1], 0.5, 0.1).imag / 1e-30
                assert gradient[row, index].item() == pytest.approx(slope, rel=1e-10, abs=1e-14)

    def test_gradcheck(self, blocked):
        student, teacher = draw(2, 6)
        assert torch.autograd.gradcheck(lambda values: group_relative_loss(values, teacher), student)

    def test_large_groups_are_chosen_by_size(self, monkeypatch):
        monkeypatch.setattr(ranking, "ranked_pairs", None)  # the dense path
        assert group_relative_loss(*draw(2, 600)).isfinite().all()
        with pytest.raises(TypeError):
            group_relative_loss(*draw(2, 300))

    def test_ranknet_has_the_same_value_and_gradient(self, blocked):
        (student, teacher), mask = draw(3, 2, 37), self.given(torch.float64)[2]
        loss = ranknet_loss(student, teacher, temperature=0.7, mask=mask)
        gradient = gradient_of(loss, student)
        for place in itertools.product(range(3), range(2)):
            present = mask[place]
            own = student.detach()[place][present].requires_grad_()
            pairs = torch.combinations(torch.arange(len(own)))
            expected = torch.zeros((), dtype=torch.float64)
            if len(pairs):
                margins, target = ((s[pairs[:, 0]] - s[pairs[:, 1]]) / 0.7 for s in (own, teacher[place][present]))
                expected = F.binary_cross_entropy_with_logits(margins, target.sigmoid())
                torch.testing.assert_close(gradient[place][present], gradient_of(expected, own))
            torch.testing.assert_close(loss[place], expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("loss", ["group_relative_loss", "ranknet_loss"])
    def test_ten_thousand_classes_fit_in_two_gibibytes(self, loss):
        """The peak of a whole process, torch included, forward and backward at batch 32; a (32, C, C) tensor is 12 GiB."""
        command = [sys.executable, "-c", PEAK.replace("LOSS", loss)]
        peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert int(peak) < 2 * 2**30


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
