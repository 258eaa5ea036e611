"""The benchmarks of `evaluate.py`: what is asked, in which file answers go, who judges them, and what is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grkd_trl.evaluation import wilson_interval
from grkd_trl.evaluation.alpaca_eval2 import (
    ALPACA_EVAL2_QUESTIONS,
    alpaca_eval2_length_controlled_win_rate,
    alpaca_eval2_win_rate,
    read_alpaca_eval2_annotations,
    read_gamed_baselines,
    read_instruction_difficulty,
    write_alpaca_eval2_outputs,
)
from grkd_trl.evaluation.answers import write_answers
from grkd_trl.evaluation.arena_hard import (
    ARENA_HARD_QUESTIONS,
    arena_hard_answers,
    arena_hard_intervals,
    read_arena_hard_judgments,
    write_arena_hard_answers,
)
from grkd_trl.evaluation.files import field_of, read_rows
from grkd_trl.evaluation.gsm8k import GSM8K_QUESTIONS, gsm8k_conversation, gsm8k_verdicts
from grkd_trl.evaluation.mt_bench import (
    MT_BENCH_QUESTIONS,
    mt_bench_answers,
    mt_bench_averages,
    mt_bench_turns,
    write_mt_bench_answers,
)
from grkd_trl.evaluation.statistics import bootstrap_estimate


class Benchmark(NamedTuple):
    """
    A benchmark.

    Args:
        questions (`str`):
            File of its questions on the hub.
        max_new_tokens (`int`):
            Longest answer.
        answer (`Callable`):
            From a model, a tokenizer, questions, the file to write, the model's name and settings of generation.
        score (`Callable`):
            From the arguments of `evaluate.py` and the file that has the answers, or their judgments, to scores.
        file_name (`str`):
            Of the answers.
        judge_command (`str`, *optional*):
            The official tool that judges them, if one has to.
    """

    questions: str
    max_new_tokens: int
    answer: Callable[..., None]
    score: Callable[[Any, Path], dict]
    num_questions: int
    item: str | None = None  # field of a judgment that names its question; without one, each is another
    file_name: str = "{model}.jsonl"
    judge_command: str | None = None


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], **settings) -> list[str]:
    """An answer for each question, which is all of its prompt."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return write_answers(model, tokenizer, prompts, **settings)


def answer_gsm8k(model, tokenizer, questions: list[dict], path: Path, name: str, **settings) -> None:
    prompts = [
        gsm8k_conversation(field_of(row, "question", index, "questions")) for index, row in enumerate(questions)
    ]
    texts = write_answers(model, tokenizer, prompts, **settings)
    rows = [row | {"completion": text} for row, text in zip(questions, texts, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def score_gsm8k(args, answers: Path) -> dict:
    rows = read_rows(answers)
    completions, golds = [row["completion"] for row in rows], [row["answer"] for row in rows]
    scores = {}
    for method in ("strict", "flexible"):
        right = sum(gsm8k_verdicts(completions, golds, flexible=method == "flexible"))
        low, high = wilson_interval(right, len(rows))
        scores[method] = {"accuracy": right / len(rows), "low": low, "high": high}
    return scores


def answer_alpaca_eval2(model, tokenizer, questions: list[dict], path: Path, name: str, **settings) -> None:
    texts = ask(model, tokenizer, [row["instruction"] for row in questions], **settings)
    write_alpaca_eval2_outputs(path, questions, texts, generator=name)


def score_alpaca_eval2(args, judgments: Path) -> dict:
    read = read_alpaca_eval2_annotations(judgments)
    judged = read.preferences[np.isfinite(read.preferences)]
    interval = bootstrap_estimate((judged - 1)[None])  # of outcomes, where the judge gives no probabilities
    limits = {"low": 100 * float(interval.low), "high": 100 * float(interval.high)}
    scores = {"win_rate": alpaca_eval2_win_rate(judged), **limits}
    scores["failed_judgments"] = len(read.preferences) - len(judged)
    try:
        tables = read_instruction_difficulty(args.difficulty), read_gamed_baselines(args.gamed_baselines)
    except OSError as error:
        print(
            f"No length-controlled win rate: {error}. Give AlpacaEval 2's files as --difficulty and --gamed_baselines."
        )
        return scores
    return scores | {"length_controlled_win_rate": alpaca_eval2_length_controlled_win_rate(read, *tables)}


def answer_arena_hard(model, tokenizer, questions: list[dict], path: Path, name: str, **settings) -> None:
    texts = ask(model, tokenizer, [row["prompt"] for row in questions], **settings)
    write_arena_hard_answers(path, arena_hard_answers(questions, texts, model=name))


def score_arena_hard(args, judgments: Path) -> dict:
    return arena_hard_intervals(read_arena_hard_judgments(judgments), seed=args.seed)


def answer_mt_bench(model, tokenizer, questions: list[dict], path: Path, name: str, **settings) -> None:
    turns = mt_bench_turns(model, tokenizer, questions, **settings)
    write_mt_bench_answers(path, mt_bench_answers(questions, turns, model=name))


def score_mt_bench(args, judgments: Path) -> dict:
    return mt_bench_averages(read_rows(judgments))


def count_items(benchmark: Benchmark, answers: Path, scored: Path) -> dict[str, int]:
    """How many questions the scores are of, and of how many, where they are a subset."""
    rows, num_answers = read_rows(scored), len(read_rows(answers))
    num_items = len({row.get(benchmark.item, row.get("question_id")) for row in rows}) if benchmark.item else len(rows)
    if num_items != num_answers:
        print(
            f"The judgments are of {num_items} questions, and {answers} answers {num_answers}: are they of another run?"
        )
    counts = {"items": num_items}
    return counts | ({"subset_of": benchmark.num_questions} if num_items < benchmark.num_questions else {})


BENCHMARKS = {
    "gsm8k": Benchmark(GSM8K_QUESTIONS, 512, answer_gsm8k, score_gsm8k, 1319),
    "alpaca_eval2": Benchmark(
        ALPACA_EVAL2_QUESTIONS,
        2048,
        answer_alpaca_eval2,
        score_alpaca_eval2,
        805,
        file_name="model_outputs.json",
        judge_command="""\
pip install alpaca-eval  # and set OPENAI_API_KEY
alpaca_eval --model_outputs {answers} --annotators_config weighted_alpaca_eval_gpt4_turbo --output_path {folder}
# writes {folder}/weighted_alpaca_eval_gpt4_turbo/annotations.json""",
    ),
    "arena_hard": Benchmark(
        ARENA_HARD_QUESTIONS,
        4096,
        answer_arena_hard,
        score_arena_hard,
        500,
        item="uid",
        judge_command="""\
git clone https://github.com/lmarena/arena-hard-auto && cd arena-hard-auto  # with its data, see its README
cp {answers} data/arena-hard-v0.1/model_answer/{model}.jsonl
# name {model} in model_list of config/arena-hard-v0.1.yaml, then
python gen_judgment.py --setting-file config/arena-hard-v0.1.yaml
# writes data/arena-hard-v0.1/model_judgment/<judge>/{model}.jsonl""",
    ),
    "mt_bench": Benchmark(
        MT_BENCH_QUESTIONS,
        1024,
        answer_mt_bench,
        score_mt_bench,
        80,
        item="question_id",
        judge_command="""\
git clone https://github.com/lm-sys/FastChat && pip install -e "FastChat[model_worker,llm_judge]"
cd FastChat/fastchat/llm_judge && cp {answers} data/mt_bench/model_answer/{model}.jsonl
python gen_judgment.py --model-list {model} --judge-model gpt-4 --parallel 2
# writes data/mt_bench/model_judgment/gpt-4_single.jsonl""",
    ),
}
