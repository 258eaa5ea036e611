"""A teacher behind an OpenAI-compatible server, such as vLLM or SGLang."""

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import describe_tokenizer
from .protocol import Completions, TeacherScores, prompt_seeds
from .retokenize import encode_prompt, read_groups, template_columns


logger = logging.get_logger(__name__)

_SERVERS = ("vllm", "sglang", "openai")
_NEGATIVE_INFINITY = -9999.0  # what vLLM sends for a probability of 0, which JSON cannot hold


class TeacherError(RuntimeError):
    """A server gave no answer that can be used, after all retries."""


class _Retry(Exception):
    """An answer that another try may mend."""


class ServerTeacher:
    """
    A model behind an OpenAI-compatible server as a [`Teacher`]. It scores through `/v1/completions` with the
    log-probabilities of the prompt, and writes through `/v1/chat/completions`, or `/v1/completions` for text. Token
    ids are sent, so what is scored are the very tokens that a local teacher scores.

    A request that fails (refused, timed out, cut off, 408, 409, 429, 5xx, malformed) is tried again after a growing
    wait, or after what the server asks for. A wrong or missing log-probability is never taken for a score.

    Args:
        base_url (`str`):
            Address up to and with `/v1`.
        model (`str`):
            Name of the model at the server.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        server (`str`, *optional*, defaults to `"vllm"`):
            Whose answers to read: `"vllm"` (`prompt_logprobs`), `"sglang"` (`echo` with `logprobs`), or `"openai"`,
            any other, which can write but not score.
        api_key_env (`str`, *optional*, defaults to `"GRKD_TEACHER_API_KEY"`):
            Environment variable that holds the key, if the server wants one.
        score (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (nats per token) or `"sum"` (nats) of the log-probabilities.
        context_length (`int`, *optional*):
            The model's context, in tokens. What exceeds it is neither written nor scored.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests under way at once.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `6`):
            Tries of a request after the first.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the second try, doubled for each further one up to a minute.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        processing_class: PreTrainedTokenizerBase,
        *,
        server: str = "vllm",
        api_key_env: str = "GRKD_TEACHER_API_KEY",
        score: str = "mean",
        context_length: int | None = None,
        max_concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 6,
        backoff: float = 1.0,
    ):
        if server not in _SERVERS:
            raise ValueError(f"`server` must be one of {_SERVERS}, got {server!r}.")
        if score not in ("mean", "sum"):
            raise ValueError(f"`score` must be 'mean' or 'sum', got {score!r}.")
        try:
            import openai
        except ImportError as error:
            raise ImportError('A teacher behind a server needs `pip install "grkd_trl[server]"`.') from error
        self._openai, self._key = openai, os.environ.get(api_key_env, "")
        # Retries are ours: the client's own do not see an answer that is malformed.
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=0)
        self.base_url, self.model, self.processing_class = base_url, model, processing_class
        self.server, self.score_type, self.context_length = server, score, context_length or math.inf
        self.max_concurrency, self.max_retries, self.backoff = max_concurrency, max_retries, backoff

    def describe(self) -> dict[str, Any]:
        """
        What tells this teacher from another.

        Returns:
            `dict[str, Any]`: Model, a hash of the tokenizer, the score, and the kind of server, not its address.
        """
        return {
            "model": self.model,
            **describe_tokenizer(self.processing_class),
            "score": self.score_type,
            "server": self.server,
        }

    def generate(
        self,
        prompts: Sequence[str] | Sequence[list[dict[str, str]]],
        num_completions: int,
        *,
        seed: int | Sequence[int],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Completions:
        """
        Write completions. Servers give the same text for the same seed as far as their batching allows.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts, as text or messages.
            num_completions (`int`):
                Completions for each prompt.
            seed (`int` or `Sequence[int]`):
                Seed of the draws: one for each prompt, or one, which prompt i adds i to.
            max_new_tokens (`int`, *optional*, defaults to `256`):
                Longest completion, in tokens.
            temperature (`float`, *optional*, defaults to `1.0`):
                Sampling temperature.
            top_p (`float`, *optional*, defaults to `1.0`):
                Share of the probability to sample from.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns, a value a prompt. `tools` and `chat_template_kwargs` are read.

        Returns:
            [`Completions`]: Texts and whether each was cut; none for a prompt that leaves no room for
            `max_new_tokens` in the context.

        Raises:
            `TeacherError`: If a request fails after its retries.
        """
        # Servers take what is not said from the model's generation config, as `generate` does.
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0} if self.server != "openai" else {}

        seeds = prompt_seeds(seed, len(prompts))

        def write(row: int) -> list[tuple[str, bool]]:
            prompt = prompts[row]
            template = template_columns(columns, row)
            if len(encode_prompt(self.processing_class, prompt, **template)) + max_new_tokens > self.context_length:
                return []
            body = {
                "n": num_completions,
                "seed": seeds[row] % 2**31,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                **neutral,
            }
            if isinstance(prompt, str):
                return self._ask({"prompt": prompt, **body}, self._read_texts(num_completions))
            template = {name: value for name, value in template.items() if value is not None}
            if isinstance(template.get("tools"), str):
                template["tools"] = json.loads(template["tools"])
            return self._ask({"messages": prompt, **body, **template}, self._read_texts(num_completions))

        written = self._each(write, range(len(prompts)))
        return Completions(
            [[text for text, _ in group] for group in written], [[cut for _, cut in group] for group in written]
        )

    def score(
        self,
        prompts: Sequence[str] | Sequence[list[dict[str, str]]],
        completions: Sequence[Sequence[str]] | Sequence[Sequence[list[dict[str, str]]]],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TeacherScores:
        """
        Score completions by their log-probability, a request each.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts, as text or messages.
            completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
                A group of completions for each prompt.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns, a value a prompt. `clipped`, `tools` and `chat_template_kwargs` are read.

        Returns:
            [`TeacherScores`]: NaN for a completion that has no token, with its prompt exceeds the context, or has a
            probability of 0.

        Raises:
            `ValueError`: If the server is of a kind that cannot score.
            `TeacherError`: If a request fails after its retries, or is answered without the log-probabilities.
        """
        if self.server == "openai":
            raise ValueError(
                'A server of the kind `"openai"` gives no log-probabilities of a prompt. Serve the teacher with vLLM or '
                "SGLang to score, or score with a function."
            )
        groups = list(read_groups(self.processing_class, prompts, completions, columns))

        def score_one(place: tuple[int, int]) -> float:
            prompt_ids, completion_ids = groups[place[0]][0], groups[place[0]][1][place[1]]
            if not 0 < len(completion_ids) < self.context_length - len(prompt_ids):  # the server writes a token more
                return math.nan
            ids = prompt_ids + completion_ids
            asked = {"prompt_logprobs": 0} if self.server == "vllm" else {"echo": True, "logprobs": 1}
            body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "return_token_ids": True, **asked}
            logps = self._ask(body, lambda answer: self._read_logps(answer, ids))[len(prompt_ids) :]
            if min(logps) <= _NEGATIVE_INFINITY:
                return math.nan
            return sum(logps) / (len(logps) if self.score_type == "mean" else 1)

        places = [(row, position) for row, group in enumerate(groups) for position in range(len(group[1]))]
        scores = [[math.nan] * len(group[1]) for group in groups]
        for (row, position), value in zip(places, self._each(score_one, places), strict=True):
            scores[row][position] = value
        return TeacherScores(
            scores, [[len(ids) for ids in completion_ids] for _, completion_ids, _ in groups], [g[2] for g in groups]
        )

    def _each(self, function: Callable, items: Sequence) -> list:
        pool = ThreadPoolExecutor(self.max_concurrency)
        try:
            return list(pool.map(function, items))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error what has not begun is not asked for

    def _ask(self, body: dict[str, Any], read: Callable[[dict], Any]) -> Any:
        """The answer to a request, as `read` takes it; tried again where another try may help."""
        openai = self._openai
        path, name = ("/chat/completions", "messages") if "messages" in body else ("/completions", "prompt")
        endpoint = (
            self._client.chat.completions if name == "messages" else self._client.completions
        ).with_raw_response
        further = {key: value for key, value in body.items() if key != name}
        for attempt in range(self.max_retries + 1):
            wait = min(self.backoff * 2**attempt, 60.0) * random.uniform(0.75, 1.0)
            try:
                response = endpoint.create(model=self.model, extra_body=further, **{name: body[name]})
                return read(json.loads(response.content))
            except openai.APIStatusError as error:
                problem = f"status {error.status_code}: {error.response.text[:300]}"
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise TeacherError(
                        self._say(path, problem, "The request is refused, and is not repeated.")
                    ) from None
                wait = max(wait, _retry_after(error.response.headers.get("retry-after")))
            except openai.APIConnectionError as error:  # timeouts among them
                problem = f"{error} {error.__cause__ or ''}".strip()
            except (ValueError, _Retry) as error:  # no JSON, or not of the shape
                problem = f"malformed answer: {error}"
            if attempt < self.max_retries:
                logger.warning(self._say(path, problem, f"Trying again in {wait:.1f} s."))
                time.sleep(wait)
        hint = f"Given up after {self.max_retries + 1} tries. What was written before is kept; start again to go on."
        raise TeacherError(self._say(path, problem, hint))

    def _say(self, path: str, problem: str, hint: str) -> str:
        message = f"The teacher at {self.base_url}{path} failed, {problem}. {hint}"
        return message.replace(self._key, "[key]") if self._key else message

    def _read_texts(self, num_completions: int) -> Callable[[dict], list[tuple[str, bool]]]:
        def read(answer: dict) -> list[tuple[str, bool]]:
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                texts = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
                reasons = [choice["finish_reason"] for choice in choices]
            except (KeyError, TypeError, AttributeError) as error:
                raise _Retry(f"no {error} in it") from None
            if len(texts) != num_completions or set(reasons) - {"stop", "length"}:
                raise _Retry(f"{len(texts)} completions that ended with {reasons}, {num_completions} were asked for")
            return [(text or "", reason == "length") for text, reason in zip(texts, reasons, strict=True)]

        return read

    def _read_logps(self, answer: dict, ids: list[int]) -> list[float]:
        """Log-probability of each token of `ids`, that of the first being 0."""
        try:
            choice = answer["choices"][0]
            if self.server == "vllm":
                given = choice.get("prompt_logprobs")
                logps = given and [0.0] + [
                    entry[str(i)]["logprob"] for entry, i in zip(given[1:], ids[1:], strict=True)
                ]
            else:
                given = (choice.get("logprobs") or {}).get("token_logprobs")
                logps = given and [0.0, *given[1 : len(ids)]]
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise _Retry(
                f"log-probabilities not of the shape of {self.server} ({type(error).__name__}: {error})"
            ) from None
        if not logps:
            hint = {"vllm": "vLLM gives `prompt_logprobs`", "sglang": "SGLang gives them for `echo` with `logprobs`"}
            raise TeacherError(
                f"The teacher at {self.base_url} answered without log-probabilities of the prompt. {hint[self.server]}; "
                "is `server` what runs there?"
            )
        fine = all(isinstance(value, float | int) and value <= 1e-3 for value in logps)
        if len(logps) != len(ids) or choice.get("prompt_token_ids") not in (None, ids) or not fine:
            raise _Retry(f"log-probabilities of other tokens than the {len(ids)} sent, or none for some")
        return logps


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, a minute at most; 0 for a date or nothing."""
    try:
        return min(max(float(value), 0.0), 60.0)
    except (TypeError, ValueError):
        return 0.0
