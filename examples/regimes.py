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
from pathlib import Path

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.report import write_report
from grkd_trl.evaluation.results import read_results
from grkd_trl.examples.regime_study.figure import draw
from grkd_trl.examples.regime_study.grid import MAX_NEW_TOKENS, MEASURES, RATES, REGIMES, SEEDS, TASKS, TUNING_SEED
from grkd_trl.examples.regime_study.run import run
from grkd_trl.examples.regime_study.tasks import make_start
from grkd_trl.examples.regime_study.verdicts import by_measure, verdicts


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
