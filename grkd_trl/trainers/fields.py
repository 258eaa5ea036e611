"""How a configuration declares its fields."""

from dataclasses import field, fields, is_dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging


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
            Further metadata: `choices`, its values; `unread_where`, values of other fields, by name, with which nothing
            reads it.

    Returns:
        `dataclasses.Field`: The field.
    """
    return field(default=default, metadata={"help": help, **metadata})


def own_fields(config_class: type[TrainingArguments]) -> list[str]:
    """
    Fields that a configuration of this package adds to a library's, or gives another default.

    Args:
        config_class (`type`):
            Configuration class.

    Returns:
        `list[str]`: Their names.
    """
    bases = [
        base for base in config_class.__mro__ if is_dataclass(base) and not base.__module__.startswith("grkd_trl.")
    ]
    given = bases[0].__dataclass_fields__ if bases else {}
    return [own.name for own in fields(config_class) if given.get(own.name) is not own]


def check_choices(args: Any) -> None:
    """
    Check every own field of a configuration that names its choices.

    Args:
        args ([`~transformers.TrainingArguments`] or [`~generation.GroupsConfig`]):
            Configuration.

    Raises:
        `ValueError`: If a value is none of the field's choices.
    """
    for name in own_fields(type(args)):
        choices = args.__dataclass_fields__[name].metadata.get("choices")
        if choices and getattr(args, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(args, name)!r}.")


def warn_of_unread(args: Any) -> None:
    """
    Warn of fields that were set although another field has a value with which nothing reads them.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration.
    """
    unread: dict[str, list[str]] = {}
    for name in own_fields(type(args)):
        own = args.__dataclass_fields__[name]
        for other, values in own.metadata.get("unread_where", {}).items():
            if getattr(args, name) != own.default and getattr(args, other) in values:
                why = f"`{other}={getattr(args, other)!r}`"
                unread.setdefault(why, []).append(f"`{name}={getattr(args, name)!r}`")
    for why, names in unread.items():
        logger.warning(f"With {why} nothing reads {', '.join(names)}.")
