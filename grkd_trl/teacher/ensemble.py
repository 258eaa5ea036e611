"""Several teachers as one: their scores of a group, made comparable and averaged, and a mixture of their soft labels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from .combination import SCALES, agreement, combine_scores, mix_top_tokens, pair_agreement
from .lazy import LazyTeacher
from .protocol import Scorer, TeacherScores, TopKTeacher, TopTokens


logger = logging.get_logger(__name__)


class TeacherEnsemble:
    """
    Several teachers as one [`Scorer`], for [`~generation.generate_groups`] and in the place of any trainer's teacher. Each may
    be a local model, a server, a calibrated teacher, a function or another scorer of yours, with a tokenizer of its own: their
    scores of a group are brought to one scale and averaged, see [`combine_scores`]. Where all have the student's vocabulary it
    also gives token soft labels, of the weighted mixture of their probabilities, see [`~teacher.combination.mix_top_tokens`]. A
    `teacher_prompt` is read by those that read one. Of models that are given by path or as models, one is in memory at a time,
    see [`LazyTeacher`].

    Args:
        teachers (`Mapping[str, Scorer]` or `Sequence[Scorer]`):
            Two or more teachers by name; of a list the name is the position. A hub id, path or model stands for a
            [`LazyTeacher`].
        weights (`Mapping[str, float]` or `Sequence[float]`, *optional*):
            Weight of each, above 0, 1 in sum. Equal ones if not given. Of a row that some score alone, their shares.
        combine (`str`, *optional*, defaults to `"standardized"`):
            `"standardized"` or `"ranks"`, see [`combine_scores`].
        route_column (`str`, *optional*):
            Column that says which teachers read a row: a name, a list of names, or `None` for all.
        min_agreement (`float`, *optional*, defaults to `0.0`):
            Least [`~teacher.combination.agreement`] of a group's teachers, 0 to 1. A group below gets no score, and is dropped
            where groups are made.

    Raises:
        `ValueError`: If there are fewer than two teachers, or a choice is out of range; while scoring, if a row names an
            unknown teacher, a teacher does not give one score a completion, or two read other tokens.

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
        teachers: Mapping[str, Scorer | str | PreTrainedModel] | Sequence[Scorer | str | PreTrainedModel],
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        combine: str = "standardized",
        route_column: str | None = None,
        min_agreement: float = 0.0,
    ):
        if len(teachers) < 2:
            raise ValueError(
                f"`teachers` has {len(teachers)} entries: give two or more by name, or use the one alone."
            )
        if not isinstance(teachers, Mapping):
            teachers = {str(position): teacher for position, teacher in enumerate(teachers)}
        if weights is None:
            weights = dict.fromkeys(teachers, 1 / len(teachers))
        elif not isinstance(weights, Mapping):
            weights = {str(position): weight for position, weight in enumerate(weights)}
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
        if combine not in SCALES:
            raise ValueError(f"`combine` must be one of {sorted(SCALES)}, got {combine!r}.")
        if not 0 <= min_agreement <= 1:
            raise ValueError(f"`min_agreement` is a share and must lie in 0..1, got {min_agreement}.")
        self.teachers: dict[str, Any] = {
            name: LazyTeacher(teacher) if isinstance(teacher, str | PreTrainedModel) else teacher
            for name, teacher in teachers.items()
        }
        self.weights, self.combine = dict(weights), combine
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
        return self.ask(prompts, completions, columns=columns)[0].scored

    def top_k(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        k: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TopTokens:
        """
        Score completions and give the k most likely tokens of the teachers' mixture at each position, teacher after teacher.

        Args:
            prompts, completions, columns:
                As in [`TeacherEnsemble.score`].
            k (`int`):
                Tokens that each teacher is asked for, and that are kept.

        Returns:
            [`TopTokens`]: Scores and tokens. None of a completion for which one of its teachers has none.
        """
        self.check_top_k(k)
        return self.ask(prompts, completions, k, columns=columns)[0]

    @property
    def processing_class(self) -> Any:
        """Tokenizer of the first teacher that has one. Whether it is that of all is checked before soft labels are asked for."""
        return next((own for own in map(_tokenizer_of, self.teachers.values()) if own is not None), None)

    def check_top_k(self, k: int) -> None:
        """
        Find out before a run whether every teacher gives k tokens.

        Args:
            k (`int`):
                Tokens at each position.

        Raises:
            `ValueError`: If one gives scores alone; the message names it.
            [`TeacherError`]: If a server gives fewer.
        """
        for name, teacher in self.teachers.items():
            if not isinstance(teacher, TopKTeacher):
                raise ValueError(
                    f"The teacher {name!r} gives scores alone, and token soft labels are a mixture of all. Leave it out, or train "
                    'with `soft_label="group"` or `"none"`.'
                )
            teacher.check_top_k(k)

    def check_routes(self, dataset: Any) -> None:
        """
        Refuse a dataset of which a row names an unknown teacher, before any is asked.

        Args:
            dataset ([`~datasets.Dataset`] or `Sequence[dict]`):
                Rows.

        Raises:
            `ValueError`: If there is no column of routes, or one names an unknown teacher; the message names the row.
        """
        if self.route_column is None:
            return
        if self.route_column in getattr(dataset, "column_names", ()):
            dataset = dataset.select_columns([self.route_column])
        for row, values in enumerate(dataset):
            read_route(values, row, column=self.route_column, teachers=self.teachers)

    def ask(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        k: int | None = None,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[TopTokens, dict[str, list[Any]]]:
        """
        All that the teachers say of P groups, and how far they agree.

        Args:
            prompts, completions, columns:
                As in [`TeacherEnsemble.score`].
            k (`int`, *optional*):
                Tokens at each position; without, none are asked for.

        Returns:
            `tuple[TopTokens, dict[str, list]]`: Scores and tokens, and two values a group: `teacher_agreement`, the
            [`~teacher.combination.agreement`], NaN where one teacher reads it alone, and `teacher_pair_agreement`, see
            [`~teacher.combination.pair_agreement`].
        """
        routes = [list(self.teachers)] * len(prompts)
        if self.route_column is not None:
            rows = [{name: values[row] for name, values in (columns or {}).items()} for row in range(len(prompts))]
            given_by: dict[str, Any] = {"column": self.route_column, "teachers": self.teachers}
            routes = [read_route(values, row, **given_by) for row, values in enumerate(rows)]
        given: list[dict[str, list[float]]] = [{} for _ in prompts]
        tops: list[dict[str, tuple[Any, Any]]] = [{} for _ in prompts]
        num_tokens: list[list[int]] = [[] for _ in prompts]
        token_ids: list[list[list[int]]] = [[] for _ in prompts]
        surprises = [[False] * len(group) for group in completions]
        for name, teacher in self.teachers.items():
            rows = [row for row, route in enumerate(routes) if name in route]
            if not rows:
                continue
            own = {key: [values[row] for row in rows] for key, values in (columns or {}).items()}
            asked = [prompts[row] for row in rows], [completions[row] for row in rows]
            labels = None if k is None else teacher.top_k(*asked, k, columns=own)
            scored = teacher.score(*asked, columns=own) if labels is None else labels.scored
            for place, (row, scores, counts, surprising) in enumerate(zip(rows, *scored, strict=True)):
                if len(scores) != len(completions[row]):
                    raise ValueError(
                        f"The teacher {name!r} gave {len(scores)} scores for the {len(completions[row])} completions of row "
                        f"{row}: a `Scorer` gives one each, in their order, NaN where it has none."
                    )
                given[row][name] = scores
                num_tokens[row] = num_tokens[row] or counts
                surprises[row] = [ours or theirs for ours, theirs in zip(surprises[row], surprising, strict=True)]
                if labels is not None:
                    if token_ids[row] and token_ids[row] != labels.token_ids[place]:
                        raise ValueError(
                            f"The teachers {next(iter(tops[row]))!r} and {name!r} read the completions of row {row} as other "
                            "tokens, so their soft labels are of other positions. Give both one tokenizer and chat template."
                        )
                    token_ids[row] = labels.token_ids[place]
                    tops[row][name] = labels.top_ids[place], labels.top_logps[place]
        combined = [combine_scores(scores, self.weights, combine=self.combine) for scores in given]
        agreements: dict[str, list[Any]] = {
            "teacher_agreement": [agreement(scores) if len(scores) > 1 else math.nan for scores in given],
            "teacher_pair_agreement": [
                pair_agreement(scores, self.weights, own) for scores, own in zip(given, combined, strict=True)
            ],
        }
        scored = TeacherScores(self._drop(combined, agreements["teacher_agreement"]), num_tokens, surprises)
        if k is None:
            return TopTokens(scored, [], [], []), agreements
        mixed = [
            [self._mix(of_row, position, k) for position in range(len(group))]
            for of_row, group in zip(tops, completions, strict=True)
        ]
        top_ids, top_logps = ([[pair[part] for pair in group] for group in mixed] for part in range(2))
        return TopTokens(scored, token_ids, top_ids, top_logps), agreements

    def _drop(self, combined: list[list[float]], agreements: list[float]) -> list[list[float]]:
        """The scores without those of groups below `min_agreement`."""
        known = [value for value in agreements if not math.isnan(value)]
        dropped = [value < self.min_agreement for value in agreements]
        if known:
            mean = sum(known) / len(known)
            logger.info(
                f"The teachers order {mean:.1%} of the pairs alike; {sum(dropped)} of {len(combined)} groups dropped."
            )
        return [
            [math.nan] * len(scores) if is_dropped else scores
            for scores, is_dropped in zip(combined, dropped, strict=True)
        ]

    def _mix(self, tops: dict[str, tuple[Any, Any]], position: int, k: int) -> tuple[list, list]:
        """Most likely tokens of one completion at each of its positions, and their log-probabilities."""
        own = {name: (ids[position], logps[position]) for name, (ids, logps) in tops.items()}
        if any(not ids for ids, _ in own.values()):
            return [], []
        num_tokens = len(next(iter(own.values()))[0])
        at_each = [
            mix_top_tokens({name: (ids[t], logps[t]) for name, (ids, logps) in own.items()}, self.weights, k)
            for t in range(num_tokens)
        ]
        return [ids for ids, _ in at_each], [logps for _, logps in at_each]


def read_route(row: Mapping[str, Any], index: int, *, column: str, teachers: Iterable[str]) -> list[str]:
    """
    Which teachers read a row.

    Args:
        row (`Mapping[str, Any]`):
            Row of a dataset.
        index (`int`):
            Row number, for the error.
        column (`str`):
            Column that names them.
        teachers (`Iterable[str]`):
            Names of all teachers.

    Returns:
        `list[str]`: Names, of all where the cell is `None`.

    Raises:
        `ValueError`: If there is no such column, or it names an unknown teacher or none; the message names the row.
    """
    if column not in row:
        raise ValueError(
            f"The dataset has no column `{column}`, which names the teachers that read a row. It has {sorted(row)}: add it, with `None` "
            "where all read the row."
        )
    named, known = row[column], list(teachers)
    names = known if named is None else list(named) if isinstance(named, list | tuple) else [named]
    if not names or not set(names) <= set(known):
        raise ValueError(
            f"`{column}` of row {index} is {named!r}: name one or more of {sorted(known)}, or `None` for all."
        )
    return list(dict.fromkeys(names))


def _tokenizer_of(teacher: Any) -> Any:
    return teacher.processing_class if isinstance(teacher, TopKTeacher) else None
