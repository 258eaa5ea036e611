"""Attention over packed rows by `varlen_attn`: what it is called with, when it is taken, and what comes in its place."""

import math

import architectures
import pytest
import torch
from test_packed_at_once import CPU, GROUPS, force, layout, pairs_by_definition, varlen_on_cpu
from test_prompt_sharing import assert_same, make_batch, make_model, run, set_costs
from torch.nn.attention import varlen

from grkd_trl.scoring import attention_costs as costs_of_devices
from grkd_trl.scoring import check_packed_rows_on_all_ranks, packed_check, packed_varlen, shared_prompts
from grkd_trl.scoring.packed_check import chosen_ways
from grkd_trl.scoring.packed_rows import PackedRows
from grkd_trl.scoring.packed_ways import FLEX, VARLEN, ways_at_once


@pytest.fixture
def kernels(monkeypatch):
    with varlen_on_cpu(monkeypatch) as kernels:
        yield kernels


@pytest.fixture
def check(caplog):
    """The ways that are chosen for a model, and the warnings."""

    def check(model):
        packed_check.logger.warning_once.cache_clear()
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert check_packed_rows_on_all_ranks(model, CPU) is None
        return set(chosen_ways(model).values()), [record.message for record in caplog.records]

    return check


class TestSequences:
    @pytest.mark.parametrize("window", [None, 1, 4, 130, 300])
    def test_keys_are_those_of_the_definition(self, window):
        packed = layout(*GROUPS)
        expected, laid_out = pairs_by_definition(packed, window), packed.layout(VARLEN).layout(window)
        seen, read = torch.zeros_like(expected), torch.zeros_like(expected)
        queries, keys = laid_out.query_bounds.tolist(), laid_out.key_bounds.tolist()
        assert len(queries) == len(keys) == 9  # three prompts, and six tails of which one is empty
        for index in range(8):
            tokens = laid_out.tokens[keys[index] : keys[index + 1]]
            for query in range(queries[index], queries[index + 1]):
                last = len(tokens) - (queries[index + 1] - query)
                first = 0 if window is None else max(last - window + 1, 0)
                seen[query, tokens[first : last + 1]] = True
                read[query, tokens] = True
        assert torch.equal(seen, expected)
        tails = read[150 : 150 + 200]  # no key is read that none of them sees
        assert torch.equal(tails.any(0), expected[150 : 150 + 200].any(0))

    def test_pairs(self):
        of_prompts = [128 * (128 + 150), 128 * 1, 128 * (128 + 140)]
        of_tails = [
            128 * (2 * 150 + 128 + 200),
            128 * (150 + 59),
            0,
            128 * (1 + 3),
            128 * (140 + 29),
            128 * (140 + 100),
        ]
        assert layout(*GROUPS).layout(VARLEN).num_pairs == sum(of_prompts + of_tails)

    def test_gradients_are_summed_in_float32(self):
        tails = [3] * 300
        laid_out = layout((2, tails)).layout(VARLEN).layout(None)
        states = torch.zeros(2 + sum(tails), 2, 8, dtype=torch.bfloat16, requires_grad=True)
        gathered = packed_varlen._Gather.apply(states, *laid_out[:3])
        slopes = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        (gradient,) = torch.autograd.grad(gathered, states, slopes)
        exact = torch.zeros(states.shape, dtype=torch.float64).index_add_(0, laid_out.tokens, slopes.double())
        torch.testing.assert_close(gradient, exact.bfloat16(), rtol=2**-7, atol=1e-4)


class TestChoice:
    def test_before_flex_attention(self, kernels, check, monkeypatch):
        force(monkeypatch)
        assert ways_at_once(CPU) == [VARLEN, FLEX]
        assert check(make_model()) == ({VARLEN}, [])
        assert kernels.windows
        set_costs(monkeypatch, flex=0.4)  # measured on another device
        assert ways_at_once(CPU) == [FLEX, VARLEN]

    @pytest.mark.parametrize(
        "build",
        [
            lambda: make_model("gemma2"),
            lambda: make_model(head_dim=12),
            lambda: make_model(head_dim=264),
            lambda: architectures.build("gpt_oss"),
            lambda: architectures.build("deepseek_v3"),
        ],
        ids=["soft-capping", "heads of 12", "heads of 264", "sinks", "values of another size"],
    )
    def test_what_has_no_kernel(self, build, kernels, check):
        assert check(build()) == (set(), [])
        assert not kernels.windows

    def test_flex_attention_takes_what_has_no_kernel(self, kernels, check, monkeypatch):
        force(monkeypatch)
        assert check(make_model(head_dim=12)) == ({FLEX}, [])

    def test_precisions(self, kernels, check, monkeypatch):
        monkeypatch.undo()
        with monkeypatch.context() as patch, varlen_on_cpu(patch):
            patch.setattr(packed_varlen, "_PRECISIONS", {torch.bfloat16, torch.float16})
            assert check(make_model()) == (set(), [])
            assert check(make_model(dtype=torch.bfloat16)) == ({VARLEN}, [])

    def test_other_builds_of_pytorch(self, monkeypatch):
        cuda = torch.device("cuda")
        assert (VARLEN in ways_at_once(cuda)) == packed_varlen.is_available()
        assert VARLEN not in ways_at_once(CPU) and VARLEN not in ways_at_once(torch.device("mps"))
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "hip", "7.1")
            assert VARLEN not in ways_at_once(cuda)

        def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
            raise AssertionError

        packed_varlen._varlen_attn.cache_clear()
        try:
            monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_10)
            assert VARLEN not in ways_at_once(cuda)
        finally:
            packed_varlen._varlen_attn.cache_clear()


class TestFallBack:
    def test_a_wrong_gradient(self, kernels, check, monkeypatch):
        def backward(ctx, gradient):
            return (1.001 * original(ctx, gradient)[0], None, None, None)

        original = packed_varlen._Gather.backward
        monkeypatch.setattr(packed_varlen._Gather, "backward", staticmethod(backward))
        ways, (message,) = check(make_model())
        assert not ways
        assert "in blocks, and not at once: outputs and gradients of varlen_attn differ by 0.1%" in message
        force(monkeypatch)
        model = make_model()
        ways, (message,) = check(model)
        assert ways == {FLEX} and "by FlexAttention: outputs and gradients of varlen_attn differ" in message
        assert_same(model, make_batch())

    @pytest.mark.parametrize("window", [None, 7, 400, 10_000])
    @pytest.mark.parametrize("wrong", ["windows by one", "windows", "alignment"])
    def test_a_kernel_of_another_meaning(self, wrong, window, kernels, check, monkeypatch):
        """A window that no compared row fills is compared as a shorter one."""

        def attend(query, key, value, query_bounds, key_bounds, *sizes, window_size, **kwargs):
            left, right = window_size
            if wrong == "windows by one":
                left = left + 1 if left >= 0 else left
            elif wrong == "windows":
                left = -1
            else:  # to the first key
                right = int((key_bounds.diff() - query_bounds.diff()).max())
            return original(query, key, value, query_bounds, key_bounds, *sizes, window_size=(left, right), **kwargs)

        original = packed_varlen._varlen_attn()
        monkeypatch.setattr(packed_varlen, "_varlen_attn", lambda: attend)
        model = make_model("mistral", sliding_window=window)
        ways, messages = check(model)
        matters = wrong == "alignment" or window is not None
        assert ways == (set() if matters else {VARLEN}) and len(messages) == matters
        assert all("of varlen_attn differ by" in message for message in messages)

    def test_a_failure_in_training(self, kernels, check, monkeypatch, caplog):
        """In the second layer, where another implementation of flash attention comes in, which was not compared."""

        def attend(query, *args, **kwargs):
            outputs = original(query, *args, **kwargs)
            monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
            return outputs

        model, batch = make_model("mistral"), make_batch()
        _, _, gradients = run(model, batch, prompt_sharing="off")
        assert check(model) == ({VARLEN}, [])
        original, num_calls = packed_varlen._varlen_attn(), len(kernels.windows)
        monkeypatch.setattr(packed_varlen, "_varlen_attn", lambda: attend)
        shared_prompts.logger.warning_once.cache_clear()
        with caplog.at_level("WARNING"):
            _, _, again = run(model, batch, prompt_sharing="on")
        assert (
            "in blocks from now on: varlen_attn fails (NotImplementedError: varlen_attn would run another"
            in caplog.text
        )
        assert not chosen_ways(model) and len(kernels.windows) == num_calls + 1
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_costs_are_those_of_the_way(monkeypatch):
    costs = costs_of_devices.attention_costs(CPU)._replace(flex=3.0, varlen=5.0, call=7)
    monkeypatch.setitem(costs_of_devices._COSTS, "cpu", costs)
    for way, cost in ((FLEX, 3.0), (VARLEN, 5.0)):
        packed = PackedRows(packed_check._LONG, CPU, at_once={torch.float32: way})
        assert packed.cost == cost * packed.layout(way).num_pairs + 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", [FLEX, VARLEN], ids=lambda way: way.name)
def test_on_a_gpu(way, monkeypatch):
    """The kernels that the comparison takes: it compares their outputs and gradients with those of blocks."""
    device, costs = torch.device("cuda"), costs_of_devices._COSTS["cuda"]
    other = VARLEN if way is FLEX else FLEX
    monkeypatch.setitem(costs_of_devices._COSTS, "cuda", costs._replace(**{other.cost: None}))
    for name in ("llama", "mistral", "gemma3"):
        model = make_model(name, dtype=torch.bfloat16).to(device)
        assert check_packed_rows_on_all_ranks(model, device) is None
        assert chosen_ways(model) == {torch.bfloat16: way}
        batch = {key: tensor.to(device) for key, tensor in make_batch([(200, [150, 40, 1]), (129, [130])]).items()}
        plain, shared = (run(model, batch, prompt_sharing=sharing) for sharing in ("off", "on"))
        torch.testing.assert_close(shared[0], plain[0], rtol=0.05, atol=0.2)
        assert all(math.isfinite(gradient.abs().sum()) for gradient in shared[2].values())
