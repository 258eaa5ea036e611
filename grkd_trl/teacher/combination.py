"""What several teachers say of one group as one: scores on one scale, mixed probabilities, and how far they agree."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from datasets import Sequence as ListOf
from datasets import Value


# Columns of how far several teachers agree: on a group, and on each of its pairs `(G, G)`.
AGREEMENT = {"teacher_agreement": Value("float64"), "teacher_pair_agreement": ListOf(ListOf(Value("float64")))}


def _standardized(scores: Sequence[float]) -> list[float]:
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    # Equal scores differ by rounding alone, which must not become an order
    if deviation <= 1e-12 * max(map(abs, scores)):
        return [0.0] * len(scores)
    return [(score - mean) / deviation for score in scores]


def _ranks(scores: Sequence[float]) -> list[float]:
    if len(scores) == 1:
        return [0.0]
    below = [sum(other < score for other in scores) - sum(other > score for other in scores) for score in scores]
    return [count / (len(scores) - 1) for count in below]


SCALES = {"standardized": _standardized, "ranks": _ranks}


def combine_scores(
    scores: Mapping[str, Sequence[float]], weights: Mapping[str, float], *, combine: str
) -> list[float]:
    """
    Scores of one group by several teachers as one: each teacher's are brought to one scale, then averaged.

    Args:
        scores (`Mapping[str, Sequence[float]]`):
            For each teacher its scores of the G completions, in any unit.
        weights (`Mapping[str, float]`):
            Weight of each teacher, above 0. Only their ratios matter.
        combine (`str`):
            `"standardized"`: less their mean and divided by their standard deviation over the group, so how far apart
            completions are counts. `"ranks"`: from -1 for the worst to 1 for the best, ties in the middle, so only the order
            counts.

    Returns:
        `list[float]`: G scores. NaN where a teacher has none; such a completion takes no part in the scale of the others.

    Example:

    ```python
    >>> from grkd_trl.teacher import combine_scores

    >>> scores = {"model": [-0.5, -1.5, -2.5], "tests": [0.0, 1.0, 0.0]}
    >>> combine_scores(scores, {"model": 0.5, "tests": 0.5}, combine="ranks")
    [0.25, 0.5, -0.75]

    ```
    """
    size = len(next(iter(scores.values())))
    kept = [index for index in range(size) if all(math.isfinite(values[index]) for values in scores.values())]
    combined = [math.nan] * size
    if kept:
        total = math.fsum(weights[name] for name in scores)
        scaled = {name: SCALES[combine]([values[index] for index in kept]) for name, values in scores.items()}
        for position, index in enumerate(kept):
            mean = math.fsum(weights[name] * scaled[name][position] for name in scores) / total
            # Opposite scores cancel but for rounding, which must not become an order
            combined[index] = round(mean, 12)
    return combined


def agreement(scores: Mapping[str, Sequence[float]]) -> float:
    """
    Share of the pairs of a group's completions that two teachers order alike, of those that neither ties, over every two
    teachers.

    Args:
        scores (`Mapping[str, Sequence[float]]`):
            For each teacher its scores of the G completions. A completion without a finite one is left out.

    Returns:
        `float`: 0 to 1. 1 where no two teachers order a pair.
    """
    size = len(next(iter(scores.values())))
    kept = [index for index in range(size) if all(math.isfinite(values[index]) for values in scores.values())]
    orders = [
        [(values[i] > values[j]) - (values[i] < values[j]) for i, j in combinations(kept, 2)]
        for values in scores.values()
    ]
    alike = [
        ours == theirs
        for both in combinations(orders, 2)
        for ours, theirs in zip(*both, strict=True)
        if ours != 0 and theirs != 0
    ]
    return sum(alike) / len(alike) if alike else 1.0


def pair_agreement(
    scores: Mapping[str, Sequence[float]], weights: Mapping[str, float], combined: Sequence[float]
) -> list[list[float]]:
    """
    How far several teachers agree on each pair of a group: of those that order it, the share that orders it as the combined
    scores do.

    Args:
        scores (`Mapping[str, Sequence[float]]`):
            For each teacher its scores of the G completions.
        weights (`Mapping[str, float]`):
            Weight of each teacher in the share, above 0. Only their ratios matter.
        combined (`Sequence[float]`):
            Their G scores as one, see [`combine_scores`].

    Returns:
        `list[list[float]]`: G rows of G shares, 0 to 1, symmetric. 1 where no teacher orders the pair; 0 where the combined
        scores tie it and a teacher does not; NaN beside a completion that has no combined score.

    Example:

    ```python
    >>> from grkd_trl.teacher.combination import pair_agreement

    >>> scores = {"a": [2.0, 1.0, 0.0], "b": [2.0, 0.0, 1.0]}
    >>> pair_agreement(scores, {"a": 0.75, "b": 0.25}, [2.0, 0.75, 0.25])
    [[1.0, 1.0, 1.0], [1.0, 1.0, 0.75], [1.0, 0.75, 1.0]]

    ```
    """
    size = len(combined)
    shares = [[1.0] * size for _ in range(size)]
    for i, j in combinations(range(size), 2):
        orders = {name: (own[i] > own[j]) - (own[i] < own[j]) for name, own in scores.items()}
        order = (combined[i] > combined[j]) - (combined[i] < combined[j])
        total = math.fsum(weights[name] for name in scores if orders[name] != 0)
        if not (math.isfinite(combined[i]) and math.isfinite(combined[j])):
            shares[i][j] = shares[j][i] = math.nan
        elif total > 0:
            alike = math.fsum(weights[name] for name in scores if orders[name] == order != 0)
            shares[i][j] = shares[j][i] = alike / total
    return shares


def mix_top_tokens(
    given: Mapping[str, tuple[Sequence[int], Sequence[float]]], weights: Mapping[str, float], k: int
) -> tuple[list[int], list[float]]:
    """
    Most likely tokens of a weighted mixture of several teachers' next-token distributions, from the most likely tokens of
    each. A token that a teacher does not name has probability 0 in its share, which then counts among the others, see
    [`~losses.topk_soft_label_loss`]: exact where each names its whole vocabulary, and else too low by less than the
    probability of the last token that the teacher names.

    Args:
        given (`Mapping[str, tuple[Sequence[int], Sequence[float]]]`):
            For each teacher its k most likely tokens at one position, and their log-probabilities, in nats.
        weights (`Mapping[str, float]`):
            Weight of each teacher, above 0. Only their ratios matter.
        k (`int`):
            Tokens to keep.

    Returns:
        `tuple[list[int], list[float]]`: k tokens, the most likely first, and their log-probabilities.

    Example:

    ```python
    >>> from math import log
    >>> from grkd_trl.teacher.combination import mix_top_tokens

    >>> given = {"a": ([3, 5], [log(0.5), log(0.25)]), "b": ([5, 8], [log(0.75), log(0.125)])}
    >>> mix_top_tokens(given, {"a": 0.5, "b": 0.5}, k=2)[0]  # of probability 0.5 and 0.25
    [5, 3]

    ```
    """
    total = math.fsum(weights[name] for name in given)
    parts: dict[int, list[float]] = {}
    for name, (ids, logps) in given.items():
        for token, logp in zip(ids, logps, strict=True):
            parts.setdefault(token, []).append(weights[name] / total * math.exp(logp))
    mixed = sorted(
        ((math.fsum(shares), token) for token, shares in parts.items()), key=lambda pair: (-pair[0], pair[1])
    )
    return [token for _, token in mixed[:k]], [math.log(chance) if chance else -math.inf for chance, _ in mixed[:k]]
