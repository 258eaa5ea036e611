"""The rivals' losses against `reference.py`, by hand, and what must hold of them whatever the numbers."""

import itertools
import math
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F

from grkd_trl.losses import (
    alphapo_rewards,
    clipped_policy_loss,
    forward_kl,
    group_relative_loss,
    minillm_returns,
    mixture_logps,
    pro_loss,
    reverse_kl,
    simpo_loss,
)


NAN, INF = math.nan, math.inf
F64 = torch.float64

# A loss of the student's values given others, and the loop that restates it.
LISTS = {
    "pro": (pro_loss, reference.pro),
    "pro, order alone": (
        partial(pro_loss, reward_temperature=False),
        partial(reference.pro, reward_temperature=False),
    ),
    "forward_kl": (forward_kl, reference.forward_kl),
    "forward_kl, softened": (partial(forward_kl, temperature=3.0), partial(reference.forward_kl, temperature=3.0)),
    "reverse_kl": (reverse_kl, reference.reverse_kl),
    "reverse_kl, sharpened": (partial(reverse_kl, temperature=0.5), partial(reference.reverse_kl, temperature=0.5)),
}
each_list_loss = pytest.mark.parametrize("ours, loop", LISTS.values(), ids=LISTS)
each_pro = pytest.mark.parametrize(
    "loss", [pro_loss, partial(pro_loss, reward_temperature=False)], ids=["temperatures", "no temperatures"]
)
each_kl = pytest.mark.parametrize("loss", [forward_kl, reverse_kl])


def draw(*shape, seed=0, dtype=F64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, *shape, generator=generator, dtype=F64)).to(dtype)


def differentiate(loss, values, *others, **kwargs):
    values = values.detach().clone().requires_grad_()
    losses = loss(values, *others, **kwargs)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    return losses.detach(), gradient


def close(first, second, tolerance=1e-12):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


class TestParity:
    @pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-10), (torch.float32, 1e-6)], ids=str)
    @pytest.mark.parametrize("shape", [(7, 2), (2, 3, 4), (3, 9)], ids=str)
    @each_list_loss
    def test_lists(self, ours, loop, shape, dtype, tolerance):
        student, teacher = draw(*shape, dtype=dtype, scale=1.0)
        values, gradients = differentiate(ours, student, teacher)
        assert values.dtype == gradients.dtype == dtype
        rows = zip(*(part.double().flatten(0, -2).tolist() for part in (student, teacher)), strict=True)
        expected = [reference.value_and_gradient(lambda s, t=t: loop(s, t), s) for s, t in rows]
        close(values.double().flatten(), torch.tensor([value for value, _ in expected], dtype=F64), tolerance)
        close(gradients.double().flatten(0, -2), torch.tensor([row for _, row in expected], dtype=F64), tolerance)

    @pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("beta, gamma", [(2.0, 0.5), (10.0, 3.0), (0.1, 0.0), (2.5, -1.0)])
    def test_simpo(self, beta, gamma, label_smoothing, alpha):
        scores, shape = draw(40), {"label_smoothing": label_smoothing, "alpha": alpha}
        values, gradient = differentiate(lambda s: simpo_loss(*s, beta=beta, gamma=gamma, **shape), scores)
        for pair in range(40):
            value, by_score = reference.value_and_gradient(
                lambda s: reference.simpo(*s, beta, gamma, **shape), scores[:, pair].tolist()
            )
            assert values[pair].item() == pytest.approx(value, abs=1e-10)
            assert gradient[:, pair].tolist() == pytest.approx(by_score, abs=1e-10)

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
    def test_mixture(self, share):
        student, teacher = draw(30).log_softmax(-1)
        values, gradient = differentiate(lambda s: mixture_logps(s, teacher, teacher_share=share), student)
        for token, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
            value, (slope,) = reference.value_and_gradient(lambda s, t=t: reference.mixture(s[0], t, share), [s])
            assert values[token].item() == pytest.approx(value, abs=1e-10)
            assert gradient[token].item() == pytest.approx(slope, abs=1e-10)

    @pytest.mark.parametrize("length_norm", [True, False])
    @pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
    def test_returns(self, gamma, length_norm):
        rewards, _ = draw(5, 7)
        for row in rewards.tolist():
            ours = minillm_returns(torch.tensor(row, dtype=F64), torch.ones(7), gamma=gamma, length_norm=length_norm)
            assert ours.tolist() == pytest.approx(reference.minillm_returns(row, gamma, length_norm), abs=1e-10)

    @pytest.mark.parametrize("clip_range", [0.2, 0.05, INF])
    def test_policy(self, clip_range):
        (logps, sampling), (advantages, _) = draw(60, scale=0.3), draw(60, seed=1)
        values, gradient = differentiate(clipped_policy_loss, logps, sampling, advantages, clip_range=clip_range)
        rows = zip(logps.tolist(), sampling.tolist(), advantages.tolist(), strict=True)
        expected = [
            reference.value_and_gradient(lambda s, o=o, a=a: reference.clipped_policy(s[0], o, a, clip_range), [s])
            for s, o, a in rows
        ]
        close(values, torch.tensor([value for value, _ in expected], dtype=F64), 1e-10)
        close(gradient, torch.tensor([slope for _, (slope,) in expected], dtype=F64), 1e-10)
        assert (gradient == 0).any() == (clip_range < INF)

    def test_gradcheck(self):
        student, teacher = draw(3, 4)
        student.requires_grad_()
        functions = [
            *(partial(lambda loss, s: loss(s, teacher), ours) for ours, _ in LISTS.values()),
            lambda s: simpo_loss(s, teacher, beta=2.0, gamma=0.5),
            lambda s: simpo_loss(s, teacher, beta=2.0, gamma=0.5, label_smoothing=0.2, alpha=0.3),
            lambda s: alphapo_rewards(s, alpha=-0.7),
            lambda s: mixture_logps(s, teacher, teacher_share=0.2),
            lambda s: minillm_returns(s, torch.ones_like(s), gamma=0.9),
            lambda s: clipped_policy_loss(s, teacher, teacher.flip(0)),
        ]
        for function in functions:
            assert torch.autograd.gradcheck(function, student)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        student, teacher = draw(16, 20, dtype=dtype)
        ones = torch.ones(16, 20)
        for ours in (
            *(ours for ours, _ in LISTS.values()),
            partial(simpo_loss, beta=2.0, gamma=0.5),
            partial(simpo_loss, beta=2.0, gamma=0.5, label_smoothing=0.2, alpha=0.3),
            partial(mixture_logps, teacher_share=0.2),
            lambda s, _: minillm_returns(s, ones),
            lambda s, t: clipped_policy_loss(s, t, t),
        ):
            wide = differentiate(ours, student.float(), teacher.float())
            for value, widened in zip(differentiate(ours, student, teacher), wide, strict=True):
                torch.testing.assert_close(value, widened.to(dtype), rtol=0, atol=0)


class TestByHand:
    def test_simpo(self):
        # 2 (-1 + 1.5) - 0.5 = 0.5: log(1 + e^-0.5); its slope by the margin is -2 (1 - sigmoid(0.5)).
        scores = torch.tensor([-1.0, -1.5], dtype=F64)
        value, gradient = differentiate(lambda s: simpo_loss(s[:1], s[1:], beta=2.0, gamma=0.5), scores)
        assert value.item() == pytest.approx(0.4740770, abs=1e-7)
        assert gradient.tolist() == pytest.approx([-0.7550813, 0.7550813], abs=1e-7)

    def test_pro(self):
        # Rewards 3, 1, 0. k = 1: T = 2 and 3, own 3, s T = 0, 2, -3: log(1 + e^2 + e^-3) = 2.1328452.
        # k = 2: T = 1, own 1, s T = 1 and -1: log(e + e^-1) - 1 = 0.1269280.
        scores, rewards = torch.tensor([0.0, 1.0, -1.0], dtype=F64), torch.tensor([3.0, 1.0, 0.0], dtype=F64)
        assert pro_loss(scores, rewards).item() == pytest.approx(2.1328452 + 0.1269280, abs=1e-6)
        # All T = 1: log(1 + e + e^-1) and log(e + e^-1) - 1.
        value = pro_loss(scores, rewards, reward_temperature=False).item()
        assert value == pytest.approx(1.4076060 + 0.1269280, abs=1e-6)

    def test_divergences(self):
        # Student (1/2, 1/2), teacher (3/4, 1/4): 3/4 log 3/2 + 1/4 log 1/2, and log 2 - (log 3) / 2.
        student, teacher = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([0.75, 0.25], dtype=F64).log()
        assert forward_kl(student, teacher).item() == pytest.approx(0.1308120, abs=1e-7)
        assert reverse_kl(student, teacher).item() == pytest.approx(0.1438410, abs=1e-7)

    def test_no_factor_of_the_squared_temperature(self):
        student, teacher = draw(4, 5)
        close(forward_kl(student, teacher, temperature=2.0), forward_kl(student / 2, teacher / 2))
        close(reverse_kl(student, teacher, temperature=2.0), reverse_kl(student / 2, teacher / 2))

    def test_returns(self):
        # From the last: 4 / 1, (2 + 0.5 * 4) / 2, (1 + 0.5 * 4) / 3; the sums are 4, 4, 3.
        rewards, mask = torch.tensor([1.0, 2.0, 4.0, 7.0]), torch.tensor([1, 1, 1, 0])
        assert minillm_returns(rewards, mask, gamma=0.5).tolist() == [1.0, 2.0, 4.0, 0.0]
        assert minillm_returns(rewards, mask, gamma=0.5, length_norm=False).tolist() == [3.0, 4.0, 4.0, 0.0]

    @pytest.mark.parametrize(
        "ratio, advantage, loss, slope",
        [
            (1.1, 2.0, -2.2, -2.2),  # inside the range
            (1.5, 2.0, -2.4, 0.0),  # gained too much already: clipped
            (1.5, -2.0, 3.0, 3.0),  # must still be taken back
            (0.5, 2.0, -1.0, -1.0),
            (0.5, -2.0, 1.6, 0.0),
        ],
    )
    def test_policy(self, ratio, advantage, loss, slope):
        logp = torch.tensor([math.log(0.3 * ratio)], dtype=F64)
        given = torch.tensor([math.log(0.3)], dtype=F64), torch.tensor([advantage], dtype=F64)
        value, gradient = differentiate(clipped_policy_loss, logp, *given)
        assert value.item() == pytest.approx(loss) and gradient.item() == pytest.approx(slope)


class TestSimPO:
    @pytest.mark.parametrize("tau", [0.1, 1.0, 2.5])
    def test_is_grkd_of_a_group_of_two_without_a_margin(self, tau):
        """With tau = 1 / beta and gamma 0."""
        student, teacher = draw(20, 2)
        best = teacher.argmax(-1, keepdim=True)
        grkd = differentiate(group_relative_loss, student, teacher, temperature=tau)
        simpo = differentiate(
            lambda s: simpo_loss(s.gather(1, best)[:, 0], s.gather(1, 1 - best)[:, 0], beta=1 / tau, gamma=0.0),
            student,
        )
        close(grkd, simpo)

    def test_alpha_goes_to_simpo(self):
        """And does so smoothly, where a power of a probability and a difference would lose all digits."""
        scores = draw(2, 50)[0].float()
        assert torch.equal(alphapo_rewards(scores, alpha=0.0), scores)
        torch.testing.assert_close(alphapo_rewards(scores, alpha=1e-6), scores, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e4, 1e30])
    def test_extreme_scores_are_finite(self, size, dtype):
        scores = torch.tensor([[-size, 0.0], [0.0, -size]], dtype=dtype)
        value, gradient = differentiate(lambda s: simpo_loss(s[0], s[1], beta=2.0, gamma=0.5), scores)
        assert value.isfinite().all() and gradient.isfinite().all() and (value >= 0).all()

    def test_a_constant_on_the_scores(self):
        chosen, rejected = draw(20)
        close(
            simpo_loss(chosen - 50, rejected - 50, beta=2.0, gamma=0.5),
            simpo_loss(chosen, rejected, beta=2.0, gamma=0.5),
            1e-11,
        )


class TestPRO:
    @each_pro
    def test_permuting(self, loss):
        scores, rewards = draw(6, 5)
        order = torch.tensor([3, 0, 4, 1, 2])
        value, gradient = differentiate(loss, scores, rewards)
        permuted, permuted_gradient = differentiate(loss, scores[:, order], rewards[:, order])
        close(permuted, value)
        close(permuted_gradient, gradient[:, order])

    @each_pro
    def test_a_constant_on_the_rewards(self, loss):
        scores, rewards = draw(6, 5)
        close(loss(scores, rewards - 30.0), loss(scores, rewards), 1e-10)

    @pytest.mark.parametrize("fill", [0.0, 1e30, NAN, INF, -INF])
    @each_pro
    def test_masked_is_removed(self, loss, fill):
        scores, rewards = draw(6, 5)
        mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)) > 0.4
        assert mask.sum(-1).unique().numel() > 2
        values, gradients = differentiate(loss, *(x.masked_fill(~mask, fill) for x in (scores, rewards)), mask=mask)
        assert (gradients[~mask] == 0).all()
        for row, present in enumerate(mask):
            value, gradient = differentiate(loss, scores[row, present], rewards[row, present])
            close(values[row], value)
            close(gradients[row, present], gradient)

    @pytest.mark.parametrize("fill", [0.0, NAN, INF])
    @each_pro
    def test_all_masked_is_zero_with_zero_gradient(self, loss, fill):
        rubbish = torch.full((2, 3), fill, dtype=F64)
        value, gradient = differentiate(loss, rubbish, rubbish, mask=torch.zeros(2, 3))
        assert (value == 0).all() and (gradient == 0).all()

    @each_pro
    def test_one_completion_is_zero_with_zero_gradient(self, loss):
        value, gradient = differentiate(loss, *draw(4, 1))
        assert (value == 0).all() and (gradient == 0).all()

    def test_equal_rewards_give_no_gradient(self):
        scores, _ = draw(6, 4)
        value, gradient = differentiate(pro_loss, scores, torch.full((6, 4), -1.5, dtype=F64))
        close(value, torch.full((6,), math.log(4) + math.log(3) + math.log(2), dtype=F64))
        assert (gradient == 0).all()

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e4, 1e15])
    @each_pro
    def test_extreme_scores_are_finite(self, loss, size, dtype):
        """Summed log-probabilities of -1e4, at which a sum of bare exponentials is 0."""
        scores = torch.tensor([[-size, -size / 2, 0.0], [-size, -size, -size], [0.0, -size, -1.0]], dtype=dtype)
        rewards = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 9.0, -4.0]], dtype=dtype)
        for order in (rewards, rewards.flip(-1)):
            value, gradient = differentiate(loss, scores, order)
            assert value.isfinite().all() and (value >= 0).all()
            assert gradient.isfinite().all()

    def test_a_pair_is_the_logistic_loss_of_the_scaled_margin(self):
        scores, rewards = draw(8, 2)
        gap = rewards[:, 0] - rewards[:, 1]
        margin = (scores[:, 0] - scores[:, 1]) * gap.sign()
        close(pro_loss(scores, rewards), -F.logsigmoid(margin * gap.abs()))
        close(pro_loss(scores, rewards, reward_temperature=False), -F.logsigmoid(margin))

    def test_order_alone_is_the_likelihood_of_plackett_and_luce(self):
        scores, rewards = draw(3)
        ranking = rewards.argsort(descending=True).tolist()
        chances = {
            order: math.prod((scores[order[k]].exp() / scores[list(order[k:])].exp().sum()).item() for k in range(3))
            for order in itertools.permutations(range(3))
        }
        assert sum(chances.values()) == pytest.approx(1)
        value = pro_loss(scores, rewards, reward_temperature=False).item()
        assert value == pytest.approx(-math.log(chances[tuple(ranking)]))

    @each_pro
    def test_nan_stays_nan_in_its_group_alone(self, loss):
        scores, rewards = draw(4, 5)
        expected = loss(scores, rewards)
        for broken in (scores, rewards):
            kept, broken[2, 1] = broken[2, 1].item(), NAN
            value = loss(scores, rewards)
            broken[2, 1] = kept
            assert value[2].isnan()
            close(value[[0, 1, 3]], expected[[0, 1, 3]], 0)


class TestDivergences:
    @each_kl
    def test_identical_models_are_at_the_minimum(self, loss):
        student, _ = draw(6, 5)
        for temperature in (0.5, 1.0, 4.0):
            value, gradient = differentiate(loss, student, student, temperature=temperature)
            close(value, torch.zeros_like(value))
            close(gradient, torch.zeros_like(gradient), 1e-15)

    @each_kl
    def test_permuting_and_constants(self, loss):
        student, teacher = draw(6, 5)
        order = torch.tensor([3, 0, 4, 1, 2])
        close(loss(student[:, order] + 40.0, teacher[:, order] - 70.0), loss(student, teacher), 1e-11)

    def test_one_is_the_other_with_the_sides_changed(self):
        student, teacher = draw(6, 5)
        close(forward_kl(student, teacher), reverse_kl(teacher, student))
        assert (forward_kl(student, teacher) - reverse_kl(student, teacher)).abs().min() > 1e-3

    def test_equals_torch(self):
        student, teacher = draw(6, 5)
        log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
        close(forward_kl(student, teacher), F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1))
        close(reverse_kl(student, teacher), F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1))

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e4, 1e30])
    @each_kl
    def test_extreme_logits_are_finite(self, loss, size, dtype):
        student = torch.tensor([[size, -size, 0.0], [-size, size, size], [size, size, size]], dtype=dtype)
        for teacher in (student, -student, student.flip(-1)):
            value, gradient = differentiate(loss, student, teacher)
            assert value.isfinite().all() and gradient.isfinite().all()

    @each_kl
    def test_tokens_that_neither_can_write_do_not_matter(self, loss):
        student, teacher = draw(6, 5)
        absent = torch.full((6, 1), -INF, dtype=F64)
        value, gradient = differentiate(loss, torch.cat([student, absent], 1), torch.cat([teacher, absent], 1))
        close(value, loss(student, teacher))
        close(gradient, torch.cat([differentiate(loss, student, teacher)[1], 0 * gradient[:, :1]], 1))

    @each_kl
    def test_nan_stays_nan_at_its_position_alone(self, loss):
        student, teacher = draw(4, 5)
        student[2, 1] = NAN
        assert loss(student, teacher).isnan().tolist() == [False, False, True, False]


class TestMiniLLM:
    def test_mixture_of_distributions_is_a_distribution(self):
        student, teacher = draw(6, 5).log_softmax(-1)
        close(mixture_logps(student, teacher, teacher_share=0.2).exp().sum(-1), torch.ones(6, dtype=F64))

    def test_mixture_of_impossible_tokens(self):
        student, teacher = torch.tensor([-INF, 0.0, -INF]), torch.tensor([0.0, -INF, -INF])
        expected = [math.log(0.2), math.log(0.8), -INF]
        assert mixture_logps(student, teacher, teacher_share=0.2).tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("fill", [0.0, 5.0, NAN, INF])
    def test_padding_is_in_no_return(self, side, fill):
        rewards, _ = draw(3, 6)
        before, after = {"left": (4, 0), "right": (0, 4), "both": (2, 3)}[side]
        padded = F.pad(rewards, (before, after), value=fill)
        mask = F.pad(torch.ones(3, 6), (before, after))
        for options in ({}, {"gamma": 0.8}, {"length_norm": False}):
            returns = minillm_returns(padded, mask, **options)
            close(returns[:, before : before + 6], minillm_returns(rewards, torch.ones(3, 6), **options))
            assert (returns[mask == 0] == 0).all()

    def test_position_does_not_discount(self):
        """A completion's returns are the same wherever it stands."""
        rewards, _ = draw(4)
        late, mask = F.pad(rewards, (9, 0)), F.pad(torch.ones(4), (9, 0))
        close(minillm_returns(late, mask, gamma=0.5)[9:], minillm_returns(rewards, torch.ones(4), gamma=0.5))

    def test_no_token(self):
        assert minillm_returns(torch.zeros(2, 0), torch.zeros(2, 0)).shape == (2, 0)

    def test_constants_get_no_gradient(self):
        values = [row.clone().requires_grad_() for row in draw(2, 5).flatten(0, 1)[:3]]
        clipped_policy_loss(*values).sum().backward()
        assert values[0].grad.abs().sum() > 0 and values[1].grad is None and values[2].grad is None


class TestErrors:
    @pytest.mark.parametrize("loss", [pro_loss, forward_kl, reverse_kl])
    def test_shapes(self, loss):
        with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 4\)"):
            loss(torch.zeros(2, 3), torch.zeros(2, 4))

    @pytest.mark.parametrize(
        "call, says",
        [
            (lambda: simpo_loss(torch.zeros(2), torch.zeros(3), beta=1.0, gamma=0.0), r"same shape, got \(2,\)"),
            (lambda: simpo_loss(torch.zeros(2), torch.zeros(2), beta=0.0, gamma=0.0), "`beta` must be above 0"),
            (
                lambda: pro_loss(torch.zeros(2), torch.zeros(2), mask=torch.ones(3)),
                "`mask` must have the scores' shape",
            ),
            (lambda: forward_kl(torch.zeros(2), torch.zeros(2), temperature=0.0), "`temperature` must be above 0"),
            (lambda: reverse_kl(torch.zeros(2), torch.zeros(2), temperature=NAN), "`temperature` must be above 0"),
            (lambda: mixture_logps(torch.zeros(2), torch.zeros(3), teacher_share=0.2), "same shape"),
            (lambda: mixture_logps(torch.zeros(2), torch.zeros(2), teacher_share=1.2), "must lie in 0..1, got 1.2"),
            (lambda: minillm_returns(torch.zeros(2), torch.zeros(3)), "`mask` must have the scores' shape"),
            (lambda: minillm_returns(torch.zeros(2), torch.zeros(2), gamma=1.1), "must lie in 0..1, got 1.1"),
            (lambda: clipped_policy_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1)), "have one shape"),
            (
                lambda: clipped_policy_loss(*torch.zeros(3, 2), clip_range=0.0),
                "`clip_range` must be above 0, got 0.0",
            ),
        ],
    )
    def test_says_what_is_wrong(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()


# A language of every string of up to three letters, small enough to write down: MiniLLM against exact sums over it.

LETTERS, LENGTH, EOS = 3, 3, 0
