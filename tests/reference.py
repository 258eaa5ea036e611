"""Each loss again, as plain float64 loops over one list, from the papers: nothing here is shared with the package.

Written for `complex` as for `float`, so that [`value_and_gradient`] differentiates by a complex step, f'(x) =
Im f(x + ih) / h, which subtracts nothing and is exact to the last digits. Members that a mask takes out are not passed.
"""

import math
from cmath import exp, log, sqrt
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


def standardized(values):
    mean = sum(values) / len(values)
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / deviation if deviation else 0.0 for value in values]


def pairwise_family(
    student, teacher, temperature=1.0, target_temperature=1.0, weights=None, min_gap=0.0, standardize=False
):
    """Divergence of the student's preference from the teacher's in each pair, beyond the paper; `weights` of the members."""
    if standardize:
        student, teacher = standardized(student), [value.real for value in standardized(teacher)]
    total, share = 0.0, 0.0
    for i in range(len(teacher)):
        for j in range(i):
            gap, margin = teacher[i] - teacher[j], (student[i] - student[j]) / temperature
            weight = 1.0 if weights is None else weights[i] + weights[j]
            if abs(gap) <= min_gap and not (gap == min_gap == 0 and target_temperature > 0):
                continue
            share += weight
            if target_temperature == 0:
                total += -weight * log_sigmoid(margin if gap > 0 else -margin)
                continue
            for sign in (1, -1):
                target = log_sigmoid(sign * gap / target_temperature)
                total += weight * exp(target).real * (target - log_sigmoid(sign * margin))
    return total / share if share else 0.0


def group_soft_label(student, teacher, temperature=1.0):
    """Equation 3, a completion as the class. An empty group is worth 0."""
    if not teacher:
        return 0.0
    targets, predictions = softmax(teacher, temperature), log_softmax(student, temperature)
    return -sum(target.real * prediction for target, prediction in zip(targets, predictions, strict=True))


def token_soft_label(student, teacher, temperature=1.0):
    """Equation 3 at one position, the next token as the class."""
    return group_soft_label(student, teacher, temperature)


def topk_soft_label(student, top_ids, top_logps, temperature=1.0):
    """Equation 3 over the teacher's k tokens and one class for the rest."""
    logps = log_softmax(student)
    rest = sum(exp(logp) for token, logp in enumerate(logps) if token not in top_ids)
    left_over = 1 - sum(exp(logp) for logp in top_logps)
    return group_soft_label(
        [*(logps[token] for token in top_ids), log(rest)], [*top_logps, log(left_over)], temperature
    )


def doubt_weight(teacher, temperature=1.0):
    """Inverse length of the softened teacher."""
    return 1 / sum(p.real**2 for p in softmax(teacher, temperature)) ** 0.5


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


def alphapo(score, alpha):
    """Reward of AlphaPO, by the probability that the score is the logarithm of."""
    return score if alpha == 0 else (1 - exp(score) ** -alpha) / alpha


def simpo(chosen, rejected, beta, gamma, label_smoothing=0.0, alpha=0.0):
    """Equation 6 of SimPO, of AlphaPO's rewards, for labels that are wrong so often."""
    margin = beta * (alphapo(chosen, alpha) - alphapo(rejected, alpha)) - gamma
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


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


# Relational rivals of classifiers


def pld(student, teacher, label, temperature=1.0):
    """List-wise loss of PLD: the label is chosen first, the others as the teacher ranks them."""
    weights = softmax(teacher, temperature)
    order = [label, *sorted((c for c in range(len(teacher)) if c != label), key=lambda c: -teacher[c])]
    return sum(
        -weights[chosen].real * log_softmax([student[c] for c in order[k:]])[0] for k, chosen in enumerate(order)
    )


def pearson(first, second):
    mean, other = sum(first) / len(first), sum(second) / len(second)
    dot = sum((a - mean) * (b - other) for a, b in zip(first, second, strict=True))
    squares = [sum((a - m) ** 2 for a in values) for values, m in ((first, mean), (second, other))]
    return dot / (sqrt(squares[0]) * sqrt(squares[1]))


def dist(students, teachers, temperature=1.0, inter_weight=1.0, intra_weight=1.0):
    """DIST of each row of a batch; the term between examples is one for all."""
    students, teachers = ([softmax(row, temperature) for row in rows] for rows in (students, teachers))
    classes = list(zip(zip(*students, strict=True), zip(*teachers, strict=True), strict=True))
    intra = 1 - sum(pearson(*columns) for columns in classes) / len(classes)
    inter = [1 - pearson(*rows) for rows in zip(students, teachers, strict=True)]
    return [temperature**2 * (inter_weight * own + intra_weight * intra) for own in inter]


def huber(first, second):
    error = first - second
    return error * error / 2 if abs(error.real) < 1 else error * (1 if error.real > 0 else -1) - 0.5


def minus(first, second):
    return [a - b for a, b in zip(first, second, strict=True)]


def norm(vector):
    return sqrt(sum(a * a for a in vector))


def rkd_distance(students, teachers):
    """Distance-wise RKD of each row: mean over the pairs that it is in."""
    rows = range(len(students))
    relative = []
    for vectors in (students, teachers):
        distances = {(i, j): norm(minus(vectors[i], vectors[j])) for i in rows for j in rows if i != j}
        mean = sum(distances.values()) / len(distances)
        relative.append({pair: distance / mean for pair, distance in distances.items()})
    return [sum(huber(relative[0][i, j], relative[1][i, j]) for j in rows if j != i) / (len(rows) - 1) for i in rows]


def rkd_angle(students, teachers):
    """Angle-wise RKD of each row: mean over the angles at it."""

    def cosine(vectors, j, i, k):
        first, second = minus(vectors[i], vectors[j]), minus(vectors[k], vectors[j])
        return sum(a * b for a, b in zip(first, second, strict=True)) / (norm(first) * norm(second))

    rows, losses = range(len(students)), []
    for j in rows:
        others = [(i, k) for i in rows for k in rows if len({i, j, k}) == 3]
        total = sum(huber(cosine(students, j, i, k), cosine(teachers, j, i, k)) for i, k in others)
        losses.append(total / len(others))
    return losses
