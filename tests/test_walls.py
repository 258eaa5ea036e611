"""The rooms of the package, and who may enter them. Read from the source, so nothing need be imported."""

import ast
import importlib
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "grkd_trl").rglob("*.py"))
# Each room may import those before it, never those after it.
ROOMS = [
    "_trl",
    "losses",
    "scoring",
    "data",
    "teacher",
    "generation",
    "training",
    "trainers",
    "classification",
    "evaluation",
]
SHIMS = ["classifiers.py", "groups.py"]  # former homes, which re-export
METHODS = [
    path
    for path in PACKAGE
    if path.parent.name == "trainers"
    and path.stem != "base"
    and re.search(r"^class \w+Trainer\(", path.read_text(), re.M)
]
LOSSES = sorted((ROOT / "grkd_trl/losses").glob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def imports(path):
    """Imported (module, name) of a file, relative ones made absolute; `import x.y` is ("x.y", "")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def rooms(path):
    """Parts of the package that a file imports from, as `trainers` or `trainers.grkd`."""
    for module, name in imports(path):
        if module.split(".")[0] == "grkd_trl":
            path = ROOT / module.replace(".", "/")
            is_module = (path / f"{name}.py").exists() or (path / name / "__init__.py").exists()
            yield ".".join([*module.split(".")[1:], *([name] if is_module else [])])


class TestImports:
    def test_imports_are_read(self):
        """The helper above sees every form, or the tests below would hold nothing."""
        seen = set(imports(ROOT / "grkd_trl/teacher/local.py"))
        assert {
            ("torch", ""),
            ("grkd_trl.scoring", "score_completions"),
            ("grkd_trl._trl", "get_config_model_id"),
        } <= seen
        assert ("grkd_trl", "_trl") in imports(ROOT / "grkd_trl/trainers/__init__.py")
        assert "_trl" in rooms(ROOT / "grkd_trl/trainers/__init__.py")
        assert "losses" in rooms(ROOT / "grkd_trl/trainers/grkd.py")
        assert "trainers.base" in rooms(ROOT / "grkd_trl/trainers/grkd.py")

    @each(LOSSES)
    def test_losses_import_torch_alone(self, path):
        modules = [module for module, _ in imports(path) if not module.startswith("grkd_trl.losses")]
        assert {module.split(".")[0] for module in modules} <= {"torch", "math", "typing"}

    @each([path for path in PACKAGE if path.name != "_trl.py"])
    def test_inside_of_trl_is_reached_through_one_module(self, path):
        inside = {(module, name) for module, name in imports(path) if module.split(".")[0] == "trl"}
        inside = {(module, name) for module, name in inside if module != "trl" or not name}
        assert not inside, "import it in grkd_trl/_trl.py, with the reason"
        assert not [name for module, name in imports(path) if module == "trl" and name.startswith("_")]

    def test_methods_are_found(self):
        assert {"dpo", "grkd", "kd", "minillm", "pro", "seqkd", "simpo"} <= {path.stem for path in METHODS}

    @each(METHODS)
    def test_methods_never_import_each_other(self, path):
        entered = {room.removeprefix("trainers.") for room in rooms(path) if room.split(".")[0] == "trainers"}
        others = {method.stem for method in METHODS} - {path.stem}
        assert not {room.split("_")[0] for room in entered} & others

    @each([path for path in PACKAGE if path.parent.name != "grkd_trl"])
    def test_a_room_is_entered_from_those_after_it_alone(self, path):
        """Imports inside functions and under TYPE_CHECKING count."""
        own = path.relative_to(ROOT / "grkd_trl").parts[0]
        entered = {room.split(".")[0] for room in rooms(path)}
        assert entered <= {*ROOMS[: ROOMS.index(own) + 1]}

    @each([path for path in PACKAGE if path.parent.name == "grkd_trl" and path.name != "__init__.py"])
    def test_no_file_outside_the_rooms_is_a_back_door(self, path):
        assert path.name in ["_trl.py", *SHIMS]

    @each([path for path in PACKAGE if path.parent.name == "evaluation"])
    def test_evaluation_knows_nothing_of_training(self, path):
        assert not {room.split(".")[0] for room in rooms(path)} & {"trainers", "classification", ""}

    @each([path for path in PACKAGE if path.parent.name != "evaluation"])
    def test_nothing_imports_evaluation(self, path):
        assert "evaluation" not in {room.split(".")[0] for room in rooms(path)}

    @each(EXAMPLES)
    def test_examples_use_what_users_can_import(self, path):
        for module, name in imports(path):
            if module.split(".")[0] in ("grkd_trl", "trl"):
                assert not [part for part in [*module.split("."), name] if part.startswith("_")]
                assert not name or hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}")


class Definition(NamedTuple):
    label: str
    node: ast.AST
    parameters: list[str]
    returns: bool


def definitions():
    """Public functions, classes, and methods that override nothing."""

    def function(path, node, owner=""):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        names = [argument.arg for argument in arguments if argument and argument.arg not in ("self", "cls")]
        is_property = "property" in [ast.unparse(decorator) for decorator in node.decorator_list]
        returns = node.returns is not None and ast.unparse(node.returns) != "None" and not is_property
        return Definition(f"{name_of(path)}:{owner}{node.name}", node, names, returns)

    for path in PACKAGE:
        if path.name.startswith("_") and path.name not in ("__init__.py", "_trl.py"):
            continue  # a private module
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith("_"):
                continue
            if isinstance(node, ast.FunctionDef) and [argument.arg for argument in node.args.args][:1] != ["self"]:
                yield function(path, node)
            elif isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
                made = [function(path, method).parameters for method in methods if method.name == "__init__"]
                parameters = made[0] if made else [name for name in fields if not name.startswith("_")]
                yield Definition(f"{name_of(path)}:{node.name}", node, parameters, False)
                for method in methods:
                    own = not node.bases or "property" in map(ast.unparse, method.decorator_list)
                    if own and not method.name.startswith("_"):
                        yield function(path, method, f"{node.name}.")


class TestDocstrings:
    @pytest.mark.parametrize("definition", list(definitions()), ids=lambda definition: definition.label)
    def test_says_what_it_takes_and_gives(self, definition):
        doc = ast.get_docstring(definition.node) or ""
        assert doc.split("\n")[0].strip(), "a docstring"
        if definition.parameters:
            _, heading, listed = doc.partition("Parameters:" if "Parameters:" in doc else "Args:")
            assert heading, "a section Args"
            names = set(re.findall(r"\w+", listed))
            assert [name for name in definition.parameters if name not in names] == []
        if definition.returns:
            assert "Returns:" in doc or "Yields:" in doc

    def test_finds_them(self):
        labels = [definition.label for definition in definitions()]
        for name in (
            "losses/schedule.py:alpha_at",
            "trainers/metrics.py:RunningMeans.add",
            "data/collator.py:DataCollatorForGroups",
        ):
            assert f"grkd_trl/{name}" in labels
        collator = next(item for item in definitions() if item.label.endswith("DataCollatorForGroups"))
        assert {"pad_token_id", "max_length"} <= set(collator.parameters)


class TestSize:
    @each(PACKAGE)
    def test_a_file_is_read_in_one_sitting(self, path):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350

    @each(PACKAGE)
    def test_a_constructor_is_one_screen(self, path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                assert node.end_lineno - node.lineno + 1 <= 60


def test_top_level_of_the_repository():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    entries = {path.split("/")[0] for path in listed if path and (ROOT / path).exists()}
    required = {"grkd_trl", "examples", "tests", "accelerate_configs", "pyproject.toml", "README.md", "LICENSE"}
    visible = {entry for entry in entries if not entry.startswith(".")}
    assert required <= visible <= required | {"CONTRIBUTING.md", "CHANGELOG.md"}
