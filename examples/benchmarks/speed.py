"""
How fast GRKD's step is, and how much memory its loss takes, as ratios measured interleaved in one process.

    python examples/benchmarks/speed.py against_trl shapes memory growth limit --output_dir results

`against_trl`: completions a second against TRL's `DPOTrainer` and SimPO (`CPOTrainer`), on the same completions.
`shapes`: shared prompts against reading every row, forward and backward. `memory`: peak of the loss at a vocabulary of
256k. `growth`: time a completion for larger groups, lengths and vocabularies. `limit`: a step against bare forward and
backward of the same tokens, teacher scoring against a bare forward, and useful FLOPs against a loop of matmuls.
"""

import argparse
import copy
import tempfile
import weakref

import torch
import torch.nn.functional as F
from common import DEVICE, interleaved, make_groups, make_model, make_shapes, make_tokenizer, ratio, report
from datasets import Dataset, disable_progress_bars
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer import add_fused_lm_head

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.groups import DataCollatorForGroups
from grkd_trl.losses import group_relative_loss, token_soft_label_loss
from grkd_trl.scoring import score_completions, sequence_scores, to_groups


def step_of(trainer, rows):
    """A function that takes one optimizer step on the first rows."""
    examples = [trainer.train_dataset[index] for index in range(rows)]
    inputs = trainer._prepare_inputs(trainer.data_collator(examples))
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        trainer.model.train()
        trainer.training_step(trainer.model, dict(inputs), None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def against_trl(args):
    tokenizer = make_tokenizer(args.vocab_size)
    student = make_model(args.vocab_size, args.hidden_size, args.num_layers)
    shapes = [("ultrafeedback", 4), ("512/64", 8), ("64/512", 4), ("ultrafeedback", 2), ("ultrafeedback", 8)]
    for kind, group_size in shapes:
        num_prompts = max(args.rows // group_size, 1)
        groups = make_groups(make_shapes(kind, num_prompts, group_size), args.vocab_size)
        pairs = [
            {"prompt": group["prompt"], "chosen": group["completions"][i], "rejected": group["completions"][i + 1]}
            for group in groups
            for i in range(0, group_size, 2)
        ]
        with tempfile.TemporaryDirectory() as folder:
            shared = {"output_dir": folder, "bf16": DEVICE == "cuda", "use_cpu": DEVICE == "cpu", "report_to": "none"}
            shared |= {"gradient_checkpointing": False, "max_length": 2048}
            dpo = {"per_device_train_batch_size": len(pairs), "precompute_ref_log_probs": True}
            data = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(pairs)}
            model = lambda: copy.deepcopy(student)  # noqa: E731
            trainers = {
                "dpo": DPOTrainer(model(), args=DPOConfig(**shared, **dpo), **data),
                "simpo": CPOTrainer(model(), args=CPOConfig(**shared, loss_type="simpo", cpo_alpha=0.0), **data),
            }
            data["train_dataset"] = Dataset.from_list(groups)
            for sharing in ("auto", "off"):
                grkd = GRKDConfig(**shared, soft_label="none", prompt_sharing=sharing, shuffle_dataset=False)
                trainers[f"grkd {sharing}"] = GRKDTrainer(model(), args=grkd, **data)
            steps = {
                name: step_of(trainer, len(groups) if "grkd" in name else len(pairs))
                for name, trainer in trainers.items()
            }
            seconds = interleaved(steps, args.rounds)
        row = {"shape": kind, "G": group_size, "prompts": num_prompts}
        for other in ("dpo", "simpo", "grkd off"):
            row[f"times faster than {other}"] = ratio(seconds, other, "grkd auto")
        yield row


def batch_of(shapes, vocab_size):
    tokens = lambda num: torch.randint(2, vocab_size, (num,)).tolist()  # noqa: E731
    groups = [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in lengths]} for p, lengths in shapes]
    return {name: tensor.to(DEVICE) for name, tensor in DataCollatorForGroups(pad_token_id=0)(groups).items()}


def forward_backward(model, batch, **kwargs):
    scores = score_completions(model, batch, **kwargs)
    scores = to_groups(
        sequence_scores(scores.per_token_logps, batch["completion_mask"], score="mean"), batch["group_mask"]
    )
    teacher = -torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype).expand_as(scores)
    group_relative_loss(scores, teacher, mask=batch["group_mask"]).sum().backward()
    model.zero_grad()


def shapes(args):
    model = make_model(args.vocab_size, args.hidden_size, args.num_layers)
    for kind in ("ultrafeedback", "512/64", "64/512", "128/256"):
        for group_size in (2, 4, 8):
            batch = batch_of(make_shapes(kind, max(args.rows // group_size, 1), group_size), args.vocab_size)
            functions = {
                sharing: lambda batch=batch, sharing=sharing: forward_backward(model, batch, prompt_sharing=sharing)
                for sharing in ("auto", "on", "off")
            }
            seconds = interleaved(functions, args.rounds)
            padding = 1 - batch["attention_mask"].float().mean().item()
            row = {"shape": kind, "G": group_size, "padding": round(padding, 3)}
            yield row | {name: ratio(seconds, "off", name) for name in ("auto", "on")}


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that were made inside and live at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self.known and id(storage) not in given:
                    self.known.add(id(storage))
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        return outputs

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def memory(args):
    vocab_size, num_tokens = 2**18, args.memory_tokens
    models = [make_model(vocab_size, 64, 1, seed) for seed in (0, 1)]
    student, teacher = models
    batch = batch_of([(8, [num_tokens // 4] * 4)], vocab_size)
    mask = batch["completion_mask"][:, 1:].bool()
    targets = batch["input_ids"][:, 1:][mask]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def plain(soft):
        """All logits of the completions in float32."""
        hidden = student.model(**inputs).last_hidden_state[:, :-1][mask]
        logits = student.lm_head(hidden).float()
        loss = F.cross_entropy(logits, targets)
        if soft:
            with torch.no_grad():
                hidden = teacher.model(**inputs).last_hidden_state[:, :-1][mask]
                teacher_logits = teacher.lm_head(hidden).float()
            loss = loss + token_soft_label_loss(logits, teacher_logits).mean()
        loss.backward()

    def ours(soft):
        with torch.no_grad():
            taught = score_completions(teacher, batch, return_logits=True) if soft else None
        losses = (lambda logits, rows: {"soft": token_soft_label_loss(logits, taught.logits[rows])}) if soft else None
        scores = score_completions(student, batch, token_losses=losses)
        loss = -scores.per_token_logps.sum() / len(targets)
        (loss + scores.token_losses["soft"].mean() if soft else loss).backward()

    def trl(_):
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        fused(**inputs, labels=labels, fused_lm_head=True).loss.backward()

    fused = copy.deepcopy(student)
    add_fused_lm_head(fused)
    for soft in (False, True):
        row = {"loss": "log-probabilities" + (" and token soft labels" if soft else ""), "tokens": len(targets)}
        for name, function in {"plain": plain, "ours": ours, **({} if soft else {"trl_fused": trl})}.items():
            for model in (student, fused):
                model.zero_grad()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                function(soft)
                row[f"{name} MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
            else:
                with PeakMemory() as peak:
                    function(soft)
                row[f"{name} MiB"] = round(peak.peak / 2**20)
        # The gradients of the model, which every path leaves behind, are no memory of the loss.
        left = sum(p.numel() * p.element_size() for p in student.parameters()) / 2**20
        row["gradients MiB"] = round(left)
        row["plain / ours"] = round((row["plain MiB"] - left) / (row["ours MiB"] - left), 2)
        yield row


def growth(args):
    base = {"G": 8, "length": 128, "vocab_size": args.vocab_size}
    changes = [{"G": g} for g in (2, 4, 8, 16, 32)] + [{"length": n} for n in (128, 256, 512, 1024, 2048, 4096)]
    changes += [{"vocab_size": v} for v in (2**15, 2**16, 2**17, 2**18)]
    for change in changes:
        at = base | ({"G": 2} if "length" in change else {}) | change
        model = make_model(at["vocab_size"], args.hidden_size, args.num_layers)
        num_prompts = 32 // at["G"] if "G" in change else 1  # as many completions for every G
        batch = batch_of([(64, [at["length"]] * at["G"])] * num_prompts, at["vocab_size"])
        seconds = interleaved({"step": lambda model=model, batch=batch: forward_backward(model, batch)}, args.rounds)
        num_completions = len(batch["input_ids"])
        yield at | {"ms a completion": round(1000 * sorted(seconds["step"])[args.rounds // 2] / num_completions, 2)}


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

    def score():
        with torch.no_grad():
            score_completions(model, batch, prompt_sharing="off")

    left, right = torch.randn(1024, args.hidden_size), torch.randn(args.hidden_size, 4 * args.hidden_size)
    left, right = (matrix.to(DEVICE, model.dtype) for matrix in (left, right))

    def matmuls():
        for _ in range(64):
            left @ right

    seconds = interleaved(
        {
            "step": lambda: forward_backward(model, batch, prompt_sharing="off"),
            "shared": lambda: forward_backward(model, batch),
            "bare": bare,
            "score": score,
            "bare forward": lambda: bare(False),
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
    parser.add_argument("--rows", type=int, default=16, help="Completions of a step.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_tokens", type=int, default=1024, help="Completion tokens of `memory`.")
    parser.add_argument("--output_dir", default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    for name in args.benchmarks:
        report(name, BENCHMARKS[name](args), vars(args), args.output_dir)


if __name__ == "__main__":
    main()
