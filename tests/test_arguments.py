"""The command line of the scripts: what `--help` shows first, and that it accepts what TRL's parser accepts."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments, TrlParser

from grkd_trl import GRKDConfig
from grkd_trl.examples.arguments.parser import ScriptParser


ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize("name", ["evaluate", "generate_groups", "judge"])
def test_every_argument_of_a_script_is_explained(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert f" examples/{name}.py " in text  # a command
    for part in text.split("\n  --")[1:]:
        about = part.split("\n\n")[0].split(None, 2)
        assert len(about) == 3 and "(default" != about[2][:8], part
