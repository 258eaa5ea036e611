"""
`--help` of a script in a second: a script that imports this module first answers it before its other imports.

Importing [`~transformers.TrainingArguments`] takes five seconds, nearly all of them for torch, which transformers can do
without. Torch therefore counts as not installed here, and the classes of arguments of this package, whose modules import
torch, are made from their source: fields and docstrings. A test compares the text with that of the real classes.
"""

import ast
import builtins
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version


_EXAMPLES = Path(__file__).resolve().parents[1]
_WITH_IMPORTS = "GRKD_HELP_WITH_IMPORTS"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if` too: imports for a type checker."""
    for node in body:
        yield node
        yield from _statements(getattr(node, "body", []) if isinstance(node, ast.If) else [])


def _file(importer: Path, node: ast.ImportFrom) -> Path | None:
    """File of the module that a statement imports from, or `None` for a library's."""
    names = node.module.split(".") if node.module else []
    if node.level:
        folder = importer.parents[node.level - 1]
    elif names[0] == "grkd_trl":
        examples = names[1:2] == ["examples"]
        folder = _EXAMPLES if examples else Path(import_module("grkd_trl").__path__[0])
        names = names[1 + examples :]
    else:
        return None
    path = folder.joinpath(*names)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _read(file: Path, name: str) -> Any:
    """
    A name of a module that is not imported: a function, a constant, a class with its fields and docstring alone, or a
    dictionary with its keys alone.
    """
    for node in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
        for alias in node.names if isinstance(node, ast.ImportFrom) else []:
            if name == (alias.asname or alias.name):
                source = _file(file, node)
                return _read(source, alias.name) if source else getattr(import_module(node.module), alias.name)
        if isinstance(node, ast.Assign) and name in [getattr(target, "id", None) for target in node.targets]:
            if isinstance(node.value, ast.Dict):
                return dict.fromkeys(ast.literal_eval(key) for key in node.value.keys)
            return ast.literal_eval(node.value)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            if isinstance(node, ast.ClassDef):
                node.body = [part for part in node.body if isinstance(part, ast.AnnAssign | ast.Expr)]
            parts = list(ast.walk(node))
            read = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
            read -= {part.arg for part in parts if isinstance(part, ast.arg)}
            namespace = {"__name__": "grkd_trl"} | {each: _read(file, each) for each in read}
            exec(compile(ast.Module([node], []), str(file), "exec"), namespace)
            return namespace[name]
    return getattr(builtins, name)


def help_of(script: Path) -> str:
    """
    What `--help` prints for a script of this folder, in a process that has not imported torch and will not.

    Args:
        script (`Path`):
            The script, which makes one [`ScriptParser`].

    Returns:
        `str`: The text.
    """
    sys.modules["torch"] = None
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is missing
    from transformers import TrainingArguments

    from .parser import ScriptParser

    if Version(version("torch")) >= Version("2.8"):  # as transformers chooses its default
        TrainingArguments.__dataclass_fields__["optim"].default = "adamw_torch_fused"
    tree = ast.parse(script.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (types,) = [call.args[0] for call in calls if getattr(call.func, "id", None) == "ScriptParser"]
    names = [each.id for each in getattr(types, "elts", [types])]
    return ScriptParser([_read(script, name) for name in names], ast.get_docstring(tree, clean=False)).format_help()


def _answer() -> None:
    """Print the help and exit, where the process runs a script of this folder with `--help` alone."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    asked = sys.argv[1:] in (["--help"], ["-h"]) and script.parent == _EXAMPLES
    if not asked or "torch" in sys.modules or _WITH_IMPORTS in os.environ:
        return
    try:
        print(help_of(script), end="")
    except Exception:  # a library that differs from those known: by the real classes, in a process that has torch
        command = [sys.executable, *sys.orig_argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {_WITH_IMPORTS: "1"}, check=False).returncode)
    sys.exit()


_answer()
