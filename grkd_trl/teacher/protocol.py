"""The interface of a teacher, which may write completions and scores them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from transformers import PreTrainedModel


class Completions(NamedTuple):
    """
    What was written for P prompts. A writer that knows its token ids returns them, and trainers and teachers with the
    same tokenizer use these ids unchanged; the text is for people and for models with another tokenizer.

    Args:
        texts (`list[list[str]]`):
            Completions of each prompt, see [`~data.decode_completion`]. Empty for a prompt that could not be completed.
        clipped (`list[list[bool]]`):
            Whether each was cut at the maximum length, before its end.
        completion_ids (`list[list[list[int]]]`, *optional*):
            Ids of each completion, with its end token unless it was cut.
        prompt_ids (`list[list[int]]`, *optional*):
            Ids that each prompt's completions were written after.
        tokenizer_hash (`str`, *optional*):
            Hash of the writer's tokenizer, see [`~data.tokenizer_hash`].
    """

    texts: list[list[str]]
    clipped: list[list[bool]]
    completion_ids: list[list[list[int]]] | None = None
    prompt_ids: list[list[int]] | None = None
    tokenizer_hash: str | None = None


class TeacherScores(NamedTuple):
    """
    A teacher's scores of P groups of completions.

    Args:
        scores (`list[list[float]]`):
            Scores, higher is better; nats (per token) where the teacher is a language model. NaN for a completion that
            cannot be scored.
        num_tokens (`list[list[int]]`):
            Number of the teacher's tokens in each completion, EOS included. 0 if it has none.
        surprises (`list[list[bool]]`):
            Whether the teacher's tokens of a completion differ from its text, as where its chat template drops a part.
    """

    scores: list[list[float]]
    num_tokens: list[list[int]]
    surprises: list[list[bool]]


class TopTokens(NamedTuple):
    """
    A teacher's scores of P groups of completions, and its most likely tokens at each of their positions: token soft labels
    that need no teacher in training.

    Args:
        scored ([`TeacherScores`]):
            Scores.
        token_ids (`list[list[list[int]]]`):
            The teacher's tokens of each completion, T of them.
        top_ids (`list[list[list[list[int]]]]`):
            Of each completion `(T, k)`, the most likely token first; empty for a completion without labels.
        top_logps (`list[list[list[list[float]]]]`):
            Their log-probabilities, in nats, at temperature 1.
    """

    scored: TeacherScores
    token_ids: list[list[list[int]]]
    top_ids: list[list[list[list[int]]]]
    top_logps: list[list[list[list[float]]]]


def check_k(k: int, vocab_size: int) -> None:
    """
    Refuse a number of most likely tokens that a vocabulary does not have.

    Args:
        k (`int`):
            Tokens at each position.
        vocab_size (`int`):
            Tokens in the vocabulary.

    Raises:
        `ValueError`: If k lies outside 1 and `vocab_size`.
    """
    if not 1 <= k <= vocab_size:
        raise ValueError(f"`k` must lie between 1 and the vocabulary's {vocab_size}, got {k}.")


def prompt_seeds(seed: int | Sequence[int], num_prompts: int) -> list[int]:
    """
    A seed for each prompt, so that its draws depend neither on the prompts beside it nor on the process.

    Args:
        seed (`int` or `Sequence[int]`):
            One for each prompt, or one for all, which prompt i adds i to.
        num_prompts (`int`):
            Number of prompts (P).

    Returns:
        `list[int]`: P seeds.
    """
    return [seed + row for row in range(num_prompts)] if isinstance(seed, int) else list(seed)


@runtime_checkable
class Scorer(Protocol):
    """Anything with these methods: every [`Teacher`], [`CallableScorer`], or your own."""

    def describe(self) -> dict[str, Any]:
        """
        Identify this scorer, for the manifest of what it wrote or scored.

        Returns:
            `dict[str, Any]`: Values that JSON can hold.
        """

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
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts, as text or messages.
            completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
                A group of completions for each prompt.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns of the dataset, a value a prompt; `clipped` among them, and for what a model wrote
                `prompt_ids`, `completion_ids` and `tokenizer_hash`.

        Returns:
            [`TeacherScores`]: A score for each completion.
        """


class Teacher(Scorer, Protocol):
    """A scorer that writes too: [`LocalTeacher`], [`ServerTeacher`], or your own."""

    def generate(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        num_completions: int,
        *,
        seed: int | Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Completions:
        """
        Write completions.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts, as text or messages.
            num_completions (`int`):
                Completions for each prompt.
            seed (`int` or `Sequence[int]`):
                Seed of the draws, see [`prompt_seeds`].
            max_new_tokens (`int`):
                Longest completion, in tokens.
            temperature (`float`):
                Sampling temperature.
            top_p (`float`):
                Share of the probability to sample from.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns of the dataset, a value a prompt.

        Returns:
            [`Completions`]: Texts, whether each was cut, and the token ids where they are known.
        """


@runtime_checkable
class TopKTeacher(Scorer, Protocol):
    """
    A scorer with a language model's distributions: [`LocalTeacher`], [`LazyTeacher`], [`ServerTeacher`],
    [`CalibratedTeacher`], a [`TeacherEnsemble`] of these, or your own.

    Args:
        processing_class (`Any`):
            Its tokenizer.
    """

    processing_class: Any

    def check_top_k(self, k: int) -> None:
        """
        Find out before a run whether [`TopKTeacher.top_k`] will be answered.

        Args:
            k (`int`):
                Tokens at each position.
        """

    def top_k(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        k: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TopTokens:
        """
        Score completions and give the most likely tokens at each of their positions.

        Args:
            prompts, completions, columns:
                As in [`Scorer.score`].
            k (`int`):
                Tokens at each position.

        Returns:
            [`TopTokens`]: Scores and tokens.
        """


# What trainers take as `teacher_model`: one teacher, or several as a list or by name.
_Teacher: TypeAlias = str | PreTrainedModel | Scorer
AnyTeacher: TypeAlias = _Teacher | Sequence[_Teacher] | Mapping[str, _Teacher]
