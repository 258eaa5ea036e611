"""Each loss again, as plain float64 loops over one list, from the papers: nothing here is shared with the package.

Written for `complex` as for `float`, so that [`value_and_gradient`] differentiates by a complex step, f'(x) =
Im f(x + ih) / h, which subtracts nothing and is exact to the last digits. Members that a mask takes out are not passed.
"""

import math
from cmath import exp, log
from collections.abc import Callable


STEP = 1e-30


def value_and_gradient(loss: Callable[[list], complex], student: list[float]) -> tuple[float, list[float]]:
    """Value of `loss` at `student`, and its derivative by each entry."""
    gradient = []
    for index in range(len(student)):
        shifted = [complex(value, STEP * (position == index)) for position, value in enumerate(student)]
        gradient.append(complex(loss(shifted)).imag / STEP)
    return complex(loss(student)).real, gradient


def log_sigmoid(value):
    if value.real > 0:
        return -log(1 + exp(-value))
    return value - log(1 + exp(value))


def log_softmax(values, temperature=1.0):
    values = [value / temperature for value in values]
    largest = max(value.real for value in values)
    total = sum(exp(value - largest) for value in values)
    return [value - largest - log(total) for value in values]


def softmax(values, temperature=1.0):
    return [exp(value) for value in log_softmax(values, temperature)]


# GRKD


def ranked_pairs(teacher, min_gap=0.0):
    """Equation 1."""
    members = range(len(teacher))
    return [(i, j) for i in members for j in members if teacher[i] - teacher[j] > min_gap]


def group_relative(student, teacher, temperature=1.0, min_gap=0.0):
    """Equation 2, as a mean over the pairs."""
    pairs = ranked_pairs(teacher, min_gap)
    if not pairs:
        return 0.0
    return sum(-log_sigmoid((student[i] - student[j]) / temperature) for i, j in pairs) / len(pairs)


def group_soft_label(student, teacher, temperature=1.0):
    """Equation 3, a completion as the class. An empty group is worth 0."""
    if not teacher:
        return 0.0
    targets, predictions = softmax(teacher, temperature), log_softmax(student, temperature)
    return -sum(target.real * prediction for target, prediction in zip(targets, predictions, strict=True))


def token_soft_label(student, teacher, temperature=1.0):
    """Equation 3 at one position, the next token as the class."""
    return group_soft_label(student, teacher, temperature)


def token_relative(student, teacher, top_k, temperature=1.0, min_gap=0.0):
    """Equations 1 and 2 over the teacher's `top_k` next tokens at one position."""
    top = sorted(range(len(teacher)), key=lambda token: -teacher[token])[:top_k]
    return group_relative([student[i] for i in top], [teacher[i] for i in top], temperature, min_gap)


def alpha(progress, start, end, schedule):
    """Share of the relative loss in equation 4."""
    if schedule == "constant":
        return end
    way = progress if schedule == "linear" else math.sin(math.pi * progress / 2) ** 2
    return (1 - way) * start + way * end


# The rivals


def simpo(chosen, rejected, beta, gamma):
    """Equation 6 of SimPO."""
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


def pro(scores, rewards, reward_temperature=True):
    """Equation 7 of PRO, as its official code has it, or equation 5 where the gaps of rewards do not scale scores."""
    order = sorted(range(len(scores)), key=lambda member: -rewards[member])  # equal rewards keep their order
    loss = 0.0
    for place, k in enumerate(order[:-1]):
        worse = order[place + 1 :]
        scales = [rewards[k] - rewards[i] if reward_temperature else 1.0 for i in worse]
        own = max(scales)
        loss -= log_softmax([scores[k] * own, *(scores[i] * t for i, t in zip(worse, scales, strict=True))])[0]
    return loss


def forward_kl(student, teacher, temperature=1.0):
    """KL from the teacher to the student at one position."""
    student, teacher = log_softmax(student, temperature), log_softmax(teacher, temperature)
    return sum(exp(t).real * (t.real - s) for s, t in zip(student, teacher, strict=True))


def reverse_kl(student, teacher, temperature=1.0):
    """KL from the student to the teacher at one position."""
    student, teacher = log_softmax(student, temperature), log_softmax(teacher, temperature)
    return sum(exp(s) * (s - t.real) for s, t in zip(student, teacher, strict=True))


def mixture(student, teacher, teacher_share):
    """Log-probability of one token under MiniLLM's mixture."""
    return log(teacher_share * exp(teacher) + (1 - teacher_share) * exp(student))


def minillm_returns(rewards, gamma=1.0, length_norm=True):
    """Return of each token of one completion, without padding."""
    returns = []
    for t in range(len(rewards)):
        rest = rewards[t:]
        total = sum(gamma**later * reward for later, reward in enumerate(rest))
        returns.append(total / len(rest) if length_norm else total)
    return returns


def clipped_policy(logp, sampling_logp, advantage, clip_range=0.2):
    """Loss of one token: the larger of the plain and the clipped one."""
    ratio = exp(logp - sampling_logp)
    bounded = min(max(ratio.real, 1 - clip_range), 1 + clip_range)
    clipped = ratio if bounded == ratio.real else bounded
    plain, limited = -advantage * ratio, -advantage * clipped
    return plain if complex(plain).real >= complex(limited).real else limited
