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
import random
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.evaluation import exact_match, scan_pairs, scan_split, wilson_interval
from grkd_trl.teacher import generate_completions, score_groups


# TRL 1.16 sets the field itself.
warnings.filterwarnings("ignore", message=".*is_?gradient_checkpointing. is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)

PROMPT = "IN: {} OUT: "
MAX_NEW_TOKENS = 49  # SCAN's longest actions, and EOS
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


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at whitespace and knows the words of `texts`."""
    words = sorted({word for text in texts for word in text.split()})
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def new_llama(tokenizer: PreTrainedTokenizerFast, *, num_layers: int, width: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def training(output_dir: Path, *, max_steps: int, learning_rate: float, batch_size: int, seed: int = 0) -> dict:
    """What all runs share of their configuration. In bfloat16, models this small would not learn well."""
    return {
        "output_dir": str(output_dir),
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # as a share of the steps
        "per_device_train_batch_size": batch_size,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": max(max_steps // 20, 1),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def fine_tune(model: PreTrainedModel, tokenizer, rows: list[tuple[str, str]], *, callbacks=None, **kwargs) -> None:
    """Train on pairs of prompt and completion."""
    dataset = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    config = SFTConfig(**training(**kwargs))
    SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks).train()


def pretrain(
    model: PreTrainedModel, tokenizer, rows: list[tuple[str, str]], *, max_steps: int, batch_size: int, lr: float
) -> None:
    """Train from scratch on pairs of prompt and completion: a plain loop, in batches of similar length."""
    texts = [
        (tokenizer(prompt).input_ids, tokenizer(completion + tokenizer.eos_token).input_ids)
        for prompt, completion in rows
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max_steps, pct_start=0.1)
    rng, batches = random.Random(0), []
    bar = tqdm(range(max_steps))
    for _ in bar:
        if not batches:
            pool = sorted(rng.sample(texts, min(len(texts), 50 * batch_size)), key=lambda text: len(text[1]))
            batches = [pool[start : start + batch_size] for start in range(0, len(pool) - batch_size + 1, batch_size)]
            rng.shuffle(batches)
        batch = batches.pop()
        input_ids = [torch.tensor(prompt + completion) for prompt, completion in batch]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in batch]
        loss = model(input_ids=pad_sequence(input_ids, True), labels=pad_sequence(labels, True, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def write_groups(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer, prompts: list[str], counts: tuple[int, int] = (1, 3)
) -> Dataset:
    """Groups of four, one completion by the teacher and three by the student, with the teacher's scores."""
    groups = {"prompt": prompts, "completions": [[] for _ in prompts], "clipped": [[] for _ in prompts]}
    for writer, num_completions in zip((teacher, student), counts, strict=True):
        if not num_completions:
            continue
        texts, clipped = generate_completions(
            writer, tokenizer, prompts, num_completions=num_completions, max_new_tokens=MAX_NEW_TOKENS, batch_size=128
        )
        for row in range(len(prompts)):
            groups["completions"][row] += texts[row]
            groups["clipped"][row] += clipped[row]
    return score_groups(teacher, tokenizer, Dataset.from_dict(groups))


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
        # (examples/results/defaults)
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
