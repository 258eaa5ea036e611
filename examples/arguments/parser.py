"""The command line of a script: TRL's parser, with a `--help` that starts with what is the script's own."""

import argparse
import inspect
import re
from collections.abc import Iterable

from trl import TrlParser


_LIBRARIES = ("builtins", "transformers", "trl")
# Of TRL's classes, what nearly every command gives.
_FIRST = ("model_name_or_path", "dataset_name", "output_dir")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--name VALUE`, without the same name written with dashes."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else "VALUE"
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _own_names(dataclass_type: type) -> set[str]:
    """Fields that a dataclass has from this package or the script, and not from a library."""
    own = [base for base in dataclass_type.__mro__ if base.__module__.split(".")[0] not in _LIBRARIES]
    return {name for base in own for name in vars(base).get("__annotations__", {})}


def _documented(dataclass_type: type) -> dict[str, str]:
    """What the docstring says of each field, for those without a help text of their own."""
    text = inspect.getdoc(dataclass_type) or ""
    found = re.findall(r"^ +(\w+) \(`[^\n]*\):\n((?: {8,}[^\n]*\n?)+)", text, flags=re.MULTILINE)
    return {name: " ".join(about.split()) for name, about in found}


class ScriptParser(TrlParser):
    """
    [`~trl.TrlParser`] whose `--help` shows the script's docstring with its commands, then its own arguments, then those of
    the method, and at last those that are inherited. What it accepts is the same.

    Args:
        dataclass_types (`type` or `Iterable[type]`):
            Dataclasses of arguments, the script's own first.
        description (`str`, *optional*):
            The script's docstring.
    """

    def __init__(self, dataclass_types: type | Iterable[type], description: str | None = None):
        types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        usage = "%(prog)s [--config FILE] [--argument VALUE ...]"
        # In a docstring a line that ends in a backslash goes on.
        description = re.sub(r"(?<=\S) {4,}(?=--)", " \\\\\n        ", description or "")
        super().__init__(types, description=description, formatter_class=_Formatter, usage=usage)
        titles = ["the script's own arguments", *(f"arguments of {each.__name__}" for each in types[1:])]
        groups = {}
        for each, title in zip(types, titles, strict=True):
            groups |= {name: title for name in _own_names(each) if name not in groups}
        groups |= dict.fromkeys(_FIRST, titles[0])
        documented = {name: about for each in types for name, about in _documented(each).items()}
        inherited = "arguments inherited from TRL and transformers"
        made = {title: self.add_argument_group(title) for title in [*titles, inherited]}
        for action in list(self._optionals._group_actions):
            if action.dest == "help":
                continue
            about = documented.get(action.dest, "").replace("%", "%%")
            action.help = action.help or about or "default: %(default)s"
            self._optionals._group_actions.remove(action)
            made[groups.get(action.dest, inherited)]._group_actions.append(action)
