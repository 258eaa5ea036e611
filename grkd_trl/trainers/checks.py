"""What a trainer checks of a launch, of a step and of what it logs."""

import math
import os
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..data import bring_scores, bring_soft_labels, first_rows
from ..data.rows import check_pair_agreement
from ..generation.labels import ask_datasets
from ..scoring import refuse_not_finite


logger = logging.get_logger(__name__)


def resolve_bf16(args: TrainingArguments) -> bool:
    """
    Whether to train under bf16 autocast. Where `bf16` is `None`: as fp16, bf16 or fp8 of the launcher or the environment
    says, else where the hardware has it, as TRL does, but in float32 on a CPU. (`accelerate launch` says "no" also where
    nobody chose.)

    Args:
        args ([`~trl.SFTConfig`]):
            Configuration, not initialised yet.

    Returns:
        `bool`: The value of `bf16`.

    Raises:
        `ValueError`: If `bf16` is `False` and the launcher or the environment says bf16.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if args.bf16 is None:
        if args.fp16 or launched not in ("", "no"):
            return not args.fp16 and launched == "bf16"
        return not args.use_cpu and is_torch_bf16_gpu_available()
    if args.bf16 is False and launched == "bf16":
        raise ValueError(
            "`bf16=False` was given, but `accelerate launch` or the environment says ACCELERATE_MIXED_PRECISION=bf16, which "
            "would win. Launch with `--mixed_precision no` (or correct `mixed_precision` in the configuration file), or "
            "leave `bf16` at its default to follow the launcher."
        )
    return args.bf16


def settle_inherited_fields(args: TrainingArguments) -> None:
    """
    Set inherited fields of which libraries warn although a user left them alone: TRL's default of `gradient_checkpointing`,
    which transformers 5.23 calls `activation_checkpointing`, and pinned memory where there is no device to copy to.

    Args:
        args ([`~trl.SFTConfig`]):
            Configuration, not initialised yet.
    """
    if args.activation_checkpointing is None and args.gradient_checkpointing:
        args.activation_checkpointing = True
    if args.use_cpu or not torch.accelerator.is_available():
        args.dataloader_pin_memory = False


def settle_best_metric(args: TrainingArguments) -> None:
    """
    Take a lower value for the better one where checkpoints are compared by a part of a loss, such as `eval_loss/soft`:
    `TrainingArguments` knows a loss by a name that ends with "loss", and would keep the checkpoint with the highest.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration, not initialised yet.
    """
    whole, _, part = (args.metric_for_best_model or "").partition("/")
    if args.greater_is_better is None and part and whole.endswith("loss"):
        args.greater_is_better = False


def settle_noise(args: Any) -> None:
    """
    Read a row per completion where the embeddings get noise. Its size falls with the length of a row, and a row that is
    packed from many completions would get less.

    Args:
        args ([`~trainers.GroupConfig`]):
            Configuration.

    Raises:
        `ValueError`: If prompts are to be shared all the same.
    """
    if args.neftune_noise_alpha is None:
        return
    if args.prompt_sharing == "on":
        raise ValueError(
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` makes noise of a size that depends on the length of a row, and "
            '`prompt_sharing="on"` packs several completions into one. Set `prompt_sharing` to "off", or leave it at "auto".'
        )
    args.prompt_sharing = "off"


def check_launch(args: TrainingArguments) -> None:
    """
    Refuse a launch that asked for more processes than it got, each of which would train alone.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration.

    Raises:
        `ValueError`: If the environment says more processes than `args.world_size`.
    """
    ranks = [
        name
        for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
        if name in os.environ
    ]
    asked = int(os.environ[ranks[0]]) if ranks else None
    # Without MPI `accelerate launch` starts one process on CPUs however many it was asked for, and says so by these alone.
    is_simple_launch = "MASTER_ADDR" in os.environ and "ACCELERATE_DYNAMO_MODE" in os.environ
    if args.world_size == 1 and ((asked or 1) > 1 or (asked is None and is_simple_launch)):
        number = "several" if asked is None else asked
        raise ValueError(
            f"The launch asked for {number} processes, but this process trains alone. On CPUs launch with `torchrun "
            "--nproc_per_node N script.py --use_cpu`, since `accelerate launch` starts one process there; on GPUs leave "
            "`--cpu` and `--use_cpu` out."
        )


def check_finite(losses: dict[str, torch.Tensor] | None = None, **logps: torch.Tensor | None) -> None:
    """
    Refuse log-probabilities and losses that are not finite, in the step in which they appear and before anything is trained on
    them. Logits of -inf are accepted where both models mask a token and the completions' own are possible.

    Args:
        losses (`dict[str, torch.Tensor]`, *optional*):
            Loss of each token, by its name.
        **logps (`torch.Tensor` of shape `(N, L - 1)`, *optional*):
            Log-probability of each token, in nats, by the name of the model that gave them.

    Raises:
        `ValueError`: If a value is NaN or infinite; the message names the model and the rows, or the loss.
    """
    given = {name: values.detach() for name, values in logps.items() if values is not None}
    own = {name: values.detach() for name, values in (losses or {}).items()}
    sums = [values.sum(dtype=torch.float32) for values in (*given.values(), *own.values())]
    if not all(total.isfinite() for total in sums):  # all are summed before the first wait for the device
        for name, values in given.items():
            refuse_not_finite(values, f"The {name}'s logits")
        if names := [name for name, values in own.items() if not values.isfinite().all()]:
            raise ValueError(
                f"Not finite: the loss {', '.join(names)}, of completions that are possible. Student or teacher masks a token (a "
                "logit of -inf) that the other does not: mask both vocabularies alike."
            )


def check_sampling(args: TrainingArguments, train_dataset: Dataset | IterableDataset | None) -> None:
    """
    Refuse an order of the groups that a stream cannot have, or whose steps depend on the number of processes.

    Args:
        args ([`~trl.SFTConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset to train on.

    Raises:
        `ValueError`: If the strategy cannot be followed.
    """
    strategy = args.train_sampling_strategy
    if strategy == "batch_rebalance":
        raise ValueError(
            '`train_sampling_strategy="batch_rebalance"` makes micro-batches of unequal size, whose last step depends on the '
            'number of processes. Use "random", which balances the groups of a step over processes and micro-batches, or '
            '"group_by_length".'
        )
    if strategy == "group_by_length" and getattr(args, "online", False):
        raise ValueError(
            '`train_sampling_strategy="group_by_length"` orders groups that are there, and online groups are written from prompts '
            'in a "random" order, or with "sequential" in that of the dataset. Set one of these.'
        )
    if strategy == "group_by_length" and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            '`train_sampling_strategy="group_by_length"` needs a dataset with a length, and got a stream. Load it without '
            '`streaming`, or use "random", with which a stream keeps its order.'
        )


class GroupWarnings(TrainerCallback):
    """
    Warns once, at the first logging step, of groups from which little can be learned.

    Args:
        num_tokens (`int`, *optional*):
            Size of the vocabulary, where the student writes the groups.
    """

    def __init__(self, num_tokens: int | None = None):
        self.num_tokens, self._done = num_tokens, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._done or "completions/clipped_ratio" not in logs:
            return
        self._done = True
        tied, cut = logs.get("rank/tied_ratio", 0.0), logs["completions/clipped_ratio"]
        if tied > 0:
            logger.warning(
                f"{tied:.0%} of the groups at the first logging step have no two completions of different score, so "
                "nothing can be ranked in them (`rank/tied_ratio`). Sample more varied completions, or check the scorer."
            )
        if cut > 0.5:
            logger.warning(
                f"{cut:.0%} of the completions are cut before their end (`completions/clipped_ratio`), and the student does "
                "not learn to stop from them. Raise `max_completion_length` or `max_length`."
            )
        score = logs.get("scores/student", math.inf)
        random = -math.log(self.num_tokens) if self.num_tokens else -math.inf  # of a model that knows nothing
        if score < 0.9 * random:
            logger.warning(
                f"The student's own completions have {score:.1f} nats per token, and a uniform choice among its tokens "
                f"{random:.1f}: it writes nearly at random. Start from a trained student, or check its weights "
                "and chat template."
            )


def complete_labels(
    args: Any,
    teacher: Any,
    processing_class: Any,
    dataset: Any,
    name: str,
    *,
    labelled: bool,
    scored: bool = True,
    min_completions: int = 2,
) -> Any:
    """
    Groups that come after the trainer was made, to evaluate on: what they lack is asked of the teacher that was asked for the
    others.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The method's configuration.
        teacher ([`~teacher.Scorer`], *optional*):
            Teacher that was asked.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups.
        name (`str`):
            Name for messages.
        labelled (`bool`):
            Whether the loss reads soft labels.
        scored (`bool`, *optional*, defaults to `True`):
            Whether the loss reads scores.
        min_completions (`int`, *optional*, defaults to `2`):
            Fewest completions of a group.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The groups with scores, and with soft labels where these are read.

    Raises:
        `ValueError`: If they lack one and there is no such teacher.
    """
    if teacher is not None:
        soft_labels = args.soft_label_top_k if labelled else None
        given: dict[str, Any] = {"soft_labels": soft_labels, "min_completions": min_completions}
        (dataset,) = ask_datasets(args, None, teacher, processing_class, dataset, **given)
    if not any({"completions", "chosen", "completion_ids"}.intersection(row) for row in first_rows(dataset)):
        return dataset  # no groups, which is said where they are read
    has_text = any({"completions", "chosen"}.intersection(row) for row in first_rows(dataset))
    lacking = {
        "soft labels (`teacher_top_ids`)": labelled and not bring_soft_labels(dataset),
        "`teacher_scores`": scored and not bring_scores(dataset),
    }
    for what, lacks in lacking.items():
        if lacks:
            if not has_text:
                raise ValueError(
                    f"The {name} groups are token ids without {what}, and a teacher is asked about text. Add the column, or give "
                    "`prompt` and `completions` in place of `prompt_ids` and `completion_ids`."
                )
            raise ValueError(
                f"The {name} groups have no {what}, and the trainer was made without a teacher that gives them. Pass it "
                "`teacher_model`, or make them beforehand (`grkd_trl.teacher.cache_soft_labels`, `score_groups`)."
            )
    return dataset


def require_pair_agreement(dataset: Any, name: str) -> None:
    """
    Refuse groups with `teacher_scores` that do not say how far the teachers agree on their pairs, or groups of token ids that say
    it in another form; those of text are checked where they are tokenized.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups, of which a stream is judged by its first row; the others are checked in the step.
        name (`str`):
            Name for messages.

    Raises:
        `ValueError`: If a row has no `teacher_pair_agreement`, or not a share for each pair; the message names the first.
    """
    first = next(iter(first_rows(dataset)), {})
    if first.get("teacher_scores") is None:
        return  # the training step scores them
    if isinstance(dataset, Dataset) and "teacher_pair_agreement" in first:
        known = [shares is not None for shares in dataset["teacher_pair_agreement"]]
        if "completions" not in first:
            columns = dataset["teacher_pair_agreement"], dataset["completion_ids"]
            for index, (shares, completions) in enumerate(zip(*columns, strict=True)):
                check_pair_agreement(shares, len(completions), index)
    else:
        known = [first.get("teacher_pair_agreement") is not None]
    if not all(known):
        raise ValueError(
            f"Row {known.index(False)} of the {name} groups has `teacher_scores` and no `teacher_pair_agreement`, which "
            '`pair_weights="agreement"` and `min_pair_agreement` read. Several teachers give it with their scores '
            "(`grkd_trl.teacher.TeacherEnsemble`): pass them as `teacher_model` and drop the column `teacher_scores`, or make the "
            "groups with `grkd_trl.generation.generate_groups`."
        )


def refuse_cut_prompts(dataset: Any, args: Any, name: str) -> None:
    """
    Refuse to cut the start of rows that a teacher was asked about, which read them whole; one in the training step reads what the
    student does.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenized groups, with their `length`. A stream brings what it has, and no teacher was asked about it.
        args ([`~trainers.GroupConfig`]):
            Configuration.
        name (`str`):
            Name for messages.

    Raises:
        `ValueError`: If `truncation_mode` is `"keep_end"` and a row exceeds `max_length`.
    """
    if args.truncation_mode != "keep_end" or args.max_length is None:
        return
    if not isinstance(dataset, Dataset) or "length" not in dataset.column_names:
        return
    for index, length in enumerate(dataset["length"]):
        if length > args.max_length:
            raise ValueError(
                f'Row {index} of the {name} groups has {length} tokens, and `truncation_mode="keep_end"` cuts its start to '
                f"`max_length={args.max_length}`, which the teacher that was asked has read. Shorten the prompt, raise "
                '`max_length`, or set `truncation_mode="keep_start"`.'
            )
