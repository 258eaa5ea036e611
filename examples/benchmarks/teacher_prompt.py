"""
Rank accuracy of a teacher that is shown more than the student: on GSM8K's sampled solutions, each verified, how often does
the teacher's mean log-probability put a correct solution above an incorrect one of the same problem? Once with the question
alone, once with the reference solution in `teacher_prompt`, and once with its final answer. No training.

    python examples/benchmarks/teacher_prompt.py --solutions example_model_solutions.jsonl.gz

Prints a line of JSON for each: means over the problems, with 95 % intervals.
"""

import argparse
import json

import numpy as np
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.evaluation.statistics import bootstrap_estimate, paired_difference
from grkd_trl.teacher import score_groups


WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
SHOWN = {
    "question": None,
    "solution": "{question}\n\nA correct solution, for reference:\n{solution}",
    "answer": "{question}\n\nThe correct answer is {answer}.",
}


def read_problems(path, num_problems):
    """Problems with a correct and an incorrect solution, in the file's order."""
    rows = load_dataset("json", data_files=path, split="train")
    mixed = [row for row in rows if 0 < sum(row[name]["is_correct"] for name in WRITERS) < len(WRITERS)]
    return mixed[:num_problems]


def make_groups(problems, shown):
    """The student's prompt is the question; the teacher's shows what `shown` says."""
    rows = []
    for problem in problems:
        row = {"prompt": [{"role": "user", "content": problem["question"]}]}
        row["completions"] = [problem[name]["solution"] for name in WRITERS]
        if shown is not None:
            solution = problem["ground_truth"]
            values = {"question": problem["question"], "solution": solution, "answer": solution.rpartition("A: ")[2]}
            row["teacher_prompt"] = [{"role": "user", "content": shown.format(**values)}]
        rows.append(row)
    return Dataset.from_list(rows)


def rank_accuracy(scores, correct):
    """Share of the pairs of a correct and an incorrect solution that the scores order so; a tie is half."""
    right, wrong = scores[correct], scores[~correct]
    gaps = right[:, None] - wrong[None, :]
    return ((gaps > 0) + 0.5 * (gaps == 0)).mean()


def as_fields(estimate):
    return {name: round(float(getattr(estimate, name)), 4) for name in ("mean", "low", "high")}


def main(args):
    problems = read_problems(args.solutions, args.num_problems)
    correct = np.array([[problem[name]["is_correct"] for name in WRITERS] for problem in problems])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    accuracies = {}
    for name, shown in SHOWN.items():
        scored = score_groups(model, tokenizer, make_groups(problems, shown), progress=args.progress)
        scores = np.array(scored["teacher_scores"][:])
        accuracies[name] = np.array([[rank_accuracy(*pair) for pair in zip(scores, correct, strict=True)]])
        result = {"shown": name, "problems": len(problems), "score": round(scores.mean(), 4)}
        result["rank_accuracy"] = as_fields(bootstrap_estimate(accuracies[name]))
        if shown is not None:
            gain = paired_difference(accuracies[name], accuracies["question"])
            result["above_question"] = as_fields(gain)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solutions", required=True, help="GSM8K's `example_model_solutions.jsonl`, or its .gz.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="The teacher.")
    parser.add_argument("--num_problems", type=int, default=200, help="Problems that have solutions of both kinds.")
    parser.add_argument("--progress", action="store_true", help="Show progress bars.")
    main(parser.parse_args())
