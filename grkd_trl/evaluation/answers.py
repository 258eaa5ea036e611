"""Answers of a model to the conversations of a benchmark."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import encode_prompt
from ..teacher.models import hash_weights
from ..teacher.writing import end_token_ids, write_completions
from .files import append_rows, read_appended


def write_answers(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    *,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    cache_path: str | Path | None = None,
    progress: bool = True,
) -> list[str]:
    """
    Write the next turn of each conversation. A sampled answer depends on its conversation, the seed and the model, and
    not on what is written beside it or on where a run was stopped.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Without a chat template the model reads the messages as paragraphs of plain text.
        conversations (`list[list[dict[str, str]]]`):
            N conversations, each a list of messages that ends with the user's.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest answer, in tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0 takes the most likely token at each step.
        batch_size (`int`, *optional*, defaults to `16`):
            Conversations in a batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampled answers.
        cache_path (`str` or `Path`, *optional*):
            JSONL file that each batch of answers is added to as it is written, and from which a run that was stopped
            resumes. Answers of another model or of other settings in it are not used.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[str]`: N answers without special tokens, stripped; `""` where the model ended at once.

    Raises:
        `OSError`: If the file of answers cannot be written to. The batches before it are kept.
    """
    prompts: list = conversations
    if processing_class.chat_template is None:
        prompts = ["".join(message["content"] + "\n\n" for message in messages) for messages in conversations]
    prompt_ids = [encode_prompt(processing_class, prompt) for prompt in prompts]
    asked: Counter[str] = Counter()
    seeds = []
    for ids in prompt_ids:
        name = json.dumps([seed, ids])
        seeds.append(int.from_bytes(hashlib.sha256(f"{asked[name]} {name}".encode()).digest()[:6], "big"))
        asked[name] += 1  # the same conversation again is another draw

    kept: dict[str, str] = {}
    keys = [""] * len(prompt_ids)
    if cache_path is not None:
        cache_path = Path(cache_path).expanduser()
        append_rows(cache_path, [])  # a file that cannot be written to is found before the model is asked
        ends = sorted(end_token_ids(model, processing_class))
        settings = [hash_weights(model), max_new_tokens, temperature, ends]
        keys = [
            hashlib.sha256(json.dumps([*settings, *row]).encode()).hexdigest()
            for row in zip(seeds, prompt_ids, strict=True)
        ]
        kept = {row["key"]: row["answer"] for row in read_appended(cache_path) if {"key", "answer"} <= row.keys()}
    answers = [kept.get(key) for key in keys]
    missing = [row for row, answer in enumerate(answers) if answer is None]
    missing.sort(key=lambda row: len(prompt_ids[row]))  # prompts of similar length share a batch
    for start in tqdm(range(0, len(missing), batch_size), desc="Writing answers", disable=not progress):
        rows = missing[start : start + batch_size]
        written = write_completions(
            model,
            processing_class,
            [prompt_ids[row] for row in rows],
            num_completions=1,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=1.0,
            batch_size=batch_size,
            seeds=[seeds[row] for row in rows],
        )
        for row, (text,) in zip(rows, written.texts, strict=True):
            answers[row] = text.strip()
        if cache_path is not None:
            append_rows(cache_path, [{"key": keys[row], "answer": answers[row]} for row in rows])
    return [answer or "" for answer in answers]
