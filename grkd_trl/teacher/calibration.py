"""Calibration: a teacher's log-probabilities corrected by which answers it picks when it is asked."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._trl import common_prefix_length, pad
from ..data import message_text, tokenize_completions
from ..data.images import refuse_images
from ..scoring import eval_mode, without_router_loss
from .local import LocalTeacher
from .protocol import Completions, TeacherScores, TopTokens
from .retokenize import images_at, teacher_prompts


SELECTION_TEMPLATE = (
    "Which of the two answers to the prompt is better?\n\n# Prompt\n{prompt}\n\n# Answer A\n{first}\n\n"
    "# Answer B\n{second}\n\nReply with the letter of the better answer alone, A or B."
)


def calibrate_scores(mean_logps: torch.Tensor, selection_probs: torch.Tensor, *, ratio: float) -> torch.Tensor:
    r"""
    Mix of what a teacher would write and what it picks, as in [PAD](https://huggingface.co/papers/2502.14272):
    \\( s_i = r \, \overline{\log p}_i + (1 - r) \log p^{sel}_i \\).

    Args:
        mean_logps (`torch.Tensor` of shape `(..., G)`):
            Mean log-probability of each completion, in nats per token.
        selection_probs (`torch.Tensor` of shape `(..., G)`):
            Probability that each is picked over another of its group, as [`selection_probs`] gives them. 0 counts as
            the smallest number above it.
        ratio (`float`):
            Share \\( r \\) of the log-probability, in 0..1. PAD's released recipe has 0.

    Returns:
        `torch.Tensor` of shape `(..., G)`: Scores, in nats.

    Raises:
        `ValueError`: If shapes differ, or a share or probability lies outside 0..1.

    Example:

    ```python
    >>> import torch
    >>> from grkd_trl.teacher import calibrate_scores

    >>> calibrate_scores(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.0]), ratio=0.5)
    tensor([-0.8466, -1.0000])

    ```
    """
    if mean_logps.shape != selection_probs.shape:
        raise ValueError(
            f"`mean_logps` and `selection_probs` must have one shape, got {tuple(mean_logps.shape)} and "
            f"{tuple(selection_probs.shape)}."
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"`ratio` is a share and must lie in 0..1, got {ratio}.")
    if ((selection_probs < 0) | (selection_probs > 1)).any():
        raise ValueError(f"`selection_probs` must lie in 0..1, got {selection_probs.tolist()}.")
    log_probs = selection_probs.clamp(min=torch.finfo(selection_probs.dtype).tiny).log()
    return ratio * mean_logps + (1 - ratio) * log_probs


def selection_probs(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list[dict[str, Any]],
    completions: Sequence[str | list[dict[str, Any]]],
    *,
    template: str = SELECTION_TEMPLATE,
    letters: tuple[str, str] = ("A", "B"),
    both_orders: bool = True,
    tokens_per_batch: int = 16384,
    share_prefix: bool = True,
) -> list[float]:
    """
    How often a teacher picks each completion of a group when it is shown two of them: for every pair the probability
    of the two letters as the next token, made to sum to 1, and of each completion the mean over its pairs.

    A group of G costs G (G - 1) questions of two completions, half of that in one order. The prefix that all questions
    of a group share, the prompt, is encoded once and its keys and values are reused, if the model's cache can be
    repeated.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. With a chat template the question is a user's message.
        prompt (`str` or `list[dict]`):
            Prompt.
        completions (`Sequence[str]` or `Sequence[list[dict]]`):
            Its G completions, 2 or more.
        template (`str`, *optional*):
            Question, with `{prompt}`, `{first}` and `{second}`. Put the prompt first, so that it is shared.
        letters (`tuple[str, str]`, *optional*, defaults to `("A", "B")`):
            What the template calls the two.
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether to ask each pair in both orders and average, so that the order of the answers does not matter.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Tokens in a batch, padding and shared prefix included.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Whether to share the keys and values of the questions' common prefix.

    Returns:
        `list[float]`: G probabilities.

    Raises:
        `ValueError`: If there are fewer than 2 completions, or the letters are the same token.
    """
    if len(completions) < 2:
        raise ValueError(f"A group of {len(completions)} has no pair to pick from: give 2 or more completions.")
    orders = [
        pair for i, j in combinations(range(len(completions)), 2) for pair in [(i, j), (j, i)][: 1 + both_orders]
    ]
    texts = [_text(completion) for completion in completions]
    questions, letter_ids = [], []
    for first, second in orders:
        question = template.format(prompt=_text(prompt), first=texts[first], second=texts[second])
        ids, answers = _question_ids(processing_class, question, letters)
        questions.append(ids)
        letter_ids.append(answers)
    logps = torch.cat(list(_next_logps(model, processing_class, questions, tokens_per_batch, share_prefix)))
    chances = logps.gather(1, torch.tensor(letter_ids, device=logps.device)).softmax(-1)  # of the two letters alone
    sums, counts = [0.0] * len(completions), [0] * len(completions)
    for pair, pair_chances in zip(orders, chances.tolist(), strict=True):
        for position, chance in zip(pair, pair_chances, strict=True):
            sums[position] += chance
            counts[position] += 1
    return [total / count for total, count in zip(sums, counts, strict=True)]


def _text(value: str | list[dict[str, Any]]) -> str:
    if isinstance(value, str):
        return value.strip()
    texts = [message_text(turn).strip() for turn in value]
    if len(value) == 1:
        return texts[0]
    return "\n".join(f"{turn['role']}: {text}" for turn, text in zip(value, texts, strict=True))


def _question_ids(processing_class, question: str, letters: tuple[str, str]) -> tuple[list[int], list[int]]:
    """Tokens up to the first one in which the answers differ, and that token of each answer."""
    if processing_class.chat_template is None:
        prompt, answers = f"{question}\n\nThe better answer:", [f" {letter}" for letter in letters]
    else:
        prompt, answers = [{"role": "user", "content": question}], list(letters)
    prompt_ids, answer_ids = tokenize_completions(processing_class, prompt, answers, clipped=[True, True])
    length = common_prefix_length(*answer_ids)
    parted = [ids[length : length + 1] for ids in answer_ids]
    if [] in parted:
        raise ValueError(
            f"The tokenizer gives the letters {letters} the tokens {answer_ids[0]} and {answer_ids[1]}, which do not "
            "part: choose other `letters`, and a `template` that names them."
        )
    return prompt_ids + answer_ids[0][:length], [ids[0] for ids in parted]


@torch.no_grad()
def _next_logps(
    model, processing_class, questions: list[list[int]], tokens_per_batch: int, share_prefix: bool
) -> Iterator[torch.Tensor]:
    """Next-token logits after each question, `(chunk, V)` at a time."""
    shared = 0
    if share_prefix:
        shared = min(common_prefix_length(questions[0], ids) for ids in questions)
        shared = min(shared, *(len(ids) - 1 for ids in questions))
    cache, router = None, without_router_loss(model)
    with eval_mode(model):
        if shared > 0:
            prefix = torch.tensor([questions[0][:shared]], device=model.device)
            cache = model(input_ids=prefix, use_cache=True, logits_to_keep=1, **router).get("past_key_values")
            if not hasattr(cache, "batch_repeat_interleave"):  # a state-space model, or a cache of its own
                cache, shared = None, 0
        longest = max(map(len, questions))
        size = max(1, tokens_per_batch // longest)
        for start in range(0, len(questions), size):
            rests = [torch.tensor(ids[shared:], device=model.device) for ids in questions[start : start + size]]
            input_ids = pad(rests, padding_value=getattr(processing_class, "pad_token_id", None) or 0)
            seen = [torch.ones(shared + len(rest), dtype=torch.long, device=model.device) for rest in rests]
            past = copy.deepcopy(cache)
            if past is not None:
                past.batch_repeat_interleave(len(rests))
            last = torch.tensor([len(rest) - 1 for rest in rests], device=model.device)
            kept, row_of = last.unique(return_inverse=True)  # the head runs where a question ends, alone
            outputs = model(
                input_ids=input_ids,
                attention_mask=pad(seen),
                position_ids=torch.arange(shared, shared + input_ids.shape[1], device=model.device).unsqueeze(0),
                past_key_values=past,
                use_cache=past is not None,
                logits_to_keep=kept,
                **router,
            )
            yield outputs.logits[torch.arange(len(rests), device=model.device), row_of].float()


class CalibratedTeacher:
    """
    A local teacher whose scores are calibrated: [`calibrate_scores`] of its mean log-probabilities and its
    [`selection_probs`]. It writes as the teacher does.

    Args:
        teacher ([`LocalTeacher`]):
            Teacher, with `score="mean"`.
        ratio (`float`, *optional*, defaults to `0.0`):
            Share of the log-probability.
        template (`str`, *optional*):
            Question, as in [`selection_probs`].
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether to ask each pair in both orders.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        *,
        ratio: float = 0.0,
        template: str = SELECTION_TEMPLATE,
        both_orders: bool = True,
    ):
        if teacher.score_type != "mean":
            raise ValueError(
                f'Calibration takes the mean of the logps, and the teacher has `score="{teacher.score_type}"`.'
            )
        self.teacher, self.ratio, self.template, self.both_orders = teacher, ratio, template, both_orders
        self.processing_class, self.check_top_k = teacher.processing_class, teacher.check_top_k

    def describe(self) -> dict[str, Any]:
        """
        Identify this teacher.

        Returns:
            `dict[str, Any]`: The teacher's description and the calibration.
        """
        calibration = {"ratio": self.ratio, "template": self.template, "both_orders": self.both_orders}
        return self.teacher.describe() | {"calibration": calibration}

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
        Write completions, as the teacher does.

        Args:
            prompts, num_completions, seed, max_new_tokens, temperature, top_p, columns:
                As [`LocalTeacher.generate`] takes them.

        Returns:
            [`Completions`]: Texts and whether each was cut.
        """
        return self.teacher.generate(
            prompts,
            num_completions,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            columns=columns,
        )

    def score(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TeacherScores:
        """
        Score completions and calibrate.

        Args:
            prompts, completions, columns:
                As [`LocalTeacher.score`] takes them.

        Returns:
            [`TeacherScores`]: NaN also where a group has a single completion that the teacher can score.
        """
        return self._calibrate(
            prompts, completions, columns, self.teacher.score(prompts, completions, columns=columns)
        )

    def top_k(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        k: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TopTokens:
        """
        Calibrated scores, and the most likely tokens as the teacher gives them.

        Args:
            prompts, completions, k, columns:
                As [`LocalTeacher.top_k`] takes them.

        Returns:
            [`TopTokens`]: Scores as in [`CalibratedTeacher.score`].
        """
        given = self.teacher.top_k(prompts, completions, k, columns=columns)
        return given._replace(scored=self._calibrate(prompts, completions, columns, given.scored))

    def _calibrate(self, prompts, completions, columns, scored: TeacherScores) -> TeacherScores:
        for row in range(len(prompts)):
            refuse_images({"images": images_at(columns, row)}, row, "`CalibratedTeacher`")
        asked = teacher_prompts(prompts, columns)
        for prompt, group, scores in zip(asked, completions, scored.scores, strict=True):
            finite = [position for position, value in enumerate(scores) if math.isfinite(value)]
            if len(finite) < 2:
                scores[:] = [math.nan] * len(scores)
                continue
            picked = selection_probs(
                self.teacher.model,
                self.teacher.processing_class,
                prompt,
                [group[position] for position in finite],
                template=self.template,
                both_orders=self.both_orders,
                tokens_per_batch=self.teacher.tokens_per_batch,
            )
            mean_logps = torch.tensor([scores[position] for position in finite], dtype=torch.float64)
            chances = torch.tensor(picked, dtype=torch.float64)
            calibrated = calibrate_scores(mean_logps, chances, ratio=self.ratio)
            for position, value in zip(finite, calibrated.tolist(), strict=True):
                scores[position] = value
        return scored
