"""`quickstart.py --own`: GRKD on a user's groups and models."""

from pathlib import Path

from datasets import load_dataset

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.demonstration.runs import can_draw, draw, phase, save, train_quietly


def own(out: Path, groups: str, student: str, teacher: str | None = None, *, groups_per_step: int, **given) -> None:
    """Train on a user's groups, a tenth of them held out, and print what changed on these."""
    if teacher is None:
        print(
            "No teacher was given, so the student learns from the scores alone: it imitates each group's best completion and "
            "ranks the others. Check what it writes."
        )
    split = load_dataset("json", data_files=groups, split="train").train_test_split(0.1, seed=given["seed"])
    config = GRKDConfig(
        output_dir=str(out),
        # By scores alone the best completion has to be imitated (examples/results/regimes, "Scores alone").
        **({} if teacher else {"soft_label": "none", "sft_weight": 1.0}),
        **given,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=groups_per_step,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with phase("1/2 Loading the models, and testing the student on held-out groups"):
        trainer = GRKDTrainer(student, teacher, config, train_dataset=split["train"], eval_dataset=split["test"])
        before = trainer.evaluate()
    with phase(f"2/2 Training on {len(split['train'])} groups, and testing again"):
        train_quietly(trainer)
        after = trainer.evaluate()
        save(trainer, out)
    print(f"\nOn {len(split['test'])} held-out groups, before and after {trainer.state.global_step} steps")
    for name in ("rank/accuracy", "rank/kendall_tau", "loss"):
        print(f"    {name:<20} {before[f'eval_{name}']:.3f}   {after[f'eval_{name}']:.3f}")
    if can_draw():
        draw(out / "quickstart.png", trainer.state.log_history, {})
    made = "Model, card and picture are" if can_draw() else "Model and card are"
    print(f"\n{made} in {out}/. `examples/grkd.py` has LoRA, several GPUs and every other option.")
