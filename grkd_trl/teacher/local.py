"""Local causal language models that write completions and score them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._trl import get_config_model_id
from ..data import (
    DataCollatorForGroups,
    as_read,
    describe_tokenizer,
    is_score,
    tokenizer_hash,
)
from ..data.teacher_prompts import record_prompts
from ..scoring import (
    eval_mode,
    predicted_mask,
    refuse_not_finite,
    score_completions,
    sequence_scores,
)
from .batches import token_batches
from .combination import AGREEMENT
from .loading import hash_tensors
from .models import context_length_of, hash_weights
from .protocol import Completions, TeacherScores, TopTokens, check_k, prompt_seeds
from .retokenize import columns_to_score, image_columns, read_groups, read_prompts
from .writing import pad_token_id, write_completions


class LocalTeacher:
    """
    A causal language model in this process as a [`Teacher`]: it writes completions, and scores them with its own
    tokenizer and chat template, in evaluation mode, batched by tokens and sorted by length. Logits exist for
    completion tokens alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, of any dtype, quantized or not.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, which need not be the student's; of a model of images and text its processor.
        score (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (nats per token) or `"sum"` (nats) of the log-probabilities.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Tokens in a batch that is scored, a prompt counted once where the model can share it, else every row and its
            padding. A larger group is a batch of its own.
        prompts_per_batch (`int`, *optional*, defaults to `64`):
            Most prompts in a batch that is written.
        written_tokens_per_batch (`int`, *optional*):
            Most tokens in a batch that is written, see [`~teacher.generate_completions`]. With a high `prompts_per_batch`,
            short prompts share larger batches than long ones.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.
        prompt_sharing (`str`, *optional*, defaults to `"auto"`):
            Whether each prompt is encoded once for all its completions: `"auto"` (where that is less work), `"on"` or
            `"off"`, see [`~scoring.score_completions`]. The scores are the same to rounding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        score: str = "mean",
        tokens_per_batch: int = 16384,
        prompts_per_batch: int = 64,
        written_tokens_per_batch: int | None = None,
        progress: bool = False,
        prompt_sharing: str = "auto",
    ):
        if score not in ("mean", "sum"):
            raise ValueError(f"`score` must be 'mean' or 'sum', got {score!r}.")
        if prompt_sharing not in ("auto", "on", "off"):
            raise ValueError(f"`prompt_sharing` must be 'auto', 'on' or 'off', got {prompt_sharing!r}.")
        self.model, self.processing_class, self.score_type = model, processing_class, score
        self.prompt_sharing = prompt_sharing
        self.tokens_per_batch, self.prompts_per_batch, self.progress = tokens_per_batch, prompts_per_batch, progress
        self.written_tokens_per_batch = written_tokens_per_batch
        self.context_length = context_length_of(model)

    def describe(self) -> dict[str, Any]:
        """
        Identify this teacher.

        Returns:
            `dict[str, Any]`: Model, revision, dtype, the score, and hashes of the tokenizer, of its chat template, of adapters and
            of the weights, which may have been trained further under the same name and revision.
        """
        model: Any = self.model  # or adapters on one
        config, adapters = model.config, {}
        if isinstance(model, PeftModel):
            adapters = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {
            "model": get_config_model_id(config),
            **({"adapters": hash_tensors(adapters)} if adapters else {}),
            "revision": getattr(config, "_commit_hash", None),  # only what came from a hub has one
            "weights": hash_weights(model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantization": str(config.quantization_config) if hasattr(config, "quantization_config") else None,
            **describe_tokenizer(self.processing_class),
            "score": self.score_type,
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
        Write completions. A prompt's draws depend on its seed alone, not on the prompts beside it, and torch's global
        generator is not used.

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
                Sampling temperature; 0 takes the most likely token at each step.
            top_p (`float`, *optional*, defaults to `1.0`):
                Share of the probability to sample from.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns, a value a prompt. `images`, `image`, `tools` and `chat_template_kwargs` are read, and
                `teacher_prompt` is not: groups are written from the prompt.

        Returns:
            [`Completions`]: Texts, whether each was cut, and the ids that were written; none for a prompt that leaves no
            room for `max_new_tokens` in the context.

        Raises:
            `ValueError`: If the model's logits are not finite.
        """
        prompt_ids, images = read_prompts(self.processing_class, prompts, columns)
        rows = [row for row, ids in enumerate(prompt_ids) if len(ids) + max_new_tokens <= self.context_length]
        seeds = prompt_seeds(seed, len(prompts))
        written = write_completions(
            self.model,
            self.processing_class,
            [prompt_ids[row] for row in rows],
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=self.prompts_per_batch,
            tokens_per_batch=self.written_tokens_per_batch,
            seeds=[seeds[row] for row in rows],
            images=[images[row] for row in rows],
            progress=self.progress,
        )
        texts: list[list[str]] = [[] for _ in prompts]
        clipped: list[list[bool]] = [[] for _ in prompts]
        completion_ids: list[list[list[int]]] = [[] for _ in prompts]
        for position, row in enumerate(rows):
            texts[row], clipped[row] = written.texts[position], written.clipped[position]
            completion_ids[row] = (written.completion_ids or [])[position]
        return Completions(texts, clipped, completion_ids, prompt_ids, tokenizer_hash(self.processing_class))

    def score(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[Sequence[str | list[dict[str, Any]]]],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> TeacherScores:
        """
        Score completions by their log-probability.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                P prompts, as text or messages.
            completions (`Sequence[Sequence[str]]` or `Sequence[Sequence[list[dict]]]`):
                A group of completions for each prompt.
            columns (`Mapping[str, Sequence]`, *optional*):
                Further columns, a value a prompt. `images`, `image`, `clipped`, `tools`, `chat_template_kwargs`, and
                `prompt_ids`, `completion_ids` and `tokenizer_hash` are read: ids of this tokenizer are scored as they were
                written. A `teacher_prompt` that is not `None` is read in place of the prompt, with the same completion tokens.

        Returns:
            [`TeacherScores`]: NaN for a completion that has no token, exceeds the context with its prompt, or has a
            probability of 0.

        Raises:
            `ValueError`: If the model's logits are not finite, or a `teacher_prompt` does not fit the context.
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
        Score completions and give the k most likely tokens at each of their positions, from the same forward.

        Args:
            prompts, completions, columns:
                As in [`LocalTeacher.score`].
            k (`int`):
                Tokens at each position.

        Returns:
            [`TopTokens`]: None of a completion that has no token, or an empty prompt, or with its prompt exceeds the
            context.

        Raises:
            `ValueError`: If k is out of range, or the model's logits are not finite.
        """
        self.check_top_k(k)
        return self._read(prompts, completions, columns, k)

    def check_top_k(self, k: int) -> None:
        """
        Raise a `ValueError` for a k that the vocabulary does not have.

        Args:
            k (`int`):
                Tokens at each position.
        """
        check_k(k, self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def _read(self, prompts, completions, columns, k: int | None = None) -> TopTokens:
        groups, indices, token_ids, surprises = [], [], [], []
        read = read_groups(self.processing_class, prompts, completions, columns, self.context_length)
        for row, (prompt_ids, completion_ids, surprising) in enumerate(read):
            token_ids.append(completion_ids)
            surprises.append(surprising)
            fits = [0 < len(ids) <= self.context_length - len(prompt_ids) for ids in completion_ids]
            if any(fits):
                kept = [ids for ids, fit in zip(completion_ids, fits, strict=True) if fit]
                images = image_columns(self.processing_class, prompts[row], columns, row)
                groups.append({"prompt_ids": prompt_ids, "completion_ids": kept, **images})
                indices.append([(row, position) for position, fit in enumerate(fits) if fit])
        scores = [[math.nan] * len(group) for group in token_ids]
        tops: list[list[list[Any]]] = [[[[], []] for _ in group] for group in token_ids]

        def top(logits, rows):
            logps, ids = logits.float().log_softmax(-1).topk(k)
            return {"ids": ids, "logps": logps}

        with eval_mode(self.model):
            sharing: dict[str, Any] = {"prompt_sharing": self.prompt_sharing}
            labels: dict[str, Any] = {} if k is None else {"token_losses": top}
            for rows in token_batches(self.model, groups, self.tokens_per_batch, progress=self.progress, **sharing):
                batch, places = (
                    self._collate([groups[row] for row in rows]),
                    [at for row in rows for at in indices[row]],
                )
                given = score_completions(self.model, batch, **sharing, **labels)
                logps, mask = given.per_token_logps, batch["completion_mask"]
                refuse_not_finite(logps, "The teacher's logits", allow_impossible=True)
                logps = logps.masked_fill(logps == -math.inf, math.nan)  # no score
                values = sequence_scores(logps, mask, score=self.score_type).tolist()
                for (row, position), value in zip(places, values, strict=True):
                    scores[row][position] = value
                if k is not None:
                    lengths = predicted_mask(mask).sum(-1).tolist()
                    parts = (given.token_losses[name].cpu().split(lengths) for name in ("ids", "logps"))
                    for (row, position), *pair in zip(places, *parts, strict=True):
                        if len(pair[0]) == len(token_ids[row][position]):  # after no prompt the first has no label
                            tops[row][position] = [part.tolist() for part in pair]
        num_tokens = [[len(ids) for ids in group] for group in token_ids]
        top_ids, top_logps = ([[pair[index] for pair in group] for group in tops] for index in range(2))
        return TopTokens(TeacherScores(scores, num_tokens, surprises), token_ids, top_ids, top_logps)

    def _collate(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        processor = self.processing_class if isinstance(self.processing_class, ProcessorMixin) else None
        collator = DataCollatorForGroups(pad_token_id=pad_token_id(self.processing_class), processor=processor)
        return send_to_device(collator(groups), self.model.device)


def score_groups(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    *,
    score: str = "mean",
    tokens_per_batch: int = 16384,
    progress: bool = True,
) -> Dataset:
    """
    Score every completion of a dataset of groups under a teacher, in evaluation mode and in batches of similar length.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The teacher's tokenizer, which need not be the student's; of a model of images and text its processor.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completions`, and optionally `clipped` and `teacher_prompt`, which the teacher reads in
            place of the prompt.
        score (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (nats per token) or `"sum"` (nats) of the log-probabilities.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            As in [`LocalTeacher`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: The dataset with a column `teacher_scores`, in place of one it had, and with `scored_prompt_hash` and beside
        a `teacher_prompt` with `scored_teacher_prompt_hash`, by which the trainers refuse the scores if one of the two is changed.

    Raises:
        `ValueError`: If a row is no group, the teacher's logits are not finite, or a completion has no token, exceeds
            the teacher's context or has a probability of 0.
    """
    dataset = as_read(dataset)
    made = {"teacher_scores", *AGREEMENT}.intersection(dataset.column_names)
    dataset = dataset.remove_columns(sorted(made))
    teacher = LocalTeacher(model, processing_class, score=score, tokens_per_batch=tokens_per_batch, progress=progress)
    prompts, completions, columns = columns_to_score(dataset, processing_class, keeps="teacher_top_ids")
    scores, num_tokens, _ = teacher.score(prompts, completions, columns=columns)
    for index, row in enumerate(scores):
        for position, value in enumerate(row):
            if not is_score(value):
                raise ValueError(
                    f"`completions` of row {index} holds {num_tokens[index][position]} tokens at position {position}, "
                    f"and their score is {value}. With the prompt it must come to at least one token, fit the teacher's "
                    f"context of {teacher.context_length} tokens and be possible for the teacher. Drop or shorten it."
                )
    return record_prompts(dataset.add_column("teacher_scores", scores))
