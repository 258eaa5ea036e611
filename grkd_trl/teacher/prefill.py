"""Requests that have a server read given tokens: their log-probabilities, and the most likely tokens in their place."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .http import ServerError, ServerRequest
from .replies import (
    MissingLogps,
    PromptLogps,
    check_model,
    read_echoed_logps,
    read_llama_cpp_logps,
    read_sglang_top,
    read_vllm_logps,
    read_vllm_top,
)


_LOGPS_OF = {
    "vllm": "vLLM gives `prompt_logprobs`",
    "sglang": "SGLang gives them for `echo` with `logprobs`, and for `return_logprob`",
    "llama.cpp": "llama-cpp-python gives them if it was started with `--logits_all true`",
}
_TOP_OF = {
    "vllm": "vLLM gives at most 20, or as many as it is started with: `vllm serve ... --max-logprobs {k}`",
    "sglang": "SGLang gives them through `/generate`, beside `/v1`",
}


class TeacherError(ServerError):
    """A teacher's server gave no usable answer, after all attempts."""


class PrefillRequests:
    """
    Requests for the log-probabilities of given tokens, a prefill each.

    Args:
        server (`str`):
            The software that is running, see [`ServerTeacher`].
        model (`str`):
            Name of the model at the server.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
    """

    def __init__(self, server: str, model: str, processing_class: PreTrainedTokenizerBase):
        self.server, self.model, self.processing_class = server, model, processing_class
        self._token_texts: dict[int, set[str]] = {}

    def request(self, ids: list[int], k: int | None, first: int) -> ServerRequest | None:
        """
        Request for some tokens.

        Args:
            ids (`list[int]`):
                T tokens, 2 or more.
            k (`int`, *optional*):
                Most likely tokens to ask for at each position, beside the log-probabilities.
            first (`int`):
                First position at which these are read, 1 or above.

        Returns:
            [`ServerRequest`], *optional*: Its result is a [`PromptLogps`]. `None` where the server reads other tokens.

        Raises:
            `ValueError`: If a server of this kind cannot score these tokens, or gives no most likely ones.
        """
        if self.server == "openai":
            raise ValueError(
                'A server of the kind `"openai"` gives no log-probabilities of a prompt. Serve the teacher with vLLM or '
                "SGLang to score, or score with a function."
            )
        if k is None:
            return self._scores(ids)
        if self.server not in _TOP_OF:
            raise ValueError(
                f'A server of the kind `"{self.server}"` names the most likely tokens by their text, which several tokens may '
                "share, so they are no soft labels. Serve the teacher with vLLM or SGLang, or cache the soft labels with a "
                "local teacher (`grkd_trl.teacher.cache_soft_labels`)."
            )
        return self._top(ids, k, first)

    def _scores(self, ids: list[int]) -> ServerRequest | None:
        bos_token_id = self.processing_class.bos_token_id

        def read(answer: dict[str, Any]) -> PromptLogps:
            check_model(answer, self.model)
            try:
                if self.server == "vllm":
                    return PromptLogps(read_vllm_logps(answer, ids))
                texts = [self._texts_of(token_id) for token_id in ids]
                if self.server == "sglang":
                    return PromptLogps(read_echoed_logps(answer, ids, texts))
                return PromptLogps(read_llama_cpp_logps(answer, ids, texts, bos_token_id))
            except MissingLogps:
                raise self._missing() from None

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
            body["prompt"] = self.as_text(ids)
            if self.processing_class(body["prompt"])["input_ids"] != ids:
                return None  # the text is read as other tokens
        return ServerRequest("/completions", body, read)

    def _top(self, ids: list[int], k: int, first: int) -> ServerRequest:
        def read(answer: dict[str, Any]) -> PromptLogps:
            try:
                if self.server == "sglang":
                    return read_sglang_top(answer, ids, k, first)
                check_model(answer, self.model)
                return read_vllm_top(answer, ids, k, first)
            except MissingLogps:
                raise self._missing() from None

        def refused(body: dict[str, Any], text: str) -> None:
            if "logprobs" in text:  # else a context that is too short, say
                raise self.too_many(k, text[:300])

        body: dict[str, Any]
        if self.server == "vllm":
            body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}
            body |= {"prompt_logprobs": k, "return_token_ids": True}
            return ServerRequest("/completions", body, read, refused)
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k}
        _, _, adapter = self.model.partition(":")
        if adapter:  # of `model:adapter`, as SGLang's `/v1` reads it
            body["lora_path"] = adapter
        return ServerRequest("/../generate", body, read, refused)

    def too_many(self, k: int, reason: str) -> TeacherError:
        """
        What is raised where a server does not give the most likely tokens that were asked for.

        Args:
            k (`int`):
                Tokens that were asked for.
            reason (`str`):
                What it answered.

        Returns:
            [`TeacherError`]: Error.
        """
        return TeacherError(
            f"The teacher's server `{self.model}` does not give the {k} most likely tokens at each position: {reason}. "
            f"{_TOP_OF[self.server].format(k=k)}. Restart it so, or ask for fewer."
        )

    def _missing(self) -> TeacherError:
        return TeacherError(
            f"The teacher's server answered without log-probabilities of the prompt. {_LOGPS_OF[self.server]}. "
            "Check that `server=` names the software that is running."
        )

    def as_text(self, ids: list[int]) -> str:
        """
        Text that a server reads as these tokens, which adds BOS itself where the tokenizer does.

        Args:
            ids (`list[int]`):
                Tokens.

        Returns:
            `str`: Text.
        """
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
