"""Groups shared out among processes: the same steps, and nobody waits long."""

import gzip
import json

import pytest
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from shared_data import shared_data
from tiny import byte_tokenizer
from torch.utils.data import SequentialSampler

from grkd_trl.data import DataCollatorForGroups, prepare_groups
from grkd_trl.data.sampler import BalancedSampler, GroupedByLength


def batches_of(sampler, batch_size):
    order = list(sampler)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def test_by_hand():
    """Rows of 1, costs 5, 1, 4, 2, and one group too few for a second step."""
    sampler = BalancedSampler(
        SequentialSampler(range(5)), [1] * 5, [5, 1, 4, 2, 9], batch_size=2, num_processes=2, accumulation_steps=1
    )
    # 5 opens a batch and 4 the other; 2 makes 2 * 4 of it where it would make 2 * 5 of the first, and 1 fills that.
    assert list(sampler) == [0, 1, 2, 3, 4]
    assert len(sampler) == 5


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_steps_keep_their_groups(accumulation_steps):
    rows = range(50)
    inner = SeedableRandomSampler(rows, data_seed=7)
    sampler = BalancedSampler(
        SeedableRandomSampler(rows, data_seed=7),
        [2 + row % 5 for row in rows],
        [1 + row * row % 37 for row in rows],
        batch_size=3,
        num_processes=2,
        accumulation_steps=accumulation_steps,
    )
    orders, size = [], 6 * accumulation_steps
    for epoch in range(2):
        inner.set_epoch(epoch)
        sampler.set_epoch(epoch)
        plain, ours = list(inner), list(sampler)
        assert [sorted(step) for step in batches_of(ours, size)] == [sorted(step) for step in batches_of(plain, size)]
        assert ours != plain
        orders.append(ours)
    assert orders[0] != orders[1]
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]


def test_groups_of_similar_length_come_in_another_order_each_epoch():
    lengths = [1 + row * row % 37 for row in range(200)]
    orders = []
    for epoch in (0, 1, 0):
        sampler = GroupedByLength(lengths, step_size=4, seed=7)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(200))
        apart = [abs(lengths[i] - lengths[j]) for step in batches_of(orders[-1], 4) for i in step for j in step]
        assert sum(apart) / len(apart) < 2  # 12 in a random order
    assert orders[0] == orders[2] != orders[1]


@pytest.fixture(scope="module")
def oasst():
    with gzip.open(shared_data("oasst_ranked/ranked_groups.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [
        {"prompt": "\n".join(turn["content"] for turn in row["prompt"]), "completions": row["completions"]}
        for row in rows
    ]
    return prepare_groups(Dataset.from_list(rows), byte_tokenizer(), max_length=2048)


def idle_share(groups, sampler, batch_size, num_processes):
    """Share of the time that processes wait for the slowest, if time goes with padded tokens."""
    collate = DataCollatorForGroups(pad_token_id=0, max_length=2048)
    batches = [batch for batch in batches_of(sampler, batch_size) if len(batch) == batch_size]
    costs = [collate([groups[row] for row in batch])["input_ids"].numel() for batch in batches]
    rounds = [costs[start : start + num_processes] for start in range(0, len(costs) - 1, num_processes)]
    return sum(max(costs) - cost for costs in rounds for cost in costs) / sum(
        max(costs) * len(costs) for costs in rounds
    )


@pytest.mark.parametrize("batch_size, accumulation_steps", [(4, 1), (4, 4), (2, 4), (8, 1)])
def test_no_process_waits_long(oasst, batch_size, accumulation_steps):
    rows, lengths = oasst["num_completions"], [min(length, 2048) for length in oasst["length"]]
    random = SeedableRandomSampler(oasst, data_seed=0)
    shared = BalancedSampler(
        SeedableRandomSampler(oasst, data_seed=0),
        rows,
        lengths,
        batch_size=batch_size,
        num_processes=2,
        accumulation_steps=accumulation_steps,
    )
    waits = {name: idle_share(oasst, order, batch_size, 2) for name, order in (("plain", random), ("ours", shared))}
    print(batch_size, accumulation_steps, waits)
    assert waits["ours"] < 0.1
    assert waits["ours"] < waits["plain"]
