"""
Which loss of the pairwise family a classifier should learn from: 24 cells of the family and five rivals on BANKING77 and
CLINC150, without and with 40 % of wrong labels.

    python examples/pairwise_study.py --data my_data --output_dir pairwise_study

`my_data` holds the folders `banking77` and `clinc150` of their published files. A cell is `ranking_temperature` /
`target_temperature` (1, 2, 4, or infinite, which is the paper's loss), times what a pair or a row weighs (the same, by
probability, by doubt), times raw or standardized logits in the first round, where the relative loss is alone, or times the
share of the labels (0 or 0.3) in the second, since the first lost by far. Every method has 24 trials with one seed on
validation rows: the cells, and for a rival two learning rates, six temperatures and two shares of the labels. Two rules choose
a cell in each round, and both are tested with five seeds beside the rivals:

- `chosen`: on each task the best trial of the validation rows;
- `one cell`: on all tasks the cell with the best mean rank on the validation rows of all four.

Those of a round were fixed before it looked at a test row; the second came after the test of the first. A rule is good where
its student is the first or within 0.5 points of the best rival on all four tasks. Stop the command when you like and start it
again: runs that are done are not repeated.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.report import write_report
from grkd_trl.evaluation.results import read_results
from grkd_trl.examples.comparison.classes import prepare, run


RATE, RATES = 6e-2, (3e-2, 6e-2)  # of the family, and of the rivals
RATIOS = (1.0, 2.0, 4.0, None)  # the student's margins at the optimum, over the teacher's; None is the paper's loss
WEIGHTS = ({}, {"pair_weights": "probability"}, {"weigh_by_doubt": True})
RIVALS = ("kd", "kd_standardized", "kendall", "dist", "pld")
TASKS = list(product(("banking77", "clinc150"), (0.0, 0.4)))
ALONE = {"alpha_start": 1.0, "alpha_end": 1.0}
ROUNDS = {"grkd family": False, "grkd family with labels": True}
TUNING_SEED, SEEDS, BUDGET = 1000, [0, 1, 2, 3, 4], {"max_steps": 100}


def family(with_labels: bool) -> list[dict[str, Any]]:
    """The 24 cells of a round."""
    cells = []
    for ratio, weights, further in product(RATIOS, WEIGHTS, (False, True)):
        temperatures = {"ranking_temperature": ratio or 1.0, "target_temperature": 1.0 if ratio else 0.0}
        last = {"hard_label_weight": 0.3 * further} if with_labels else {"standardize": further}
        cells.append(ALONE | temperatures | weights | last | {"learning_rate": RATE})
    return cells


def rival() -> list[dict[str, Any]]:
    """As many settings of a rival."""
    return [
        {"learning_rate": rate, "temperature": soft, "hard_label_weight": share, "distillation_weight": 1 - share}
        for rate, soft, share in product(RATES, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.0, 0.3))
    ]


def best_on_all(trials: list[dict[str, Any]], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The cell with the best mean rank over the tasks."""
    ranks = [0.0] * len(cells)
    for name in {trial["task"] for trial in trials}:
        found = [trial["metrics"]["accuracy"] for trial in trials if trial["task"] == name]
        for number, accuracy in enumerate(found):
            ranks[number] += sum(other > accuracy for other in found)
    return cells[min(range(len(cells)), key=ranks.__getitem__)]  # the first of equals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Folder with the folders banking77 and clinc150.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_workers", type=int, default=1, help="Runs at a time.")
    args = parser.parse_args()

    cells, given = {name: family(with_labels) for name, with_labels in ROUNDS.items()}, {}
    spaces = {f"{name}, chosen": points for name, points in cells.items()} | dict.fromkeys(RIVALS, rival())
    for name, noise in TASKS:
        shared = {"dataset": name, "noise_type": "uniform", "label_noise": noise, "batch_size": 256, "data": args.data}
        shared["work_dir"] = str(args.output_dir / "models")
        for seed in [TUNING_SEED, *SEEDS]:
            prepare(shared, seed)  # once, before the runs that share it
        task = f"{name}, {noise:.0%} noise" if noise else name
        given[task] = {"task": task, "budget": BUDGET, "shared": shared, "num_workers": args.num_workers}
        tuned = {"search_space": spaces, "tune": len(rival()), "tuning_seed": TUNING_SEED}
        compare(run, args.output_dir, methods=list(spaces), seeds=SEEDS, **tuned, **given[task])
    rows = read_results(args.output_dir / "tuning.jsonl")
    one = {}
    for name, points in cells.items():
        trials = [row for row in rows if row["method"].startswith(f"{name}, chosen trial ")]
        trials.sort(key=lambda row: (row["task"], int(row["method"].split()[-1])))
        one[f"{name}, one cell"] = best_on_all(trials, points)
    for shared in given.values():
        results = compare(run, args.output_dir, methods=list(one), seeds=SEEDS, settings=one, **shared)
    for path in write_report(results, args.output_dir / "report", reference="kd")[:2]:
        print(path)


if __name__ == "__main__":
    main()
