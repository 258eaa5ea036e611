"""The rivals' losses that are not of one list against `reference.py`, all of them by hand, and where they end."""

import math
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_cases import F64, close, differentiate, draw

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


class TestParity:
    @pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("beta, gamma", [(2.0, 0.5), (10.0, 3.0), (0.1, 0.0), (2.5, -1.0)])
    def test_simpo(self, beta, gamma, label_smoothing, alpha):
        scores, shape = torch.stack(draw(40)).detach(), {"label_smoothing": label_smoothing, "alpha": alpha}
        values, gradient = differentiate(lambda s: simpo_loss(*s, beta=beta, gamma=gamma, **shape), scores)
        for pair in range(40):
            value, by_score = reference.value_and_gradient(
                lambda s: reference.simpo(*s, beta, gamma, **shape), scores[:, pair].tolist()
            )
            assert values[pair].item() == pytest.approx(value, abs=1e-10)
            assert gradient[:, pair].tolist() == pytest.approx(by_score, abs=1e-10)

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
    def test_mixture(self, share):
        student, teacher = (values.detach().log_softmax(-1) for values in draw(30))
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
        functions = [
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
        scores = draw(50)[0].float()
        assert torch.equal(alphapo_rewards(scores, alpha=0.0), scores)
        torch.testing.assert_close(alphapo_rewards(scores, alpha=1e-6), scores, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e4, 1e30])
    def test_extreme_scores_are_finite(self, size, dtype):
        scores = torch.tensor([[-size, 0.0], [0.0, -size]], dtype=dtype)
        value, gradient = differentiate(lambda s: simpo_loss(s[0], s[1], beta=2.0, gamma=0.5), scores)
        assert value.isfinite().all() and gradient.isfinite().all() and (value >= 0).all()


class TestPRO:
    def test_equal_rewards_give_no_gradient(self):
        scores, _ = draw(6, 4)
        value, gradient = differentiate(pro_loss, scores, torch.full((6, 4), -1.5, dtype=F64))
        close(value, torch.full((6,), math.log(4) + math.log(3) + math.log(2), dtype=F64))
        assert (gradient == 0).all()


class TestMiniLLM:
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

    def test_no_token(self):
        assert minillm_returns(torch.zeros(2, 0), torch.zeros(2, 0)).shape == (2, 0)

    def test_constants_get_no_gradient(self):
        values = [row.detach().clone().requires_grad_() for row in (*draw(5), draw(5, seed=1)[0])]
        clipped_policy_loss(*values).sum().backward()
        assert values[0].grad.abs().sum() > 0 and values[1].grad is None and values[2].grad is None


class TestErrors:
    @pytest.mark.parametrize(
        "call, says",
        [
            (lambda: simpo_loss(torch.zeros(2), torch.zeros(3), beta=1.0, gamma=0.0), r"same shape, got \(2,\)"),
            (lambda: simpo_loss(torch.zeros(2), torch.zeros(2), beta=0.0, gamma=0.0), "`beta` must be above 0"),
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
