"""The one client for OpenAI-compatible servers: a teacher's and a judge's."""

import copy
import json
import math
import posixpath
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, NamedTuple
from urllib.parse import quote

import anyio
import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal
from transformers.utils import logging


logger = logging.get_logger(__name__)

_MAX_RETRY_AFTER = 600.0  # a server that asks for a longer wait ends the run, which can be resumed
_MAX_REDIRECTS = 5


class ServerError(RuntimeError):
    """A server gave no usable answer, after all attempts."""


class UnusableAnswer(Exception):
    """An answer that cannot be used, where another attempt may bring one that can."""


class ServerRequest(NamedTuple):
    """
    A request and what to do with its answer.

    Args:
        path (`str`):
            Path below the client's base URL, such as `"/completions"`; `"/../generate"` is beside it.
        body (`dict[str, Any]`):
            What is sent, as JSON.
        read (`Callable[[dict], Any]`):
            Makes a result of the answer's JSON object. Raises [`UnusableAnswer`] for another attempt.
        amend (`Callable[[dict, str], dict | None]`, *optional*):
            Gets the body and the server's text when the request is refused (status 400 or 422), and returns another
            body to send, or `None`.
    """

    path: str
    body: dict[str, Any]
    read: Callable[[dict], Any]
    amend: Callable[[dict, str], dict | None] | None = None


class ServerClient:
    """
    Sends requests to an OpenAI-compatible server, several at a time. Built on httpx, which `huggingface_hub` brings.

    An attempt that fails (connection, deadline, 408, 409, 425, 429, 5xx, malformed or unusable answer) is repeated
    after a growing wait, or the one that the server asks for. Each attempt has one deadline from connecting to the last
    byte, and a limit on the size of its answer. Redirects are followed within the same host and port only, because
    prompts and key go with them. The key is masked in every message, also where the server echoes it.

    Args:
        base_url (`str`):
            Address up to and with `/v1`.
        who (`str`):
            Whose server it is, for messages: `"teacher"` or `"judge"`.
        key (`str`, *optional*, defaults to `""`):
            Sent as bearer token, if not empty.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests in flight at once.
        timeout (`float`, *optional*, defaults to `120.0`):
            Deadline of an attempt, in seconds.
        max_retries (`int`, *optional*, defaults to `6`):
            Attempts after the first.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt, doubled for each further one up to a minute.
        max_answer_bytes (`int`, *optional*, defaults to `67108864`):
            Largest answer that is read, uncompressed.
        error (`type[ServerError]`, *optional*, defaults to `ServerError`):
            What is raised.

    Raises:
        `ValueError`: If the address or the key cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        who: str,
        key: str = "",
        max_concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 6,
        backoff: float = 1.0,
        max_answer_bytes: int = 2**26,
        error: type[ServerError] = ServerError,
    ):
        try:
            self.url = httpx2.URL(base_url)
        except (httpx2.InvalidURL, TypeError) as problem:
            raise ValueError(f"The {who}'s `base_url` is no address: {problem}.") from None
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise ValueError(
                f"The {who}'s `base_url` must start with http:// or https://, as in 'http://localhost:8000/v1', got "
                f"{base_url!r}."
            )
        key = key.strip()  # a file's content ends in a line break
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"The {who}'s key holds characters that an HTTP header cannot: check where it was copied."
            )
        if max_concurrency < 1 or max_retries < 0 or not timeout > 0 or not backoff >= 0:
            raise ValueError(
                "`max_concurrency` must be 1 or above, `max_retries` and `backoff` 0 or above and `timeout` above 0, got "
                f"{max_concurrency}, {max_retries}, {backoff} and {timeout}."
            )
        self.who, self.max_concurrency, self.timeout = who, max_concurrency, timeout
        self.max_retries, self.backoff = max_retries, backoff
        self.max_answer_bytes, self.error = max_answer_bytes, error
        secrets = (key, self.url.password, self.url.query.decode())
        self._secrets = [secret for secret in secrets if len(secret) > 3]  # "x" is no secret, but in every message
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._is_stopped, self._running = False, set[tuple[BlockingPortal, anyio.CancelScope]]()

    def beside(self) -> "ServerClient":
        """
        A client for another thread, which can be stopped without this one.

        Returns:
            [`ServerClient`]: A copy.
        """
        own = copy.copy(self)
        own._is_stopped, own._running = False, set()
        return own

    def stop(self) -> None:
        """End the requests in flight, where nobody waits for their answers any more. No other is sent."""
        self._is_stopped = True
        for portal, scope in list(self._running):
            with suppress(RuntimeError):  # ended meanwhile
                portal.call(scope.cancel)

    def is_local(self) -> bool:
        """
        Whether the server runs on this machine.

        Returns:
            `bool`: `True` for `localhost` and the loopback addresses.
        """
        host = self.url.host
        return host in ("localhost", "::1") or host.endswith(".localhost") or host.startswith("127.")

    def masked(self, text: str) -> str:
        """
        Text without the key, a password of the address, or its query.

        Args:
            text (`str`):
                Any text, such as a server's.

        Returns:
            `str`: The text with `[key]` in their place.
        """
        for secret in self._secrets:
            for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe="")):
                text = text.replace(form, "[key]")
        return text

    def post_all(self, requests: Iterable[ServerRequest]) -> list[Any]:
        """
        Send requests. After an error, those in flight are awaited without further attempts, and no other is sent.

        Args:
            requests (`Iterable[ServerRequest]`):
                Requests; each is taken when it is about to be sent.

        Returns:
            `list[Any]`: What their `read` made of the answers, in the order of the requests.

        Raises:
            [`ServerError`]: If a request is refused or fails in every attempt, or the client is stopped.
        """
        results: dict[int, Any] = {}
        errors: list[Exception] = []
        waiting = enumerate(requests)

        async def work(http: httpx2.AsyncClient) -> None:
            for index, request in waiting:
                try:
                    results[index] = await self._post(http, request, errors)
                except Exception as error:
                    errors.append(error)
                if errors:
                    return

        async def run(portal: BlockingPortal) -> None:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency)
            http = httpx2.AsyncClient(
                headers=self._headers,
                verify=self.url.scheme == "https",  # certificates take 30 ms to read
                timeout=None,
                limits=limits,
                follow_redirects=False,
            )
            with anyio.CancelScope() as scope:
                self._running.add((portal, scope))
                try:
                    if self._is_stopped:  # before there was a scope to cancel
                        scope.cancel()
                    async with http, anyio.create_task_group() as group:
                        for _ in range(self.max_concurrency):
                            group.start_soon(work, http)
                finally:
                    self._running.discard((portal, scope))
            if scope.cancelled_caught:
                errors.insert(0, self.error(f"The requests to the {self.who} were stopped."))

        # A thread of its own, because the caller may run within an event loop, as notebooks do.
        with start_blocking_portal() as portal:
            portal.call(run, portal)
        if errors:
            raise errors[0]
        return [results[index] for index in sorted(results)]

    async def _post(self, http: httpx2.AsyncClient, request: ServerRequest, errors: list[Exception]) -> Any:
        path, body, read, amend = request
        attempt = 0
        while True:
            wait = min(self.backoff * 2 ** min(attempt, 10), 60.0) * random.uniform(0.75, 1.0)
            try:
                with anyio.fail_after(self.timeout):
                    response, content = await self._send(http, path, body)
                if response.is_success:
                    answer = json.loads(content)
                    if not isinstance(answer, dict):
                        raise UnusableAnswer("no JSON object")
                    return read(answer)
                text = self.masked(content.decode(errors="replace"))  # masked before it is shortened
                problem = f"status {response.status_code}: {text[:300]}"
                if response.status_code in (400, 422) and amend and (amended := amend(body, text)) is not None:
                    body = amended
                    continue
                if response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                    raise self.error(self._say(path, problem, "The request is refused, and is not repeated."))
                asked = _retry_after(response.headers)
                if asked > _MAX_RETRY_AFTER:
                    hint = f"The server asks for a wait of {asked:.0f} s. Finished work is kept; rerun then to resume."
                    raise self.error(self._say(path, problem, hint))
                wait = max(wait, asked)
            except TimeoutError:
                problem = f"no complete answer within {self.timeout:g} s"
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                problem = f"{type(error).__name__}: {error}"
            except (ValueError, RecursionError, UnusableAnswer) as error:  # no JSON, or not of the shape
                problem = f"malformed answer: {error}"
            if errors:  # another request failed for good
                raise self.error(self._say(path, problem, "Not repeated, because another request failed."))
            if attempt == self.max_retries:
                hint = f"Giving up after {attempt + 1} attempts. Finished work is kept; rerun to resume."
                raise self.error(self._say(path, problem, hint))
            logger.warning(self._say(path, problem, f"Trying again in {wait:.1f} s."))
            await anyio.sleep(wait)
            attempt += 1

    async def _send(self, http: httpx2.AsyncClient, path: str, body: dict) -> tuple[httpx2.Response, bytes]:
        content = json.dumps(body).encode()  # ASCII: a half of a surrogate pair in a text cannot be sent as UTF-8
        url = self.url.copy_with(path=posixpath.normpath(self.url.path.rstrip("/") + path))
        request = http.build_request("POST", url, content=content, headers={"Content-Type": "application/json"})
        for _ in range(_MAX_REDIRECTS):
            response = await http.send(request, stream=True)
            try:
                if not response.has_redirect_location:
                    answer = bytearray()
                    async for chunk in response.aiter_bytes():
                        answer += chunk
                        if len(answer) > self.max_answer_bytes:
                            hint = "The answer is not read further and the request not repeated."
                            raise self.error(
                                self._say(path, f"an answer of more than {self.max_answer_bytes} bytes", hint)
                            )
                    return response, bytes(answer)
                target = response.next_request
            finally:
                await response.aclose()
            assert target is not None  # the response names it
            same = (target.url.scheme, target.url.netloc) == (request.url.scheme, request.url.netloc)
            if not same or target.method != "POST":
                problem = (
                    f"status {response.status_code}: a redirect to {target.url.copy_with(query=None, userinfo=b'')}"
                )
                hint = "Prompts and key are not sent elsewhere. If that is the server, give its address as `base_url`."
                raise self.error(self._say(path, problem, hint))
            request = target
        raise self.error(self._say(path, f"{_MAX_REDIRECTS} redirects in a row", "The request is not repeated."))

    def _say(self, path: str, problem: str, hint: str) -> str:
        shown = self.url.copy_with(query=None, userinfo=b"")
        return self.masked(f"The {self.who} at {str(shown).rstrip('/')}{path} failed, {problem}. {hint}")


def _retry_after(headers: httpx2.Headers) -> float:
    """Seconds that a server asks to wait, as `retry-after-ms`, or `Retry-After` in seconds or as a date; else 0."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0
