"""Groups made while training: the current student and the teacher write, the teacher scores."""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from transformers.utils import logging
from transformers.utils.import_utils import is_rich_available

from .. import _trl
from .._trl import unwrap_model_for_generation
from ..data import DataCollatorForGroups, first_groups, tokenizer_hash
from ..data.sampler import RepeatedPrompts, indices_of_process
from ..teacher import Completions, LocalTeacher, Scorer, TeacherEnsemble, TopKTeacher
from ..teacher.topk import require_same_tokenizer
from .ahead import LabelsAhead
from .checks import as_scorer
from .core import add_scores, as_groups, columns_of, content_seed, write_groups
from .table import log_completions
from .tokens import tokenize_group
from .vllm import VLLMWriter


logger = logging.get_logger(__name__)


class OnlineGroups:
    """
    Turns the prompts of a training step into its groups.

    Every `generate_every` optimizer steps the current student writes groups for all prompts of these steps at once;
    `reuse_groups` is the number of times they are trained on.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer with a [`GRKDConfig`], its models placed.
        collator ([`~data.DataCollatorForGroups`]):
            Collator of groups.
        completion_fn (`Callable`, *optional*):
            Writes in place of student and teacher, see [`GRKDTrainer`].
        score_fn (`Callable` or [`~teacher.Scorer`], *optional*):
            Scores in place of the teacher, see [`GRKDTrainer`].
        labeller ([`~teacher.TopKTeacher`], *optional*):
            Gives the token soft labels, where no teacher is in the training step.
    """

    def __init__(
        self,
        trainer: Any,
        collator: DataCollatorForGroups,
        completion_fn: Callable | None = None,
        score_fn: Callable | Scorer | None = None,
        labeller: TopKTeacher | None = None,
    ):
        self.trainer, self.collator = trainer, collator
        self.completion_fn, self.scorer = completion_fn, None if score_fn is None else as_scorer(score_fn)
        self._labels: dict[str, Any] = {}
        if labeller is not None:
            require_same_tokenizer(labeller, trainer.processing_class)
            self._labels = {"teacher": labeller, "k": trainer.args.soft_label_top_k}
        self._min_agreement = 0.0
        if isinstance(self.scorer, TeacherEnsemble) and self.scorer.min_agreement > 0:
            self._min_agreement = self.scorer.min_agreement
            self.scorer = copy.copy(self.scorer)
            self.scorer.min_agreement = 0.0  # groups are dropped from the batch, which must have a row
            self._labels |= {"teacher": self.scorer} if labeller is not None and labeller is score_fn else {}
        self._buffer: list[dict[str, Any]] = []
        self._rest: Iterator[list[dict[str, Any]]] = iter(())  # of the round, labelled while training goes on
        self._ahead: LabelsAhead | None = None
        if self.scorer is not None and trainer.args.generate_every > 1:
            ahead = LabelsAhead(self.scorer, **self._labels)
            self._ahead = ahead if ahead.is_possible else None
        self._training_since: float | None = None
        args = trainer.args
        if "completion_ids" in (getattr(trainer.train_dataset, "column_names", None) or ()):
            raise ValueError(
                f'`train_dataset` has completions, and `completion_source="{args.completion_source}"` writes others. Set '
                '`completion_source="dataset"` to train on those that are there, or give the prompts alone.'
            )
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
        Collate groups; leave prompts uncollated.

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
        indices = [index for process in range(args.world_size) for index in self._indices(process)]
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = args.train_sampling_strategy != "sequential"
        if not shuffle and len(dataset) % size:
            logger.warning(
                f'The last {len(dataset) % size} of {len(dataset)} prompts are never trained on: in a "sequential" order every epoch '
                f'ends with the last {size} that groups can be made for at once. In a "random" one each epoch leaves out others.'
            )
        return RepeatedPrompts(len(dataset), size, repeat_count, seed, indices, shuffle=shuffle)

    def _indices(self, process: int) -> list[int]:
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
            indices = self._indices(trainer.accelerator.process_index)
            round_ = step // (args.generate_every * args.reuse_groups)
            self._buffer, self._rest = [], self._make(chunks[0], round_, indices, "train")
        size = args.per_device_train_batch_size
        first = step % args.generate_every * num_batches
        while len(self._buffer) < (first + len(chunks)) * size:
            self._buffer += next(self._rest)
        groups = [self._buffer[i * size : (i + 1) * size] for i in range(first, first + len(chunks))]
        self._training_since = time.perf_counter()
        return iter([self._to_device(self._collate_agreed(part)) for part in groups])

    def _collate_agreed(self, groups: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch of the groups on which several teachers agree enough, see [`~data.collator.first_groups`] for none."""
        if self._min_agreement == 0:
            return self.collator(groups)
        kept = [group for group in groups if not group["teacher_agreement"] < self._min_agreement]
        num_dropped = torch.tensor(len(groups) - len(kept))
        self.trainer.running_means["train"].add("rank/dropped_ratio", num_dropped, len(groups))
        return self.collator(kept) if kept else first_groups(self.collator(groups), 0)

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
        offsets = [content_seed(row["prompt"]) for row in rows]
        (groups,) = self._make(rows, 0, offsets, "eval")
        return self._to_device(self.collator(groups))

    def close(self) -> None:
        """Stop asking for labels, and drop the groups: the next run may resume in the middle of another round."""
        if self._ahead is not None:
            self._ahead.close()
        self._buffer = []

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return send_to_device(batch, self.trainer.accelerator.device)

    def _make(
        self, rows: list[dict[str, Any]], round_: int, offsets: list[int], split: str
    ) -> Iterator[list[dict[str, Any]]]:
        """Write, score and tokenize the groups of some prompts: all at once, or step by step as their labels arrive."""
        trainer, args, means = self.trainer, self.trainer.args, self.trainer.running_means[split]
        start = time.perf_counter()
        groups = self._write(rows, round_, offsets)
        means.add("time/generation", torch.tensor(time.perf_counter() - start))
        texts = [group["completions"] for group in groups]
        repeated = [len(group) - len(set(group)) for group in texts]
        means.add("completions/duplicate_ratio", torch.tensor(repeated), sum(map(len, texts)))

        if self._ahead is not None and split == "train":
            num_steps, size = 1, len(groups) // args.generate_every
            scored = self._ahead.add_scores([groups[i : i + size] for i in range(0, len(groups), size)])
        else:
            num_steps, scored = args.generate_every, self._score(groups)
        start, index = time.perf_counter(), 0
        for part in scored:
            if self.scorer is not None or not args.needs_teacher_logits:
                means.add("time/scoring", torch.tensor(time.perf_counter() - start))
            tokenized = self._tokenize(part, index)
            every, step = args.log_completions, trainer.state.global_step
            if split == "train" and every and step % every < num_steps and trainer.accelerator.is_main_process:
                log_completions(trainer, part)
            yield tokenized
            start, index = time.perf_counter(), index + len(part)

    def _tokenize(self, groups: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
        """Tokenize the groups of this process. What one process refuses all refuse, which else would wait for it."""
        tokenized, error = [], None
        try:
            tokenized = [tokenize_group(self.trainer, group, index) for index, group in enumerate(groups, start=first)]
        except ValueError as own:
            error = own
        if self.trainer.accelerator.num_processes > 1:
            said = gather_object([error and str(error)])
            process = next((index for index, text in enumerate(said) if text), None)
            if process is not None:
                raise ValueError(f"Process {process}: {said[process]}") from error
        elif error is not None:
            raise error
        return tokenized

    def _score(self, groups: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        if self.scorer is not None:
            yield add_scores(groups, self.scorer, **self._labels)
        elif self.trainer.args.needs_teacher_logits:
            yield groups  # the training step's own forward of the teacher scores them
        else:
            size, scored = self.trainer.args.per_device_train_batch_size, []
            with self._teacher() as teacher:
                for first in range(0, len(groups), size):
                    scored += add_scores(groups[first : first + size], teacher)
            yield scored

    def _write(self, rows: list[dict[str, Any]], index: int, offsets: list[int]) -> list[dict[str, Any]]:
        args = self.trainer.args
        if self.completion_fn is not None:
            groups = as_groups(rows, {"completion_fn": self._ask_completion_fn(rows)})
        else:
            shares = {"student": 0, "teacher": args.num_completions}
            by_teacher = shares.get(args.completion_source, args.num_teacher_completions)
            writers = {"teacher": (self._teacher, by_teacher)}
            writers["student"] = (self._student, args.num_completions - by_teacher)
            groups = write_groups(
                rows,
                {name: (opened, num) for name, (opened, num) in writers.items() if num > 0},
                seed=args.seed,
                index=index,
                max_new_tokens=args.max_completion_length,
                temperature=args.temperature,
                top_p=args.top_p,
                offsets=offsets,
            )
        own = tokenizer_hash(self.trainer.processing_class)
        for group in groups:
            if len(group["completions"]) < args.num_completions:
                raise ValueError(
                    f"The prompt {group['prompt']!r} leaves no room for `max_completion_length="
                    f"{args.max_completion_length}` in the context of a model that writes: drop or shorten it."
                )
            # Without ids of its own the student has no token of a cut completion without text to train on but its end.
            read = group["completion_ids"] if group["tokenizer_hash"] == own else None
            ids = read or [None] * len(group["completions"])
            triples = zip(group["clipped"], group["completions"], ids, strict=True)
            group["clipped"] = [cut and (bool(text) or tokens is not None) for cut, text, tokens in triples]
        return groups

    def _ask_completion_fn(self, rows: list[dict[str, Any]]) -> Completions:
        num_completions, prompts = self.trainer.args.num_completions, [row["prompt"] for row in rows]
        columns = columns_of(rows, without=["prompt"])
        assert self.completion_fn is not None
        written = self.completion_fn(prompts=prompts, num_completions=num_completions, **columns)
        if not isinstance(written, Completions):
            written = Completions(written, [[False] * len(group) for group in written])
        if [len(group) for group in written.texts] != [num_completions] * len(prompts):
            raise ValueError(
                f"`completion_fn` returned groups of {[len(group) for group in written.texts]} completions for "
                f"{len(prompts)} prompts, and `num_completions={num_completions}`."
            )
        return written

    @contextmanager
    def _student(self) -> Iterator[Any]:
        trainer = self.trainer
        if self.vllm is not None:
            self.vllm.sync_weights()
            yield VLLMWriter(self.vllm, trainer.model, trainer.processing_class)
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
                tokenizer = trainer.teacher_tokenizer or trainer.processing_class
                yield LocalTeacher(teacher, tokenizer, score=trainer.args.score, tokens_per_batch=sys.maxsize)
