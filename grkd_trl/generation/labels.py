"""Teachers that are asked, and not run in the training step: before training for all groups, or online for each step's."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, Value
from datasets import Sequence as ListOf
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..data import as_read, bring_scores, bring_soft_labels, first_rows, parts, read_group
from ..data.images import has_image_columns
from ..data.teacher_prompts import PROMPT_HASHES, check_made_with, record_prompts
from ..teacher import (
    LazyTeacher,
    LocalTeacher,
    Scorer,
    ServerTeacher,
    TeacherEnsemble,
    load_teacher,
    loading_whole,
    tokenizer_of,
)
from ..teacher.combination import AGREEMENT
from ..teacher.in_step import as_mixture, refuse_own_setup
from ..teacher.loading import load_processor, read_chat_template, with_remote_code
from ..teacher.topk import SOFT_LABELS, put_column, require_same_tokenizer
from .checks import check_chat_templates, reads_teacher_prompts
from .core import PER_COMPLETION, ask_teachers, keep


logger = logging.get_logger(__name__)

_MADE = {"teacher_scores": ListOf(Value("float64")), **AGREEMENT, **SOFT_LABELS}
_PREFERENCE = {"chosen", "rejected", "score_chosen", "score_rejected"}


def processor_of(
    teacher_model: str | PreTrainedModel, args: Any, model: Any, processing_class: Any, *datasets: Any
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    Tokenizer of a teacher that reads groups by itself, with the template of `args.teacher_chat_template`.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Teacher.
        args ([`~transformers.TrainingArguments`]):
            The method's configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, whose tokenizer stands in where the teacher has none.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer.
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            What it will read.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]: Its processor where there are images.
    """
    init_kwargs = with_remote_code(args.teacher_model_init_kwargs, args)
    try:
        tokenizer = tokenizer_of(teacher_model, None, init_kwargs)
    except (OSError, ValueError):
        student_kwargs = with_remote_code(args.model_init_kwargs, args)
        tokenizer = tokenizer_of(model, None, student_kwargs) if processing_class is None else processing_class
    if any(map(has_image_columns, first_rows(*datasets))):
        tokenizer = load_processor(teacher_model, processing_class, init_kwargs)
    else:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if args.teacher_chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)  # which may be the student's
        tokenizer.chat_template = read_chat_template(args.teacher_chat_template)
    return tokenizer


def is_asked(teacher: Any) -> bool:
    """
    Whether a teacher is asked for scores and most likely tokens, where a model or path is run in the training step.

    Args:
        teacher (`Any`):
            `teacher_model` of a trainer.

    Returns:
        `bool`: `True` for a [`~teacher.Scorer`].
    """
    return not isinstance(teacher, str | PreTrainedModel | PeftModel) and isinstance(teacher, Scorer)


def refuse_student(teacher: Any, model: Any) -> None:
    """
    Refuse the student, or the base that holds its adapters, as a teacher that is frozen in place.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            Teacher.
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.

    Raises:
        `ValueError`: If they are one object.
    """
    own = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    if not isinstance(teacher, str) and any(teacher is part for part in own):
        raise ValueError(
            "`model` and a teacher cannot be the same object, nor the teacher the base of `model`: the teacher is frozen, and the "
            "student's adapters would be with it. Pass the teacher's path, or load it again."
        )


def as_teacher(teacher: Any, args: Any, model: Any, processing_class: Any, *datasets: Any) -> Any:
    """
    `teacher_model` of a trainer with several teachers as one. A column `teacher` of the data routes its rows.

    Args:
        teacher (`Any`):
            As it was given: a hub id, path or model, a [`~teacher.Scorer`], or a list of these or a mapping from names.
        args ([`~transformers.TrainingArguments`]):
            The method's configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Student's tokenizer, for teachers that have none.
        *datasets:
            Datasets of the trainer.

    Returns:
        `Any`: The teacher, of a list or mapping a [`~teacher.TeacherEnsemble`], whose paths and models take turns in memory,
        or all stay in it where groups are made online. With `soft_label_top_k=None` of several a
        [`~teacher.in_step.TeacherMixture`].

    Raises:
        `ValueError`: If a field of `args` would be read by no teacher, a teacher scores by another mean than `args.score`, the
            student is among them, or a teacher that is asked is to give whole distributions.
    """
    if isinstance(teacher, Mapping | list | tuple):
        named = (
            dict(teacher) if isinstance(teacher, Mapping) else {str(place): own for place, own in enumerate(teacher)}
        )
    else:
        named = dict(teacher.teachers) if isinstance(teacher, TeacherEnsemble) else {"": teacher}
    several, whole = isinstance(teacher, Mapping | list | tuple), getattr(args, "soft_label_top_k", 1) is None
    if several or is_asked(teacher):
        for own in named.values():
            refuse_student(own.model if isinstance(own, LocalTeacher | LazyTeacher) else own, model)
    if not several and not is_asked(teacher):
        return teacher
    for name, own in named.items():
        _check_score(own, name, args)
    unread = {
        "teacher_chat_template": args.teacher_chat_template is not None,
        "teacher_sharding": not whole and getattr(args, "teacher_sharding", "auto") != "auto",
        "teacher_model_init_kwargs": args.teacher_model_init_kwargs
        and not (several and any(isinstance(own, str) for own in named.values())),
    }
    names = [f"`{name}`" for name, is_set in unread.items() if is_set]
    if names:
        raise ValueError(
            f"{', '.join(names)} is set, and is read for a `teacher_model` that is a model or its path. Leave it at its default, "
            "and set it up on each teacher (`grkd_trl.teacher.LazyTeacher`, `LocalTeacher`)."
        )
    if several:
        opened = {name: _open(own, args, model, processing_class, *datasets) for name, own in named.items()}
        routed = any("teacher" in row for row in first_rows(*datasets))
        teacher = TeacherEnsemble(opened, route_column="teacher" if routed else None)
    if not whole:
        return teacher
    if not isinstance(teacher, TeacherEnsemble):
        raise ValueError(
            f"`soft_label_top_k=None` is for models in the training step, and a `{type(teacher).__name__}` is asked for its most "
            "likely tokens. Give their number, or pass a model or its path."
        )
    student = processing_class or tokenizer_of(model, None, with_remote_code(args.model_init_kwargs, args))
    messages = any(isinstance(row.get("prompt", row.get("chosen")), list) for row in first_rows(*datasets))
    for name, own in named.items():
        refuse_own_setup(own, name, student if messages and args.chat_template_path is None else None)
    for part in parts(*datasets):
        if isinstance(part, Dataset):  # of a stream, when it is read
            teacher.check_routes(as_read(part))
    return as_mixture(teacher, student)


def _check_score(teacher: Any, name: str, args: Any) -> None:
    if isinstance(teacher, LazyTeacher):
        by = teacher.kwargs.get("score", "mean")
    else:
        by = teacher.score_type if isinstance(teacher, LocalTeacher | ServerTeacher) else None
    if by is not None and by != getattr(args, "score", by):
        raise ValueError(
            f"The teacher{f' {name!r}' if name else ''} scores a completion by the {by} of its log-probabilities, and "
            f'`score="{args.score}"`. Pass `score="{args.score}"` to the teacher too (a path in a `TeacherEnsemble` as '
            f'`LazyTeacher(path, score="{args.score}")`).'
        )


def _open(teacher: Any, args: Any, model: Any, processing_class: Any, *datasets: Any) -> Any:
    if not isinstance(teacher, str | PreTrainedModel | PeftModel):
        return teacher
    teacher = cast(Any, teacher)
    processor = processor_of(teacher, args, model, processing_class, *datasets)
    init_kwargs, loading = with_remote_code(args.teacher_model_init_kwargs, args), partial(loading_whole, args)
    options: dict[str, Any] = {
        "score": getattr(args, "score", "mean"),
        "prompt_sharing": getattr(args, "prompt_sharing", "auto"),
    }
    if not getattr(args, "online", False) or args.soft_label_top_k is None:
        progress = not args.disable_tqdm
        device: dict[str, Any] = {"device": args.device, "loading": loading, "progress": progress}
        return LazyTeacher(teacher, processor, init_kwargs=init_kwargs, **device, **options)
    with loading():
        loaded: Any = load_teacher(teacher, init_kwargs)
    return LocalTeacher(loaded if hasattr(loaded, "hf_device_map") else loaded.to(args.device), processor, **options)


def ask_datasets(
    args: Any,
    model: Any,
    teacher: Any,
    processing_class: Any,
    *datasets: Dataset | IterableDataset | dict[str, Dataset] | None,
    soft_labels: int | None = None,
    min_completions: int = 2,
) -> list[Any]:
    """
    Have a teacher score groups that have no scores, and give the most likely tokens of those that have none, once and before
    the student is loaded. A completion that it does not score is dropped, and so is a group with too few left. Several
    processes share the work.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The method's configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, whose tokenizer soft labels are for.
        teacher ([`~teacher.Scorer`]):
            Teacher, with top tokens where these are asked for.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Student's tokenizer.
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets of groups.
        soft_labels (`int`, *optional*):
            Most likely tokens at each position. Without, scores alone are asked for.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group.

    Returns:
        `list`: The datasets, with `teacher_scores`, and with the columns of [`~teacher.cache_soft_labels`].

    Raises:
        `ValueError`: If a dataset streams, a row is no group or names an unknown teacher, the tokenizers differ, or no group
            is left.
    """

    def lacks(part):
        if not any({"completions", "chosen"}.intersection(row) for row in first_rows(part)):
            return False, False  # prompts
        return not bring_scores(part), soft_labels is not None and not bring_soft_labels(part)

    asked = [part for dataset in datasets for part in parts(dataset) if any(lacks(part))]
    for part in asked:
        if isinstance(part, IterableDataset):
            raise ValueError(
                "A dataset that streams cannot be scored before training. Load it whole, or make its groups beforehand "
                "(`grkd_trl.generation.generate_groups`)."
            )
        check_chat_templates(part, "dataset", teacher)
        if isinstance(teacher, TeacherEnsemble):
            teacher.check_routes(as_read(part))
    if asked and any(bring_scores(part) or bring_soft_labels(part) for dataset in datasets for part in parts(dataset)):
        logger.warning(
            "`teacher_model` is asked for what is missing alone: scores and soft labels that a dataset already has stay those of "
            "the teacher that gave them."
        )
    if soft_labels is not None and asked:
        student = processing_class or tokenizer_of(model, None, with_remote_code(args.model_init_kwargs, args))
        require_same_tokenizer(teacher, student)
        teacher.check_top_k(soft_labels)

    def ask(dataset):
        if isinstance(dataset, dict):
            return type(dataset)({name: ask(part) for name, part in dataset.items()})
        scores, labels = lacks(dataset) if isinstance(dataset, Dataset) else (False, False)
        if not scores and not labels:
            return dataset
        kwargs: dict[str, Any] = {"teacher": teacher, "k": soft_labels} if labels else {}
        return _ask(as_read(dataset), teacher if scores else None, kwargs, min_completions)

    return [ask(dataset) for dataset in datasets]


def _ask(dataset: Dataset, scorer: Any, labels: dict[str, Any], min_completions: int) -> Dataset:
    removed = (["teacher_scores", *AGREEMENT] if scorer is not None else []) + (list(SOFT_LABELS) if labels else [])
    dataset = dataset.remove_columns([name for name in removed if name in dataset.column_names])
    groups = []
    for index, row in enumerate(dataset):
        check_made_with(row, index)  # what is kept
        group = read_group(row, index, min_completions=min_completions)
        groups.append({name: value for name, value in row.items() if name not in _PREFERENCE} | group)
    with PartialState().split_between_processes(list(range(len(groups)))) as own:
        made = ask_teachers([groups[row] for row in own], scorer, **labels)
    made = gather_object(made)

    least = min_completions if "completions" in dataset.column_names else 2
    rows = [row for row, (_, kept) in enumerate(made) if len(kept) >= least]
    num_cut = sum(len(kept) < len(group["completions"]) for (_, kept), group in zip(made, groups, strict=True))
    if not rows:
        raise ValueError(
            f"The teacher leaves none of {len(groups)} groups {least} completions: it scored too few, or its teachers agree "
            "too little (`min_agreement`)."
        )
    if num_cut:
        logger.warning(
            f"The teacher did not score all completions of {num_cut} of {len(groups)} groups: those completions are dropped, "
            f"and with them {len(groups) - len(rows)} groups of which fewer than {least} are left."
        )
    dataset = dataset.select(rows)
    for name in (*PER_COMPLETION, "teacher_pair_agreement"):
        if num_cut and name in dataset.column_names:
            cells = [keep({name: own}, made[row][1])[name] for own, row in zip(dataset[name], rows, strict=True)]
            dataset = put_column(dataset, name, cells, dataset.features[name])
    for name, feature in _MADE.items():
        if name in made[0][0]:
            cells = [keep({name: made[row][0][name]}, made[row][1])[name] for row in rows]
            dataset = put_column(dataset, name, cells, feature)
    teachers = (scorer, labels.get("teacher"))
    if any(map(reads_teacher_prompts, teachers)):
        return record_prompts(dataset)
    # A function's scores are of the text, and what was recorded was of others
    of_others = set(PROMPT_HASHES.values()) if "teacher_top_ids" not in dataset.column_names else set()
    return dataset.remove_columns(sorted(of_others.intersection(dataset.column_names)))
