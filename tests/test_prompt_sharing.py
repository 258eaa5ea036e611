import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import end_process
from tiny import tiny_model
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from grkd_trl.data import DataCollatorForGroups
from grkd_trl.scoring import attention_costs as costs_of_devices
from grkd_trl.scoring import check_packed_rows_on_all_ranks, score_completions, shared_prompts
from grkd_trl.scoring import rows as scoring_rows
from grkd_trl.scoring.attention_costs import attention_costs, causal_pairs
from grkd_trl.scoring.packed_rows import PackedRows, read_rows


VOCAB = 41
RAGGED = [(9, [7, 1, 4]), (3, [5, 2]), (12, [3, 8, 6, 1])]  # prompt, completions
MODELS = {
    "llama": {},
    "llama, eager": {"attn_implementation": "eager"},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 4,
        "attn_implementation": "eager",
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "mistral, window between": {"sliding_window": 11},
    "mistral, eager": {"sliding_window": 4, "attn_implementation": "eager"},
    "gpt_neox": {},
}


def make_model(name="llama", **kwargs):
    kwargs = {"initializer_range": 0.3} | MODELS.get(name, {}) | kwargs
    return tiny_model(name.split(",")[0], VOCAB, **kwargs)


def make_batch(shapes=RAGGED, seed=0, **kwargs):
    draw = random.Random(seed)
    tokens = lambda num: [draw.randrange(VOCAB) for _ in range(num)]  # noqa: E731
    rows = [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in lengths]} for p, lengths in shapes]
    return DataCollatorForGroups(pad_token_id=7, **kwargs)(rows)


def padded_on_the_left(batch):
    lengths = batch["attention_mask"].sum(-1)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        rows = [row.roll(-length.item()) for row, length in zip(batch[name], lengths, strict=True)]
        batch[name] = torch.stack(rows)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()
    return batch


def run(model, batch, **kwargs):
    """Per-token logps, logits and gradients."""
    model.zero_grad()
    scores = score_completions(model, batch, return_logits=True, **kwargs)
    weights = torch.linspace(-1, 2, scores.per_token_logps.numel()).view_as(scores.per_token_logps)
    ((scores.per_token_logps * weights).sum() + scores.logits.float().logsumexp(-1).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.per_token_logps.detach(), scores.logits.detach(), gradients


def assert_same(model, batch, *, atol=1e-5):
    logps, logits, gradients = run(model, batch, prompt_sharing="off")
    shared_logps, shared_logits, shared_gradients = run(model, batch, prompt_sharing="on")
    torch.testing.assert_close(shared_logps, logps, rtol=0, atol=atol)
    torch.testing.assert_close(shared_logits, logits, rtol=0, atol=10 * atol)
    assert set(shared_gradients) == set(gradients)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    assert scale > 0.1
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-5, atol=atol * scale)


@pytest.fixture
def lengths_read(monkeypatch):
    """Number of tokens of each packed forward."""
    lengths = []

    def run_packed(model, batch, packed_rows, **kwargs):
        lengths.append(packed_rows.source.numel())
        return original(model, batch, packed_rows, **kwargs)

    original = scoring_rows.run_packed
    monkeypatch.setattr(scoring_rows, "run_packed", run_packed)
    return lengths


def set_costs(monkeypatch, **costs):
    changed = attention_costs(torch.device("cpu"))._replace(**costs)
    monkeypatch.setitem(costs_of_devices._COSTS, "cpu", changed)


class TestExactness:
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_reading_every_row(self, name, lengths_read):
        assert_same(make_model(name), make_batch())
        # Prompts once; completions without the token that predicts nothing; no padding.
        assert lengths_read == [9 + 6 + 0 + 3 + 3 + 4 + 1 + 12 + 2 + 7 + 5 + 0]

    @pytest.mark.parametrize("name", MODELS)
    def test_in_several_calls(self, name, monkeypatch):
        set_costs(monkeypatch, queries=3)
        assert_same(make_model(name), make_batch())

    @pytest.mark.parametrize(
        "shapes",
        [[(1, [1, 1])], [(5, [6, 6, 6])], [(4, [3])], [(30, [2] * 5)] * 3, [(2, [9, 1]), (19, [1, 9])]],
        ids=str,
    )
    def test_shapes(self, shapes):
        assert_same(make_model(), make_batch(shapes))

    def test_left_padding(self):
        assert_same(make_model(), padded_on_the_left(make_batch()))

    def test_rows_cut_from_the_left(self, lengths_read):
        """The rows of a group keep different ends of their prompt, or none of it."""
        batch = make_batch(max_length=10, truncation_mode="keep_end")
        assert (batch["completion_mask"].sum(-1) < 10).any()
        assert_same(make_model(), batch)
        batch = make_batch([(2, [8, 3])], max_length=4, truncation_mode="keep_end")
        assert batch["completion_mask"][0].all()
        assert_same(make_model(), batch)
        assert len(lengths_read) == 2

    def test_equal_prompts_of_two_groups_are_one(self, lengths_read):
        batch = make_batch([(5, [3, 2])])
        batch = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
        assert_same(make_model(), batch)
        assert lengths_read == [5 + 2 * (2 + 1)]

    def test_bf16_is_no_further_from_fp32_than_plain_bf16(self):
        batch = make_batch([(20, [15, 9, 12, 3])] * 3)
        model, exact = (make_model(dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        exact.load_state_dict(model.state_dict())
        logps, _, gradients = run(exact, batch, prompt_sharing="off")
        errors = {}
        for sharing in ("on", "off"):
            own_logps, _, own_gradients = run(model, batch, prompt_sharing=sharing)
            apart = [(own_gradients[name].float() - gradient).norm() for name, gradient in gradients.items()]
            errors[sharing] = (own_logps - logps).pow(2).mean().sqrt(), torch.stack(apart).norm()
        for shared, plain in zip(errors["on"], errors["off"], strict=True):
            assert 0 < shared <= 1.25 * plain

    def test_other_calls_of_the_model_are_as_before(self):
        for name in ("llama", "gemma2"):
            model, inputs = make_model(name).eval(), {"input_ids": torch.arange(24).view(2, 12)}
            inputs["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [7]])).long()
            before = model(**inputs).logits
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            score_completions(model, make_batch(), prompt_sharing="on")
            torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), written)
            assert "shared" not in model.config.to_json_string()


class TestAroundTheModel:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        model, batch = make_model("mistral"), make_batch()
        _, _, gradients = run(model, batch, prompt_sharing="off")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert check_packed_rows_on_all_ranks(model, model.device) is None
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        _, _, again = run(model, batch, prompt_sharing="on")
        assert len(calls) == 2  # forward, and once more in backward
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())

    def test_lora(self):
        torch.manual_seed(3)
        config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(make_model(), config).train()
        assert_same(model, make_batch())

    def test_accelerate_autocast(self):
        """As `Accelerator.prepare_model` wraps a forward for mixed precision."""
        model, batch = make_model(), make_batch()
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        plain, shared = (run(model, batch, prompt_sharing=sharing)[0] for sharing in ("off", "on"))
        assert check_packed_rows_on_all_ranks(model, model.device) is None
        torch.testing.assert_close(shared, plain, rtol=0.05, atol=0.2)
        assert not torch.equal(shared, run(make_model(), batch, prompt_sharing="on")[0])

    def test_ddp(self, tmp_path):
        """One forward of the wrapped model, so its gradients are averaged as ever."""
        assert_gradients_are_averaged(_ddp_process, tmp_path)


def assert_gradients_are_averaged(process, folder):
    """Two processes, which leave their gradients by [`run_under_ddp`], have the mean of those of two models alone."""
    mp.spawn(process, args=(f"file://{folder}/store", folder), nprocs=2)
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    model = make_model()
    expected = [run(model, make_batch(seed=rank), prompt_sharing="off")[2] for rank in range(2)]
    for name, gradient in expected[0].items():
        mean = (gradient + expected[1][name]) / 2
        for part in parts:
            torch.testing.assert_close(part[name], mean, rtol=1e-4, atol=1e-5 * mean.abs().max().item())


def run_under_ddp(rank, store, folder, *, prompt_sharing):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(make_model())
    _, _, gradients = run(model, make_batch(seed=rank), prompt_sharing=prompt_sharing)
    torch.save({name.removeprefix("module."): gradient for name, gradient in gradients.items()}, folder / f"{rank}.pt")
    return model


def _ddp_process(rank, store, folder):
    run_under_ddp(rank, store, folder, prompt_sharing="on" if rank else "auto")
    end_process()


class Work(TorchFunctionMode):
    """What a forward computes: tokens through the layers, and query-key pairs of a layer's attention."""

    def __init__(self):
        super().__init__()
        self.tokens = self.pairs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key, *_ = args
            assert query.shape[2] <= key.shape[2]
            num_queries = attention_costs(key.device).queries
            pairs = causal_pairs(key.shape[2], num_queries) if kwargs["is_causal"] else query.shape[2] * key.shape[2]
            self.pairs += len(query) * pairs
        elif function is F.embedding:
            self.tokens += args[0].numel()
        return function(*args, **(kwargs or {}))


class TestChoice:
    @pytest.mark.parametrize("hidden_size", [32, 256])
    def test_auto_takes_what_is_less_work(self, hidden_size, lengths_read, monkeypatch):
        """As counted in the forwards themselves, tokens weighed by 6 H pairs."""
        set_costs(monkeypatch, queries=16)
        model = make_model(hidden_size=hidden_size, num_hidden_layers=1, attn_implementation="sdpa")
        lengths = [(20, 3), (2, 40), (8, 64), (64, 64), (1, 150), (30, 30)]
        shapes = [[(prompt, [length] * size)] for prompt, length in lengths for size in (1, 2, 4)]
        shapes += [[(2, [40, 4])], [(2, [40, 30])] * 2, [(5, [40]), (40, [5])], RAGGED]
        chosen = []
        for shape in shapes:
            batch, works = make_batch(shape), {}
            for sharing in ("on", "off"):
                with Work() as counted, torch.no_grad():
                    score_completions(model, batch, prompt_sharing=sharing)
                works[sharing] = counted.tokens * 6 * hidden_size + counted.pairs
            lengths_read.clear()
            score_completions(model, batch)
            chosen.append(bool(lengths_read))
            assert chosen[-1] == (works["on"] <= 0.9 * works["off"]), (shape, works)
        assert 3 < sum(chosen) < len(chosen) - 3

    @pytest.mark.parametrize(
        ("costs", "packs"),
        [({}, True), ({"causal": 0.2}, False), ({"causal": 0.2, "token": 60.0}, True), ({"worthwhile": 0.5}, False)],
        ids=str,
    )
    def test_costs_of_the_device_decide(self, costs, packs, lengths_read, monkeypatch):
        set_costs(monkeypatch, **costs)
        model = make_model(hidden_size=32, num_hidden_layers=1, attn_implementation="sdpa")
        score_completions(model, make_batch([(16, [40] * 2)]))
        assert bool(lengths_read) == packs

    def test_long_tails_do_not_attend_to_what_is_masked(self):
        batch = make_batch([(10, [2000, 2000])])
        with Work() as counted, torch.no_grad():
            score_completions(make_model(num_hidden_layers=1), batch, prompt_sharing="on")
        seen = 10 * 11 / 2 + 2 * (1999 * 10 + 1999 * 2000 / 2)
        assert counted.pairs < 1.15 * seen

    def test_off_packs_nothing(self, lengths_read):
        score_completions(make_model(), make_batch([(20, [3, 3])]), prompt_sharing="off")
        assert not lengths_read

    def test_other_words_are_refused(self):
        with pytest.raises(ValueError, match="`prompt_sharing` must be 'auto', 'on' or 'off', got 'yes'"):
            score_completions(make_model(), make_batch(), prompt_sharing="yes")

    def test_position_ids_of_the_batch_are_kept(self, lengths_read):
        batch = make_batch()
        batch["position_ids"] = 2 * torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        assert_same(make_model(), batch)
        assert not lengths_read

    @pytest.mark.parametrize("column", [3, 10])
    def test_completions_with_holes_are_read_row_by_row(self, column, lengths_read):
        batch = make_batch()
        batch["completion_mask"][0, column] = 1 - batch["completion_mask"][0, column]
        assert_same(make_model(), batch)
        assert not lengths_read


class Forgetful(LlamaForCausalLM):
    """Drops what its forward is given."""

    def forward(self, position_ids=None, packed_rows=None, **kwargs):
        return super().forward(position_ids=position_ids, **kwargs)


def assert_falls_back(model, batch, reason, caplog, **kwargs):
    scoring_rows.logger.warning_once.cache_clear()
    plain = score_completions(model, batch, prompt_sharing="off", **kwargs).per_token_logps
    with caplog.at_level("WARNING"):
        for _ in range(3):
            scores = score_completions(model, batch, **kwargs).per_token_logps
            torch.testing.assert_close(scores, plain, rtol=0, atol=0)
    messages = [record.message for record in caplog.records if "cannot share" in record.message]
    assert len(messages) == 1 and reason in messages[0]


class TestFallBack:
    def test_virtual_tokens(self, caplog):
        model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        assert_falls_back(model, make_batch(), "virtual tokens", caplog)

    def test_no_attention_interface(self, caplog):
        model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))
        assert_falls_back(model, make_batch(), "attention interface", caplog)

    def test_other_attention(self, caplog):
        model = make_model(attn_implementation="sdpa")
        model.config._attn_implementation_internal = "flash_attention_2"
        reason = shared_prompts.why_not_shared(model)
        assert "its attention is 'flash_attention_2', and only 'sdpa' and 'eager'" in reason

    def test_layout_lost_on_the_way(self, caplog):
        model = Forgetful(make_model().config)
        assert_falls_back(model, make_batch(), "hand what its forward is given", caplog)

    def test_window_kept_from_attention(self, caplog, monkeypatch):
        def forward(self, *args, **kwargs):
            self.sliding_window = None
            return original(self, *args, **kwargs)

        original = Qwen2Attention.forward
        monkeypatch.setattr(Qwen2Attention, "forward", forward)
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
        assert_falls_back(make_model("qwen2", **window), make_batch(), "sliding window", caplog)

    def test_router_loss(self, caplog):
        sizes = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        model = tiny_model("qwen3_moe", VOCAB, **sizes)
        assert_falls_back(model, make_batch(), "load-balancing", caplog, output_router_logits=True)
        assert score_completions(model, make_batch(), output_router_logits=True).aux_loss is not None


class TestLayout:
    def rows(self, batch):
        return read_rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])

    def test_tokens_and_positions(self):
        batch = make_batch([(3, [2, 3]), (2, [1, 2])])
        layout, ids = PackedRows(self.rows(batch), torch.device("cpu")), batch["input_ids"]
        expected = [*ids[0, :4], *ids[1, 3:5], *ids[2, :2], ids[3, 2]]
        assert ids.flatten()[layout.source].tolist() == [token.item() for token in expected]
        assert layout.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
        assert layout.predicts.tolist() == [2, 3, 2, 4, 5, 7, 7, 8]

    def test_split_and_join_are_inverse_in_value_and_gradient(self):
        layout = PackedRows(self.rows(make_batch([*RAGGED, (40, [60, 1]), (200, [3, 3])])), torch.device("cpu"))
        assert len(layout.blocks) > 1
        states = torch.randn(layout.source.numel(), 2, 3, dtype=torch.float64, requires_grad=True)
        joined = layout.join(layout.split(states))
        assert torch.equal(joined, states)
        weights = torch.randn_like(states)
        assert torch.equal(torch.autograd.grad((joined * weights).sum(), states)[0], weights)

    def test_like_groups_attend_in_one_call(self):
        layout = PackedRows(self.rows(make_batch([(20, [5, 6]), (18, [6, 4])] * 2)), torch.device("cpu"))
        assert [block.prompt_shape for block in layout.blocks] == [(4, 20)]
        layout = PackedRows(self.rows(make_batch([(500, [5, 6]), (18, [250, 4])])), torch.device("cpu"))
        assert [block.prompt_shape for block in layout.blocks] == [(1, 500), (1, 18)]
