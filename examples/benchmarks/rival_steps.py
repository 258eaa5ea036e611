"""
A step of DPO, SimPO and KD here over a step of TRL's own on the same rows: `DPOTrainer`, the experimental `CPOTrainer`
with `loss_type="simpo"`, and the experimental `GKDTrainer` off policy with forward KL.

    python examples/benchmarks/rival_steps.py

Groups of two, randomly initialised Llamas. Rounds of ours and theirs are interleaved in one process, and the medians of
their step times are compared; on a CPU these are the process's own seconds, which other work on the machine does not
lengthen. Prints a line of JSON for each method: the ratio, the losses of the first step, which are to be equal, the machine
and the versions.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

import grkd_trl


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds, self.last, self.loss = [], None, None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter() if torch.cuda.is_available() else time.process_time()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = self.loss if self.loss is not None else logs.get("loss")


def small_model(args, seed):
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 32,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def word_tokenizer(vocab_size):
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, vocab_size)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def text_rows(args):
    """Preferences, chosen first; texts of words that are a token each."""
    rng = random.Random(0)
    words = lambda low, high: " ".join(f"w{rng.randrange(2, args.vocab_size)}" for _ in range(rng.randint(low, high)))  # noqa: E731
    return [
        {"prompt": words(20, 120) + " ", "chosen": words(40, 160) + " <eos>", "rejected": words(40, 160) + " <eos>"}
        for _ in range(args.groups_per_step * args.steps)
    ]


def collate_labels(tokenizer):
    """Rows of `input_ids` and `labels` from preferences, chosen and rejected, as our collator pads them."""

    def collate(rows):
        texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows for _ in range(2)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for label, length in zip(labels, prompts, strict=True):
            label[:length] = -100
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    return collate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--groups_per_step", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="Steps of a round.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["DPO", "SimPO", "KD"])
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore")

    tokenizer, dataset = word_tokenizer(args.vocab_size), Dataset.from_list(text_rows(args))
    student, teacher = small_model(args, 0), small_model(args, 1)

    def fields(folder, **own):
        return {
            "output_dir": folder,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "per_device_train_batch_size": args.groups_per_step,
            "max_steps": args.steps,
            "max_length": 1024,
            "learning_rate": 1e-6,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        } | own

    def make(method, ours, folder, times):
        shared = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": [times]}
        own_class = getattr(grkd_trl, f"{method}Trainer")
        if method == "DPO":
            config, trainer = (grkd_trl.DPOConfig, own_class) if ours else (DPOConfig, DPOTrainer)
            return trainer(model=student, ref_model=teacher, args=config(**fields(folder)), **shared)
        if method == "SimPO" and not ours:
            simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5}
            return CPOTrainer(model=student, args=CPOConfig(**fields(folder, **simpo)), **shared)
        if method == "KD" and not ours:
            off_policy = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "remove_unused_columns": False}
            config = GKDConfig(**fields(folder, **off_policy))
            shared["data_collator"] = collate_labels(tokenizer)
            return GKDTrainer(model=student, teacher_model=teacher, args=config, **shared)
        config = getattr(grkd_trl, f"{method}Config")(**fields(folder))
        return own_class(model=student, teacher_model=teacher if method == "KD" else None, args=config, **shared)

    start = {name: value.clone() for name, value in student.state_dict().items()}
    for method in args.methods:
        seconds, losses = {True: [], False: []}, {}
        with tempfile.TemporaryDirectory() as folder:
            for number in range(args.rounds):
                for ours in (True, False) if number % 2 else (False, True):  # neither always goes first
                    student.load_state_dict(start)
                    times = StepTimes()
                    make(method, ours, folder, times).train()
                    seconds[ours] += times.seconds
                    losses[ours] = times.loss
        ours, theirs = (statistics.median(seconds[side]) for side in (True, False))
        print(
            json.dumps(
                {
                    "method": method,
                    "ratio": round(ours / theirs, 3),
                    "ours_step_ms": round(1000 * ours, 2),
                    "trl_step_ms": round(1000 * theirs, 2),
                    "first_losses": [losses[True], losses[False]],
                    "settings": vars(args),
                    "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
                    f"{torch.get_num_threads()} threads",
                    "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
