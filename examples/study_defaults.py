"""
Where the defaults of `GRKDConfig` come from: GRKD with one setting changed at a time, on two small tasks.

    python examples/study_defaults.py --mawps path/to/mawps.csv ...

A teacher and a student are trained from scratch on SCAN and, if its files are given, on MAWPS (math word problems; the
files of https://github.com/arkilpatel/SVAMP). A seed decides which prompts the student gets groups for, what it writes,
and the order of training; all settings of a seed share groups, steps, batch size and learning rate, and are tested on
the same 1000 held-out prompts. `fine-tuning` is the same student on the teacher's completions alone.

Each run adds a line to `--results`. Runs that are there already are not repeated, so the study may be stopped at any
time. Ends with a table of all runs in Markdown; `--table` prints it alone.
"""

import argparse
import copy
import gc
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset
from quickstart import (
    GROUPS_PER_STEP,
    PROMPT,
    fine_tune,
    new_llama,
    pretrain,
    test,
    training,
    word_tokenizer,
    write_groups,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.evaluation import MathWordProblem, read_math_word_problems, scan_pairs, scan_split, solves
from grkd_trl.evaluation.results import append_result, read_results, values_by_method
from grkd_trl.evaluation.statistics import bootstrap_estimate, paired_difference
from grkd_trl.teacher import generate_completions


SETTINGS = {  # beside these, all runs have alpha 0 to 0.6, linear, tau 1, token soft labels and completions ranked
    "KD (alpha_end 0)": {"alpha_end": 0.0},
    "alpha_end 0.6": {"alpha_end": 0.6},
    "tau 0.1": {"ranking_temperature": 0.1},
    "alpha_end 1": {"alpha_end": 1.0},
    "tokens ranked": {"relative_level": "tokens"},
    "soft_label group": {"soft_label": "group"},
    "alpha_end 0.3": {"alpha_end": 0.3},
    "alpha 0.3 constant": {"alpha_end": 0.3, "alpha_schedule": "constant"},
    "soft_label none": {"soft_label": "none"},
    "tau 3": {"ranking_temperature": 3.0},
}
BASE = {"ranking_temperature": 1.0, "alpha_end": 0.6, "alpha_schedule": "linear", "soft_label": "token"}
BASE |= {"relative_level": "completions"}
UNTRAINED = ("teacher", "student before")
NUM_TEST = 1000


@dataclass
class Task:
    """A task with its trained models."""

    name: str
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    test: Callable[[PreTrainedModel], list[bool]]

    def groups(self, seed: int, num_prompts: int, folder: Path) -> Dataset:
        """The groups of a seed, written once."""
        path = folder / f"{self.name}-{seed}-{num_prompts}.jsonl"
        if not path.exists():
            order = random.Random(seed)
            prompts = []
            while len(prompts) < num_prompts:  # a small task is gone through several times, with new completions
                prompts += order.sample(self.prompts, min(len(self.prompts), num_prompts - len(prompts)))
            set_seed(seed)
            write_groups(self.teacher, self.student, self.tokenizer, prompts).to_json(path)
        return load_dataset("json", data_files=str(path), split="train")


def trained(
    folder: Path, tokenizer, rows: list[tuple[str, str]], *, num_layers: int, width: int, **kwargs
) -> PreTrainedModel:
    """A model trained from scratch, or loaded from where it was saved."""
    if not (folder / "config.json").exists():
        set_seed(0)
        model = new_llama(tokenizer, num_layers=num_layers, width=width)
        pretrain(model, tokenizer, rows, **kwargs)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def scan_task(folder: Path) -> Task:
    train, held_out = scan_split(NUM_TEST + 250)  # as in the quickstart
    rows = [(PROMPT.format(command), actions) for command, actions in train]
    tokenizer = word_tokenizer([PROMPT.format(""), *(text for pair in scan_pairs() for text in pair)])
    shape = {"num_layers": 2, "width": 64, "lr": 3e-3}
    teacher = trained(folder / "scan-teacher", tokenizer, rows[:4000], **shape, batch_size=32, max_steps=1500)
    student = trained(folder / "scan-student", tokenizer, rows[:800], **shape, batch_size=64, max_steps=500)
    tokenizer = AutoTokenizer.from_pretrained(folder / "scan-teacher")
    prompts = [prompt for prompt, _ in rows[4000:]]

    def right(model: PreTrainedModel) -> list[bool]:
        return test(model, tokenizer, held_out[:NUM_TEST], progress=False)

    return Task("scan", teacher, student, tokenizer, prompts, right)


def mawps_task(folder: Path, files: list[str]) -> Task:
    problems = [problem for file in files for problem in read_math_word_problems(file)]
    random.Random(0).shuffle(problems)
    held_out, train = problems[:NUM_TEST], problems[NUM_TEST:]
    ask = lambda problem: f"{problem.question} = "  # noqa: E731
    rows = [(ask(problem), problem.equation) for problem in train]
    tokenizer = word_tokenizer(text for row in rows for text in row)  # other words of held-out questions are <unk>
    shared = {"lr": 2e-3, "batch_size": 32}
    teacher = trained(folder / "mawps-teacher", tokenizer, rows, num_layers=3, width=96, max_steps=300, **shared)
    student = trained(folder / "mawps-student", tokenizer, rows[:300], num_layers=2, width=48, max_steps=150, **shared)

    def right(model: PreTrainedModel) -> list[bool]:
        return solved(model, tokenizer, [ask(problem) for problem in held_out], held_out)

    return Task("mawps", teacher, student, tokenizer, [prompt for prompt, _ in rows], right)


def solved(model: PreTrainedModel, tokenizer, prompts: list[str], problems: list[MathWordProblem]) -> list[bool]:
    texts, _ = generate_completions(
        model, tokenizer, prompts, max_new_tokens=16, temperature=0.0, batch_size=256, progress=False
    )
    return [solves(text, problem) for (text,), problem in zip(texts, problems, strict=True)]


def run(task: Task, name: str, seed: int, *, steps: int, learning_rate: float, folder: Path) -> dict[str, Any]:
    """One run, as a row of results."""
    groups = None if name in UNTRAINED else task.groups(seed, steps * GROUPS_PER_STEP, folder)
    student = copy.deepcopy(task.student)
    shared = {"max_steps": steps, "learning_rate": learning_rate, "batch_size": GROUPS_PER_STEP, "seed": seed}
    settings, metrics, started = BASE | SETTINGS[name] if name in SETTINGS else {}, {}, time.perf_counter()
    if name == "fine-tuning":
        taught = [(row["prompt"], row["completions"][0]) for row in groups]
        fine_tune(student, task.tokenizer, taught, output_dir=folder / "out", **shared)
    elif name == "teacher":
        student = task.teacher
    elif name in SETTINGS:
        trainer = GRKDTrainer(
            student,
            task.teacher,
            GRKDConfig(**training(folder / "out", **shared), **settings, disable_tqdm=True),
            train_dataset=groups,
            processing_class=task.tokenizer,
        )
        trainer.train()
        metrics["rank/accuracy"] = [e["rank/accuracy"] for e in trainer.state.log_history if "rank/accuracy" in e][-2]
    seconds = time.perf_counter() - started
    right = task.test(student)
    return {
        "task": task.name,
        "method": name,
        "seed": seed,
        "settings": settings | {"steps": steps, "groups_per_step": GROUPS_PER_STEP, "learning_rate": learning_rate},
        "metrics": {"accuracy": sum(right) / len(right)} | metrics,
        "per_item": [int(value) for value in right],
        "seconds": round(seconds, 1),
        "tokens": None,
        "peak_memory_bytes": None,
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
        "status": "done",
    }


def print_table(results: Path) -> None:
    rows = read_results(results)
    for task in sorted({row["task"] for row in rows}):
        values = values_by_method(rows, task)
        print(f"\n| {task} | seeds | accuracy | difference to KD |\n|---|---|---|---|")
        kd_seeds, kd = values.get("KD (alpha_end 0)", ([], None))
        for name, (seeds, found) in sorted(values.items(), key=lambda item: -item[1][1].mean()):
            mean = bootstrap_estimate(found)
            difference = ""
            both = sorted(set(seeds) & set(kd_seeds))
            if both and name != "KD (alpha_end 0)":
                ours, theirs = [seeds.index(seed) for seed in both], [kd_seeds.index(seed) for seed in both]
                estimate = paired_difference(found[ours], kd[theirs])
                difference = f"{estimate.mean:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
            print(f"| {name} | {len(seeds)} | {mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f}) | {difference} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", nargs="+", default=[], metavar="CSV")
    parser.add_argument("--tasks", nargs="+", default=["scan", "mawps"], choices=["scan", "mawps"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--settings", nargs="+", default=[*UNTRAINED, "fine-tuning", *SETTINGS], metavar="NAME")
    parser.add_argument("--results", type=Path, default=Path("examples/results/defaults/results.jsonl"))
    parser.add_argument("--work_dir", type=Path, default=Path("out/study_defaults"), help="models and groups")
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    args = parser.parse_args()
    if not args.table:
        logging.set_verbosity_error()
        disable_progress_bars()
        args.work_dir.mkdir(parents=True, exist_ok=True)
        tasks = [scan_task(args.work_dir)] if "scan" in args.tasks else []
        tasks += [mawps_task(args.work_dir, args.mawps)] if args.mawps and "mawps" in args.tasks else []
        done = set()
        if args.results.exists():
            done = {(row["task"], row["method"], row["seed"]) for row in read_results(args.results)}
        for seed in args.seeds:  # all of a seed first, so that a study cut short compares what it has
            for name in args.settings:
                for task in tasks:
                    if (task.name, name, seed) in done or (name in UNTRAINED and seed != args.seeds[0]):
                        continue
                    row = run(
                        task, name, seed, steps=args.steps, learning_rate=args.learning_rate, folder=args.work_dir
                    )
                    append_result(args.results, row)
                    print(f"{task.name} {name} seed {seed}: {row['metrics']} {row['seconds']} s", flush=True)
                    gc.collect()
    print_table(args.results)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
