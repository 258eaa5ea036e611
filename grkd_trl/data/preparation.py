"""Datasets of groups and of prompts prepared for training: every row checked and tokenized."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .._trl import global_then_local_main_first
from ..losses import ranked_pairs
from .images import has_image_columns, images_of, put_images, render_prompt
from .inspection import plain_rows
from .rows import WRITTEN, check_one_each, check_score, check_teacher_prompt, read_group, read_prompt
from .teacher_prompts import check_made_with, encode_teacher_prompt, with_teacher_context
from .tokenization import encode_prompt, tokenize_completions
from .written import check_written, say_whose_ids


logger = logging.get_logger(__name__)


def as_read(dataset: Dataset) -> Dataset:
    """
    Apply a dataset's transform and drop its format, so that its columns hold what reading a row returns.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset.

    Returns:
        [`~datasets.Dataset`]: The dataset without a format.
    """
    dataset = plain_rows(dataset)
    return dataset if dataset.format["type"] is None else Dataset.from_list(list(dataset))


def tokenize_prompt(
    row: dict[str, Any], index: int, *, processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, Any]:
    """
    Tokenize the prompt of a row alone, as generation reads it.

    Args:
        row (`dict[str, Any]`):
            Row with a `prompt`, text or messages, or TRL's preference with an implicit one. `tools` and
            `chat_template_kwargs` reach the chat template.
        index (`int`):
            Row number, for errors.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.

    Returns:
        `dict[str, Any]`: `prompt_ids` (`list[int]`), and `teacher_prompt_ids` of a row with a `teacher_prompt`.

    Raises:
        `ValueError`: If there is no prompt, or the teacher's is not of its form.
    """
    template = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    text = read_prompt(row, index)
    prompt = put_images(processing_class, text, images_of(row), index)
    ids = {"prompt_ids": encode_prompt(processing_class, prompt, **template)}
    if "teacher_prompt" in row:
        check_teacher_prompt(row["teacher_prompt"], text, index)
        ids["teacher_prompt_ids"] = encode_teacher_prompt(processing_class, row, ids["prompt_ids"], index)
    return ids


def tokenize_group(
    row: dict[str, Any],
    index: int,
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    min_completions: int = 2,
) -> dict[str, Any]:
    """
    Check and tokenize a row, see [`tokenize_completions`]. Token ids that were written with this tokenizer are used
    unchanged; where the ids belong to another tokenizer, the text is tokenized.

    Args:
        row (`dict[str, Any]`):
            Row that [`read_group`] accepts, with `tools` and `chat_template_kwargs` for the chat template if it has
            them, images of the prompt in `images` or `image`, and a `teacher_prompt` if the teacher reads another.
        index (`int`):
            Row number, for errors.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group.

    Returns:
        `dict[str, Any]`: `prompt_ids` (`list[int]`), `completion_ids` (`list[list[int]]`), `clipped` (`list[bool]`),
        `length` and `num_completions` (`int`), tokens of the longest row and number of rows, for samplers, and, where
        there are any, `teacher_scores` (`list[float]`), `teacher_prompt_ids` (`list[int]`), the prompt that the teacher reads,
        and `image_prompt` (`str`), the prompt as the chat template renders it, to process its images with.

    Raises:
        `ValueError`: If the row is not a group, a completion has no token, its text differs from its ids, or there are
            images that the prompt or the model does not take, or scores or soft labels were made with another
            `teacher_prompt`.
    """
    group = read_group(row, index, min_completions=min_completions)
    check_made_with(row, index)
    check_written(processing_class, row, group, index)
    written = {name: group.pop(name, None) for name in WRITTEN}
    images, template = images_of(row), {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    text = group.pop("prompt")
    prompt = put_images(processing_class, text, images, index)
    prompt_ids, completion_ids = tokenize_completions(
        processing_class, prompt, group.pop("completions"), clipped=group["clipped"], **template, **written
    )
    if has_image_columns(row):
        group["image_prompt"] = render_prompt(processing_class, prompt, **template) if images else ""
    if "teacher_prompt" in group:
        read = row | {"prompt": text, "teacher_prompt": group.pop("teacher_prompt")}
        group["teacher_prompt_ids"] = encode_teacher_prompt(processing_class, read, prompt_ids, index)
    if [] in completion_ids:
        raise ValueError(
            f"`completions` of row {index} holds no token at position {completion_ids.index([])}: drop the empty "
            "completion."
        )
    if row.get("teacher_token_ids") is not None and row["teacher_token_ids"] != completion_ids:
        raise ValueError(
            f"`teacher_top_ids` of row {index} belong to other tokens than its completions have now: they were cached "
            "with another tokenizer or other completions. Cache them again (`grkd_trl.teacher.cache_soft_labels`)."
        )
    size = {"length": len(prompt_ids) + max(map(len, completion_ids)), "num_completions": len(completion_ids)}
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, **size, **group}


def check_tokenized(row: dict[str, Any], index: int, *, min_completions: int = 2) -> dict[str, Any]:
    """
    Check a row that the user tokenized.

    Args:
        row (`dict[str, Any]`):
            Row with `prompt_ids`, `completion_ids` and, where there are any, `teacher_scores` and `clipped`.
        index (`int`):
            Row number, for errors.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group.

    Returns:
        `dict[str, Any]`: `clipped` (`list[bool]`).

    Raises:
        `ValueError`: If there are too few completions, one without a token, or not a score that is finite for each.
    """
    completion_ids = row["completion_ids"] or []
    group = {name: row[name] for name in ("teacher_scores", "clipped") if name in row} | {
        "completions": completion_ids
    }
    if group.get("clipped") is None:
        group["clipped"] = [False] * len(completion_ids)
    if row.get("prompt_ids") is None or len(completion_ids) < min_completions or not all(completion_ids):
        raise ValueError(
            f"Row {index} has `prompt_ids` {'None' if row.get('prompt_ids') is None else 'of its own'} and `completion_ids` of "
            f"{[len(ids or []) for ids in completion_ids]} tokens: give a list of token ids, and {min_completions} or more lists, "
            "none of them empty. Or drop the row."
        )
    for name in group:
        check_one_each(group, name, index)
    for position, value in enumerate(group.get("teacher_scores", [])):
        check_score(value, "teacher_scores", position, index)
    return {"clipped": group["clipped"]}


def prepare_groups(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    min_gap: float = 0.0,
    min_completions: int = 2,
    teacher_context: float | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """
    Check and tokenize a dataset of groups. One that the user tokenized, with `completion_ids` and without
    `tokenizer_hash`, is not tokenized again.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows that [`read_group`] accepts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        max_length (`int`, *optional*):
            Longest prompt and completion, in tokens. With `"keep_start"`, a row whose prompt alone fills it is
            dropped, as TRL does.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end the collator will keep, `"keep_start"` or `"keep_end"`.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher scores that a pair must exceed, to warn of groups without a pair.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group. 1 for a method that does not compare, which is not warned of ties.
        teacher_context (`float`, *optional*):
            Longest row of the training step's teacher, in tokens, for a `teacher_prompt`. `None` where the step has no
            teacher: the column is then not tokenized for the batch.
        num_proc (`int`, *optional*):
            Processes for `Dataset.map`.
        name (`str`, *optional*, defaults to `"train"`):
            Name for progress bars and messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns of [`tokenize_group`] added.

    Raises:
        `ValueError`: If the dataset is empty, a row is not a group, `max_length` leaves no row a completion, or a
            `teacher_prompt` does not fit the teacher's context.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"`max_length` must be 2 or above, a token and one of the completion to predict, got {max_length}."
        )
    in_memory = isinstance(dataset, Dataset)  # an `IterableDataset` knows neither `num_proc` nor `desc`
    dataset, first = _open(dataset, name)
    if truncation_mode == "keep_end" and max_length is not None and has_image_columns(first):
        raise ValueError(
            '`truncation_mode="keep_end"` cuts prompts, and with them the tokens of their images. Use "keep_start", which '
            "drops a row whose prompt does not fit, or remove the column of images."
        )
    columns = dataset.column_names or list(first)
    with global_then_local_main_first():
        if "completion_ids" not in columns or "tokenizer_hash" in columns:
            say_whose_ids(first, processing_class, name)
            kwargs = {"num_proc": num_proc, "desc": f"Tokenizing {name} groups"} if in_memory else {}
            fn_kwargs = {"processing_class": processing_class, "min_completions": min_completions}
            dataset = dataset.map(tokenize_group, with_indices=True, fn_kwargs=fn_kwargs, **kwargs).with_format(None)
            if "tokenizer_hash" in columns:
                dataset = dataset.remove_columns("tokenizer_hash")  # the ids are this tokenizer's now
        else:
            kwargs = {"num_proc": num_proc, "desc": f"Checking {name} groups"} if in_memory else {}
            dataset = dataset.map(
                check_tokenized, with_indices=True, fn_kwargs={"min_completions": min_completions}, **kwargs
            )
        cut_at = max_length if truncation_mode == "keep_start" else None
        dataset = with_teacher_context(dataset, teacher_context, max_length=cut_at)
        num_rows = len(dataset) if in_memory else 0
        if max_length is not None and truncation_mode == "keep_start":
            kwargs = {"num_proc": num_proc, "desc": f"Checking lengths of {name} prompts"} if in_memory else {}
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < max_length, **kwargs)
    if in_memory:
        if len(dataset) < num_rows:
            message = (
                f"{num_rows - len(dataset)} of {num_rows} {name} prompts fill `max_length={max_length}` and leave no "
                "room for a completion."
            )
            if len(dataset) == 0:
                raise ValueError(f"{message} Raise `max_length`, or shorten the prompts.")
            logger.warning(f"{message} They are dropped.")
        if "teacher_scores" in dataset.column_names and min_completions > 1:
            scores = dataset["teacher_scores"]
            tied = sum(not ranked_pairs(torch.tensor(row), min_gap=min_gap).any() for row in scores) / len(dataset)
            if tied > 0:
                logger.warning(
                    f"{tied:.1%} of the {name} groups have equal `teacher_scores` (no gap above `min_gap={min_gap}`): "
                    "they add nothing to the relative loss. Sample more varied completions if the share is large."
                )
    return dataset


def prepare_prompts(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_completion_length: int,
    max_length: int | None = None,
    teacher_context: float | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """
    Check and tokenize a dataset of prompts, and drop those that leave no room for a completion.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows that [`tokenize_prompt`] accepts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        max_completion_length (`int`):
            Longest completion, in tokens.
        max_length (`int`, *optional*):
            Longest prompt and completion, in tokens.
        teacher_context (`float`, *optional*):
            Longest row of the teacher, as for [`prepare_groups`].
        num_proc (`int`, *optional*):
            Processes for `Dataset.map`.
        name (`str`, *optional*, defaults to `"train"`):
            Name for progress bars and messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns of [`tokenize_prompt`] added.

    Raises:
        `ValueError`: If the dataset is empty, a row has no prompt, none leaves room, or a `teacher_prompt` leaves none.
    """
    in_memory = isinstance(dataset, Dataset)
    dataset, _ = _open(dataset, name)
    with global_then_local_main_first():
        kwargs = {"num_proc": num_proc, "desc": f"Tokenizing {name} prompts"} if in_memory else {}
        fn_kwargs = {"processing_class": processing_class}
        dataset = dataset.map(tokenize_prompt, with_indices=True, fn_kwargs=fn_kwargs, **kwargs).with_format(None)
        dataset = with_teacher_context(dataset, teacher_context, max_completion_length=max_completion_length)
        if max_length is None:
            return dataset
        room = max_length - max_completion_length
        kept = dataset.filter(lambda row: len(row["prompt_ids"]) <= room)
    if in_memory and len(kept) < len(dataset):
        message = (
            f"{len(dataset) - len(kept)} of {len(dataset)} {name} prompts leave no room for "
            f"`max_completion_length={max_completion_length}` within `max_length={max_length}`."
        )
        if len(kept) == 0:
            raise ValueError(f"{message} Raise `max_length`, or lower `max_completion_length`.")
        logger.warning(f"{message} They are dropped.")
    return kept


def _open(dataset: Dataset | IterableDataset, name: str) -> tuple[Dataset | IterableDataset, dict[str, Any]]:
    """The dataset as it is read, without a column `row` (the name used to number the rows of a stream), and its first row."""
    dataset = plain_rows(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it has no row. A filter may have dropped them all.")
    if "row" in (dataset.column_names or first):
        dataset = dataset.remove_columns("row")
    return dataset, first
