"""
The study of the README: every method on SCAN and MAWPS, tuned alike, and GRKD with one setting changed at a time.

    python examples/study.py --mawps mawps_fold0_train.csv mawps_fold0_dev.csv --output_dir study

The files of MAWPS are those of https://github.com/arkilpatel/SVAMP. Models are trained from scratch. All runs of a task
start from one student; a seed decides the prompts, what is written for them and the order of training. What is tuned is
tuned on validation items, by a seed of its own. Stop the command when you like and start it again: runs that are done are
not repeated. `--parts` does a part of it. Each part has a folder with `results.jsonl` and a report.
"""

import argparse
from pathlib import Path

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.report import write_report
from grkd_trl.examples.comparison.run import run, test_models
from grkd_trl.examples.comparison.space import search_space
from grkd_trl.examples.comparison.tasks import TASKS


RATE = 1e-3  # of the ablations
# What a run's name says, beside the defaults of `GRKDConfig`.
ABLATIONS = {
    "grkd": {},
    "grkd alpha 0 (KD)": {"alpha_end": 0.0},
    "grkd alpha to 0.1": {"alpha_end": 0.1},
    "grkd alpha to 0.6": {"alpha_end": 0.6},
    "grkd alpha to 1": {"alpha_end": 1.0},
    "grkd alpha constant": {"alpha_schedule": "constant"},
    "grkd alpha cosine": {"alpha_schedule": "cosine"},
    "grkd tau 0.1": {"ranking_temperature": 0.1},
    "grkd tau 0.3": {"ranking_temperature": 0.3},
    "grkd tau 3": {"ranking_temperature": 3.0},
    "grkd sum of logps, tau 10": {"score": "sum", "ranking_temperature": 10.0},
    "grkd group soft labels": {"soft_label": "group"},
    "grkd no soft labels": {"soft_label": "none"},
    "grkd tokens ranked": {"relative_level": "tokens"},
    "grkd soft labels at 2": {"soft_label_temperature": 2.0, "alpha_end": 0.1},
    "grkd 2 tokens ranked": {"relative_level": "tokens", "relative_top_k": 2},
    "grkd groups of 2": {"num_completions": 2},
    "grkd groups of 8": {"num_completions": 8},
    "grkd groups of 16": {"num_completions": 16},
    "grkd teacher writes": {"written_by": "teacher"},
    "grkd student writes": {"written_by": "student"},
    "grkd sft_weight 1": {"sft_weight": 1.0},
    "grkd sft_weight 1, alpha to 0.6": {"sft_weight": 1.0, "alpha_end": 0.6},
}
TITLES = {"methods": "Every method on SCAN and MAWPS", "ablations": "GRKD with one setting changed at a time"}
TUNING_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", nargs="+", required=True, metavar="CSV")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("out/study"), help="models and groups")
    parser.add_argument("--tasks", nargs="+", default=["scan", "math_word"], choices=["scan", "math_word"])
    parser.add_argument("--methods", nargs="+", default=list(search_space()), choices=search_space())
    parser.add_argument("--parts", nargs="+", default=["methods", "ablations"], choices=["methods", "ablations"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--ablation_seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--tune", type=int, default=8, help="trials for each method, at most 8")
    parser.add_argument("--pretraining_steps", type=int, default=1500, help="of SCAN's teacher; the others' follow")
    parser.add_argument("--num_test", nargs=2, type=int, default=[2000, 600], help="test items of SCAN and MAWPS")
    parser.add_argument("--num_workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args()

    shared = {"batch_size": 16, "max_new_tokens": 49, "work_dir": str(args.work_dir)}
    shared["pretraining_steps"] = args.pretraining_steps
    shared["num_prompts"] = shared["batch_size"] * args.max_steps
    own = {"scan": {"num_test": args.num_test[0]}, "math_word": {"num_test": args.num_test[1], "data": args.mawps}}
    for part in args.parts:
        for task in args.tasks:
            settings = shared | own[task]
            common = {"task": task, "budget": {"max_steps": args.max_steps}, "num_workers": args.num_workers}
            made = TASKS[task](settings, TUNING_SEED)  # models, once, before the runs that share them
            test_models(args.output_dir / part / "results.jsonl", task, made)
            if part == "methods":
                results = compare(
                    run,
                    args.output_dir / part,
                    methods=args.methods,
                    seeds=args.seeds,
                    shared=settings | {"curve_points": 2},
                    search_space=search_space(),
                    tune=args.tune,
                    tuning_seed=TUNING_SEED,
                    **common,
                )
            else:
                results = compare(
                    run,
                    args.output_dir / part,
                    methods=list(ABLATIONS),
                    seeds=args.ablation_seeds,
                    shared=settings | {"curve_points": 0, "learning_rate": RATE},
                    settings=ABLATIONS,
                    **common,
                )
        write_report(results, args.output_dir / part, title=TITLES[part])


if __name__ == "__main__":
    main()
