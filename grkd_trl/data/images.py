"""Images of prompts: put into the messages, and processed when a batch is made."""

from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from .._trl import remove_none_values
from ..scoring.images import TOKEN_TYPES
from .conversations import render_messages
from .tokenization import template_kwargs


# `SFTTrainer` leaves a dataset with columns of TRL's names as it is, and tokenizes it in its own collator.
_RENAMED = {"images": "prompt_images", "image": "prompt_image"}
IMAGE_COLUMNS = (*_RENAMED, *_RENAMED.values(), "image_prompt")


def images_of(row: dict[str, Any]) -> list[Any]:
    """
    Images of a row, in TRL's columns.

    Args:
        row (`dict[str, Any]`):
            Row with `images`, a list, or `image`, one, or neither.

    Returns:
        `list`: Its images, each read from its bytes or its path if it is not yet.
    """
    many, one = (row.get(name, row.get(renamed)) for name, renamed in _RENAMED.items())
    many = many if isinstance(many, list | tuple | None) else [many]
    images = [*(many or []), *([] if one is None else [one])]
    return [Image().decode_example(image) if isinstance(image, dict) else image for image in images]


def has_image_columns(row: dict[str, Any]) -> bool:
    """
    Whether a dataset has columns of images, judging by a row.

    Args:
        row (`dict[str, Any]`):
            Row, which itself may have none.

    Returns:
        `bool`: `True` if it has.
    """
    return any(name in row for names in _RENAMED.items() for name in names)


def rename_images(dataset: Any) -> Any:
    """
    Rename the columns of images, so that [`~trl.SFTTrainer`] has the dataset tokenized as any other.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Groups. Anything else is returned as it is.

    Returns:
        As `dataset`: The groups, with `prompt_images` and `prompt_image` in place of `images` and `image`.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: rename_images(part) for name, part in dataset.items()})
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    columns = dataset.column_names or next(iter(dataset))
    names = {name: renamed for name, renamed in _RENAMED.items() if name in columns}
    return dataset.rename_columns(names) if names else dataset


def put_images(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, prompt: Any, images: list[Any], index: int
) -> Any:
    """
    Put images into the messages of a prompt: in place of its placeholders, or before the text of the first user's message
    where no content is a list of parts.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Processor of a model of images and text.
        prompt (`list[dict]`):
            Messages.
        images (`list`):
            Images, of which there may be none.
        index (`int`):
            Row number, for errors.

    Returns:
        `str` or `list[dict]`: The prompt, with every image in a part of its own.

    Raises:
        `ValueError`: If there are images and the prompt is text, the model is one of text, or there are more or fewer
            images than placeholders.
    """
    if not images:
        return prompt
    if not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"Row {index} has images, and `{type(processing_class).__name__}` is the tokenizer of a text-only model. Pass a "
            "model of images and text with its processor (`processing_class`), or remove the column of images."
        )
    if isinstance(prompt, str):
        raise ValueError(
            f"Row {index} has images, and its `prompt` is text. Give messages, [{{'role': 'user', 'content': ...}}], in which "
            "the images stand before the text, or in the place of parts {'type': 'image'}."
        )
    try:
        return prepare_multimodal_messages(remove_none_values(prompt), images=images)
    except ValueError as error:
        raise ValueError(
            f"Row {index} does not have one image for each placeholder of its prompt: {error} Give as many `images` as there "
            "are parts {'type': 'image'} in `prompt`, or messages whose content is text."
        ) from error


def render_prompt(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: list[dict[str, Any]],
    *,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """
    Text of a prompt as generation reads it, with one placeholder for each image.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Processor of a model of images and text.
        prompt (`list[dict]`):
            Messages.
        tools, chat_template_kwargs (*optional*):
            As in [`encode_prompt`].

    Returns:
        `str`: Text.
    """
    kwargs = template_kwargs(tools, chat_template_kwargs)
    return render_messages(processing_class, remove_none_values(prompt), add_generation_prompt=True, **kwargs)


def process_images(
    processor: ProcessorMixin, text: str, images: list[Any], prompt_ids: list[int]
) -> dict[str, torch.Tensor]:
    """
    What a model of images and text is given of the images of a prompt.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of the model.
        text (`str`):
            Prompt as the chat template renders it.
        images (`list`):
            Its images.
        prompt_ids (`list[int]`):
            Tokens of the prompt.

    Returns:
        `dict[str, torch.Tensor]`: Arguments of its forward. Those of [`TOKEN_TYPES`] are `(T,)`, a value for each of the
        prompt's tokens.

    Raises:
        `ValueError`: If the processor makes other tokens of the prompt now, or gives more for each token than its type.
    """
    # The chat template has the BOS, if there is one.
    inputs = dict(processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt"))
    ids, _ = inputs.pop("input_ids")[0].tolist(), inputs.pop("attention_mask")
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            "A processor makes other tokens of a prompt and its images than when the prompt was tokenized. Give the images in "
            "one size, or drop the columns `prompt_ids`, `completion_ids` and `tokenizer_hash` to tokenize the text again."
        )
    types = {name: inputs.pop(name)[0, : len(prompt_ids)] for name in TOKEN_TYPES if name in inputs}
    for name, values in inputs.items():
        if values.shape[:2] == (1, len(ids)):
            raise ValueError(
                f"`{type(processor).__name__}` gives `{name}` for each token of a prompt, which models here are not given "
                "for the tokens of completions."
            )
    return types | inputs


def refuse_images(row: dict[str, Any], index: int, reader: str) -> None:
    """
    Refuse a row with images.

    Args:
        row (`dict[str, Any]`):
            Row.
        index (`int`):
            Row number, for the error.
        reader (`str`):
            What reads text alone, for the error.

    Raises:
        `ValueError`: If it has images.
    """
    if images_of(row):
        raise ValueError(
            f"Row {index} has images, and {reader} reads text alone. Have a `LocalTeacher` write and score the groups, or "
            "remove the column of images."
        )
