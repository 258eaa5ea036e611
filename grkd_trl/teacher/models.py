"""A teacher beside the student: load it frozen, place it, and check that it reads the student's tokens."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer import disable_dropout_in_model

from .._trl import create_model_from_path, get_config_model_id, prepare_deepspeed, prepare_fsdp


logger = logging.get_logger(__name__)


def load_teacher(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """
    Load a frozen teacher: evaluation mode, no dropout, no gradients.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, path, or a model, which is frozen in place.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained` where `model` is an id or path; `dtype` defaults to `float32`.

    Returns:
        [`~transformers.PreTrainedModel`]: The teacher.
    """
    if isinstance(model, str):
        model = create_model_from_path(model, **(init_kwargs or {}))
    elif init_kwargs:
        logger.warning("`teacher_model_init_kwargs` is ignored: `teacher_model` is a model already.")
    disable_dropout_in_model(model)
    return model.requires_grad_(False).eval()


def prepare_teacher(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """
    Place a teacher beside the student: sharded as the student is under ZeRO-3 and FSDP, else whole on the device.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen teacher.
        accelerator ([`~accelerate.Accelerator`]):
            The student's accelerator.

    Returns:
        `torch.nn.Module`: The teacher, wrapped for scoring.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def shared_vocabulary(
    student: PreTrainedModel, teacher: PreTrainedModel, processing_class: PreTrainedTokenizerBase
) -> int:
    """
    Number of leading token ids that mean the same to student and teacher. Embeddings padded to different sizes are
    fine where the tokenizers agree: logits are cut to the smaller. The teacher's tokenizer is read from where the
    teacher was loaded; without one the teacher is taken to share the student's.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Student.
        teacher ([`~transformers.PreTrainedModel`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.

    Returns:
        `int`: The smaller `vocab_size`.

    Raises:
        `ValueError`: If the tokenizers differ, or either model is too small for the tokenizer.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    try:
        teacher_vocab = AutoTokenizer.from_pretrained(get_config_model_id(teacher.config)).get_vocab()
    except (OSError, ValueError):  # built in memory, or saved without a tokenizer
        teacher_vocab = processing_class.get_vocab()
    if teacher_vocab != processing_class.get_vocab() or min(sizes) < len(processing_class):
        raise ValueError(
            f"The teacher cannot read the student's tokens: `vocab_size` is {sizes[0]} for the student and {sizes[1]} "
            f"for the teacher, and their tokenizers have {len(processing_class)} and {len(teacher_vocab)} entries. "
            "Token soft labels, token ranking and scoring in the training step need one tokenizer. With another, "
            "score the groups beforehand (`grkd_trl.teacher.score_groups` with the teacher's tokenizer) and train "
            'with `soft_label="group"` or `"none"`.'
        )
    return min(sizes)
