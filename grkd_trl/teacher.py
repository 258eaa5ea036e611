"""Who writes completions and who scores them: local causal language models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer import disable_dropout_in_model

from ._trl import create_model_from_path, get_config_model_id, pad, prepare_deepspeed, prepare_fsdp, tokenize
from .groups import DataCollatorForGroups, tokenize_group
from .scoring import score_completions, sequence_scores, to_groups


logger = logging.get_logger(__name__)


def load_teacher(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """
    Load a frozen teacher: evaluation mode, no dropout, no gradients.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, path, or a model, which is frozen in place.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained` where `model` is an id or path; `dtype` defaults to `float32`.

    Returns:
        [`~transformers.PreTrainedModel`]: The teacher.
    """
    if isinstance(model, str):
        model = create_model_from_path(model, **(init_kwargs or {}))
    elif init_kwargs:
        logger.warning("`teacher_model_init_kwargs` is ignored: `teacher_model` is a model already.")
    disable_dropout_in_model(model)
    return model.requires_grad_(False).eval()


def prepare_teacher(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """
    Place a teacher beside the student: sharded as the student is under ZeRO-3 and FSDP, else whole on the device.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen teacher.
        accelerator ([`~accelerate.Accelerator`]):
            The student's accelerator.

    Returns:
        `torch.nn.Module`: The teacher, wrapped for scoring.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def shared_vocabulary(
    student: PreTrainedModel, teacher: PreTrainedModel, processing_class: PreTrainedTokenizerBase
) -> int:
    """
    Number of leading token ids that mean the same to student and teacher. Embeddings padded to different sizes are
    fine where the tokenizers agree: logits are cut to the smaller. The teacher's tokenizer is read from where the
    teacher was loaded; without one the teacher is taken to share the student's.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Student.
        teacher ([`~transformers.PreTrainedModel`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.

    Returns:
        `int`: The smaller `vocab_size`.

    Raises:
        `ValueError`: If the tokenizers differ, or either model is too small for the tokenizer.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    try:
        teacher_vocab = AutoTokenizer.from_pretrained(get_config_model_id(teacher.config)).get_vocab()
    except (OSError, ValueError):  # built in memory, or saved without a tokenizer
        teacher_vocab = processing_class.get_vocab()
    if teacher_vocab != processing_class.get_vocab() or min(sizes) < len(processing_class):
        raise ValueError(
            f"The teacher cannot read the student's tokens: `vocab_size` is {sizes[0]} for the student and {sizes[1]} "
            f"for the teacher, and their tokenizers have {len(processing_class)} and {len(teacher_vocab)} entries. "
            "Token soft labels, token ranking and scoring in the training step need one tokenizer. With another, "
            "score the groups beforehand (`grkd_trl.teacher.score_groups` with the teacher's tokenizer) and train "
            'with `soft_label="group"` or `"none"`.'
        )
    return min(sizes)


def _pad_token_id(processing_class: PreTrainedTokenizerBase) -> int:
    # Llama-3's tokenizer has no pad token; masks come from lengths, so any token will do.
    pad_token_id = processing_class.pad_token_id
    return processing_class.eos_token_id if pad_token_id is None else pad_token_id


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[dict[str, str]]],
    *,
    num_completions: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[list[list[str]], list[list[bool]]]:
    """
    Write completions, in evaluation mode. Prompts of similar length share a batch; draws come from torch's global
    generator.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list[str]` or `list[list[dict]]`):
            P prompts, as text or messages.
        num_completions (`int`, *optional*, defaults to `1`):
            Completions for each prompt (G).
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; 0 takes the most likely token at each step.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability to sample from.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts in a batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `tuple[list[list[str]], list[list[bool]]]`: Texts without special tokens, `(P, G)`, and whether each was cut
        at `max_new_tokens` before its EOS.
    """
    # `generate` takes what is not said from the model's generation config, which may hold other sampling settings.
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None}
    cutoffs = {"min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    sampling = {"do_sample": False} | neutral
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} | cutoffs
    prompt_ids = []
    for prompt in prompts:
        template = {"add_generation_prompt": True} if isinstance(prompt, list) else {}
        ids = tokenize(processing_class, prompt, **template)["input_ids"]
        ends_itself = not template and ids[-1] == processing_class.eos_token_id  # some tokenizers add EOS to text
        prompt_ids.append(ids[:-1] if ends_itself else ids)
    order = sorted(range(len(prompts)), key=lambda row: len(prompt_ids[row]))
    texts, clipped = [[]] * len(prompts), [[]] * len(prompts)
    # Chat models end a turn with a token of their own, which stands beside EOS in the generation config.
    ends = model.generation_config.eos_token_id
    ends = {processing_class.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    pad_token_id = _pad_token_id(processing_class)

    def write_batch(rows: list[int]) -> None:
        ids = [torch.tensor(prompt_ids[row], device=model.device) for row in rows]
        input_ids = pad(ids, padding_value=pad_token_id, padding_side="left")
        output = model.generate(
            input_ids=input_ids,
            attention_mask=pad([torch.ones_like(row) for row in ids], padding_side="left"),
            max_new_tokens=max_new_tokens,
            num_return_sequences=num_completions,
            eos_token_id=sorted(ends),
            pad_token_id=pad_token_id,
            use_cache=True,
            **sampling,
        )[:, input_ids.shape[1] :]
        decoded = processing_class.batch_decode(output, skip_special_tokens=True)
        ended = torch.isin(output, torch.tensor(sorted(ends), device=output.device)).any(-1).tolist()
        for position, row in enumerate(rows):
            group = slice(position * num_completions, (position + 1) * num_completions)
            texts[row], clipped[row] = decoded[group], [not end for end in ended[group]]

    with _evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Writing completions", disable=not progress):
            write_batch(order[start : start + batch_size])
    return texts, clipped


@torch.no_grad()
def score_groups(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    score: str = "mean",
    tokens_per_batch: int = 16384,
    progress: bool = True,
) -> Dataset:
    """
    Score every completion of a dataset of groups under a teacher, in evaluation mode and in batches of similar length.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer, which need not be the student's.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completions`, and optionally `clipped`.
        score (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (nats per token) or `"sum"` (nats) of the log-probabilities.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Tokens in a batch, padding included. A larger group is a batch of its own.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: The dataset with a column `teacher_scores`, in place of one it had.
    """
    if "teacher_scores" in dataset.column_names:
        dataset = dataset.remove_columns("teacher_scores")
    groups = [tokenize_group(row, index, processing_class=processing_class) for index, row in enumerate(dataset)]
    lengths = [len(g["prompt_ids"]) + max(map(len, g["completion_ids"])) for g in groups]
    collator = DataCollatorForGroups(pad_token_id=_pad_token_id(processing_class))
    scores = [[]] * len(groups)

    def score_batch(rows: list[int]) -> None:
        batch = {name: tensor.to(model.device) for name, tensor in collator([groups[row] for row in rows]).items()}
        logps = score_completions(model, batch).per_token_logps
        values = to_groups(sequence_scores(logps, batch["completion_mask"], score=score), batch["group_mask"])
        for row, value in zip(rows, values.tolist(), strict=True):
            scores[row] = value[: len(groups[row]["completion_ids"])]

    rows, num_sequences = [], 0
    order = sorted(range(len(groups)), key=lengths.__getitem__)  # the row in hand is the batch's longest
    with _evaluating(model):
        for row in tqdm(order, desc="Scoring groups", disable=not progress):
            size = len(groups[row]["completion_ids"])
            if rows and (num_sequences + size) * lengths[row] > tokens_per_batch:
                score_batch(rows)
                rows, num_sequences = [], 0
            rows.append(row)
            num_sequences += size
        if rows:
            score_batch(rows)
    return dataset.add_column("teacher_scores", scores)
