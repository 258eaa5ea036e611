"""What the benchmarks share: models and groups of given sizes, interleaved timing, and a JSON with the machine."""

import json
import os
import platform
import random
import re
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DistillationTrainer

from grkd_trl.data import DataCollatorForGroups


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# (prompt, chosen, rejected) of 256 rows of UltraFeedback, in tokens of four characters.
ULTRAFEEDBACK = json.loads(Path(__file__).with_name("ultrafeedback_lengths.json").read_text())
STATUS = Path("/proc/self/status")


def make_model(vocab_size, hidden_size, num_layers, seed=0):
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(hidden_size // 32, 2),
        pad_token_id=0,
        eos_token_id=1,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(DEVICE, DTYPE)


def make_tokenizer(vocab_size):
    """A word is a token."""
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, vocab_size)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_shapes(kind, num_prompts, group_size, seed=0):
    """Lengths `(prompt, [completion, ...])`: "ultrafeedback", or "512/64" for prompts of 512 and completions of 64."""
    if kind == "ultrafeedback":
        rows = random.Random(seed).sample(ULTRAFEEDBACK, num_prompts)
        return [(prompt, [both[i % 2] for i in range(group_size)]) for prompt, *both in rows]
    prompt, completion = map(int, kind.split("/"))
    return [(prompt, [completion] * group_size)] * num_prompts


def make_groups(shapes, vocab_size, seed=0):
    draw = random.Random(seed)
    text = lambda num: " ".join(f"w{draw.randrange(2, vocab_size)}" for _ in range(num))  # noqa: E731
    return [
        {
            "prompt": text(prompt) + " ",
            "completions": [text(length) + " " for length in lengths],
            "teacher_scores": [-float(index) for index in range(len(lengths))],
        }
        for prompt, lengths in shapes
    ]


def batch_of(shapes, vocab_size):
    tokens = lambda num: torch.randint(2, vocab_size, (num,)).tolist()  # noqa: E731
    groups = [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in lengths]} for p, lengths in shapes]
    return {name: tensor.to(DEVICE) for name, tensor in DataCollatorForGroups(pad_token_id=0)(groups).items()}


def trainer_fields(folder):
    """Of every trainer that is measured."""
    fields = {"output_dir": folder, "bf16": DEVICE == "cuda", "use_cpu": DEVICE == "cpu"}
    return fields | {"report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}


def step_of(trainer, rows):
    """A function that takes one optimizer step on the first rows."""
    examples = [trainer.train_dataset[index] for index in range(rows)]
    inputs = examples
    if not isinstance(trainer, DistillationTrainer):
        inputs = dict(trainer._prepare_inputs(trainer.data_collator(examples)))
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        trainer.model.train()
        trainer.training_step(trainer.model, inputs, None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_place_of_samples(groups, tokenizer):
    """What TRL's `DistillationTrainer` has after sampling: the completions of our tokenized groups, a row each."""
    rows = [(group["prompt_ids"], ids) for group in groups for ids in group["completion_ids"]]
    padded = {}
    for name, column, side in (("prompt", 0, "left"), ("completion", 1, "right")):
        ids = {"input_ids": [row[column] for row in rows]}
        batch = tokenizer.pad(ids, padding=True, padding_side=side, return_tensors="pt")
        padded |= {f"{name}_ids": batch["input_ids"].to(DEVICE), f"{name}_mask": batch["attention_mask"].to(DEVICE)}
    return padded | {"num_items_in_batch": padded["completion_mask"].sum()}


def interleaved(functions, rounds, of_clock=None):
    """
    Seconds of each function, round by round in an order that turns, after one round to warm up. On one thread of a CPU they
    are the process's own, and those of the clock go into `of_clock`.
    """
    clock = time.process_time if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    of_clock = {} if of_clock is None else of_clock
    seconds, names = {name: [] for name in functions}, list(functions)
    of_clock.update({name: [] for name in functions})
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            function = functions[name]
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start, start_of_clock = clock(), time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_ > 0:
                seconds[name].append(clock() - start)
                of_clock[name].append(time.perf_counter() - start_of_clock)
    return seconds


def ratio(seconds, slow, fast):
    """Of the medians, and the quartiles of the ratios of single rounds."""
    quartiles = statistics.quantiles([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)], n=4)
    medians = statistics.median(seconds[slow]) / statistics.median(seconds[fast])
    return {"ratio": round(medians, 3), "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)]}


def in_status(name):
    """A size of this process in MiB, as Linux has it. `ru_maxrss` may be that of the one that started it."""
    return int(re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1]) / 1024


def machine():
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "dtype": str(DTYPE).removeprefix("torch."),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "grkd_trl")},
    }


def report(name, rows, settings, output_dir):
    """Print a line of JSON a row as it comes, and keep them in a file."""
    result = {"benchmark": name, "settings": settings, "machine": machine(), "rows": []}
    for row in rows:
        print(json.dumps({"benchmark": name} | row), flush=True)
        result["rows"].append(row)
        if output_dir is not None:
            path = Path(output_dir) / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
