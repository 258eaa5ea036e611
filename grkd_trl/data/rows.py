"""Rows of a group dataset: read, check and tokenize them as TRL does.

A group is one prompt with two or more completions: `{"prompt", "completions": [...], "teacher_scores": [...]}`, where
the scores are optional, and so is `"clipped": [...]`, `True` for a completion that was cut before its end.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import extract_prompt

from .._trl import common_prefix_length, global_then_local_main_first, tokenize
from ..losses import ranked_pairs


logger = logging.get_logger(__name__)

_FORMATS = (
    'a group, {"prompt", "completions": [...], "teacher_scores": [...] (optional)}, or a preference, '
    '{"prompt" (optional), "chosen", "rejected", "score_chosen" and "score_rejected" (optional)}'
)


def bring_scores(*datasets: Dataset | IterableDataset | dict | None) -> bool:
    """
    Whether every dataset brings an order of its own, `teacher_scores` or a preference, by its first row.

    Args:
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets to look at. What is none of these is passed over.

    Returns:
        `bool`: `True` if no teacher is needed to rank completions.

    Raises:
        `ValueError`: If a row has images.
    """
    flat = [part for dataset in datasets for part in (dataset.values() if isinstance(dataset, dict) else [dataset])]
    rows = [next(iter(dataset)) for dataset in flat if isinstance(dataset, Dataset | IterableDataset)]
    if any("image" in row or "images" in row for row in rows):
        raise ValueError("The dataset has images, and groups are of text alone. Remove the column of images.")
    return all(row.get("teacher_scores") is not None or ("chosen" in row and "completions" not in row) for row in rows)


def bring_soft_labels(*datasets: Dataset | IterableDataset | dict | None) -> bool:
    """
    Whether every dataset has the teacher's token soft labels cached, by its first row.

    Args:
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets to look at. What is none of these is passed over.

    Returns:
        `bool`: `True` if token soft labels need no teacher.
    """
    flat = [part for dataset in datasets for part in (dataset.values() if isinstance(dataset, dict) else [dataset])]
    rows = [next(iter(dataset)) for dataset in flat if isinstance(dataset, Dataset | IterableDataset)]
    return bool(rows) and all(row.get("teacher_top_ids") is not None for row in rows)


def read_group(row: dict[str, Any], index: int, *, min_completions: int = 2) -> dict[str, Any]:
    """
    Check a row and give it as a group.

    Args:
        row (`dict[str, Any]`):
            Row in the group or TRL's preference format, standard or conversational. A preference ranks its two
            completions by its scores, chosen first where it has none.
        index (`int`):
            Row number, for the error.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group. 1 for a method that does not compare.

    Returns:
        `dict[str, Any]`: `prompt`, `completions`, `clipped` and, where there are any, `teacher_scores`.

    Raises:
        `ValueError`: If the row is no group that can be ranked; the message names field and row.
    """
    if "completions" in row:
        group = {"prompt": row.get("prompt"), "completions": row["completions"]}
        if "teacher_scores" in row:
            group["teacher_scores"] = row["teacher_scores"]
    elif "chosen" in row and "rejected" in row:
        row = row if "prompt" in row else extract_prompt(row)
        scores = [row.get("score_chosen"), row.get("score_rejected")]
        group = {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"]],
            "teacher_scores": [1.0, 0.0] if scores == [None, None] else scores,
        }
    else:
        raise ValueError(f"Row {index} has the columns {sorted(row)}, which make no group. Accepted is {_FORMATS}.")

    if not group["prompt"]:
        raise ValueError(f"`prompt` of row {index} is {group['prompt']!r}: give it text or messages, or drop the row.")
    completions = group["completions"]
    if completions is None or len(completions) < min_completions:
        reason = "a group is ranked by comparing, so it " if min_completions > 1 else "a group "
        raise ValueError(
            f"`completions` of row {index} has {len(completions or [])} entries: {reason}"
            f"needs {min_completions} or more. Sample more completions for this prompt, or drop the row."
        )
    group["clipped"] = row.get("clipped") or [False] * len(completions)
    for name in ("teacher_scores", "clipped"):
        if name in group and (group[name] is None or len(group[name]) != len(completions)):
            raise ValueError(
                f"`{name}` of row {index} has {len(group[name] or [])} entries for {len(completions)} completions: "
                "give one for each, in the same order, in every row of the dataset or in none."
            )
    for position, value in enumerate(group.get("teacher_scores", [])):
        if value is None or not math.isfinite(value):
            field = "teacher_scores" if "completions" in row else ("score_chosen", "score_rejected")[position]
            raise ValueError(
                f"`{field}` of row {index} holds {value} for completion {position}: scores are finite numbers, "
                "higher is better. Drop the completion, or score it again."
            )
    return group


def tokenize_completions(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list[dict[str, Any]],
    completions: Sequence[str] | Sequence[list[dict[str, Any]]],
    *,
    clipped: Sequence[bool] | None = None,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """
    Tokenize a prompt and its completions as TRL's `DPOTrainer` does: prompt and completion as one text, the completion
    starting where the tokens of the group part from the prompt's. EOS ends a standard completion, the chat template a
    conversational one; a clipped completion gets neither.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        prompt (`str` or `list[dict]`):
            Text, or messages.
        completions (`Sequence[str]` or `Sequence[list[dict]]`):
            One or more completions. One of a conversation may be a list of messages or the text of the assistant's.
        clipped (`Sequence[bool]`, *optional*):
            Which completions were cut before they ended.
        tools (`list` or `str`, *optional*):
            Tools for the chat template, or their JSON.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further keyword arguments for the chat template.

    Returns:
        `tuple[list[int], list[list[int]]]`: Ids of the prompt and of each completion, which may be none.
    """
    clipped = clipped or [False] * len(completions)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    full_ids = []
    if isinstance(prompt, str):
        prompt_ids = tokenize(processing_class, prompt)["input_ids"]
        for completion, was_cut in zip(completions, clipped, strict=True):
            end = "" if was_cut or completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
            ids = tokenize(processing_class, prompt + completion + end)["input_ids"]
            ends_itself = was_cut and ids[-1:] == [tokenizer.eos_token_id]  # some tokenizers add EOS to text
            full_ids.append(ids[:-1] if ends_itself else ids)
    else:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {"tools": tools} | (chat_template_kwargs or {})
        prompt_ids = tokenize(processing_class, prompt, add_generation_prompt=True, **kwargs)["input_ids"]
        for completion, was_cut in zip(completions, clipped, strict=True):
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            end = {"continue_final_message": True} if was_cut else {}
            full_ids.append(tokenize(processing_class, prompt + completion, **end, **kwargs)["input_ids"])

    length = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    if length < len(prompt_ids):
        logger.warning_once(
            "A tokenized prompt is not a prefix of prompt and completion tokenized together: the template renders the "
            "prompt alone otherwise, or tokens merge across the boundary. Completions start where the tokens part, and "
            f"the prompt's end is left out: {processing_class.decode(prompt_ids[length:])!r}. End prompts on a token "
            "boundary to train on the context that generation sees."
        )
    return prompt_ids[:length], [ids[length:] for ids in full_ids]


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
        `dict[str, Any]`: `prompt_ids` (`list[int]`) and `length` (`int`), for samplers.

    Raises:
        `ValueError`: If there is no prompt.
    """
    prompt = extract_prompt(row)["prompt"] if "prompt" not in row and "chosen" in row else row.get("prompt")
    if not prompt:
        raise ValueError(f"`prompt` of row {index} is {prompt!r}: give it text or messages, or drop the row.")
    if isinstance(prompt, str):
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        ids = tokenize(processing_class, prompt)["input_ids"]
        ends_itself = ids[-1:] == [tokenizer.eos_token_id]  # some tokenizers add EOS to text
        ids = ids[:-1] if ends_itself else ids
        return {"prompt_ids": ids, "length": len(ids)}
    tools = row.get("tools")
    kwargs = {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (
        row.get("chat_template_kwargs") or {}
    )
    ids = tokenize(processing_class, prompt, add_generation_prompt=True, **kwargs)["input_ids"]
    return {"prompt_ids": ids, "length": len(ids)}


def tokenize_group(
    row: dict[str, Any],
    index: int,
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    min_completions: int = 2,
) -> dict[str, Any]:
    """
    Check and tokenize a row, as [`tokenize_completions`] says.

    Args:
        row (`dict[str, Any]`):
            Row that [`read_group`] accepts, with `tools` and `chat_template_kwargs` for the chat template if it has
            them.
        index (`int`):
            Row number, for errors.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group.

    Returns:
        `dict[str, Any]`: `prompt_ids` (`list[int]`), `completion_ids` (`list[list[int]]`), `clipped` (`list[bool]`),
        `length` and `num_completions` (`int`), tokens of the longest row and number of rows, for samplers, and, where
        there are any, `teacher_scores` (`list[float]`).

    Raises:
        `ValueError`: If the row is no group, or a completion comes to no token.
    """
    group = read_group(row, index, min_completions=min_completions)
    prompt_ids, completion_ids = tokenize_completions(
        processing_class,
        group.pop("prompt"),
        group.pop("completions"),
        clipped=group["clipped"],
        tools=row.get("tools"),
        chat_template_kwargs=row.get("chat_template_kwargs"),
    )
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


def prepare_groups(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    min_gap: float = 0.0,
    min_completions: int = 2,
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """
    Check and tokenize a dataset of groups. One that is tokenized already is not tokenized again.

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
        num_proc (`int`, *optional*):
            Processes for `Dataset.map`.
        name (`str`, *optional*, defaults to `"train"`):
            Name for progress bars and messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns of [`tokenize_group`] added.

    Raises:
        `ValueError`: If a row is no group, or `max_length` leaves no completion of any row.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"`max_length` must be 2 or above, a token and one of the completion to predict, got {max_length}."
        )
    columns = dataset.column_names or list(next(iter(dataset)))
    in_memory = isinstance(dataset, Dataset)  # an `IterableDataset` knows neither `num_proc` nor `desc`
    with global_then_local_main_first():
        if "completion_ids" not in columns:
            kwargs = {"num_proc": num_proc, "desc": f"Tokenizing {name} groups"} if in_memory else {}
            fn_kwargs = {"processing_class": processing_class, "min_completions": min_completions}
            dataset = dataset.map(tokenize_group, with_indices=True, fn_kwargs=fn_kwargs, **kwargs)
        num_rows = len(dataset) if in_memory else None
        if max_length is not None and truncation_mode == "keep_start":
            kwargs = (
                {"num_proc": num_proc, "desc": f"Dropping {name} prompts that fill max_length"} if in_memory else {}
            )
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
