"""The command `grkd-trl`, from a checkout and from a wheel that is installed elsewhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from grkd_trl.examples import __main__ as cli


ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "grkd_trl.examples", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def test_every_script_is_a_command(capsys, monkeypatch):
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "__main__"}
    assert set(cli.commands().values()) == scripts
    assert {"grkd", "dpo", "groups", "evaluate", "judge", "compare", "estimate"} <= set(cli.commands())
    monkeypatch.setattr(sys, "argv", ["grkd-trl"])
    cli.main()
    listed = capsys.readouterr().out
    for command in cli.commands():
        assert f"\n  {command} " in listed
    assert "Train a student with GRKD on groups" in listed


def test_package_and_list_of_commands_load_no_library():
    """Importing TRL and torch takes seconds."""
    code = (
        "import sys, grkd_trl\n"
        "from grkd_trl.examples import __main__ as cli\n"
        "sys.argv = ['grkd-trl', '--help']\n"
        "cli.main()\n"
        "assert {*grkd_trl.__all__, 'losses', 'evaluation'} <= set(dir(grkd_trl))\n"
        "print('torch' in sys.modules)\n"
        "import grkd_trl.losses\n"
        "print('transformers' in sys.modules, grkd_trl.GRKDTrainer.__name__, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["False", "False GRKDTrainer True"]


def test_unknown_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grkd-trl", "grdk"])
    with pytest.raises(SystemExit, match="unknown command 'grdk'; choose from .*grkd"):
        cli.main()


def test_script_gets_its_arguments(tmp_path):
    done = run("grkd", "--output_dir", str(tmp_path), "--use_cpu", "true")
    assert done.returncode == 2 and "--model_name_or_path and --dataset_name are needed" in done.stderr


def test_under_accelerate(tmp_path):
    config = ROOT / "accelerate_configs/cpu.yaml"
    done = run("grkd", "--output_dir", str(tmp_path), "--accelerate_config", str(config))
    assert done.returncode != 0 and "--model_name_or_path and --dataset_name are needed" in done.stderr


@pytest.mark.slow
def test_from_the_wheel(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert "grkd_trl/py.typed" in archive.namelist()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = subprocess.run(
        [sys.executable, "-c", "import grkd_trl; print(grkd_trl.__file__)"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(tmp_path / "site"))
    done = run("grkd", "--help", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--teacher_model_name_or_path" in done.stdout
