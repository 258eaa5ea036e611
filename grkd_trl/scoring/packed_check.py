"""Whether a model gives for packed rows what it gives for plain ones, proved on a small batch before it is relied on.

Layer by layer: in bfloat16 the last layer of a deep model differs by a tenth and more from one order of its sums to the
next, while the first differ by less than a hundredth, where a wrong mask or position shows in full.

Here it is chosen, too, how attention takes packed rows: at once, in the first way of the device, see `packed_ways`, that
gives in every layer, with gradients, what the blocks give, and leaves out nothing, as all of them do dropout; else in blocks.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from .forward import eval_mode, run_packed, run_plain
from .images import is_sharded
from .packed_rows import AttentionCall, PackedRows, Row, read_rows
from .packed_ways import FLEX, Way, ways_at_once
from .shared_prompts import implementation_of, in_words, unwrap_attention, why_lost, why_not_shared, wrap_attention
from .tiles import core_model, unwrap


# Prompts of the batch and the completions of each, in tokens: rows of several lengths, and the last ends in padding.
_SHAPES = ((9, (9, 4)), (5, (3, 8)))
# Tokens of the last row that are left out where it is read alone.
_CUT = 2
# Share of a token's states that rounding may change in the first layer, in float32 and below. It grows with depth, as the
# sum of independent errors does. Measured: a tenth of that or less, and 20 % or more for a wrong mask or position.
_ROUNDING, _COARSE_ROUNDING = 1e-4, 1 / 16
# Below float32 rounding alone may route a token to another expert, so a quarter of the tokens may differ by more.
_QUANTILE = 0.75

# Rows of the comparison of both ways to attend, short ones, and others for which the same kernel has to do, with blocks of
# 128 queries and keys that are seen, in part, and not.
_SHORT = [Row(0, 9, 10, False), Row(40, 9, 5, True)]
_LONG = [Row(0, 150, 201, False), Row(400, 150, 60, True), Row(800, 140, 30, False), Row(1200, 140, 101, True)]
# A sliding window that cuts off most of them, where a token more or less is a quarter of the output.
_WINDOW = 16

logger = logging.get_logger(__name__)


class _Verdict(NamedTuple):
    attention: tuple[str, str]  # that the model had when it was checked, and the kind of device
    reason: str | None  # what speaks against packed rows
    at_once: dict[torch.dtype, Way]  # that was compared in a precision
    drops_out: bool  # in training


_verdicts: WeakKeyDictionary[torch.nn.Module, _Verdict] = WeakKeyDictionary()


def check_packed_rows_on_all_ranks(model: torch.nn.Module, device: torch.device) -> str | None:
    """
    Why a model cannot read packed rows. On the first call for a model, packed rows are compared with plain ones on a small
    batch that is the same on every process, without gradients and in evaluation mode. Adapters do not change the answer,
    so a student and its base, as a teacher, are one model.

    Where the model is wrapped for several processes, all of them have to call this together, and get the same answer.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
        device (`torch.device`):
            Where its tokens go.

    Returns:
        `str`, *optional*: The reason, or `None` if it can. Its attention is then that of [`wrap_attention`].

    Raises:
        `ValueError`: If the forward of a model whose parameters are sharded fails.
    """
    reason, core = why_not_shared(model), core_model(model)
    if reason is not None:
        return reason
    attention = implementation_of(model), device.type
    if core not in _verdicts or _verdicts[core].attention != attention:
        wrap_attention(model)
        reason = _compare_on_all_ranks(model, device)
        verdict = _Verdict(attention, reason, {}, False)
        if reason is None:
            verdict = _choose_way_on_all_ranks(model, device, verdict)
        else:
            unwrap_attention(model)
        _verdicts[core] = verdict
    return _verdicts[core].reason


def _choose_way_on_all_ranks(model: torch.nn.Module, device: torch.device, in_blocks: _Verdict) -> _Verdict:
    verdict, instead, against = in_blocks, "in blocks, and not at once", list[str]()
    for way in ways_at_once(device):
        proof = _Proof(device, way)
        reason = _compare_on_all_ranks(model, device, proof)
        if reason is None:
            verdict, instead = in_blocks._replace(at_once=proof.at_once, drops_out=proof.drops_out), f"by {way.name}"
            break
        if way is FLEX or not proof.refused:  # the other way knows less, which is no fault of a model
            against.append(reason)
    if against:
        logger.warning_once(f"Attention takes packed rows {instead}: {' and '.join(against)}.")
    return verdict


def chosen_ways(model: torch.nn.Module) -> dict[torch.dtype, Way]:
    """
    How attention takes packed rows in one call, by precision, in the mode that the model is in: where it has dropout in
    training, it takes them in blocks there.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped, that [`check_packed_rows_on_all_ranks`] was called with.

    Returns:
        `dict[torch.dtype, Way]`: The way, empty if it takes them in blocks. Emptied where the way fails later.
    """
    core = core_model(model)
    verdict = _verdicts.get(core)
    return {} if verdict is None or (verdict.drops_out and core.training) else verdict.at_once


def _compare_on_all_ranks(model: torch.nn.Module, device: torch.device, *proof: "_Proof") -> str | None:
    reason = _compare(model, device, *proof)
    sharded = is_sharded(model)
    if dist.is_initialized() and (sharded or unwrap(model) is not model):
        anywhere = torch.tensor(reason is not None, dtype=torch.int32, device=device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        if anywhere and reason is None:
            return "on another process its packed rows differ from plain ones"
    return reason


def _compare(model: torch.nn.Module, device: torch.device, proof: "_Proof | None" = None) -> str | None:
    batch = _make_batch(core_model(model), device)
    rows = read_rows(**batch)
    assert rows is not None  # the batch has no gaps
    packed_rows = PackedRows(rows, device, None if proof is None else proof.at_once)
    packed_rows.proof = proof
    (num_rows, length), num_alone = batch["input_ids"].shape, _SHAPES[-1][0] + _SHAPES[-1][1][-1] - _CUT
    # The last row without its last tokens and its padding, which a causal model does not read
    alone = {name: tensor[-1:, :num_alone] for name, tensor in batch.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # nothing to compile for 20 tokens
        try:
            plain, plain_logits = _run(model, batch)
            own, own_logits = _run(model, alone)
            packed, packed_logits = _run(model, batch, packed_rows)
            if proof is not None and proof.error is None:
                proof.drops_out = _drops_out(model, batch, PackedRows(rows, device), packed_rows)
        except Exception as error:  # of whatever kind a model's own code raises
            if is_sharded(model):  # its parameters are left gathered
                raise ValueError(
                    "The model's forward failed while packed rows were compared with plain ones. Set `prompt_sharing` "
                    "to 'off'."
                ) from error
            return f"its forward fails on packed rows ({in_words(error)})"
    reason = why_lost(model, packed_rows)
    if reason is not None:
        return reason
    coarse = _is_coarse(core_model(model), packed_rows.calls[0].dtype)
    if proof is not None and proof.error is not None:
        return proof.error
    if proof is not None and not all(packed_rows.ways.values()):
        return f"{proof.way.name} fails on a small batch"
    if proof is not None and not proof.difference <= (_COARSE_ROUNDING if coarse else _ROUNDING):
        return f"outputs and gradients of {proof.way.name} differ by {proof.difference:.1%} from those of blocks"
    if len(packed) != len(plain):
        return "it attends another number of times when it is given packed rows"
    first = (num_rows - 1) * length
    compared = [
        (states[first : first + num_alone], of_alone, states[packed_rows.source], of_packed)
        for states, of_alone, of_packed in zip(plain, own, packed, strict=True)
    ]
    last_logits = plain_logits[-_SHAPES[-1][1][-1] : -_CUT]
    compared.append((last_logits, own_logits, plain_logits, packed_logits))
    for depth, (of_row, of_alone, of_plain, of_packed) in enumerate(compared):
        rounding = (_COARSE_ROUNDING if coarse else _ROUNDING) * (1 + depth) ** 0.5
        difference = _difference(of_alone, of_row, coarse)
        if not difference <= rounding:
            return f"its states of a row change by {difference:.1%} with padding and with later tokens"
        difference = _difference(of_packed, of_plain, coarse)
        if not difference <= rounding:
            return f"its states of packed rows differ by {difference:.1%} from those of plain rows"
    return None


class _Proof:
    """
    A way to attend at once and blocks side by side, on random states of the model's own sizes, in every layer. With
    gradients: there are devices on which FlexAttention compiles its forward alone
    (https://github.com/pytorch/pytorch/issues/198224). On two lengths, since a kernel for all lengths was wrong on the second
    before (https://github.com/pytorch/pytorch/issues/146377). On a short window too, where the layer's own may be longer than
    both. And as gradient checkpointing calls it, which on a GPU runs it again in another thread.
    """

    def __init__(self, device: torch.device, way: Way):
        self._device, self.way = device, way
        self.at_once = dict[torch.dtype, Way]()  # precisions of the layers
        self.drops_out = self.refused = False
        self.difference = 0.0  # of outputs or gradients, as a share of their norm
        self.error: str | None = None

    def __call__(self, attend: Callable, call: AttentionCall, *states: torch.Tensor) -> None:
        if self.error is not None:
            return
        compared = [(_SHORT, call.window), (_LONG, call.window)]
        if call.window is not None and call.window > _WINDOW:
            compared.append((_LONG, _WINDOW))
        try:
            with torch.inference_mode(False):  # which has no gradients, and may be the caller's
                for rows, window in compared:
                    changed = {} if window == call.window else {"sliding_window": window}
                    self._attend(partial(attend, **changed), PackedRows(rows, self._device), *states)
        except Exception as error:  # of a compiler, a driver or a kernel
            self.error = f"{self.way.name} fails ({in_words(error)})"
            self.refused = isinstance(error, NotImplementedError)
            self.at_once.clear()
        else:
            self.at_once[call.dtype] = self.way

    def _attend(self, attend, rows, query, key, value):
        sizes = [(1, states.shape[1], rows.source.numel(), states.shape[3]) for states in (query, key, value)]
        states = [torch.randn(size, dtype=query.dtype, device=query.device) for size in sizes]
        slopes = None
        results = []
        for way in (None, self.way):
            leaves = [of.clone().requires_grad_() for of in states]
            with torch.enable_grad():
                outputs = checkpoint(attend, *leaves, rows, way, use_reentrant=False, preserve_rng_state=False)
            slopes = torch.randn_like(outputs) if slopes is None else slopes
            results.append([outputs, *torch.autograd.grad(outputs, leaves, slopes)])
        for expected, got in zip(*results, strict=True):
            share = (got.float() - expected.float()).norm() / expected.float().norm()
            self.difference = max(self.difference, share.item(), key=lambda share: (math.isnan(share), share))


def _drops_out(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], packed_rows: PackedRows, before: PackedRows
) -> bool:
    """Whether attention has dropout in training: a model tells it of none in evaluation mode."""
    modules = [module for module, _ in before.ways]
    try:
        for module in modules:
            module.training = True  # and no other, whose dropout or jitter is of no concern
        _run(model, batch, packed_rows)
    finally:
        for module in modules:
            module.training = False
    return any(call.dropout for call in packed_rows.calls)


def rounds_to_tensor_float() -> bool:
    """
    Whether matrix products in float32 may be rounded to TF32 on CUDA. The older of PyTorch's two interfaces raises an error
    where the newer was used, as `tf32=True` and `torch_compile=True` of a trainer do.

    Returns:
        `bool`: `True` if they may.
    """
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")  # from torch 2.9 on
    return (torch.get_float32_matmul_precision() != "highest") if precision == "none" else precision != "ieee"


def _is_coarse(core: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether numbers are rounded to fewer bits than those of float32, somewhere."""
    tensor_float = torch.cuda.is_available() and rounds_to_tensor_float()
    narrow = min(torch.finfo(dtype).bits, torch.finfo(core.dtype).bits) < 32
    return narrow or hasattr(core.config, "quantization_config") or (dtype == torch.float32 and tensor_float)


def _run(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], packed_rows: PackedRows | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries and outputs of each layer's attention in turn, `(T, F)`, and the logits, `(M, V)`."""
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    kwargs = {"attention_states": states}
    _, logits = run_packed(model, batch, packed_rows, **kwargs) if packed_rows else run_plain(model, batch, **kwargs)
    logits = logits[:].float()
    logits = logits - logits.where(logits.isfinite(), 0.0).mean(-1, keepdim=True)  # which is no matter to a softmax
    return [state.flatten(0, 1) for pair in states for state in pair], logits


def _make_batch(core: PreTrainedModel, device: torch.device) -> dict[str, torch.Tensor]:
    config = core.config.get_text_config()
    # Tokens without a meaning of their own: an image's would ask for an image.
    fields = core.config.to_dict() | config.to_dict()
    special = [value for name, value in fields.items() if name.endswith(("token_id", "token_index"))]
    no_text = {token for value in special for token in (value if isinstance(value, list) else [value])}
    tokens = (index * 7919 % config.vocab_size for index in count(1))
    tokens = (token for token in tokens if token not in no_text)
    length = max(prompt + max(completions) for prompt, completions in _SHAPES)
    batch: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "attention_mask", "completion_mask")}
    for num_prompt, completions in _SHAPES:
        prompt = [next(tokens) for _ in range(num_prompt)]
        for num_tokens in completions:
            padding = [0] * (length - num_prompt - num_tokens)
            batch["input_ids"].append([*prompt, *(next(tokens) for _ in range(num_tokens)), *padding])
            batch["attention_mask"].append([1] * (num_prompt + num_tokens) + padding)
            batch["completion_mask"].append([0] * num_prompt + [1] * num_tokens + padding)
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def _difference(states: torch.Tensor, expected: torch.Tensor, coarse: bool) -> float:
    """How far states of tokens, `(T, F)`, are apart, as a share of their length: of the worst token, or of a quantile."""
    apart = torch.where(states == expected, 0.0, (states - expected).float()).norm(dim=-1)  # -inf equals -inf
    lengths = expected.where(expected.isfinite(), 0.0).float().norm(dim=-1)
    shares = apart / lengths.clamp(min=lengths.mean().item())
    return shares.quantile(_QUANTILE if coarse else 1.0).item()
