"""
Which learning rate: GRKD, KD, SimPO and DPO at five rates each, all parameters and LoRA, on a pruned model.

    python examples/benchmarks/learning_rates.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --prompts prompts.jsonl --output_dir learning_rates

The student is the model without its six middle layers, and the model is its teacher. Both write a completion of each prompt
and the teacher scores them; each method trains a fresh copy of the student on these groups at a constant rate, and is
measured on held-out groups by the same two numbers: the cross-entropy with the teacher's next-token distributions, and
the share of pairs in the teacher's order. Rerun to resume: `results.jsonl` has a line for each run.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

import grkd_trl
from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.pruning.layers import drop_layers
from grkd_trl.examples.pruning.prompts import PROMPTS, short_prompts
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher


METHODS = ("GRKD", "SimPO", "KD", "DPO")
RATES = {"full": (1e-6, 1e-5, 5e-5, 2e-4, 1e-3), "LoRA": (1e-5, 1e-4, 5e-4, 2e-3, 1e-2)}
MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH = 56, 24


def settings(output_dir: Path, **given) -> dict:
    """What all runs share of their configuration."""
    return {
        "output_dir": str(output_dir / "runs"),
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **given,
    }


def make_groups(args, teacher: LocalTeacher, student: LocalTeacher, tokenizer) -> tuple[Dataset, Dataset]:
    """Groups of two, one completion by each model: those to train on and those held out."""
    rows = load_dataset("json", data_files=args.prompts, split="train")["prompt"] if args.prompts else PROMPTS
    prompts = short_prompts(rows, tokenizer, MAX_PROMPT_LENGTH, 2 * args.max_steps + args.num_held_out, seed=0)
    config = GroupsConfig(
        output_dir=str(args.output_dir / "groups"),
        completion_source="mixed",
        num_completions=2,
        num_drawn=2,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    groups = generate_groups(prompts, config, student=student, teacher=teacher)
    return groups.select(range(args.num_held_out, len(groups))), groups.select(range(args.num_held_out))


def measure(model, teacher, tokenizer, held_out: Dataset, output_dir: Path) -> dict[str, float]:
    """The two numbers of a student, whatever trained it."""
    trainer = GRKDTrainer(
        model,
        teacher,
        GRKDConfig(**settings(output_dir)),
        train_dataset=held_out,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    evaluated = trainer.evaluate()
    return {name: evaluated[f"eval_{name}"] for name in ("loss/soft", "rank/accuracy")}


def train(method: str, kind: str, rate: float, student, teacher, tokenizer, groups: Dataset, args) -> torch.nn.Module:
    """A copy of the student after training by a method, with `kind` "full" or "LoRA"."""
    config = getattr(grkd_trl, f"{method}Config")(
        **settings(args.output_dir, learning_rate=rate, max_steps=args.max_steps)
    )
    teaching = {"teacher_model": teacher} if method in ("GRKD", "KD") else {}  # the others read the scores
    if method == "DPO" and kind == "full":
        teaching["ref_model"] = copy.deepcopy(student)  # TRL would load one by the student's name, which it has not
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if kind == "LoRA" else None
    trainer = getattr(grkd_trl, f"{method}Trainer")(
        copy.deepcopy(student),
        args=config,
        train_dataset=groups,
        processing_class=tokenizer,
        peft_config=adapters,
        **teaching,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def tables(rows: list[dict]) -> str:
    """For each kind of training a table of both numbers by rate and method, in Markdown."""
    found = {(row["method"], row["kind"], row["learning_rate"]): row for row in rows}

    def cell(key: tuple) -> str:
        return f"{found[key]['loss/soft']:.3f}, {found[key]['rank/accuracy']:.2f}" if key in found else ""

    lines = []
    for kind, rates in RATES.items():
        lines += [f"\n| {kind} | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
        lines.append(f"| before | {' | '.join([cell(('start', '', 0.0))] * len(METHODS))} |")
        lines += [f"| {rate:g} | {' | '.join(cell((method, kind, rate)) for method in METHODS)} |" for rate in rates]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the teacher")
    parser.add_argument("--prompts", help=".json or .jsonl file of prompts; short ones of our own by default")
    parser.add_argument("--output_dir", type=Path, default=Path("learning_rates"))
    parser.add_argument("--max_steps", type=int, default=6, help="steps of a run, of two groups each")
    parser.add_argument("--num_held_out", type=int, default=8, help="groups to measure on")
    args = parser.parse_args(argv)

    disable_progress_bars()
    set_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    student = drop_layers(teacher, "middle:6").eval()
    groups, held_out = make_groups(args, LocalTeacher(teacher, tokenizer), LocalTeacher(student, tokenizer), tokenizer)
    path = args.output_dir / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    finished = {(row["method"], row["kind"], row["learning_rate"]) for row in done}
    runs = [("start", "", 0.0)]
    runs += [(method, kind, rate) for method in METHODS for kind, rates in RATES.items() for rate in rates]
    for method, kind, rate in runs:
        if (method, kind, rate) in finished:
            continue
        started = time.perf_counter()
        set_seed(0)  # the order of the groups and the start of the adapters
        model = copy.deepcopy(student)
        if method != "start":
            model = train(method, kind, rate, student, teacher, tokenizer, groups, args)
        row = {"method": method, "kind": kind, "learning_rate": rate}
        row |= measure(model, teacher, tokenizer, held_out, args.output_dir)
        row["seconds"] = round(time.perf_counter() - started)
        print(row, flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        done.append(row)
    print(tables(done))


if __name__ == "__main__":
    main()
