"""What a server's answers say, read so that nothing wrong is taken for a completion or a score."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .http import UnusableAnswer


WITHHELD = {"content_filter": "filtered", "tool_calls": "tool calls", "function_call": "tool calls"}


class MissingLogps(Exception):
    """The answer has no log-probabilities of the prompt at all, as another attempt will not have."""


class PromptLogps(NamedTuple):
    """
    What a server says of the T tokens of a prompt.

    Args:
        logps (`list[float]`):
            T - 1 log-probabilities in nats, those of all tokens but the first.
        top_ids (`list[list[int]]`, *optional*):
            At each position that was asked for the k most likely tokens, the most likely first.
        top_logps (`list[list[float]]`, *optional*):
            Their log-probabilities.
    """

    logps: list[float]
    top_ids: list[list[int]] | None = None
    top_logps: list[list[float]] | None = None


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


def read_vllm_top(answer: dict[str, Any], ids: list[int], k: int, first: int) -> PromptLogps:
    """
    Log-probabilities of a prompt and the k most likely tokens at its positions, as vLLM gives them for
    `prompt_logprobs=k`: a map from ids, with the rank of each; k entries, or one more where the token that was sent is not
    among them.

    Args:
        answer (`dict[str, Any]`):
            Answer of `/completions`.
        ids (`list[int]`):
            T tokens that were sent.
        k (`int`):
            Tokens that were asked for.
        first (`int`):
            First position whose tokens are read, 1 or above.

    Returns:
        [`PromptLogps`]: With the tokens at `ids[first:]`.

    Raises:
        [`UnusableAnswer`]: If a position has not exactly these.
        [`MissingLogps`]: If there is no log-probability at all.
    """
    logps = read_vllm_logps(answer, ids)
    (choice,) = _choices(answer, 1)
    tops = []
    for position in range(first, len(ids)):
        entry = choice["prompt_logprobs"][position]
        ranked = {
            value["rank"]: (int(token_id) if token_id.isdecimal() else None, value.get("logprob"))
            for token_id, value in entry.items()
            if isinstance(value, dict) and type(value.get("rank")) is int
        }
        if len(entry) > k + 1:
            raise UnusableAnswer(f"{len(entry)} most likely tokens at position {position}, {k} were asked for")
        pairs = [ranked[rank] for rank in range(1, k + 1) if rank in ranked]
        tops.append(_top(pairs, k, ids, position, logps[position - 1]))
    return PromptLogps(logps, [top[0] for top in tops], [top[1] for top in tops])


def read_sglang_top(answer: dict[str, Any], ids: list[int], k: int, first: int) -> PromptLogps:
    """
    Log-probabilities of a prompt and the k most likely tokens at its positions, as SGLang's own `/generate` gives them for
    `top_logprobs_num=k`: log-probability, id and text of each. (Its `/v1/completions` names tokens by their text, which
    several may share.)

    Args:
        answer (`dict[str, Any]`):
            Answer of `/generate`.
        ids (`list[int]`):
            T tokens that were sent.
        k (`int`):
            Tokens that were asked for.
        first (`int`):
            First position whose tokens are read, 1 or above.

    Returns:
        [`PromptLogps`]: With the tokens at `ids[first:]`.

    Raises:
        [`UnusableAnswer`]: If a position has not exactly these, or they are not those of the tokens sent.
        [`MissingLogps`]: If there is no log-probability at all.
    """
    said = answer.get("meta_info")
    said = said if isinstance(said, dict) else {}
    given, tops = said.get("input_token_logprobs"), said.get("input_top_logprobs")
    if not given or not tops:
        raise MissingLogps
    own, pairs = _sglang_pairs(given), [[] if top is None else _sglang_pairs(top) for top in tops]
    if [token_id for token_id, _ in own] != ids or len(pairs) != len(ids) or said.get("prompt_tokens") != len(ids):
        raise UnusableAnswer(f"log-probabilities of other tokens than the {len(ids)} sent")
    if own[0][1] is not None or tops[0] is not None:
        raise UnusableAnswer("a log-probability of the first token, before which there is nothing")
    logps = _logps([value for _, value in own[1:]])
    read = [_top(pairs[position], k, ids, position, logps[position - 1]) for position in range(first, len(ids))]
    return PromptLogps(logps, [top[0] for top in read], [top[1] for top in read])


def _sglang_pairs(entries: Any) -> list[tuple[Any, Any]]:
    """Id and log-probability of each entry."""
    if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) > 1 for entry in entries):
        raise UnusableAnswer("no lists of a log-probability and an id each")
    return [(entry[1], entry[0]) for entry in entries]


def _top(
    pairs: list[tuple[Any, Any]], k: int, ids: list[int], position: int, own: float
) -> tuple[list[int], list[float]]:
    """
    The most likely tokens at a position, the most likely first, if they are k of one distribution, and of that in which the
    token sent has the log-probability `own`: an answer that is shifted has it elsewhere.
    """
    at = f"at position {position}"
    if len({token_id for token_id, _ in pairs}) != k or len(pairs) != k:
        raise UnusableAnswer(f"{len(pairs)} most likely tokens {at}, {k} were asked for")
    if not all(type(token_id) is int and token_id >= 0 for token_id, _ in pairs):
        raise UnusableAnswer(f"a most likely token {at} that has no id")
    values = _logps([value for _, value in pairs])
    mass = sum(map(math.exp, values))
    if mass > 1.001:
        raise UnusableAnswer(f"most likely tokens {at} whose probabilities sum to {mass:.4g}")
    among = dict(zip((token_id for token_id, _ in pairs), values, strict=True)).get(ids[position])
    if own > min(values) + 1e-3 if among is None else abs(own - among) > 1e-3:
        raise UnusableAnswer(f"most likely tokens {at} of another position than the token sent")
    order = sorted(range(k), key=lambda index: -values[index])
    return [pairs[index][0] for index in order], [values[index] for index in order]


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
    values, tokens, num_prompt = _echoed(answer)
    if len(values) != len(ids) + 1:
        raise UnusableAnswer(f"{len(values)} log-probabilities, {len(ids)} tokens were sent and one more asked for")
    if num_prompt != len(ids):
        raise UnusableAnswer(f"{num_prompt} prompt tokens in `usage`, {len(ids)} were sent")
    if values[0] is not None:
        raise UnusableAnswer("a log-probability of the first token, before which there is nothing")
    _check_texts(tokens, texts)
    return _logps(values[1 : len(ids)])


def read_llama_cpp_logps(
    answer: dict[str, Any], ids: list[int], texts: Sequence[set[str]], bos_token_id: int
) -> list[float]:
    """
    Log-probabilities of a prompt that starts with BOS as llama-cpp-python gives them for `echo` with `logprobs`. It
    leaves out every BOS, and the value of the token after the first one. Without a BOS at the start its values are of
    other tokens.

    Args:
        answer (`dict[str, Any]`):
            Answer of `/completions` to `echo`, `logprobs` and one token to write.
        ids (`list[int]`):
            T tokens of the text that was sent.
        texts (`Sequence[set[str]]`):
            For each of them the forms in which a server may write it.
        bos_token_id (`int`):
            BOS.

    Returns:
        `list[float]`: T - 1 values in nats, those of `ids[1:]`; NaN where there is none.

    Raises:
        [`UnusableAnswer`]: If the values are not those of the tokens sent.
        [`MissingLogps`]: If there is none at all.
    """
    values, tokens, num_prompt = _echoed(answer)
    kept = [position for position, token_id in enumerate(ids) if token_id != bos_token_id]
    if num_prompt != len(ids) or len(values) not in (len(kept), len(kept) + 1):
        raise UnusableAnswer(f"{len(values)} log-probabilities of {num_prompt} tokens, {len(ids)} were sent")
    if ids[0] != bos_token_id or values[0] is not None:
        raise UnusableAnswer("log-probabilities of a prompt that does not start with BOS")
    _check_texts(tokens, [texts[position] for position in kept])
    logps = [math.nan] * (len(ids) - 1)
    for position, value in zip(kept[1:], _logps(values[1 : len(kept)]), strict=True):
        logps[position - 1] = value
    return logps


def _echoed(answer: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """Values, texts of their tokens, and how many tokens the server counted in the prompt."""
    (choice,) = _choices(answer, 1)
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    values, tokens = logprobs.get("token_logprobs"), logprobs.get("tokens")
    if not values:
        raise MissingLogps
    if not isinstance(values, list) or not isinstance(tokens, list) or len(tokens) != len(values):
        raise UnusableAnswer("no `tokens` beside the log-probabilities, which may be of any")
    usage = answer.get("usage")
    return values, tokens, usage.get("prompt_tokens") if isinstance(usage, dict) else None


def _check_texts(tokens: list[Any], texts: Sequence[set[str]]) -> None:
    for position, (given, forms) in enumerate(zip(tokens, texts, strict=False)):
        if given not in forms:
            raise UnusableAnswer(
                f"the log-probability of {given!r} at position {position}, where {min(forms)!r} was sent: is the "
                "tokenizer the model's own?"
            )


def _logps(values: list[Any]) -> list[float]:
    """`values`, if each is a log-probability. `False` is no number, and rounding may leave a value just above 0."""
    for value in values:
        if type(value) not in (int, float) or math.isnan(value) or value > 1e-3:
            raise UnusableAnswer(f"{value!r} in place of a log-probability")
    return [float(value) for value in values]
