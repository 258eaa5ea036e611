"""Scores from a function: verifiable answers, a reward model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data import is_score
from ..data.rows import WRITTEN
from .protocol import TeacherScores


class CallableScorer:
    """
    A function as the half of a [`Teacher`] that scores, like the reward functions of [`~trl.GRPOTrainer`].

    Args:
        score_fn (`Callable`):
            `score_fn(prompts, completions, **columns) -> list[list[float]]`: a score for each completion of each
            prompt, higher is better, `None` or NaN for a completion to drop. `columns` are the dataset's further
            columns, a value a prompt, and `clipped`.
        in_background (`bool`, *optional*, defaults to `False`):
            Whether online training may call it in a thread, for later steps while earlier ones are trained on: for a function
            that waits for another process and reads nothing that training changes, random generators included.

    Example:

    ```python
    >>> from grkd_trl.teacher import CallableScorer

    >>> def is_right(prompts, completions, answer, **columns):
    ...     return [[float(text == right) for text in group] for group, right in zip(completions, answer)]
    >>> CallableScorer(is_right).score(["2 + 2 = "], [["4", "5"]], columns={"answer": ["4"]}).scores
    [[1.0, 0.0]]

    ```
    """

    def __init__(self, score_fn: Callable[..., list[list[float]]], *, in_background: bool = False):
        self.score_fn, self.in_background = score_fn, in_background

    def describe(self) -> dict[str, Any]:
        """
        Identify this scorer.

        Returns:
            `dict[str, Any]`: Module and name of the function.
        """
        named = self.score_fn if hasattr(self.score_fn, "__qualname__") else type(self.score_fn)
        return {"score_fn": f"{named.__module__}.{named.__qualname__}"}

    def score(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
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
            `ValueError`: If a column has a name that the function is called with already, or the function returns
                anything but a finite number or `None` for each completion of each prompt.
        """
        name, sizes = self.describe()["score_fn"], [len(group) for group in completions]
        columns = {key: values for key, values in (columns or {}).items() if key not in WRITTEN}  # it reads text
        taken = {"prompts", "completions"}.intersection(columns)
        if taken:
            raise ValueError(
                f"The dataset has a column `{min(taken)}`, and `{name}` is called with an argument of that name: the "
                "prompts or completions of the groups. Rename the column."
            )
        given = self.score_fn(prompts=prompts, completions=completions, **columns)
        wanted = (
            "Return a list for each prompt, with one number for each of its completions, higher is better; `None` drops a "
            "completion."
        )
        if not _is_list(given) or not all(map(_is_list, given)) or [len(group) for group in given] != sizes:
            shown = [len(group) if _is_list(group) else group for group in given] if _is_list(given) else given
            raise ValueError(f"`{name}` returned {shown!r:.200} scores for groups of {sizes} completions. {wanted}")
        scores = [[_number(value) for value in group] for group in given]
        for row, group in enumerate(scores):
            for position, value in enumerate(group):
                is_dropped = isinstance(value, float) and math.isnan(value)
                if not is_dropped and not is_score(value):
                    raise ValueError(
                        f"`{name}` returned {value!r} for completion {position} of prompt {row}. An infinite score, one "
                        f"that float32 cannot hold, or text is no score. {wanted}"
                    )
        return TeacherScores(
            [[float(value) for value in group] for group in scores],
            [[0] * size for size in sizes],
            [[False] * size for size in sizes],
        )


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)


def _number(value: Any) -> Any:
    """A Python number of a number of any library, NaN of `None`; the rest as it is, to be refused."""
    value = value.item() if hasattr(value, "item") else value
    return math.nan if value is None else value
