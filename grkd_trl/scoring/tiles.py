"""The head of a model on some tokens at a time, so that the logits of a batch never exist at once.

Values of single tokens are computed tile by tile, and once more in backward, where a tile's logits are needed again.
TRL's fused head does so for log-probabilities; soft labels and ranked tokens need the logits of two models side by side,
so here any function of logits is put in its place.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig


# A batch with no more logits is computed at once, and then nothing is computed twice.
LOGITS_AT_ONCE = 2**24
# Else a tile has an eighth of the batch's, so that they take an eighth of the memory, and never more than these.
MIN_TILES, LOGITS_PER_TILE = 8, 2**25

_unsuited = WeakKeyDictionary()  # models that do with their logits what is not known here


def core_model(model: torch.nn.Module) -> torch.nn.Module:
    """
    A causal language model without what wraps it.

    Args:
        model (`torch.nn.Module`):
            Model, as it is or wrapped by accelerate (DDP, DeepSpeed, FSDP) or PEFT.

    Returns:
        `torch.nn.Module`: The model itself.
    """
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


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
        self._autocast = {"enabled": torch.is_autocast_enabled(device_type), "device_type": device_type}
        self._autocast["dtype"] = torch.get_autocast_dtype(device_type)
        self._with_gradient = torch.is_grad_enabled()

    def of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(m, H)`):
                Some of the hidden states.

        Returns:
            `torch.Tensor` of shape `(m, V)`: Their logits.
        """
        with torch.set_grad_enabled(self._with_gradient and torch.is_grad_enabled()), torch.autocast(**self._autocast):
            # A module of FSDP2 gathers and reduces in every call; its weights are gathered already, see `needs_tiles`.
            head = self._head.forward if isinstance(self._head, FSDPModule) else self._head
            return self._to_logits(head(hidden_states))

    def __getitem__(self, key) -> torch.Tensor:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        logits = self.of(self.hidden_states[rows])
        return logits[(slice(None), *columns)] if columns else logits


def _holder(model: torch.nn.Module, head: torch.nn.Module) -> FSDPModule | None:
    """The module that gathers the weights of the head, under FSDP2."""
    holders = [m for m in model.modules() if isinstance(m, FSDPModule) and any(part is head for part in m.modules())]
    return holders[-1] if holders else None  # the innermost


def needs_tiles(model: torch.nn.Module, num_tokens: int) -> bool:
    """
    Whether logits of so many tokens are too many at once, and the head can be called by itself: not under ZeRO-3 and the
    first FSDP, where its weight is there during the model's forward alone, nor where an adapter of it is switched off
    for a while.

    To be asked within the model's forward. Under FSDP2 the weight then stays gathered: the student's until the end of its
    backward, the teacher's from then on; and if one process needs tiles, all take them.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
        num_tokens (`int`):
            Number of tokens.

    Returns:
        `bool`: `True` to compute them in tiles.
    """
    core = core_model(model)
    head = core.get_output_embeddings()
    if core in _unsuited or isinstance(model, FullyShardedDataParallel) or hasattr(next(head.parameters()), "ds_id"):
        return False
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and head.disable_adapters:
        return False
    if any(
        isinstance(part, FSDPModule) for part in list(head.modules())[1:]
    ):  # adapters that are gathered by themselves
        return False
    too_many = num_tokens * core.config.get_text_config().vocab_size > LOGITS_AT_ONCE
    holder = _holder(model, head)
    if holder is not None:
        anywhere = torch.tensor(too_many, dtype=torch.int32, device=next(head.parameters()).device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        too_many = bool(anywhere)
        if too_many:
            holder.set_reshard_after_forward(False, recurse=False)
    return too_many


def are_its_own(model: torch.nn.Module, logits: TiledLogits, first: torch.Tensor) -> bool:
    """
    Whether tiles are what the model's own forward makes of its hidden states. If not, the model is marked.

    Args:
        model (`torch.nn.Module`):
            Causal language model.
        logits ([`TiledLogits`]):
            Logits of its forward.
        first (`torch.Tensor` of shape `(1, V)`):
            The first of them, by that forward.

    Returns:
        `bool`: `False` if it does more with them than is known here.

    Raises:
        `ValueError`: If it does, and there are other processes, which another forward here alone would hang.
    """
    with torch.no_grad():
        own = logits[:1].to(first.dtype)
    if not torch.allclose(own, first, rtol=0.01, atol=0.01 * first.abs().max().item()):
        _unsuited[core_model(model)] = True
        if PartialState().num_processes > 1:
            raise ValueError(
                f"`{type(core_model(model)).__name__}` changes its logits in a way that is not known here, so they are "
                f"computed at once. Lower the batch size until it has at most {LOGITS_AT_ONCE:,} of them."
            )
    return core_model(model) not in _unsuited


def over_tiles(
    function: Callable[[torch.Tensor, slice], dict[str, torch.Tensor]], logits: torch.Tensor | TiledLogits
) -> dict[str, torch.Tensor]:
    """
    Values of single tokens from their logits.

    Args:
        function (`Callable`):
            Takes logits `(m, V)` and the slice of the M tokens that they are of; returns tensors of shape `(m,)`.
        logits (`torch.Tensor` of shape `(M, V)` or [`TiledLogits`]):
            Logits. Those of a tensor are one tile.

    Returns:
        `dict[str, torch.Tensor]`: The function's values for all M tokens, each `(M,)`.
    """
    num_tokens, vocab_size = logits.shape
    if isinstance(logits, torch.Tensor):
        return function(logits, slice(0, num_tokens))
    num_rows = max(min(LOGITS_PER_TILE // vocab_size, -(-num_tokens // MIN_TILES)), 1)
    tiles = []
    for number, hidden_states in enumerate(logits.hidden_states.split(num_rows)):
        rows = slice(number * num_rows, number * num_rows + len(hidden_states))
        tile = checkpoint(
            lambda states, rows: function(logits.of(states), rows), hidden_states, rows, use_reentrant=False
        )
        tiles.append(tile)
    return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
