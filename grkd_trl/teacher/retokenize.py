"""Text that a teacher reads with its own tokenizer: the tokens, what is lost on the way, and which tokenizer it was."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .._trl import tokenize
from ..data import tokenize_completions


def template_columns(columns: Mapping[str, Sequence[Any]] | None, row: int) -> dict[str, Any]:
    """
    What a row gives to the chat template.

    Args:
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of a dataset beside its prompts.
        row (`int`):
            Row.

    Returns:
        `dict[str, Any]`: Its `tools` and `chat_template_kwargs`, where there are such columns.
    """
    names = ("tools", "chat_template_kwargs")
    return {name: columns[name][row] for name in names if name in (columns or {})}


def encode_prompt(
    processing_class: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    *,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Tokenize a prompt for writing, as [`~data.tokenize_completions`] does for scoring.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompt (`str` or `list[dict]`):
            Text, or messages, which the chat template ends with the start of the assistant's turn.
        tools (`list` or `str`, *optional*):
            Tools for the chat template, or their JSON.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further keyword arguments for the chat template.

    Returns:
        `list[int]`: Ids, without an EOS.
    """
    template = {}
    if isinstance(prompt, list):
        tools = json.loads(tools) if isinstance(tools, str) else tools
        template = {"add_generation_prompt": True, "tools": tools} | (chat_template_kwargs or {})
    ids = tokenize(processing_class, prompt, **template)["input_ids"]
    ends_itself = not template and ids[-1:] == [processing_class.eos_token_id]  # some tokenizers add EOS to text
    return ids[:-1] if ends_itself else ids


def read_groups(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    completions: Sequence[Sequence[str]] | Sequence[Sequence[list[dict[str, str]]]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[tuple[list[int], list[list[int]], list[bool]]]:
    """
    Tokenize groups with a teacher's tokenizer and template.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            P prompts, as text or messages.
        completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
            A group of completions for each prompt.
        columns (`Mapping[str, Sequence]`, *optional*):
            Further columns, a value a prompt. `clipped`, `tools` and `chat_template_kwargs` are read.

    Yields:
        `tuple`: Of each group the prompt's ids, each completion's ids, and whether [`reads_back`] denies it.
    """
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        clipped = columns["clipped"][row] if "clipped" in (columns or {}) else None
        prompt_ids, completion_ids = tokenize_completions(
            processing_class, prompt, group, clipped=clipped, **template_columns(columns, row)
        )
        pairs = zip(group, completion_ids, strict=True)
        yield prompt_ids, completion_ids, [not reads_back(processing_class, text, ids) for text, ids in pairs]


def reads_back(
    processing_class: PreTrainedTokenizerBase, completion: str | list[dict[str, Any]], completion_ids: list[int]
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
        `bool`: `False` if the text has unknown characters, special tokens, or merges with the prompt.
    """
    texts = [completion] if isinstance(completion, str) else [message["content"] for message in completion]
    decoded = processing_class.decode(completion_ids, skip_special_tokens=True)
    added = processing_class.added_tokens_decoder.items()
    special = {*processing_class.all_special_ids, *(token_id for token_id, token in added if token.special)}
    for text in texts:
        if text.strip() not in decoded:  # templates trim, and so do some decoders
            return False
        if special.intersection(processing_class(text, add_special_tokens=False)["input_ids"]):
            return False
    return True


def tokenizer_hash(processing_class: PreTrainedTokenizerBase) -> str:
    """
    A hash that tells tokenizers apart: vocabulary, special tokens and chat template.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    vocab = sorted(processing_class.get_vocab().items())
    parts = (vocab, processing_class.special_tokens_map, processing_class.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
