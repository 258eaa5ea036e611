"""Real text: an epoch over people's and models' rankings teaches the student to rank them."""

import gzip
import json
import math

import pytest
import torch
from datasets import Dataset
from runs import logged, make_trainer
from shared_data import shared_data
from tiny import CHAT_TEMPLATES, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def read_jsonl(name, num=None):
    with gzip.open(shared_data(name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(num or 10**9), strict=False)]


def shorten(text, length):
    """So that no prompt fills the 256 tokens of a row, and every group is trained on."""
    return text[-length:]


def ultrafeedback():
    """200 preferences, with the scores of GPT-4."""
    return [
        {
            "prompt": shorten(row["prompt"], 100),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "score_chosen": row["metadata"]["score_chosen"],
            "score_rejected": row["metadata"]["score_rejected"],
        }
        for row in read_jsonl("ultrafeedback/train.jsonl.gz", 200)
    ]


def oasst_ranked():
    """211 conversations with 2 to 9 replies that people ranked, 0 the best."""
    (path,) = shared_data("oasst_ranked").glob("*.jsonl.gz")
    return [
        {
            "prompt": [message | {"content": shorten(message["content"], 200)} for message in row["prompt"][-2:]],
            "completions": row["completions"],
            "teacher_scores": [-float(rank) for rank in row["ranks"]],
        }
        for row in read_jsonl(f"oasst_ranked/{path.name}")
    ]


def make_tokenizer(rows):
    """Byte-level BPE of 1000 entries, trained on the rows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([json.dumps(row, ensure_ascii=False) for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        chat_template=CHAT_TEMPLATES["plain"],
    )


@pytest.mark.parametrize("read, num_groups, learning_rate", [(ultrafeedback, 200, 5e-3), (oasst_ranked, 211, 3e-3)])
def test_an_epoch_teaches_to_rank(tmp_path, read, num_groups, learning_rate):
    rows = read()
    assert len(rows) == num_groups
    tokenizer = make_tokenizer(rows)
    trainer = make_trainer(
        tmp_path,
        model=tiny_model("llama", len(tokenizer), hidden_size=64, intermediate_size=128),
        teacher_model=None,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        soft_label="none",
        ranking_temperature=0.1,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        max_length=256,
    )
    assert len(trainer.train_dataset) == num_groups
    before = trainer.evaluate(trainer.train_dataset)
    assert 0.4 < before["eval_rank/accuracy"] < 0.6
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    for name in ("loss", "grad_norm"):
        assert all(math.isfinite(value) for value in logged(trainer, name))
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert after["eval_rank/accuracy"] > 0.65
    assert after["eval_loss"] < before["eval_loss"]
