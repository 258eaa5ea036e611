"""
`grkd-trl`: every script of this folder by one command, also where only the wheel is installed.

    grkd-trl grkd --config my_run.yaml
    grkd-trl groups --help
    grkd-trl dpo --accelerate_config zero2.yaml --config my_run.yaml

With `--accelerate_config` the script runs under `accelerate launch --config_file`, else in this process.
"""

import ast
import os
import runpy
import sys
from pathlib import Path


# Names of commands that are not their script's.
_SCRIPTS = {"groups": "generate_groups", "estimate": "estimate_memory"}


def commands() -> dict[str, str]:
    """
    The commands, each with its script.

    Returns:
        `dict[str, str]`: Name of the script's module by command, in alphabetical order.
    """
    scripts = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__", "__main__", *_SCRIPTS.values()}
    return dict(sorted(({name: name for name in scripts} | _SCRIPTS).items()))


def _usage() -> str:
    lines = ["usage: grkd-trl COMMAND [--accelerate_config FILE] [arguments of the command]", "", "commands:"]
    for command, script in commands().items():
        source = (Path(__file__).parent / f"{script}.py").read_text(encoding="utf-8")
        about = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"  {command:<19}{about.split('. ')[0].rstrip('.:')}.")
    return "\n".join([*lines, "", "`grkd-trl COMMAND --help` lists the arguments of a command."])


def main() -> None:
    """Run the command that the command line names."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command in ("-h", "--help"):
        print(_usage())
        return
    if command not in commands():
        sys.exit(f"grkd-trl: unknown command {command!r}; choose from {', '.join(commands())}")
    module = f"grkd_trl.examples.{commands()[command]}"
    if "--accelerate_config" in arguments:
        at = arguments.index("--accelerate_config")
        launch = ["-m", "accelerate.commands.launch", "--config_file", *arguments[at + 1 : at + 2], "-m", module]
        os.execv(sys.executable, [sys.executable, *launch, *arguments[:at], *arguments[at + 2 :]])
    sys.argv = [f"grkd-trl {command}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
