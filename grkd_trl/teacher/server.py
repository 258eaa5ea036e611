"""A teacher behind an OpenAI-compatible server, such as vLLM or SGLang."""

import copy
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
from .http import ServerClient, ServerRequest, UnusableAnswer
from .prefill import PrefillRequests, TeacherError
from .protocol import Completions, TeacherScores, TopTokens, check_k, prompt_seeds
from .replies import SplitReasoning, check_model, read_texts
from .retokenize import images_at, read_groups, template_columns


logger = logging.get_logger(__name__)

_SERVERS = ("vllm", "sglang", "llama.cpp", "openai")
_NEGATIVE_INFINITY = -9999.0  # what vLLM sends for a probability of 0, which JSON cannot hold
# Servers take what is not said from the model's generation config or defaults of their own.
_NEUTRAL = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llama.cpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    "openai": {},
}


class ServerTeacher:
    """
    A model behind an OpenAI-compatible server as a [`Teacher`]. It scores through `/v1/completions` with the
    log-probabilities of the prompt, and writes through `/v1/chat/completions`, or `/v1/completions` for text. Token
    ids are sent, so what is scored are the very tokens that a local teacher scores. vLLM and SGLang also give the most
    likely tokens at each position, for token soft labels without a teacher in memory.

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
            The software that is running: `"vllm"` (scores with `prompt_logprobs`), `"sglang"` (`echo` with `logprobs`;
            most likely tokens through its own `/generate`, beside `/v1`), `"llama.cpp"` (the server of llama-cpp-python, which takes text in place of ids and scores
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
            max_answer_bytes=2**28,  # 64 most likely tokens are 5 kB a token that is sent
            error=TeacherError,
        )
        self.model, self.processing_class = model, processing_class
        self.server, self.score_type, self.context_length = server, score, context_length or math.inf
        self._prefill = PrefillRequests(server, model, processing_class)

    def beside(self) -> "ServerTeacher":
        """
        This teacher for another thread: tokenizers keep a state that two threads must not share.

        Returns:
            [`ServerTeacher`]: A copy with a tokenizer and a client of its own.
        """
        own = copy.copy(self)
        own.processing_class, own._client = copy.deepcopy(self.processing_class), self._client.beside()
        own._prefill = PrefillRequests(own.server, own.model, own.processing_class)
        return own

    def stop(self) -> None:
        """End the requests in flight, where nobody waits for their answers any more."""
        self._client.stop()

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
                body |= {"prompt": self._prefill.as_text(ids), "n": 1}
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
        return self._read(prompts, completions, columns).scored

    def top_k(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        k: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TopTokens:
        """
        Score completions and give the k most likely tokens at each of their positions, from one request a completion.

        Args:
            prompts, completions, columns:
                As in [`ServerTeacher.score`].
            k (`int`):
                Tokens at each position, see [`ServerTeacher.check_top_k`].

        Returns:
            [`TopTokens`]: None of a completion that has no token, or an empty prompt, or with its prompt exceeds the
            context.

        Raises:
            `ValueError`: If the server is of a kind that has none.
            [`TeacherError`]: If a request is refused or fails in every attempt, or is answered without them.
        """
        return self._read(prompts, completions, columns, k)

    def check_top_k(self, k: int) -> None:
        """
        Ask the server for the k most likely tokens of two tokens, so that its limit is found before a run.

        Args:
            k (`int`):
                Tokens at each position.

        Raises:
            `ValueError`: If k is out of range, or the server is of a kind that has none.
            [`TeacherError`]: If the server gives no or fewer of them; the message names k and the flag to set.
        """
        check_k(k, len(self.processing_class))
        ids = (self.processing_class("a b", add_special_tokens=False)["input_ids"] or [0])[:1] * 2
        request = self._prefill.request(ids, k, 1)
        assert request is not None

        def read(answer: dict[str, Any]) -> Any:  # another attempt would bring no more of them
            try:
                return request.read(answer)
            except UnusableAnswer as error:
                raise self._prefill.too_many(k, str(error)) from None

        self._client.post_all([request._replace(read=read)])

    def _read(self, prompts, completions, columns, k: int | None = None) -> TopTokens:
        groups = list(read_groups(self.processing_class, prompts, completions, columns, self.context_length - 1))
        scores = [[math.nan] * len(completion_ids) for _, completion_ids, _ in groups]
        top_ids: list[list[list[list[int]]]] = [[[] for _ in completion_ids] for _, completion_ids, _ in groups]
        top_logps: list[list[list[list[float]]]] = [[[] for _ in completion_ids] for _, completion_ids, _ in groups]
        positions, requests = [], []
        for row, (prompt_ids, completion_ids, _) in enumerate(groups):
            for position, own_ids in enumerate(completion_ids):
                # The first token has no log-probability, and the server writes a token more.
                if prompt_ids and 0 < len(own_ids) < self.context_length - len(prompt_ids):
                    request = self._prefill.request(prompt_ids + own_ids, k, len(prompt_ids))
                    if request is not None:
                        positions.append((row, position))
                        requests.append(request)
        for (row, position), given in zip(positions, self._client.post_all(requests), strict=True):
            logps = given.logps[len(groups[row][0]) - 1 :]
            if all(value > _NEGATIVE_INFINITY for value in logps):
                scores[row][position] = sum(logps) / (len(logps) if self.score_type == "mean" else 1)
            if k is not None:
                top_ids[row][position] = given.top_ids
                top_logps[row][position] = [
                    [value if value > _NEGATIVE_INFINITY else -math.inf for value in values]
                    for values in given.top_logps
                ]
        token_ids = [completion_ids for _, completion_ids, _ in groups]
        num_tokens = [[len(ids) for ids in group] for group in token_ids]
        return TopTokens(
            TeacherScores(scores, num_tokens, [group[2] for group in groups]), token_ids, top_ids, top_logps
        )
