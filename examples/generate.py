"""
Answer prompts with one model or several, and show the answers side by side with a teacher's scores.

    python examples/generate.py --model out --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts prompts.jsonl \
        --teacher HuggingFaceTB/SmolLM2-360M-Instruct --output_file answers.jsonl

A model is a hub id, or the path of a model or of an adapter. A row of `--prompts` has `prompt`, as text or messages; a
.txt file has a prompt a line. A text is passed to the model unchanged, or with `--chat` as a user message. The
teacher's score is the mean log-probability of an answer's tokens, in nats. A row of `--output_file` is a group: prompt,
completions, who wrote each, whether it was cut, and the scores.
"""

import argparse
import json
import shutil
import statistics
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from grkd_trl.data import is_score, message_text, read_prompt
from grkd_trl.evaluation.files import read_rows
from grkd_trl.generation.core import as_groups
from grkd_trl.teacher import LocalTeacher, load_teacher


def read_prompts(path: str, chat: bool) -> list[Any]:
    if path.endswith(".txt"):
        rows = [{"prompt": line} for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        rows = read_rows(path)
    prompts = [read_prompt(row, index) for index, row in enumerate(rows)]
    return [[{"role": "user", "content": text}] if chat and isinstance(text, str) else text for text in prompts]


def load(name: str, args: argparse.Namespace) -> LocalTeacher:
    model = load_teacher(name, {"dtype": args.dtype}).to("cuda" if torch.cuda.is_available() else "cpu")
    return LocalTeacher(model, AutoTokenizer.from_pretrained(name), prompts_per_batch=args.batch_size, progress=True)


def columns(texts: Sequence[str], width: int) -> str:
    """Texts beside each other, each wrapped in a column."""
    width = max((width - 3 * (len(texts) - 1)) // len(texts), 20)
    wrapped = [[part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]] for text in texts]
    return "\n".join(
        " | ".join(cell.ljust(width) for cell in cells).rstrip() for cells in zip_longest(*wrapped, fillvalue="")
    )


def show(groups: list[dict[str, Any]], models: list[str]) -> str:
    """Each prompt with its answers in columns, and a table of all."""
    width, lines = shutil.get_terminal_size((120, 24)).columns, []
    for group in groups:
        prompt = group["prompt"] if isinstance(group["prompt"], str) else message_text(group["prompt"][-1])
        scores = group.get("teacher_scores") or [None] * len(models)
        heads = [
            name if score is None else f"{name} ({score:.3f})" for name, score in zip(models, scores, strict=True)
        ]
        answers = [
            text.strip() + (" [cut]" if cut else "")
            for text, cut in zip(group["completions"], group["clipped"], strict=True)
        ]
        lines += [
            "=" * width,
            textwrap.fill(prompt, width),
            "-" * width,
            columns(heads, width),
            columns(answers, width),
        ]
    lines += ["=" * width, "", "| model | characters, median | cut | teacher's score, mean | best of its prompt |"]
    lines.append("|---|---|---|---|---|")
    for position, name in enumerate(models):
        length = statistics.median(len(group["completions"][position]) for group in groups)
        cut = statistics.mean(group["clipped"][position] for group in groups)
        scored = [group["teacher_scores"] for group in groups if None not in group.get("teacher_scores", [None])]
        mean = f"{statistics.mean(scores[position] for scores in scored):.3f}" if scored else ""
        best = f"{sum(scores[position] == max(scores) for scores in scored)} of {len(scored)}" if scored else ""
        lines.append(f"| {name} | {length:.0f} | {cut:.0%} | {mean} | {best} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="hub id or path; give it again for each model")
    parser.add_argument("--prompts", required=True, help="file: .jsonl, .json, .parquet, .csv, or .txt")
    parser.add_argument("--teacher", help="hub id or path of a model that scores the answers, with its own tokenizer")
    parser.add_argument("--output_file", type=Path, help="where the answers go, as .jsonl")
    parser.add_argument("--chat", action="store_true", help="give a prompt that is a text as a user's message")
    parser.add_argument("--limit", type=int, help="number of prompts, the first ones")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most likely token")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="share of the probability to sample from (default: 1)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="prompts in a batch (default: 16)")
    parser.add_argument("--dtype", default="auto", help="dtype of all models (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled answers (default: 0)")
    args = parser.parse_args(argv)
    if args.output_file and args.output_file.exists():
        parser.error(f"{args.output_file} exists: give another --output_file, or remove it")
    if len(set(args.model)) < len(args.model):
        parser.error("each --model must be another one")
    try:
        prompts = read_prompts(args.prompts, args.chat)[: args.limit]
    except (OSError, ValueError) as error:
        parser.error(f"--prompts: {error}")

    # Answers, one model in memory at a time
    written = {}
    for name in args.model:
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
        written[name] = load(name, args).generate(prompts, 1, seed=args.seed, **sampling)
        too_long = [row for row, texts in enumerate(written[name].texts) if not texts]
        if too_long:
            parser.error(f"prompt {too_long[0]} leaves {name} no room for {args.max_new_tokens} tokens in its context")
    groups = as_groups([{"prompt": prompt} for prompt in prompts], written)

    # Scores
    if args.teacher:
        given = {name: [group[name] for group in groups] for name in ("clipped", "prompt_ids", "completion_ids")}
        given |= {"tokenizer_hash": [group["tokenizer_hash"] for group in groups]}
        scored = load(args.teacher, args).score(prompts, [group["completions"] for group in groups], columns=given)
        for group, scores in zip(groups, scored.scores, strict=True):
            group["teacher_scores"] = [score if is_score(score) else None for score in scores]

    print(show(groups, args.model))
    if args.output_file:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(group, ensure_ascii=False) + "\n" for group in groups]
        args.output_file.write_text("".join(lines), encoding="utf-8")
        print(f"\n{len(groups)} prompts with their answers in {args.output_file}")


if __name__ == "__main__":
    main()
