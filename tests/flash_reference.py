"""
PyTorch's kernels of flash attention for sequences of several lengths, stated again in plain float32 for a CPU, which has
none: `aten::_flash_attention_forward` and its backward, under `torch.nn.attention.varlen.varlen_attn`. Query `i` of Q sees
keys `i + K - Q - left` to `i + K - Q + right` of K, where those bounds are not negative.
"""

import torch


class Kernels:
    """The kernels, for as long as `library` lives."""

    def __init__(self, library: torch.library.Library):
        self.windows: list[int | None] = []  # of the calls
        library.impl("_flash_attention_forward", self.forward, "CPU")
        library.impl("_flash_attention_backward", self.backward, "CPU")

    def forward(
        self,
        query,
        key,
        value,
        query_bounds,
        key_bounds,
        max_queries,
        max_keys,
        dropout,
        causal,
        return_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        **others,
    ):
        assert not dropout and not return_mask and not any(other is not None for other in others.values())
        assert query.is_contiguous() and query_bounds.dtype == key_bounds.dtype == torch.int32
        assert query_bounds.diff().max() == max_queries and key_bounds.diff().max() == max_keys
        self.windows.append(None if window_size_left < 0 else window_size_left + 1)
        outputs, lse = torch.full_like(query, torch.nan), torch.full(query.shape[1::-1], torch.nan)
        for queries, keys in _sequences(query_bounds, key_bounds):
            products = _products(query[queries], key[keys], scale, causal, window_size_left, window_size_right)
            lse[:, queries] = products.logsumexp(-1)
            values = _to_heads(value[keys], query)
            outputs[queries] = (products.softmax(-1) @ values).transpose(0, 1).to(query.dtype)
        seeds = torch.zeros(2, dtype=torch.uint64)
        return outputs, lse, seeds, seeds.clone(), query.new_empty(0)

    def backward(
        self,
        gradient,
        query,
        key,
        value,
        outputs,
        lse,
        query_bounds,
        key_bounds,
        max_queries,
        max_keys,
        dropout,
        causal,
        seeds,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        slopes = [torch.full_like(states, torch.nan) for states in (query, key, value)]
        for queries, keys in _sequences(query_bounds, key_bounds):
            products = _products(query[queries], key[keys], scale, causal, window_size_left, window_size_right)
            shares = (products - lse[:, queries, None]).exp()
            upstream, expected = (states[queries].float().transpose(0, 1) for states in (gradient, outputs))
            of_shares = upstream @ _to_heads(value[keys], query).mT
            of_products = factor * shares * (of_shares - (upstream * expected).sum(-1, keepdim=True))
            of_states = (
                of_products @ _to_heads(key[keys], query),
                of_products.mT @ query[queries].float().transpose(0, 1),
                shares.mT @ upstream,
            )
            for slope, rows, part in zip(slopes, (queries, keys, keys), of_states, strict=True):
                of_heads = part.unflatten(0, (slope.shape[1], -1)).sum(1)  # query heads of a key
                slope[rows] = of_heads.transpose(0, 1).to(slope.dtype)
        return tuple(slopes)


def _sequences(query_bounds, key_bounds):
    queries, keys = query_bounds.tolist(), key_bounds.tolist()
    assert queries[0] == keys[0] == 0
    return [
        (slice(*of_queries), slice(*of_keys))
        for of_queries, of_keys in zip(zip(queries, queries[1:]), zip(keys, keys[1:]), strict=True)  # noqa: B905
    ]


def _to_heads(states, query):
    """`(H, K, D)` in float32, a head of keys or values for each of queries."""
    return states.float().transpose(0, 1).repeat_interleave(query.shape[1] // states.shape[1], dim=0)


def _products(query, key, scale, causal, left, right):
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    products = factor * query.float().transpose(0, 1) @ _to_heads(key, query).mT
    distance = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0 or causal:
        seen &= distance >= -max(right, 0)
    return products.masked_fill(~seen, -torch.inf)
