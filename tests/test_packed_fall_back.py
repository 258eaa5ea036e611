"""Where FlexAttention does not do, attention takes packed rows in blocks: in its check, and in the middle of training."""

import pytest
import torch
from test_packed_at_once import CPU, force, layout, record_calls
from test_prompt_sharing import assert_same, make_batch, make_model, run, set_costs

from grkd_trl.scoring import (
    check_packed_rows_on_all_ranks,
    packed_check,
    packed_flex,
    score_completions,
    shared_prompts,
)
from grkd_trl.scoring import rows as scoring_rows
from grkd_trl.scoring.packed_check import chosen_ways
from grkd_trl.scoring.packed_ways import FLEX, VARLEN, ways_at_once


@pytest.fixture
def forced(monkeypatch):
    force(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch)


@pytest.mark.usefixtures("forced")
class TestFallBack:
    def why_in_blocks(self, model, caplog):
        packed_check.logger.warning_once.cache_clear()
        with caplog.at_level("WARNING"):
            assert check_packed_rows_on_all_ranks(model, CPU) is None
        assert not chosen_ways(model)
        assert_same(model, make_batch())
        (message,) = (record.message for record in caplog.records if "in blocks, and not at once" in record.message)
        return message

    def test_a_backward_that_does_not_compile(self, caplog, monkeypatch):
        def attend(query, *args, **kwargs):
            if query.requires_grad:
                raise RuntimeError("No valid triton configs")
            return original(query, *args, **kwargs)

        original = packed_flex._compiled()
        monkeypatch.setattr(packed_flex, "_compiled", lambda: attend)
        assert "FlexAttention fails (RuntimeError: No valid triton configs)" in self.why_in_blocks(
            make_model(), caplog
        )

    def test_a_wrong_gradient(self, caplog, monkeypatch):
        def attend(query, key, value, **kwargs):
            return original(query, key, value.detach() + (value - value.detach()) * 1.001, **kwargs)

        original = packed_flex._compiled()
        monkeypatch.setattr(packed_flex, "_compiled", lambda: attend)
        assert "gradients of FlexAttention differ by 0.1%" in self.why_in_blocks(make_model(), caplog)

    def test_a_kernel_for_all_lengths_that_is_right_on_the_first(self, caplog, monkeypatch):
        def attend(query, *args, **kwargs):
            lengths.add(query.shape[2])
            return original(query, *args, **kwargs) * (1 if len(lengths) == 1 else 1.01)

        original, lengths = packed_flex._compiled(), set()
        monkeypatch.setattr(packed_flex, "_compiled", lambda: attend)
        assert "FlexAttention differ by 1.0%" in self.why_in_blocks(make_model(), caplog)

    @pytest.mark.parametrize("reentrant", [None, False, True])
    def test_a_failure_in_training(self, reentrant, caplog, monkeypatch, calls):
        """In the second layer, on more tokens than were compared. A layer that runs again attends as it did."""

        def attend(query, *args, **kwargs):
            if query.shape[2] > 768:
                long.append(query.shape)
            if len(long) == 2 and query.shape[2] > 768:
                raise RuntimeError("Hard failure due to fullgraph=True")
            return original(query, *args, **kwargs)

        original, long = packed_flex._compiled(), []
        monkeypatch.setattr(packed_flex, "_compiled", lambda: attend)
        model, batch = make_model("mistral"), make_batch([(400, [300, 150])])
        _, _, gradients = run(model, batch, prompt_sharing="off")
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        shared_prompts.logger.warning_once.cache_clear()
        with caplog.at_level("WARNING"):
            _, _, again = run(model, batch, prompt_sharing="on")
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        assert "blocks from now on: FlexAttention fails (RuntimeError: Hard failure" in caplog.text
        assert not chosen_ways(model) and len(long) == 2 + (reentrant is False)
        calls.clear()
        assert_same(model, make_batch())
        assert not calls

    def test_another_precision_than_was_compared(self, calls):
        model, batch = make_model(), make_batch()
        assert check_packed_rows_on_all_ranks(model, CPU) is None and chosen_ways(model) == {torch.float32: FLEX}
        calls.clear()
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        plain, shared = (run(model, batch, prompt_sharing=sharing)[0] for sharing in ("off", "on"))
        torch.testing.assert_close(shared, plain, rtol=0.05, atol=0.2)
        assert not calls

    @pytest.mark.slow
    def test_a_block_that_is_left_out(self, caplog, monkeypatch):
        def without(runs, window):
            mask = original(runs, window)
            seen = mask.mask_mod
            mask.mask_mod = lambda batch, head, query, key: (
                seen(batch, head, query, key) & ((query < 256) | (key >= 128))
            )
            return mask

        original = packed_flex.Runs.block_mask
        monkeypatch.setattr(packed_flex.Runs, "block_mask", without)
        for dtype in (torch.float32, torch.bfloat16):
            model = make_model(dtype=dtype)
            check_packed_rows_on_all_ranks(model, CPU)
            assert not chosen_ways(model)

    @pytest.mark.parametrize("way", [FLEX, VARLEN], ids=lambda way: way.name)
    def test_what_attention_is_told_beside(self, way):
        states, given = torch.randn(1, 2, 8, 16).bfloat16(), layout((5, [3])).layout(way)
        with pytest.raises(NotImplementedError, match=f"{way.name} is not told of position_bias"):
            way.attend(states, states, states, given, dtype=states.dtype, position_bias=torch.zeros(1, 2, 8, 8))

    def test_dropout(self, calls):
        model = make_model(attention_dropout=0.5)
        with torch.no_grad():
            expected = score_completions(model.eval(), make_batch(), prompt_sharing="on").per_token_logps
        assert chosen_ways(model) and calls
        calls.clear()
        drawn = score_completions(model.train(), make_batch(), prompt_sharing="on").per_token_logps
        assert not calls and not torch.allclose(drawn, expected)

    def test_other_devices_and_a_compiler_that_is_off(self, monkeypatch):
        assert FLEX in ways_at_once(CPU)
        assert FLEX in ways_at_once(torch.device("cuda"))
        assert not ways_at_once(torch.device("mps"))
        with torch._dynamo.config.patch(disable=True):
            assert FLEX not in ways_at_once(torch.device("cuda"))
        monkeypatch.undo()
        assert not ways_at_once(CPU)
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # which is in no configuration
        packed_flex._compiled.cache_clear()
        assert FLEX not in ways_at_once(torch.device("cuda"))
        packed_flex._compiled.cache_clear()

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_costs_are_those_of_the_way_that_is_taken(self, dropout, monkeypatch):
        """In training with dropout those of blocks, which are more here than those of plain rows."""
        set_costs(monkeypatch, flex=1e-3, causal=1e-3, call=0, worthwhile=1.0)
        model = make_model(hidden_size=32, num_hidden_layers=1, attention_dropout=dropout, attn_implementation="sdpa")
        original, shared = scoring_rows.run_packed, []
        monkeypatch.setattr(scoring_rows, "run_packed", lambda *args: shared.append(model.training) or original(*args))
        for training in (True, False):
            score_completions(model.train(training), make_batch([(16, [100] * 2)]))
        assert shared == ([False] if dropout else [True, False])

    def test_costs_decide(self, monkeypatch, calls):
        batch = make_batch([(60, [20] * 3)])
        model = make_model(hidden_size=32, num_hidden_layers=1)
        score_completions(model, batch)
        assert chosen_ways(model) and calls
        calls.clear()
        set_costs(monkeypatch, flex=1e3)
        score_completions(model, batch)
        assert not calls


@pytest.mark.parametrize(("precision", "rounds"), [("tf32", True), ("ieee", False)])
def test_the_newer_interface_to_tensor_float(precision, rounds):
    """That `tf32=True` of a trainer goes through, after which the older one raises an error."""
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = precision
        assert packed_check.rounds_to_tensor_float() == rounds
    finally:
        torch.backends.fp32_precision = before
    assert not packed_check.rounds_to_tensor_float()
