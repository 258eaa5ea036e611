"""
Rank accuracy of a student that is shown the solution, on its own answers to MAWPS: how often does its mean log-probability put a
right equation above a wrong one for the same problem, by a verifier? Once with the problem alone, once with the solution in
`teacher_prompt`. The student, trained from scratch to read solutions, and its groups are those of `examples/regimes.py`.

    python examples/benchmarks/privileged_ranks.py --mawps mawps_fold0_train.csv mawps_fold0_dev.csv --output_dir regimes

Prints a line of JSON: means over the problems, with 95 % intervals.
"""

import argparse
import json

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.evaluation.statistics import bootstrap_estimate, paired_difference
from grkd_trl.examples.benchmarks.teacher_prompt import as_fields, rank_accuracy
from grkd_trl.examples.regime_study.grid import MAX_NEW_TOKENS, REGIMES, TUNING_SEEDS
from grkd_trl.examples.regime_study.tasks import make_start, verdicts
from grkd_trl.teacher import LocalTeacher


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", nargs="+", required=True, metavar="CSV")
    parser.add_argument(
        "--output_dir", required=True, help="Folder of models and groups, that of `regimes.py` or another."
    )
    parser.add_argument("--num_prompts", type=int, default=1600, help="Draws of problems that groups are made for.")
    parser.add_argument(
        "--pretraining", type=float, default=1.0, help="Share of the steps that the student is trained for."
    )
    args = parser.parse_args(argv)

    settings = {"task": "math_word", "data": args.mawps, "work_dir": f"{args.output_dir}/models"}
    settings |= {"num_prompts": args.num_prompts, "pretraining": args.pretraining}
    settings |= {"max_new_tokens": MAX_NEW_TOKENS["math_word"]} | REGIMES["privileged"][0]
    start = make_start(settings, TUNING_SEEDS[0])
    teacher = LocalTeacher(
        AutoModelForCausalLM.from_pretrained(start.teacher), AutoTokenizer.from_pretrained(start.teacher)
    )
    groups = start.groups
    prompts, completions, numbers, answers = (
        list(groups[name]) for name in ("prompt", "completions", "numbers", "answer")
    )
    right = verdicts(prompts, completions, numbers, answers)
    scores = {"problem": teacher.score(prompts, completions).scores, "solution": list(groups["teacher_scores"])}

    by_problem: dict[str, list[list[float]]] = {}  # a problem is drawn several times, with other answers
    for row, prompt in enumerate(prompts):
        correct = np.array(right[row], dtype=bool)
        if correct.any() and not correct.all():
            accuracies = [rank_accuracy(np.array(shown[row]), correct) for shown in scores.values()]
            by_problem.setdefault(prompt, []).append(accuracies)
    values = np.array([np.mean(drawn, axis=0) for drawn in by_problem.values()]).T[:, None]
    result = {"problems": len(by_problem)}
    result |= {name: as_fields(bootstrap_estimate(found)) for name, found in zip(scores, values, strict=True)}
    result["above_problem"] = as_fields(paired_difference(values[1], values[0]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
