"""Tokenizers, models and groups that need no hub: what `quickstart.py` and the tasks of `compare.py` start from."""

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grkd_trl.teacher import generate_completions, score_groups


PROMPT = "IN: {} OUT: "
MAX_NEW_TOKENS = 49  # SCAN's longest actions, and EOS


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at whitespace and knows the words of `texts`."""
    words = sorted({word for text in texts for word in text.split()})
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def new_llama(tokenizer: PreTrainedTokenizerFast, *, num_layers: int, width: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def training(output_dir: Path, *, max_steps: int, learning_rate: float, batch_size: int, seed: int = 0) -> dict:
    """What all runs share of their configuration. In bfloat16, models this small would not learn well."""
    return {
        "output_dir": str(output_dir),
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # as a share of the steps
        "per_device_train_batch_size": batch_size,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": max(max_steps // 20, 1),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


def pretrain(
    model: PreTrainedModel, tokenizer, rows: list[tuple[str, str]], *, max_steps: int, batch_size: int, lr: float
) -> None:
    """Train from scratch on pairs of prompt and completion: a plain loop, in batches of similar length."""
    prompts = tokenizer([prompt for prompt, _ in rows]).input_ids
    completions = tokenizer([completion + tokenizer.eos_token for _, completion in rows]).input_ids
    texts = list(zip(prompts, completions, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max_steps, pct_start=0.1)
    rng, batches = random.Random(0), []
    for _ in range(max_steps):
        if not batches:
            pool = sorted(rng.sample(texts, min(len(texts), 50 * batch_size)), key=lambda text: len(text[1]))
            batches = [pool[start : start + batch_size] for start in range(0, len(pool) - batch_size + 1, batch_size)]
            rng.shuffle(batches)
        batch = batches.pop()
        input_ids = [torch.tensor(prompt + completion) for prompt, completion in batch]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in batch]
        loss = model(input_ids=pad_sequence(input_ids, True), labels=pad_sequence(labels, True, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def write_groups(teacher: PreTrainedModel, student: PreTrainedModel, tokenizer, prompts: list[str]) -> Dataset:
    """Groups with the teacher's scores: one completion by the teacher and three by the student."""
    groups = {"prompt": prompts, "completions": [[] for _ in prompts], "clipped": [[] for _ in prompts]}
    for writer, num_completions in ((teacher, 1), (student, 3)):
        texts, clipped = generate_completions(
            writer,
            tokenizer,
            prompts,
            num_completions=num_completions,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=128,
            progress=False,
        )
        for row in range(len(prompts)):
            groups["completions"][row] += texts[row]
            groups["clipped"][row] += clipped[row]
    return score_groups(teacher, tokenizer, Dataset.from_dict(groups), progress=False)
