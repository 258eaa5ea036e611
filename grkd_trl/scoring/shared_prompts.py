"""The forward of packed rows: a model reads each prompt once for all completions of its group.

The model sees one sequence and one forward, so what wraps it (DDP, DeepSpeed, FSDP, LoRA, gradient checkpointing) needs
no care. Attention alone must know who sees whom: through the attention interface of transformers it is handed the
layout, and calls the model's own attention function on the prompts, and on the tails with the keys of their prompt, or
one of PyTorch's on all of them at once, see `packed_ways`.

What a model's code and configuration say against it is read here; that the numbers are those of plain rows is proved in
`packed_check`.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import logging

from .attention_costs import attention_costs, query_slices
from .packed_rows import AttentionCall, PackedRows
from .packed_ways import Way
from .tiles import core_model, takes, unwrap


_IMPLEMENTATIONS = ("sdpa", "eager")  # those that take a mask for each row
_SUFFIX = "_shared_prompts"

logger = logging.get_logger(__name__)


def in_words(error: Exception) -> str:
    """
    An error on one line.

    Args:
        error (`Exception`):
            Error.

    Returns:
        `str`: Its kind and message.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _own_attention(module: torch.nn.Module, implementation: str) -> Callable:
    if implementation != "eager":
        return AttentionInterface()[implementation]
    # A model's own file has it, under the name that transformers gives it everywhere.
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))


@torch.compiler.disable  # every batch has another layout, and would be compiled anew
def _packed_attention(own, implementation, module, query, key, value, mask, packed_rows: PackedRows, **kwargs):
    device_type = query.device.type  # autocast leaves queries in float32 where positions are
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype
    dropout, mask_elements = kwargs.get("dropout") or 0.0, 1 if mask is None else mask.numel()
    packed_rows.calls.append(AttentionCall(kwargs.get("sliding_window"), mask_elements, dtype, dropout))

    def attend(query, key, value, packed_rows, way: Way | None, **changed):
        options = kwargs | changed
        if way is None:
            return _attend_in_blocks(own, implementation, module, query, key, value, packed_rows, **options)
        return way.attend(query, key, value, packed_rows.layout(way), dtype=dtype, **options)

    if packed_rows.proof is not None:
        packed_rows.proof(attend, packed_rows.calls[-1], query, key, value)
    call = module, torch.is_grad_enabled()
    runs_again = call in packed_rows.ways
    # None of them has dropout.
    way = packed_rows.ways.setdefault(call, None if dropout else packed_rows.at_once.get(dtype))
    if way is not None:
        try:
            return attend(query, key, value, packed_rows, way), None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, a driver or a kernel
            if runs_again:  # checkpointing may end by an error of its own, and needs the same tensors as before
                raise
            packed_rows.ways[call] = None
            packed_rows.at_once.clear()
            logger.warning_once(
                f"Attention takes packed rows in blocks from now on: {way.name} fails ({in_words(error)})."
            )
    return attend(query, key, value, packed_rows, None), None


def _attend_in_blocks(own, implementation, module, query, key, value, packed_rows: PackedRows, **kwargs):
    def attend(query, key, value, mask):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if mask is None:
            return own(module, query, key, value, None, **kwargs)[0]
        outputs, before = [], key.shape[2] - query.shape[2]
        for rows in query_slices(query.shape[2], attention_costs(query.device).queries):
            keys = slice(0, before + rows.stop)
            seen = mask[:, :, rows, keys]
            if implementation == "eager":
                seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, torch.finfo(query.dtype).min)
            states = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            outputs.append(own(module, *states, seen, **kwargs)[0])
        return torch.cat(outputs, dim=1)

    window = kwargs.get("sliding_window")
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
    return packed_rows.join(outputs).unsqueeze(0)


def _attention_of(implementation: str) -> Callable:
    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        *,
        packed_rows: PackedRows | None = None,
        attention_states: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        **kwargs,
    ):
        own = _own_attention(module, implementation)
        if packed_rows is None:
            outputs = own(module, query, key, value, attention_mask, **kwargs)
        else:
            outputs = _packed_attention(
                own, implementation, module, query, key, value, attention_mask, packed_rows, **kwargs
            )
        if attention_states is not None:
            attention_states.append((query.transpose(1, 2).flatten(2), outputs[0].flatten(2)))
        return outputs

    return attention


for _implementation in _IMPLEMENTATIONS:
    AttentionInterface.register(_implementation + _SUFFIX, _attention_of(_implementation))
    AttentionMaskInterface.register(_implementation + _SUFFIX, AttentionMaskInterface()[_implementation])


def _text_model(model: torch.nn.Module) -> PreTrainedModel:
    # The module whose configuration its attention reads, a part of a model of images and text. A head that is called
    # `decoder` is none.
    decoder = core_model(model).get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else core_model(model)


def implementation_of(model: torch.nn.Module) -> str:
    """
    Name of a model's own attention, whether it is wrapped for packed rows or not.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `str`: The name, e.g. `"sdpa"`.
    """
    return _text_model(model).config._attn_implementation.removesuffix(_SUFFIX)


def wrap_attention(model: torch.nn.Module) -> None:
    """
    Give a model attention that can read packed rows, and that adds its queries and outputs to a list
    `attention_states` where the forward is given one. In every other call it is the model's own, so it can stay: a layer
    that gradient checkpointing runs again in backward needs it too.

    Args:
        model (`torch.nn.Module`):
            Causal language model for which [`why_not_shared`] knows no reason.
    """
    if not _text_model(model).config._attn_implementation.endswith(_SUFFIX):
        _text_model(model).set_attn_implementation(implementation_of(model) + _SUFFIX)


def unwrap_attention(model: torch.nn.Module) -> None:
    """
    Undo [`wrap_attention`].

    Args:
        model (`torch.nn.Module`):
            Causal language model.
    """
    _text_model(model).set_attn_implementation(implementation_of(model))


def why_not_shared(model: torch.nn.Module) -> str | None:
    """
    What the code and the configuration of a model say against packed rows.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `str`, *optional*: The reason, or `None` if there is none to be seen.
    """
    outer: torch.nn.Module = unwrap(model)
    core: torch.nn.Module = core_model(model)
    if isinstance(outer, PeftModel) and outer.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before every row"
    if not isinstance(core, PreTrainedModel) or not _text_model(core)._can_set_attn_implementation():
        return "it does not use the attention interface of transformers"
    if not takes(model, "position_ids"):
        return "its forward takes no `position_ids`"
    implementation = implementation_of(model)
    if implementation not in _IMPLEMENTATIONS:
        return f"its attention is {implementation!r}, and only 'sdpa' and 'eager' take a mask for each row"
    layers = getattr(core.config.get_text_config(), "layer_types", None) or ()
    others = set(layers) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of {' and '.join(sorted(others))}"
    return None


def why_lost(model: torch.nn.Module, packed_rows: PackedRows) -> str | None:
    """
    What the calls of a model's attention say against packed rows, after a forward.

    Args:
        model (`torch.nn.Module`):
            Causal language model.
        packed_rows ([`PackedRows`]):
            Layout of the forward, which holds the calls.

    Returns:
        `str`, *optional*: The reason, or `None` if every layer read the layout, and nothing beside it.
    """
    config, calls = core_model(model).config.get_text_config(), packed_rows.calls
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if len(calls) < config.num_hidden_layers:
        return "it does not hand what its forward is given to the attention of every layer"
    if getattr(config, "sliding_window", None) and slides and not any(call.window for call in calls):
        return "it does not tell its attention of the sliding window"
    if any(call.mask_elements > 1 for call in calls):
        return "it gives its attention a mask of its own"
    return None


def forward_packed(
    model: torch.nn.Module, input_ids: torch.Tensor, packed_rows: PackedRows, **model_kwargs: Any
) -> Mapping[str, torch.Tensor]:
    """
    One forward of packed rows.

    Args:
        model (`torch.nn.Module`):
            Causal language model with the attention of [`wrap_attention`].
        input_ids (`torch.Tensor` of shape `(N, L)`):
            Tokens of the batch.
        packed_rows ([`PackedRows`]):
            Their layout, to which the calls of attention are added.
        **model_kwargs:
            Passed to the model's forward.

    Returns:
        `Mapping`: The model's output.
    """
    return model(
        input_ids=input_ids.flatten()[packed_rows.source].unsqueeze(0),
        # of four dimensions: taken as it is, and no other is made
        attention_mask=input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=packed_rows.position_ids,
        use_cache=False,
        packed_rows=packed_rows,
        **model_kwargs,
    )
