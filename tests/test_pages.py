"""
README, guides and the list of scripts: their commands and snippets run as they stand, with tiny models in place of the named.

A block runs unless a comment says before it why not, `<!-- not run: needs a GPU -->`; `<!-- slow -->` leaves it to the slow
tests. Blocks of a page run in order, in a folder of the page's own.
"""

import ast
import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import load_dataset
from teacher_server import serve
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig

import grkd_trl
from grkd_trl.data import read_group


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", EXAMPLES / "README.md", *sorted((EXAMPLES / "guides").glob("*.md"))]
LINKED = [*PAGES, *sorted((EXAMPLES / "recipes").rglob("*.md")), *sorted((EXAMPLES / "results").rglob("*.md"))]
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if not path.name.startswith("_"))
MODELS = ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"]
MODELS += [f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("135M", "360M")]
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    page: Path
    number: int
    language: str
    code: str
    comment: str

    @property
    def runs(self):
        return not self.comment.startswith("not run: ")


def blocks_of(page):
    return [
        Block(page, number, found["language"], found["code"], found["comment"] or "")
        for number, found in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")))
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def each(blocks):
    def parameter(block):
        marks = [pytest.mark.slow] if block.comment == "slow" else []
        return pytest.param(block, id=f"{name_of(block.page)}-{block.number}", marks=marks)

    return pytest.mark.parametrize("block", [parameter(block) for block in blocks])


def commands_of(block):
    """Words of each command, without texts between `<<'END'` and `END`."""
    code = re.sub(r" <<'END'\n.*?^END$", "", block.code, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    words = [shlex.split(part, comments=True) for line in code.splitlines() for part in line.split(" && ")]
    return [command for command in words if command]


@functools.cache
def help_of(script):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code
    return printed.getvalue()


@each([block for block in BLOCKS if block.language == "bash"])
def test_commands_name_scripts_files_and_arguments_that_exist(block):
    for command in commands_of(block):
        scripts = [word for word in command if re.fullmatch(r"examples/.*\.py", word)]
        for word in command:
            if word.startswith(("examples/", "accelerate_configs/", "tests/")):
                assert (ROOT / word).exists(), word
        if scripts:
            given = command[command.index(scripts[0]) + 1 :]
            known = {
                "--help",
                "--config",
                *re.findall(r"--\w+", help_of(scripts[0])),
            }  # TrlParser does not list `--config`
            assert {word for word in given if word.startswith("--")} <= known, scripts[0]


@each([block for block in BLOCKS if block.language == "python"])
def test_snippets_are_python(block):
    ast.parse(block.code)


@each([block for block in BLOCKS if block.language == "json"])
def test_rows_are_groups(block):
    for index, line in enumerate(block.code.splitlines()):
        read_group(json.loads(line), index)


def test_every_block_is_of_a_known_kind():
    assert {block.language for block in BLOCKS} == {"python", "bash", "json", "bibtex"}
    assert {block.comment.split(":")[0] for block in BLOCKS} == {"", "not run", "slow"}
    for page in PAGES:  # no block is missed
        assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks_of(page))


class Place:
    """A folder for each page with the models that it names, and what its blocks have defined."""

    def __init__(self, folder):
        self.folder, self.names, self.done = folder, {page: {} for page in PAGES}, set()
        for model in MODELS:
            path = folder / "models" / model
            tokenizer = byte_tokenizer()
            tokenizer.chat_template = TEMPLATE
            size = {"initializer_range": 0.3, "max_position_embeddings": 4096}
            tiny_model("llama", len(tokenizer), seed=MODELS.index(model), **size).save_pretrained(path)
            tokenizer.save_pretrained(path)
        path = folder / "models" / MODELS[1]
        self.teacher = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def enter(self, page):
        folder = self.folder / name_of(page).replace("/", "-")
        if not folder.exists():
            folder.mkdir()
            for name in ("examples", "accelerate_configs", "tests"):
                (folder / name).symlink_to(ROOT / name)
            for owner in {model.split("/")[0] for model in MODELS}:
                (folder / owner).symlink_to(self.folder / "models" / owner)
        return folder

    def run(self, block):
        """Run the blocks before it, and it, each once."""
        for other in blocks_of(block.page)[: block.number + 1]:
            is_due = other.number == block.number or other.comment != "slow"
            if other.runs and is_due and (other.page, other.number) not in self.done:
                self.done.add((other.page, other.number))
                with pytest.MonkeyPatch.context() as patch:
                    patch.chdir(self.enter(other.page))
                    self.run_bash(other) if other.language == "bash" else self.run_python(other)

    def run_python(self, block):
        if block.language != "python":
            return
        with contextlib.ExitStack() as stack:
            code = block.code
            if "http://localhost:8000/v1" in code:
                code = code.replace("http://localhost:8000/v1", stack.enter_context(serve(*self.teacher)).url)
            exec(compile(code, name_of(block.page), "exec"), self.names[block.page])

    def run_bash(self, block):
        is_simple = all(command[0] == "python" for command in commands_of(block))
        if not is_simple:
            env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(["bash", "-euc", block.code], capture_output=True, text=True, env=env, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
            return
        for _, script, *arguments in commands_of(block):  # in this process, which has imported all it needs
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [script, *arguments])
                runpy.run_path(script, run_name="__main__")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("pages"))


@pytest.fixture(autouse=True)
def trl_on_a_cpu(monkeypatch):
    """TRL's own configuration asks for bfloat16 on a GPU, where ours follows the machine."""
    plain = DistillationConfig.__init__
    init = lambda self, *args, **kwargs: plain(self, *args, **{"bf16": False, "use_cpu": True} | kwargs)  # noqa: E731
    monkeypatch.setattr(DistillationConfig, "__init__", init)


@each([block for block in BLOCKS if block.runs and block.language in ("python", "bash")])
def test_block_runs(place, block):
    place.run(block)


class TestOutcomes:
    """What the pages say of their snippets."""

    def names(self, place, page):
        path = ROOT / page
        place.run([block for block in blocks_of(path) if block.runs and block.comment != "slow"][-1])
        return place.names[path], place.enter(path)

    def test_readme(self, place):
        names, folder = self.names(place, "README.md")
        assert names["trainer"].state.global_step == 3
        columns = set(load_dataset(str(folder / "my_groups"), split="train").column_names)
        text = (EXAMPLES / "guides/data.md").read_text(encoding="utf-8")  # "all columns"
        assert {f"`{name}`" for name in columns} <= set(re.findall(r"`\w+`", text))
        before = AutoModelForCausalLM.from_pretrained(folder / MODELS[2]).state_dict()
        after = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
        assert any((after[name] != value).any() for name, value in before.items())
        assert json.loads((folder / "out/gsm8k/scores.json").read_text())["items"] == 2

    def test_groups(self, place):
        names, _ = self.names(place, "examples/guides/groups.md")
        assert len(names["groups"]) == len(names["rescored"]) == 4
        assert names["rescored"]["teacher_scores"] != names["groups"]["teacher_scores"]
        assert len(names["cached"][0]["teacher_top_ids"][0][0]) == 64
        for row, expected in zip(names["served"]["teacher_scores"], names["groups"]["teacher_scores"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
        assert names["trainer"].state.global_step == 2 and names["trainer"].teacher_model is None
        assert len(names["labelled"][0]["teacher_top_ids"][0][0]) == 20

    def test_online(self, place):
        names, _ = self.names(place, "examples/guides/online.md")
        assert names["trainer"].state.global_step > 0
        assert names["scored"]["teacher_scores"] == [[1.0, 0.0]] * 2

    def test_data(self, place, capsys):
        page = EXAMPLES / "guides/data.md"
        place.done -= {(page, block.number) for block in blocks_of(page)}
        self.names(place, "examples/guides/data.md")
        assert "`completions` of row 0 has 1 entries" in capsys.readouterr().out


def anchors(page):
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_no_link_is_dead(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_guide_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name_of(page) for page in PAGES if page != ROOT / "README.md" and f"({name_of(page)}" not in text] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def test_messages_of_the_troubleshooting_are_those_of_the_code():
    """Each quoted text is part of a message: f-strings are joined with their fields left out."""
    messages = []
    for path in Path(grkd_trl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                messages.append(
                    "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("\n| message | what to do |\n|---|---|\n")[1]
    quoted = [re.match(r"\| (`+) ?(.*?) ?\1 \|", row) for row in table.split("\n\n")[0].splitlines()]
    quoted = [found[2] for found in quoted if found]
    assert len(quoted) >= 10
    assert [text for text in quoted if not any(text in message for message in messages)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_every_script_is_listed_with_a_command(path):
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in page and f"\npython {name_of(path)} " in page.replace(".py\n", ".py \n")
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140 and f" examples/{path.name} " in ast.get_docstring(ast.parse(text)).replace(
        "\n", " "
    )


def test_the_wheel_has_every_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"grkd_trl.examples": "examples"}
    found = {path.parent for base in ("grkd_trl", "examples") for path in (ROOT / base).rglob("__init__.py")}
    names = {name_of(path).replace("/", ".") for path in found}
    assert {f"grkd_trl.{name}" if name.startswith("examples") else name for name in names} == {*setuptools["packages"]}
