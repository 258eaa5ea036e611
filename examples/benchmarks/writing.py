"""
How fast the completions of a group are written: `generate_completions` against `model.generate(num_return_sequences=G)` with
the same sampling.

    python examples/benchmarks/writing.py --model path/to/model --output_dir results

Every completion is as long as asked (the end token is not drawn), so that both write the same number of tokens. Ratios of
medians of interleaved rounds, with the quartiles of the ratios of single rounds.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from grkd_trl.examples.benchmarks.common import DEVICE, DTYPE, interleaved, ratio, report
from grkd_trl.teacher.writing import write_completions


def measure(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPE).to(DEVICE).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.get_output_embeddings().register_forward_hook(never_ends(tokenizer.eos_token_id))
    draw = random.Random(0)
    for shape in args.shapes:
        prompt, completion, group_size = map(int, shape.split("/"))
        prompts = [[draw.randrange(100, len(tokenizer) - 100) for _ in range(prompt)] for _ in range(args.prompts)]
        sampling = {"temperature": 1.0, "top_p": 0.95}

        def ours(prompts=prompts, group_size=group_size, completion=completion, sampling=sampling):
            own = {"num_completions": group_size, "max_new_tokens": completion, "batch_size": args.prompts}
            return write_completions(model, tokenizer, prompts, **own, **sampling)

        def plain(prompts=prompts, group_size=group_size, completion=completion, sampling=sampling):
            input_ids = torch.tensor(prompts, device=DEVICE)
            own = {"num_return_sequences": group_size, "max_new_tokens": completion, "do_sample": True, "top_k": 0}
            with torch.no_grad():
                mask = torch.ones_like(input_ids)
                model.generate(input_ids, attention_mask=mask, pad_token_id=0, **own, **sampling)

        seconds = interleaved({"ours": ours, "plain": plain}, args.rounds)
        median = sorted(seconds["ours"])[args.rounds // 2]
        tokens = round(args.prompts * group_size * completion / median, 1)
        yield {"shape": shape, "tokens a second": tokens, "times as fast": ratio(seconds, "plain", "ours")}


def never_ends(token):
    def hook(module, args, logits):
        logits[..., token] = -1e4
        return logits

    return hook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Path or hub id of the model that writes.")
    parser.add_argument(
        "--shapes", nargs="+", default=["512/64/8", "64/256/4"], help="Prompt, completion, group size."
    )
    parser.add_argument("--prompts", type=int, default=1, help="Prompts of a batch.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_dir", default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    settings = {field: value for field, value in vars(args).items() if field != "output_dir"}
    settings["model"] = Path(args.model).name
    report("writing", measure(args), settings, args.output_dir)


if __name__ == "__main__":
    main()
