"""
A step with real models: GRKD against TRL's trainers on the same completions, and where its time and memory go.

    python examples/benchmarks/real_models.py --student student --teacher teacher --output_dir results

GRKD with scores, with token soft labels, and with LoRA, against TRL's `DPOTrainer` (reference precomputed and live), SimPO
(`CPOTrainer`) and, with token soft labels, `DistillationTrainer` (forward KL). Whole optimizer steps are timed, on any device
and in any dtype, in interleaved rounds: ratios of medians, with the quartiles of the ratios of single rounds. On one thread of
a CPU (`OMP_NUM_THREADS=1`) the process's own seconds are counted, which other work on the machine does not lengthen, and those
of the clock beside them.

`--data` is a JSON-lines file with `prompt`, `chosen` and `rejected`; prompts and completions are cut or repeated to the given
lengths. Without it their words are drawn from the tokenizer's vocabulary.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.benchmarks.common import (
    DEVICE,
    DTYPE,
    in_place_of_samples,
    interleaved,
    ratio,
    report,
    step_of,
    trainer_fields,
)
from grkd_trl.examples.benchmarks.peak_memory import PeakMemory
from grkd_trl.scoring import score_completions


def make_groups(args, tokenizer):
    """Groups of token ids of the asked lengths, the first completion of each pair the better one."""
    draw = random.Random(0)
    if args.data is None:
        drawn = lambda length: [draw.randrange(100, len(tokenizer) - 100) for _ in range(length)]  # noqa: E731
        rows = [[drawn(args.prompt), drawn(args.completion), drawn(args.completion)] for _ in range(args.groups)]
    else:
        with open(args.data) as lines:
            texts = [json.loads(line) for _, line in zip(range(args.groups), lines, strict=False)]
        rows = [[tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")] for row in texts]
    cut = lambda ids, length: (ids * length)[:length]  # noqa: E731
    return [
        {
            "prompt_ids": cut(prompt, args.prompt),
            "completion_ids": [cut(both[i % 2], args.completion) for i in range(args.group_size)],
            "teacher_scores": [-float(i) for i in range(args.group_size)],
        }
        for prompt, *both in rows
    ]


def load(path, args):
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(DEVICE)


def make_trainers(args, folder):
    """Trainers by name, each with a student of its own: TRL's put heads of theirs into the models they train."""
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student, teacher = load(args.student, args), load(args.teacher, args)
    groups = make_groups(args, tokenizer)
    text = lambda ids: tokenizer.decode(ids)  # noqa: E731
    pairs = [
        {"prompt": text(row["prompt_ids"]), "chosen": text(ids[i]), "rejected": text(ids[i + 1])}
        for row in groups
        for ids in [row["completion_ids"]]
        for i in range(0, args.group_size, 2)
    ]
    shared = trainer_fields(folder) | {"bf16": args.dtype == "bfloat16", "learning_rate": 1e-6}
    data = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(pairs)}
    batch = {"per_device_train_batch_size": len(pairs), "max_length": 4096}
    dpo = DPOConfig(**shared, **batch)
    precomputed = DPOConfig(**shared, **batch, precompute_ref_log_probs=True)
    simpo = CPOConfig(**shared, **batch, loss_type="simpo", cpo_alpha=0.0)
    own = lambda: copy.deepcopy(student)  # noqa: E731
    trainers = {
        "DPO": DPOTrainer(own(), args=precomputed, **data),
        "DPO, live reference": DPOTrainer(own(), ref_model=own(), args=dpo, **data),
        "SimPO": CPOTrainer(own(), args=simpo, **data),
    }
    data["train_dataset"] = Dataset.from_list(groups)
    distillation = DistillationConfig(**shared, beta=0.0, per_device_train_batch_size=len(groups))
    prompts = {"train_dataset": Dataset.from_list([{"prompt": text(row["prompt_ids"])} for row in groups])}
    trainers["Distillation"] = DistillationTrainer(own(), copy.deepcopy(teacher), args=distillation, **data | prompts)
    samples = in_place_of_samples(groups, tokenizer)
    trainers["Distillation"]._generate_and_score_completions = lambda _: samples
    for name, fields, lora in [
        ("GRKD, scores", {"soft_label": "none"}, False),
        ("GRKD, scores, every row", {"soft_label": "none", "prompt_sharing": "off"}, False),
        ("GRKD, soft labels", {"soft_label": "token"}, False),
        ("GRKD, scores, LoRA", {"soft_label": "none"}, True),
        ("GRKD, soft labels, LoRA", {"soft_label": "token"}, True),
    ]:
        fields |= {"alpha_start": 0.3, "max_length": 4096, "shuffle_dataset": False}
        trainers[name] = GRKDTrainer(
            own(),
            teacher_model=teacher if fields["soft_label"] == "token" else None,
            args=GRKDConfig(**shared, **fields),
            peft_config=LoraConfig(task_type="CAUSAL_LM") if lora else None,
            **data,
        )
    return trainers


AGAINST = {
    "GRKD, scores": ["DPO", "DPO, live reference", "SimPO", "GRKD, scores, every row"],
    "GRKD, soft labels": ["DPO", "DPO, live reference", "Distillation"],
    "GRKD, scores, LoRA": ["GRKD, scores"],
    "GRKD, soft labels, LoRA": ["GRKD, soft labels"],
}


def profile(trainer, args):
    """Functions whose times are the parts of a step, and its distance to its matrix products."""
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(args.groups)]))
    inputs, student, teacher = dict(inputs), trainer.model, trainer.teacher_model
    head = student.get_output_embeddings()
    body = sum(parameter.numel() for parameter in student.parameters()) - head.weight.numel()
    num_tokens = int(inputs["completion_mask"].sum())
    num_read = args.groups * args.prompt + num_tokens
    left = torch.randn(num_read, head.weight.shape[1], dtype=DTYPE, device=DEVICE)
    right = torch.randn(head.weight.shape[1], 4096, dtype=DTYPE, device=DEVICE)
    flops = 6 * (body * num_read + head.weight.numel() * num_tokens) + 2 * (
        body * num_read + head.weight.numel() * num_tokens
    )

    def forward(model, **kwargs):
        with torch.no_grad():
            score_completions(model, inputs, **kwargs)

    def matmuls():
        for _ in range(64):
            left @ right

    seconds = interleaved(
        {
            "whole step": step_of(trainer, args.groups),
            "teacher": lambda: forward(teacher),
            "student forward": lambda: forward(student),
            "forward and backward": lambda: (trainer.training_step(student, inputs, None), student.zero_grad()),
            "data": lambda: trainer.data_collator([trainer.train_dataset[i] for i in range(args.groups)]),
            "matrix products": matmuls,
        },
        args.rounds,
    )
    median = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    bound = flops * median["matrix products"] / (64 * 2 * left.numel() * right.shape[1])
    shares = {name: round(median[name] / median["whole step"], 3) for name in list(seconds)[1:-1]}
    shares["optimizer and clipping"] = round(1 - median["forward and backward"] / median["whole step"], 3)
    return {
        "seconds": round(median["whole step"], 3),
        "of the step": shares,
        "matrix products": round(bound / median["whole step"], 3),
    }


def peak_of(step):
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        step()
    return memory.peak


def measure(args):
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(args, folder)
        names = [name for name in trainers if not args.only or name in args.only]
        rows = {
            name: args.groups if "GRKD" in name or name == "Distillation" else args.groups * args.group_size // 2
            for name in names
        }
        steps = {name: step_of(trainers[name], rows[name]) for name in names}
        of_clock = {}
        seconds = interleaved(steps, args.rounds, of_clock)
        for name in names:
            row = {
                "trainer": name,
                "seconds a step": round(statistics.median(seconds[name]), 3),
                "of the clock": round(statistics.median(of_clock[name]), 3),
                "MiB a step": round(peak_of(steps[name]) / 2**20),
            }
            for other in (other for other in AGAINST.get(name, []) if other in names):
                row[f"times as fast as {other}"] = ratio(seconds, other, name) | {
                    "of the clock": ratio(of_clock, other, name)["ratio"]
                }
            yield row
        if "GRKD, soft labels" in names:
            yield {"profile": "GRKD, soft labels"} | profile(trainers["GRKD, soft labels"], args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="Path or hub id of the student.")
    parser.add_argument(
        "--teacher", required=True, help="Path or hub id of the teacher, which has the student's tokenizer."
    )
    parser.add_argument("--data", help="JSON-lines file with prompt, chosen and rejected. Drawn words if not given.")
    parser.add_argument("--groups", type=int, default=1, help="Groups of a step.")
    parser.add_argument("--group_size", type=int, default=4, help="Completions of a group, an even number.")
    parser.add_argument("--prompt", type=int, default=90, help="Length of the prompts, in tokens.")
    parser.add_argument("--completion", type=int, default=94, help="Length of the completions, in tokens.")
    parser.add_argument("--dtype", default=str(DTYPE).removeprefix("torch."), choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="Trainers to measure, by name. All if not given.")
    parser.add_argument("--output_dir", default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    settings = {field: value for field, value in vars(args).items() if field != "output_dir"}
    report("real_models", measure(args), settings, args.output_dir)


if __name__ == "__main__":
    main()
