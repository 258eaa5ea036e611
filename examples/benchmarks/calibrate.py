"""
What attention costs on this device, as `grkd_trl/scoring/attention_costs.py` holds it.

    python examples/benchmarks/calibrate.py --hidden_size 2048

Prints the line of that file for this kind of device, with the measurements that it comes from. `padding` is not measured.
"""

import argparse
import json
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F

from grkd_trl.examples.benchmarks.common import DEVICE, DTYPE, batch_of, interleaved, machine, make_model
from grkd_trl.scoring import score_completions
from grkd_trl.scoring.attention_costs import AttentionCosts, attention_costs, causal_pairs, query_slices
from grkd_trl.scoring.packed_check import chosen_ways
from grkd_trl.scoring.packed_rows import PackedRows, read_rows
from grkd_trl.scoring.packed_ways import ways_at_once


HEAD = 64  # sizes of a head
QUERIES = (128, 256, 512, 1024, 2048)  # of a call, to choose from
SHAPES = [(128, [64] * 4), (64, [128] * 4), (256, [256] * 2), (64, [64] * 4)]


def median(seconds):
    return sorted(seconds)[len(seconds) // 2]


def states(num_rows, length, hidden_size):
    return torch.randn(num_rows, hidden_size // HEAD, length, HEAD, device=DEVICE, dtype=DTYPE, requires_grad=True)


def attend(query, key, value, num_queries=None):
    """Forward and backward, with a mask in calls of `num_queries`, or plainly causal without."""
    if num_queries is None:
        outputs = [F.scaled_dot_product_attention(query, key, value, is_causal=True)]
    else:
        before = key.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE).tril(before)
        outputs = [
            F.scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, : before + rows.stop],
                value[:, :, : before + rows.stop],
                attn_mask=mask[rows, : before + rows.stop],
            )
            for rows in query_slices(query.shape[2], num_queries)
        ]
    torch.cat(outputs, dim=2).sum().backward()


def layout_of(way, length):
    return way.layout([(length, 0, 0, 0)], torch.device(DEVICE))


def attend_at_once(way, layout, *states):
    way.attend(*states, layout, dtype=DTYPE).sum().backward()


def of_layers(hidden_size, length, rounds):
    """Seconds of attention with a mask, causal attention, one small call, and a layer's matrices."""
    long, small = [states(1, length, hidden_size) for _ in range(3)], [states(1, 16, hidden_size) for _ in range(3)]
    tokens = torch.randn(length, hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    matrix = torch.randn(hidden_size, 12 * hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    functions = {f"masked {num}": lambda num=num: attend(*long, num) for num in QUERIES if num <= length}
    functions |= {
        "causal": lambda: attend(*long),
        "calls": lambda: [attend(*small, 16) for _ in range(64)],
        "matrices": lambda: (tokens @ matrix).sum().backward(),
    }
    for way in ways_at_once(torch.device(DEVICE)):
        with suppress(NotImplementedError):  # an older GPU
            attend_at_once(way, layout_of(way, length), *long)  # which compiles it
            functions[way.cost] = partial(attend_at_once, way, layout_of(way, length), *long)
    return {name: median(of) for name, of in interleaved(functions, rounds).items()}


def overhead(costs, hidden_size, rounds):
    """What packed rows cost beyond what these costs say, as a ratio to plain rows."""
    model = make_model(1024, hidden_size, 2)
    shares = []
    for shape in SHAPES:
        batch = batch_of([shape], 1024)

        def step(sharing, batch=batch):
            score_completions(model, batch, prompt_sharing=sharing).per_token_logps.sum().backward()
            model.zero_grad()

        seconds = interleaved({name: lambda name=name: step(name) for name in ("on", "off")}, rounds)
        (num_rows, length), token = batch["input_ids"].shape, costs.token * hidden_size
        packed = PackedRows(
            read_rows(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))),
            batch["input_ids"].device,
            chosen_ways(model),
        )
        plain = num_rows * (length * token + costs.causal * causal_pairs(length, costs.queries))
        work = (packed.source.numel() * token + packed.cost) / plain
        shares.append(median(seconds["on"]) / median(seconds["off"]) / work)
    return max(shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048, help="Tokens of the sequence that attends.")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    seconds = of_layers(args.hidden_size, args.length, args.rounds)
    queries = min((num for num in QUERIES if num <= args.length), key=lambda num: seconds[f"masked {num}"])
    pair = seconds[f"masked {queries}"] / causal_pairs(args.length, queries)
    costs = AttentionCosts(
        queries=queries,
        call=max(round(seconds["calls"] / 64 / pair) - 16**2, 0),
        causal=round(seconds["causal"] / causal_pairs(args.length, queries) / pair, 2),
        token=round(seconds["matrices"] / args.length / args.hidden_size / pair, 2),
        padding=attention_costs(torch.device(DEVICE)).padding,
        worthwhile=1.0,
    )
    for way in ways_at_once(torch.device(DEVICE)):
        if way.cost in seconds:
            pairs = layout_of(way, args.length).num_pairs
            costs = costs._replace(**{way.cost: round(seconds[way.cost] / pairs / pair, 2)})
    costs = costs._replace(worthwhile=round(min(1 / overhead(costs, args.hidden_size, args.rounds), 1.0), 2))
    print(json.dumps({"seconds": seconds, "machine": machine()}))
    print(f'    "{DEVICE}": {costs},')


if __name__ == "__main__":
    main()
