"""Rows of a group dataset: read and checked.

A group is one prompt with two or more completions: `{"prompt", "completions": [...], "teacher_scores": [...]}`, where
the scores are optional, and so is `"clipped": [...]`, `True` for a completion that was cut before its end. Groups that a
model wrote also hold its token ids: `prompt_ids`, `completion_ids` and the `tokenizer_hash` of its tokenizer. A
`teacher_prompt` is what the teacher reads in place of the prompt.
"""

import json
import numbers
from typing import Any

import torch
from trl import extract_prompt

from .._trl import remove_none_values


_FORMATS = (
    'a group, {"prompt", "completions": [...], "teacher_scores": [...] (optional)}, or a preference, '
    '{"prompt" (optional), "chosen", "rejected", "score_chosen" and "score_rejected" (optional)}'
)
_FORMS = "text, or a list of messages such as [{'role': ..., 'content': ...}]"
WRITTEN = ("prompt_ids", "completion_ids", "tokenizer_hash")  # columns of what a model wrote


def is_score(value: Any) -> bool:
    """
    Whether a value can be trained on as a score: a number that is finite in float32.

    Args:
        value (`Any`):
            Value.

    Returns:
        `bool`: `False` for `None`, text, NaN, infinities, and numbers beyond the range of float32.
    """
    return isinstance(value, numbers.Real) and bool(abs(value) <= torch.finfo(torch.float32).max)  # type: ignore[operator]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_text(value: Any, where: str) -> None:
    """
    Refuse what is neither text nor messages.

    Args:
        value (`Any`):
            Prompt or completion.
        where (`str`):
            Which field of which row, for the error.

    Raises:
        `ValueError`: If it is no text and no list of messages with a role each.
    """
    if isinstance(value, str):
        return
    if isinstance(value, dict):
        raise ValueError(f"{where} is one message, {_shown(value)}: wrap it in a list. Accepted is {_FORMS}.")
    if not isinstance(value, list | tuple) or len(value) == 0:
        raise ValueError(f"{where} is {_shown(value)}. Accepted is {_FORMS}. Drop the row if it is missing.")
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{where} holds {_shown(turn)}, which is no message. Accepted is {_FORMS}.")
        if not isinstance(turn.get("content"), str | list | tuple | None):
            raise ValueError(f"{where} holds a message with the content {_shown(turn['content'])}: give text.")


def message_text(message: dict[str, Any]) -> str:
    """
    What a message says, for a reader: its reasoning, its content and its tool calls.

    Args:
        message (`dict[str, Any]`):
            Message. Content may be text, a list of parts, `None` or absent.

    Returns:
        `str`: Text.
    """
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    parts = [message.get("reasoning_content"), message.get("thinking"), content]
    calls = [json.dumps(remove_none_values(call), default=str) for call in message.get("tool_calls") or []]
    return "\n".join([part for part in parts if part] + calls)


def check_prompt(prompt: Any, index: int) -> None:
    """
    Refuse a prompt that is missing, empty, or neither text nor messages.

    Args:
        prompt (`Any`):
            Prompt.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: The message names field and row.
    """
    if prompt is None or (isinstance(prompt, str | list | tuple) and len(prompt) == 0):
        raise ValueError(f"`prompt` of row {index} is {prompt!r}: give it text or messages, or drop the row.")
    check_text(prompt, f"`prompt` of row {index}")


def check_teacher_prompt(value: Any, prompt: Any, index: int) -> None:
    """
    Refuse a `teacher_prompt` that is empty, neither text nor messages, or of another form than the prompt.

    Args:
        value (`Any`):
            Prompt that the teacher reads. `None` for the student's.
        prompt (`str` or `list[dict]`):
            Prompt that the student reads.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: The message names field and row.
    """
    if value is None:
        return
    if isinstance(value, str | list | tuple) and len(value) == 0:
        raise ValueError(
            f"`teacher_prompt` of row {index} is {value!r}: give it text or messages, or `None` where the teacher reads "
            "`prompt`."
        )
    check_text(value, f"`teacher_prompt` of row {index}")
    if isinstance(value, str) != isinstance(prompt, str):
        forms = ("text", "messages") if isinstance(value, str) else ("messages", "text")
        raise ValueError(
            f"`teacher_prompt` of row {index} is {forms[0]} and `prompt` is {forms[1]}: give both in the same form, since "
            "the same completion follows both."
        )


def read_prompt(row: dict[str, Any], index: int) -> Any:
    """
    Prompt of a row; TRL's preferences may hold it inside `chosen` and `rejected`.

    Args:
        row (`dict[str, Any]`):
            Row.
        index (`int`):
            Row number, for the error.

    Returns:
        `str` or `list[dict]`: Prompt.

    Raises:
        `ValueError`: If there is none; the message names field and row.
    """
    prompt = _with_prompt(row, index)["prompt"] if "prompt" not in row and "chosen" in row else row.get("prompt")
    check_prompt(prompt, index)
    return prompt


def _with_prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
    """A preference with its prompt in a field of its own."""
    for field in ("chosen", "rejected"):
        check_text(row.get(field), f"`{field}` of row {index}")
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise ValueError(f"`chosen` and `rejected` of row {index} must both be text or both be messages.")
    return row if "prompt" in row else extract_prompt(row)


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
        `dict[str, Any]`: `prompt`, `completions`, `clipped` and, where there are any, `teacher_prompt`, `teacher_scores`,
        and `prompt_ids`, `completion_ids` and `tokenizer_hash`.

    Raises:
        `ValueError`: If the row is no group that can be ranked; the message names field and row.
    """
    if "completions" in row:
        group = {"prompt": row.get("prompt"), "completions": row["completions"]}
        if "teacher_scores" in row:
            group["teacher_scores"] = row["teacher_scores"]
        if row.get("tokenizer_hash") is not None:
            group |= {name: row.get(name) for name in WRITTEN}
    elif "chosen" in row and "rejected" in row:
        row = _with_prompt(row, index)
        scores = [row.get("score_chosen"), row.get("score_rejected")]
        group = {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"]],
            "teacher_scores": [1.0, 0.0] if scores == [None, None] else scores,
        }
    else:
        raise ValueError(f"Row {index} has the columns {sorted(row)}, which make no group. Accepted is {_FORMATS}.")

    check_prompt(group["prompt"], index)
    if "teacher_prompt" in row:
        check_teacher_prompt(row["teacher_prompt"], group["prompt"], index)
        group["teacher_prompt"] = row["teacher_prompt"]
    check_completions(group["prompt"], group["completions"], index, min_completions=min_completions)
    group["clipped"] = [False] * len(group["completions"]) if row.get("clipped") is None else row["clipped"]
    for name in ("teacher_scores", "clipped", "completion_ids"):
        if name in group:
            check_one_each(group, name, index)
    if "completion_ids" in group and group["prompt_ids"] is None:
        raise ValueError(f"`prompt_ids` of row {index} is None, and `completion_ids` were written after a prompt.")
    for position, value in enumerate(group.get("teacher_scores", [])):
        field = "teacher_scores" if "completions" in row else ("score_chosen", "score_rejected")[position]
        check_score(value, field, position, index)
    if "completions" in row and "teacher_scores" in group:
        check_pair_agreement(row.get("teacher_pair_agreement"), len(group["completions"]), index)
    for position, value in enumerate(group["clipped"]):
        if value not in (True, False):
            raise ValueError(
                f"`clipped` of row {index} holds {_shown(value)} for completion {position}: give `True` or `False`."
            )
    return group


def check_score(value: Any, field: str, position: int, index: int) -> None:
    """
    Refuse what is no score.

    Args:
        value (`Any`):
            Score of a completion.
        field (`str`):
            Its field, for the error.
        position (`int`):
            Number of the completion, for the error.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: The message names field, row and completion.
    """
    if not is_score(value):
        raise ValueError(
            f"`{field}` of row {index} holds {value!r} for completion {position}: scores are numbers that are "
            "finite in float32, higher is better. Drop the completion, or score it again."
        )


def check_completions(prompt: Any, completions: Any, index: int, *, min_completions: int = 2) -> None:
    """
    Refuse completions that are too few, or neither text nor messages.

    Args:
        prompt (`str` or `list[dict]`):
            Their prompt.
        completions (`Any`):
            Completions.
        index (`int`):
            Row number, for the error.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions.

    Raises:
        `ValueError`: The message names field, row and completion.
    """
    if completions is not None and not isinstance(completions, list | tuple):
        raise ValueError(
            f"`completions` of row {index} is {_shown(completions)}: give a list with an entry for each completion. An "
            f"entry is {_FORMS}."
        )
    if completions is None or len(completions) < min_completions:
        reason = "a group is ranked by comparing, so it " if min_completions > 1 else "a group "
        raise ValueError(
            f"`completions` of row {index} has {len(completions or [])} entries: {reason}"
            f"needs {min_completions} or more. Sample more completions for this prompt, or drop the row."
        )
    for position, completion in enumerate(completions):
        check_text(completion, f"Completion {position} of row {index}, in `completions`,")
        if isinstance(prompt, str) and not isinstance(completion, str):
            raise ValueError(
                f"`prompt` of row {index} is text and completion {position}, in `completions`, is messages: give the "
                "prompt as messages too."
            )


def check_pair_agreement(shares: Any, num_completions: int, index: int) -> None:
    """
    Refuse agreement on pairs that is not one share for each pair, the same in both orders.

    Args:
        shares (`list[list[float]]`, *optional*):
            A row of shares for each completion.
        num_completions (`int`):
            Completions of the group.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: The message names the row.
    """
    if shares is None:
        return
    sizes = [len(row) for row in shares]
    if sizes != [num_completions] * num_completions:
        raise ValueError(
            f"`teacher_pair_agreement` of row {index} has rows of {sizes} shares for {num_completions} completions: give a share "
            "for each pair of completions, or drop the column."
        )
    for i in range(num_completions):
        for j in range(num_completions):
            if not (is_score(shares[i][j]) and 0 <= shares[i][j] <= 1 and shares[i][j] == shares[j][i]):
                raise ValueError(
                    f"`teacher_pair_agreement` of row {index} holds {shares[i][j]!r} and {shares[j][i]!r} for the completions {i} "
                    f"and {j}: give one share from 0 to 1 for both orders, or drop the column."
                )


def check_one_each(group: dict[str, Any], name: str, index: int) -> None:
    """
    Refuse a list without one value for each completion.

    Args:
        group (`dict[str, Any]`):
            Row with `completions`.
        name (`str`):
            Field of the list.
        index (`int`):
            Row number, for the error.

    Raises:
        `ValueError`: The message names field and row.
    """
    values, num_completions = group[name], len(group["completions"])
    if values is not None and not isinstance(values, list | tuple):
        raise ValueError(f"`{name}` of row {index} is {_shown(values)}: give a list with one for each completion.")
    if values is None or len(values) != num_completions:
        raise ValueError(
            f"`{name}` of row {index} has {len(values or [])} entries for {num_completions} completions: "
            "give one for each, in the same order, in every row of the dataset or in none."
        )
