"""
Is a teacher a judge? The share of preferred answers that it puts above the other one: by the mean log-probability of an
answer's tokens, and by what it picks when it is asked (`CalibratedTeacher` with `ratio` 0); beside them, the longer answer.

    python examples/benchmarks/preferences.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --pairs preferences.jsonl

Rows have `prompt`, `chosen` and `rejected` (UltraFeedback), or `prompt`, `completions` (the best first) and `ranks`
(OpenAssistant), whose pairs of different ranks count. Calibrate a teacher whose picks are right clearly more often than its
log-probabilities. Prints a line of JSON: means over the rows, with 95 % intervals.
"""

import argparse
import json
from itertools import combinations
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.data import encode_prompt
from grkd_trl.evaluation.statistics import bootstrap_estimate
from grkd_trl.examples.benchmarks.teacher_prompt import as_fields
from grkd_trl.teacher import LocalTeacher, selection_probs


def as_group(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str], list[int]]:
    """A row's prompt as messages, its answers, and their ranks, 0 for the best."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if "chosen" in row:
        return messages, [row["chosen"], row["rejected"]], [0, 1]
    return messages, row["completions"], row["ranks"]


def right_share(scores: list[float], ranks: list[int]) -> float:
    """Share of the pairs of different ranks whose better answer has the higher score; an equal score is half right."""
    pairs = [(i, j) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]]
    signs = [np.sign(scores[i] - scores[j]) * (1 if ranks[i] < ranks[j] else -1) for i, j in pairs]
    return float(np.mean([(sign + 1) / 2 for sign in signs]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--pairs", required=True, metavar="JSONL")
    parser.add_argument(
        "--max_tokens", type=int, default=256, help="of a prompt and of each answer; longer rows are left out"
    )
    parser.add_argument(
        "--num_rows", type=int, default=200, help="at most so many rows, the first that are short enough"
    )
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = LocalTeacher(model, tokenizer)
    found: dict[str, list[float]] = {name: [] for name in ("log-probability", "picks", "longer")}
    for row in load_dataset("json", data_files=args.pairs, split="train"):
        prompt, answers, ranks = as_group(row)
        lengths = [len(tokenizer(answer).input_ids) for answer in answers]
        if max(len(encode_prompt(tokenizer, prompt)), *lengths) > args.max_tokens or len(set(ranks)) < 2:
            continue
        found["log-probability"].append(right_share(teacher.score([prompt], [answers]).scores[0], ranks))
        found["picks"].append(right_share(selection_probs(model, tokenizer, prompt, answers), ranks))
        found["longer"].append(right_share(lengths, ranks))
        if len(found["picks"]) == args.num_rows:
            break
    if not found["picks"]:
        parser.error(f"no row of {args.pairs} has a prompt and answers of at most {args.max_tokens} tokens")
    shares = {name: as_fields(bootstrap_estimate(np.array(values)[None])) for name, values in found.items()}
    print(json.dumps({"rows": len(found["picks"])} | shares))


if __name__ == "__main__":
    main()
