"""Tokenization: text that users give is tokenized as TRL does; what a model wrote keeps its token ids."""

import hashlib
import json
import os.path
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .._trl import common_prefix_length, remove_none_values, tokenize
from .conversations import encode_conversations, render_messages


logger = logging.get_logger(__name__)

_PROBE = "GRKD"  # content of a message that is rendered to see what the chat template puts after it
_VOCABULARIES: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, "_Vocabulary"] = weakref.WeakKeyDictionary()


class _Vocabulary(NamedTuple):
    size: int
    hash: str
    added: frozenset[int]
    context: list[int]  # decoded in front of a completion: some decoders drop the leading space of a text


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    known = _VOCABULARIES.get(tokenizer)
    if known is None or known.size != len(tokenizer):  # a vocabulary only grows
        digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
        context = tokenizer("a", add_special_tokens=False)["input_ids"]
        if getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", True) is None:
            context = []  # without a decoder tokens are joined by spaces that no token holds
        known = _Vocabulary(len(tokenizer), digest, frozenset(tokenizer.added_tokens_decoder), context)
        _VOCABULARIES[tokenizer] = known
    return known


def _tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return getattr(processing_class, "tokenizer", processing_class)  # type: ignore[arg-type]


def tokenizer_hash(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    Hash of a tokenizer's vocabulary, added tokens included. Token ids can be exchanged between tokenizers of equal hash.
    The chat template is left out: it decides which text is tokenized, not what an id means.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    return _vocabulary(_tokenizer(processing_class)).hash


def describe_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> dict[str, str]:
    """
    Identify a tokenizer and its chat template, for manifests.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.

    Returns:
        `dict[str, str]`: `tokenizer`, see [`tokenizer_hash`], and `chat_template`, a hash of the chat template and of
        which tokens are special.
    """
    tokenizer = _tokenizer(processing_class)
    template = repr((tokenizer.special_tokens_map, tokenizer.chat_template))
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
    }


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no `eos_token`, which ends a completion of a text prompt. Set one that the model writes "
            '(`tokenizer.eos_token = "..."`), or give prompts as messages, which the chat template ends.'
        )
    return tokenizer.eos_token


def require_chat_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """
    Refuse messages for a tokenizer without a chat template.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.

    Raises:
        `ValueError`: If it has no chat template.
    """
    if processing_class.chat_template is None:
        raise ValueError(
            f"The tokenizer {_tokenizer(processing_class).name_or_path!r} has no chat template, and the prompts are "
            "messages. Set its `chat_template`, which `teacher_chat_template` does for the teacher of a trainer and "
            "`chat_template_path` for the student, or give prompts as text."
        )


def template_kwargs(tools: list | str | None, chat_template_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """
    Arguments for the chat template from the columns of a row.

    Args:
        tools, chat_template_kwargs:
            As in [`encode_prompt`].

    Returns:
        `dict[str, Any]`: Keyword arguments.
    """
    tools = json.loads(tools) if isinstance(tools, str) else tools
    # Arrow gives every row the fields of every other, `None` where it has none.
    own = {"tools": remove_none_values(tools) if tools else None}
    return own | dict(remove_none_values(chat_template_kwargs or {}))


def encode_prompt(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list[dict[str, Any]],
    *,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Tokenize a prompt alone, as generation reads it.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        prompt (`str` or `list[dict]`):
            Text, or messages, which the chat template ends with the start of the assistant's turn.
        tools (`list` or `str`, *optional*):
            Tools for the chat template, or their JSON.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further keyword arguments for the chat template.

    Returns:
        `list[int]`: Ids, without an EOS.
    """
    if not isinstance(prompt, str):
        require_chat_template(processing_class)
        template = template_kwargs(tools, chat_template_kwargs)
        messages = remove_none_values(prompt)
        return tokenize(processing_class, messages, add_generation_prompt=True, **template)["input_ids"]
    return _ids_of_text(processing_class, prompt)


def _ids_of_text(processing_class: PreTrainedTokenizerBase | ProcessorMixin, text: str) -> list[int]:
    """Ids of text, with no EOS but those that stand in it: some tokenizers add one to its end."""
    tokenizer, ids = _tokenizer(processing_class), tokenize(processing_class, text)["input_ids"]
    eos, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
    if eos is None or ids[-1:] != [eos_token_id]:
        return ids
    starts = ids[0] == eos_token_id and not text.startswith(eos)  # as BOS, where both are one token
    return ids[:-1] if ids.count(eos_token_id) - starts > text.count(eos) else ids


def tokenize_completions(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list[dict[str, Any]],
    completions: Sequence[str | list[dict[str, Any]]],
    *,
    clipped: Sequence[bool] | None = None,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt_ids: Sequence[int] | None = None,
    completion_ids: Sequence[Sequence[int] | None] | None = None,
    tokenizer_hash: str | None = None,
) -> tuple[list[int], list[list[int]]]:
    """
    Tokenize a prompt and its completions. Token ids that a model wrote are used unchanged. Text is tokenized as TRL's
    `DPOTrainer` does: prompt and completion as one text, where the completion starts at the first token in which any row
    of the group differs from the prompt alone. EOS ends a standard completion, once where the tokenizer adds one too, the chat
    template a conversational one; a clipped completion gets neither.

    A conversational completion given as text is the content of the assistant's message. If it was cut, or if the chat
    template does not render that text (some drop the reasoning of a finished message), it is put directly after the
    start of the assistant's turn, which is where a model writes.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        prompt (`str` or `list[dict]`):
            Text, or messages.
        completions (`Sequence[str]` or `Sequence[list[dict]]`):
            One or more completions. A conversational one may be a list of messages or the text of the assistant's.
        clipped (`Sequence[bool]`, *optional*):
            Which completions were cut before they ended.
        tools (`list` or `str`, *optional*):
            Tools for the chat template, or their JSON.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further keyword arguments for the chat template.
        prompt_ids (`Sequence[int]`, *optional*):
            Ids that the completions were written after.
        completion_ids (`Sequence[Sequence[int]]`, *optional*):
            Ids that were written. `None` for a completion with text alone, which is tokenized to follow `prompt_ids`.
        tokenizer_hash (`str`, *optional*):
            Hash of the tokenizer of these ids, see [`tokenizer_hash`]. They are ignored if it is not this tokenizer's.

    Returns:
        `tuple[list[int], list[list[int]]]`: Ids of the prompt and of each completion, which may be none.

    Raises:
        `ValueError`: If EOS is needed and the tokenizer has none.
    """
    clipped = clipped or [False] * len(completions)
    encode = _encode_text if isinstance(prompt, str) else _encode_messages
    kwargs = {} if isinstance(prompt, str) else template_kwargs(tools, chat_template_kwargs)
    is_own = tokenizer_hash is not None and tokenizer_hash == _vocabulary(_tokenizer(processing_class)).hash
    if is_own and completion_ids is not None and any(ids is not None for ids in completion_ids):
        prompt_ids = list(prompt_ids or [])
        written = [
            _follow(processing_class, prompt, prompt_ids, completion, was_cut, kwargs) if ids is None else list(ids)
            for completion, ids, was_cut in zip(completions, completion_ids, clipped, strict=True)
        ]
        return prompt_ids, written

    prompt_ids, full_ids = encode(processing_class, prompt, completions, clipped, kwargs)
    length = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    if length < len(prompt_ids):
        logger.warning_once(
            "A tokenized prompt is not a prefix of prompt and completion tokenized together: the template renders the "
            "prompt differently alone, or tokens merge across the boundary. Completions start at the first token that "
            f"differs, and the end of the prompt is left out: {processing_class.decode(prompt_ids[length:])!r}. End "
            "prompts on a token boundary to train on the context that generation sees."
        )
    return prompt_ids[:length], [ids[length:] for ids in full_ids]


def _encode_text(processing_class, prompt, completions, clipped, kwargs) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt, and of it with each completion."""
    tokenizer, full_ids = _tokenizer(processing_class), []
    for completion, was_cut in zip(completions, clipped, strict=True):
        eos = "" if was_cut else _require_eos(tokenizer)
        end = "" if was_cut or completion.endswith(eos) else eos
        full_ids.append(_ids_of_text(processing_class, prompt + completion + end))
    return _ids_of_text(processing_class, prompt), full_ids


def _encode_messages(processing_class, prompt, completions, clipped, kwargs) -> tuple[list[int], list[list[int]]]:
    """Ids of a conversation up to the assistant's turn, and of it with each completion."""
    require_chat_template(processing_class)
    prompt = remove_none_values(prompt)
    conversations, start = {-1: (prompt, {"add_generation_prompt": True})}, None
    for position, (completion, was_cut) in enumerate(zip(completions, clipped, strict=True)):
        if isinstance(completion, str):
            messages = [*prompt, {"role": "assistant", "content": completion}]
            if start is None:
                start = render_messages(processing_class, prompt, **kwargs)
            if was_cut or not _shows(processing_class, start, messages, kwargs):
                continue
        else:
            messages = prompt + remove_none_values(completion)
        conversations[position] = messages, {"continue_final_message": True} if was_cut else {}
    ids = encode_conversations(processing_class, list(conversations.values()), **kwargs)
    shown = dict(zip(conversations, ids, strict=True))
    prompt_ids, full_ids = shown[-1], []
    for position, (completion, was_cut) in enumerate(zip(completions, clipped, strict=True)):
        if position not in shown:
            written = _encode_written(processing_class, prompt, prompt_ids, completion, was_cut, kwargs)
            shown[position] = prompt_ids + written
        full_ids.append(shown[position])
    return prompt_ids, full_ids


def _shows(processing_class, start, messages, kwargs) -> bool:
    """Whether the chat template renders the text of the last message after `start`, the conversation before it."""
    whole = render_messages(processing_class, messages, **kwargs)
    return messages[-1]["content"].strip() in whole[len(os.path.commonprefix([start, whole])) :]  # templates trim


def _encode_written(processing_class, prompt, prompt_ids, text, was_cut, kwargs) -> list[int]:
    """Ids of text put directly after the start of the assistant's turn, ended as the template ends a message."""
    tokenizer = _tokenizer(processing_class)
    start = render_messages(processing_class, prompt, add_generation_prompt=True, **kwargs)
    if not was_cut:
        probe = [*prompt, {"role": "assistant", "content": _PROBE}]
        *_, end = render_messages(processing_class, probe, **kwargs).rpartition(_PROBE)
        text += end
    ids = tokenizer(start + text, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # tokens merge across the boundary


def _follow(processing_class, prompt, prompt_ids, completion, was_cut, kwargs) -> list[int]:
    """Ids of a completion given as text in a group whose other completions were written after `prompt_ids`."""
    if isinstance(prompt, str):
        _, (ids,) = _encode_text(processing_class, prompt, [completion], [was_cut], kwargs)
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        tokenizer = _tokenizer(processing_class)
        text = completion if was_cut else completion + _require_eos(tokenizer)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if isinstance(completion, str):
        return _encode_written(processing_class, remove_none_values(prompt), prompt_ids, completion, was_cut, kwargs)
    _, (ids,) = _encode_messages(processing_class, prompt, [completion], [was_cut], kwargs)
    return ids[common_prefix_length(prompt_ids, ids) :]


def decode_completion(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, completion_ids: Sequence[int], *, clipped: bool
) -> str:
    """
    Text of a completion that a model wrote, as a person would read it after the prompt: a leading space is kept, and so
    are tags of reasoning and tool calls, which are part of the message. Left out are the end token, if it is an added
    token, the tokens for BOS, EOS, padding and unknown text, and the first bytes of a character that was cut.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        completion_ids (`Sequence[int]`):
            Its ids, the last of which is its end token unless it was cut.
        clipped (`bool`):
            Whether it was cut before it ended.

    Returns:
        `str`: Text.
    """
    tokenizer = _tokenizer(processing_class)
    vocabulary = _vocabulary(tokenizer)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    ends = not clipped and completion_ids[-1:] and completion_ids[-1] in vocabulary.added
    ids = [token for token in (completion_ids[:-1] if ends else completion_ids) if token not in named]
    start = decode_ids(tokenizer, vocabulary.context)
    whole = decode_ids(tokenizer, [*vocabulary.context, *ids])
    text = whole[len(start) :] if whole.startswith(start) else decode_ids(tokenizer, ids)
    return text.rstrip("\ufffd") if clipped else text


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """
    Text of token ids, special tokens included.

    Args:
        tokenizer, ids: Tokenizer, and its token ids.

    Returns:
        `str`: Text.
    """
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
