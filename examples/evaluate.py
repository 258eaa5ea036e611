"""
Evaluate a saved model on a benchmark of the paper: write its answers, then score them.

GSM8K needs no judge:

    python examples/evaluate.py --benchmark gsm8k --model_name_or_path out --output_dir out/gsm8k

For the others the answers are written in the official tool's format, and the command stops with the official command
that judges them. Run that, then this again with its judgments. No answer is written twice, also where a run was stopped, unless
the model or the settings have changed:

    python examples/evaluate.py --benchmark alpaca_eval2 --model_name_or_path out --output_dir out/alpaca_eval2 \
        --judgments out/alpaca_eval2/weighted_alpaca_eval_gpt4_turbo/annotations.json

`--adapter_name_or_path` adds a LoRA adapter. Questions come from the hub, or from `--questions` (a path).
"""

import grkd_trl.examples.arguments.quick_help  # noqa: F401 # isort: skip # answers `--help` in a second

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.evaluation.alpaca_eval2 import ALPACA_EVAL2_DIFFICULTY, ALPACA_EVAL2_GAMED_BASELINES
from grkd_trl.evaluation.files import read_rows
from grkd_trl.examples.arguments.parser import ScriptParser
from grkd_trl.examples.evaluation.benchmarks import BENCHMARKS, count_items


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

    benchmark: str = field(metadata={"choices": list(BENCHMARKS)})
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


def load(args: EvaluateArguments):
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.adapter_name_or_path:
        model = PeftModel.from_pretrained(model, args.adapter_name_or_path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def main(args: EvaluateArguments):
    folder, benchmark = Path(args.output_dir).expanduser(), BENCHMARKS[args.benchmark]
    folder.mkdir(parents=True, exist_ok=True)
    name = args.model_id or Path(args.adapter_name_or_path or args.model_name_or_path).resolve().name
    answers = folder / benchmark.file_name.format(model=name)

    # Answers
    if args.judgments and answers.exists():
        print(f"{answers} exists, so the model is not asked again: the judgments are of what stands there.")
    else:
        questions = read_rows(args.questions or benchmark.questions)[: args.limit]
        part = answers.with_suffix(".part")
        part.touch()  # a place that cannot be written to is found before the model is asked
        written = answers.with_suffix(".written.jsonl")  # what this model wrote to these questions with these settings
        settings = {"max_new_tokens": args.max_new_tokens or benchmark.max_new_tokens, "batch_size": args.batch_size}
        model, tokenizer = load(args)
        benchmark.answer(model, tokenizer, questions, part, name, seed=args.seed, cache_path=written, **settings)
        part.replace(answers)
        print(f"Wrote {len(questions)} answers to {answers}")

    # Scores, or what is missing for them
    if benchmark.judge_command and args.judgments is None:
        command = benchmark.judge_command.format(answers=answers.resolve(), folder=folder.resolve(), model=name)
        print(f"\nNo --judgments yet. Judge the answers with the official tool:\n\n{command}\n")
        print("then run this command again with --judgments and that file.")
        return
    scored = args.judgments if benchmark.judge_command else answers
    scores = count_items(benchmark, answers, scored) | benchmark.score(args, scored)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    (evaluate_args,) = ScriptParser(EvaluateArguments, __doc__).parse_args_and_config()
    main(evaluate_args)
