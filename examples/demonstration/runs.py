"""The parts of `quickstart.py`: tests on SCAN, training with a learning curve, and what is printed and drawn."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.evaluation import wilson_interval
from grkd_trl.examples.demonstration.models import MAX_NEW_TOKENS, training
from grkd_trl.teacher import generate_completions


@contextmanager
def phase(text: str) -> Iterator[None]:
    """A line that says what is done, and at its end for how long."""
    started = time.perf_counter()
    print(f"{text} ...", end="", flush=True)
    yield
    print(f" {time.perf_counter() - started:.0f} s", flush=True)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Nothing below an error from `grkd_trl`."""
    logger = logging.getLogger("grkd_trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def answer(model: PreTrainedModel, tokenizer, prompts: list[str]) -> list[str]:
    """The model's greedy completion of each prompt."""
    texts, _ = generate_completions(
        model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, batch_size=128, progress=False
    )
    return [text.strip() for (text,) in texts]


def share(answers: list[str], rows: list[tuple[str, str]]) -> float:
    """Share of the rows, of prompt and right completion, that are answered exactly."""
    return sum(text == right for text, (_, right) in zip(answers, rows, strict=True)) / len(rows)


class LearningCurve(TrainerCallback):
    """Exact match on some held-out rows in the course of training."""

    def __init__(self, tokenizer, rows: list[tuple[str, str]], *, every: int):
        self.tokenizer, self.rows, self.every, self.points = tokenizer, rows, every, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        answers = answer(model, self.tokenizer, [prompt for prompt, _ in self.rows])
        self.points.append((state.global_step, share(answers, self.rows)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.on_train_begin(args, state, control, model)


def train_quietly(trainer: Trainer) -> None:
    """Train without a line of log for every logging step; `trainer.state.log_history` has them."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def fine_tune(model: PreTrainedModel, tokenizer, rows: list[tuple[str, str]], curve: LearningCurve, **kwargs) -> None:
    """Train on pairs of prompt and completion."""
    dataset = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    config = SFTConfig(**training(**kwargs))
    train_quietly(SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[curve]))


def distill(student, teacher, tokenizer, groups: Dataset, curve: LearningCurve, out: Path, **kwargs) -> list[dict]:
    """Train on groups with GRKD, save the student with its card, and give what was logged."""
    config = GRKDConfig(**training(out, **kwargs))
    with no_warnings():  # a small student often writes the same completion twice, and the two have one score
        trainer = GRKDTrainer(
            student, teacher, config, train_dataset=groups, processing_class=tokenizer, callbacks=[curve]
        )
        train_quietly(trainer)
    save(trainer, out)
    return trainer.state.log_history


def save(trainer: GRKDTrainer, folder: Path) -> None:
    trainer.save_model(str(folder))  # with its tokenizer
    trainer.create_model_card(model_name=folder.name)


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def say_if_no_picture() -> None:
    if not can_draw():
        print('There will be no picture: it needs matplotlib, `pip install -e ".[plots]"`.')


def draw(path: Path, history: list[dict], curves: dict[str, list[tuple[int, float]]]) -> None:
    """Learning curves (or the loss), alpha and rank accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logged = [entry for entry in history if "rank/accuracy" in entry]
    panels = [("alpha: share of the ranking loss", [entry["alpha"] for entry in logged])]
    panels.append(
        ("rank/accuracy: share of pairs\nin the teacher's order", [entry["rank/accuracy"] for entry in logged])
    )
    if not curves:
        panels.insert(0, ("loss", [entry.get("loss", entry.get("train_loss")) for entry in logged]))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name, points in curves.items():
        axes[0].plot(*zip(*points, strict=True), marker="o", label=name)
        axes[0].set(title="share of other held-out commands\nthat are answered exactly", xlabel="step")
        axes[0].legend()
    for axis, (name, values) in zip(axes[-len(panels) :], panels, strict=True):
        axis.plot([entry["step"] for entry in logged], values, color="C0")
        axis.set(title=name, xlabel="step")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(
    out: Path,
    answers: dict[str, list[str]],
    rows: list[tuple[str, str]],
    history: list[dict],
    curves: dict[str, list[tuple[int, float]]],
    seed: int,
    started: float,
) -> None:
    """Print the share of rows that each model answers exactly, examples, what was written, and what to try next."""
    print("\nExact match, with 95 % interval")
    results = {}
    for name, texts in answers.items():
        low, high = wilson_interval(round(share(texts, rows) * len(rows)), len(rows))
        print(f"    {name:<40} {share(texts, rows):.3f}   ({low:.3f} to {high:.3f})")
        results[name] = {"exact_match": share(texts, rows), "low": low, "high": high}
    print("\nThe first held-out commands of at most twelve actions")
    named = {"before": answers["student before"], "after": answers["student after GRKD"]}
    for index in [index for index, (_, right) in enumerate(rows) if len(right.split()) <= 12][:5]:
        prompt, right = rows[index]
        print(f"\n    {prompt.strip()}\n        right   {shorten(right, 100, placeholder=' ...')}")
        for name, texts in named.items():
            said = "the same" if texts[index] == right else shorten(texts[index], 100, placeholder=" ...")
            print(f"        {name:<7} {said}")
    if can_draw():
        draw(out / "quickstart.png", history, curves)
    seconds = round(time.perf_counter() - started)
    (out / "results.json").write_text(json.dumps({"seed": seed, "seconds": seconds, "results": results}, indent=2))
    print(
        f"\n{seconds} seconds. In {out}/ are {', '.join(sorted(path.name for path in out.iterdir()))}. To try next:\n"
    )
    print(f"    python examples/quickstart.py --steps 600 --output_dir {out}-600")
    print(
        f"    python examples/grkd.py --model_name_or_path {out}/student --teacher_model_name_or_path {out}/teacher \\"
    )
    print(f"        --dataset_name {out}/groups.jsonl --learning_rate 1e-3 --output_dir {out}-again")
    print("    python examples/quickstart.py --own my_groups.jsonl path/to/student path/to/teacher --output_dir mine")
