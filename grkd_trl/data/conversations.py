"""Conversations tokenized together: what the chat template renders alike at their start is tokenized once."""

import inspect
import os.path
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from trl import prepare_multimodal_messages

from .._trl import tokenize


# Arguments of `apply_chat_template` that change no more than the text.
_OF_TEXT = {"tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
_OF_TOKENS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - _OF_TEXT

# Settings of a tokenizer, and the tokens before which its texts can be cut; `None` where the ids would be others.
_CUTS: WeakKeyDictionary[Any, tuple[tuple[Any, ...], list[str] | None]] = WeakKeyDictionary()


def render_messages(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, messages: list[dict[str, Any]], **kwargs: Any
) -> str:
    """
    Text that the chat template makes of messages, with one placeholder for each image.

    Args:
        processing_class, messages, kwargs:
            Tokenizer or processor, messages, and what the template is passed.

    Returns:
        `str`: Text.
    """
    if isinstance(processing_class, ProcessorMixin):  # whose templates may read parts alone
        messages = prepare_multimodal_messages(messages)
    return str(processing_class.apply_chat_template(messages, tokenize=False, **kwargs))


def encode_conversations(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    conversations: Sequence[tuple[list[dict[str, Any]], dict[str, bool]]],
    **kwargs: Any,
) -> list[list[int]]:
    """
    Tokenize conversations that start alike, each to the ids that it has alone. A tokenizer splits text at its special
    tokens before it does anything else, so that what the conversations have in common up to such a token is tokenized once.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor used for text alone.
        conversations (`Sequence[tuple[list[dict], dict]]`):
            N conversations, each with what the chat template is passed for it alone.
        kwargs:
            What the chat template is passed for all.

    Returns:
        `list[list[int]]`: Ids of each.
    """
    known, cuts = _CUTS.get(processing_class, ((), None))
    settings: tuple[Any, ...] = ()
    if (
        isinstance(processing_class, PreTrainedTokenizerFast)
        and type(processing_class).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        and not _OF_TOKENS.intersection(kwargs)
    ):
        settings = len(processing_class), processing_class.split_special_tokens, str(processing_class.chat_template)

    def together(cuts: list[str]) -> list[list[int]]:
        texts = [render_messages(processing_class, messages, **own, **kwargs) for messages, own in conversations]
        return _encode(processing_class, texts, cuts)

    if settings and known == settings and cuts is not None:
        return together(cuts)
    alone = [tokenize(processing_class, messages, **own, **kwargs)["input_ids"] for messages, own in conversations]
    if settings and known != settings:  # the first ones show whether the ids are the same
        cuts = _cuts_of(processing_class)
        _CUTS[processing_class] = settings, cuts if together(cuts) == alone else None
    return alone


def _encode(tokenizer: Any, texts: list[str], cuts: list[str]) -> list[list[int]]:
    common = os.path.commonprefix(texts)
    start = max([0, *(common.rfind(cut) for cut in cuts)])
    parts = [text[start:] for text in texts] + ([texts[0][:start]] if start else [])
    ids = tokenizer(parts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [ids[-1] + tail for tail in ids[:-1]] if start else ids


def _cuts_of(tokenizer: Any) -> list[str]:
    """Special tokens of the chat template that are found in a text whatever stands before them."""
    added = tokenizer.added_tokens_decoder.values()

    def always_found(token: AddedToken) -> bool:
        text = token.content
        if tokenizer.split_special_tokens or token.normalized or token.lstrip or token.single_word:
            return False
        # Neither a space nor a letter, which a token before it may take or refuse to stand at.
        if not text or text[0].isspace() or text[0].isalnum() or text[0] == "_":
            return False
        overlaps = (text.startswith(other.content[k:]) for other in added for k in range(1, len(other.content)))
        return not any(overlaps) and not any(text in other.content[1:] for other in added)

    template = str(tokenizer.chat_template)
    return [token.content for token in added if token.content in template and always_found(token)]
