"""What the methods' configurations share."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from .._trl import get_config_model_id
from ..losses import alpha_at, probability_weights
from ..teacher.loading import read_chat_template
from .checks import check_launch, resolve_bf16, settle_best_metric, settle_inherited_fields, settle_noise
from .fields import check_choices, option, warn_of_unread


logger = logging.get_logger(__name__)
ConfigT = TypeVar("ConfigT", bound=TrainingArguments)


def check_completion_fields(args: SFTConfig) -> None:
    """
    Refuse the fields of [`~trl.SFTConfig`] that train on anything but whole completions, or that nothing here reads.

    Args:
        args ([`~trl.SFTConfig`]):
            Configuration.

    Raises:
        `ValueError`: If one is set.
    """
    refused = {
        "packing": args.packing,
        "padding_free": args.padding_free,
        "assistant_only_loss": args.assistant_only_loss,
        "completion_only_loss": args.completion_only_loss is False,
        "loss_type": args.loss_type not in (None, "nll", "chunked_nll"),  # `None` is the default of TRL before 1.15
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "eval_packing": args.eval_packing is not None,
        "dataset_text_field": args.dataset_text_field != "text",
        "dataset_kwargs": args.dataset_kwargs not in (None, {}, "{}"),  # a `dict`, or JSON still unread
    }
    names = [f"`{name}`" for name, is_set in refused.items() if is_set]
    if names:
        raise ValueError(
            f"{', '.join(names)} of `SFTConfig` cannot be set in `{type(args).__name__}`, which scores whole "
            "completions. Leave it at its default."
        )


def check_chat_template(args: Any, annotates: bool) -> None:
    """
    Check a chat template for the teacher.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with `teacher_chat_template`.
        annotates (`bool`):
            Whether the method has a teacher that reads groups with a tokenizer of its own.

    Raises:
        `ValueError`: If it is neither a template nor a file, or nothing would read it.
    """
    if args.teacher_chat_template is None:
        return
    if not annotates:
        raise ValueError(
            f"`teacher_chat_template` cannot be set in `{type(args).__name__}`: this teacher reads the student's tokens. "
            "Set `chat_template_path`, which is the template of both."
        )
    read_chat_template(args.teacher_chat_template)


def check_aligned(args: Any, aligned: bool) -> None:
    """
    Check the least share of aligned positions.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with `min_aligned`.
        aligned (`bool`):
            Whether soft labels are aligned.

    Raises:
        `ValueError`: If it is no share, or nothing would read it.
    """
    if not 0 < args.min_aligned <= 1:
        raise ValueError(f"`min_aligned` is a share and must lie above 0 and up to 1, got {args.min_aligned}.")
    if not aligned and args.min_aligned != type(args).min_aligned:
        raise ValueError(f'`min_aligned={args.min_aligned}` is for soft labels across tokenizers (`"aligned"`).')


def check_top_k(args: Any, *, whole: bool) -> None:
    """
    Check the number of most likely tokens.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with `soft_label_top_k`.
        whole (`bool`):
            Whether a loss reads whole distributions, which `None` asks several teachers for.

    Raises:
        `ValueError`: If it is below 1, or `None` and nothing would read it.
    """
    if args.soft_label_top_k is None:
        if not whole:
            raise ValueError(
                "`soft_label_top_k=None` is for token soft labels of several teachers, and this loss has none. Leave it out."
            )
    elif args.soft_label_top_k < 1:
        raise ValueError(f"`soft_label_top_k` must be 1 or above, or `None`, got {args.soft_label_top_k}.")


def check_best_metric(args: Any) -> None:
    """
    Warn where the best checkpoint would be chosen by a loss whose balance moves, so that each is measured by a different loss.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with `alpha_start`, `alpha_end` and `alpha_schedule`.
    """
    moves = args.alpha_schedule != "constant" and args.alpha_start != args.alpha_end
    if args.load_best_model_at_end and args.metric_for_best_model in ("loss", "eval_loss") and moves:
        logger.warning(
            "The best checkpoint is chosen by `eval_loss`, which is mixed by the current alpha, so each checkpoint is measured "
            'by a different loss. Set `metric_for_best_model` to a metric that does not move, such as "eval_loss/soft".'
        )


def current_alpha(args: Any, state: TrainerState) -> float:
    """
    Share of the relative loss at this point of a run, by the optimizer steps done.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with `alpha_start`, `alpha_end` and `alpha_schedule`.
        state ([`~transformers.TrainerState`]):
            State of the run.

    Returns:
        `float`: 0 to 1.
    """
    progress = state.global_step / max(state.max_steps, 1)
    return alpha_at(progress, start=args.alpha_start, end=args.alpha_end, schedule=args.alpha_schedule)


@dataclass
class GroupConfig(SFTConfig):
    r"""
    Base class of the configurations of methods that train on groups.

    Only the parameters that [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`] lack, or give another default, are
    listed.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Initial learning rate, as in [`~trl.DPOConfig`].
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path: `dtype`
            (float32 by default), `attn_implementation`, `quantization_config` and others. Those that locate files, such as
            `revision`, are also passed to its tokenizer. `trust_remote_code` defaults to the student's.
        teacher_chat_template (`str`, *optional*):
            Chat template, as text or as the path of a file, that replaces the one of the teacher's tokenizer. Only for a
            teacher that reads the groups with its own tokenizer, before training or for aligned soft labels; refused otherwise.
        teacher_sharding (`str`, *optional*, defaults to `"auto"`):
            How the parameters of a teacher in the training step are placed on several processes: `"replicated"`, a full copy on
            each; `"sharded"`, sharded and gathered layer by layer; `"auto"`, sharded if the student is (ZeRO-3, FSDP).
        bf16 (`bool`, *optional*):
            Whether to train under bf16 autocast. If not given, as the launcher or the environment says, otherwise if the
            hardware supports it; a CPU trains in float32. `False` is refused if the launcher says bf16.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the student. The teacher never has any.
        prompt_sharing (`str`, *optional*, defaults to `"auto"`):
            Whether student and teacher encode each prompt once for all its completions, without padding: `"auto"` (if it is
            faster), `"on"` or `"off"`, see [`~scoring.score_completions`]. The loss is the same. With
            `neftune_noise_alpha`, whose noise depends on the length of a row, it is off.

    > [!NOTE]
    > Fields of [`~trl.SFTConfig`] that would train on anything but whole completions (`packing`, `padding_free`,
    > `assistant_only_loss`, `completion_only_loss=False`, `loss_type`, `label_smoothing_factor`), and those that only
    > `SFTTrainer` reads (`eval_packing`, `dataset_text_field`, `dataset_kwargs`), are refused.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    # Whether the teacher scores or writes the groups before training, with its own tokenizer.
    annotates = False
    # A field and its value, and the fields that nothing reads then.
    unread_with = dict[tuple[str, Any], list[str]]()

    @property
    def aligned(self) -> bool:
        """Whether the teacher of the training step reads groups with its own tokenizer, aligned with the student's."""
        return False

    learning_rate: float = option(1e-6, "The initial learning rate for AdamW.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, such as `dtype`, which is float32 by default."
    )
    teacher_chat_template: str | None = option(
        None, "Chat template, text or path, of a teacher that reads the groups with its own tokenizer."
    )
    teacher_sharding: str = option(
        "auto",
        "Teacher on several processes: 'replicated', 'sharded', or 'auto', sharded where the student is.",
        choices=["auto", "replicated", "sharded"],
    )
    disable_dropout: bool = option(True, "Whether to disable dropout in the student.")
    prompt_sharing: str = option(
        "auto",
        "Whether each prompt is encoded once for all its completions: 'auto' (where it is faster), 'on' or 'off'.",
        choices=["auto", "on", "off"],
    )

    def __post_init__(self):
        check_choices(self)
        warn_of_unread(self)
        check_completion_fields(self)
        check_chat_template(self, self.annotates or self.aligned)
        self.bf16 = resolve_bf16(self)
        settle_inherited_fields(self)
        settle_best_metric(self)
        settle_noise(self)
        super().__post_init__()


def resolve_args(
    args: Any | None,
    config_class: type[ConfigT],
    model: str | PreTrainedModel | PeftModel,
    teacher_model: Any | None = None,
) -> ConfigT:
    """
    The configuration given, or a default one that writes to `<model>-<method>`.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            Configuration that was given.
        config_class (`type`):
            The method's own, named `<method>Config`.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, which names the default output folder.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.

    Returns:
        [`~transformers.TrainingArguments`]: An instance of `config_class`.

    Raises:
        `TypeError`: If `args` is of another class, or given in the place of the teacher.
        `ValueError`: If the launch asked for more processes than it got.
    """
    if isinstance(teacher_model, TrainingArguments):
        raise TypeError(
            f"`teacher_model` is a `{type(teacher_model).__name__}`: it is the second argument here. Pass the configuration "
            "by keyword, `args=`."
        )
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{config_class.__name__.removesuffix('Config')}")
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a `{config_class.__name__}`, got `{type(args).__name__}`.")
    check_launch(args)
    return args


def ranking_options(args: Any, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """
    Options of the relative loss, from the fields that GRKD's configurations share.

    Args:
        args (`GRKDConfig` or `GRKDForClassificationConfig`):
            Configuration.
        teacher (`torch.Tensor` of shape `(..., G)`):
            Teacher's scores or logits.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a member is present.

    Returns:
        `dict[str, Any]`: Keyword arguments of [`~losses.group_relative_loss`] and [`~losses.token_relative_loss`].
    """
    return {
        "temperature": args.ranking_temperature,
        "target_temperature": args.target_temperature,
        "weights": probability_weights(teacher, mask=mask) if args.pair_weights == "probability" else None,
        "min_gap": args.min_gap,
        "standardize": args.standardize,
    }
