"""What [`group_relative_loss`] takes beyond the paper, its limits, and the path of large groups."""

import math
import subprocess
import sys
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_cases import close, differentiate, draw, each_setting, restate

from grkd_trl.losses import (
    _pair_blocks,
    group_relative_loss,
    probability_weights,
    ranking,
    token_relative_loss,
)


NAN, INF = math.nan, math.inf


def gradient_of(values, student):
    return torch.autograd.grad(values.sum(), student)[0]


class TestParity:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
    @pytest.mark.parametrize("shape", [(7, 2), (2, 3, 4), (1, 23)], ids=str)
    @pytest.mark.parametrize("weighted", [False, True])
    @each_setting
    def test_value_and_gradient(self, setting, shape, dtype, tolerance, weighted):
        student, teacher = draw(*shape, dtype=dtype)
        members = torch.linspace(0, 1, shape[-1], dtype=dtype) if weighted else None  # the first weighs nothing
        options = {**setting, "weights": members if members is None else members.expand(shape)}
        loop = partial(reference.pairwise_family, **setting, weights=members if members is None else members.tolist())
        close(
            tuple(value.double() for value in differentiate(group_relative_loss, student, teacher, **options)),
            restate(loop, student, teacher),
            tolerance,
        )

    @each_setting
    def test_tokens_are_the_same_function(self, setting):
        student, teacher = draw(5, 9)
        weights, top = probability_weights(teacher), teacher.topk(4)
        found = token_relative_loss(student, teacher, top_k=4, weights=weights, **setting)
        members = weights.gather(-1, top.indices)
        expected = group_relative_loss(student.gather(-1, top.indices), top.values, weights=members, **setting)
        close(found, expected, 0)

    @each_setting
    def test_weights_of_members_are_sums_in_pairs(self, setting):
        student, teacher = draw(5, 6)
        members = probability_weights(teacher)
        pairs = members.unsqueeze(-1) + members.unsqueeze(-2)
        close(
            differentiate(group_relative_loss, student, teacher, weights=members, **setting),
            differentiate(group_relative_loss, student, teacher, weights=pairs, **setting),
        )


class TestLimits:
    """Value and gradient of the loss where its temperatures go to 0 or to infinity."""

    def test_small_target_temperature_is_the_paper(self):
        student, teacher = draw(6, 7)
        found = differentiate(group_relative_loss, student, teacher, temperature=0.7, target_temperature=1e-6)
        close(found, differentiate(group_relative_loss, student, teacher, temperature=0.7))

    @pytest.mark.parametrize("temperature", [0.5, 3.0])
    def test_equal_temperatures_are_ranknet(self, temperature):
        """Its cross-entropy, less the entropy of the teacher's preferences, which has no gradient."""
        student, teacher = draw(6, 5)
        first, second = torch.triu_indices(5, 5, offset=1)

        def ranknet(scores, teacher):
            targets = ((teacher[:, first] - teacher[:, second]) / temperature).sigmoid()
            margins = (scores[:, first] - scores[:, second]) / temperature
            cross_entropy = F.binary_cross_entropy_with_logits(margins, targets, reduction="none")
            entropy = torch.distributions.Bernoulli(targets).entropy()
            return (cross_entropy - entropy).mean(-1)

        both = {"temperature": temperature, "target_temperature": temperature}
        close(
            differentiate(group_relative_loss, student, teacher, **both),
            differentiate(ranknet, student, teacher),
        )

    def test_large_equal_temperatures_match_the_centred_scores(self):
        """tau^2 KL -> (D^S - D^T)^2 / 8, whose mean over the pairs is G / (4 (G - 1)) times the variance of S - T."""
        (student, teacher), tau, size = draw(6, 5), 1e4, 5

        def squared(scores, teacher):
            return (scores - teacher).var(-1, correction=0) * size / (4 * (size - 1))

        found = differentiate(group_relative_loss, student, teacher, temperature=tau, target_temperature=tau)
        close([tau**2 * value for value in found], differentiate(squared, student, teacher), 1e-6)

    def test_sure_teacher_and_large_temperature_is_borda(self):
        """log 2 - tau^-1 times the mean of half the margins: the slope of a member counts whom the teacher puts below."""
        (student, teacher), tau, size = draw(6, 5), 1e6, 5
        above = teacher.argsort(-1).argsort(-1).double()  # how many the teacher puts below each
        value, gradient = differentiate(group_relative_loss, student, teacher, temperature=tau)
        borda = -(2 * above - (size - 1)) / (size * (size - 1))
        close([tau * gradient, tau * (value - math.log(2))], [borda, (borda * student.detach()).sum(-1)], 1e-5)

    @pytest.mark.parametrize("tau, target", [(1.0, 1.0), (2.0, 0.5), (0.5, 2.0)])
    def test_optimum_is_the_teachers_margins_times_the_ratio_of_temperatures(self, tau, target):
        _, teacher = draw(4, 6)
        options = {"temperature": tau, "target_temperature": target}
        value, gradient = differentiate(group_relative_loss, teacher * tau / target + 3.0, teacher, **options)
        close([value, gradient], [torch.zeros_like(value), torch.zeros_like(gradient)], 1e-12)


class TestEdges:
    def test_ties_pull_together_at_a_target_temperature(self):
        student, _ = draw(2, 4)
        _, gradient = differentiate(group_relative_loss, student, torch.zeros_like(student), target_temperature=1.0)
        assert (student.argsort(-1) == gradient.argsort(-1)).all()  # the highest falls, the lowest rises

    def test_a_teacher_score_of_minus_infinity_is_a_sure_preference(self):
        student, teacher = draw(1, 3)
        teacher[0, 1] = -INF
        value, gradient = differentiate(group_relative_loss, student, teacher, target_temperature=1.0)
        teacher[0, 1] = -1e5
        close([value, gradient], differentiate(group_relative_loss, student, teacher, target_temperature=1.0))

    def test_errors(self):
        with pytest.raises(ValueError, match="`target_temperature` must be 0 or above, got -1.0"):
            group_relative_loss(torch.zeros(2, 3), torch.zeros(2, 3), target_temperature=-1.0)
        with pytest.raises(ValueError, match=r"`weights` must have the shape of the scores \(2, 3\).*got \(3,\)"):
            group_relative_loss(torch.zeros(2, 3), torch.zeros(2, 3), weights=torch.ones(3))


PEAK = """
import re, torch
from grkd_trl.losses import group_relative_loss
torch.set_num_threads(1)
student = torch.randn(32, 10_000, requires_grad=True)
group_relative_loss(student, torch.randn(32, 10_000), OPTIONS).mean().backward()
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
    @pytest.mark.parametrize("target_temperature", [0.0, 0.5])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_same_value_and_gradient(
        self, blocked, monkeypatch, min_gap, dtype, tolerance, target_temperature, weighted
    ):
        student, teacher, mask = self.given(dtype)
        generator = torch.Generator().manual_seed(6)
        weights = torch.randn(3, 2, dtype=dtype, generator=generator)
        options = {"temperature": 0.7, "target_temperature": target_temperature, "min_gap": min_gap}
        options["weights"] = (
            torch.rand(3, 2, 37, dtype=dtype, generator=generator).round(decimals=1) if weighted else None
        )
        found = []
        for limit in (-1, 2**40):
            monkeypatch.setattr(ranking, "_MAX_DENSE", limit)
            loss = group_relative_loss(student, teacher, mask=mask, **options)
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

    @pytest.mark.parametrize("target_temperature", [0.0, 0.7])
    def test_a_block_of_pairs_alone_may_hold_none_that_are_masked(self, blocked, monkeypatch, target_temperature):
        student, teacher = draw(2, 24)
        mask = torch.arange(24).remainder(5).ne(3).expand(2, -1)
        options = {"target_temperature": target_temperature}
        loss = group_relative_loss(student, teacher, mask=mask, **options)
        monkeypatch.setattr(ranking, "_MAX_DENSE", 2**18)
        expected = group_relative_loss(student[:, mask[0]], teacher[:, mask[0]], **options)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_stays_in_its_group(self, blocked, side):
        given = [scores.detach().clone() for scores in draw(3, 9)]
        expected = group_relative_loss(*given)
        given[side][1, 4] = NAN
        loss = group_relative_loss(*given)
        assert loss[1].isnan()
        torch.testing.assert_close(loss[[0, 2]], expected[[0, 2]])

    def test_large_groups_are_chosen_by_size(self, monkeypatch):
        monkeypatch.setattr(ranking, "ranked_pairs", None)  # the dense path
        assert group_relative_loss(*draw(2, 600)).isfinite().all()
        with pytest.raises(TypeError):
            group_relative_loss(*draw(2, 300))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options", ["", "target_temperature=1.0, weights=torch.rand(32, 10_000), standardize=True"]
    )
    def test_ten_thousand_classes_fit_in_two_gibibytes(self, options):
        """The peak of a whole process, torch included, forward and backward at batch 32; a (32, C, C) tensor is 12 GiB."""
        command = [sys.executable, "-c", PEAK.replace("OPTIONS", options)]
        peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert int(peak) < 2 * 2**30
