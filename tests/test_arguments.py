"""The command line of the scripts: what `--help` shows first, and that it accepts what TRL's parser accepts."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments, TrlParser

from grkd_trl import GRKDConfig
from grkd_trl.examples.arguments.parser import ScriptParser


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if "ScriptParser(" in path.read_text()]


@dataclass
class OwnArguments(ScriptArguments):
    """
    Parameters:
        told (`int`, *optional*, defaults to `3`):
            Told in the
            docstring, 100 %.
    """

    told: int = 3
    helped: str | None = field(default=None, metadata={"help": "Help of its own."})


TYPES = (OwnArguments, GRKDConfig, ModelConfig)


def test_help_starts_with_what_is_its_own():
    text = ScriptParser(TYPES, "About 50 % of it.\n\n    python it.py         --told 4").format_help()
    assert "About 50 % of it." in text and "python it.py \\\n        --told 4" in text
    about, *groups = text.split("\nthe script's own arguments:")
    assert "--alpha_end" not in about and len(groups) == 1
    own, rest = groups[0].split("\narguments of GRKDConfig:")
    method, rest = rest.split("\narguments inherited from TRL and transformers:")
    for name, part in {
        "told": own,
        "helped": own,
        "dataset_name": own,
        "alpha_end": method,
        "max_steps": rest,
    }.items():
        assert f"\n  --{name} " in part, name
        assert text.count(f"\n  --{name} ") == 1
    assert "Told in the docstring, 100 %. (default: 3)" in " ".join(own.split())
    assert "--helped VALUE" in own and "None" not in own


def test_accepts_what_trls_parser_accepts(tmp_path):
    plain, ours = TrlParser(TYPES), ScriptParser(TYPES)
    assert {option for action in ours._actions for option in action.option_strings} == {
        option for action in plain._actions for option in action.option_strings
    }
    (tmp_path / "run.yaml").write_text("alpha_end: 0.5\nbf16: false\ntold: 7\n")
    given = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path), "--use_cpu", "true", "--told", "8"]
    for one, other in zip(plain.parse_args_and_config(given), ours.parse_args_and_config(given), strict=True):
        shown = [{name: value for name, value in vars(each).items() if name[0] != "_"} for each in (one, other)]
        assert shown[0].keys() == shown[1].keys()
        for name in ("told", "alpha_end", "use_cpu", "bf16", "output_dir"):
            assert shown[0].get(name) == shown[1].get(name)


def printed_help(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script.name, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["evaluate", "generate_groups", "judge"])
def test_every_argument_of_a_script_is_explained(name, monkeypatch, capsys):
    text = printed_help(ROOT / f"examples/{name}.py", monkeypatch, capsys)
    assert f" examples/{name}.py " in text  # a command
    for part in text.split("\n  --")[1:]:
        about = part.split("\n\n")[0].split(None, 2)
        assert len(about) == 3 and "(default" != about[2][:8], part


@pytest.fixture(scope="module")
def quick_help():
    """Text by script, of one process without torch."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from grkd_trl.examples.arguments.quick_help import help_of\n"
        "texts = {}\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv[0] = path\n"
        "    texts[path] = help_of(Path(path))\n"
        "print(json.dumps(texts))\n"
    )
    command, env = [sys.executable, "-c", code, *map(str, SCRIPTS)], os.environ | {"COLUMNS": "100"}
    return json.loads(subprocess.run(command, env=env, capture_output=True, check=True, timeout=300).stdout)


class TestQuickHelp:
    """`--help` without the imports that take seconds."""

    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
    def test_is_what_the_parser_prints(self, quick_help, script, monkeypatch, capsys):
        assert quick_help[str(script)] == printed_help(script, monkeypatch, capsys)
        assert "import grkd_trl.examples.arguments.quick_help " in script.read_text()

    @pytest.mark.parametrize("command", [["examples/grkd.py"], ["-m", "grkd_trl.examples", "grkd"]], ids=len)
    def test_imports_no_torch(self, command, quick_help, tmp_path):
        (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(ROOT)])
        env = os.environ | {"COLUMNS": "100", "PYTHONPATH": path}
        done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, quick_help[str(ROOT / "examples/grkd.py")]), done.stderr

    def test_falls_back_to_the_parser_in_a_process_with_torch(self):
        code = (
            "import sys\n"
            "from grkd_trl.examples.arguments import quick_help\n"
            f"sys.modules['__main__'].__file__ = {str(ROOT / 'examples/grkd.py')!r}\n"
            "sys.argv = ['grkd.py', '--help']\n"
            "quick_help.help_of = lambda script: int('not a number')\n"
            "quick_help._answer()\n"
            "print('imports', sys.modules.get('torch', 'what it needs'))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
        assert done.stdout == "imports what it needs\n"
