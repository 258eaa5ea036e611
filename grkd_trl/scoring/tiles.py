"""The head of a model on some tokens at a time, so that the logits of a batch never exist at once.

Values of single tokens are computed tile by tile, and where the head is trained once more in backward, which needs a tile's
logits again. Under a frozen head (LoRA) the gradient is computed with the values, and each tile is read once.
TRL's fused head does so for log-probabilities; soft labels and ranked tokens need the logits of two models side by side,
so here any function of logits is put in its place.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from .leaves import refuse_other_leaves


# A batch with no more logits is computed at once, and then nothing is computed twice.
LOGITS_AT_ONCE = 2**24
# Else a tile has an eighth of the batch's, so that they take an eighth of the memory, and never more than these.
MIN_TILES, LOGITS_PER_TILE = 8, 2**25

# Models that do with their logits what is not known here.
_unsuited: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def unwrap(model: torch.nn.Module) -> PreTrainedModel | PeftModel:
    """
    A causal language model without what accelerate wraps it in; its adapters stay.

    Args:
        model (`torch.nn.Module`):
            Model, as it is or wrapped by accelerate (DDP, DeepSpeed, FSDP).

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The model, or its adapters with it.
    """
    while isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        model = model.module
    if isinstance(model, PreTrainedModel | PeftModel):
        return model
    return extract_model_from_parallel(model)  # which takes a millisecond to look for DeepSpeed


def core_model(model: torch.nn.Module) -> PreTrainedModel:
    """
    A causal language model without what wraps it.

    Args:
        model (`torch.nn.Module`):
            Model, as it is or wrapped by accelerate (DDP, DeepSpeed, FSDP) or PEFT.

    Returns:
        [`~transformers.PreTrainedModel`]: The model itself.
    """
    model = unwrap(model)
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def takes(model: torch.nn.Module, argument: str) -> bool:
    """
    Whether the forward of a causal language model names an argument, and does not pass it on unread.

    Args:
        model (`torch.nn.Module`):
            Model, as it is or wrapped.
        argument (`str`):
            Name of the argument.

    Returns:
        `bool`: `True` if it does.
    """
    return argument in _arguments(type(core_model(model)))  # type: ignore[arg-type]


@lru_cache
def _arguments(model_class: type[torch.nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _to_logits(config: PretrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What architectures do with what their head puts out: scale, then cap softly."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
    scales = [scale for scale in (getattr(config, name, None) for name in names) if scale is not None]
    if getattr(config, "logits_scaling", None) is not None:  # HyperCLOVA X multiplies by it, Granite divides
        scales.append(config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling)
    cap = getattr(config, "final_logit_softcapping", None)

    def to_logits(outputs: torch.Tensor) -> torch.Tensor:
        for scale in scales:
            outputs = outputs * scale
        return outputs if cap is None else torch.tanh(outputs / cap) * cap

    return to_logits


class TiledLogits:
    """
    Logits of M tokens that are computed when they are asked for: `logits[rows]` and `logits[rows, columns]` are those
    of a tensor. Made inside a model's forward, whose precision and gradient mode it keeps.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
        hidden_states (`torch.Tensor` of shape `(M, H)`):
            What the model hands its head.
    """

    def __init__(self, model: torch.nn.Module, hidden_states: torch.Tensor):
        core = core_model(model)
        device_type = hidden_states.device.type
        self.hidden_states = hidden_states
        self.shape = (len(hidden_states), core.config.get_text_config().vocab_size)
        self._head, self._to_logits = core.get_output_embeddings(), _to_logits(core.config.get_text_config())
        self._autocast: dict[str, Any] = {
            "enabled": torch.is_autocast_enabled(device_type),
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
        }
        self._with_gradient = torch.is_grad_enabled()
        self.is_frozen = not any(parameter.requires_grad for parameter in self._head.parameters())
        trained = [p.to_local() if isinstance(p, DTensor) else p for p in core.parameters() if p.requires_grad]
        self.num_trained = sum(parameter.numel() for parameter in trained) if self._with_gradient else 0

    def of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(m, H)`):
                Some of the hidden states.

        Returns:
            `torch.Tensor` of shape `(m, V)`: Their logits.
        """
        with torch.set_grad_enabled(self._with_gradient and torch.is_grad_enabled()), torch.autocast(**self._autocast):
            # A module of FSDP2 gathers and reduces in every call; its weights are gathered already, see `keep_head_gathered`.
            head: Any = self._head
            read = head.forward if isinstance(self._head, FSDPModule) else head
            return self._to_logits(read(hidden_states))

    def __getitem__(self, key) -> torch.Tensor:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        logits = self.of(self.hidden_states[rows])
        return logits[(slice(None), *columns)] if columns else logits


def _holder(model: torch.nn.Module, head: torch.nn.Module) -> FSDPModule | None:
    """The module that gathers the weights of the head, under FSDP2."""
    holders = [m for m in model.modules() if isinstance(m, FSDPModule) and any(part is head for part in m.modules())]
    return holders[-1] if holders else None  # the innermost


def why_at_once(model: torch.nn.Module) -> str | None:
    """
    Why the head of a model cannot be called by itself, so that its logits are computed at once.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `str`, *optional*: The reason. `None` if it can.
    """
    core = core_model(model)
    head = core.get_output_embeddings()
    if core in _unsuited:
        return f"`{type(core).__name__}` changes its logits in a way that is not known here"
    if isinstance(model, FullyShardedDataParallel) or hasattr(next(head.parameters()), "ds_id"):
        return "ZeRO-3 and the first FSDP gather the weight of the head during the model's forward alone"
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and head.disable_adapters:
        return "the adapter of the head is switched off during this forward alone"
    if any(isinstance(part, FSDPModule) for part in list(head.modules())[1:]):
        return "FSDP2 gathers the adapter of the head by itself"
    if any(isinstance(part, torch.nn.Dropout) and part.p > 0 and part.training for part in head.modules()):
        return "the adapter of the head draws another dropout in every call"
    return None


def too_many_on_any_rank(model: torch.nn.Module, num_tokens: int) -> bool:
    """
    Whether logits of so many tokens are too many at once. Under FSDP2, whose processes gather the head's weight
    together, all processes ask each other, and take tiles if one needs them.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
        num_tokens (`int`):
            Number of tokens of this process.

    Returns:
        `bool`: `True` if they are.
    """
    head = core_model(model).get_output_embeddings()
    too_many = num_tokens * core_model(model).config.get_text_config().vocab_size > LOGITS_AT_ONCE
    if _holder(model, head) is None:
        return too_many
    anywhere = torch.tensor(too_many, dtype=torch.int32, device=next(head.parameters()).device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    return bool(anywhere)


def keep_head_gathered(model: torch.nn.Module) -> None:
    """
    Under FSDP2, keep the weight of the head gathered after the forward that is running, for tiles: the student's until
    the end of its backward, the teacher's from then on.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
    """
    holder = _holder(model, core_model(model).get_output_embeddings())
    if holder is not None:
        holder.set_reshard_after_forward(False, recurse=False)


def are_its_own(logits: TiledLogits, first: torch.Tensor) -> bool:
    """
    Whether tiles are what the model's own forward makes of its hidden states.

    Args:
        logits ([`TiledLogits`]):
            Logits of its forward.
        first (`torch.Tensor` of shape `(1, V)`):
            The first of them, by that forward.

    Returns:
        `bool`: `False` if it does more with them than is known here.
    """
    with torch.no_grad():
        own = logits[:1].to(first.dtype)
    return torch.allclose(own, first, rtol=0.01, atol=0.01 * first.abs().max().item())


def refuse_tiles(model: torch.nn.Module) -> None:
    """
    Mark a model whose logits are not known here, so that [`why_at_once`] says so from then on.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Raises:
        `ValueError`: If there are other processes, which another forward here alone would hang.
    """
    core = core_model(model)
    _unsuited[core] = True
    if PartialState().num_processes > 1:
        raise ValueError(
            f"`{type(core).__name__}` changes its logits in a way that is not known here, so they are computed at once. "
            f"Lower the batch size until it has at most {LOGITS_AT_ONCE:,} of them."
        )


class _ThroughFrozenHead(torch.autograd.Function):
    """
    Values of a tile whose head is not trained. Each value depends on its own token alone, so its gradient by that token's
    hidden state is known up to a factor, which backward brings: it is computed while the logits are there.
    """

    @staticmethod
    def forward(ctx, hidden_states, names, function):
        with torch.enable_grad():
            states = hidden_states.detach().requires_grad_()
            values = function(states)
            refuse_other_leaves(values.values(), states)
            names += values
            with_gradient = [value.requires_grad for value in values.values()]
            needed = sum(with_gradient)
            gradients = []
            for value in values.values():
                if value.requires_grad:
                    needed -= 1
                    gradients += torch.autograd.grad(value.sum(), states, retain_graph=needed > 0)
        ctx.save_for_backward(*gradients)
        ctx.with_gradient = with_gradient
        outputs = tuple(value.detach() for value in values.values())
        ctx.mark_non_differentiable(*(v for v, kept in zip(outputs, with_gradient, strict=True) if not kept))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *slopes):
        slopes = [slope for slope, kept in zip(slopes, ctx.with_gradient, strict=True) if kept]
        pulls = zip(slopes, ctx.saved_tensors, strict=True)
        total = sum(slope.unsqueeze(-1) * gradient for slope, gradient in pulls)  # in the dtype of the values
        return total.to(ctx.saved_tensors[0].dtype), None, None


def map_tiles(
    function: Callable[[torch.Tensor, slice], dict[str, torch.Tensor]],
    logits: torch.Tensor | TiledLogits,
    *,
    keep: bool = False,
) -> dict[str, torch.Tensor]:
    """
    Values of single tokens from their logits.

    With a trained head the first tokens may be kept for backward instead of read again: as many as need no more memory
    than the gradients of the trained parameters, which are not there yet.

    Args:
        function (`Callable`):
            Takes logits `(m, V)` and the slice of the M tokens that they are of; returns tensors of shape `(m,)`.
        logits (`torch.Tensor` of shape `(M, V)` or [`TiledLogits`]):
            Logits. Those of a tensor are one tile.
        keep (`bool`, *optional*, defaults to `False`):
            Whether to keep what fits, for a function that needs at most four tensors of the logits' size with its backward.

    Returns:
        `dict[str, torch.Tensor]`: The function's values for all M tokens, each `(M,)`.
    """
    num_tokens, vocab_size = logits.shape
    if isinstance(logits, torch.Tensor):
        return function(logits, slice(0, num_tokens))
    num_rows = max(min(LOGITS_PER_TILE // vocab_size, -(-num_tokens // MIN_TILES)), 1)
    trains = logits.hidden_states.requires_grad and torch.is_grad_enabled()
    num_kept = logits.num_trained // (4 * vocab_size) if keep and trains and not logits.is_frozen else 0
    tiles, start = [], 0
    while start < num_tokens:
        rows = slice(start, min(start + (num_rows if start else max(num_kept, num_rows)), num_tokens))
        states, start = logits.hidden_states[rows], rows.stop

        def read(states, rows=rows):
            return function(logits.of(states), rows)

        if trains and logits.is_frozen:
            names: list[str] = []
            values = _ThroughFrozenHead.apply(states, names, read)
            tiles.append(dict(zip(names, values, strict=True)))
        elif rows.stop <= num_kept:
            tiles.append(read(states))
        else:
            tiles.append(checkpoint(read, states, use_reentrant=False))
    return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
