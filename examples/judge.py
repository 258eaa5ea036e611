"""
Judge answers with a model behind an OpenAI-compatible endpoint, a local one too. The key is read from OPENAI_API_KEY.

Against another model's answers to the same prompts, each pair in both orders:

    python examples/judge.py --answers out/arena_hard/out.jsonl --baseline base/arena_hard/base.jsonl \
        --judge_model gpt-4.1 --output_dir out/judged --prices 2 8

MT-Bench, with the official prompts and ratings from 1 to 10:

    python examples/judge.py --answers out/mt_bench/out.jsonl --mt_bench_data FastChat/fastchat/llm_judge/data \
        --judge_model my-judge --base_url http://localhost:8000/v1 --output_dir out/judged

Replies are kept in `--output_dir`, so a run that was stopped goes on, and no request is paid twice. These figures are
this judge's: they compare your models, not yours with a published table.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import TrlParser

from grkd_trl.evaluation.files import read_rows
from grkd_trl.evaluation.judge import JudgeClient, judge_pairs, pairwise_requests, read_answers
from grkd_trl.evaluation.mt_bench import mt_bench_averages, mt_bench_rating, mt_bench_requests
from grkd_trl.evaluation.statistics import bootstrap_estimate


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
        prices (`list[float]`, *optional*, defaults to `[0, 0]`):
            Price of a million input and output tokens.
        max_cost (`float`, *optional*):
            Highest price to start at.
        num_workers (`int`, *optional*, defaults to `8`):
            Requests under way at a time.
    """

    answers: str
    output_dir: str
    judge_model: str
    base_url: str | None = None
    baseline: str | None = None
    mt_bench_data: str | None = None
    prices: list[float] = field(default_factory=lambda: [0.0, 0.0])
    max_cost: float | None = None
    num_workers: int = 8


def announce(args: JudgeArguments, client: JudgeClient, conversations: list) -> None:
    cost = client.cost(conversations, prices=tuple(args.prices))
    print(
        f"{cost.requests} requests ({cost.cached} known already), about {cost.input_tokens} input tokens and at most"
    )
    print(f"{cost.output_tokens} output tokens: at most {cost.price:.2f} at {args.prices} for a million.")
    if args.max_cost is not None and cost.price > args.max_cost:
        raise SystemExit(f"That is above --max_cost {args.max_cost}: nothing was sent.")


def main(args: JudgeArguments):
    folder = Path(args.output_dir)
    client = JudgeClient(
        args.judge_model, folder / "replies.jsonl", base_url=args.base_url, num_workers=args.num_workers
    )
    if args.mt_bench_data:
        data = Path(args.mt_bench_data)
        requests = mt_bench_requests(
            read_rows(data / "mt_bench/question.jsonl"),
            read_rows(args.answers),
            read_rows(data / "judge_prompts.jsonl"),
            read_rows(data / "mt_bench/reference_answer/gpt-4.jsonl"),
        )
        conversations = [messages for _, messages in requests]
        announce(args, client, conversations)
        replies = client.ask(conversations)
        rows = [row | {"score": mt_bench_rating(text)} for (row, _), text in zip(requests, replies, strict=True)]
        judged = mt_bench_averages(rows)
    else:
        baseline = dict(read_answers(args.baseline))
        answered = read_answers(args.answers)
        if missing := [prompt for prompt, _ in answered if prompt not in baseline]:
            raise SystemExit(f"--baseline has no answer to {len(missing)} prompts of --answers, e.g. {missing[0]!r}.")
        prompts, completions = map(list, zip(*answered, strict=True))
        baselines = [baseline[prompt] for prompt in prompts]
        announce(args, client, [messages for messages, _ in pairwise_requests(prompts, completions, baselines)])
        shares = judge_pairs(client, prompts, completions, baselines)
        won = np.array([share for share in shares if share is not None], dtype=float)[None]
        judged = {"pairs": len(shares), "without_verdict": shares.count(None), "per_pair": shares}
        if won.size:
            share = bootstrap_estimate(won)
            judged |= {"won": float(share.mean), "low": float(share.low), "high": float(share.high)}
    (folder / "judged.json").write_text(json.dumps(judged, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in judged.items() if name != "per_pair"}, indent=2))


if __name__ == "__main__":
    parser = TrlParser(JudgeArguments)
    (judge_args,) = parser.parse_args_and_config()
    if (judge_args.baseline is None) == (judge_args.mt_bench_data is None):
        parser.error("give either --baseline, to compare two models, or --mt_bench_data, to rate one")
    main(judge_args)
