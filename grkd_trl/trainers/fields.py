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
            Further arguments of the command line's option, e.g. `choices`.

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
    Warn of fields that were set although nothing reads them beside another field's value.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration, with `unread_with`: by a field and its value, the fields that nothing reads then.
    """
    for (other, value), names in args.unread_with.items():
        given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(type(args), name)}
        if given and getattr(args, other) == value:
            unread = ", ".join(f"`{name}={its!r}`" for name, its in given.items())
            logger.warning(f"With `{other}={value!r}` nothing reads {unread}.")
