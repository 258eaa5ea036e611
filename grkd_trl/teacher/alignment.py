"""Two tokenizers side by side: where both have read the same text, and which of their tokens are the same string."""

import os.path
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data import encode_prompt, encode_teacher_prompt, read_group, read_prompt, tokenize_completions
from ..data.images import refuse_images
from ..data.rows import WRITTEN


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_WINDOW = 16  # tokens that are decoded together, so that a long completion costs no more for each of its tokens


class _Reader:
    """A tokenizer that decodes tokens as they stand in the middle of a text."""

    def __init__(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin):
        self.tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        self.context = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        if getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", True) is None:
            self.context = []  # without a decoder tokens are joined by spaces that no token holds
        self.start = self._decode(self.context)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(self, ids: Sequence[int]) -> str:
        whole = self._decode([*self.context, *ids])
        return whole[len(self.start) :] if whole.startswith(self.start) else self._decode(list(ids))


def token_starts(processing_class: PreTrainedTokenizerBase | ProcessorMixin, ids: Sequence[int]) -> list[int | None]:
    """
    Characters of the text before each token of a completion.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer.
        ids (`Sequence[int]`):
            T tokens.

    Returns:
        `list[int | None]`: T numbers. `None` where a token before ends inside a character.
    """
    reader = _Reader(processing_class)
    starts: list[int | None] = []
    base = first = 0
    for place in range(len(ids)):
        text = reader.text(ids[first:place])
        is_whole = not text.endswith("\ufffd")
        starts.append(base + len(text) if is_whole else None)
        if reader.context and is_whole and place - first >= _WINDOW:
            base, first = base + len(text), place
    return starts


def align_completion(
    student: PreTrainedTokenizerBase | ProcessorMixin,
    student_ids: Sequence[int],
    teacher: PreTrainedTokenizerBase | ProcessorMixin,
    teacher_ids: Sequence[int],
    *,
    student_lead: Sequence[int] = (),
    teacher_lead: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """
    Positions of a completion at which both tokenizers have read the same text of it, so that both models predict what follows
    that text.

    Args:
        student, teacher ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizers.
        student_ids, teacher_ids (`Sequence[int]`):
            Tokens of the completion by each.
        student_lead, teacher_lead (`Sequence[int]`, *optional*):
            Tokens at the end of the prompt alone whose text these begin with, since it merges with the completion.

    Returns:
        `tuple[list[int], list[int]]`: Positions among the student's tokens, ascending, and those among the teacher's.
    """
    sides = ((student, student_ids, student_lead), (teacher, teacher_ids, teacher_lead))
    leads = [_Reader(own).text(lead) for own, _, lead in sides]
    texts = [_Reader(own).text(ids) for own, ids, _ in sides]
    if not all(text.startswith(lead) for text, lead in zip(texts, leads, strict=True)):
        return [], []
    # Characters after the prompt: beyond `common` are the ends of a turn, or what a template changed
    common = len(os.path.commonprefix([text[len(lead) :] for text, lead in zip(texts, leads, strict=True)]))
    first = -len(os.path.commonprefix([lead[::-1] for lead in leads]))
    starts: list[dict[int, int]] = []
    for (own, ids, _), lead in zip(sides, leads, strict=True):
        starts.append({})
        for place, start in enumerate(token_starts(own, ids)):
            if start is not None and first <= start - len(lead) <= common:
                starts[-1].setdefault(
                    start - len(lead), place
                )  # after a token without text more than the text was read
    both = [start for start in starts[0] if start in starts[1]]
    return [starts[0][start] for start in both], [starts[1][start] for start in both]


def _end_of_turn(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> int | None:
    """The token that ends the assistant's turn in the chat template, which need not be the tokenizer's EOS."""
    tokenizer = _Reader(processing_class).tokenizer
    _, (ids,) = tokenize_completions(processing_class, [{"role": "user", "content": "a"}], ["a"])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in ids if token in special), tokenizer.eos_token_id)


def shared_tokens(
    student: PreTrainedTokenizerBase | ProcessorMixin,
    teacher: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    conversational: bool = False,
) -> tuple[list[int], list[int]]:
    """
    Tokens of two vocabularies that are the same string in the middle of a text, and the two tokens for its end.

    Args:
        student, teacher ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizers.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether the end is that of the assistant's turn in the chat templates, and not EOS.

    Returns:
        `tuple[list[int], list[int]]`: The student's tokens and the teacher's, string by string. Of several tokens of a string the
        first that is no byte fallback; special tokens and parts of a character are left out.
    """
    by_string: list[dict[str, int]] = []
    for processing_class in (student, teacher):
        reader = _Reader(processing_class)
        tokenizer = reader.tokenizer
        own: dict[str, int] = {}
        special = {token for token, added in reader.tokenizer.added_tokens_decoder.items() if added.special}
        # A text is tokenized to bytes only where no token has its character, so theirs come last
        vocabulary = sorted(
            (_BYTE.fullmatch(name) is not None, token) for name, token in tokenizer.get_vocab().items()
        )
        for _, token in vocabulary:
            text = "" if token in special else reader.text([token])
            if text and "\ufffd" not in text:
                own.setdefault(text, token)
        end = _end_of_turn(processing_class) if conversational else tokenizer.eos_token_id
        if end is not None:
            own[""] = end  # no other token is empty
        by_string.append(own)
    both = [text for text in by_string[0] if text in by_string[1]]
    return [by_string[0][text] for text in both], [by_string[1][text] for text in both]


def _lead(processing_class: Any, prompt: Any, prompt_ids: list[int], template: dict[str, Any]) -> list[int]:
    """Tokens at the end of a prompt alone that were left to its completions."""
    whole = encode_prompt(processing_class, prompt, **template)
    return whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else []


def align_group(
    row: dict[str, Any],
    index: int,
    *,
    student: PreTrainedTokenizerBase | ProcessorMixin,
    teacher: PreTrainedTokenizerBase | ProcessorMixin,
    context_length: float,
) -> dict[str, Any]:
    """
    Tokenize a group with the teacher's tokenizer too, and align its completions.

    Args:
        row (`dict[str, Any]`):
            Group with `prompt_ids` and `completion_ids` of the student's tokenizer beside their text.
        index (`int`):
            Row number, for errors.
        student, teacher ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizers.
        context_length (`float`):
            Longest row that the teacher reads, in tokens.

    Returns:
        `dict[str, Any]`: `aligned_prompt_ids`, `aligned_completion_ids`, and for each completion `aligned_student` and
        `aligned_teacher`, positions among its tokens.

    Raises:
        `ValueError`: If it has images or does not fit the teacher's context.
    """
    refuse_images(row, index, 'Soft labels across tokenizers (`"aligned"`)')
    group = read_group({name: row[name] for name in row if name not in WRITTEN}, index, min_completions=1)
    template = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    read = partial(tokenize_completions, teacher, group["prompt"], group["completions"], **template)
    prompt_ids, completion_ids = read(clipped=group["clipped"])
    if [] in completion_ids:  # cut before any text: the teacher scores its end, since a row without a token scores 0
        prompt_ids, completion_ids = read(
            clipped=[cut and bool(ids) for cut, ids in zip(group["clipped"], completion_ids, strict=True)]
        )
    shown = row.get("teacher_prompt")
    if shown is not None:
        own = {"prompt": group["prompt"], "teacher_prompt": shown, **template}
        prompt_ids = encode_teacher_prompt(teacher, own, prompt_ids, index)
    longest = len(prompt_ids) + max(map(len, completion_ids))
    if longest > context_length:
        raise ValueError(
            f"Row {index} has {longest} of the teacher's tokens, and its context holds {context_length:.0f}. Shorten or drop it: "
            f"its prompt is {group['prompt']!r}."
        )
    leads = {
        "student_lead": _lead(student, group["prompt"], row["prompt_ids"], template),
        "teacher_lead": _lead(teacher, group["prompt"] if shown is None else shown, prompt_ids, template),
    }
    pairs = [
        align_completion(student, ours, teacher, theirs, **leads)
        for ours, theirs in zip(row["completion_ids"], completion_ids, strict=True)
    ]
    return {
        "aligned_prompt_ids": prompt_ids,
        "aligned_completion_ids": completion_ids,
        "aligned_student": [places for places, _ in pairs],
        "aligned_teacher": [places for _, places in pairs],
    }


def refuse_unaligned(share: float, min_aligned: float, which: str) -> None:
    """
    Refuse completions of which two tokenizers have read the same text at too few tokens.

    Args:
        share (`float`):
            Share of the student's tokens at whose positions both have.
        min_aligned (`float`):
            Least share.
        which (`str`):
            Which completions, for the error.

    Raises:
        `ValueError`: If the share is below the least.
    """
    if share < min_aligned:
        raise ValueError(
            f"The tokenizers of student and teacher have read the same text at {share:.1%} of the tokens of {which}, below "
            f"`min_aligned={min_aligned}`. Lower it, or train on the teacher's scores "
            '(`soft_label="group"` or `"none"`).'
        )


def align_groups(
    dataset: Dataset | IterableDataset,
    student: PreTrainedTokenizerBase | ProcessorMixin,
    teacher: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    context_length: float,
    min_aligned: float,
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """
    Align a dataset of groups, see [`align_group`].

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups with `prompt_ids` and `completion_ids` of the student's tokenizer beside their text, as
            [`~data.prepare_groups`] gives them.
        student, teacher, context_length:
            As for [`align_group`].
        min_aligned (`float`):
            Least share of the student's tokens at whose positions both have read the same text. That of a stream is not known
            before it is read, and not checked here.
        num_proc (`int`, *optional*):
            Processes for `Dataset.map`.
        name (`str`, *optional*, defaults to `"train"`):
            Name for progress bars and messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns of [`align_group`] added.

    Raises:
        `ValueError`: If the dataset has no text, a row has images or does not fit the teacher's context, or the share is below
            the least.
    """
    in_memory = isinstance(dataset, Dataset)
    if not {"completions", "chosen"}.intersection(dataset.column_names or next(iter(dataset))):
        raise ValueError(
            "The dataset is tokenized, and the teacher reads other tokens: give the text (`prompt`, `completions`) too."
        )
    align = partial(align_group, student=student, teacher=teacher, context_length=context_length)
    kwargs = {"num_proc": num_proc, "desc": f"Aligning {name} groups"} if in_memory else {}
    aligned = dataset.map(align, with_indices=True, **kwargs)
    if in_memory:
        num_aligned = sum(len(places) for row in aligned["aligned_student"] for places in row)
        num_tokens = sum(len(ids) for row in aligned["completion_ids"] for ids in row)
        refuse_unaligned(num_aligned / num_tokens, min_aligned, f"the {name} completions")
    return aligned


def check_prompts(
    dataset: Dataset,
    teacher: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    context_length: float,
    max_completion_length: int,
) -> None:
    """
    Refuse prompts of online groups that a teacher with another tokenizer cannot read, before any completion is written.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`.
        teacher ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The teacher's tokenizer.
        context_length (`float`):
            Longest row that the teacher reads, in tokens.
        max_completion_length (`int`):
            Longest completion, in tokens of the model that writes it.

    Raises:
        `ValueError`: If a prompt has images, or leaves no room for the longest completion.
    """
    for index, row in enumerate(dataset):
        refuse_images(row, index, 'Soft labels across tokenizers (`"aligned"`)')
        template = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
        shown = row.get("teacher_prompt")
        num_prompt = len(encode_prompt(teacher, read_prompt(row, index) if shown is None else shown, **template))
        if num_prompt + max_completion_length > context_length:
            raise ValueError(
                f"The prompt of row {index} has {num_prompt} of the teacher's tokens and leaves no room for "
                f"`max_completion_length={max_completion_length}` in its context of {context_length:.0f}. Shorten or drop it."
            )
