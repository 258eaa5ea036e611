"""
How fast GRKD's step is, and how much memory its loss takes, as ratios measured interleaved in one process.

    python examples/benchmarks/speed.py against_trl shapes memory growth limit --output_dir results

`against_trl`: completions a second against TRL's `DPOTrainer` (reference precomputed) and SimPO (`CPOTrainer`), and of GRKD
with a teacher and token soft labels against TRL's `DistillationTrainer` (forward KL), on the same completions: that
trainer reads no completions of a dataset, so it is handed them where it would have sampled. `shapes`: the layout that
`prompt_sharing="auto"` chooses against reading every row, forward and backward, and the share of tokens that it reads: where
that is 1 both are the same. `memory`: peak of the loss at vocabularies of 32k to 256k. `growth`: time a completion for larger
groups, lengths and vocabularies. `limit`: a step of the trainer against a bare one on the same tokens, teacher scoring against
a bare forward, and useful FLOPs against a loop of matmuls.

Seconds are those of the clock, or on one thread of a CPU (`OMP_NUM_THREADS=1`) the process's own, which other work on the
machine does not lengthen.
"""

import argparse
import copy
import functools
import tempfile

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.benchmarks.common import (
    DEVICE,
    batch_of,
    in_place_of_samples,
    interleaved,
    make_groups,
    make_model,
    make_shapes,
    make_tokenizer,
    ratio,
    report,
    step_of,
    trainer_fields,
)
from grkd_trl.examples.benchmarks.memory import memory
from grkd_trl.losses import group_relative_loss
from grkd_trl.scoring import score_completions, sequence_scores, to_groups


def against_trl(args):
    settings = [("ultrafeedback", 4), ("ultrafeedback", 2), ("ultrafeedback", 8), ("512/64", 8), ("64/512", 4)]
    settings = [(*setting, args.vocab_size) for setting in settings] + [("ultrafeedback", 4, 2**15)]
    for kind, group_size, vocab_size in settings:
        tokenizer = make_tokenizer(vocab_size)
        student, teacher = (make_model(vocab_size, args.hidden_size, args.num_layers, seed) for seed in (0, 1))
        num_prompts = max(args.rows // group_size, 1)
        groups = make_groups(make_shapes(kind, num_prompts, group_size), vocab_size)
        pairs = [
            {"prompt": group["prompt"], "chosen": group["completions"][i], "rejected": group["completions"][i + 1]}
            for group in groups
            for i in range(0, group_size, 2)
        ]
        with tempfile.TemporaryDirectory() as folder:
            shared = trainer_fields(folder)
            model = functools.partial(copy.deepcopy, student)
            data = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(pairs)}
            dpo = {"per_device_train_batch_size": len(pairs), "precompute_ref_log_probs": True, "max_length": 2048}
            simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "max_length": 2048}
            trainers = {
                "dpo": DPOTrainer(model(), args=DPOConfig(**shared, **dpo), **data),
                "simpo": CPOTrainer(model(), args=CPOConfig(**shared, **simpo), **data),
            }
            data["train_dataset"] = Dataset.from_list(groups)
            distillation = DistillationConfig(**shared, beta=0.0, per_device_train_batch_size=len(groups))
            trainers["distillation"] = DistillationTrainer(model(), teacher, args=distillation, **data)
            tokenized = [
                {
                    "prompt_ids": tokenizer(group["prompt"])["input_ids"],
                    "completion_ids": [tokenizer(text + "<eos>")["input_ids"] for text in group["completions"]],
                }
                for group in groups
            ]
            samples = in_place_of_samples(tokenized, tokenizer)
            trainers["distillation"]._generate_and_score_completions = lambda _, samples=samples: samples
            for name, soft_label, sharing in [
                ("grkd", "none", "auto"),
                ("grkd, every row", "none", "off"),
                ("grkd, taught", "token", "auto"),
            ]:
                own = {"soft_label": soft_label, "prompt_sharing": sharing, "alpha_start": 0.3}
                grkd = GRKDConfig(**shared, **own, shuffle_dataset=False, max_length=2048)
                taught = {"teacher_model": teacher} if soft_label == "token" else {}
                trainers[name] = GRKDTrainer(model(), args=grkd, **taught, **data)
            steps = {
                name: step_of(trainer, len(pairs) if name in ("dpo", "simpo") else len(groups))
                for name, trainer in trainers.items()
            }
            seconds = interleaved(steps, args.rounds)
        row = {"shape": kind, "G": group_size, "prompts": num_prompts, "vocab_size": vocab_size}
        for other, ours in [
            ("dpo", "grkd"),
            ("simpo", "grkd"),
            ("distillation", "grkd, taught"),
            ("grkd, every row", "grkd"),
        ]:
            row[f"times faster than {other}"] = ratio(seconds, other, ours)
        yield row


def forward_backward(model, batch, **kwargs):
    scores = score_completions(model, batch, **kwargs)
    scores = to_groups(
        sequence_scores(scores.per_token_logps, batch["completion_mask"], score="mean"), batch["group_mask"]
    )
    teacher = -torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype).expand_as(scores)
    group_relative_loss(scores, teacher, mask=batch["group_mask"]).sum().backward()
    model.zero_grad()


def tokens_read(model, function):
    """Tokens that the layers read in a call."""
    lengths = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: lengths.append(args[0].numel()))
    function()
    handle.remove()
    return sum(lengths)


def shapes(args):
    model = make_model(args.vocab_size, args.hidden_size, args.num_layers)
    for kind in ("ultrafeedback", "512/64", "64/512", "128/256"):
        for group_size in (2, 4, 8):
            batch = batch_of(make_shapes(kind, max(args.rows // group_size, 1), group_size), args.vocab_size)
            functions = {
                sharing: lambda batch=batch, sharing=sharing: forward_backward(model, batch, prompt_sharing=sharing)
                for sharing in ("auto", "off")
            }
            seconds = interleaved(functions, args.rounds)
            padding = 1 - batch["attention_mask"].float().mean().item()
            read = {name: tokens_read(model, function) for name, function in functions.items()}  # after the check
            row = {"shape": kind, "G": group_size, "padding": round(padding, 3)}
            yield row | {"tokens read": round(read["auto"] / read["off"], 3), "auto": ratio(seconds, "off", "auto")}


def growth(args):
    series = {
        "G": [{"G": size, "length": 128, "vocab_size": args.vocab_size} for size in (2, 4, 8, 16, 32)],
        "length": [
            {"G": 2, "length": length, "vocab_size": args.vocab_size} for length in (128, 256, 512, 1024, 2048, 4096)
        ],
        "vocab_size": [{"G": 4, "length": 128, "vocab_size": 2**power} for power in (15, 16, 17, 18)],
    }
    for grown, points in series.items():
        functions, num_completions = {}, {}
        for point in points:
            model = make_model(point["vocab_size"], args.hidden_size, args.num_layers)
            num_prompts = 32 // point["G"] if grown == "G" else 1  # as many completions for every G
            batch = batch_of([(64, [point["length"]] * point["G"])] * num_prompts, point["vocab_size"])
            functions[point[grown]] = lambda model=model, batch=batch: forward_backward(model, batch)
            num_completions[point[grown]] = len(batch["input_ids"])
        seconds = interleaved(functions, args.rounds)
        for point in points:
            median = sorted(seconds[point[grown]])[args.rounds // 2]
            yield point | {"ms a completion": round(1000 * median / num_completions[point[grown]], 2)}
        if grown == "G":
            yield {"time per completion, G = 32 / G = 8": ratio(seconds, 32, 8)}


def limit(args):
    model = make_model(args.vocab_size, args.hidden_size, args.num_layers)
    shapes_ = make_shapes("128/128", 1, args.rows)
    batch = batch_of(shapes_, args.vocab_size)
    mask = batch["completion_mask"][:, 1:].bool()
    targets = batch["input_ids"][:, 1:][mask]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def bare(backward=True):
        with torch.set_grad_enabled(backward):
            logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][mask])
            loss = F.cross_entropy(logits.float(), targets)
        if backward:
            loss.backward()
            model.zero_grad()

    def trainer_and_bare_step():
        """The step of the whole trainer, and a loop's without one, on the same tokens and with the same optimizer."""
        rows = make_groups(shapes_, args.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            grkd = GRKDConfig(**trainer_fields(folder), soft_label="none", prompt_sharing="off")
            data = {"processing_class": make_tokenizer(args.vocab_size), "train_dataset": Dataset.from_list(rows)}
            yield step_of(GRKDTrainer(copy.deepcopy(model), args=grkd, **data), len(rows))
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6)

        def step():
            own.train()
            logits = own.lm_head(own.model(**inputs, use_cache=False).last_hidden_state[:, :-1][mask])
            F.cross_entropy(logits.float(), targets).backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        yield step

    def score():
        with torch.no_grad():
            score_completions(model, batch, prompt_sharing="off")

    left, right = torch.randn(1024, args.hidden_size), torch.randn(args.hidden_size, 4 * args.hidden_size)
    left, right = (matrix.to(DEVICE, model.dtype) for matrix in (left, right))

    def matmuls():
        for _ in range(64):
            left @ right

    trainer_step, bare_step = trainer_and_bare_step()
    seconds = interleaved(
        {
            "trainer": trainer_step,
            "bare step": bare_step,
            "step": lambda: forward_backward(model, batch, prompt_sharing="off"),
            "shared": lambda: forward_backward(model, batch),
            "bare": bare,
            "score": score,
            "bare forward": lambda: bare(backward=False),
            "matmuls": matmuls,
        },
        args.rounds,
    )
    flops_of_matmuls = 64 * 2 * 1024 * 4 * args.hidden_size**2
    body = sum(p.numel() for p in model.model.layers.parameters())
    (prompt, lengths), *_ = shapes_
    num_read = prompt + sum(length - 1 for length in lengths)
    flops = 6 * (body * num_read + model.lm_head.weight.numel() * len(targets))
    speed = flops / sorted(seconds["shared"])[args.rounds // 2]
    bound = flops_of_matmuls / sorted(seconds["matmuls"])[args.rounds // 2]
    yield {
        "trainer's step / bare step": ratio(seconds, "trainer", "bare step"),
        "step / bare forward and backward": ratio(seconds, "step", "bare"),
        "teacher scoring / bare forward": ratio(seconds, "score", "bare forward"),
        "shared step / bare forward and backward of all rows": ratio(seconds, "shared", "bare"),
        "FLOPs of the shared step's matmuls, share of a bare loop's": round(speed / bound, 3),
    }


BENCHMARKS = {"against_trl": against_trl, "shapes": shapes, "memory": memory, "growth": growth, "limit": limit}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8, help="Completions of a step.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory_tokens", type=int, default=1024, help="Completion tokens of `memory`.")
    parser.add_argument("--output_dir", default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    for name in args.benchmarks:
        settings = {field: value for field, value in vars(args).items() if field not in ("benchmarks", "output_dir")}
        report(name, BENCHMARKS[name](args), settings, args.output_dir)


if __name__ == "__main__":
    main()
