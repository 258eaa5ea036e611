"""The names and signatures of all losses, and those of lists of values against `reference.py` and by hand."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import reference
import torch
from loss_cases import CASES, differentiate, draw, each_case, each_loss, restate

from grkd_trl import losses
from grkd_trl.losses import (
    alpha_at,
    group_relative_loss,
    group_soft_label_loss,
    ranked_pairs,
    token_relative_loss,
)


# Users build on these names and keywords. Add yours; change one only with a new major version.
SIGNATURES = {
    "aligned_soft_label_loss": "(student_logits, teacher_logits, *, student_ids, teacher_ids, temperature=1.0)",
    "alpha_at": "(progress, *, start, end, schedule)",
    "alphapo_rewards": "(scores, *, alpha)",
    "clipped_policy_loss": "(logps, sampling_logps, advantages, *, clip_range=0.2)",
    "dist_loss": "(student_logits, teacher_logits, *, temperature=1.0, inter_weight=1.0, intra_weight=1.0)",
    "doubt_weights": "(teacher_logits, *, temperature=1.0)",
    "forward_kl": "(student_logits, teacher_logits, *, temperature=1.0)",
    "group_relative_loss": "(student_scores, teacher_scores, *, temperature=1.0, target_temperature=0.0, weights=None, "
    "min_gap=0.0, standardize=False, mask=None)",
    "group_soft_label_loss": "(student_scores, teacher_scores, *, temperature=1.0, mask=None)",
    "minillm_returns": "(rewards, mask, *, gamma=1.0, length_norm=True)",
    "mixture_logps": "(student_logps, teacher_logps, *, teacher_share)",
    "pld_loss": "(student_logits, teacher_logits, labels, *, temperature=1.0)",
    "pro_loss": "(scores, rewards, *, reward_temperature=True, mask=None)",
    "probability_weights": "(teacher_scores, *, mask=None)",
    "ranked_pairs": "(teacher_scores, *, min_gap=0.0, mask=None)",
    "reverse_kl": "(student_logits, teacher_logits, *, temperature=1.0)",
    "rkd_angle_loss": "(student_embeddings, teacher_embeddings)",
    "rkd_distance_loss": "(student_embeddings, teacher_embeddings)",
    "sample_classes": "(teacher_logits, num_classes, *, temperature=1.0, generator=None)",
    "simpo_loss": "(chosen_scores, rejected_scores, *, beta, gamma, label_smoothing=0.0, alpha=0.0)",
    "token_relative_loss": "(student_logits, teacher_logits, *, top_k, temperature=1.0, target_temperature=0.0, "
    "weights=None, min_gap=0.0, standardize=False)",
    "token_soft_label_loss": "(student_logits, teacher_logits, *, temperature=1.0)",
    "topk_kl": "(student_logits, top_ids, top_logps, *, temperature=1.0, reverse=False)",
    "topk_soft_label_loss": "(student_logits, top_ids, top_logps, *, temperature=1.0)",
}
MODULES = [module.name for module in pkgutil.iter_modules(losses.__path__, "grkd_trl.losses.")]


class TestInterface:
    def test_every_name_has_its_signature_here(self):
        assert set(SIGNATURES) == set(losses.__all__)

    @pytest.mark.parametrize("name, signature", SIGNATURES.items())
    def test_signature_is_frozen(self, name, signature):
        taken = inspect.signature(getattr(losses, name))
        parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in taken.parameters.values()]
        assert str(inspect.Signature(parameters)) == signature

    @pytest.mark.parametrize("module", MODULES)
    def test_examples_of_the_docstrings(self, module):
        assert doctest.testmod(importlib.import_module(module)).failed == 0

    @pytest.mark.parametrize("name", SIGNATURES)
    def test_every_loss_has_an_example(self, name):
        assert doctest.DocTestFinder(recurse=False).find(getattr(losses, name))[0].examples


SHAPES = [(7, 2), (5, 3), (2, 3, 4), (3, 9), (1, 37)]


class TestParity:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @each_case
    def test_value_and_gradient(self, case, shape, dtype, tolerance):
        student, teacher = draw(*shape, dtype=dtype, scale=case.scale)
        for ours, loops in zip(
            differentiate(case.ours, student, teacher), restate(case.loop, student, teacher), strict=True
        ):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), loops, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("shape", [(64, 2), (64, 8), (16, 300)], ids=str)
    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
    def test_bf16_error_is_at_most_twice_that_of_plain_torch(self, name, shape):
        case = CASES[name]
        student, teacher = draw(*shape, dtype=torch.bfloat16)
        ours = differentiate(case.ours, student, teacher)
        plain = differentiate(case.plain, student, teacher)
        exact = differentiate(case.plain, student.double(), teacher.double())
        for value, hurried, truth in zip(ours, plain, exact, strict=True):
            assert value.dtype == torch.bfloat16
            error, allowed = ((other.double() - truth).abs() for other in (value, hurried))
            assert error.max() <= 2 * allowed.max()
            assert error.mean() <= 2 * allowed.mean()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @each_loss
    def test_half_precision_is_computed_in_float32(self, loss, dtype):
        student, teacher = draw(32, 200, dtype=dtype)
        wide = differentiate(loss, student.float(), teacher.float())
        for value, widened in zip(differentiate(loss, student, teacher), wide, strict=True):
            torch.testing.assert_close(value, widened.to(dtype), rtol=0, atol=0)

    @pytest.mark.parametrize("shape", [(3, 2), (2, 5)], ids=str)
    @each_loss
    def test_gradcheck(self, loss, shape):
        student, teacher = draw(*shape)
        assert torch.autograd.gradcheck(lambda values: loss(values, teacher), student)
        assert torch.autograd.gradgradcheck(lambda values: loss(values, teacher), student)

    @pytest.mark.parametrize("min_gap", [0.0, 0.7])
    def test_ranked_pairs(self, min_gap):
        _, teacher = draw(6, 5)
        teacher[0, 1] = teacher[0, 2]  # a tie
        pairs = ranked_pairs(teacher, min_gap=min_gap)
        for row, found in zip(teacher.tolist(), pairs, strict=True):
            assert [tuple(pair) for pair in found.nonzero().tolist()] == reference.ranked_pairs(row, min_gap)

    @pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
    def test_alpha(self, schedule):
        for progress in [0.0, 0.1, 0.25, 0.5, 0.99, 1.0]:
            for start, end in [(0.0, 0.6), (0.2, 0.9), (1.0, 0.0), (0.4, 0.4)]:
                expected = reference.alpha(progress, start, end, schedule)
                given = {"start": start, "end": end, "schedule": schedule}
                assert alpha_at(progress, **given) == pytest.approx(expected, abs=1e-14)
        given = {"start": 0.2, "end": 0.9, "schedule": schedule}
        assert alpha_at(1.7, **given) == alpha_at(1.0, **given) and alpha_at(-1.0, **given) == alpha_at(0.0, **given)


class TestByHand:
    """A group of three, whose numbers fit on paper."""

    STUDENT, TEACHER = [0.0, 0.0, 1.0], [3.0, 2.0, 1.0]

    def given(self):
        return torch.tensor([self.STUDENT], dtype=torch.float64), torch.tensor([self.TEACHER], dtype=torch.float64)

    def test_relative(self):
        # Pairs (1, 2), (1, 3), (2, 3), margins 0, -1, -1: (log 2 + 2 log(1 + e)) / 3.
        value, gradient = differentiate(group_relative_loss, *self.given())
        assert value.item() == pytest.approx(1.1065567, abs=1e-6)
        # d/dm of -log sigmoid(m) = sigmoid(m) - 1: -0.5, -0.7310586, -0.7310586, over 3.
        assert gradient[0].tolist() == pytest.approx([-0.4103529, -0.0770195, 0.4873724], abs=1e-6)

    def test_relative_at_half_the_temperature(self):
        # Margins 0, -2, -2: (0.6931472 + 2 * 2.1269280) / 3; sigmoid(-2) - 1 = -0.8807971, times 2 over 3.
        value, gradient = differentiate(group_relative_loss, *self.given(), temperature=0.5)
        assert value.item() == pytest.approx(1.6490011, abs=1e-6)
        assert gradient[0].tolist() == pytest.approx([-0.9205314, -0.2538647, 1.1743961], abs=1e-6)

    def test_gap_must_be_exceeded(self):
        # Only the pair (1, 3), with its gap of 2, exceeds 1: log(1 + e).
        value, gradient = differentiate(group_relative_loss, *self.given(), min_gap=1.0)
        assert value.item() == pytest.approx(1.3132617, abs=1e-6)
        assert gradient[0].tolist() == pytest.approx([-0.7310586, 0.0, 0.7310586], abs=1e-6)

    def test_soft_label(self):
        # Teacher .6652410 .2447285 .0900306; log of (1, 1, e) / (2 + e): -1.5514447, -1.5514447, -0.5514447.
        value, gradient = differentiate(group_soft_label_loss, *self.given())
        assert value.item() == pytest.approx(1.4614142, abs=1e-6)
        # Softmax of the student less that of the teacher: .2119416 .2119416 .5761169.
        assert gradient[0].tolist() == pytest.approx([-0.4532994, -0.0327869, 0.4860863], abs=1e-6)

    def test_top_two_tokens(self):
        # The third token is left out: one pair, margin 0.
        value, gradient = differentiate(token_relative_loss, *self.given(), top_k=2)
        assert value.item() == pytest.approx(0.6931472, abs=1e-6)
        assert gradient[0].tolist() == pytest.approx([-0.5, 0.5, 0.0], abs=1e-12)
