"""What the methods' configurations share: checks of their fields, and their place in the model card."""

from dataclasses import field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging
from trl import SFTConfig


logger = logging.get_logger(__name__)


def option(default: Any, help: str, **metadata: Any) -> Any:
    """
    Field of a configuration, as a command line shows it.

    Args:
        default (`Any`):
            Default value.
        help (`str`):
            Help text.
        **metadata:
            Further metadata, e.g. `choices`.

    Returns:
        `dataclasses.Field`: The field.
    """
    return field(default=default, metadata={"help": help, **metadata})


def check_choices(args: SFTConfig, config_class: type[SFTConfig]) -> None:
    """
    Check every field of `config_class` that names its choices.

    Args:
        args ([`~trl.SFTConfig`]):
            Configuration.
        config_class (`type`):
            Class whose own fields are checked.

    Raises:
        `ValueError`: If a value is none of the field's choices.
    """
    for own in fields(config_class):
        choices = own.metadata.get("choices")
        if own.name in config_class.__annotations__ and choices and getattr(args, own.name) not in choices:
            raise ValueError(f"`{own.name}` must be one of {choices}, got {getattr(args, own.name)!r}.")


def check_completion_fields(args: SFTConfig) -> None:
    """
    Refuse the fields of [`~trl.SFTConfig`] that train on anything but whole completions.

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
        "loss_type": args.loss_type not in ("nll", "chunked_nll"),
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "dataset_kwargs": "skip_prepare_dataset" in (args.dataset_kwargs or ()),  # a `dict`, or JSON still unread
    }
    names = [f"`{name}`" for name, is_set in refused.items() if is_set]
    if names:
        raise ValueError(
            f"{', '.join(names)} of `SFTConfig` cannot be set in `{type(args).__name__}`, which scores whole "
            "completions. Leave it at its default."
        )


def check_best_metric(args: TrainingArguments) -> None:
    """
    Warn where the best checkpoint would be chosen by a loss whose balance moves: it is another loss at each of them.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with `alpha_start`, `alpha_end` and `alpha_schedule`.
    """
    moves = args.alpha_schedule != "constant" and args.alpha_start != args.alpha_end
    if args.load_best_model_at_end and args.metric_for_best_model in ("loss", "eval_loss") and moves:
        logger.warning(
            "The best checkpoint is chosen by `eval_loss`, which mixes its parts by the alpha of the moment, so each is "
            'measured by another loss. Set `metric_for_best_model` to what is not, such as "eval_loss/soft".'
        )


def add_objective(card: Path, equation: str, args: SFTConfig, config_class: type[SFTConfig]) -> None:
    """
    Add to a model card what was minimised, and by which version of this package: the equation, and the method's own
    fields with their values.

    Args:
        card (`Path`):
            Model card, which exists.
        equation (`str`):
            LaTeX of the loss.
        args ([`~trl.SFTConfig`]):
            Configuration of the run.
        config_class (`type`):
            Class whose own fields are listed.
    """
    rows = "\n".join(f"| `{name}` | `{getattr(args, name)}` |" for name in config_class.__annotations__)
    section = (
        f"\n\n## Objective\n\nMinimised with grkd_trl {version('grkd_trl')}:\n\n$$ {equation} $$\n\n"
        f"| field | value |\n|---|---|\n{rows}\n"
    )
    card.write_text(card.read_text(encoding="utf-8") + section, encoding="utf-8")
