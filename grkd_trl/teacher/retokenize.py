"""How a teacher reads groups: token ids where they are of its tokenizer, else text, with a flag where text is lost."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data import encode_prompt, encode_teacher_prompt, read_group, tokenize_completions, tokenizer_hash
from ..data.images import images_of, process_images, put_images, render_prompt
from ..data.rows import WRITTEN, check_teacher_prompt
from ..data.teacher_prompts import check_made_with, require_room
from ..data.written import check_written


__all__ = [
    "columns_to_score",
    "encode_prompt",
    "image_columns",
    "images_at",
    "read_groups",
    "read_prompts",
    "reads_back",
    "teacher_prompts",
    "template_columns",
    "tokenizer_hash",
]


_IMAGES = ("images", "image", "prompt_images", "prompt_image")


def template_columns(columns: Mapping[str, Sequence[Any]] | None, row: int) -> dict[str, Any]:
    """
    Arguments of a row for the chat template.

    Args:
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of a dataset beside its prompts.
        row (`int`):
            Row.

    Returns:
        `dict[str, Any]`: Its `tools` and `chat_template_kwargs`, where there are such columns.
    """
    names = ("tools", "chat_template_kwargs")
    columns = columns or {}
    return {name: columns[name][row] for name in names if name in columns}


def images_at(columns: Mapping[str, Sequence[Any]] | None, row: int) -> list[Any]:
    """
    Images of a prompt.

    Args:
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of a dataset beside its prompts.
        row (`int`):
            Row.

    Returns:
        `list`: What `images` or `image` hold for it, where there are such columns.
    """
    return images_of({name: values[row] for name, values in (columns or {}).items() if name in _IMAGES})


def teacher_prompts(prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None) -> list[Any]:
    """
    Prompts as a teacher reads them.

    Args:
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            P prompts, as text or messages.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of a dataset beside its prompts.

    Returns:
        `list`: `teacher_prompt` where it is not `None`, else the prompt.
    """
    own = (columns or {}).get("teacher_prompt") or [None] * len(prompts)
    return [prompt if theirs is None else theirs for prompt, theirs in zip(prompts, own, strict=True)]


def image_columns(processing_class: Any, prompt: Any, columns: Mapping[str, Sequence[Any]] | None, row: int) -> dict:
    """
    What [`~data.DataCollatorForGroups`] reads of a prompt's images.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or the processor of a model of images and text.
        prompt (`str` or `list[dict]`):
            Prompt.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of a dataset beside its prompts.
        row (`int`):
            Row.

    Returns:
        `dict[str, Any]`: `images` and `image_prompt`; empty for a prompt without images.
    """
    images = images_at(columns, row)
    if not images:
        return {}
    prompt = put_images(processing_class, prompt, images, row)
    text = render_prompt(processing_class, prompt, **template_columns(columns, row))
    return {"images": images, "image_prompt": text}


def columns_to_score(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase | ProcessorMixin, *, keeps: str | None = None
) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """
    What a teacher is asked of a dataset of groups.

    Args:
        dataset ([`~datasets.Dataset`]):
            Groups.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The teacher's tokenizer.
        keeps (`str`, *optional*):
            Column that is kept beside what the teacher will say, so that both must have been made with the same
            `teacher_prompt`.

    Returns:
        `tuple`: Prompts, completions and further columns, as [`Scorer.score`] takes them.

    Raises:
        `ValueError`: If a row is no group, its text was edited beside its token ids, or the column that is kept was made with
            another `teacher_prompt`.
    """
    rows = list(dataset)
    if keeps in dataset.column_names:
        for index, row in enumerate(rows):
            check_made_with(row, index)
    groups = [read_group(row, index) for index, row in enumerate(rows)]
    for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
        check_written(processing_class, row, group, index)
    columns = {name: [row.get(name) for row in rows] for name in ("tools", "chat_template_kwargs", "images", "image")}
    columns |= {name: [group.get(name) for group in groups] for name in ("clipped", "teacher_prompt", *WRITTEN)}
    return [group["prompt"] for group in groups], [group["completions"] for group in groups], columns


def read_prompts(
    processing_class: Any,
    prompts: Sequence[str | list[dict[str, Any]]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """
    Tokenize prompts alone, as generation reads them, and process their images.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or the processor of a model of images and text.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            P prompts, as text or messages.
        columns (`Mapping[str, Sequence]`, *optional*):
            Further columns, a value a prompt. `images`, `image`, `tools` and `chat_template_kwargs` are read.

    Returns:
        `tuple[list[list[int]], list[dict[str, torch.Tensor]]]`: Ids of each prompt, and what [`~data.process_images`] makes
        of its images, which is empty without.
    """
    prompt_ids: list[list[int]] = []
    inputs: list[dict[str, Any]] = []
    for row, prompt in enumerate(prompts):
        images, template = images_at(columns, row), template_columns(columns, row)
        prompt = put_images(processing_class, prompt, images, row)
        prompt_ids.append(encode_prompt(processing_class, prompt, **template))
        text = render_prompt(processing_class, prompt, **template) if images else ""
        inputs.append(process_images(processing_class, text, images, prompt_ids[-1]) if images else {})
    return prompt_ids, inputs


def read_groups(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[Sequence[str | list[dict[str, Any]]]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    context_length: float = math.inf,
) -> Iterator[tuple[list[int], list[list[int]], list[bool]]]:
    """
    Tokenize groups with a teacher's tokenizer and template. Ids that were written with its tokenizer stay as they are.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            P prompts, as text or messages.
        completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
            A group of completions for each prompt.
        columns (`Mapping[str, Sequence]`, *optional*):
            Further columns, a value a prompt. `clipped`, `teacher_prompt`, `tools`, `chat_template_kwargs`, and
            `prompt_ids`, `completion_ids` and `tokenizer_hash` are read.
        context_length (`float`, *optional*):
            Longest row that the teacher reads, in tokens, which a `teacher_prompt` must fit.

    Yields:
        `tuple`: For each group the ids of the prompt, of each completion, and whether the completion's ids are a surprise:
        they do not decode to its text (see [`reads_back`]), or another text of the group has the same ids.

    Raises:
        `ValueError`: If a `teacher_prompt` is not of the prompt's form, or does not fit with its longest completion.
    """
    columns, plain = columns or {}, prompts
    prompts = [
        put_images(processing_class, prompt, images_at(columns, row), row) for row, prompt in enumerate(prompts)
    ]
    own = tokenizer_hash(processing_class) if "tokenizer_hash" in columns else None
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        given = {name: columns[name][row] for name in ("clipped", *WRITTEN) if name in columns}
        prompt_ids, completion_ids = tokenize_completions(
            processing_class, prompt, group, **given, **template_columns(columns, row)
        )
        if "teacher_prompt" in columns and columns["teacher_prompt"][row] is not None:
            own_row = {name: values[row] for name, values in columns.items()} | {"prompt": plain[row]}
            check_teacher_prompt(own_row["teacher_prompt"], plain[row], row)
            prompt_ids = encode_teacher_prompt(processing_class, own_row, prompt_ids, row)
            require_room(len(prompt_ids), max(map(len, completion_ids)), context_length, row)
        surprises = []
        for position, (text, ids) in enumerate(zip(group, completion_ids, strict=True)):
            if own is not None and given["tokenizer_hash"] == own and given["completion_ids"][position] is not None:
                surprises.append(False)  # no text was read
                continue
            same = [other for other, theirs in zip(group, completion_ids, strict=True) if theirs == ids]
            surprises.append(
                not reads_back(processing_class, text, ids) or any(_differ(text, other) for other in same)
            )
        yield prompt_ids, completion_ids, surprises


def _differ(text: str | list[dict[str, Any]], other: str | list[dict[str, Any]]) -> bool:
    if isinstance(text, str) and isinstance(other, str):
        return text.strip() != other.strip()  # templates trim
    return type(text) is type(other) and text != other


def reads_back(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    completion: str | list[dict[str, Any]],
    completion_ids: list[int],
) -> bool:
    """
    Whether a tokenizer read a completion as the text it is: the ids decode to it, and no part of it became a special
    token.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that read it.
        completion (`str` or `list[dict]`):
            Text, or messages.
        completion_ids (`list[int]`):
            What it was tokenized to, in its context.

    Returns:
        `bool`: `False` if the text has unknown characters or special tokens, merges with the prompt, or is not rendered
        by the chat template.
    """
    if isinstance(completion, str):
        texts = [completion]
    else:
        fields = ("content", "reasoning_content", "thinking")  # what templates call them
        texts = [turn[field] for turn in completion for field in fields if isinstance(turn.get(field), str)]
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    decoded = tokenizer.decode(completion_ids, skip_special_tokens=True)
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
    for text in texts:
        if text.strip() not in decoded:  # templates trim, and so do some decoders
            return False
        if special.intersection(tokenizer(text, add_special_tokens=False)["input_ids"]):
            return False
    return True
