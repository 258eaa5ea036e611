"""
Make a small model out of a larger one: remove layers from an instruction-tuned model, and train the rest with GRKD.

    python examples/prune_and_distill.py --output_dir pruned

The model without these layers is the student, and the full model is its teacher. Both write completions of the prompts, the
teacher scores them, and the student is trained on these groups. Before and after training the script shows the student's
answers to held-out prompts, with the teacher's score. With your own prompts (a .jsonl file of rows like
{"prompt": "..."}), another model, and LoRA:

    python examples/prune_and_distill.py --output_dir pruned --prompts prompts.jsonl --model_name_or_path Qwen/Qwen3-0.6B \
        --drop every_second --use_peft

In `--output_dir` are the student without layers (`start/`), the groups with a data card (`groups/`), the trained student
(`student/`, with `--use_peft` an adapter on `start/`) and `results.json`. A run that stopped while writing groups resumes.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.demonstration.runs import phase, save, train_quietly
from grkd_trl.examples.pruning.layers import drop_layers
from grkd_trl.examples.pruning.prompts import PROMPTS, short_prompts
from grkd_trl.examples.pruning.report import Tests
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for models, groups and results")
    add("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="teacher, by default %(default)s")
    add("--drop", default="middle:6", help="layers to remove, 'middle:N' or 'every_second' (default: %(default)s)")
    add("--prompts", help=".json or .jsonl file of prompts; by default those of this script")
    add("--num_prompts", type=int, default=72, help="prompts to train on (default: %(default)s)")
    add("--num_held_out", type=int, default=12, help="prompts to measure on (default: %(default)s)")
    add("--max_prompt_length", type=int, default=96, help="longest prompt, in tokens (default: %(default)s)")
    add("--max_completion_length", type=int, default=32, help="longest completion, in tokens (default: %(default)s)")
    add("--num_completions", type=int, default=4, help="completions in a group, half by the teacher (default: 4)")
    add("--num_train_epochs", type=int, default=1, help="times that the groups are trained on (default: 1)")
    add("--groups_per_step", type=int, default=2, help="groups in a step (default: 2)")
    add("--learning_rate", type=float, help="3e-4 by default, and with --use_peft 1e-3")
    add("--use_peft", action="store_true", help="train LoRA adapters of rank 16 in place of all parameters")
    add("--seed", type=int, default=0, help="seed of draws and order (default: 0)")
    args = parser.parse_args(argv)

    started, out = time.perf_counter(), args.output_dir
    disable_progress_bars()
    disable_progress_bar()  # of transformers, which has one for each file
    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Models and prompts
    with phase("1/6 Loading the teacher, and leaving layers out for the student"):
        teacher = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        rows = load_dataset("json", data_files=args.prompts, split="train")["prompt"] if args.prompts else PROMPTS
        count = args.num_prompts + args.num_held_out
        prompts = short_prompts(rows, tokenizer, args.max_prompt_length, count, seed=args.seed)
        drop_layers(teacher, args.drop).save_pretrained(out / "start")
        tokenizer.save_pretrained(out / "start")
        student = AutoModelForCausalLM.from_pretrained(out / "start", dtype=torch.float32)  # known by this name
        teacher.to(device), student.to(device)
    print(f"    student {student.num_parameters():,} parameters, teacher {teacher.num_parameters():,}")

    # Groups
    config = GroupsConfig(
        output_dir=str(out / "groups"),
        completion_source="mixed",
        num_completions=args.num_completions,
        num_drawn=args.num_completions,
        num_teacher_completions=args.num_completions // 2,
        max_completion_length=args.max_completion_length,
        prompts_per_shard=32,
        seed=args.seed,
    )
    writers = {"student": LocalTeacher(student.eval(), tokenizer), "teacher": LocalTeacher(teacher, tokenizer)}
    with phase(f"2/6 Writing and scoring groups of {args.num_completions} for {count} prompts"):
        groups = generate_groups(prompts, config, **writers)
    asked = prompts["prompt"][-args.num_held_out :]
    held_out = groups.filter(lambda row: row["prompt"] in asked)

    # Trainer
    training = GRKDConfig(
        output_dir=str(out / "student"),
        learning_rate=args.learning_rate or (1e-3 if args.use_peft else 3e-4),
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # as a share of the steps
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.groups_per_step,
        per_device_eval_batch_size=args.groups_per_step,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = GRKDTrainer(
        student,
        teacher,
        training,
        train_dataset=groups.filter(lambda row: row["prompt"] not in asked),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if args.use_peft else None,
    )
    tests = Tests(trainer, writers["teacher"], asked, max_new_tokens=args.max_completion_length, seed=args.seed)

    # Test, train, test
    with phase(f"3/6 Testing the student on {len(held_out)} held-out groups"):
        tests.student("before")
    with phase(f"4/6 Training it on {len(groups) - len(held_out)} groups"):
        train_quietly(trainer)
    with phase("5/6 Testing it again, and the teacher's own answers"):
        tests.student("after")
        tests.answer("teacher", teacher)
    with phase("6/6 Saving the student and its card"):
        save(trainer, out / "student")

    seconds = round(time.perf_counter() - started)
    given = {name: str(value) for name, value in vars(args).items()}
    print(tests.report(out / "results.json", arguments=given, seconds=seconds, threads=torch.get_num_threads()))
    print(f"\n{seconds} seconds. All answers are in {out / 'results.json'}. To ask the student yourself:")
    print(f"    python examples/generate.py --model {out / 'student'} --prompts prompts.jsonl --chat")


if __name__ == "__main__":
    main()
