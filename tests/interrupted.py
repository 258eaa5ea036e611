"""What the processes run that tests/test_generate_groups.py kills: tiny models, groups, a folder."""

import os
import sys
from pathlib import Path

from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher


def make_prompts(num=40):
    letters = "abcdefghijklmnop"
    prompts = [" ".join(letters[(i * j) % 16] for j in range(1, 2 + i % 5)) + " " for i in range(num)]
    return Dataset.from_dict({"prompt": prompts, "source_index": list(range(num))})


def make_teacher(seed, **kwargs):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", len(tokenizer), seed=seed, initializer_range=0.3, **kwargs)
    return LocalTeacher(model, tokenizer)


def config(folder, **kwargs):
    small = {"num_completions": 3, "max_completion_length": 8, "prompts_per_shard": 4, "completion_source": "mixed"}
    return GroupsConfig(str(folder), **small | kwargs)


def make(folder, rank=None, world_size=None, port=None):
    os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
    if rank is not None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **where})
    sys.stderr = open(os.devnull, "w")
    generate_groups(make_prompts(), config(folder), student=make_teacher(0), teacher=make_teacher(1))
