"""The forward of packed rows: a model reads each prompt once for all completions of its group.

The model sees one sequence and one forward, so what wraps it (DDP, DeepSpeed, FSDP, LoRA, gradient checkpointing) needs
no care. Attention alone must know who sees whom: through the attention interface of transformers it is handed the
layout, and calls the model's own attention function on the prompts, and on the tails with the keys of their prompt.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .packed_rows import PackedRows, query_slices
from .tiles import core_model


_IMPLEMENTATIONS = ("sdpa", "eager")  # those that take a mask for each row
_SUFFIX = "_shared_prompts"

_unsuited = WeakKeyDictionary()  # models whose forward lost the layout on the way, and how


def _own_attention(module: torch.nn.Module, implementation: str) -> Callable:
    if implementation != "eager":
        return AttentionInterface()[implementation]
    # A model's own file has it, under the name that transformers gives it everywhere.
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))


@torch.compiler.disable  # every batch has another layout, and would be compiled anew
def _packed_attention(own, implementation, module, query, key, value, packed_rows: PackedRows, **kwargs):
    def attend(query, key, value, mask):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if mask is None:
            return own(module, query, key, value, None, **kwargs)[0]
        outputs, before = [], key.shape[2] - query.shape[2]
        for rows in query_slices(query.shape[2]):
            keys = slice(0, before + rows.stop)
            seen = mask[:, :, rows, keys]
            if implementation == "eager":
                seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, torch.finfo(query.dtype).min)
            states = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            outputs.append(own(module, *states, seen, **kwargs)[0])
        return torch.cat(outputs, dim=1)

    window = kwargs.get("sliding_window")
    packed_rows.windows.append(window)
    split = (packed_rows.split(states.squeeze(0).transpose(0, 1)) for states in (query, key, value))
    outputs = []
    for block, queries, keys, values in zip(packed_rows.blocks, *split, strict=True):
        prompt_mask, tail_mask = block.masks(window)
        if implementation == "sdpa" and (window is None or window >= block.prompt_shape[1]):
            prompt_mask = None  # plainly causal, which it does faster
        of_prompts = attend(queries[0], keys[0], values[0], prompt_mask)
        of_tails = queries[1]
        if block.tail_shape[1] > 0:
            keys, values = (torch.cat([block.to_rows(pair[0]), pair[1]], dim=1) for pair in (keys, values))
            of_tails = attend(of_tails, keys, values, tail_mask)
        outputs.append((of_prompts, of_tails))
    return packed_rows.join(outputs).unsqueeze(0), None


def _attention_of(implementation: str) -> Callable:
    def attention(module, query, key, value, attention_mask, *, packed_rows: PackedRows | None = None, **kwargs):
        own = _own_attention(module, implementation)
        if packed_rows is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        return _packed_attention(own, implementation, module, query, key, value, packed_rows, **kwargs)

    return attention


for _implementation in _IMPLEMENTATIONS:
    AttentionInterface.register(_implementation + _SUFFIX, _attention_of(_implementation))
    AttentionMaskInterface.register(_implementation + _SUFFIX, AttentionMaskInterface()[_implementation])


def implementation_of(model: torch.nn.Module) -> str:
    """
    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `str`: Its own attention, be it wrapped for packed rows or not.
    """
    return core_model(model).config.get_text_config()._attn_implementation.removesuffix(_SUFFIX)


def why_not_shared(model: torch.nn.Module) -> str | None:
    """
    Why a model cannot read packed rows.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `str`, *optional*: The reason, or `None` if it can.
    """
    outer, core = extract_model_from_parallel(model), core_model(model)
    if isinstance(outer, PeftModel) and outer.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before every row"
    if not isinstance(core, PreTrainedModel) or not core._can_set_attn_implementation():
        return "it does not use the attention interface of transformers"
    config = core.config.get_text_config()
    implementation = implementation_of(model)
    if implementation not in _IMPLEMENTATIONS:
        return f"its attention is {implementation!r}, and only 'sdpa' and 'eager' take a mask for each row"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of {' and '.join(sorted(others))}"
    return _unsuited.get(core)


def forward_packed(
    model: torch.nn.Module, input_ids: torch.Tensor, packed_rows: PackedRows, **model_kwargs: Any
) -> Mapping[str, torch.Tensor] | None:
    """
    One forward of packed rows. The model's attention is wrapped for it, on first use, and stays as it is for every
    other call.

    Args:
        model (`torch.nn.Module`):
            Causal language model for which [`why_not_shared`] knows no reason.
        input_ids (`torch.Tensor` of shape `(N, L)`):
            Tokens of the batch.
        packed_rows ([`PackedRows`]):
            Their layout.
        **model_kwargs:
            Passed to the model's forward.

    Returns:
        `Mapping`, *optional*: The model's output, or `None` if the layout did not reach every layer, which
        [`why_not_shared`] will say from then on.

    Raises:
        `ValueError`: If it did not, and there are other processes.
    """
    core = core_model(model)
    config = core.config.get_text_config()
    if not config._attn_implementation.endswith(_SUFFIX):
        core.set_attn_implementation(config._attn_implementation + _SUFFIX)
    outputs = model(
        input_ids=input_ids.flatten()[packed_rows.source].unsqueeze(0),
        attention_mask=input_ids.new_ones(
            1, 1, 1, 1, dtype=torch.bool
        ),  # of four dimensions: taken as it is, and no other is made
        position_ids=packed_rows.position_ids,
        use_cache=False,
        packed_rows=packed_rows,
        **model_kwargs,
    )
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if len(packed_rows.windows) < config.num_hidden_layers:
        _unsuited[core] = "it does not hand what its forward is given to the attention of every layer"
    elif getattr(config, "sliding_window", None) and slides and not any(packed_rows.windows):
        _unsuited[core] = "it does not tell its attention of the sliding window"
    if core in _unsuited and PartialState().num_processes > 1:  # another forward here alone would hang the others
        raise ValueError(f"The model cannot share prompts: {_unsuited[core]}. Set `prompt_sharing` to 'off'.")
    return None if core in _unsuited else outputs
