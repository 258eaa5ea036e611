"""Token ids that models wrote, beside the text of their rows: whether they are of the same prompt and completions."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .images import images_of, put_images
from .rows import check_prompt
from .tokenization import decode_completion, decode_ids, encode_prompt, tokenizer_hash


logger = logging.get_logger(__name__)

_DROP = "drop the columns `prompt_ids`, `completion_ids` and `tokenizer_hash` to train on the text."


def check_written(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, row: dict[str, Any], group: dict[str, Any], index: int
) -> None:
    """
    Refuse text that was edited beside ids of this tokenizer that were not.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer that is to read the row.
        row (`dict[str, Any]`):
            Row of a dataset.
        group (`dict[str, Any]`):
            What [`read_group`] made of it.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: If a completion, or what the system or a user says in the prompt, is another text than its ids.
    """
    if group.get("tokenizer_hash") is None or group["tokenizer_hash"] != tokenizer_hash(processing_class):
        return
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)

    def without_added(text: str) -> str:
        """Which of them are EOS and padding may have changed. Some tokenizers have thousands: only for text that is not found."""
        for token in tokenizer.get_added_vocab():
            text = text.replace(token, "")
        return text

    def as_read(text: str) -> str:  # some tokenizers normalize it, or do not know all of it
        return decode_ids(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])

    ids_of = group["completion_ids"] or []
    for position, (text, ids, was_cut) in enumerate(zip(group["completions"], ids_of, group["clipped"], strict=False)):
        if ids is None or not isinstance(text, str):
            continue
        decoded = decode_completion(processing_class, ids, clipped=was_cut)
        if decoded != text and without_added(decoded) != without_added(text):
            raise ValueError(
                f"`completions` of row {index} holds another text at position {position} than its `completion_ids`, and "
                f"training uses the ids. If the text was edited, {_DROP}"
            )
    decoded = decode_ids(tokenizer, group["prompt_ids"])
    said = [
        text for text in _said(group["prompt"]) if text.strip() not in decoded and as_read(text).strip() not in decoded
    ]
    if said:
        decoded = without_added(decoded)
        said = [text for text in said if without_added(text).strip() not in decoded]
    if said and _encode(processing_class, row, group, index) != list(group["prompt_ids"]):
        raise ValueError(
            f"`prompt` of row {index} holds text that is not in its `prompt_ids`, {said[0][:80]!r}, and training uses the ids. If "
            f"the prompt was edited, {_DROP}"
        )


def say_whose_ids(row: dict[str, Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin, name: str) -> None:
    """
    Log once whether the token ids in the dataset are used, judging by its first row, and warn where the chat template would
    write its prompt otherwise.

    Args:
        row (`dict[str, Any]`):
            First row.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer that is to read it.
        name (`str`):
            Name for messages.
    """
    brought = row.get("tokenizer_hash")
    if brought is None:
        return
    if brought != tokenizer_hash(processing_class):
        logger.info(f"The token ids in the {name} dataset belong to another tokenizer, so the text is tokenized.")
        return
    logger.info(f"The token ids in the {name} dataset are used as they were written.")
    ids, prompt = row.get("prompt_ids"), row.get("prompt")
    if ids is None or isinstance(prompt, str) or processing_class.chat_template is None:
        return
    check_prompt(prompt, 0)
    own = _encode(processing_class, row, row, 0)
    if own != list(ids):
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        texts = [repr(decode_ids(tokenizer, each)[:200]) if each is not None else "an error" for each in (ids, own)]
        logger.warning(
            f"The prompts of the {name} dataset were written with another chat template, and the student is trained on its format: "
            f"the first is {texts[0]}, where the student's template makes {texts[1]}. To train on the student's, {_DROP}"
        )


def _said(prompt: str | list[dict[str, Any]]) -> list[str]:
    """Texts that every template shows somewhere: a text prompt, or what the system and the user say."""
    if isinstance(prompt, str):
        return [prompt]
    contents = [message.get("content") for message in prompt if message["role"] in ("system", "user")]
    parts = [[content] if isinstance(content, str) else content or [] for content in contents]
    texts = [part if isinstance(part, str) else part.get("text") for of_message in parts for part in of_message]
    return [text for text in texts if text]


def _encode(processing_class: Any, row: dict[str, Any], group: dict[str, Any], index: int) -> list[int] | None:
    """Ids of the prompt by the own chat template; `None` if that refuses it, as some do a system prompt."""
    template = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    prompt = put_images(processing_class, group["prompt"], images_of(row), index)
    try:
        return encode_prompt(processing_class, prompt, **template)
    except TemplateError:
        return None
