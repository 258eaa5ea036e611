"""A prompt is read once for all completions that are written for it."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .._trl import forget_image_positions
from ..scoring import without_router_loss
from ..scoring.tiles import takes


logger = logging.get_logger(__name__)

# Whether a model's logits after a prompt's cache equal those after the prompt.
_proved: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class _LayerWithRoom(DynamicLayer):
    """A layer repeated for several completions, with memory for all their tokens: growing it copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, repeats: int, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values = (
            F.pad(states, (0, 0, 0, room)).repeat_interleave(repeats, 0) for states in (keys, values)
        )
        self._show(keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[..., :length, :], self._all_values[..., :length, :]

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._all_keys.shape[-2]:
            return super().update(key_states, value_states, *args, **kwargs)
        self._all_keys[..., start:end, :], self._all_values[..., start:end, :] = key_states, value_states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        length = self.get_seq_length()
        self._all_keys, self._all_values = self._all_keys[indices], self._all_values[indices]
        self._show(length)


def prompt_cache(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_completions: int, room: int
) -> DynamicCache | None:
    """
    Keys and values of prompts but for their last token, repeated for several completions. `generate` continues from
    them, and again after rows that ended are dropped from them.

    On its first batch a model is compared with itself: the logits after the cache of the longest prompt are those of the
    whole prompt, or it reads each prompt once a completion from then on, with a warning.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, in evaluation mode.
        input_ids (`torch.Tensor` of shape `(P, L)`):
            Prompts, padded on the left.
        attention_mask (`torch.Tensor` of shape `(P, L)`):
            1 on the prompts' tokens.
        num_completions (`int`):
            Completions of each prompt (G).
        room (`int`):
            Tokens to write.

    Returns:
        [`~transformers.DynamicCache`], *optional*: Cache of P x G rows, prompt after prompt. `None` if there is nothing to
        share, or the model cannot: it is sharded, or has another state than keys and values, or its generation config asks
        for another kind of cache, or its rotary frequencies would change on the way.
    """
    sharded = isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()  # whose forwards wait for each other
    alone = num_completions * len(input_ids) == 1
    if alone or input_ids.shape[1] == 1 or sharded or not _proved.get(model, True):
        return None
    # Gemma's "hybrid" is the cache made here. Beside any other kind `generate` refuses a cache.
    if model.generation_config.cache_implementation not in (None, "hybrid"):
        return None
    if _changes_frequencies(model, input_ids.shape[1] + room):
        return None
    forget_image_positions(model)  # `generate` works them out only where it is given no cache
    cache = _read(model, input_ids[:, :-1], attention_mask[:, :-1])
    if cache is None or model not in _proved:
        _proved[model] = cache is not None and _goes_on_alike(model, input_ids, attention_mask)
        if not _proved[model]:
            name = type(model).__name__
            logger.warning_once(
                f"`{name}` reads each prompt once a completion: its logits after a repeated cache differ."
            )
            return None
    if cache is not None:
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
                cache.layers[number] = _LayerWithRoom(layer.keys, layer.values, num_completions, room)
            elif isinstance(layer, DynamicLayer):
                layer.batch_repeat_interleave(num_completions)
    return cache


def _changes_frequencies(model: PreTrainedModel, length: int) -> bool:
    """
    Whether the rotary frequencies of a batch depend on its longest row. Once that row leaves, those of the keys in the
    cache are not those of the next queries.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if "dynamic" in each.get("rope_type", "") or each.get("rope_type") == "longrope":
            unscaled = each.get("original_max_position_embeddings") or config.max_position_embeddings
            if length > min(unscaled, config.max_position_embeddings):
                return True
    return False


def _read(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DynamicCache | None:
    positions = {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)} if takes(model, "position_ids") else {}
    last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    kwargs = positions | last | without_router_loss(model)
    cache = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **kwargs).get("past_key_values")
    layers = getattr(cache, "layers", [])
    if type(cache) is not DynamicCache or not all(
        type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers
    ):
        return None
    return cache


def _goes_on_alike(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> bool:
    longest = attention_mask.sum(-1).argmax()
    kept = attention_mask[longest].bool()
    input_ids, attention_mask = input_ids[longest, kept][None], attention_mask[longest, kept][None]
    whole = model(input_ids=input_ids, attention_mask=attention_mask, **without_router_loss(model)).logits[:, -1]
    cache = _read(model, input_ids[:, :-1], attention_mask[:, :-1])
    positions = {"position_ids": torch.tensor([[input_ids.shape[1] - 1]], device=input_ids.device)}
    positions = positions if takes(model, "position_ids") else {}
    again = model(
        input_ids=input_ids[:, -1:],
        attention_mask=attention_mask,
        past_key_values=cache,
        **positions,
        **without_router_loss(model),
    ).logits[:, -1]
    scale = whole.abs().max().clamp(min=1.0).item()
    return torch.allclose(
        again.float(), whole.float(), rtol=0.0, atol=(0.05 if whole.dtype != torch.float32 else 1e-3) * scale
    )
