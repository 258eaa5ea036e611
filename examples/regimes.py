"""
When does ranking help? Every method in four regimes, tuned alike, and GRKD's settings, by greedy text, samples and ranks.

    python examples/regimes.py --mawps mawps_fold0_train.csv mawps_fold0_dev.csv --output_dir regimes

| regime | the teacher |
|---|---|
| `logits` | has the student's tokenizer, so that its logits are there |
| `verifier` | the same, and a verifier scores the completions |
| `scores` | has another tokenizer: its text and its scores are all that is known |
| `privileged` | is the student itself, which is shown the solution |
| `ablations` | as in `logits`; GRKD alone, with one setting changed at a time, at one rate and with three seeds |

The files of MAWPS are those of https://github.com/arkilpatel/SVAMP. Models are trained from scratch; groups are of prompts that
neither model was trained on, and their completions differ. The rules, fixed before a test item was looked at (the results say which
methods and comparisons were added later):

- Every method has six trials, one for each learning rate, each with two seeds of its own on validation items. What decides is the
  mean of the share of right greedy texts and of right samples at temperature 1. Five seeds on the test items follow.
- Ranking helps in a regime where the interval of its difference to the same losses without ranking lies above 0, and the
  verifier's information where that of its difference to KD does; each by greedy text and by samples.
- Where ranking and the same losses without it end at different rates, ranking is tested at the other's rate as well: trials hardly
  tell two rates apart, and then nothing but the ranking differs. Online groups and settings are tested so as well.
- P-values are Holm's over the comparisons of a regime, task and measure (`COMPARISONS`), those to rivals and those of settings
  for themselves.

Stop the command when you like and start it again: runs that are done are not repeated.
"""

import argparse
from pathlib import Path

from grkd_trl.examples.regime_study.grid import (
    ABLATION_RATE,
    ABLATION_SEEDS,
    MAX_NEW_TOKENS,
    RATES,
    REGIMES,
    SEEDS,
    TASKS,
    TUNING_SEEDS,
)
from grkd_trl.examples.regime_study.run import run
from grkd_trl.examples.regime_study.study import study
from grkd_trl.examples.regime_study.tasks import GROUP_SETTINGS, make_start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", nargs="+", required=True, metavar="CSV")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--tasks", nargs="+", default=list(MAX_NEW_TOKENS), choices=list(MAX_NEW_TOKENS))
    parser.add_argument("--methods", nargs="+", help="all of a regime by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the test; by default 5, and 3 of ablations")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--tune", type=int, default=len(RATES), help="trials for each method, at most 6")
    parser.add_argument(
        "--pretraining", type=float, default=1.0, help="share of the steps that models are trained for"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)

    work_dir = args.output_dir / "models"
    for regime in args.regimes:
        shared, methods = REGIMES[regime]
        methods = {name: own for name, own in methods.items() if name in (args.methods or methods)}
        tuned = {"rates": RATES, "tune": args.tune, "tuning_seeds": TUNING_SEEDS}
        seeds = args.seeds or SEEDS
        if regime == "ablations":
            tuned, seeds = {"rates": (ABLATION_RATE,), "tune": 0, "tuning_seeds": []}, args.seeds or ABLATION_SEEDS
        for task in [name for name in TASKS[regime] if name in args.tasks]:
            given = {"task": task, "data": args.mawps, "work_dir": str(work_dir), "batch_size": 16}
            given |= {"max_new_tokens": MAX_NEW_TOKENS[task], "pretraining": args.pretraining}
            given |= {"num_prompts": 16 * args.max_steps, "learns_from": "groups"} | shared
            groups = [{key: own[key] for key in GROUP_SETTINGS if key in own} for own in methods.values()]
            for number, own in enumerate(groups):
                for seed in [*seeds, *tuned["tuning_seeds"]] if own not in groups[:number] else []:
                    make_start(given | own, seed)  # once, before the runs that share it
            common = {"task": f"{regime}, {task}", "budget": {"max_steps": args.max_steps}}
            common |= {"shared": given, "num_workers": args.num_workers}
            study(run, args.output_dir, methods, seeds=seeds, **tuned, **common)


if __name__ == "__main__":
    main()
