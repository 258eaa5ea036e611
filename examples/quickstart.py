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
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.evaluation import exact_match, scan_pairs, scan_split, wilson_interval
from grkd_trl.examples.demonstration.models import (
    MAX_NEW_TOKENS,
    PROMPT,
    new_llama,
    pretrain,
    training,
    word_tokenizer,
    write_groups,
)


# TRL 1.16 sets the field itself.
warnings.filterwarnings("ignore", message=".*is_?gradient_checkpointing. is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)

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


FULL = Size(teacher_steps=1500, student_steps=500, steps=200, num_test=1000, num_curve=250)
FAST = Size(teacher_steps=200, student_steps=150, steps=20, num_test=200, num_curve=50)


def fine_tune(model: PreTrainedModel, tokenizer, rows: list[tuple[str, str]], *, callbacks=None, **kwargs) -> None:
    """Train on pairs of prompt and completion."""
    dataset = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    config = SFTConfig(**training(**kwargs))
    SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks).train()


class LearningCurve(TrainerCallback):
    """Exact match on some held-out commands in the course of training."""

    def __init__(self, tokenizer, pairs: list[tuple[str, str]], *, every: int):
        self.tokenizer, self.pairs, self.every, self.points = tokenizer, pairs, every, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.points.append((state.global_step, share(test(model, self.tokenizer, self.pairs, progress=False))))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.on_train_begin(args, state, control, model)


def test(model: PreTrainedModel, tokenizer, pairs: list[tuple[str, str]], *, progress: bool = True) -> list[bool]:
    """Whether the model's actions are right, for each command."""
    prompts, references = [PROMPT.format(command) for command, _ in pairs], [actions for _, actions in pairs]
    return exact_match(
        model, tokenizer, prompts, references, max_new_tokens=MAX_NEW_TOKENS, batch_size=128, progress=progress
    )


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def draw(path: Path, history: list[dict], curves: dict[str, list[tuple[int, float]]]) -> None:
    """Learning curve, alpha and rank accuracy."""
    try:
        import matplotlib
    except ImportError:
        print(f'{path.name} is left out: it needs matplotlib, `pip install -e ".[plots]"`.')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logged = [entry for entry in history if "rank/accuracy" in entry]
    panels = [("alpha", [entry["alpha"] for entry in logged])]
    panels.append(("rank/accuracy", [entry["rank/accuracy"] for entry in logged]))
    if not curves:
        panels.insert(0, ("loss", [entry.get("loss", entry.get("train_loss")) for entry in logged]))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name, points in curves.items():
        axes[0].plot(*zip(*points, strict=True), marker="o", label=name)
        axes[0].set(title="exact match on other held-out commands", xlabel="step")
        axes[0].legend()
    for axis, (name, values) in zip(axes[-len(panels) :], panels, strict=True):
        axis.plot([entry["step"] for entry in logged], values, color="C0")
        axis.set(title=name, xlabel="step")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(trainer: GRKDTrainer, folder: Path) -> None:
    trainer.save_model(str(folder))  # with its tokenizer
    trainer.create_model_card(model_name=folder.name)


def scan(out: Path, size: Size, seed: int) -> None:
    """The demonstration."""
    started = time.perf_counter()
    train, held_out = scan_split(size.num_test + size.num_curve, seed=seed)
    held_out, curve_pairs = held_out[: size.num_test], held_out[size.num_test :]
    rows = [(PROMPT.format(command), actions) for command, actions in train]
    tokenizer = word_tokenizer([PROMPT.format(""), *(text for pair in scan_pairs() for text in pair)])
    teacher = new_llama(tokenizer, num_layers=3, width=128)
    student = new_llama(tokenizer, num_layers=2, width=64)
    print(f"\n1/6 Training a teacher of {teacher.num_parameters():,} parameters on {TEACHER_ROWS} commands")
    pretrain(teacher, tokenizer, rows[:TEACHER_ROWS], max_steps=size.teacher_steps, batch_size=64, lr=2e-3)
    print(f"\n2/6 Training a student of {student.num_parameters():,} parameters on {STUDENT_ROWS} of them")
    pretrain(student, tokenizer, rows[:STUDENT_ROWS], max_steps=size.student_steps, batch_size=64, lr=3e-3)
    right = {"teacher": test(teacher, tokenizer, held_out), "student before": test(student, tokenizer, held_out)}

    prompts = [prompt for prompt, _ in rows[STUDENT_ROWS:][: size.steps * GROUPS_PER_STEP]]
    print(f"\n3/6 Writing and scoring groups of 4 completions for {len(prompts)} other commands")
    groups = write_groups(teacher, student, tokenizer, prompts)
    groups.to_json(out / "groups.jsonl")
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)

    run = {"max_steps": size.steps, "batch_size": GROUPS_PER_STEP, "learning_rate": LEARNING_RATE, "seed": seed}
    curves = {
        name: LearningCurve(tokenizer, curve_pairs, every=max(size.steps // 8, 1)) for name in ("GRKD", "fine-tuning")
    }
    print(f"\n4/6 {size.steps} steps of GRKD, {GROUPS_PER_STEP} groups a step")
    fine_tuned = copy.deepcopy(student)
    trainer = GRKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GRKDConfig(**training(out / "grkd", **run)),
        train_dataset=groups,
        processing_class=tokenizer,
        callbacks=[curves["GRKD"]],
    )
    trainer.train()
    save(trainer, out / "grkd")
    right[f"student after {size.steps} steps of GRKD"] = test(student, tokenizer, held_out)

    print(f"\n5/6 {size.steps} steps of fine-tuning on the teacher's completions of the same commands")
    taught = [(prompt, completions[0]) for prompt, completions in zip(prompts, groups["completions"], strict=True)]
    fine_tune(fine_tuned, tokenizer, taught, callbacks=[curves["fine-tuning"]], output_dir=out, **run)
    right[f"student after {size.steps} steps of fine-tuning"] = test(fine_tuned, tokenizer, held_out)

    draw(out / "quickstart.png", trainer.state.log_history, {name: curve.points for name, curve in curves.items()})
    results = {}
    print(f"\n6/6 Exact match on {len(held_out)} held-out commands, with 95 % interval")
    for name, values in right.items():
        low, high = wilson_interval(sum(values), len(values))
        print(f"    {name:<40} {share(values):.3f}   ({low:.3f} to {high:.3f})")
        results[name] = {"exact_match": share(values), "low": low, "high": high}
    seconds = round(time.perf_counter() - started)
    (out / "results.json").write_text(json.dumps({"seed": seed, "seconds": seconds, "results": results}, indent=2))
    print(f"\n{seconds} seconds. Models, groups, card and picture are in {out}/. To try next:\n")
    print(f"    python examples/quickstart.py --steps 600 --output_dir {out}-600")
    print(
        f"    python examples/grkd.py --model_name_or_path {out}/student --teacher_model_name_or_path {out}/teacher \\\n"
        f"        --dataset_name {out}/groups.jsonl --learning_rate {LEARNING_RATE} --bf16 False --output_dir {out}/again"
    )
    print("    python examples/quickstart.py --own my_groups.jsonl path/to/student path/to/teacher --output_dir mine")


def own(out: Path, groups: str, student: str, teacher: str | None, *, seed: int, **given) -> None:
    """GRKD on a user's groups and models; a tenth of the groups is held out."""
    split = load_dataset("json", data_files=groups, split="train").train_test_split(0.1, seed=seed)
    config = GRKDConfig(
        output_dir=str(out),
        # Without a teacher there are its scores alone. Of the two losses for them, both poor, "none" lost less accuracy
        # (examples/results/comparison)
        **({} if teacher else {"soft_label": "none"}),
        **given,
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=GROUPS_PER_STEP,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = GRKDTrainer(student, teacher, config, train_dataset=split["train"], eval_dataset=split["test"])
    if not teacher:
        print(
            "No teacher was given, so there are no token soft labels, and by ranking alone students lost accuracy in our "
            "study: check what the student writes. With a teacher it gains."
        )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    save(trainer, out)
    draw(out / "quickstart.png", trainer.state.log_history, {})
    print(f"\nOn {len(split['test'])} held-out groups, before and after {trainer.state.global_step} steps")
    for name in ("rank/accuracy", "rank/kendall_tau", "loss"):
        print(f"    {name:<20} {before[f'eval_{name}']:.3f}   {after[f'eval_{name}']:.3f}")
    print(
        f"\nModel, card and picture are in {out}/. `examples/grkd.py` has LoRA, several GPUs and every other option."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart"))
    parser.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")
    parser.add_argument("--fast", action="store_true", help="a minute of work, too little to learn much")
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
    set_seed(args.seed)
    if args.own:
        given = {"max_steps": args.steps, "learning_rate": args.learning_rate}
        given = {name: value for name, value in given.items() if value is not None}
        own(args.output_dir, *args.own, *([None] * (3 - len(args.own))), seed=args.seed, **given)
    else:
        size = copy.copy(FAST if args.fast else FULL)
        size.steps = args.steps or size.steps
        scan(args.output_dir, size, args.seed)


if __name__ == "__main__":
    main()
