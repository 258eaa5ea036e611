"""The teacher of the training step: checked before it is loaded, and placed beside the student."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._trl import global_then_local_main_first
from ..data import first_rows, read_prompt
from ..losses import aligned_soft_label_loss
from ..scoring.tiles import LOGITS_PER_TILE, core_model
from ..teacher import is_base_of, load_teacher, loading_whole, prepare_teacher, shared_vocabulary, tokenizer_of
from ..teacher.abilities import require
from ..teacher.alignment import align_groups, shared_tokens
from ..teacher.in_step import TeacherMixture, share_row
from ..teacher.loading import init_kwargs_of, read_chat_template, with_remote_code
from ..teacher.models import check_same_images, context_length_of
from .compile import compile_layers
from .mixture import TeachersOfStep


def check_teacher(teacher_model: Any, args: Any, model: Any, processing_class: Any, *, by: str) -> None:
    """
    Refuse a teacher that cannot be run in the training step, before student or teacher is loaded.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.
        args ([`~trainers.GroupConfig`]):
            Configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer.
        by (`str`):
            Name of the trainer, for the error.

    Raises:
        `ValueError`: If there is none, it is no model, or its vocabulary is not the student's.
        `OSError` or `ValueError`: If soft labels are to be aligned and the teacher has no tokenizer.
    """
    if teacher_model is None:
        raise ValueError(
            f"No `teacher_model` was given, and `{by}` learns from its next-token distributions. "
            "Pass a teacher. Without one, `DPOTrainer`, `SimPOTrainer` and `PROTrainer` accept groups with "
            "`teacher_scores`, and `SeqKDTrainer` completions that the teacher wrote."
        )
    require(teacher_model, "logits", by=f"`{by}`")
    if args.aligned:
        tokenizer_of(teacher_model, None, init_kwargs_of(args)["teacher_init_kwargs"])  # or there is nothing to align
        return
    # What is no tokenizer at all is refused by TRL.
    if isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
        for own, init_kwargs in _models_of(teacher_model, args):
            shared_vocabulary(
                model, own, processing_class, **init_kwargs_of(args) | {"teacher_init_kwargs": init_kwargs}
            )


def _models_of(teacher_model: Any, args: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The teacher, or each of several, and how it is loaded."""
    if not isinstance(teacher_model, TeacherMixture):
        return [(teacher_model, init_kwargs_of(args)["teacher_init_kwargs"])]
    return [(own, teacher_model.init_kwargs[name]) for name, own in teacher_model.models.items()]


def context_of(teacher_model: Any, args: Any) -> float | None:
    """
    Longest row that the teacher of the training step reads.

    Args:
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~teacher.in_step.TeacherMixture`], *optional*):
            Teacher.
        args ([`~trainers.GroupConfig`]):
            Configuration.

    Returns:
        `float`, *optional*: Tokens, of several teachers those that all read. `None` without a teacher.
    """
    if teacher_model is None:
        return None
    return min(context_length_of(*own) for own in _models_of(teacher_model, args))


def place_teacher(
    trainer: Any, teacher_model: str | PreTrainedModel | TeacherMixture | None
) -> tuple[torch.nn.Module | None, int | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """
    Load the teacher of the training step and place it beside the student.

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer, its student placed.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~teacher.in_step.TeacherMixture`], *optional*):
            Teacher.

    Returns:
        `tuple`: The teacher, which is the student where its base is the teacher; the number of leading token ids that all share;
        and, where soft labels are aligned, in its place the student's tokens and the teacher's that are the same string, each
        `(K,)`. `None` without a teacher.
    """
    args, student = trainer.args, trainer.model
    if teacher_model is None:
        return None, None, None
    if isinstance(teacher_model, TeacherMixture):
        placed = [_place(trainer, own, init_kwargs) for own, init_kwargs in _models_of(teacher_model, args)]
        teachers, sizes = zip(*placed, strict=True)
        return TeachersOfStep(list(teachers), teacher_model.weights, teacher_model.combine), min(sizes), None
    if is_base_of(student, teacher_model, args):
        shared = _shared_ids(trainer, student) if args.aligned else None
        return student, student.config.get_text_config().vocab_size, shared
    teacher, vocab_size = _place(trainer, teacher_model, with_remote_code(args.teacher_model_init_kwargs, args))
    return teacher, vocab_size, _shared_ids(trainer, teacher) if args.aligned else None


def _place(trainer: Any, teacher_model: str | PreTrainedModel, init_kwargs: dict[str, Any]) -> tuple[Any, int | None]:
    """Load one teacher and place it. Gives the number of leading token ids that it shares with the student, if they are."""
    args, vocab_size = trainer.args, None
    with loading_whole(args) if args.teacher_sharding == "replicated" else nullcontext():
        teacher = load_teacher(teacher_model, init_kwargs)
    if not args.aligned:
        given: dict[str, Any] = init_kwargs_of(args) | {"teacher_init_kwargs": init_kwargs}
        vocab_size = shared_vocabulary(trainer.model, teacher_model, trainer._tokenizer, **given)
        if any(row.get("image_prompt") for row in first_rows(trainer.train_dataset)):
            check_same_images(trainer.processing_class, teacher_model, init_kwargs)
    compile_layers(teacher, trainer.compile_plugin)
    return prepare_teacher(teacher, trainer.accelerator, sharding=args.teacher_sharding), vocab_size


def other_tokenizer(args: Any, teacher_model: Any) -> PreTrainedTokenizerBase | None:
    """
    Tokenizer of the teacher of the training step, where its soft labels are aligned.

    Args:
        args ([`~trainers.GroupConfig`]):
            Configuration.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`], *optional*: Its tokenizer. `None` where it reads the student's tokens.
    """
    if not args.aligned or teacher_model is None:
        return None
    tokenizer = tokenizer_of(teacher_model, None, init_kwargs_of(args)["teacher_init_kwargs"])
    if args.teacher_chat_template is not None:
        tokenizer.chat_template = read_chat_template(args.teacher_chat_template)
    return tokenizer


def routes_of(teacher_model: Any) -> dict[str, Any] | None:
    """
    How rows are routed to several teachers of the training step.

    Args:
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~teacher.in_step.TeacherMixture`], *optional*):
            Teacher.

    Returns:
        `dict[str, Any]`, *optional*: `column` and `weights` for [`~teacher.in_step.share_row`]. `None` where all read every row.
    """
    if not isinstance(teacher_model, TeacherMixture) or teacher_model.route_column is None:
        return None
    return {"column": teacher_model.route_column, "weights": teacher_model.weights}


def for_teacher(trainer: Any, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
    """
    Add what the teacher of the training step needs to tokenized groups: where soft labels are aligned its own tokens, see
    [`~teacher.alignment.align_groups`], and of several that a column routes rows to their shares, see
    [`~teacher.in_step.share_row`].

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups, tokenized with the student's tokenizer.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        args ([`~trainers.GroupConfig`]):
            Configuration.
        name (`str`):
            Name for messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The groups.
    """
    if trainer.teacher_tokenizer is not None:
        limits: dict[str, Any] = {
            "context_length": trainer.teacher_context or math.inf,
            "min_aligned": args.min_aligned,
        }
        both = processing_class, trainer.teacher_tokenizer
        return align_groups(dataset, *both, num_proc=args.dataset_num_proc, name=name, **limits)
    if trainer.teacher_routes is None:  # a column of that name is then the user's own
        names = set(dataset.column_names or ()).intersection(["teacher_shares"])
        return dataset.remove_columns(sorted(names)) if names else dataset
    in_memory = isinstance(dataset, Dataset)
    kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Routing {name} groups"} if in_memory else {}
    with global_then_local_main_first():
        return dataset.map(share_row, with_indices=True, fn_kwargs=trainer.teacher_routes, **kwargs)


def _shared_ids(trainer: Any, teacher: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [core_model(model).config.get_text_config().vocab_size for model in (trainer.model, teacher)]
    rows = first_rows(trainer.train_dataset, trainer.eval_dataset)
    conversational = any(not isinstance(read_prompt(row, 0), str) for row in rows)
    both = trainer.processing_class, trainer.teacher_tokenizer
    pairs = zip(*shared_tokens(*both, conversational=conversational), strict=True)
    known = [pair for pair in pairs if pair[0] < sizes[0] and pair[1] < sizes[1]]
    # On the device once, and not in every tile
    student_ids, teacher_ids = (
        torch.tensor(known, dtype=torch.long, device=trainer.args.device).reshape(-1, 2).unbind(-1)
    )
    return student_ids, teacher_ids


def aligned_losses(
    logits: torch.Tensor,
    rows: slice,
    inputs: dict[str, torch.Tensor],
    teacher_logits: Any,
    shared_ids: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> torch.Tensor:
    """
    [`~losses.aligned_soft_label_loss`] at a tile's tokens that are aligned, and 0 at the others.

    Args:
        logits (`torch.Tensor` of shape `(m, V_S)`):
            Student's logits of some of the batch's M completion tokens.
        rows (`slice`):
            Which these are.
        inputs (`dict[str, torch.Tensor]`):
            Batch, with `aligned_student` and `aligned_teacher`.
        teacher_logits (`torch.Tensor` of shape `(M_T, V_T)` or [`~scoring.tiles.TiledLogits`]):
            The teacher's logits of its own completion tokens.
        shared_ids (`tuple[torch.Tensor, torch.Tensor]`):
            Tokens of each side that are the same string, each `(K,)`.
        temperature (`float`):
            Temperature.

    Returns:
        `torch.Tensor` of shape `(m,)`: Loss of each token.
    """
    within = (inputs["aligned_student"] >= rows.start) & (inputs["aligned_student"] < rows.stop)
    at = (inputs["aligned_student"][within] - rows.start).to(logits.device)
    beside = inputs["aligned_teacher"][within]
    student_ids, teacher_ids = (ids.to(logits.device) for ids in shared_ids)
    given: dict[str, Any] = {"student_ids": student_ids, "teacher_ids": teacher_ids, "temperature": temperature}
    # As many at once as sorting the larger vocabulary leaves room for
    size = max(LOGITS_PER_TILE // max(logits.shape[-1], teacher_logits.shape[-1]), 1)
    losses = torch.cat(
        [
            aligned_soft_label_loss(logits[ours], teacher_logits[theirs].to(logits.device), **given)
            for ours, theirs in zip(at.split(size), beside.split(size), strict=True)
        ]
    )
    return losses.new_zeros(len(logits)).scatter(0, at, losses)
