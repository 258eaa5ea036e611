"""What a server's answers say, read so that nothing wrong is taken for a completion or a score."""

import math
from collections.abc import Sequence
from typing import Any

from .._http import UnusableAnswer


WITHHELD = {"content_filter": "filtered", "tool_calls": "tool calls", "function_call": "tool calls"}


class MissingLogps(Exception):
    """The answer has no log-probabilities of the prompt at all, as another attempt will not have."""


class SplitReasoning(Exception):
    """The server moved the reasoning out of the answer, where it cannot be put back as it was written."""


def read_texts(answer: dict[str, Any], num_completions: int) -> list[tuple[str, bool] | str]:
    """
    Completions of an answer.

    Args:
        answer (`dict[str, Any]`):
            Answer of `/completions` or `/chat/completions`.
        num_completions (`int`):
            How many were asked for.

    Returns:
        `list[tuple[str, bool] | str]`: Of each completion its text and whether it was cut; where it was withheld,
        the reason in its place: `"filtered"`, `"refused"` or `"tool calls"`.

    Raises:
        [`UnusableAnswer`]: If the answer has another form.
        [`SplitReasoning`]: If a reasoning parser took it apart.
    """
    choices = _choices(answer, num_completions)
    completions: list[tuple[str, bool] | str] = []
    for choice in choices:
        message = choice if "text" in choice else choice.get("message")
        reason = choice.get("finish_reason")
        if not isinstance(message, dict):
            raise UnusableAnswer("a choice with neither `text` nor `message`")
        for name in ("reasoning_content", "reasoning"):
            if message.get(name):
                raise SplitReasoning(name)
        if message.get("refusal"):
            completions.append("refused")
        elif message.get("tool_calls") or message.get("function_call"):
            completions.append("tool calls")
        elif isinstance(reason, str) and reason in WITHHELD:
            completions.append(WITHHELD[reason])
        elif reason not in ("stop", "length"):
            raise UnusableAnswer(f"a completion that ended with {reason!r}")
        else:
            text = choice["text"] if "text" in choice else message.get("content")
            if not isinstance(text, str | None):
                raise UnusableAnswer(f"a completion that is no text: {str(text)[:100]!r}")
            completions.append((text or "", reason == "length"))
    return completions


def _choices(answer: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Choices in the order of `index`, which must be 0 to `number` - 1."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UnusableAnswer("no list of `choices` in it")
    indices = [choice.get("index") for choice in choices]
    if not all(type(index) is int for index in indices) or sorted(indices) != list(range(number)):
        raise UnusableAnswer(f"choices with `index` {indices}, {number} were asked for")
    return sorted(choices, key=lambda choice: choice["index"])


def check_model(answer: dict[str, Any], model: str) -> None:
    """
    Check that the model asked for has answered.

    Args:
        answer (`dict[str, Any]`):
            Answer.
        model (`str`):
            The model's name at the server.

    Raises:
        [`UnusableAnswer`]: If the answer names another.
    """
    if answer.get("model", model) != model:
        raise UnusableAnswer(f"the answer of the model {answer['model']!r}, {model!r} was asked")


def read_vllm_logps(answer: dict[str, Any], ids: list[int]) -> list[float]:
    """
    Log-probabilities of a prompt as vLLM gives them for `prompt_logprobs`: of each token but the first, by id.

    Args:
        answer (`dict[str, Any]`):
            Answer of `/completions`.
        ids (`list[int]`):
            T tokens that were sent.

    Returns:
        `list[float]`: T - 1 values in nats, those of `ids[1:]`.

    Raises:
        [`UnusableAnswer`]: If there is not exactly one value a token sent.
        [`MissingLogps`]: If there is none at all.
    """
    (choice,) = _choices(answer, 1)
    given = choice.get("prompt_logprobs")
    if not given:
        raise MissingLogps
    sent = choice.get("prompt_token_ids")
    if not isinstance(given, list) or len(given) != len(ids) or given[0] is not None or sent not in (None, ids):
        raise UnusableAnswer(f"log-probabilities of other tokens than the {len(ids)} sent")
    values = []
    for entry, token_id in zip(given[1:], ids[1:], strict=True):
        entry = entry.get(str(token_id)) if isinstance(entry, dict) else None
        values.append(entry.get("logprob") if isinstance(entry, dict) else None)
    return _logps(values)


def read_echoed_logps(answer: dict[str, Any], ids: list[int], texts: Sequence[set[str]]) -> list[float]:
    """
    Log-probabilities of a prompt that is echoed with `logprobs`, as SGLang gives them, which has no ids: they are taken
    for those of the tokens sent if their number, the server's count of the prompt's tokens, and each token's text agree.

    Args:
        answer (`dict[str, Any]`):
            Answer of `/completions` to `echo`, `logprobs` and one token to write.
        ids (`list[int]`):
            T tokens that were sent.
        texts (`Sequence[set[str]]`):
            For each of them the forms in which a server may write it.

    Returns:
        `list[float]`: T - 1 values in nats, those of `ids[1:]`.

    Raises:
        [`UnusableAnswer`]: If there is not exactly one value a token sent.
        [`MissingLogps`]: If there is none at all.
    """
    (choice,) = _choices(answer, 1)
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    values, tokens = logprobs.get("token_logprobs"), logprobs.get("tokens")
    if not values:
        raise MissingLogps
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    num_written = usage.get("completion_tokens", 1)
    if not isinstance(values, list) or num_written not in (0, 1) or len(values) != len(ids) + num_written:
        raise UnusableAnswer(f"{len(values)} log-probabilities, {len(ids)} tokens were sent and one more asked for")
    if usage.get("prompt_tokens") != len(ids):
        raise UnusableAnswer(f"{usage.get('prompt_tokens')} prompt tokens in `usage`, {len(ids)} were sent")
    if values[0] is not None:
        raise UnusableAnswer("a log-probability of the first token, before which there is nothing")
    if not isinstance(tokens, list) or len(tokens) != len(values):
        raise UnusableAnswer("no `tokens` beside the log-probabilities, which may be of any")
    for position, (given, forms) in enumerate(zip(tokens, texts, strict=False)):
        if not isinstance(given, str) or given not in forms:
            raise UnusableAnswer(
                f"the log-probability of {given!r} at position {position}, where {min(forms)!r} was sent: is the "
                "tokenizer the model's own?"
            )
    return _logps(values[1 : len(ids)])


def _logps(values: list[Any]) -> list[float]:
    """`values`, if each is a log-probability. `False` is no number, and rounding may leave a value just above 0."""
    for value in values:
        if type(value) not in (int, float) or math.isnan(value) or value > 1e-3:
            raise UnusableAnswer(f"{value!r} in place of a log-probability")
    return [float(value) for value in values]
