"""
What is lost by caching a teacher's k most likely tokens instead of its whole distribution: the soft-label loss of a
student over k + 1 classes less the one over the vocabulary, and the angle between their gradients.

    python examples/benchmarks/topk_soft_labels.py --teacher TEACHER --student STUDENT --dataset groups.jsonl

Prints a line of JSON: in nats per completion token, at temperature 1.
"""

import argparse
import json

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.data import DataCollatorForGroups, tokenize_group
from grkd_trl.losses import token_soft_label_loss, topk_soft_label_loss
from grkd_trl.scoring import score_completions


def main(args):
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher, student = (AutoModelForCausalLM.from_pretrained(name).eval() for name in (args.teacher, args.student))
    dataset = load_dataset("json", data_files=args.dataset, split="train").select(range(args.num_groups))
    collator = DataCollatorForGroups(tokenizer.pad_token_id or tokenizer.eos_token_id, max_length=args.max_length)
    names = ["full", *args.k]
    losses, cosines, left_over = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    num_tokens = 0
    for index, row in enumerate(dataset):
        batch = collator([tokenize_group(row, index, processing_class=tokenizer)])
        with torch.no_grad():
            target = score_completions(teacher, batch, return_logits=True).logits[:].float()
            logits = score_completions(student, batch, return_logits=True).logits[:].float()
        vocab_size = min(target.shape[-1], logits.shape[-1])
        target, logits = target[:, :vocab_size], logits[:, :vocab_size].requires_grad_()
        logps = target.log_softmax(-1)
        gradients = {}
        for name in names:
            if name == "full":
                loss = token_soft_label_loss(logits, target)
            else:
                top_logps, top_ids = logps.topk(name)
                loss = topk_soft_label_loss(logits, top_ids, top_logps)
                left_over[name] += (1 - top_logps.exp().sum(-1)).sum().item()
            (gradients[name],) = torch.autograd.grad(loss.sum(), logits)
            losses[name] += loss.sum().item()
            cosines[name] += torch.cosine_similarity(gradients[name], gradients["full"], dim=-1).sum().item()
        num_tokens += len(logits)
    result = {"tokens": num_tokens, "vocab_size": vocab_size, "loss": losses["full"] / num_tokens}
    for k in args.k:
        result[f"k={k}"] = {
            "loss_difference": (losses[k] - losses["full"]) / num_tokens,
            "left_over_mass": left_over[k] / num_tokens,
            "gradient_cosine": cosines[k] / num_tokens,
            "bytes_per_token": 8 * k + 4,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="id or path")
    parser.add_argument("--student", required=True, help="id or path, of the same vocabulary")
    parser.add_argument("--dataset", required=True, help="a .jsonl file of groups")
    parser.add_argument("--num_groups", type=int, default=50)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    main(parser.parse_args())
