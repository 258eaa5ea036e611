"""What is refused before groups are made."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

from datasets import Dataset

from .. import data
from ..data import require_chat_template
from ..data.rows import WRITTEN
from ..data.written import check_written
from ..teacher import (
    CalibratedTeacher,
    CallableScorer,
    LazyTeacher,
    LocalTeacher,
    Scorer,
    ServerTeacher,
    Teacher,
    TeacherEnsemble,
    TopKTeacher,
)
from ..teacher.abilities import gives
from ..teacher.topk import require_same_tokenizer


def check_chat_templates(dataset: Dataset, completion_source: str, *roles: Teacher | Scorer | None) -> None:
    """
    Refuse messages for models that cannot read them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompts.
        completion_source (`str`):
            Who writes.
        *roles ([`~teacher.Teacher`] or [`~teacher.Scorer`], *optional*):
            Who reads the prompts.

    Raises:
        `ValueError`: If the prompts are messages and a tokenizer has no chat template.
    """
    has_ids = completion_source == "dataset" and "tokenizer_hash" in dataset.column_names
    if has_ids or isinstance(next((row["prompt"] for row in dataset if row["prompt"]), ""), str):
        return
    for processing_class in _tokenizers(*roles):
        require_chat_template(processing_class)


def check_text_beside_ids(group: dict[str, Any], index: int, *roles: Teacher | Scorer | None) -> None:
    """
    Refuse a group of a dataset whose text was edited beside token ids that a role reads in its place, see
    [`~data.written.check_written`].

    Args:
        group (`dict[str, Any]`):
            Group with the columns of its row.
        index (`int`):
            Row number, for the error.
        *roles ([`~teacher.Teacher`] or [`~teacher.Scorer`], *optional*):
            Who reads it.

    Raises:
        `ValueError`: If it was edited.
    """
    if all(group.get(name) is not None for name in WRITTEN):
        for processing_class in _tokenizers(*roles):
            check_written(processing_class, group, group, index)


def _tokenizers(*roles: Teacher | Scorer | None) -> Iterator[Any]:
    members = [role.teachers.values() if isinstance(role, TeacherEnsemble) else [role] for role in roles]
    for role in chain.from_iterable(members):
        model = role.teacher if isinstance(role, CalibratedTeacher) else role
        if isinstance(model, LocalTeacher | LazyTeacher | ServerTeacher):
            yield model.processing_class


def check_soft_labels(teacher: Teacher | Scorer | None, student: Teacher | None, k: int, *, ask: bool) -> None:
    """
    Refuse token soft labels that cannot be had or used.

    Args:
        teacher ([`~teacher.Teacher`], *optional*):
            Who is to give them.
        student ([`~teacher.Teacher`], *optional*):
            Whose tokens they are for, if it writes.
        k (`int`):
            Tokens at each position.
        ask (`bool`):
            Whether to ask the teacher for so many.

    Raises:
        `ValueError`: If the teacher has none, or reads other tokens than the student.
        [`~teacher.TeacherError`]: If a server gives fewer.
    """
    if teacher is None or "top tokens" not in gives(teacher):
        given = "no teacher was given" if teacher is None else f"`{type(teacher).__name__}` has none"
        raise ValueError(
            f"`soft_labels={k}` stores a teacher's most likely tokens, and {given}. Pass `teacher`: a `LocalTeacher`, a "
            "`ServerTeacher` of vLLM or SGLang, or several of these."
        )
    teacher = cast(TopKTeacher, teacher)
    if isinstance(student, LocalTeacher | LazyTeacher | ServerTeacher):
        require_same_tokenizer(teacher, student.processing_class)
    if ask:
        teacher.check_top_k(k)


def reads_teacher_prompts(scorer: Scorer | None) -> bool:
    """
    Whether scores depend on the column `teacher_prompt`, as far as is known.

    Args:
        scorer ([`~teacher.Scorer`], *optional*):
            Scorer.

    Returns:
        `bool`: `False` without a scorer, and for functions, which are given the column as any other.
    """
    members = scorer.teachers.values() if isinstance(scorer, TeacherEnsemble) else [scorer]
    return not all(member is None or isinstance(member, CallableScorer) for member in members)


def as_scorer(score_fn: Any) -> Scorer:
    """
    A function as a scorer.

    Args:
        score_fn (`Callable` or [`~teacher.Scorer`]):
            Function, or what is a scorer already.

    Returns:
        [`~teacher.Scorer`]: Scorer.
    """
    return score_fn if isinstance(score_fn, Scorer) else CallableScorer(score_fn)


def prepare_prompts(
    dataset: Any, args: Any, processing_class: Any, name: str, teacher_context: float | None = None
) -> Any:
    """
    Check a dataset of prompts, and drop those that leave no room for a completion.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`.
        args ([`GRKDConfig`]):
            Configuration.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        name (`str`):
            Name for messages.
        teacher_context (`float`, *optional*):
            Longest row of the teacher, in tokens, as for [`~data.prepare_prompts`].

    Returns:
        [`~datasets.Dataset`]: The rows that are kept.

    Raises:
        `ValueError`: If a prompt is empty, none is kept, or a `teacher_prompt` does not fit.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("Online groups need a dataset with a length, and got a stream: load it without `streaming`.")
    lengths = {"max_length": args.max_length, "max_completion_length": args.max_completion_length}
    given = {"teacher_context": teacher_context, "num_proc": args.dataset_num_proc, "name": name}
    prepared = data.prepare_prompts(dataset, processing_class, **lengths, **given)
    made = [column for column in ("prompt_ids", "teacher_prompt_ids") if column in prepared.column_names]
    return prepared.remove_columns(made)  # the writer tokenizes
