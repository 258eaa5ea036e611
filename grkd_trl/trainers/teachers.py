"""The teacher of the training step: checked before it is loaded, and placed beside the student."""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..data import first_rows
from ..teacher import is_base_of, load_teacher, loading_whole, prepare_teacher, shared_vocabulary
from ..teacher.abilities import require
from ..teacher.loading import init_kwargs_of, with_remote_code
from ..teacher.models import check_same_images
from .compile import compile_layers


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
    """
    if teacher_model is None:
        raise ValueError(
            f"No `teacher_model` was given, and `{by}` learns from its next-token distributions. "
            "Pass a teacher. Without one, `DPOTrainer`, `SimPOTrainer` and `PROTrainer` accept groups with "
            "`teacher_scores`, and `SeqKDTrainer` completions that the teacher wrote."
        )
    require(teacher_model, "logits", by=f"`{by}`")
    # What is no tokenizer at all is refused by TRL.
    if isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
        shared_vocabulary(model, teacher_model, processing_class, **init_kwargs_of(args))


def place_teacher(
    trainer: Any, teacher_model: str | PreTrainedModel | None
) -> tuple[torch.nn.Module | None, int | None]:
    """
    Load the teacher of the training step and place it beside the student.

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer, its student placed.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.

    Returns:
        `tuple[torch.nn.Module, int]`: The teacher, which is the student where its base is the teacher, and the number of
        leading token ids that both share. `None` without a teacher.
    """
    args, student = trainer.args, trainer.model
    if teacher_model is None:
        return None, None
    if is_base_of(student, teacher_model, args):
        return student, student.config.get_text_config().vocab_size
    with loading_whole(args) if args.teacher_sharding == "replicated" else nullcontext():
        teacher = load_teacher(teacher_model, with_remote_code(args.teacher_model_init_kwargs, args))
    vocab_size = shared_vocabulary(student, teacher_model, trainer._tokenizer, **init_kwargs_of(args))
    if any(row.get("image_prompt") for row in first_rows(trainer.train_dataset)):
        check_same_images(trainer.processing_class, teacher_model, init_kwargs_of(args)["teacher_init_kwargs"])
    compile_layers(teacher, trainer.compile_plugin)
    return prepare_teacher(teacher, trainer.accelerator, sharding=args.teacher_sharding), vocab_size
