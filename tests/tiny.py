"""Tokenizers and models that are built in memory and train in milliseconds."""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from grkd_trl.scoring import tiles


WORDS = [*"abcdefghijklmnop"]

# Shapes of the families' own templates: how they start, end a turn and open the assistant's.
CHAT_TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma2": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}

_MODEL_TYPES = {"gemma3": "gemma3_text"}


def tiny_tokenizer(words: list[str] | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Words, `a` to `g` by default, split at whitespace; EOS is not the pad token; a BOS is added if asked for."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *(words or WORDS)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, so that any text decodes back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def tiny_model(architecture: str, vocab_size: int, *, seed: int = 0, **kwargs) -> PreTrainedModel:
    """
    A causal language model of two layers and random weights.

    Args:
        architecture (`str`):
            `"llama"`, `"qwen2"`, `"qwen3"`, `"gemma2"`, `"gemma3"`, `"mistral"` or `"gpt_neox"`.
        vocab_size (`int`):
            Size of the vocabulary.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        **kwargs:
            Fields of the configuration, `dtype` and `attn_implementation`.

    Returns:
        [`~transformers.PreTrainedModel`]: The model, in training mode.
    """
    dtype = kwargs.pop("dtype", torch.float32)
    attention = {"attn_implementation": kwargs.pop("attn_implementation")} if "attn_implementation" in kwargs else {}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if architecture != "gpt_neox":
        shape |= {"num_key_value_heads": 2, "head_dim": 8}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(
        _MODEL_TYPES.get(architecture, architecture), **{"vocab_size": vocab_size} | shape | tokens | kwargs
    )
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **attention).train()


def use_tiles(set_attribute: Callable[[object, str, int], None], num_logits: int) -> None:
    """Tiles of so many logits, for batches with more; `monkeypatch.setattr` undoes it after the test."""
    for name, value in {"LOGITS_AT_ONCE": num_logits, "LOGITS_PER_TILE": num_logits, "MIN_TILES": 1}.items():
        set_attribute(tiles, name, value)
