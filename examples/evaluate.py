"""
Evaluate a saved model on a benchmark of the paper: write its answers, then score them.

GSM8K needs no judge:

    python examples/evaluate.py --benchmark gsm8k --model_name_or_path out --output_dir out/gsm8k

For the others the answers are written in the official tool's format, and the command stops with the official command
that judges them. Run that, then this again with its judgments; the answers are not written twice:

    python examples/evaluate.py --benchmark alpaca_eval2 --model_name_or_path out --output_dir out/alpaca_eval2 \
        --judgments out/alpaca_eval2/weighted_alpaca_eval_gpt4_turbo/annotations.json

`--adapter_name_or_path` adds a LoRA adapter. Questions come from the hub, or from `--questions` (a path).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from grkd_trl.evaluation import wilson_interval
from grkd_trl.evaluation.alpaca_eval2 import (
    ALPACA_EVAL2_DIFFICULTY,
    ALPACA_EVAL2_GAMED_BASELINES,
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
from grkd_trl.evaluation.files import read_rows
from grkd_trl.evaluation.gsm8k import (
    GSM8K_QUESTIONS,
    gsm8k_conversation,
    gsm8k_verdicts,
)
from grkd_trl.evaluation.mt_bench import (
    MT_BENCH_QUESTIONS,
    mt_bench_answers,
    mt_bench_averages,
    mt_bench_turns,
    write_mt_bench_answers,
)
from grkd_trl.evaluation.statistics import bootstrap_estimate


@dataclass
class EvaluateArguments:
    """
    Arguments of this script.

    Parameters:
        benchmark (`str`):
            `"gsm8k"`, `"alpaca_eval2"`, `"arena_hard"` or `"mt_bench"`.
        model_name_or_path (`str`):
            Hub id or path of the model.
        output_dir (`str`):
            Folder for the answers and `scores.json`.
        adapter_name_or_path (`str`, *optional*):
            Hub id or path of an adapter on the model.
        model_id (`str`, *optional*):
            Name of the model in the answers; the last part of its path by default.
        questions (`str`, *optional*):
            File of questions, in place of the official one on the hub.
        judgments (`str`, *optional*):
            File of judgments that the official tool wrote.
        difficulty (`str`, *optional*):
            AlpacaEval 2's `instruction_difficulty.csv`, in place of the one on the hub.
        gamed_baselines (`str`, *optional*):
            AlpacaEval 2's `df_gamed.csv`, in place of the one on the hub.
        limit (`int`, *optional*):
            Number of questions, to try a set-up.
        max_new_tokens (`int`, *optional*):
            Longest answer; 512 for GSM8K, 1024 for MT-Bench, 2048 for AlpacaEval 2 and 4096 for Arena-Hard by default.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions in a batch.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampled answers (MT-Bench's open questions), and of Arena-Hard's bootstrap.
    """

    benchmark: str = field(metadata={"choices": ["gsm8k", "alpaca_eval2", "arena_hard", "mt_bench"]})
    model_name_or_path: str
    output_dir: str
    adapter_name_or_path: str | None = None
    model_id: str | None = None
    questions: str | None = None
    judgments: str | None = None
    difficulty: str = ALPACA_EVAL2_DIFFICULTY
    gamed_baselines: str = ALPACA_EVAL2_GAMED_BASELINES
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    dtype: str = "auto"
    seed: int = 0


QUESTIONS = {
    "gsm8k": GSM8K_QUESTIONS,
    "alpaca_eval2": ALPACA_EVAL2_QUESTIONS,
    "arena_hard": ARENA_HARD_QUESTIONS,
    "mt_bench": MT_BENCH_QUESTIONS,
}
MAX_NEW_TOKENS = {"gsm8k": 512, "alpaca_eval2": 2048, "arena_hard": 4096, "mt_bench": 1024}
JUDGE_COMMANDS = {
    "alpaca_eval2": """\
pip install alpaca-eval  # and set OPENAI_API_KEY
alpaca_eval --model_outputs {answers} --annotators_config weighted_alpaca_eval_gpt4_turbo --output_path {folder}
# writes {folder}/weighted_alpaca_eval_gpt4_turbo/annotations.json""",
    "arena_hard": """\
git clone https://github.com/lmarena/arena-hard-auto && cd arena-hard-auto  # with its data, see its README
cp {answers} data/arena-hard-v0.1/model_answer/{model}.jsonl
# name {model} in model_list of config/arena-hard-v0.1.yaml, then
python gen_judgment.py --setting-file config/arena-hard-v0.1.yaml
# writes data/arena-hard-v0.1/model_judgment/<judge>/{model}.jsonl""",
    "mt_bench": """\
git clone https://github.com/lm-sys/FastChat && pip install -e "FastChat[model_worker,llm_judge]"
cd FastChat/fastchat/llm_judge && cp {answers} data/mt_bench/model_answer/{model}.jsonl
python gen_judgment.py --model-list {model} --judge-model gpt-4 --parallel 2
# writes data/mt_bench/model_judgment/gpt-4_single.jsonl""",
}


def load(args: EvaluateArguments):
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.adapter_name_or_path:
        model = PeftModel.from_pretrained(model, args.adapter_name_or_path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def answer(args: EvaluateArguments, questions: list[dict], answers: Path, name: str) -> None:
    model, tokenizer = load(args)
    set_seed(args.seed)
    settings = {
        "max_new_tokens": args.max_new_tokens or MAX_NEW_TOKENS[args.benchmark],
        "batch_size": args.batch_size,
    }
    if args.benchmark == "mt_bench":
        turns = mt_bench_turns(model, tokenizer, questions, **settings)
        write_mt_bench_answers(answers, mt_bench_answers(questions, turns, model=name))
        return
    if args.benchmark == "gsm8k":
        prompts = [gsm8k_conversation(row["question"]) for row in questions]
    else:
        key = "instruction" if args.benchmark == "alpaca_eval2" else "prompt"
        prompts = [[{"role": "user", "content": row[key]}] for row in questions]
    texts = write_answers(model, tokenizer, prompts, **settings)
    if args.benchmark == "gsm8k":
        rows = [row | {"completion": text} for row, text in zip(questions, texts, strict=True)]
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif args.benchmark == "alpaca_eval2":
        write_alpaca_eval2_outputs(answers, questions, texts, generator=name)
    else:
        rows = arena_hard_answers(questions, texts, model=name)
        write_arena_hard_answers(answers, rows)


def score(args: EvaluateArguments, answers: Path) -> dict:
    if args.benchmark == "gsm8k":
        rows = read_rows(answers)
        completions, golds = [row["completion"] for row in rows], [row["answer"] for row in rows]
        scores = {}
        for method in ("strict", "flexible"):
            right = sum(gsm8k_verdicts(completions, golds, flexible=method == "flexible"))
            low, high = wilson_interval(right, len(rows))
            scores[method] = {"accuracy": right / len(rows), "low": low, "high": high}
        return scores
    if args.benchmark == "alpaca_eval2":
        judgments = read_alpaca_eval2_annotations(args.judgments)
        judged = judgments.preferences[np.isfinite(judgments.preferences)]
        interval = bootstrap_estimate((judged - 1)[None] * 100)
        scores = {"win_rate": alpaca_eval2_win_rate(judged), "low": float(interval.low), "high": float(interval.high)}
        scores["failed_judgments"] = len(judgments.preferences) - len(judged)
        try:
            tables = read_instruction_difficulty(args.difficulty), read_gamed_baselines(args.gamed_baselines)
        except OSError as error:
            print(
                f"No length-controlled win rate: {error}. Give AlpacaEval 2's files as --difficulty and --gamed_baselines."
            )
            return scores
        return scores | {"length_controlled_win_rate": alpaca_eval2_length_controlled_win_rate(judgments, *tables)}
    if args.benchmark == "arena_hard":
        return arena_hard_intervals(read_arena_hard_judgments(args.judgments), seed=args.seed)
    return mt_bench_averages(read_rows(args.judgments))


def main(args: EvaluateArguments):
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = args.model_id or Path(args.adapter_name_or_path or args.model_name_or_path).resolve().name
    answers = folder / ("model_outputs.json" if args.benchmark == "alpaca_eval2" else f"{name}.jsonl")

    # Answers
    if answers.exists():
        print(f"{answers} is there: the model is not asked again. Remove the file to ask it.")
    else:
        questions = read_rows(args.questions or QUESTIONS[args.benchmark])[: args.limit]
        part = answers.with_suffix(".part")
        answer(args, questions, part, name)
        part.rename(answers)
        print(f"Wrote {len(questions)} answers to {answers}")

    # Scores, or what is missing for them
    if args.benchmark != "gsm8k" and args.judgments is None:
        command = JUDGE_COMMANDS[args.benchmark].format(answers=answers.resolve(), folder=folder.resolve(), model=name)
        print(f"\nNo --judgments yet. Judge the answers with the official tool:\n\n{command}\n")
        print("then run this command again with --judgments and that file.")
        return
    scores = score(args, answers)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    (evaluate_args,) = TrlParser(EvaluateArguments).parse_args_and_config()
    main(evaluate_args)
