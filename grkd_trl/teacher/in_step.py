"""Several teachers of the training step, whose whole next-token distributions the student learns the mixture of."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .ensemble import TeacherEnsemble, read_route
from .lazy import LazyTeacher
from .local import LocalTeacher
from .topk import require_same_tokenizer


@dataclass(frozen=True)
class TeacherMixture:
    """
    Several models for the training step, all in memory at once.

    Args:
        models (`dict[str, str or PreTrainedModel]`):
            Hub id, path or model of each teacher by name.
        init_kwargs (`dict[str, dict]`):
            For `from_pretrained` of those that are ids or paths.
        weights (`dict[str, float]`):
            Weight of each, above 0, 1 in sum.
        combine (`str`):
            How their scores of a group are combined, see [`~teacher.combination.combine_scores`].
        route_column (`str`, *optional*):
            Column that says which of them read a row.
    """

    models: dict[str, str | PreTrainedModel]
    init_kwargs: dict[str, dict[str, Any]]
    weights: dict[str, float]
    combine: str
    route_column: str | None


def as_mixture(
    ensemble: TeacherEnsemble, processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> TeacherMixture:
    """
    Several teachers as models of the training step.

    Args:
        ensemble ([`TeacherEnsemble`]):
            Teachers.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Student's tokenizer, whose tokens all of them read.

    Returns:
        [`TeacherMixture`]: The teachers.

    Raises:
        `ValueError`: If one is no model or has another tokenizer, or groups are dropped.
    """
    need = "`soft_label_top_k=None` has all teachers in the training step"
    if ensemble.min_agreement > 0:
        raise ValueError(
            f"{need}, which drops no group, and `min_agreement` is {ensemble.min_agreement}. Leave it at 0, or give a number of "
            "tokens."
        )
    models, init_kwargs = {}, {}
    for name, teacher in ensemble.teachers.items():
        if not isinstance(teacher, LazyTeacher | LocalTeacher):
            raise ValueError(
                f"{need}, and the teacher {name!r} is a `{type(teacher).__name__}`. Pass a model or its path, or give a number of "
                "tokens."
            )
        models[name] = teacher.model
        init_kwargs[name] = dict(getattr(teacher, "init_kwargs", None) or {})
    teachers: Any = ensemble
    require_same_tokenizer(teachers, processing_class)
    weights = {name: ensemble.weights[name] for name in models}  # which may have been given in another order
    return TeacherMixture(models, init_kwargs, weights, ensemble.combine, ensemble.route_column)


def refuse_own_setup(teacher: Any, name: str, processing_class: Any | None) -> None:
    """
    Refuse what a teacher was set up with and the training step would not read: it places its models by itself, and has them read
    the student's tokens.

    Args:
        teacher ([`LazyTeacher`] or [`LocalTeacher`]):
            Teacher, as the user made it. Any other is accepted.
        name (`str`):
            Its name, for the error.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer, whose chat template the step uses. `None` where it uses none.

    Raises:
        `ValueError`: If it has a device or a way of loading of its own, or another chat template; the message names it.
    """
    need = f"With `soft_label_top_k=None` the trainer loads and places the teacher {name!r} beside the student"
    if isinstance(teacher, LazyTeacher) and (teacher.device is not None or teacher.loading is not nullcontext):
        raise ValueError(
            f"{need}: leave out its `device` and `loading`, or set `soft_label_top_k` to a number of tokens."
        )
    if processing_class is None or not isinstance(teacher, LazyTeacher | LocalTeacher):
        return
    theirs, ours = (
        getattr(own, "tokenizer", own).chat_template for own in (teacher.processing_class, processing_class)
    )
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"{need}, where it reads the student's tokens, and its tokenizer has another chat template. Pass it the student's "
            "tokenizer as `processing_class`, set `chat_template_path`, which is the template of both, or set `soft_label_top_k` to a number of tokens."
        )


def share_row(row: dict[str, Any], index: int, *, column: str, weights: dict[str, float]) -> dict[str, list[float]]:
    """
    Shares of the teachers in what the student learns of a row.

    Args:
        row (`dict[str, Any]`):
            Row of a dataset.
        index (`int`):
            Row number, for the error.
        column (`str`):
            Column that says which teachers read the row.
        weights (`dict[str, float]`):
            Weight of each teacher by name.

    Returns:
        `dict[str, list[float]]`: `teacher_shares`, one a teacher in the order of `weights`, 1 in sum and 0 of those that do not read
        it.

    Raises:
        `ValueError`: If there is no such column, or it names an unknown teacher; the message names the row.
    """
    names = read_route(row, index, column=column, teachers=weights)
    total = math.fsum(weights[name] for name in names)
    return {"teacher_shares": [weights[name] / total if name in names else 0.0 for name in weights]}
