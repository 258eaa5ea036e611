"""The arguments of `prune_and_distill.py`."""

import argparse
from collections.abc import Iterable
from pathlib import Path


def read_arguments(argv: list[str] | None, description: str, methods: Iterable[str]) -> argparse.Namespace:
    """
    Arguments of a command line.

    Args:
        argv (`list[str]` or `None`):
            The command line, by default that of the process.
        description (`str`):
            The script's docstring.
        methods (`Iterable[str]`):
            Methods to train with.

    Returns:
        `argparse.Namespace`: The arguments, with `training_seed`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for models, groups and results")
    add("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="teacher, by default %(default)s")
    add("--method", default="grkd", choices=list(methods), help="method to train with (default: %(default)s)")
    add("--name", default="", help="folder in --output_dir for student and results of this run; the rest is shared")
    add("--drop", default="middle:6", help="layers to remove, 'middle:N' or 'every_second' (default: %(default)s)")
    add("--prompts", help=".json or .jsonl file of prompts; by default those of this script")
    add("--num_prompts", type=int, default=72, help="prompts to train on (default: %(default)s)")
    add("--num_held_out", type=int, default=12, help="prompts to measure on (default: %(default)s)")
    add("--max_prompt_length", type=int, default=96, help="longest prompt, in tokens (default: %(default)s)")
    add("--max_completion_length", type=int, default=32, help="longest completion, in tokens (default: %(default)s)")
    add("--num_completions", type=int, default=4, help="completions in a group, half by the teacher (default: 4)")
    add("--num_train_epochs", type=int, default=1, help="times that the groups are trained on (default: 1)")
    add("--groups_per_step", type=int, default=2, help="groups in a step (default: 2)")
    add("--learning_rate", type=float, help="3e-4 by default, and with --use_peft 1e-3")
    add("--use_peft", action="store_true", help="train LoRA adapters of rank 16 in place of all parameters")
    add("--seed", type=int, default=0, help="seed of draws and order (default: 0)")
    add("--training_seed", type=int, help="seed of training alone, by default --seed; the groups stay the same")

    args = parser.parse_args(argv)
    if args.training_seed is None:
        args.training_seed = args.seed
    if args.name in ("start", "groups", "student"):
        parser.error(f"--name {args.name} is a folder that runs share; choose another name")
    return args
