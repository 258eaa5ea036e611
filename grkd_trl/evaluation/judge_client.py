"""A model behind an OpenAI-compatible endpoint that is asked to judge, and a file of what it said."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from ..teacher.http import ServerClient, ServerError, ServerRequest, UnusableAnswer
from .files import append_rows, read_appended


logger = logging.get_logger(__name__)


class JudgeCost(NamedTuple):
    """
    What a judgment will cost, before it starts.

    Args:
        requests (`int`):
            Requests to send.
        cached (`int`):
            Requests whose reply is known already.
        input_tokens (`int`):
            About how many tokens they have, at four characters each.
        output_tokens (`int`):
            How many tokens the replies have at most.
        price (`float` or `None`):
            What these cost at most, in the currency of the prices; `None` where the prices are unknown.
    """

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    price: float | None


class JudgeClient:
    """
    Asks a judge, keeps every complete reply on disk, and never asks the same twice. A failed request is repeated as a
    teacher's is: see [`~teacher.ServerTeacher`].

    Models that refuse `max_tokens` are asked with `max_completion_tokens`, and those that refuse `temperature` without
    it, from their first refusal on.

    Args:
        model (`str`):
            Name of the model at the endpoint.
        cache_path (`str` or `Path`):
            JSONL file of replies, read now and added to.
        base_url (`str`, *optional*):
            Endpoint, e.g. `"http://localhost:8000/v1"`. By default the environment variable `OPENAI_BASE_URL`, or
            OpenAI's.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key. There is no other way to give it. A server on this machine needs
            none.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Longest reply.
        num_workers (`int`, *optional*, defaults to `8`):
            Requests in flight at once.
        max_retries (`int`, *optional*, defaults to `6`):
            Attempts of a request after the first.
        timeout (`float`, *optional*, defaults to `120.0`):
            Deadline of an attempt in seconds, from connecting to the last byte of the reply.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt, doubled for each further one up to a minute.

    Raises:
        `ValueError`: If the environment has no key and the server is not on this machine, or an argument lies outside
            its range.
        `OSError`: If the file of replies cannot be written to.
    """

    def __init__(
        self,
        model: str,
        cache_path: str | Path,
        *,
        base_url: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        max_tokens: int = 1024,
        num_workers: int = 8,
        max_retries: int = 6,
        timeout: float = 120.0,
        backoff: float = 1.0,
    ):
        key = os.environ.get(api_key_variable, "")
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self._client = ServerClient(
            self._base_url,
            who="judge",
            key=key,
            max_concurrency=num_workers,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
        )
        if not key and not self._client.is_local():
            raise ValueError(
                f"The judge needs a key in the environment variable {api_key_variable}, which is not set: "
                f"`export {api_key_variable}=...` (a server on this machine needs none)."
            )
        self.model, self.max_tokens = model, max_tokens
        self._limit_name, self._takes_temperature = "max_tokens", True
        self._cache_path = Path(cache_path).expanduser()
        self._replies: dict[str, str] = {}
        for row in read_appended(self._cache_path):
            key, reply = row.get("key"), row.get("reply")
            if isinstance(key, str) and isinstance(reply, str) and reply.strip():
                self._replies[key] = reply
        append_rows(self._cache_path, [])  # a file that cannot be written to is found before a reply is paid

    def _key(self, messages: list[dict[str, str]]) -> str:
        asked = json.dumps([self._base_url.rstrip("/") + "/", self.model, self.max_tokens, messages])
        return hashlib.sha256(asked.encode()).hexdigest()

    def cost(self, conversations: list[list[dict[str, str]]], *, prices: Sequence[float] | None = None) -> JudgeCost:
        """
        Estimate what [`ask`] will cost.

        Args:
            conversations (`list[list[dict[str, str]]]`):
                Messages of each request.
            prices (`Sequence[float]`, *optional*):
                Price of a million input and of a million output tokens.

        Returns:
            [`JudgeCost`]: The estimate.
        """
        asked = {self._key(messages): messages for messages in conversations}
        new = [messages for key, messages in asked.items() if key not in self._replies]
        inputs = sum(len(message["content"]) for messages in new for message in messages) // 4
        outputs = len(new) * self.max_tokens
        price = None if prices is None else (inputs * prices[0] + outputs * prices[1]) / 1e6
        return JudgeCost(len(new), len(conversations) - len(new), inputs, outputs, price)

    def ask(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """
        Replies of the judge, at temperature 0 where the model takes it.

        Args:
            conversations (`list[list[dict[str, str]]]`):
                Messages of each request.

        Returns:
            `list[str]`: One reply each, in their order; `""` where it was cut at `max_tokens`, filtered or empty. Such
            a reply is not kept, and a warning gives their number.

        Raises:
            `RuntimeError`: If a request failed for good. The replies so far are kept: ask again to resume.
        """
        asked = {self._key(messages): messages for messages in conversations}
        missing = {key: messages for key, messages in asked.items() if key not in self._replies}
        try:
            self._client.post_all(self._request(key, messages) for key, messages in missing.items())
        except ServerError as error:
            num_missing = sum(key not in self._replies for key in asked)
            raise RuntimeError(
                f"{error} {len(asked) - num_missing} of {len(asked)} replies are kept in {self._cache_path}: run again "
                f"to ask for the other {num_missing}."
            ) from None
        replies = [self._replies.get(self._key(messages), "") for messages in conversations]
        if num_empty := replies.count(""):
            logger.warning(
                f"{num_empty} of {len(replies)} replies of {self.model} were cut at `max_tokens={self.max_tokens}`, "
                "filtered or empty, and are neither read nor kept. If many are, raise `max_tokens`."
            )
        return replies

    def _request(self, key: str, messages: list[dict[str, str]]) -> ServerRequest:
        def read(answer: dict[str, Any]) -> None:
            try:
                choice = answer["choices"][0]
                reply, reason = choice["message"].get("content"), choice.get("finish_reason")
            except (KeyError, TypeError, IndexError, AttributeError):
                raise UnusableAnswer(f"a reply without `choices[0].message`: {str(answer)[:200]}") from None
            if not isinstance(reply, str | None):
                raise UnusableAnswer(f"a reply that is no text: {str(reply)[:200]}")
            if reply and reply.strip() and reason not in ("length", "content_filter"):
                self._keep(key, reply)

        return ServerRequest("/chat/completions", self._body(messages), read, self._amend)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        options = {self._limit_name: self.max_tokens} | ({"temperature": 0.0} if self._takes_temperature else {})
        return {"model": self.model, "messages": messages} | options

    def _amend(self, body: dict[str, Any], refusal: str) -> dict[str, Any] | None:
        """The body as the model takes it, which other requests may have found out."""
        if "max_completion_tokens" in refusal and "max_tokens" in body:
            self._limit_name = "max_completion_tokens"
        elif "temperature" in refusal and "temperature" in body:
            if self._takes_temperature:
                logger.warning(f"The judge {self.model} refuses `temperature=0`: its replies are drawn.")
            self._takes_temperature = False
        amended = self._body(body["messages"])
        return amended if amended != body else None

    def _keep(self, key: str, reply: str) -> None:
        self._replies[key] = reply
        append_rows(self._cache_path, [{"key": key, "reply": reply}])


def warn_of_unread(replies: Sequence[str], read: Sequence[bool], what: str) -> None:
    """
    Warn of replies that could not be read, with their number, share and one of them.

    Args:
        replies (`Sequence[str]`):
            N replies.
        read (`Sequence[bool]`):
            Whether each was read.
        what (`str`):
            What they lack, such as `"a verdict"`.
    """
    unread = [reply for reply, was_read in zip(replies, read, strict=True) if not was_read]
    if unread:
        sample = max(unread, key=bool)  # not an empty one, if there is another
        logger.warning(
            f"{len(unread)} of {len(replies)} replies ({len(unread) / len(replies):.1%}) lack {what}, for instance: "
            f"{sample[-300:]!r}"
        )
