"""Text that passes from one tokenizer to another: what is lost on the way, and which tokenizer it was."""

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase


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
