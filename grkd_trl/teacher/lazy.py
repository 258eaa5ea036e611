"""A local teacher that is in memory only while it is asked, so that several take turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..data import describe_tokenizer
from .loading import load_config
from .local import LocalTeacher
from .models import load_teacher, tokenizer_of
from .protocol import Completions, TeacherScores, TopTokens, check_k


class LazyTeacher:
    """
    A causal language model as a [`Teacher`] that is loaded, or brought to its device, for each call and leaves it afterwards. Of
    several, as in a [`TeacherEnsemble`], one is in memory at a time. What it says is what [`LocalTeacher`] says.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or path of a model or of an adapter, loaded for each call and then freed; or a model, frozen in place and
            moved to its device for each call and then back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Its tokenizer, read from where the model is if not given.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained`, see [`load_teacher`]; `dtype` defaults to `float32`.
        device (`torch.device`, *optional*):
            Where it works. That of this process if not given.
        loading (`Callable`, *optional*):
            Gives a context to load in, such as [`loading_whole`] under ZeRO-3.
        **kwargs:
            For [`LocalTeacher`].

    Raises:
        `OSError` or `ValueError`: If there is no such model, or no tokenizer with it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        init_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        loading: Callable[[], AbstractContextManager] = nullcontext,
        **kwargs: Any,
    ):
        self.model, self.init_kwargs, self.loading, self.kwargs = model, init_kwargs, loading, kwargs
        self.config = load_config(model, init_kwargs) if isinstance(model, str) else model.config
        try:
            self.processing_class = processing_class or tokenizer_of(model, None, init_kwargs)
        except (OSError, ValueError) as error:
            name = model if isinstance(model, str) else f"a `{type(model).__name__}` that was built in memory"
            raise ValueError(
                f"There is no tokenizer with the teacher {name}: pass it as `processing_class`."
            ) from error
        self.device = device

    @contextmanager
    def opened(self) -> Iterator[LocalTeacher]:
        """
        The teacher in memory.

        Yields:
            [`LocalTeacher`]: The teacher.

        Raises:
            `ValueError`: If it was loaded in shards.
        """
        with self.loading():
            model: Any = load_teacher(self.model, self.init_kwargs if isinstance(self.model, str) else None)
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "The teacher was loaded in the shards of ZeRO-3, in which it cannot be asked alone. Pass its path to the trainer, "
                "in a list or mapping as `teacher_model`, which loads it whole."
            )
        home = model.device
        if not hasattr(model, "hf_device_map"):
            model.to(self.device or PartialState(cpu=not torch.accelerator.is_available()).device)
        try:
            yield LocalTeacher(model, self.processing_class, **self.kwargs)
        finally:
            if not isinstance(self.model, str) and not hasattr(model, "hf_device_map"):
                model.to(home)
            release_memory(model)

    def describe(self) -> dict[str, Any]:
        """
        Identify this teacher without loading it.

        Returns:
            `dict[str, Any]`: As [`LocalTeacher.describe`] of a model in memory; of a path or id with `init_kwargs`.
        """
        if not isinstance(self.model, str):
            return LocalTeacher(self.model, self.processing_class, **self.kwargs).describe()
        return {
            "model": self.model,
            "init_kwargs": {name: str(value) for name, value in (self.init_kwargs or {}).items()},
            "revision": getattr(self.config, "_commit_hash", None),
            **describe_tokenizer(self.processing_class),
            "score": self.kwargs.get("score", "mean"),
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
        Write completions.

        Args:
            prompts, num_completions, seed, max_new_tokens, temperature, top_p, columns:
                As [`LocalTeacher.generate`] takes them.

        Returns:
            [`Completions`]: Texts, whether each was cut, and token ids.
        """
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "columns": columns}
        with self.opened() as teacher:
            return teacher.generate(prompts, num_completions, seed=seed, max_new_tokens=max_new_tokens, **sampling)

    def score(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TeacherScores:
        """
        Score completions.

        Args:
            prompts, completions, columns:
                As [`LocalTeacher.score`] takes them.

        Returns:
            [`TeacherScores`]: Scores.
        """
        with self.opened() as teacher:
            return teacher.score(prompts, completions, columns=columns)

    def check_top_k(self, k: int) -> None:
        """
        Raise a `ValueError` for a k that the vocabulary does not have.

        Args:
            k (`int`):
                Tokens at each position.
        """
        check_k(k, self.config.get_text_config().vocab_size)

    def top_k(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        k: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TopTokens:
        """
        Score completions and give the k most likely tokens at each of their positions.

        Args:
            prompts, completions, k, columns:
                As [`LocalTeacher.top_k`] takes them.

        Returns:
            [`TopTokens`]: Scores and tokens.
        """
        with self.opened() as teacher:
            return teacher.top_k(prompts, completions, k, columns=columns)
