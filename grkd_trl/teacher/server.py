"""A teacher behind an OpenAI-compatible server, such as vLLM or SGLang."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import describe_tokenizer, encode_prompt
from ..data.images import refuse_images
from .http import ServerClient, ServerError, ServerRequest
from .protocol import Completions, TeacherScores, prompt_seeds
from .replies import (
    MissingLogps,
    SplitReasoning,
    check_model,
    read_echoed_logps,
    read_llama_cpp_logps,
    read_texts,
    read_vllm_logps,
)
from .retokenize import images_at, read_groups, template_columns


logger = logging.get_logger(__name__)

_SERVERS = ("vllm", "sglang", "llama.cpp", "openai")
_NEGATIVE_INFINITY = -9999.0  # what vLLM sends for a probability of 0, which JSON cannot hold
_LOGPS_OF = {
    "vllm": "vLLM gives `prompt_logprobs`",
    "sglang": "SGLang gives them for `echo` with `logprobs`",
    "llama.cpp": "llama-cpp-python gives them if it was started with `--logits_all true`",
}
# Servers take what is not said from the model's generation config or defaults of their own.
_NEUTRAL = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llama.cpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    "openai": {},
}


class TeacherError(ServerError):
    """A teacher's server gave no usable answer, after all attempts."""


class ServerTeacher:
    """
    A model behind an OpenAI-compatible server as a [`Teacher`]. It scores through `/v1/completions` with the
    log-probabilities of the prompt, and writes through `/v1/chat/completions`, or `/v1/completions` for text. Token
    ids are sent, so what is scored are the very tokens that a local teacher scores.

    A request that fails (connection, deadline, 408, 409, 425, 429, 5xx, malformed) is repeated after a growing wait, or
    after what the server asks for. A wrong or missing log-probability is never taken for a score: an answer must have
    one value for each token sent, and ids, or texts and a count, that prove whose they are.

    Args:
        base_url (`str`):
            Address up to and with `/v1`.
        model (`str`):
            Name of the model at the server.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        server (`str`, *optional*, defaults to `"vllm"`):
            The software that is running: `"vllm"` (scores with `prompt_logprobs`), `"sglang"` (`echo` with
            `logprobs`), `"llama.cpp"` (the server of llama-cpp-python, which takes text in place of ids and scores
            prompts that start with BOS), or `"openai"`, any other, which can write but not score.
        api_key_env (`str`, *optional*, defaults to `"GRKD_TEACHER_API_KEY"`):
            Environment variable that holds the key, if the server wants one.
        score (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (nats per token) or `"sum"` (nats) of the log-probabilities.
        context_length (`int`, *optional*):
            The model's context, in tokens. What exceeds it is neither written nor scored.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests in flight at once.
        timeout (`float`, *optional*, defaults to `120.0`):
            Deadline of an attempt in seconds, from connecting to the last byte of the answer.
        max_retries (`int`, *optional*, defaults to `6`):
            Attempts of a request after the first.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt, doubled for each further one up to a minute.

    Raises:
        `ValueError`: If an argument lies outside its range.
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
        self._client = ServerClient(
            base_url,
            who="teacher",
            key=os.environ.get(api_key_env, ""),
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
            error=TeacherError,
        )
        self.model, self.processing_class = model, processing_class
        self.server, self.score_type, self.context_length = server, score, context_length or math.inf
        self._token_texts: dict[int, set[str]] = {}

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
        prompts: Sequence[str | list[dict[str, Any]]],
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
            [`Completions`]: Texts and whether each was cut. None for an empty prompt, or one that leaves no room for
            `max_new_tokens` in the context; fewer than asked for where the server filtered or refused a completion or
            made it a tool call, of which a warning gives the number.

        Raises:
            [`TeacherError`]: If a request fails in every attempt, or the server runs a reasoning parser, which takes
                completions apart.
        """
        seeds = prompt_seeds(seed, len(prompts))

        def read(answer: dict[str, Any]) -> list[tuple[str, bool] | str]:
            if self.server != "openai":  # other services resolve a name to that of a version
                check_model(answer, self.model)
            try:
                return read_texts(answer, 1 if self.server == "llama.cpp" else num_completions)
            except SplitReasoning as error:
                raise TeacherError(
                    f"The teacher's server moved reasoning out of its answers, into `{error}`: its reasoning parser is "
                    "on, and what it takes away cannot be put back as it was written. Serve without `--reasoning-parser`."
                ) from None

        rows, requests = [], []
        for row, prompt in enumerate(prompts):
            refuse_images({"images": images_at(columns, row)}, row, "`ServerTeacher`")
            template = template_columns(columns, row)
            ids = encode_prompt(self.processing_class, prompt, **template)
            if not 0 < len(ids) <= self.context_length - max_new_tokens:
                continue
            body = {
                "model": self.model,
                "n": num_completions,
                "seed": seeds[row] % 2**31,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                **_NEUTRAL[self.server],
            }
            if self.server == "llama.cpp":  # it ignores `n`, and what the chat template is given
                rows += [row] * num_completions
                body |= {"prompt": self._as_text(ids), "n": 1}
                requests += [
                    ServerRequest("/completions", body | {"seed": (seeds[row] + i) % 2**31}, read)
                    for i in range(num_completions)
                ]
                continue
            rows.append(row)
            if isinstance(prompt, str):
                requests.append(ServerRequest("/completions", {"prompt": prompt, **body}, read))
                continue
            template = {name: value for name, value in template.items() if value is not None}
            if isinstance(template.get("tools"), str):
                template["tools"] = json.loads(template["tools"])
            requests.append(ServerRequest("/chat/completions", {"messages": prompt, **body, **template}, read))

        texts: list[list[str]] = [[] for _ in prompts]
        clipped: list[list[bool]] = [[] for _ in prompts]
        withheld: Counter[str] = Counter()
        for row, group in zip(rows, self._client.post_all(requests), strict=True):
            withheld.update(reason for reason in group if isinstance(reason, str))
            written = [completion for completion in group if not isinstance(completion, str)]
            texts[row] += [text for text, _ in written]
            clipped[row] += [cut for _, cut in written]
        if withheld:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(withheld.items()))
            logger.warning(
                f"The teacher's server withheld {withheld.total()} of {len(set(rows)) * num_completions} completions "
                f"({reasons}). They are dropped."
            )
        return Completions(texts, clipped)

    def score(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
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
                Further columns, a value a prompt. `clipped`, `teacher_prompt`, `tools` and `chat_template_kwargs` are read.

        Returns:
            [`TeacherScores`]: NaN for a completion that has no token, or an empty prompt, or with its prompt exceeds
            the context, or has a probability of 0.

        Raises:
            `ValueError`: If the server is of a kind that cannot score.
            [`TeacherError`]: If a request fails in every attempt, or is answered without the log-probabilities.
        """
        if self.server == "openai":
            raise ValueError(
                'A server of the kind `"openai"` gives no log-probabilities of a prompt. Serve the teacher with vLLM or '
                "SGLang to score, or score with a function."
            )
        groups = list(read_groups(self.processing_class, prompts, completions, columns, self.context_length - 1))
        scores = [[math.nan] * len(completion_ids) for _, completion_ids, _ in groups]
        positions, requests = [], []
        for row, (prompt_ids, completion_ids, _) in enumerate(groups):
            for position, own_ids in enumerate(completion_ids):
                # The first token has no log-probability, and the server writes a token more.
                if prompt_ids and 0 < len(own_ids) < self.context_length - len(prompt_ids):
                    request = self._score_request(prompt_ids + own_ids)
                    if request is not None:
                        positions.append((row, position))
                        requests.append(request)
        for (row, position), logps in zip(positions, self._client.post_all(requests), strict=True):
            logps = logps[len(groups[row][0]) - 1 :]
            if all(value > _NEGATIVE_INFINITY for value in logps):
                scores[row][position] = sum(logps) / (len(logps) if self.score_type == "mean" else 1)
        return TeacherScores(
            scores, [[len(ids) for ids in completion_ids] for _, completion_ids, _ in groups], [g[2] for g in groups]
        )

    def _score_request(self, ids: list[int]) -> ServerRequest | None:
        bos_token_id = self.processing_class.bos_token_id

        def read(answer: dict[str, Any]) -> list[float]:
            check_model(answer, self.model)
            try:
                if self.server == "vllm":
                    return read_vllm_logps(answer, ids)
                texts = [self._texts_of(token_id) for token_id in ids]
                if self.server == "sglang":
                    return read_echoed_logps(answer, ids, texts)
                return read_llama_cpp_logps(answer, ids, texts, bos_token_id)
            except MissingLogps:
                raise TeacherError(
                    f"The teacher's server answered without log-probabilities of the prompt. {_LOGPS_OF[self.server]}. "
                    "Check that `server=` names the software that is running."
                ) from None

        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}
        if self.server == "vllm":
            body |= {"prompt_logprobs": 0, "return_token_ids": True}
        else:
            body |= {"echo": True, "logprobs": 1}
        if self.server == "llama.cpp":
            if ids[0] != bos_token_id:
                raise ValueError(
                    "llama-cpp-python gives log-probabilities of other tokens for a prompt that does not start with "
                    f"BOS, and this one starts with {self.processing_class.decode(ids[:5])!r}. Score with vLLM or "
                    "SGLang, or give prompts as messages whose chat template starts with BOS."
                )
            body["prompt"] = self._as_text(ids)
            if self.processing_class(body["prompt"])["input_ids"] != ids:
                return None  # the text is read as other tokens
        return ServerRequest("/completions", body, read)

    def _as_text(self, ids: list[int]) -> str:
        """Text that a server reads as these tokens, which adds BOS itself where the tokenizer does."""
        added = self.processing_class("")["input_ids"]
        kept = ids[len(added) :] if added and ids[: len(added)] == added else ids
        return str(self.processing_class.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _texts_of(self, token_id: int) -> set[str]:
        """Forms in which a server may write a token: decoded, as in the vocabulary, or without what is no text."""
        if token_id not in self._token_texts:
            decoded = str(self.processing_class.decode([token_id]))
            token = str(self.processing_class.convert_ids_to_tokens(token_id))
            self._token_texts[token_id] = {decoded, token}
            if self.server == "llama.cpp":
                special = token_id in self.processing_class.all_special_ids
                bare = "" if special else decoded.replace("\ufffd", "")
                self._token_texts[token_id] |= {bare, token.replace("\u2581", " ")}
        return self._token_texts[token_id]
