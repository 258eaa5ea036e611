"""The tokens of a group that was written while training."""

from typing import Any

from ..data import encode_teacher_prompt, tokenize_completions
from ..data.images import put_images
from ..data.rows import WRITTEN
from ..teacher.alignment import align_group
from ..teacher.combination import AGREEMENT
from ..teacher.in_step import share_row
from ..teacher.retokenize import image_columns


def tokenize_group(trainer: Any, group: dict[str, Any], index: int) -> dict[str, Any]:
    """
    Tokenize a group for the collator.

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer, whose tokenizer and whose teacher's are taken.
        group (`dict[str, Any]`):
            `prompt`, `completions` and what came with them.
        index (`int`):
            Place of the group in its round, for messages.

    Returns:
        `dict[str, Any]`: `prompt_ids`, `completion_ids`, and what the teacher gave.

    Raises:
        `ValueError`: If no completion was scored, or the teacher that gave soft labels reads other tokens.
    """
    processing_class = trainer.processing_class
    if not group["completions"]:
        raise ValueError(f"No completion of the prompt {group['prompt']!r} was scored: drop the prompt.")
    given = {name: group.get(name) for name in ("clipped", "tools", "chat_template_kwargs", *WRITTEN)}
    images = {name: [value] for name, value in group.items()}
    images = image_columns(processing_class, group["prompt"], images, 0)
    prompt = put_images(processing_class, group["prompt"], images.get("images", []), index)
    prompt_ids, completion_ids = tokenize_completions(processing_class, prompt, group["completions"], **given)
    tokens = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, **images}
    if trainer.teacher_tokenizer is not None:
        both = {"student": processing_class, "teacher": trainer.teacher_tokenizer}
        tokens |= align_group(group | tokens, index, context_length=trainer.teacher_context, **both)
    elif "teacher_prompt" in group and trainer.teacher_context is not None:
        tokens["teacher_prompt_ids"] = encode_teacher_prompt(processing_class, group, prompt_ids, index)
    if trainer.teacher_routes is not None:
        tokens |= share_row(group, index, **trainer.teacher_routes)
    if group.get("teacher_token_ids", completion_ids) != completion_ids:
        raise ValueError(
            f"The teacher reads the completions of {group['prompt']!r} as other tokens than the student, so it has no "
            'soft labels for them. Set `soft_label="group"` or `"none"`.'
        )
    read = ("clipped", "teacher_scores", "teacher_top_ids", "teacher_top_logps", *AGREEMENT)
    return tokens | {name: group[name] for name in read if name in group}
