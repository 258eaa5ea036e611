"""
Compare methods under equal budgets, with error bars, and write a report.

    python examples/compare.py --task scan --methods grkd dpo simpo pro kd seqkd minillm gkd sft --seeds 0 1 2 3 4 \
        --max_steps 100 --tune 4 --output_dir comparison

SCAN makes its own data and models, on two CPU cores in seconds to minutes a run. MAWPS (`--task math_word --data
mawps_train.csv mawps_test.csv`) takes the files of https://github.com/arkilpatel/SVAMP. Classifiers,
where `my_data` holds the folders `banking77` and `clinc150` of their published files:

    python examples/compare.py --task banking77 clinc150 digits --label_noise 0.4 0 0.2 --asymmetric_noise 0.4 0.2 \
        --data my_data --max_steps 100 --tune 8 --seeds 0 1 2 3 4 --output_dir comparison

Your own groups and models:

    python examples/compare.py --task groups --groups_file my_groups.jsonl --eval_file my_eval.jsonl \
        --student path/to/student --teacher path/to/teacher --methods grkd dpo kd --max_steps 500 --output_dir comparison

where rows of the evaluation file have a `prompt` and a `reference`, or are groups with `teacher_scores`. A third of them
is for validation.

A seed decides the prompts, what the student writes for them and the order of training; all methods of a seed start from
the same student and see the same groups in batches of the same number of prompts. `--tune N` gives each method the same
number of trials, drawn from as many settings, on the validation items. Every run is a process of its own; stop it when
you like and start the same command again. The report is in `--output_dir`.
"""

import argparse
from pathlib import Path

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.report import write_report
from grkd_trl.examples.comparison import classes
from grkd_trl.examples.comparison.run import METHODS, run, test_models
from grkd_trl.examples.comparison.space import search_space
from grkd_trl.examples.comparison.tasks import TASKS


def compare_task(args: argparse.Namespace, task: str, budget: dict[str, float]) -> Path:
    """All runs of a task of language models."""
    names = ("curve_points", "max_new_tokens", "student_lora")
    names += ("groups_file", "eval_file", "student", "teacher") if task == "groups" else ()
    names += () if task == "groups" else ("num_test", "num_prompts", "pretraining_steps")
    names += ("data",) if task == "math_word" else ()
    shared = {name: getattr(args, name) for name in names}
    shared |= {"learning_rate": args.learning_rate or 1e-3, "batch_size": args.batch_size or 16}
    if task != "groups":
        shared["work_dir"] = str(args.output_dir / "models")
    for seed in args.seeds + ([1000] if args.tune else []):
        made = TASKS[task](shared, seed)  # models and groups, once, before the runs that share them
    test_models(args.output_dir / "results.jsonl", task, made)
    return compare(
        run,
        args.output_dir,
        task=task,
        methods=args.methods or list(METHODS),
        seeds=args.seeds,
        budget=budget,
        shared=shared,
        search_space=search_space(shared["learning_rate"]),
        tune=args.tune,
        num_workers=args.num_workers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=[*TASKS, *classes.TASKS], required=True)
    parser.add_argument("--methods", nargs="+", help="all of the task by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max_steps", type=int)
    budget.add_argument("--max_tokens", type=int, help="tokens through the student, padding and generation included")
    budget.add_argument(
        "--max_seconds", type=float, help="seconds of training; needs a machine with nothing else to do"
    )
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="trials for each method, up to 8")
    parser.add_argument("--learning_rate", type=float, help="1e-3; of classes 3e-2")
    parser.add_argument("--batch_size", type=int, help="prompts a step, 16; or rows, 256")
    parser.add_argument("--student_lora", action="store_true", help="train adapters on all linear layers")
    parser.add_argument("--curve_points", type=int, default=5, help="tests in the course of a run, outside its time")
    parser.add_argument("--num_workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--data", nargs="+", help="MAWPS's csv files, or the folder of banking77 and clinc150")
    for name, default in (("label_noise", [0.0]), ("asymmetric_noise", [])):
        parser.add_argument(f"--{name}", nargs="+", type=float, default=default, help="shares of wrong labels")
    parser.add_argument("--num_test", type=int, default=600, help="test items; half as many are for validation")
    parser.add_argument("--num_prompts", type=int, default=3200, help="prompts that a seed has groups for")
    parser.add_argument("--pretraining_steps", type=int, default=1000, help="of SCAN's teacher; the others' follow")
    for name in ("groups_file", "eval_file", "student", "teacher"):
        parser.add_argument(f"--{name}", help="of --task groups")
    parser.add_argument("--max_new_tokens", type=int, default=49, help="longest completion that is tested or sampled")
    args = parser.parse_args()
    needed = {"groups": ["groups_file", "eval_file", "student", "teacher"], "scan": [], "digits": []}
    for task in args.task:
        if missing := [f"--{name}" for name in needed.get(task, ["data"]) if not getattr(args, name)]:
            parser.error(f"--task {task} needs {', '.join(missing)}")
        known = classes.METHODS if task in classes.TASKS else search_space()
        if unknown := set(args.methods or []) - set(known):
            parser.error(f"--task {task} knows the methods {', '.join(known)}, not {', '.join(sorted(unknown))}")
    budget = {name: getattr(args, name) for name in ("max_steps", "max_tokens", "max_seconds") if getattr(args, name)}
    if "max_steps" not in budget and set(args.task) & set(classes.TASKS):
        parser.error("classifiers have --max_steps as their budget")

    for task in args.task:
        of_classes = task in classes.TASKS
        results = (classes.compare_task if of_classes else compare_task)(args, task, budget)
    for path in write_report(results, args.output_dir / "report")[:2]:
        print(path)


if __name__ == "__main__":
    main()
