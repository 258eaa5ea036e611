"""
Attention that takes packed rows in one call, on a CPU: by PyTorch's own reference of FlexAttention, unfused, and by
`varlen_attn` with kernels of `flash_reference`.
"""

import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import architectures
import pytest
import torch
from flash_reference import Kernels
from peft import LoraConfig, get_peft_model
from runs import end_process
from test_prompt_sharing import (
    MODELS,
    assert_gradients_are_averaged,
    assert_same,
    make_batch,
    make_model,
    padded_on_the_left,
    run,
    run_under_ddp,
    set_costs,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from grkd_trl.scoring import (
    check_packed_rows_on_all_ranks,
    packed_check,
    packed_flex,
    packed_varlen,
    score_completions,
)
from grkd_trl.scoring.attention_costs import AttentionCosts
from grkd_trl.scoring.packed_check import chosen_ways
from grkd_trl.scoring.packed_rows import PackedRows, Row
from grkd_trl.scoring.packed_ways import FLEX, VARLEN


CPU = torch.device("cpu")


# Traces, differentiates and guards as for CUDA, and makes no kernel.
COUNTER = CompileCounterWithBackend("aot_eager")
COMPILED = torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True, backend=COUNTER)


def force(patch, compiled=COMPILED):
    """Take one call of FlexAttention on a CPU too."""
    set_costs(patch, flex=0.5)
    patch.setattr(packed_flex, "_compiled", lambda: compiled)
    patch.setattr(flex_attention, "_validate_device", lambda *_: None)  # "does not support backward on CPU"


@contextmanager
def varlen_on_cpu(patch):
    """Take one call of `varlen_attn` on a CPU too, and in float32."""
    if not packed_varlen.is_available():
        pytest.skip("needs torch 2.12")
    set_costs(patch, varlen=0.5)
    patch.setattr(packed_varlen, "_PRECISIONS", {torch.float32, torch.bfloat16})
    with torch.library._scoped_library("aten", "IMPL") as library:
        yield Kernels(library)


@pytest.fixture
def forced(monkeypatch):
    force(monkeypatch)


def record_calls(patch):
    """Windows of the calls of attention at once."""
    windows = []
    for layouts, name in ((packed_flex.Runs, "block_mask"), (packed_varlen.Sequences, "layout")):
        original = getattr(layouts, name)
        recorded = lambda runs, window, original=original: windows.append(window) or original(runs, window)  # noqa: E731
        patch.setattr(layouts, name, recorded)
    return windows


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch)


@pytest.fixture(params=[FLEX, VARLEN], ids=lambda way: way.name)
def way(request, monkeypatch):
    """The one that a CPU has too."""
    if request.param is FLEX:
        force(monkeypatch)
        yield FLEX
    else:
        with varlen_on_cpu(monkeypatch):
            yield VARLEN


def assert_taken(model, way, name=""):
    """In every layer, save where `varlen_attn` has no kernel for it."""
    has_no_kernel = way is VARLEN and name in ("gemma2", "gpt_oss", "deepseek_v3")
    assert set(chosen_ways(model).values()) == (set() if has_no_kernel else {way})


def daily(names, *chosen):
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


def layout(*groups):
    """Of prompts and the lengths of their tails."""
    rows, start = [], 0
    for prompt, tails in groups:
        for number, tail in enumerate(tails):
            rows.append(Row(start, prompt, tail + 1, number > 0))
            start += 10_000
    return PackedRows(rows, CPU, at_once={torch.float32: FLEX})


GROUPS = (150, [200, 59]), (1, [0, 3]), (140, [29, 100])


def pairs_by_definition(packed, window):
    """Which tokens each token of `GROUPS` sees."""
    row, group, prompt = [], [], []
    for number, (length, tails) in enumerate(GROUPS):
        parts = [(True, length), *((False, tail) for tail in tails)]
        for index, (is_prompt, size) in enumerate(parts):
            row += [index] * size
            group += [number] * size
            prompt += [is_prompt] * size
    row, group, prompt = torch.tensor(row), torch.tensor(group), torch.tensor(prompt)
    distance = packed.position_ids[0][:, None] - packed.position_ids[0]
    near = (distance >= 0) & (distance < (len(row) if window is None else window))
    same_group = group[:, None] == group
    return near & same_group & (prompt | (row[:, None] == row))


class TestRuns:
    @pytest.mark.parametrize("window", [None, 1, 4, 130, 300])
    def test_block_mask_is_that_of_the_definition(self, window):
        packed = layout(*GROUPS)
        expected, runs = pairs_by_definition(packed, window), packed.layout(FLEX)
        num_tokens = len(expected)
        mask = runs.block_mask(window)
        length = mask.seq_lengths[0]
        assert length == 768
        dense = flex_attention.create_mask(mask.mask_mod, 1, 1, length, length, device="cpu")[0, 0]
        assert torch.equal(dense[:num_tokens, :num_tokens], expected)
        assert not dense[:num_tokens, num_tokens:].any() and dense.any(-1).all()  # no softmax of nothing
        own = flex_attention.create_block_mask(mask.mask_mod, 1, 1, length, length, device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mask, name), getattr(own, name)), name
        assert torch.equal(mask.to_dense(), own.to_dense())
        if window is None:
            assert runs.num_pairs == int(own.to_dense().sum()) * 128**2
            assert own.full_kv_num_blocks.sum() > 0 and runs.num_pairs < length**2

    def test_the_comparison_has_blocks_of_every_kind(self):
        packed = PackedRows(packed_check._LONG, CPU)
        mask = packed.layout(FLEX).block_mask(None)
        whole, in_part = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
        assert whole > 0 and in_part > 0 and whole + in_part < 6 * 7 / 2


class TestExactness:
    @pytest.mark.parametrize("name", daily(MODELS, "llama", "gemma2", "gemma3"))
    def test_equals_reading_every_row(self, name, way, calls):
        model = make_model(name)
        assert_same(model, make_batch())
        assert_taken(model, way, name)
        has_windows = "sliding_window" in MODELS[name] and bool(chosen_ways(model))
        assert any(calls) == has_windows

    @pytest.mark.parametrize("family", daily(["gpt_oss", "deepseek_v3", "mixtral", "gemma3_text"], "gpt_oss"))
    def test_families(self, family, way):
        """Attention sinks; keys and values of different sizes; experts; layers of two windows."""
        model = architectures.build(family)
        assert_same(model, make_batch(), atol=2e-5)
        assert_taken(model, way, family)

    def test_equals_blocks_on_long_rows(self, way, monkeypatch):
        model, batch = make_model("mistral", sliding_window=150), make_batch([(200, [150, 40, 1]), (129, [130])])
        logps, _, gradients = run(model, batch, prompt_sharing="on")
        assert_taken(model, way)
        set_costs(monkeypatch, **{way.cost: None})
        blocks = make_model("mistral", sliding_window=150)
        expected, _, expected_gradients = run(blocks, batch, prompt_sharing="on")
        assert not chosen_ways(blocks)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())

    @pytest.mark.parametrize("shapes", [[(1, [1, 1])], [(4, [3])], [(127, [1]), (1, [130, 2])]], ids=str)
    def test_shapes(self, shapes, way):
        model = make_model()
        assert_same(model, make_batch(shapes))
        assert_taken(model, way)

    def test_left_padding(self, way):
        model = make_model()
        assert_same(model, padded_on_the_left(make_batch()))
        assert_taken(model, way)

    def test_three_query_heads_to_a_key(self, way):
        model = make_model(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
        assert_same(model, make_batch())
        assert_taken(model, way)

    def test_bf16_is_no_further_from_fp32_than_plain_bf16(self, way):
        batch = make_batch([(20, [15, 9, 12, 3])] * 3)
        model, exact = (make_model(dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        exact.load_state_dict(model.state_dict())
        logps = run(exact, batch, prompt_sharing="off")[0]
        shared, plain = (run(model, batch, prompt_sharing=sharing)[0] for sharing in ("on", "off"))
        assert_taken(model, way)
        assert 0 < (shared - logps).pow(2).mean() <= 1.5 * (plain - logps).pow(2).mean()

    def test_autocast(self, way):
        model, batch = make_model(), make_batch()
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        plain, shared = (run(model, batch, prompt_sharing=sharing)[0] for sharing in ("off", "on"))
        assert chosen_ways(model) == {torch.bfloat16: way}
        torch.testing.assert_close(shared, plain, rtol=0.05, atol=0.2)


class TestAroundTheModel:
    @pytest.mark.usefixtures("forced")
    def test_one_compilation_serves_every_batch(self):
        model, before = make_model("gemma3", head_dim=24), COUNTER.frame_count
        shapes = [[(5, [6])], [(90, [120, 100])], [(300, [7] * 3), (20, [150])], [(2, [3, 4])] * 3]
        whole_blocks = [(56, [101, 101])]  # without padding
        run(model, make_batch(shapes[0]), prompt_sharing="on")
        first = COUNTER.frame_count
        for shape in (*shapes[1:], whole_blocks):
            run(model, make_batch(shape), prompt_sharing="on")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)  # as LoRA may have it
        assert run(model, make_batch(shapes[1]), prompt_sharing="on")[2].keys()
        assert COUNTER.frame_count == first <= before + 2  # with gradients, and without for the check

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant, way):
        model, batch = make_model("mistral"), make_batch()
        _, _, gradients = run(model, batch, prompt_sharing="off")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        _, _, again = run(model, batch, prompt_sharing="on")
        assert_taken(model, way)
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())

    def test_inference_mode(self, way):
        """In which a model may be compared that is trained later."""
        model, batch = make_model(), make_batch()
        expected = run(model, batch, prompt_sharing="off")[0]
        model = make_model()
        with torch.inference_mode():
            shared = score_completions(model, batch, prompt_sharing="on").per_token_logps
        torch.testing.assert_close(shared.clone(), expected, rtol=0, atol=1e-5)
        assert_same(model, batch)
        assert_taken(model, way)

    def test_lora(self, way):
        torch.manual_seed(3)
        config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(make_model(), config).train()
        assert_same(model, make_batch())
        assert_taken(model, way)

    @pytest.mark.slow
    @pytest.mark.usefixtures("forced")
    def test_compiled_layers(self):
        """The check lets nothing compile but FlexAttention, which would else make a matrix of all pairs."""
        model, graphs, before = make_model(head_dim=40), [], COUNTER.frame_count
        for layer in model.model.layers:
            layer.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=True)
        assert check_packed_rows_on_all_ranks(model, CPU) is None
        assert chosen_ways(model) and COUNTER.frame_count > before and not graphs
        plain, shared = (score_completions(model, make_batch(), prompt_sharing=sharing) for sharing in ("off", "on"))
        torch.testing.assert_close(shared.per_token_logps, plain.per_token_logps, rtol=0, atol=1e-5)

    @pytest.mark.slow
    def test_ddp(self, tmp_path):
        assert_gradients_are_averaged(_ddp_process, tmp_path)


def _ddp_process(rank, store, folder):
    with pytest.MonkeyPatch.context() as patch:
        force(patch)
        assert_taken(run_under_ddp(rank, store, folder, prompt_sharing="on"), FLEX)
    end_process()


@pytest.mark.slow
def test_calibration_measures_it(way, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--hidden_size", "64", "--length", "256", "--rounds", "1"])
    calibrate = Path(__file__).resolve().parents[1] / "examples/benchmarks/calibrate.py"
    runpy.run_path(str(calibrate), run_name="__main__")
    line = capsys.readouterr().out.strip().splitlines()[-1]
    ((_, costs),) = eval("{" + line + "}", {"AttentionCosts": AttentionCosts}).items()
    assert getattr(costs, way.cost) > 0 and 0 < costs.worthwhile <= 1


@pytest.mark.slow
def test_the_kernel_that_the_compiler_makes(monkeypatch):
    """
    Of C++, which trains nothing, nor compiles for every length: it reads the blocks that are seen, where the reference
    reads a mask of all pairs.
    """
    trust = lambda proof, attend, call, *_: proof.at_once.update({call.dtype: proof.way})  # noqa: E731
    monkeypatch.setattr(packed_check._Proof, "__call__", trust)  # which has gradients
    force(monkeypatch, torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True))
    model = make_model("gemma2").eval()
    for shapes in ([(9, [7, 1, 4])], [(200, [150, 40, 1]), (129, [130])]):
        with torch.no_grad():
            plain, shared = (
                score_completions(model, make_batch(shapes), prompt_sharing=sharing) for sharing in ("off", "on")
            )
        torch.testing.assert_close(shared.per_token_logps, plain.per_token_logps, rtol=0, atol=1e-5)
    assert chosen_ways(model)
