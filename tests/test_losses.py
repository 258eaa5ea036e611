"""Every loss against `reference.py`, and what must hold of it whatever the numbers."""

import doctest
import importlib
import inspect
import math
import pkgutil
from functools import partial
from typing import NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F

from grkd_trl import losses
from grkd_trl.losses import (
    alpha_at,
    group_relative_loss,
    group_soft_label_loss,
    ranked_pairs,
    token_relative_loss,
    token_soft_label_loss,
)


NAN, INF = math.nan, math.inf

# Users build on these names and keywords. Add yours; change one only with a new major version.
SIGNATURES = {
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


# Parity


class Case(NamedTuple):
    """A loss, the loop that restates it, and the same in plain torch, as one would write it in a hurry."""

    ours: callable
    loop: callable
    plain: callable


def plain_relative(student, teacher, temperature=1.0, min_gap=0.0):
    pairs = ((teacher[..., :, None] - teacher[..., None, :]) > min_gap).to(student.dtype)
    margins = (student[..., :, None] - student[..., None, :]) / temperature
    return (-F.logsigmoid(margins) * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def plain_soft(student, teacher, temperature=1.0):
    return -((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1)


def plain_token_relative(student, teacher, top_k, temperature=1.0, min_gap=0.0):
    top = teacher.topk(min(top_k, teacher.shape[-1]))
    return plain_relative(student.gather(-1, top.indices), top.values, temperature, min_gap)


def case(ours, loop, plain, **kwargs):
    return Case(*(partial(function, **kwargs) for function in (ours, loop, plain)))


def cases(ours, loop, plain, **options):
    """One case with the defaults, and one for each value of each option."""
    yield case(ours, loop, plain)
    yield from (case(ours, loop, plain, **{name: value}) for name, values in options.items() for value in values)


CASES = [
    *cases(
        group_relative_loss, reference.group_relative, plain_relative, temperature=[0.1, 3.0], min_gap=[0.5, 1.3, 99.0]
    ),
    *cases(group_soft_label_loss, reference.group_soft_label, plain_soft, temperature=[0.1, 3.0]),
    *cases(token_soft_label_loss, reference.token_soft_label, plain_soft, temperature=[0.1, 3.0]),
    *cases(
        partial(token_relative_loss, top_k=4),
        partial(reference.token_relative, top_k=4),
        partial(plain_token_relative, top_k=4),
        temperature=[0.1, 3.0],
        min_gap=[0.2],
        top_k=[2, 5, 64],
    ),
]


def label(value):
    if isinstance(value, Case):
        inner = value.ours.func
        options = [f"{name}={option}" for name, option in value.ours.keywords.items()]
        return " ".join([getattr(inner, "__name__", "token_relative_loss"), *options])
    return None


each_case = pytest.mark.parametrize("case", CASES, ids=label)
each_group_loss = pytest.mark.parametrize(
    "loss", [group_relative_loss, partial(group_relative_loss, temperature=0.3, min_gap=0.4), group_soft_label_loss]
)
ROW_LOSSES = [
    group_relative_loss,
    group_soft_label_loss,
    token_soft_label_loss,
    partial(token_relative_loss, top_k=3),
]
each_loss = pytest.mark.parametrize("loss", ROW_LOSSES)


def draw(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def differentiate(loss, student, teacher, **kwargs):
    student = student.detach().clone().requires_grad_()
    values = loss(student, teacher, **kwargs)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def restate(loop, student, teacher):
    """Values and gradients of the loops, list by list."""
    flat = [rows.detach().double().flatten(0, -2).tolist() for rows in (student, teacher)]
    results = [reference.value_and_gradient(lambda s, t=t: loop(s, t), s) for s, t in zip(*flat, strict=True)]
    values = torch.tensor([value for value, _ in results], dtype=torch.float64)
    gradients = torch.tensor([gradient for _, gradient in results], dtype=torch.float64)
    return values.view(student.shape[:-1]), gradients.view(student.shape)


SHAPES = [(7, 2), (5, 3), (2, 3, 4), (3, 9), (1, 37)]


class TestParity:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @each_case
    def test_value_and_gradient(self, case, shape, dtype, tolerance):
        student, teacher = draw(*shape, dtype=dtype)
        for ours, loops in zip(
            differentiate(case.ours, student, teacher), restate(case.loop, student, teacher), strict=True
        ):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), loops, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("shape", [(64, 2), (64, 8), (16, 300)], ids=str)
    @each_case
    def test_bf16_error_is_at_most_twice_that_of_plain_torch(self, case, shape):
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
    @each_case
    def test_gradcheck(self, case, shape):
        student, teacher = draw(*shape)
        assert torch.autograd.gradcheck(lambda values: case.ours(values, teacher), student)
        assert torch.autograd.gradgradcheck(lambda values: case.ours(values, teacher), student)

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

    def test_no_factor_of_the_squared_temperature(self):
        value, _ = differentiate(group_soft_label_loss, *self.given(), temperature=1e6)
        assert value.item() == pytest.approx(math.log(3), abs=1e-5)


# What must hold whatever the numbers


def close(first, second, tolerance=1e-12):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


class TestInvariants:
    @each_loss
    def test_permuting(self, loss):
        student, teacher = draw(6, 5)
        order = torch.tensor([3, 0, 4, 1, 2])
        value, gradient = differentiate(loss, student, teacher)
        permuted, permuted_gradient = differentiate(loss, student[:, order], teacher[:, order])
        close(permuted, value)
        close(permuted_gradient, gradient[:, order])

    @pytest.mark.parametrize("constants", [(5.0, 0.0), (0.0, -3.0), (-700.0, 900.0)], ids=str)
    @each_loss
    def test_a_constant_on_the_scores(self, loss, constants):
        student, teacher = draw(6, 5)
        shifted = differentiate(loss, student + constants[0], teacher + constants[1])
        for first, second in zip(shifted, differentiate(loss, student, teacher), strict=True):
            close(first, second, 1e-11)

    @each_loss
    def test_gradient_of_a_list_sums_to_zero(self, loss):
        _, gradient = differentiate(loss, *draw(6, 5))
        close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))
        assert gradient.abs().max() > 0.1

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
        rubbish = torch.full((2, 3), fill, dtype=torch.float64)
        value, gradient = differentiate(loss, rubbish, rubbish, mask=torch.zeros(2, 3))
        assert (value == 0).all() and (gradient == 0).all()

    @each_group_loss
    def test_one_member_is_zero_with_zero_gradient(self, loss):
        value, gradient = differentiate(loss, *draw(4, 1))
        assert (value == 0).all() and (gradient == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e4, 1e30])
    @each_loss
    def test_extreme_scores_are_finite(self, loss, size, dtype):
        student = torch.tensor([[size, -size, 0.0], [-size, size, size], [size, size, size]], dtype=dtype)
        for teacher in (student, -student, student.flip(-1)):
            value, gradient = differentiate(loss, student, teacher)
            assert value.isfinite().all() and (value >= 0).all()
            assert gradient.isfinite().all()

    def test_extreme_margins_are_linear(self):
        student, teacher = torch.tensor([[-1e4, 1e4]], dtype=torch.float64), torch.tensor([[1.0, 0.0]]).double()
        value, gradient = differentiate(group_relative_loss, student, teacher)
        assert value.item() == 2e4 and gradient.tolist() == [[-1.0, 1.0]]

    def test_an_infinite_lead_is_worth_nothing(self):
        """And the pairs left out, inf - inf among them, leave no NaN in the gradient."""
        student, teacher = torch.tensor([[INF, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]]).double()
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

    @pytest.mark.parametrize("at_once", [0, 2**18])
    @pytest.mark.parametrize("target_temperature", [0.0, 0.7])
    def test_a_nan_weight_stays_unless_it_is_masked(self, target_temperature, at_once, monkeypatch):
        monkeypatch.setattr("grkd_trl.losses.ranking._MAX_DENSE", at_once)
        student, teacher = draw(2, 4)
        weights, mask = torch.ones(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        weights[:, 3] = NAN
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

    def test_binary_soft_labels(self):
        student, teacher = draw(8, 2)
        chance = (teacher[:, 0] - teacher[:, 1]).sigmoid()
        logit = student[:, 0] - student[:, 1]
        expected = F.binary_cross_entropy_with_logits(logit, chance, reduction="none")
        close(group_soft_label_loss(student, teacher), expected)

    @pytest.mark.parametrize("min_gap", [0.0, 0.5])
    def test_a_group_without_a_pair_is_exactly_zero(self, min_gap):
        student, _ = draw(3, 4)
        teacher = torch.full((3, 4), -1.5, dtype=torch.float64)
        teacher[1] += torch.tensor([0.0, min_gap, min_gap / 2, 0.0])
        value, gradient = differentiate(group_relative_loss, student, teacher, min_gap=min_gap)
        assert (value == 0).all() and (gradient == 0).all()
        value, gradient = differentiate(token_relative_loss, student, teacher, top_k=3, min_gap=min_gap)
        assert (value == 0).all() and (gradient == 0).all()

    def test_only_the_teachers_order_matters_to_ranking(self):
        student, teacher = draw(6, 5)
        close(group_relative_loss(student, teacher.exp()), group_relative_loss(student, teacher), 0)

    @pytest.mark.parametrize("loss", [group_soft_label_loss, token_soft_label_loss])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_identical_models_are_at_the_minimum_of_soft_labels(self, loss, temperature):
        student, _ = draw(6, 5)
        value, gradient = differentiate(loss, student, student.detach(), temperature=temperature)
        distribution = torch.distributions.Categorical(logits=student.detach() / temperature)
        close(value, distribution.entropy())
        close(gradient, torch.zeros_like(gradient))

    def test_gradient_of_soft_labels_is_that_of_forward_kl(self):
        student, teacher = draw(6, 5)
        kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
        (expected,) = torch.autograd.grad(kl.sum(), student)
        close(differentiate(token_soft_label_loss, student, teacher)[1], expected)

    def test_top_k_of_the_whole_vocabulary_is_the_group_loss(self):
        student, teacher = draw(6, 5)
        close(token_relative_loss(student, teacher, top_k=5), group_relative_loss(student, teacher))

    def test_tokens_below_the_top_get_no_gradient(self):
        student, teacher = draw(6, 9)
        _, gradient = differentiate(token_relative_loss, student, teacher, top_k=4)
        assert ((gradient != 0).sum(-1) == 4).all()
        assert (gradient.gather(-1, teacher.topk(5, largest=False).indices) == 0).all()


class TestErrors:
    @each_loss
    def test_shapes(self, loss):
        with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 4\): pass one teacher value"):
            loss(torch.zeros(2, 3), torch.zeros(2, 4))

    @pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
    @each_loss
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
