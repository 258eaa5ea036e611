"""MiniLLM's losses on a language whose strings can all be listed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from loss_cases import F64, close, differentiate
from scipy.optimize import minimize

from grkd_trl.losses import clipped_policy_loss, minillm_returns, mixture_logps, reverse_kl


INF = float("inf")

# A language of every string of up to three letters, small enough to write down: MiniLLM against exact sums over it.
LETTERS, LENGTH, EOS = 3, 3, 0
STRINGS = [  # of the letters 1..2, each closed by EOS unless cut at three
    (*letters, EOS)[:LENGTH] for size in range(LENGTH + 1) for letters in itertools.product((1, 2), repeat=size)
]


def string_logps(model, strings=STRINGS):
    """Log-probability of each token `(strings, LENGTH)`, its mask, and the logits before it."""
    tokens = torch.tensor([[*string, *[EOS] * (LENGTH - len(string))] for string in strings])
    mask = torch.tensor([[place < len(string) for place in range(LENGTH)] for string in strings])
    logits = torch.stack([torch.stack([model(string[:place]) for place in range(LENGTH)]) for string in strings])
    logps = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(~mask, 0.0), mask, logits


def bigram(table):
    """A language model that sees the last letter alone: it cannot be any teacher."""
    return lambda prefix: table[prefix[-1] if prefix else EOS]


def trie_teacher():
    generator = torch.Generator().manual_seed(5)
    tables = {}
    for size in range(LENGTH):
        for prefix in itertools.product(range(LETTERS), repeat=size):
            tables[prefix] = 1.5 * torch.randn(LETTERS, generator=generator, dtype=F64)
    return lambda prefix: tables[tuple(prefix)]


def exact_reverse_kl(table):
    student, _, _ = string_logps(bigram(table))
    teacher, _, _ = string_logps(trie_teacher())
    return (student.sum(-1).exp() * (student.sum(-1) - teacher.sum(-1))).sum()


def minillm_surrogate(table, *, sampled_from=None):
    """Sum over all strings, each by its chance, of the method's loss: what an average over samples tends to."""
    student, mask, student_logits = string_logps(bigram(table))
    teacher, _, teacher_logits = string_logps(trie_teacher())
    sampling = student.detach() if sampled_from is None else sampled_from
    rewards = (teacher - student).detach()
    returns = minillm_returns(rewards, mask, length_norm=False)
    ahead = F.pad(returns[:, 1:], (0, 1))  # the token's own reward is in the single step
    long_term = clipped_policy_loss(student, sampling, ahead, clip_range=INF)
    single_step = reverse_kl(student_logits, teacher_logits)
    return (sampling.sum(-1).exp() * ((long_term + single_step) * mask).sum(-1)).sum()


class TestToyLanguage:
    TABLE = 0.5 * torch.randn(LETTERS, LETTERS, generator=torch.Generator().manual_seed(1), dtype=F64)

    def test_strings_are_all(self):
        logps, _, _ = string_logps(bigram(self.TABLE))
        assert logps.sum(-1).exp().sum().item() == pytest.approx(1, abs=1e-12)

    def test_gradient_is_that_of_the_exact_reverse_kl(self):
        """Single step and long term together are the policy gradient, equation 3 of the paper, with no term twice."""
        exact = differentiate(exact_reverse_kl, self.TABLE)[1]
        close(differentiate(minillm_surrogate, self.TABLE)[1], exact, 1e-10)

    def test_gradient_against_finite_differences_of_the_surrogate(self):
        """Sampled elsewhere, clipped, normalised: rewards and weights of the samples are constants."""
        start, mask, _ = string_logps(bigram(self.TABLE))
        teacher, _, teacher_logits = string_logps(trie_teacher())
        sampling = mixture_logps(start, teacher, teacher_share=0.2) + 0.0
        returns = minillm_returns((teacher - start).detach(), mask)

        def surrogate(table):
            student, _, student_logits = string_logps(bigram(table))
            long_term = clipped_policy_loss(student, sampling, returns)
            return ((long_term + reverse_kl(student_logits, teacher_logits)) * mask).sum()

        gradient = differentiate(surrogate, self.TABLE)[1]
        for place in itertools.product(range(LETTERS), repeat=2):
            step = torch.zeros_like(self.TABLE)
            step[place] = 1e-6
            slope = (surrogate(self.TABLE + step) - surrogate(self.TABLE - step)) / 2e-6
            assert gradient[place].item() == pytest.approx(slope.item(), abs=1e-7)

    def test_reverse_kl_falls_to_the_optimum_of_an_exact_solver(self):
        def value_and_slope(flat):
            value, gradient = differentiate(exact_reverse_kl, torch.tensor(flat).view(LETTERS, LETTERS))
            return value.item(), gradient.flatten().numpy()

        solved = minimize(value_and_slope, self.TABLE.flatten().numpy(), jac=True, tol=1e-12)
        table = self.TABLE.clone().requires_grad_()
        optimizer = torch.optim.Adam([table], lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=150)
        for _ in range(150):
            optimizer.zero_grad()
            minillm_surrogate(table).backward()
            optimizer.step()
            schedule.step()
        start, end = exact_reverse_kl(self.TABLE).item(), exact_reverse_kl(table).item()
        assert start > solved.fun + 0.1 and solved.fun > 0.01
        assert end == pytest.approx(solved.fun, abs=1e-5)
