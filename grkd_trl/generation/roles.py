"""Who scores and labels the groups of GRKD, and what is left for a teacher in the training step."""

from typing import Any, NamedTuple

from datasets import Dataset
from transformers.utils import logging

from ..data import as_read, bring_scores, bring_soft_labels, first_rows, parts
from ..teacher import Scorer, TeacherEnsemble, TopKTeacher
from ..teacher.abilities import gives, needs, require
from ..teacher.in_step import TeacherMixture
from .labels import ask_datasets, is_asked


logger = logging.get_logger(__name__)


class Roles(NamedTuple):
    """
    Who does what.

    Args:
        scorer (`Callable` or [`~teacher.Scorer`], *optional*):
            Scores online groups. Without one the teacher of the training step does.
        labeller ([`~teacher.TopKTeacher`], *optional*):
            Gives the most likely tokens of online groups.
        used_for (`list[str]`):
            What the teacher of the training step is for. Empty where none is needed.
    """

    scorer: Any
    labeller: TopKTeacher | None
    used_for: list[str]


def assign_roles(
    args: Any, model: Any, teacher_model: Any, processing_class: Any, completion_fn: Any, score_fn: Any, *datasets: Any
) -> tuple[Roles, list[Any]]:
    """
    Settle where scores and soft labels come from: the data, a teacher that is asked, before training or online, or a model in
    the training step.

    Args:
        args ([`GRKDConfig`]):
            Configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`], *optional*):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Student's tokenizer.
        completion_fn, score_fn (*optional*):
            As in [`GRKDTrainer`].
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets of groups or of prompts.

    Returns:
        `tuple[Roles, list]`: Roles, and the datasets, with what a teacher said of their groups.

    Raises:
        `ValueError`: If a teacher is missing, or cannot give what the loss needs.
    """
    if (completion_fn or score_fn) and not args.online:
        raise ValueError(
            '`completion_fn` and `score_fn` are for online groups: set `completion_source` to "student", "teacher" or '
            '"mixed", or write and score the groups beforehand with `grkd_trl.generation.generate_groups`.'
        )
    need = needs("GRKD", soft_label=args.soft_label, relative_level=args.relative_level)
    given = list(datasets)
    asked = teacher_model if is_asked(teacher_model) else None
    if asked is not None:
        given = _ask_before(args, model, asked, processing_class, need, *datasets)
    labeller: Any = None
    if args.online and need == "top tokens":
        if asked is not None:
            labeller = asked
        elif teacher_model is None and isinstance(score_fn, Scorer) and need in gives(score_fn):
            labeller = score_fn
    if labeller is not None and args.soft_label_top_k is None:
        raise ValueError(
            "`soft_label_top_k=None` is for models in the training step, and `score_fn` is asked for its most likely tokens. Give "
            "their number, or pass `teacher_model`."
        )
    if labeller is not None:
        groups = [row for row in first_rows(*given) if {"completions", "chosen"}.intersection(row)]
        if groups and not all(row.get("teacher_top_ids") is not None for row in groups):
            raise ValueError(
                "A dataset has completions without soft labels, and `score_fn` labels those that are written in training. "
                "Cache its soft labels (`grkd_trl.teacher.cache_soft_labels`), or give its prompts alone."
            )
        labeller.check_top_k(args.soft_label_top_k)
    scorer = score_fn or asked
    for role in (scorer, labeller) if args.online else ():
        _check_online(role, scorer, *given)

    cached = need == "top tokens" and (labeller is not None or bring_soft_labels(*given))
    uses = {
        "scores": scorer is None and not bring_scores(*given),
        "soft labels or ranked tokens": args.needs_teacher_logits and not cached,
        "writing": args.completion_source in ("teacher", "mixed") and completion_fn is None,
    }
    used_for = [name for name, is_used in uses.items() if is_used]
    if used_for and teacher_model is None:
        raise ValueError(
            'No `teacher_model` was given. It is needed for `soft_label="token"` and `relative_level="tokens"`, '
            "and to score groups without `teacher_scores`. Pass a teacher, or score the groups beforehand and set "
            '`soft_label="group"` or `"none"`, or cache the soft labels (`grkd_trl.teacher.cache_soft_labels`).'
        )
    by = scorer if args.online and scorer is not None else teacher_model if uses["scores"] else None
    if args.reads_pair_agreement and by is not None and not isinstance(by, TeacherEnsemble | TeacherMixture):
        raise ValueError(
            f'`pair_weights="agreement"` and `min_pair_agreement` read how far several teachers agree, and a `{type(by).__name__}` '
            "scores alone. Pass several teachers, or leave them at their defaults."
        )
    if uses["writing"] and (asked is not None or "text" not in gives(teacher_model)):
        raise ValueError(
            f"`completion_source={args.completion_source!r}` has the teacher write, and a `{type(teacher_model).__name__}` as "
            '`teacher_model` scores and labels. Set `completion_source="student"`, pass `completion_fn`, or pass a model or its '
            "path."
        )
    if args.online and asked is not None and asked is not scorer and asked is not labeller:
        logger.warning("`teacher_model` is used for no group that is written in training: `score_fn` scores them.")
    if teacher_model is not None and asked is None:
        say = logger.info if used_for else logger.warning  # a teacher that is named is expected to do something
        say(f"`teacher_model` is used for {' and '.join(used_for) or 'nothing: the data has all it gives'}.")
    return Roles(scorer, labeller, used_for), given


def _ask_before(args: Any, model: Any, teacher: Any, processing_class: Any, need: str, *datasets: Any) -> list[Any]:
    """What a teacher says of the groups that the data has, of which online training has some to evaluate on."""
    labelled = need == "top tokens"
    needed = not bring_scores(*datasets) or need != "scores" and not bring_soft_labels(*datasets)
    if not needed and not args.online:
        logger.warning("`teacher_model` is used for nothing: the data has all it gives.")
        return list(datasets)
    require(teacher, need, by="`GRKDTrainer` with these losses")
    return ask_datasets(
        args, model, teacher, processing_class, *datasets, soft_labels=args.soft_label_top_k if labelled else None
    )


def _check_online(teacher: Any, scorer: Any, *datasets: Any) -> None:
    if not isinstance(teacher, TeacherEnsemble):
        return
    if teacher.min_agreement > 0 and teacher is not scorer:
        raise ValueError(
            f"`min_agreement={teacher.min_agreement}` drops groups whose scores disagree, and online `score_fn` scores in the place "
            "of these teachers. Leave it at 0, or leave `score_fn` out."
        )
    for part in parts(*datasets):
        if isinstance(part, Dataset):  # a stream is refused later
            teacher.check_routes(as_read(part))
