"""
When does ranking help? Every method in four regimes, tuned alike, by greedy text, samples and ranks.

    python examples/regimes.py --mawps mawps_fold0_train.csv mawps_fold0_dev.csv --output_dir regimes

| regime | the teacher |
|---|---|
| `logits` | has the student's tokenizer, so that its logits are there |
| `verifier` | the same, and a verifier scores the completions |
| `scores` | has another tokenizer: its text and its scores are all that is known |
| `privileged` | is the student itself, which is shown the solution |

The files of MAWPS are those of https://github.com/arkilpatel/SVAMP. Models are trained from scratch; groups are of prompts that
neither model was trained on, and their completions differ. The rules, fixed before a test item was looked at:

- Every method has five trials, one for each learning rate, with a seed of its own on validation items. What decides is the
  mean of the share of right greedy texts and of right samples at temperature 1. Five seeds on the test items follow.
- Ranking helps in a regime where the interval of its difference to the same losses without ranking lies above 0, and the
  verifier's information where that of its difference to KD does; each by greedy text and by samples.
- GRKD is tested at KD's learning rate as well: one seed of validation items hardly tells two rates apart, and the two methods may
  end at different ones. This was added after the first test.
- P-values are Holm's over the comparisons of a regime, task and measure (`COMPARISONS`).

Stop the command when you like and start it again: runs that are done are not repeated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.report import write_report
from grkd_trl.evaluation.results import append_result, read_results
from grkd_trl.evaluation.statistics import holm_p_values, paired_difference
from grkd_trl.examples.regime_study.figure import draw
from grkd_trl.examples.regime_study.run import measured_path, run
from grkd_trl.examples.regime_study.tasks import make_start


RATES = (1e-5, 1e-4, 5e-4, 1e-3, 3e-3)
SEEDS, TUNING_SEED = [0, 1, 2, 3, 4], 1000
MEASURES = ("greedy", "samples", "samples at 0.7", "pass at 8", "best of 8", "teacher's score", "rank accuracy")
NO_RANKING = {"alpha_start": 0.0, "alpha_end": 0.0}  # which leaves KD, with groups of one's own
ONLINE = {"generate_every": 5, "learns_from": "prompts"}
BEST, VERIFIED = {"learns_from": "best"}, {"learns_from": "groups with a right completion"}
# By regime: what its tasks share, and its methods with their settings. The first word of a method is its trainer.
REGIMES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "logits": (
        {"teacher": "same_tokenizer", "scores": "teacher"},
        {
            "grkd": {},
            "grkd constant": {"alpha_schedule": "constant"},
            "grkd preference": {"target_temperature": 1.0},
            "grkd online": ONLINE | {"completion_source": "mixed"},
            "kd": {},
            "sft": BEST,
            "seqkd": {"learns_from": "prompts"},
            "pro": {},
            "dpo": {},
            "simpo": {},
            "minillm": {"learns_from": "prompts"},
            "gkd": {"learns_from": "prompts"},
        },
    ),
    "verifier": (
        {"teacher": "same_tokenizer", "scores": "verifier"},
        {
            "grkd": {},
            "grkd online": ONLINE | {"completion_source": "mixed"},
            "grkd +sft": VERIFIED | {"sft_weight": 1.0},
            "grkd no ranking +sft": VERIFIED | {"sft_weight": 1.0} | NO_RANKING,
            "kd": {},
            "sft": {"learns_from": "best right"},
            "sft teacher's": {"learns_from": "teacher's right"},
            "gkd": {"learns_from": "prompts"},
            "grpo": {"learns_from": "prompts"},
        },
    ),
    "scores": (
        {"teacher": "other_tokenizer", "scores": "teacher"},
        {
            "grkd": {"soft_label": "none"},
            "grkd +sft": {"soft_label": "none", "sft_weight": 1.0},
            "grkd group +sft": {"soft_label": "group", "sft_weight": 1.0},
            "sft": BEST,
            "seqkd": {"learns_from": "prompts"},
            "pro": {},
            "dpo": {},
            "simpo": {},
        },
    ),
    "privileged": (
        {"teacher": "sees_solution", "scores": "teacher"},
        {
            "grkd": {},
            "grkd online": ONLINE | {"completion_source": "student"},
            "grkd no ranking online": ONLINE | {"completion_source": "student"} | NO_RANKING,
            "kd": {},
            "sft": {"learns_from": "reference"},
            "seqkd": {"learns_from": "prompts"},
        },
    ),
}
# By regime: a method and the one that it is compared to, for what the method has in addition.
COMPARISONS = {
    "logits": {
        "ranking": [("grkd", "kd"), ("grkd constant", "kd"), ("grkd preference", "kd"), ("grkd at kd's rate", "kd")],
        "a schedule": [("grkd", "grkd constant")],
        "online groups": [("grkd online", "grkd")],
    },
    "verifier": {
        "ranking": [("grkd", "kd"), ("grkd +sft", "grkd no ranking +sft")],
        "information": [("grkd", "kd"), ("grkd +sft", "kd"), ("grkd no ranking +sft", "kd"), ("grpo", "kd")],
        "online groups": [("grkd online", "grkd")],
    },
    "scores": {"ranking": [("grkd +sft", "sft"), ("grkd group +sft", "sft"), ("pro", "sft")]},
    "privileged": {"ranking": [("grkd", "kd"), ("grkd online", "grkd no ranking online")]},
}
TASKS = {"logits": ("math_word", "scan"), "verifier": ("math_word",), "scores": ("math_word", "scan")}
TASKS |= {"privileged": ("math_word",)}
MAX_NEW_TOKENS = {"math_word": 16, "scan": 49}


def by_measure(results: Path, work_dir: Path, path: Path) -> Path:
    """Each measure of the runs as a task of its own, with its values by item."""
    path.unlink(missing_ok=True)
    for row in read_results(results):
        if row["status"] != "done":
            append_result(path, row)
            continue
        values = json.loads(measured_path(work_dir, row["task"], row["method"], row["seed"]).read_text())
        for measure in MEASURES:
            own = {"task": f"{row['task']}: {measure}", "metric": measure, "per_item": values[measure]}
            append_result(path, row | own | {"metrics": {measure: sum(values[measure]) / len(values[measure])}})
    return path


def verdicts(measures: Path) -> str:
    """Each comparison's difference by each measure, in Markdown, with Holm's p-values over a regime, task and measure."""
    items: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in read_results(measures):
        if row["status"] == "done":
            items.setdefault(row["task"], {}).setdefault(row["method"], {})[row["seed"]] = row["per_item"]
    lines = []
    for task in sorted({name.split(":")[0] for name in items}):
        asked = [(what, *pair) for what, pairs in COMPARISONS[task.split(",")[0]].items() for pair in pairs]
        cells: dict[tuple[str, str, str], list[str]] = {}
        for measure in MEASURES:
            found = items[f"{task}: {measure}"]
            known = {}
            for what, method, baseline in asked:
                seeds = sorted(found.get(method, {}).keys() & found.get(baseline, {}).keys())
                if seeds:
                    values = [np.array([found[name][seed] for seed in seeds]) for name in (method, baseline)]
                    known[what, method, baseline] = paired_difference(*values)
            p_values = holm_p_values(np.array([estimate.p_value for estimate in known.values()]))
            for key, estimate, p_value in zip(known, known.values(), p_values, strict=True):
                mark = "**" if p_value < 0.05 else ""
                text = f"{mark}{estimate.mean:+.3f}{mark} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
                cells.setdefault(key, []).append(text)
        lines += ["", f"## {task}", "", f"| adds | method | minus | {' | '.join(MEASURES)} |"]
        lines += [
            "|---" * (3 + len(MEASURES)) + "|",
            *(f"| {' | '.join([*key, *row])} |" for key, row in cells.items()),
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", nargs="+", required=True, metavar="CSV")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--tasks", nargs="+", default=list(MAX_NEW_TOKENS), choices=list(MAX_NEW_TOKENS))
    parser.add_argument("--methods", nargs="+", help="all of a regime by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--tune", type=int, default=len(RATES), help="trials for each method, at most 5")
    parser.add_argument(
        "--pretraining", type=float, default=1.0, help="share of the steps that models are trained for"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)

    work_dir = args.output_dir / "models"
    for regime in args.regimes:
        shared, methods = REGIMES[regime]
        methods = {name: own for name, own in methods.items() if name in (args.methods or methods)}
        for task in [name for name in TASKS[regime] if name in args.tasks]:
            given = {"task": task, "data": args.mawps, "work_dir": str(work_dir), "batch_size": 16}
            given |= {"max_new_tokens": MAX_NEW_TOKENS[task], "pretraining": args.pretraining}
            given |= {"num_prompts": 16 * args.max_steps, "learns_from": "groups"} | shared
            for seed in [*args.seeds, TUNING_SEED]:
                make_start(given, seed)  # once, before the runs that share it
            common = {"task": f"{regime}, {task}", "budget": {"max_steps": args.max_steps}}
            common |= {"shared": given, "num_workers": args.num_workers}
            compare(run, args.output_dir, methods=["student before", "teacher"], seeds=[0], **common)
            space = {name: [own | {"learning_rate": rate} for rate in RATES] for name, own in methods.items()}
            tuned = {"search_space": space, "tune": args.tune, "tuning_seed": TUNING_SEED}
            results = compare(run, args.output_dir, methods=list(methods), seeds=args.seeds, **tuned, **common)
            if regime == "logits" and {"grkd", "kd"} <= methods.keys():
                kd = (common["task"], "kd")
                known = [row["settings"] for row in read_results(results) if (row["task"], row["method"]) == kd]
                again = {"grkd at kd's rate": {"learning_rate": known[0]["learning_rate"]}}
                compare(run, args.output_dir, methods=list(again), seeds=args.seeds, settings=again, **common)
            spread = by_measure(results, work_dir, args.output_dir / "measures.jsonl")
            print(write_report(spread, args.output_dir / "report", title="When does ranking help?")[0])
            figure = args.output_dir / f"{common['task'].replace(', ', '_')}.png"
            done = [row for row in read_results(spread) if row["status"] == "done"]
            draw(done, common["task"], MEASURES, figure)
            (args.output_dir / "verdicts.md").write_text("# Verdicts\n" + verdicts(spread), encoding="utf-8")


if __name__ == "__main__":
    main()
