"""The comparison that a model goes through before its first packed rows."""

import architectures
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from runs import end_process
from test_architectures import logps_alone
from test_architectures import make_batch as make_rows
from test_prompt_sharing import make_batch, make_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from grkd_trl.scoring import check_packed_rows_on_all_ranks, packed_check, score_completions
from grkd_trl.scoring import rows as scoring_rows


CPU = torch.device("cpu")
# What speaks against each family, one of every kind.
FAMILIES = {
    "llama": None,
    "gpt_oss": None,
    "gemma3_text": None,
    "deepseek_v3": None,
    "mixtral": None,
    "bert": None,
    "bart": "its forward takes no `position_ids`",
    "roberta": "its states of packed rows differ",
    "doge": "it gives its attention a mask of its own",
    "lfm2": "it has layers of conv",
    "llama4_text": "it has layers of chunked_attention",
    "bloom": "it does not use the attention interface of transformers",
    "stablelm": "to the attention of every layer",
    "moshi": "it does not tell its attention of the sliding window",
}


def check(model):
    return check_packed_rows_on_all_ranks(model, CPU)


@pytest.fixture
def comparisons(monkeypatch):
    """Models that were compared."""
    models = []
    original = packed_check._compare
    monkeypatch.setattr(packed_check, "_compare", lambda model, *how: models.append(model) or original(model, *how))
    return models


class TestFamilies:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("family, reason", FAMILIES.items())
    def test_is_right_or_refused(self, family, reason, attention):
        if family in ("gpt_oss", "bloom") and attention == "sdpa":
            pytest.skip("one attention alone")
        model, batch = architectures.build(family, attn_implementation=attention), make_rows()
        verdict = check(model)
        assert (verdict is None) if reason is None else (reason in verdict)
        with torch.no_grad():
            logps = score_completions(model, batch, prompt_sharing="on").per_token_logps
        torch.testing.assert_close(logps, logps_alone(model, batch), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family, reason", FAMILIES.items())
    def test_few_bits_change_no_verdict(self, family, reason, dtype):
        verdict = check(architectures.build(family).to(dtype))
        assert (verdict is None) if reason is None else (reason in verdict)

    @pytest.mark.parametrize("family, reason", FAMILIES.items())
    def test_autocast_changes_no_verdict(self, family, reason):
        model = architectures.build(family)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            verdict = check(model)
        assert (verdict is None) if reason is None else (reason in verdict)

    def test_a_model_that_reads_on(self):
        model = architectures.build("bert", is_decoder=False)
        assert "change by" in check(model) and "with padding and with later tokens" in check(model)

    def test_positions_that_are_shifted(self):
        class Shifted(LlamaForCausalLM):
            def forward(self, position_ids=None, **kwargs):
                shifted = None if position_ids is None else position_ids + (position_ids > 3)
                return super().forward(position_ids=shifted, **kwargs)

        for dtype in (torch.float32, torch.bfloat16):
            model = Shifted(make_model().config).to(dtype)
            model.load_state_dict(make_model().state_dict())
            assert "its states of packed rows differ" in check(model)

    def test_an_error_on_the_way(self):
        class Strict(LlamaForCausalLM):
            def forward(self, position_ids=None, attention_mask=None, **kwargs):
                if attention_mask.dim() != 2:
                    raise RuntimeError("two dimensions")
                return super().forward(position_ids=position_ids, attention_mask=attention_mask, **kwargs)

        assert "its forward fails on packed rows (RuntimeError: two dimensions)" in check(Strict(make_model().config))

    def test_a_window_without_a_name(self, monkeypatch):
        """Attention that looks at fewer keys than the layout allows, in its last layer alone."""
        original = LlamaAttention.forward

        def forward(self, hidden_states, *args, attention_mask=None, packed_rows=None, **kwargs):
            if self.layer_idx == 1 and packed_rows is None:
                kept = torch.ones(hidden_states.shape[1], hidden_states.shape[1], dtype=torch.bool).tril().triu(-3)
                attention_mask = kept & (True if attention_mask is None else attention_mask)
                attention_mask = attention_mask.expand(len(hidden_states), 1, *kept.shape)
            return original(
                self, hidden_states, *args, attention_mask=attention_mask, packed_rows=packed_rows, **kwargs
            )

        monkeypatch.setattr(LlamaAttention, "forward", forward)
        assert "its states of packed rows differ" in check(make_model())


class TestCheck:
    def test_is_made_once_for_a_model(self, comparisons):
        model, other = make_model(), make_model()
        for _ in range(3):
            assert check(model) is None
        assert comparisons == [model]
        check(other)
        assert comparisons == [model, other]

    def test_a_student_and_its_base_are_one_model(self, comparisons):
        config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        student = get_peft_model(make_model(), config)
        check(student)
        with student.disable_adapter():
            assert check(student) is None
        assert check(student.get_base_model()) is None
        assert comparisons == [student]

    def test_is_made_again_for_other_attention(self, comparisons):
        model = make_model(attn_implementation="sdpa")
        check(model)
        model.set_attn_implementation("eager")
        assert check(model) is None and len(comparisons) == 2
        assert model.config._attn_implementation == "eager_shared_prompts"

    def test_what_is_refused_keeps_its_attention(self):
        model = architectures.build("doge", attn_implementation="sdpa")
        assert check(model) and model.config._attn_implementation == "sdpa"

    def test_vision_keeps_its_attention(self):
        model = architectures.build("llava", attn_implementation="sdpa")
        assert check(model) is None
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.config.text_config._attn_implementation == "sdpa_shared_prompts"

    def test_leaves_no_trace(self):
        model = make_model(attention_dropout=0.5).train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        assert check(model) is None
        assert torch.equal(torch.rand(3), expected)
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_compiled_layers_are_not_compiled_for_it(self):
        model, graphs = make_model(), []
        for layer in model.model.layers:
            layer.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=True)
        assert check(model) is None and not graphs
        plain, shared = (score_completions(model, make_batch(), prompt_sharing=sharing) for sharing in ("off", "on"))
        assert graphs
        torch.testing.assert_close(shared.per_token_logps, plain.per_token_logps, rtol=0, atol=1e-5)

    def test_costs_three_forwards_of_few_tokens(self, monkeypatch):
        model, tokens = make_model(), []
        model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
        check(model)
        assert len(tokens) == 3 and sum(tokens) < 128

    def test_special_tokens_are_not_read(self):
        model = make_model()
        model.config.eos_token_id, model.config.image_token_id = [1, 19], 5
        read = packed_check._make_batch(model, CPU)
        tokens = read["input_ids"][read["attention_mask"].bool()]
        assert not set(tokens.tolist()) & {0, 1, 2, 5, 19}
        assert len(tokens.unique()) > 25

    def test_a_mask_in_training_alone_is_refused_there(self, monkeypatch):
        original = LlamaAttention.forward

        def forward(self, hidden_states, *args, attention_mask=None, **kwargs):
            if self.training:
                attention_mask = torch.ones(1, 1, hidden_states.shape[1], hidden_states.shape[1], dtype=torch.bool)
            return original(self, hidden_states, *args, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(LlamaAttention, "forward", forward)
        with pytest.raises(ValueError, match="cannot share prompts in this forward: it gives its attention a mask"):
            score_completions(make_model().train(), make_batch(), prompt_sharing="on")


def test_every_rank_decides_alike(tmp_path):
    """One rank's parameters differ under DDP, which broadcasts buffers alone; both read plain rows then."""
    mp.spawn(_process, args=(f"file://{tmp_path}/store", tmp_path), nprocs=2)
    reasons = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert "its states of packed rows differ" in reasons[1]
    assert reasons[0] == "on another process its packed rows differ from plain ones"


def _process(rank, store, folder):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(make_model())
    if rank == 1:
        original = LlamaForCausalLM.forward

        def forward(self, position_ids=None, **kwargs):
            shifted = None if position_ids is None else position_ids + (position_ids > 3)
            return original(self, position_ids=shifted, **kwargs)

        LlamaForCausalLM.forward = forward
    torch.save(check_packed_rows_on_all_ranks(model, CPU), folder / f"{rank}.pt")
    scoring_rows.logger.warning_once.cache_clear()
    score_completions(model, make_batch()).per_token_logps.sum().backward()
    end_process()
