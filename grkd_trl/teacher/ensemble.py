"""Several teachers as one: their scores of a group, made comparable and averaged."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from transformers.utils import logging

from .protocol import Scorer, TeacherScores


logger = logging.get_logger(__name__)


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


_SCALES = {"standardized": _standardized, "ranks": _ranks}


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
        scaled = {name: _SCALES[combine]([values[index] for index in kept]) for name, values in scores.items()}
        for position, index in enumerate(kept):
            combined[index] = math.fsum(weights[name] * scaled[name][position] for name in scores) / total
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


class TeacherEnsemble:
    """
    Several teachers as one [`Scorer`], for [`~generation.generate_groups`]. Each may be a local model, a server, a calibrated
    teacher, a function or another scorer of yours, with a tokenizer of its own: their scores of a group are brought to one
    scale and averaged, see [`combine_scores`]. A `teacher_prompt` is read by those that read one.

    Args:
        teachers (`Mapping[str, Scorer]`):
            Two or more teachers by name.
        weights (`Mapping[str, float]`, *optional*):
            Weight of each, above 0, 1 in sum. Equal ones if not given. Of a row that some score alone, their shares.
        combine (`str`, *optional*, defaults to `"standardized"`):
            `"standardized"` or `"ranks"`, see [`combine_scores`].
        route_column (`str`, *optional*):
            Column that says which teachers score a row: a name, a list of names, or `None` for all.
        min_agreement (`float`, *optional*, defaults to `0.0`):
            Least [`agreement`] of a group's teachers, 0 to 1. A group below gets no score, and is dropped where groups are
            made.

    Raises:
        `ValueError`: If there are fewer than two teachers, or a choice is out of range; while scoring, if a row names an
            unknown teacher, or a teacher does not give one score a completion.

    Example:

    ```python
    >>> from grkd_trl.teacher import CallableScorer, TeacherEnsemble

    >>> short = CallableScorer(lambda prompts, completions, **columns: [[-len(c) for c in g] for g in completions])
    >>> right = CallableScorer(lambda prompts, completions, **columns: [[float("4" in c) for c in g] for g in completions])
    >>> teacher = TeacherEnsemble({"short": short, "right": right}, weights={"short": 0.25, "right": 0.75}, combine="ranks")
    >>> teacher.score(["2 + 2 = "], [["4", "5", "It is 4."]]).scores
    [[0.5, -0.625, 0.125]]

    ```
    """

    def __init__(
        self,
        teachers: Mapping[str, Scorer],
        *,
        weights: Mapping[str, float] | None = None,
        combine: str = "standardized",
        route_column: str | None = None,
        min_agreement: float = 0.0,
    ):
        if len(teachers) < 2:
            raise ValueError(
                f"`teachers` has {len(teachers)} entries: give two or more by name, or use the one alone."
            )
        weights = dict.fromkeys(teachers, 1 / len(teachers)) if weights is None else dict(weights)
        if weights.keys() != teachers.keys():
            raise ValueError(
                f"`weights` are of {sorted(weights)} and `teachers` of {sorted(teachers)}: give each teacher a weight."
            )
        if not all(weight > 0 for weight in weights.values()) or not math.isclose(
            sum(weights.values()), 1, abs_tol=1e-6
        ):
            raise ValueError(
                f"`weights` must be above 0 and come to 1, got {weights}, which come to {sum(weights.values()):g}."
            )
        if combine not in _SCALES:
            raise ValueError(f"`combine` must be one of {sorted(_SCALES)}, got {combine!r}.")
        if not 0 <= min_agreement <= 1:
            raise ValueError(f"`min_agreement` is a share and must lie in 0..1, got {min_agreement}.")
        self.teachers, self.weights, self.combine = dict(teachers), weights, combine
        self.route_column, self.min_agreement = route_column, min_agreement

    def describe(self) -> dict[str, Any]:
        """
        Identify these teachers.

        Returns:
            `dict[str, Any]`: Each teacher's description by name, and how their scores are combined.
        """
        named = ("weights", "combine", "route_column", "min_agreement")
        own = {name: getattr(self, name) for name in named}
        return {"teachers": {name: teacher.describe() for name, teacher in self.teachers.items()}} | own

    def score(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TeacherScores:
        """
        Score completions, teacher after teacher, and combine.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts, as text or messages.
            completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
                A group of completions for each prompt.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns, a value a prompt, which reach every teacher.

        Returns:
            [`TeacherScores`]: NaN for a completion that one of its teachers cannot score, and for a group below
            `min_agreement`. The token counts of a row are those of its first teacher.
        """
        routes = [self._route(columns, row) for row in range(len(prompts))]
        given: list[dict[str, list[float]]] = [{} for _ in prompts]
        num_tokens: list[list[int]] = [[] for _ in prompts]
        surprises = [[False] * len(group) for group in completions]
        for name, teacher in self.teachers.items():
            rows = [row for row, route in enumerate(routes) if name in route]
            if not rows:
                continue
            own = {key: [values[row] for row in rows] for key, values in (columns or {}).items()}
            scored = teacher.score([prompts[row] for row in rows], [completions[row] for row in rows], columns=own)
            for row, scores, counts, surprising in zip(rows, *scored, strict=True):
                if len(scores) != len(completions[row]):
                    raise ValueError(
                        f"The teacher {name!r} gave {len(scores)} scores for the {len(completions[row])} completions of row "
                        f"{row}: a `Scorer` gives one each, in their order, NaN where it has none."
                    )
                given[row][name] = scores
                num_tokens[row] = num_tokens[row] or counts
                surprises[row] = [ours or theirs for ours, theirs in zip(surprises[row], surprising, strict=True)]
        agreements = [agreement(scores) for scores in given]
        if agreements:
            dropped = sum(value < self.min_agreement for value in agreements)
            mean = sum(agreements) / len(agreements)
            logger.info(f"The teachers order {mean:.1%} of the pairs alike; {dropped} of {len(given)} groups dropped.")
        combined = [
            combine_scores(scores, self.weights, combine=self.combine)
            if value >= self.min_agreement
            else [math.nan] * len(group)
            for scores, value, group in zip(given, agreements, completions, strict=True)
        ]
        return TeacherScores(combined, num_tokens, surprises)

    def _route(self, columns: Mapping[str, Sequence[Any]] | None, row: int) -> list[str]:
        if self.route_column is None:
            return list(self.teachers)
        if self.route_column not in (columns or {}):
            raise ValueError(
                f"The dataset has no column `{self.route_column}`, which is to say what teachers score a row. It has "
                f"{sorted(columns or {})}."
            )
        named = (columns or {})[self.route_column][row]
        names = list(self.teachers) if named is None else [named] if isinstance(named, str) else list(named)
        unknown = [name for name in names if name not in self.teachers]
        if unknown or not names:
            raise ValueError(
                f"`{self.route_column}` of row {row} is {named!r}: name one or more of {sorted(self.teachers)}, or `None` for "
                "all."
            )
        return names
