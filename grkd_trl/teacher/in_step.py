"""Several teachers of the training step, whose whole next-token distributions the student learns the mixture of."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .ensemble import TeacherEnsemble
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
    """

    models: dict[str, str | PreTrainedModel]
    init_kwargs: dict[str, dict[str, Any]]
    weights: dict[str, float]
    combine: str


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
        `ValueError`: If one is no model or has another tokenizer, or groups are routed or dropped.
    """
    need = "`soft_label_top_k=None` has all teachers in the training step"
    if ensemble.route_column is not None:
        raise ValueError(
            f"{need}, which reads every row with each, and the column `{ensemble.route_column}` routes rows. Remove the column, or "
            "give a number of tokens."
        )
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
    return TeacherMixture(models, init_kwargs, weights, ensemble.combine)
