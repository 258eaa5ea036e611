"""
From nothing to a better student, without hub, GPU or account, in a few minutes on two CPU cores.

    python examples/quickstart.py

SCAN (https://huggingface.co/papers/1711.00350) asks for the actions of a command: "jump twice" is "I_JUMP I_JUMP". A
teacher learns it from 16000 commands, a smaller student from 800 of them. For others the teacher writes one completion
and the student three, the teacher scores them, and the student is trained on these groups with GRKD. For
comparison, a copy of it is fine-tuned on the teacher's completions of the same commands, for as many steps.

With your own groups, a .jsonl file of rows like {"prompt": "...", "completions": ["...", "..."]}, and your own models:

    python examples/quickstart.py --own my_groups.jsonl path/to/student path/to/teacher --output_dir my_student
"""

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import set_seed

from grkd_trl.evaluation import scan_pairs, scan_split
from grkd_trl.examples.demonstration.models import PROMPT, new_llama, pretrain, word_tokenizer, write_groups
from grkd_trl.examples.demonstration.own import own
from grkd_trl.examples.demonstration.runs import (
    LearningCurve,
    answer,
    distill,
    fine_tune,
    phase,
    report,
    say_if_no_picture,
)


TEACHER_ROWS, STUDENT_ROWS = 16000, 800
GROUPS_PER_STEP = 16
LEARNING_RATE = 1e-3


@dataclass
class Size:
    """How much work a run is."""

    teacher_steps: int
    student_steps: int
    steps: int
    num_test: int
    num_curve: int


FULL = Size(teacher_steps=1000, student_steps=500, steps=200, num_test=1000, num_curve=250)
FAST = Size(teacher_steps=200, student_steps=150, steps=20, num_test=200, num_curve=50)


def scan(out: Path, size: Size, seed: int) -> None:
    """The demonstration."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # on models this small a second thread is no faster, and waits where cores are busy
    split = scan_split(size.num_test + size.num_curve, seed=seed)
    rows, held_out = ([(PROMPT.format(command), actions) for command, actions in part] for part in split)
    held_out, curve_rows = held_out[: size.num_test], held_out[size.num_test :]
    tokenizer = word_tokenizer([PROMPT.format(""), *(text for pair in scan_pairs() for text in pair)])
    teacher = new_llama(tokenizer, num_layers=3, width=128)
    student = new_llama(tokenizer, num_layers=2, width=64)
    with phase(f"1/6 Training a teacher of {teacher.num_parameters():,} parameters on {TEACHER_ROWS} commands"):
        pretrain(teacher, tokenizer, rows[:TEACHER_ROWS], max_steps=size.teacher_steps, batch_size=64, lr=2e-3)
    with phase(f"2/6 Training a student of {student.num_parameters():,} parameters on {STUDENT_ROWS} of them"):
        pretrain(student, tokenizer, rows[:STUDENT_ROWS], max_steps=size.student_steps, batch_size=64, lr=3e-3)
    prompts = [prompt for prompt, _ in rows[STUDENT_ROWS:][: size.steps * GROUPS_PER_STEP]]
    with phase(f"3/6 Writing and scoring groups of 4 completions for {len(prompts)} other commands"):
        groups = write_groups(teacher, student, tokenizer, prompts)
    groups.to_json(out / "groups.jsonl")
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)

    run = {"max_steps": size.steps, "batch_size": GROUPS_PER_STEP, "learning_rate": LEARNING_RATE, "seed": seed}
    names = ("GRKD", "fine-tuning")
    curves = {name: LearningCurve(tokenizer, curve_rows, every=max(size.steps // 5, 1)) for name in names}
    before, fine_tuned = copy.deepcopy(student), copy.deepcopy(student)
    with phase(f"4/6 Training the student with GRKD, {size.steps} steps of {GROUPS_PER_STEP} groups"):
        history = distill(student, teacher, tokenizer, groups, curves["GRKD"], out / "grkd", **run)
    with phase(f"5/6 Fine-tuning a copy of it on the teacher's completions, {size.steps} steps"):
        taught = [(prompt, completions[0]) for prompt, completions in zip(prompts, groups["completions"], strict=True)]
        fine_tune(fine_tuned, tokenizer, taught, curves["fine-tuning"], output_dir=out, **run)
    with phase(f"6/6 Testing all of them on {len(held_out)} held-out commands"):
        models = {"teacher": teacher, "student before": before, "student after GRKD": student}
        models["student after fine-tuning"] = fine_tuned
        asked = [prompt for prompt, _ in held_out]
        answers = {name: answer(model, tokenizer, asked) for name, model in models.items()}
    report(out, answers, held_out, history, {name: curve.points for name, curve in curves.items()}, seed, started)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart"))
    parser.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")
    parser.add_argument("--fast", action="store_true", help="a minute of work, too little to learn anything")
    parser.add_argument("--steps", type=int, help="steps of GRKD; one epoch of your own groups by default")
    parser.add_argument("--learning_rate", type=float, help="for your own groups")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", nargs="+", metavar=("GROUPS", "STUDENT [TEACHER]"), help="your own groups and models")
    args = parser.parse_args(argv)
    if args.own and len(args.own) not in (2, 3):
        parser.error("--own takes a file of groups, a student and, unless all rows have `teacher_scores`, a teacher")
    if args.own and not Path(args.own[0]).is_file():
        parser.error(f"--own: there is no file {args.own[0]!r}; give a .jsonl file with a group a line")
    if args.output_dir.exists() and any(args.output_dir.iterdir()) and not args.overwrite:
        parser.error(f"{args.output_dir} is not empty: give another --output_dir, or --overwrite to write over it")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    set_seed(args.seed)
    say_if_no_picture()
    if args.own:
        given = {"max_steps": args.steps, "learning_rate": args.learning_rate, "seed": args.seed}
        given = {name: value for name, value in given.items() if value is not None}
        own(args.output_dir, *args.own, groups_per_step=GROUPS_PER_STEP, **given)
    else:
        size = copy.copy(FAST if args.fast else FULL)
        size.steps = args.steps or size.steps
        scan(args.output_dir, size, args.seed)


if __name__ == "__main__":
    main()
