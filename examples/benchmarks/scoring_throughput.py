"""
What scoring costs beside the model: tokens a second of `LocalTeacher.score`, tokenization and all, over those of bare
forwards of the same rows in the same batches, with logits for every token, and without the head at all.

    python examples/benchmarks/scoring_throughput.py

Rounds are interleaved in one process, in an order that turns, and the medians compared. Also the most memory that the
scoring of one batch holds beyond the model, over the float32 logits of all its tokens, at a vocabulary of 256 000
(`--memory`; measured on a GPU, or as the growth of the process's peak on a CPU). Prints a line of JSON.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import time
from importlib.metadata import version

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from grkd_trl.data import DataCollatorForGroups, tokenize_completions
from grkd_trl.teacher import LocalTeacher


def make_teacher(args, vocab_size, device):
    set_seed(0)
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 1000)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    return LocalTeacher(model, tokenizer, tokens_per_batch=args.tokens_per_batch)


def make_groups(args):
    draw = random.Random(0)

    def text(length):
        return " ".join(f"w{draw.randint(3, 999)}" for _ in range(length))

    prompts = [text(args.prompt_length) + " " for _ in range(args.num_groups)]
    return prompts, [[text(args.completion_length) for _ in range(4)] for _ in prompts]


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts, completions = make_groups(args)
    if args.memory:
        teacher = make_teacher(args, 256_000, device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
        teacher.tokens_per_batch = 10**9
        teacher.score(prompts, completions)
        tokens = 4 * args.num_groups * (args.prompt_length + args.completion_length + 1)
        full = 4 * tokens * 256_000
        grown = peak_memory(device) - before
        print(
            json.dumps({"device": device.type, "tokens": tokens, "bytes": grown, "share_of_fp32_logits": grown / full})
        )
        return

    teacher = make_teacher(args, args.vocab_size, device)
    collator = DataCollatorForGroups(pad_token_id=0)
    groups = []
    for prompt, group in zip(prompts, completions, strict=True):
        prompt_ids, completion_ids = tokenize_completions(teacher.processing_class, prompt, group)
        groups.append({"prompt_ids": prompt_ids, "completion_ids": completion_ids})
    length = args.prompt_length + args.completion_length + 1
    size = max(1, args.tokens_per_batch // (4 * length))
    batches = [collator(groups[start : start + size]) for start in range(0, len(groups), size)]
    batches = [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
    ways = {
        "score": lambda: teacher.score(prompts, completions),
        "forward": lambda: [teacher.model(**batch, use_cache=False) for batch in batches],
        "forward_without_head": lambda: [teacher.model.model(**batch, use_cache=False) for batch in batches],
    }
    # On a CPU the process's own seconds: other processes do not count.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(args.rounds + 1):  # the first warms up
        for name in names[round_ % 3 :] + names[: round_ % 3]:
            start = clock()
            ways[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ > 0:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "tokens": 4 * length * args.num_groups,
        "seconds": medians,
        "throughput_over_forward": medians["forward"] / medians["score"],
        "throughput_over_forward_without_head": medians["forward_without_head"] / medians["score"],
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--num_groups", type=int, default=16)
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--completion_length", type=int, default=128)
    parser.add_argument("--tokens_per_batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=6)
    main(parser.parse_args())
