"""Groups made while training: the current student and the teacher write, the teacher scores."""

import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers.utils import logging
from transformers.utils.import_utils import is_rich_available
from trl import SFTTrainer

from .. import _trl
from .._trl import print_prompt_completions_sample, unwrap_model_for_generation
from ..data import DataCollatorForGroups, tokenize_completions
from ..data.sampler import RepeatedPrompts, indices_of_process
from ..teacher import CallableScorer, Completions, LocalTeacher
from ..teacher.retokenize import encode_prompt, template_columns
from . import content_seed, write_unit


logger = logging.get_logger(__name__)


class OnlineGroups:
    """
    Turns the prompts of a training step into its groups.

    Every `generate_every` optimizer steps groups are made for all the prompts of these steps at once, by the student as
    it is then; `reuse_groups` says how often they are gone through.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer with a [`GRKDConfig`], its models placed.
        collator ([`~data.DataCollatorForGroups`]):
            Collator of groups.
        completion_fn (`Callable`, *optional*):
            Writes in place of student and teacher, see [`GRKDTrainer`].
        score_fn (`Callable`, *optional*):
            Scores in place of the teacher, see [`GRKDTrainer`].
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        collator: DataCollatorForGroups,
        completion_fn: Callable | None = None,
        score_fn: Callable | None = None,
    ):
        self.trainer, self.collator = trainer, collator
        self.completion_fn, self.scorer = completion_fn, CallableScorer(score_fn) if score_fn else None
        self._buffer: list[dict[str, Any]] = []
        self._training_since: float | None = None
        args = trainer.args
        if args.log_completions and not is_rich_available():
            raise ImportError("`log_completions` prints a table with rich: `pip install rich`, or set it to 0.")
        self.vllm = None
        if args.use_vllm:
            self.vllm = _trl.VLLMGeneration(
                trainer.model,
                trainer.accelerator,
                trainer.processing_class,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                temperature=args.temperature,
                top_p=args.top_p,
                max_completion_length=args.max_completion_length,
                logprobs=0,
            )

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        """
        Collate groups as ever; leave prompts as they are.

        Args:
            rows (`list[dict]`):
                Rows of groups or of prompts.

        Returns:
            `dict[str, torch.Tensor]` or `list[dict]`: A batch of groups, or the prompts.
        """
        return self.collator(rows) if "completion_ids" in rows[0] else rows

    def sampler(self, dataset: Any) -> RepeatedPrompts:
        """
        Order of the prompts. Each batch holds all prompts that groups are made for at once, and comes once for each
        micro-batch that is trained on them.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prompts.

        Returns:
            [`~data.sampler.RepeatedPrompts`]: Sampler.

        Raises:
            `ValueError`: If there are too few prompts.
        """
        args, size = self.trainer.args, self.batch_size * self.trainer.accelerator.num_processes
        if len(dataset) < size:
            raise ValueError(
                f"The dataset has {len(dataset)} prompts, and groups are made for {size} at once (batch size x "
                "gradient accumulation x `generate_every` x processes). Lower one of these, or give more prompts."
            )
        repeat_count = args.gradient_accumulation_steps * args.generate_every * args.reuse_groups
        places = [place for process in range(args.world_size) for place in self._places(process)]
        return RepeatedPrompts(len(dataset), size, repeat_count, args.seed, places)

    def _places(self, process: int) -> list[int]:
        args = self.trainer.args
        num_batches = args.gradient_accumulation_steps * args.generate_every
        return indices_of_process(process, args.world_size, args.per_device_train_batch_size, num_batches)

    @property
    def batch_size(self) -> int:
        """Prompts of one process that groups are made for at once."""
        args = self.trainer.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.generate_every

    def batches(self, epoch_iterator: Iterator, num_batches: int) -> Iterator[dict[str, torch.Tensor]]:
        """
        Groups of an optimizer step.

        Args:
            epoch_iterator (`Iterator`):
                Gives, for each micro-batch, all prompts of the chunk.
            num_batches (`int`):
                Micro-batches of the step.

        Returns:
            `Iterator[dict[str, torch.Tensor]]`: Micro-batches of groups, on the device.
        """
        trainer, args = self.trainer, self.trainer.args
        means, step = trainer.running_means["train"], trainer.state.global_step
        if self._training_since is not None:
            means.add("time/training", torch.tensor(time.perf_counter() - self._training_since))
        chunks = [chunk for _, chunk in zip(range(num_batches), epoch_iterator, strict=False)]
        if not self._buffer or step % (args.generate_every * args.reuse_groups) == 0:
            places = self._places(trainer.accelerator.process_index)
            self._buffer = self._make(chunks[0], step // (args.generate_every * args.reuse_groups), places, "train")
        size = args.per_device_train_batch_size
        first = step % args.generate_every * num_batches
        groups = [self._buffer[i * size : (i + 1) * size] for i in range(first, first + len(chunks))]
        self._training_since = time.perf_counter()
        return iter([self._to_device(self.collator(part)) for part in groups])

    def evaluate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Groups of a batch of evaluation. A prompt decides its draws, so every evaluation draws alike.

        Args:
            rows (`list[dict]`):
                Prompts.

        Returns:
            `dict[str, torch.Tensor]`: Batch of groups, on the device.
        """
        self._training_since = None  # what comes until the next step is no training
        places = [content_seed(row["prompt"]) for row in rows]
        return self._to_device(self.collator(self._make(rows, 0, places, "eval")))

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.trainer.accelerator.device) for name, tensor in batch.items()}

    def _make(self, rows: list[dict[str, Any]], unit: int, places: list[int], split: str) -> list[dict[str, Any]]:
        """Write, score and tokenize the groups of some prompts."""
        trainer, args, means = self.trainer, self.trainer.args, self.trainer.running_means[split]
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        start = time.perf_counter()
        texts, clipped = self._write(prompts, columns, unit, places)
        # A cut completion without any text, of special tokens alone, has no token to train on but its end.
        clipped = [
            [cut and bool(text) for text, cut in zip(*pair, strict=True)] for pair in zip(texts, clipped, strict=True)
        ]
        means.add("time/generation", torch.tensor(time.perf_counter() - start))
        repeated = [len(group) - len(set(group)) for group in texts]
        means.add("completions/duplicate_ratio", torch.tensor(repeated), sum(map(len, texts)))

        start, scores = time.perf_counter(), None
        if self.scorer is not None:
            scores = self.scorer.score(prompts, texts, columns=columns | {"clipped": clipped}).scores
        elif not args.needs_teacher_logits:  # else the training step's own forward of the teacher scores them
            scores, size = [], args.per_device_train_batch_size
            with self._teacher() as teacher:
                for first in range(0, len(prompts), size):
                    part = slice(first, first + size)
                    of_part = {name: values[part] for name, values in (columns | {"clipped": clipped}).items()}
                    scores += teacher.score(prompts[part], texts[part], columns=of_part).scores
        if scores is not None:
            means.add("time/scoring", torch.tensor(time.perf_counter() - start))

        groups = []
        for row, prompt in enumerate(prompts):
            fine = [i for i in range(len(texts[row])) if scores is None or math.isfinite(scores[row][i])]
            if not fine:
                raise ValueError(f"No completion of the prompt {prompt!r} was scored: drop the prompt.")
            cuts = [clipped[row][i] for i in fine]
            prompt_ids, completion_ids = tokenize_completions(
                trainer.processing_class,
                prompt,
                [texts[row][i] for i in fine],
                clipped=cuts,
                **template_columns(columns, row),
            )
            group = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "clipped": cuts}
            groups.append(group if scores is None else group | {"teacher_scores": [scores[row][i] for i in fine]})
        every, step = args.log_completions, trainer.state.global_step
        if split == "train" and every and step % every < args.generate_every and trainer.accelerator.is_main_process:
            self._log_completions(prompts, texts, scores)
        return groups

    def _write(self, prompts: list[Any], columns: dict[str, list], unit: int, places: list[int]) -> tuple[list, list]:
        args = self.trainer.args
        if self.completion_fn is not None:
            written = self.completion_fn(prompts=prompts, num_completions=args.num_completions, **columns)
            if not isinstance(written, Completions):
                written = Completions(written, [[False] * len(group) for group in written])
            if [len(group) for group in written.texts] != [args.num_completions] * len(prompts):
                raise ValueError(
                    f"`completion_fn` returned groups of {[len(group) for group in written.texts]} completions for "
                    f"{len(prompts)} prompts, and `num_completions={args.num_completions}`."
                )
            return written
        by_teacher = {"student": 0, "teacher": args.num_completions}.get(
            args.completion_source, args.num_teacher_completions
        )
        texts, clipped = [[] for _ in prompts], [[] for _ in prompts]
        writers = {
            "teacher": (self._teacher, by_teacher),
            "student": (self._student, args.num_completions - by_teacher),
        }
        for name, (opened, num_completions) in writers.items():
            if num_completions == 0:
                continue
            with opened() as writer:
                written = write_unit(
                    prompts,
                    {name: (writer, num_completions)},
                    unit,
                    seed=args.seed,
                    max_new_tokens=args.max_completion_length,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    columns=columns,
                    places=places,
                )
            for row in range(len(prompts)):
                texts[row] += written[0][row]
                clipped[row] += written[1][row]
                if not texts[row]:
                    raise ValueError(
                        f"The prompt {prompts[row]!r} leaves no room for `max_completion_length="
                        f"{args.max_completion_length}` in the context of the {name}: drop or shorten it."
                    )
        return texts, clipped

    @contextmanager
    def _student(self) -> Iterator[Any]:
        trainer = self.trainer
        if self.vllm is not None:
            self.vllm.sync_weights()
            yield _VLLMWriter(self.vllm, trainer.processing_class)
            return
        checkpointing = trainer.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=checkpointing
        ) as model:
            yield LocalTeacher(model, trainer.processing_class)

    @contextmanager
    def _teacher(self) -> Iterator[LocalTeacher]:
        trainer = self.trainer
        with trainer.teaching(trainer.model_wrapped) as model:
            checkpointing = trainer.args.gradient_checkpointing_kwargs
            with unwrap_model_for_generation(
                model, trainer.accelerator, gradient_checkpointing_kwargs=checkpointing
            ) as teacher:
                # A forward for each micro-batch, as in the training step: processes that share it need as many.
                yield LocalTeacher(
                    teacher, trainer.processing_class, score=trainer.args.score, tokens_per_batch=math.inf
                )

    def _log_completions(self, prompts: list[Any], texts: list[list[str]], scores: list[list[float]] | None) -> None:
        step, report_to = self.trainer.state.global_step, self.trainer.args.report_to
        table = {"prompt": [prompt for prompt, group in zip(prompts, texts, strict=True) for _ in group]}
        table["completion"] = [text for group in texts for text in group]
        columns = {} if scores is None else {"teacher": [score for group in scores for score in group]}
        shown = sum(map(len, texts[:4]))
        printed = {name: values[:shown] for name, values in columns.items()}
        print_prompt_completions_sample(
            table["prompt"][:shown], table["completion"][:shown], printed, None, step, None
        )
        # To the trackers that have tables, as `GRPOTrainer` does
        trackers = [name for name in ("wandb", "trackio") if name in report_to]
        for tracker in map(importlib.import_module, trackers):
            if tracker.__name__ == "wandb" and tracker.run is None:
                continue
            frame = pd.DataFrame({"step": step} | table | columns)
            tracker.log({"completions": tracker.Table(dataframe=frame)})


class _VLLMWriter:
    """TRL's vLLM as the half of a teacher that writes. Its own sampling decides; the seed is vLLM's."""

    def __init__(self, vllm: Any, processing_class: Any):
        self.vllm, self.processing_class = vllm, processing_class

    def generate(
        self, prompts, num_completions, *, seed, max_new_tokens, temperature, top_p, columns=None
    ) -> Completions:
        ids = [
            encode_prompt(self.processing_class, prompt, **template_columns(columns, row))
            for row, prompt in enumerate(prompts)
            for _ in range(num_completions)
        ]
        _, completion_ids, _, _ = self.vllm.generate(ids, None, num_completions)
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        clipped = [
            len(row) >= max_new_tokens and row[-1] != self.processing_class.eos_token_id for row in completion_ids
        ]
        starts = range(0, len(ids), num_completions)
        return Completions(*([part[i : i + num_completions] for i in starts] for part in (texts, clipped)))


def prepare_prompts(dataset: Any, args: Any, processing_class: Any, name: str) -> Any:
    """
    Check a dataset of prompts, and drop those that leave no room for a completion.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`.
        args ([`GRKDConfig`]):
            Configuration.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        name (`str`):
            Name for messages.

    Returns:
        [`~datasets.Dataset`]: The rows that are kept.

    Raises:
        `ValueError`: If a prompt is empty, or none is kept.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("Online groups need a dataset with a length, and got a stream: load it without `streaming`.")
    empty = [index for index, prompt in enumerate(dataset["prompt"]) if not prompt]
    if empty:
        raise ValueError(f"`prompt` of row {empty[0]} is empty: give it text or messages, or drop the row.")
    if args.max_length is None:
        return dataset
    room = args.max_length - args.max_completion_length
    kept = dataset.filter(lambda row: len(encode_prompt(processing_class, row["prompt"])) <= room)
    if len(kept) < len(dataset):
        message = (
            f"{len(dataset) - len(kept)} of {len(dataset)} {name} prompts leave no room for "
            f"`max_completion_length={args.max_completion_length}` within `max_length={args.max_length}`."
        )
        if len(kept) == 0:
            raise ValueError(f"{message} Raise `max_length`, or lower `max_completion_length`.")
        logger.warning(f"{message} They are dropped.")
    return kept
