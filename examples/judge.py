"""
Judge answers with a model behind an OpenAI-compatible endpoint, a local one too. The key is read from OPENAI_API_KEY.

Against another model's answers to the same prompts, each pair in both orders:

    python examples/judge.py --answers out/arena_hard/out.jsonl --baseline base/arena_hard/base.jsonl \
        --judge_model gpt-4.1 --output_dir out/judged --prices 2 8

MT-Bench, with the official prompts and ratings from 1 to 10:

    python examples/judge.py --answers out/mt_bench/out.jsonl --mt_bench_data FastChat/fastchat/llm_judge/data \
        --judge_model my-judge --base_url http://localhost:8000/v1 --output_dir out/judged

A server on this machine needs no key. Replies are kept in `--output_dir`, so a run that was stopped resumes and no request
is paid twice. These figures are this judge's: they compare your models, not yours with a published table.
"""

import grkd_trl.examples.arguments.quick_help  # noqa: F401 # isort: skip # answers `--help` in a second

import json
from dataclasses import dataclass
from pathlib import Path

from grkd_trl.evaluation.files import read_rows
from grkd_trl.evaluation.judge import (
    JudgeClient,
    judge_pairs,
    pair_answers,
    pairwise_requests,
    read_answers,
    summarize_shares,
)
from grkd_trl.evaluation.judge_client import warn_of_unread
from grkd_trl.evaluation.mt_bench import mt_bench_averages, mt_bench_rating, mt_bench_requests
from grkd_trl.examples.arguments.parser import ScriptParser


@dataclass
class JudgeArguments:
    """
    Arguments of this script.

    Parameters:
        answers (`str`):
            The model's answers: AlpacaEval's, Arena-Hard's or MT-Bench's file, or rows `prompt`, `completion`.
        output_dir (`str`):
            Folder for the replies and `judged.json`.
        judge_model (`str`):
            Name of the judge at the endpoint.
        base_url (`str`, *optional*):
            Endpoint; OpenAI's by default.
        baseline (`str`, *optional*):
            Answers of the model to compare with.
        mt_bench_data (`str`, *optional*):
            The official tool's `data` folder; rates MT-Bench's answers.
        prices (`list[float]`, *optional*):
            Prices of a million input and of a million output tokens. Without them the cost is unknown.
        max_cost (`float`, *optional*):
            Highest price to start at; needs `--prices`.
        num_workers (`int`, *optional*, defaults to `8`):
            Requests under way at a time.
    """

    answers: str
    output_dir: str
    judge_model: str
    base_url: str | None = None
    baseline: str | None = None
    mt_bench_data: str | None = None
    prices: list[float] | None = None
    max_cost: float | None = None
    num_workers: int = 8


def announce(args: JudgeArguments, client: JudgeClient, conversations: list) -> None:
    cost = client.cost(conversations, prices=args.prices)
    print(
        f"{cost.requests} requests ({cost.cached} known already), about {cost.input_tokens} input tokens and at most "
        f"{cost.output_tokens} output tokens."
    )
    if cost.price is None:
        print("Cost unknown: give --prices, those of a million input and of a million output tokens.")
        return
    print(f"Cost: at most {cost.price:.2f} at {args.prices} for a million.")
    if args.max_cost is not None and cost.price > args.max_cost:
        raise SystemExit(f"That is above --max_cost {args.max_cost}: nothing was sent.")


def rate(args: JudgeArguments, client: JudgeClient) -> dict:
    """MT-Bench: each turn of each answer by itself."""
    data = Path(args.mt_bench_data).expanduser()
    questions, answers = read_rows(data / "mt_bench/question.jsonl"), read_rows(args.answers)
    answered = {row["question_id"] for row in answers}
    subset = [row for row in questions if row["question_id"] in answered]
    requests = mt_bench_requests(
        subset,
        answers,
        read_rows(data / "judge_prompts.jsonl"),
        read_rows(data / "mt_bench/reference_answer/gpt-4.jsonl"),
    )
    conversations = [messages for _, messages in requests]
    announce(args, client, conversations)
    replies = client.ask(conversations)
    ratings = [mt_bench_rating(text) for text in replies]
    warn_of_unread(replies, [rating >= 0 for rating in ratings], "a rating")
    averages = mt_bench_averages([row | {"score": rating} for (row, _), rating in zip(requests, ratings, strict=True)])
    items = {"items": len(subset)} | ({"subset_of": len(questions)} if len(subset) < len(questions) else {})
    return items | averages


def compare(args: JudgeArguments, client: JudgeClient) -> dict:
    """Pairs of answers to the same prompts, each in both orders."""
    prompts, completions, baselines = pair_answers(read_answers(args.answers), read_answers(args.baseline))
    announce(args, client, [messages for messages, _ in pairwise_requests(prompts, completions, baselines)])
    shares = judge_pairs(client, prompts, completions, baselines)
    return summarize_shares(shares) | {"per_pair": shares}


def main(args: JudgeArguments):
    folder = Path(args.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    client = JudgeClient(
        args.judge_model, folder / "replies.jsonl", base_url=args.base_url, num_workers=args.num_workers
    )
    judged = rate(args, client) if args.mt_bench_data else compare(args, client)
    (folder / "judged.json").write_text(json.dumps(judged, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in judged.items() if name != "per_pair"}, indent=2))


if __name__ == "__main__":
    parser = ScriptParser(JudgeArguments, __doc__)
    (judge_args,) = parser.parse_args_and_config()
    if (judge_args.baseline is None) == (judge_args.mt_bench_data is None):
        parser.error("give either --baseline, to compare two models, or --mt_bench_data, to rate one")
    if judge_args.prices is not None and len(judge_args.prices) != 2:
        parser.error("--prices takes two, of a million input and of a million output tokens")
    if judge_args.max_cost is not None and judge_args.prices is None:
        parser.error("--max_cost needs --prices: without them the cost is unknown")
    main(judge_args)
