"""Scores from a function: verifiable answers, a reward model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .protocol import TeacherScores


class CallableScorer:
    """
    A function as the half of a [`Teacher`] that scores, like the reward functions of [`~trl.GRPOTrainer`].

    Args:
        score_fn (`Callable`):
            `score_fn(prompts, completions, **columns) -> list[list[float]]`: a score for each completion of each
            prompt, higher is better, `None` or NaN for a completion to drop. `columns` are the dataset's further
            columns, a value a prompt.

    Example:

    ```python
    >>> from grkd_trl.teacher import CallableScorer

    >>> def is_right(prompts, completions, answer, **columns):
    ...     return [[float(text == right) for text in group] for group, right in zip(completions, answer)]
    >>> CallableScorer(is_right).score(["2 + 2 = "], [["4", "5"]], columns={"answer": ["4"]}).scores
    [[1.0, 0.0]]

    ```
    """

    def __init__(self, score_fn: Callable[..., list[list[float]]]):
        self.score_fn = score_fn

    def describe(self) -> dict[str, Any]:
        """
        What tells this scorer from another.

        Returns:
            `dict[str, Any]`: Module and name of the function.
        """
        named = self.score_fn if hasattr(self.score_fn, "__qualname__") else type(self.score_fn)
        return {"score_fn": f"{named.__module__}.{named.__qualname__}"}

    def score(
        self,
        prompts: Sequence[str] | Sequence[list[dict[str, str]]],
        completions: Sequence[Sequence[str]] | Sequence[Sequence[list[dict[str, str]]]],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TeacherScores:
        """
        Score completions by the function.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts.
            completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
                A group of completions for each prompt.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns, a value a prompt.

        Returns:
            [`TeacherScores`]: NaN where the function gave `None`; no token counts.

        Raises:
            `ValueError`: If the function gives another number of scores, or an infinite one.
        """
        given = self.score_fn(prompts=prompts, completions=completions, **(columns or {}))
        sizes = [len(group) for group in completions]
        if [len(group) for group in given] != sizes:
            raise ValueError(
                f"`{self.describe()['score_fn']}` returned {[len(group) for group in given]} scores for groups of "
                f"{sizes} completions: return a list for each prompt, with one number for each of its completions."
            )
        scores = [[math.nan if value is None else float(value) for value in group] for group in given]
        if any(math.isinf(value) for group in scores for value in group):
            raise ValueError(
                f"`{self.describe()['score_fn']}` returned an infinite score. Scores are finite, higher is better; "
                "`None` drops a completion."
            )
        return TeacherScores(scores, [[0] * size for size in sizes], [[False] * size for size in sizes])
