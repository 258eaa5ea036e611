"""
What the trainer costs beside the model: the time of a GRKD step over the time of a plain loop that runs the same
forward, the same pairwise loss, the same backward and the same optimizer on the same batches.

    python examples/benchmarks/step_overhead.py

Groups of two, no token soft labels, a randomly initialised Llama. Rounds of both are interleaved in one process, and
the medians of their step times are compared. Prints a line of JSON with the machine and the versions.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.utils import logging

from grkd_trl import GRKDConfig, GRKDTrainer


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds, self.last = [], None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def tiny_student(hidden_size, num_layers, vocab_size):
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def plain_steps(model, batches, learning_rate):
    """The loop without a trainer; returns seconds per step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    seconds, last = [], time.perf_counter()
    for batch in batches:
        mask = batch["completion_mask"][:, 1:].bool()
        hidden_states = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden_states[:, :-1][mask])  # completion tokens alone, as the trainer does
        nll = F.cross_entropy(logits, batch["input_ids"][:, 1:][mask], reduction="none")
        logps = torch.zeros(mask.shape, device=nll.device).masked_scatter(mask, -nll)
        scores = logps.sum(-1) / mask.sum(-1)
        loss = -F.logsigmoid(scores[::2] - scores[1::2]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return seconds[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--groups_per_step", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="Steps of a round.")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()

    rng = random.Random(0)
    tokens = lambda low, high: [rng.randrange(2, args.vocab_size) for _ in range(rng.randint(low, high))]  # noqa: E731
    rows = [
        {
            "prompt_ids": tokens(20, 120),
            "completion_ids": [tokens(40, 160), tokens(40, 160)],
            "teacher_scores": [1.0, 0.0],
        }
        for _ in range(args.groups_per_step * args.steps)
    ]
    dataset = Dataset.from_list([row | {"clipped": [False, False]} for row in rows])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    student = tiny_student(args.hidden_size, args.num_layers, args.vocab_size)

    ours, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            times = StepTimes()
            trainer = GRKDTrainer(
                model=student,
                args=GRKDConfig(
                    output_dir=folder,
                    soft_label="none",
                    prompt_sharing="off",  # the plain loop reads every row
                    bf16=False,
                    use_cpu=not torch.cuda.is_available(),
                    gradient_checkpointing=False,
                    per_device_train_batch_size=args.groups_per_step,
                    max_steps=args.steps,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[times],
            )
            batches = [{k: v.to(student.device) for k, v in batch.items()} for batch in trainer.get_train_dataloader()]
            trainer.train()
            ours += times.seconds
            plain += plain_steps(student, batches, learning_rate=1e-6)
    print(
        json.dumps(
            {
                "ratio": round(statistics.median(ours) / statistics.median(plain), 3),
                "grkd_step_ms": round(1000 * statistics.median(ours), 2),
                "plain_step_ms": round(1000 * statistics.median(plain), 2),
                "settings": vars(args),
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
                f"{torch.get_num_threads()} threads",
                "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
            }
        )
    )


if __name__ == "__main__":
    main()
