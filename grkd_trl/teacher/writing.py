"""Writing completions with a local model."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .._trl import forget_image_positions, pad
from ..data import decode_completion, encode_prompt, tokenizer_hash
from ..scoring import eval_mode, without_router_loss
from ..scoring.images import TOKEN_TYPES, image_kwargs, image_token_ids, is_sharded
from .draws import DrawByRow, ManyEnded, RefuseNaN, row_numbers
from .prompt_cache import prompt_cache
from .protocol import Completions


# Settings of a generation config, each `None` where nothing is asked for, that would draw from another distribution.
_NOT_ASKED_FOR = (
    *(
        "min_new_tokens",
        "max_time",
        "guidance_scale",
        "top_h",
        "watermarking_config",
        "exponential_decay_length_penalty",
    ),
    *("bad_words_ids", "sequence_bias", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
)


def pad_token_id(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> int:
    """
    Token to pad with: the pad token, or EOS for tokenizers without one, such as Llama 3's. Masks come from lengths.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `int`: Its pad token, or EOS.

    Raises:
        `ValueError`: If it has neither.
    """
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    padding = tokenizer.pad_token_id
    if padding is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has neither a `pad_token` nor an `eos_token`, and batches are padded with one of them. Set "
            '`tokenizer.eos_token = "..."` to the token that the model ends with.'
        )
    return tokenizer.eos_token_id if padding is None else padding


def end_token_ids(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> set[int]:
    """
    Tokens that end a completion: EOS, and the tokens that end a chat model's turn, which its generation config names.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that writes.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        `set[int]`: Their ids.
    """
    ends = model.generation_config.eos_token_id
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _images_of(
    model: PreTrainedModel, images: list[dict[str, torch.Tensor]], num_rows: int, input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Arguments of `generate` for the images of some prompts, of `num_rows` rows each, that are padded on the left."""
    if not any(images):
        return {}
    batch: dict[str, Any] = {"group_mask": torch.ones(len(images), num_rows, dtype=torch.bool)}
    for name in TOKEN_TYPES:
        if any(name in of_prompt for of_prompt in images):
            of_prompts = [of_prompt.get(name, torch.zeros(0, dtype=torch.long)) for of_prompt in images]
            missing = [input_ids.shape[1] - len(types) for types in of_prompts]
            types = [F.pad(types, (size, 0)) for types, size in zip(of_prompts, missing, strict=True)]
            batch[name] = torch.stack(types).repeat_interleave(num_rows, 0)
    pixels = [{name: value for name, value in of_prompt.items() if name not in TOKEN_TYPES} for of_prompt in images]
    batch["image_inputs"] = pixels
    return image_kwargs(model, send_to_device(batch, input_ids.device))


def generate_completions(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[dict[str, str]]],
    *,
    num_completions: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    batch_size: int = 64,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> tuple[list[list[str]], list[list[bool]]]:
    """
    Write completions, in evaluation mode. Prompts of similar length share a batch, the longest ones the first, and
    completions that ended leave it. Each prompt's draws come from a seed of its own, drawn from torch's global generator.

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
        num_beams (`int`, *optional*, defaults to `1`):
            Beams to search with, for which `temperature` is 0.
        batch_size (`int`, *optional*, defaults to `64`):
            Most prompts in a batch.
        tokens_per_batch (`int`, *optional*):
            Most tokens in a batch: all completions with their prompts, each as long as the longest of them can become.
            What does not fit is a batch of its own. The draws are the same.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `tuple[list[list[str]], list[list[bool]]]`: Texts, `(P, G)`, see [`~data.decode_completion`], and whether each was
        cut at `max_new_tokens` before its end token. [`LocalTeacher.generate`] gives the token ids as well.
    """
    written = write_completions(
        model,
        processing_class,
        [encode_prompt(processing_class, prompt) for prompt in prompts],
        num_completions=num_completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        num_beams=num_beams,
        progress=progress,
    )
    return written.texts, written.clipped


@torch.no_grad()
def write_completions(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt_ids: list[list[int]],
    *,
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    tokens_per_batch: int | None = None,
    num_beams: int = 1,
    seeds: list[int] | None = None,
    images: list[dict[str, torch.Tensor]] | None = None,
    progress: bool = False,
) -> Completions:
    """
    Like [`generate_completions`], for prompts that are tokenized.

    Args:
        model, processing_class, num_completions, max_new_tokens, temperature, top_p, batch_size, tokens_per_batch, num_beams,
        progress:
            As there.
        prompt_ids (`list[list[int]]`):
            Ids of P prompts.
        seeds (`list[int]`, *optional*):
            Seed of each prompt's draws, in place of torch's global generator.
        images (`list[dict[str, torch.Tensor]]`, *optional*):
            What a processor makes of each prompt's images, see [`~data.process_images`]; empty for a prompt without.

    Returns:
        [`Completions`]: With the ids that were written.

    Raises:
        `ValueError`: If the model's logits are not finite, the tokenizer has no token to pad with, there are images
            or a temperature, and beams, a batch has no room for a prompt, or a sharded model is given `tokens_per_batch`.
    """
    if batch_size < 1 or (tokens_per_batch is not None and tokens_per_batch < 1):
        raise ValueError(
            f"A batch needs room for a prompt: got `batch_size={batch_size}` and `tokens_per_batch={tokens_per_batch}`."
        )
    if tokens_per_batch is not None and is_sharded(model):
        raise ValueError(
            "A sharded model writes as many batches on every process, and `tokens_per_batch` would make them differ. Set "
            "the number of prompts in a batch instead."
        )
    images = images or [{}] * len(prompt_ids)
    if any(images) and num_beams > 1:
        raise ValueError(
            "Prompts with images cannot be searched with beams. Set `num_beams=1`, in `SeqKDConfig` `decoding` to "
            '"greedy" or "sampling".'
        )
    if temperature > 0 and num_beams > 1:
        raise ValueError(
            f"A search with beams draws nothing: got `temperature={temperature}` with `num_beams={num_beams}`. Set "
            "`temperature=0`, or `num_beams=1` to sample."
        )
    # What is not passed comes from the model's generation config, which may hold other sampling settings.
    neutral: dict[str, Any] = {
        "do_sample": False,
        "num_beams": num_beams,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": image_token_ids(model) or None,
        "return_dict_in_generate": False,
        "min_length": 0,
        "encoder_repetition_penalty": 1.0,
        "encoder_no_repeat_ngram_size": 0,
        "length_penalty": 1.0,
        "early_stopping": False,
    }
    asked_for = model.generation_config.to_dict()
    neutral |= {name: None for name in _NOT_ASKED_FOR if asked_for.get(name) is not None}
    if temperature > 0 and seeds is None:
        seeds = torch.randint(2**62, (len(prompt_ids),)).tolist()
    # The longest prompts come first, so that a batch that does not fit in memory fails at once.
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), reverse=True)
    texts: list[list[str]] = [[] for _ in prompt_ids]
    clipped: list[list[bool]] = [[] for _ in prompt_ids]
    completion_ids: list[list[list[int]]] = [[] for _ in prompt_ids]
    ends = end_token_ids(model, processing_class)
    padding = pad_token_id(processing_class)
    sharded = isinstance(model, FSDPModule)  # `generate` detects ZeRO-3 by itself, but not accelerate's FSDP2
    rows_per_prompt = num_completions if num_beams == 1 else 1

    def write_batch(rows: list[int]) -> None:
        ids = [torch.tensor(prompt_ids[row], device=model.device) for row in rows for _ in range(rows_per_prompt)]
        input_ids = pad(ids, padding_value=padding, padding_side="left")
        attention_mask = pad([torch.ones_like(row) for row in ids], padding_side="left")
        num_prompt = input_ids.shape[1]
        # Each prompt is read once; its rows go on from there. A search with beams repeats and reorders rows by itself.
        cache, numbers = None, torch.empty(0)
        if num_beams == 1 and not any(images):
            first = slice(None, None, num_completions)
            cache = prompt_cache(model, input_ids[first], attention_mask[first], num_completions, max_new_tokens)
        if temperature > 0 and seeds is not None:
            numbers = torch.cat([row_numbers(seeds[row], num_completions, max_new_tokens) for row in rows])
        written: dict[int, tuple[list[int], bool]] = {}  # ids of each completion, and whether it was cut
        going = list(range(len(rows) * num_completions))
        while True:
            processors = LogitsProcessorList([RefuseNaN()])
            if temperature > 0:
                processors += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
                processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
                processors.append(DrawByRow(numbers[going], num_prompt))
            criteria = [] if cache is None else [ManyEnded(ends, len(going), model.device)]
            output = model.generate(  # type: ignore[operator]  # a method, for which torch knows no type
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                max_new_tokens=num_prompt + max_new_tokens - input_ids.shape[1],
                num_return_sequences=num_completions // rows_per_prompt,
                eos_token_id=sorted(ends) or None,
                pad_token_id=padding,
                use_cache=True,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=True if sharded else None,
                **_images_of(model, [images[row] for row in rows], rows_per_prompt, input_ids),
                **without_router_loss(model),
                **neutral,
            )
            for row, ids in zip(going, output[:, num_prompt:].tolist(), strict=True):
                end = next((index for index, token in enumerate(ids) if token in ends), None)
                written[row] = (ids, True) if end is None else (ids[: end + 1], False)
            kept = [position for position, row in enumerate(going) if written[row][1]]
            if cache is None or not kept or output.shape[1] == num_prompt + max_new_tokens:
                break
            forget_image_positions(model)  # those of the rows that leave
            cache.batch_select_indices(torch.tensor(kept, device=model.device))
            num_new = output.shape[1] - input_ids.shape[1]
            input_ids, attention_mask = output[kept], F.pad(attention_mask[kept], (0, num_new), value=1)
            going = [going[position] for position in kept]
        for position, (ids, cut) in sorted(written.items()):
            row = rows[position // num_completions]
            completion_ids[row].append(ids)
            clipped[row].append(cut)
            texts[row].append(decode_completion(processing_class, ids, clipped=cut))

    batches = []
    while order:
        longest = (len(prompt_ids[order[0]]) + max_new_tokens) * max(num_completions, num_beams)
        size = batch_size if tokens_per_batch is None else max(min(batch_size, tokens_per_batch // longest), 1)
        batches.append(order[:size])
        order = order[size:]
    with eval_mode(model):
        for rows in tqdm(batches, desc="Writing completions", disable=not progress):
            write_batch(rows)
    return Completions(texts, clipped, completion_ids, prompt_ids, tokenizer_hash(processing_class))
