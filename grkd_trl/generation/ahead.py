"""Labels that a server gives for later steps while earlier ones are trained on."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..teacher import CallableScorer, Scorer, ServerTeacher, TeacherEnsemble, TopKTeacher
from ..teacher.combination import AGREEMENT
from .core import ask_teachers, keep


def in_background(teacher: Any) -> Any:
    """
    A teacher for a thread beside training.

    Args:
        teacher ([`~teacher.Scorer`], *optional*):
            Teacher.

    Returns:
        [`~teacher.Scorer`], *optional*: A copy of a server's client, or of several teachers that are all served; a function
        that was given as one for a thread. `None` of any other, which computes in this process.
    """
    if isinstance(teacher, ServerTeacher):
        return teacher.beside()
    if isinstance(teacher, TeacherEnsemble):
        members = {name: in_background(member) for name, member in teacher.teachers.items()}
        if None in members.values():
            return None
        own = copy.copy(teacher)
        own.teachers = members
        return own
    return teacher if isinstance(teacher, CallableScorer) and teacher.in_background else None


class LabelsAhead:
    """
    Has parts of groups labelled one after the other, in a thread, while the caller goes on. They are asked for and given in
    their order whatever arrives first, so the labels are those of [`~generation.add_scores`]. One part is under way at a time,
    so no more requests than the teacher's `max_concurrency`.

    Args:
        scorer ([`~teacher.Scorer`]):
            Scorer. One that computes in this process scores all groups at the start, in the caller's thread.
        teacher ([`~teacher.TopKTeacher`], *optional*):
            Gives the token soft labels.
        k (`int`, *optional*):
            Most likely tokens of these at each position.
    """

    def __init__(self, scorer: Scorer, teacher: TopKTeacher | None = None, k: int | None = None):
        self.scorer, self.teacher, self.k = scorer, teacher, k
        self._asked: tuple[Any, Any] | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def is_possible(self) -> bool:
        """Whether the one who is slow, of soft labels the teacher and else the scorer, waits for another process."""
        return in_background(self.teacher or self.scorer) is not None

    def add_scores(self, parts: list[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        """
        Have groups labelled.

        Args:
            parts (`list[list[dict]]`):
                Groups, in the order they are needed in.

        Yields:
            `list[dict]`: The groups of each part as [`~generation.add_scores`] gives them. Waits for them.

        Raises:
            `Exception`: What the teacher raised for a part, when that part is asked for. The later ones are not asked for.
        """
        if self._pool is None:
            teacher = in_background(self.teacher)
            scorer = teacher if self.scorer is self.teacher else in_background(self.scorer)
            self._asked, self._pool = (scorer, teacher), ThreadPoolExecutor(1, "labels")
        assert self._asked is not None
        scorer, teacher = self._asked
        scored: list[Any] = [None] * len(parts)
        if scorer is None:
            scored = [ask_teachers(part, self.scorer) for part in parts]
        futures = [self._pool.submit(ask_teachers, part, scorer, teacher=teacher, k=self.k) for part in parts]
        try:
            for part, own, future in zip(parts, scored, futures, strict=True):
                made = future.result()
                if own is not None:
                    made = [_joined(*both) for both in zip(own, made, strict=True)]
                yield [keep(group | columns, kept) for group, (columns, kept) in zip(part, made, strict=True)]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Stop what is under way, and wait until it has stopped."""
        if self._pool is None:
            return
        for teacher in self._asked or ():
            _stop(teacher)
        self._pool.shutdown(cancel_futures=True)
        self._asked = self._pool = None


def _stop(teacher: Any) -> None:
    for member in teacher.teachers.values() if isinstance(teacher, TeacherEnsemble) else ():
        _stop(member)
    if isinstance(teacher, ServerTeacher):
        teacher.stop()


def _joined(scored, labelled) -> tuple[dict[str, Any], list[int]]:
    (columns, kept), (labels, labelled_ones) = scored, labelled
    labels = {name: values for name, values in labels.items() if name not in AGREEMENT}  # of scores that are not read
    return labels | columns, [position for position in kept if position in labelled_ones]
