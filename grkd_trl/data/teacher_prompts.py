"""A prompt of the teacher's own: other context for the same completions."""

import hashlib
import json
import math
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._trl import remove_none_values
from .images import images_of
from .tokenization import encode_prompt


def encode_teacher_prompt(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    row: dict[str, Any],
    prompt_ids: list[int],
    index: int,
) -> list[int]:
    """
    Tokenize the prompt that the teacher reads in front of completions that are tokenized already. Where the end of the
    student's prompt belongs to the completions' first tokens, since tokens merge across the boundary, it is left out of the
    teacher's too.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        row (`dict[str, Any]`):
            Row with `prompt` and `teacher_prompt`, which may be `None`, and `tools` and `chat_template_kwargs` for the chat
            template if it has them.
        prompt_ids (`list[int]`):
            Ids of the student's prompt, as [`tokenize_completions`] gave them.
        index (`int`):
            Row number, for errors.

    Returns:
        `list[int]`: Ids. Those of the student's prompt where `teacher_prompt` is `None`.

    Raises:
        `ValueError`: If the prompt has images, or the teacher's prompt has no token or another end than the student's where
            that belongs to the completions.
    """
    if row["teacher_prompt"] is None:
        return prompt_ids
    if images_of(row):
        raise ValueError(
            f"Row {index} has images and a `teacher_prompt`, which is text alone. Remove one of the two columns."
        )
    template = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    ids = encode_prompt(processing_class, row["teacher_prompt"], **template)
    whole = encode_prompt(processing_class, row["prompt"], **template)
    moved = (
        whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else []
    )  # else a model wrote after others
    if moved and ids[-len(moved) :] != moved:
        raise ValueError(
            f"`prompt` of row {index} ends in {processing_class.decode(moved)!r}, which merges with the completions' first "
            "tokens, and `teacher_prompt` ends otherwise. End both alike, or both on a token boundary (often: without a "
            "space at the end)."
        )
    ids = ids[: len(ids) - len(moved)]
    if not ids:
        raise ValueError(f"`teacher_prompt` of row {index} has no token before the completion: give it more text.")
    return ids


# Columns in which scores and soft labels say what they were made with.
PROMPT_HASHES = {"prompt": "scored_prompt_hash", "teacher_prompt": "scored_teacher_prompt_hash"}


def prompt_hash(prompt: Any) -> str:
    """
    Hash of a prompt, by which scores and soft labels say what they were made with, in the columns of `PROMPT_HASHES`.

    Args:
        prompt (`str`, `list[dict]` or `None`):
            Prompt, or the teacher's own one, `None` where it read the student's.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    text = json.dumps(remove_none_values([prompt]), sort_keys=True, default=str)  # Arrow adds fields that are `None`
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_made_with(row: dict[str, Any], index: int) -> None:
    """
    Refuse scores or soft labels that were made with another `prompt` or `teacher_prompt` than the row has now. A row that has
    lost its `teacher_prompt` is accepted: nothing reads a prompt of the teacher's any more. So is one that does not say what its
    scores were made with.

    Args:
        row (`dict[str, Any]`):
            Row of a dataset.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: If the hashes differ, or soft labels beside a `teacher_prompt` do not say what they were made with.
    """
    labelled = row.get("teacher_top_ids") is not None
    if not labelled and row.get("teacher_scores") is None:
        return
    for name, column in PROMPT_HASHES.items():
        recorded = row.get(column)
        if name not in row:
            continue
        unknown = name == "teacher_prompt" and recorded is None and labelled and row[name] is not None
        if unknown or recorded not in (None, prompt_hash(row[name])):
            made = "do not say that they were made with its" if unknown else "were made with another"
            yours = "" if unknown else f" If they are your own, of the row as it is, remove the column `{column}`."
            raise ValueError(
                f"The {'soft labels' if labelled else 'scores'} of row {index} {made} `{name}`. Make them again "
                f"(`grkd_trl.teacher.{'cache_soft_labels' if labelled else 'score_groups'}`), or give the row the "
                f"`{name}` that they were made with.{yours}"
            )


def record_prompts(dataset: Dataset) -> Dataset:
    """
    Record which `prompt` and `teacher_prompt` the scores or soft labels of a dataset were made with.

    Args:
        dataset ([`~datasets.Dataset`]):
            Groups.

    Returns:
        [`~datasets.Dataset`]: With a column `scored_prompt_hash`, and `scored_teacher_prompt_hash` if it has a `teacher_prompt`.
    """
    for name, column in PROMPT_HASHES.items():
        if column in dataset.column_names:
            dataset = dataset.remove_columns(column)
        if name in dataset.column_names:
            dataset = dataset.add_column(column, [prompt_hash(prompt) for prompt in dataset[name]])
    return dataset


def with_teacher_context(
    dataset: Dataset | IterableDataset,
    context_length: float | None,
    *,
    max_length: int | None = None,
    max_completion_length: int | None = None,
) -> Any:
    """
    Prepare the teacher's prompts for the training step: refuse those that do not fit its context, or leave them out where
    the step has no teacher.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized rows, those with `teacher_prompt_ids` as [`encode_teacher_prompt`] gives them.
        context_length (`float`, *optional*):
            Longest row that the teacher reads, in tokens, infinite for a model without a limit. `None` without a teacher.
        max_length (`int`, *optional*):
            Longest row of the student's. A completion is cut with it before the teacher reads it.
        max_completion_length (`int`, *optional*):
            Longest completion of prompts that have none yet.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset. A stream is checked as it is read.

    Raises:
        `ValueError`: If a teacher's prompt does not fit, or rows that the user tokenized have a `teacher_prompt` alone.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "teacher_prompt_ids" not in columns:
        if "teacher_prompt" in columns and context_length is not None:
            raise ValueError(
                "The dataset is tokenized (`completion_ids`) and has a `teacher_prompt` without `teacher_prompt_ids`. "
                "Tokenize the teacher's prompt too, or drop `prompt_ids` and `completion_ids` to have the text tokenized."
            )
        return dataset
    if context_length is None:
        return dataset.remove_columns("teacher_prompt_ids")

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        if row["teacher_prompt_ids"] in (None, row["prompt_ids"]):
            return {}  # the teacher reads the student's row
        num_prompt = len(row["teacher_prompt_ids"])
        room = math.inf if max_length is None else max(max_length - len(row["prompt_ids"]), 0)
        longest = min(max(map(len, row.get("completion_ids") or [[]])), room)
        require_room(num_prompt, max_completion_length or int(longest), context_length, index)
        return {}

    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True)
    read = [name for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids") if name in columns]
    for index, row in enumerate(dataset.select_columns(read)):
        check(row, index)
    return dataset


def require_room(num_prompt: int, num_completion: int, context_length: float, index: int) -> None:
    """
    Refuse a teacher's prompt that does not fit its context.

    Args:
        num_prompt, num_completion (`int`):
            Tokens of the prompt and of its longest completion.
        context_length (`float`):
            Longest row that the teacher reads, in tokens.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: If they are more than the context holds.
    """
    if num_prompt + num_completion > context_length:
        raise ValueError(
            f"`teacher_prompt` of row {index} has {num_prompt} tokens, its longest completion {num_completion}, and the "
            f"teacher's context holds {context_length:.0f}. Shorten the teacher's prompt, or drop the row."
        )
