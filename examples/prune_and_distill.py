"""
Make a small model out of a larger one: leave layers out of an instruction-tuned model, and heal it with GRKD.

    python examples/prune_and_distill.py --output_dir pruned

The model without some of its layers is the student, and the whole model its teacher. Both write completions of the
prompts, the teacher scores them, and the student is trained on these groups. Before and after, on prompts that are held
out, the student's answers are shown and scored by the teacher. With your own prompts, a .jsonl file of rows like
{"prompt": "..."}, another model, and adapters in place of full training:

    python examples/prune_and_distill.py --output_dir pruned --prompts prompts.jsonl --model_name_or_path Qwen/Qwen3-0.6B \
        --drop every_second --use_peft

In `--output_dir` are the student without layers (`start/`), the groups with a data card (`groups/`), the trained student
(`student/`, with `--use_peft` an adapter on `start/`) and `results.json`. A run that stopped while writing groups resumes.
"""

import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.pruning.layers import drop_layers
from grkd_trl.examples.pruning.prompts import PROMPTS, short_prompts
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher


@dataclass
class PruneArguments:
    """
    Arguments of this script.

    Parameters:
        output_dir (`str`):
            Folder for models, groups and results.
        model_name_or_path (`str`, *optional*, defaults to `"HuggingFaceTB/SmolLM2-135M-Instruct"`):
            Hub id or path of the teacher, whose layers the student has.
        drop (`str`, *optional*, defaults to `"middle:6"`):
            Layers to leave out: `"middle:N"` or `"every_second"`.
        prompts (`str`, *optional*):
            File of prompts (.json or .jsonl), texts or messages. By default a list of short ones in the package.
        num_prompts (`int`, *optional*, defaults to `160`):
            Prompts to train on.
        num_held_out (`int`, *optional*, defaults to `24`):
            Prompts to measure on.
        max_prompt_length (`int`, *optional*, defaults to `96`):
            Longer prompts are left out, in tokens.
        max_completion_length (`int`, *optional*, defaults to `48`):
            Longest completion, in tokens.
        num_completions (`int`, *optional*, defaults to `4`):
            Completions in a group, half of them by the teacher.
        num_train_epochs (`int`, *optional*, defaults to `1`):
            Times that the groups are trained on.
        groups_per_step (`int`, *optional*, defaults to `2`):
            Groups in a step.
        learning_rate (`float`, *optional*):
            By default 3e-4, and with `use_peft` 1e-3.
        use_peft (`bool`, *optional*, defaults to `False`):
            Train LoRA adapters of rank 16 on all linear layers, in place of all parameters.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws and of the order.
    """

    output_dir: str = field(metadata={"help": "Folder for models, groups and results."})
    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Hub id or path of the teacher."}
    )
    drop: str = field(default="middle:6", metadata={"help": "Layers to leave out: 'middle:N' or 'every_second'."})
    prompts: str | None = field(default=None, metadata={"help": "File of prompts; short ones of our own by default."})
    num_prompts: int = field(default=160, metadata={"help": "Prompts to train on."})
    num_held_out: int = field(default=24, metadata={"help": "Prompts to measure on."})
    max_prompt_length: int = field(default=96, metadata={"help": "Longer prompts are left out, in tokens."})
    max_completion_length: int = field(default=48, metadata={"help": "Longest completion, in tokens."})
    num_completions: int = field(default=4, metadata={"help": "Completions in a group, half by the teacher."})
    num_train_epochs: int = field(default=1, metadata={"help": "Times that the groups are trained on."})
    groups_per_step: int = field(default=2, metadata={"help": "Groups in a step."})
    learning_rate: float | None = field(default=None, metadata={"help": "3e-4, with --use_peft 1e-3 by default."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters in place of all parameters."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws and of the order."})


@contextmanager
def phase(text: str):
    """A line that says what is done, and at its end for how long."""
    started = time.perf_counter()
    print(f"{text} ...", end="", flush=True)
    yield
    print(f" {time.perf_counter() - started:.0f} s", flush=True)


def measure(model, teacher: LocalTeacher, tokenizer, prompts: list, args: PruneArguments) -> tuple[list[str], float]:
    """Greedy answers to show, and the teacher's mean score, in nats a token, of answers at temperature 1."""
    writer, length = LocalTeacher(model, tokenizer), args.max_completion_length
    greedy = writer.generate(prompts, 1, seed=args.seed, max_new_tokens=length, temperature=0.0)
    sampled = writer.generate(prompts, 1, seed=args.seed, max_new_tokens=length)
    ids = ("completion_ids", "prompt_ids", "clipped")
    columns = {name: getattr(sampled, name) for name in ids} | {
        "tokenizer_hash": [sampled.tokenizer_hash] * len(prompts)
    }
    scores = [score for (score,) in teacher.score(prompts, sampled.texts, columns=columns).scores]
    return [text.strip() for (text,) in greedy.texts], sum(scores) / len(scores)


def main(args: PruneArguments):
    started, out = time.perf_counter(), Path(args.output_dir)
    disable_progress_bars()
    disable_progress_bar()  # of transformers, which has one for each file
    set_seed(args.seed)

    with phase("1/6 Loading the teacher, and leaving layers out for the student"):
        teacher = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        rows = load_dataset("json", data_files=args.prompts, split="train")["prompt"] if args.prompts else PROMPTS
        count = args.num_prompts + args.num_held_out
        dataset = short_prompts(rows, tokenizer, args.max_prompt_length, count, seed=args.seed)
        student = drop_layers(teacher, args.drop)
        if torch.cuda.is_available():
            teacher.cuda(), student.cuda()
        student.save_pretrained(out / "start")
        tokenizer.save_pretrained(out / "start")
    layers = [model.config.num_hidden_layers for model in (student, teacher)]
    print(
        f"    {layers[0]} of {layers[1]} layers, {student.num_parameters():,} of {teacher.num_parameters():,} parameters"
    )

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
    as_teacher = LocalTeacher(teacher.eval(), tokenizer)
    with phase(f"2/6 Writing and scoring groups of {args.num_completions} for {len(dataset)} prompts"):
        groups = generate_groups(dataset, config, student=LocalTeacher(student.eval(), tokenizer), teacher=as_teacher)
    held_out = dataset["prompt"][-args.num_held_out :]
    is_held_out = [prompt in held_out for prompt in groups["prompt"]]
    parts = {
        name: groups.select([row for row, held in enumerate(is_held_out) if held is wanted])
        for name, wanted in (("train", False), ("eval", True))
    }

    trainer = GRKDTrainer(
        student,
        teacher,
        GRKDConfig(
            output_dir=str(out / "student"),
            learning_rate=args.learning_rate or (1e-3 if args.use_peft else 3e-4),
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # as a share of the steps
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.groups_per_step,
            per_device_eval_batch_size=args.groups_per_step,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["eval"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if args.use_peft else None,
    )
    trainer.remove_callback(PrinterCallback)
    results, answers = {}, {}

    def test(name: str):
        answers[name], score = measure(trainer.model, as_teacher, tokenizer, held_out, args)
        evaluated = trainer.evaluate()
        results[name] = {key: evaluated[f"eval_{key}"] for key in ("loss", "loss/soft", "rank/accuracy")}
        results[name]["teacher's score of its text"] = score

    with phase(f"3/6 Testing the student on {len(held_out)} held-out prompts"):
        test("before")
    with phase(f"4/6 Training it on {len(parts['train'])} groups"):
        trainer.train()
    with phase("5/6 Testing it again, and the teacher's own answers"):
        test("after")
        answers["teacher"], score = measure(teacher, as_teacher, tokenizer, held_out, args)
    with phase("6/6 Saving the student and its card"):
        trainer.save_model(str(out / "student"))
        trainer.create_model_card(model_name=out.name)

    seconds = round(time.perf_counter() - started)
    rows = [
        dict(prompt=prompt[-1]["content"], **{name: texts[row] for name, texts in answers.items()})
        for row, prompt in enumerate(held_out)
    ]
    made = {"arguments": asdict(args), "seconds": seconds, "threads": torch.get_num_threads(), "results": results}
    made |= {"teacher's score of the teacher's text": score, "answers": rows, "log": trainer.state.log_history}
    (out / "results.json").write_text(json.dumps(made, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"\nOn held-out prompts{'':<32}before    after")
    for name in results["before"]:
        print(f"    {name:<40} {results['before'][name]:>9.3f} {results['after'][name]:>9.3f}")
    print(f"    teacher's score of the teacher's text: {score:.3f}; all scores are in nats a token")
    for row in rows[:4]:
        print("\n    " + "\n    ".join(f"{name:<8} {' '.join(text.split())[:300]}" for name, text in row.items()))
    print(f"\n{seconds} seconds. To ask the student yourself, write prompts into a file, and:")
    print(
        f"    grkd-trl generate --model {out / 'student'} --prompts prompts.jsonl --teacher {args.model_name_or_path}"
    )


if __name__ == "__main__":
    main(*TrlParser((PruneArguments,)).parse_args_and_config())
