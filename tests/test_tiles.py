import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_prompt_sharing import make_batch
from test_scoring import LargestTensor
from tiny import tiny_model, use_tiles
from transformers import LlamaForCausalLM

from grkd_trl.losses import token_relative_loss, token_soft_label_loss
from grkd_trl.scoring import score_completions, sequence_scores, tiles


VOCAB = 41
HEADS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {"attn_implementation": "eager", "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gpt_neox": {},
}


def head_model(name="llama", **kwargs):
    return tiny_model(name.split(",")[0], VOCAB, **{"initializer_range": 0.3} | HEADS[name] | kwargs)


def biased():
    model = head_model()
    model.lm_head = torch.nn.Linear(32, VOCAB)
    return model


def with_lora(target_modules=("o_proj", "lm_head"), **kwargs):
    torch.manual_seed(3)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=list(target_modules), task_type="CAUSAL_LM")
    return get_peft_model(head_model(**kwargs), config)


def with_frozen_head(name):
    model = head_model(name)
    model.get_output_embeddings().requires_grad_(False)
    return model


def checkpointed():
    model = head_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


MODELS = {name: lambda name=name: head_model(name) for name in HEADS}
MODELS |= {"bias": biased, "lora": with_lora, "checkpointing": checkpointed}
FROZEN = {f"{name}, frozen": lambda name=name: with_frozen_head(name) for name in ("llama, tied", "gemma2", "granite")}
FROZEN["lora, frozen"] = lambda: with_lora(["o_proj"])
MODELS |= FROZEN


def run(model, teacher, batch, monkeypatch, *, rows_per_tile, **kwargs):
    """Losses of every kind and the gradients of their sum."""
    use_tiles(monkeypatch.setattr, rows_per_tile * VOCAB)
    model.zero_grad()
    with torch.no_grad():
        taught = score_completions(teacher, batch, return_logits=True, **kwargs)

    def token_losses(logits, rows):
        teacher_logits = taught.logits[rows, :VOCAB]
        return {
            "soft": token_soft_label_loss(logits, teacher_logits, temperature=0.7),
            "relative": token_relative_loss(logits, teacher_logits, top_k=5),
        }

    scores = score_completions(model, batch, token_losses=token_losses, **kwargs)
    ranked = sequence_scores(scores.per_token_logps, batch["completion_mask"], score="mean")
    weights = torch.linspace(-1, 2, len(ranked))
    loss = (ranked * weights).sum() + 0.1 * sum(values.float().sum() for values in scores.token_losses.values())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores, taught, gradients


class TestExactness:
    @pytest.mark.parametrize("sharing", ["off", "on"])
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_all_logits_at_once(self, name, sharing, monkeypatch):
        model, teacher, batch = MODELS[name](), head_model(seed=1), make_batch()
        whole, taught, gradients = run(model, teacher, batch, monkeypatch, rows_per_tile=99, prompt_sharing=sharing)
        assert isinstance(taught.logits, torch.Tensor)
        for rows in (1, 5):
            tiled, lazily, again = run(model, teacher, batch, monkeypatch, rows_per_tile=rows, prompt_sharing=sharing)
            assert isinstance(lazily.logits, tiles.TiledLogits)
            assert tiles.why_at_once(model) is None  # or its own logits were not in tiles
            torch.testing.assert_close(lazily.logits[:], taught.logits)
            torch.testing.assert_close(tiled.per_token_logps, whole.per_token_logps, rtol=0, atol=1e-5)
            torch.testing.assert_close(tiled.token_losses, whole.token_losses, rtol=1e-5, atol=1e-5)
            scale = max(gradient.abs().max().item() for gradient in gradients.values())
            assert set(again) == set(gradients) and scale > 0.1
            for name, gradient in gradients.items():
                torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-5 * scale)

    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_entropy_and_accuracy(self, sharing, monkeypatch):
        """Once for each tile, though backward computes its logits again; a masked vocabulary gives no NaN."""
        model, batch = head_model(), make_batch()
        labels = batch["input_ids"][:, 1:][batch["completion_mask"][:, 1:].bool()]
        masked = torch.tensor(min(set(range(VOCAB)) - set(labels.tolist())))
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB).index_fill(0, masked, -torch.inf))
        logits = score_completions(model, batch, return_logits=True, prompt_sharing=sharing).logits
        probs = logits.softmax(-1)
        for rows in (1, 5, 99):
            use_tiles(monkeypatch.setattr, rows * VOCAB)
            scores = score_completions(model, batch, prompt_sharing=sharing, token_metrics=True)
            scores.per_token_logps.sum().backward()
            torch.testing.assert_close(scores.entropy, torch.special.entr(probs).sum(-1).detach(), rtol=0, atol=1e-5)
            assert torch.equal(scores.is_top1, logits.argmax(-1) == labels) and not scores.entropy.requires_grad
        assert score_completions(model, batch, prompt_sharing=sharing).entropy is None

    def test_bf16_is_no_further_from_fp32_than_plain_bf16(self, monkeypatch):
        batch = make_batch([(20, [15, 9, 12, 3])] * 3)
        model, exact = (head_model(dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        exact.load_state_dict(model.state_dict())
        teacher = head_model(seed=1)
        _, _, gradients = run(exact, teacher, batch, monkeypatch, rows_per_tile=999)
        errors = []
        for rows in (20, 999):
            _, _, own = run(model, teacher.to(torch.bfloat16), batch, monkeypatch, rows_per_tile=rows)
            apart = [(own[name].float() - gradient).norm() for name, gradient in gradients.items()]
            errors.append(torch.stack(apart).norm())
        assert 0 < errors[0] <= 1.25 * errors[1]

    def test_accelerate_autocast(self, monkeypatch):
        """Tiles keep the precision of the forward that they come from."""
        model, teacher, batch = head_model(), head_model(seed=1), make_batch()
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        whole, tiled = (run(model, teacher, batch, monkeypatch, rows_per_tile=rows)[0] for rows in (99, 5))
        torch.testing.assert_close(tiled.per_token_logps, whole.per_token_logps, rtol=0, atol=1e-5)


class TestLogits:
    def test_are_sliced_like_a_tensor(self, monkeypatch):
        batch, model = make_batch(), head_model()
        whole = score_completions(model, batch, return_logits=True).logits
        use_tiles(monkeypatch.setattr, VOCAB)
        lazily = score_completions(model, batch, return_logits=True).logits
        assert lazily.shape == whole.shape
        for key in (slice(2, 5), (slice(None), slice(0, 7)), (slice(3, 4), slice(5, None))):
            torch.testing.assert_close(lazily[key], whole[key])
        assert lazily[:2].requires_grad
        with torch.no_grad():
            taught = score_completions(model, batch, return_logits=True).logits
        assert not taught[:2].requires_grad

    def test_never_exist_at_once(self, monkeypatch):
        vocab = 5003
        model, batch = tiny_model("llama", vocab), make_batch()
        use_tiles(monkeypatch.setattr, 4 * vocab)
        with LargestTensor() as largest:
            score_completions(model, batch).per_token_logps.sum().backward()
        assert largest.numel == model.lm_head.weight.numel()  # above 4 rows of logits, below all

    def test_few_are_one_tile(self):
        model, calls = head_model(), []
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        score_completions(model, make_batch(), prompt_sharing="off").per_token_logps.sum().backward()
        assert len(calls) == 1

    def test_many_are_eight_tiles_or_more(self, monkeypatch):
        batch = make_batch()
        num_tokens = len(score_completions(head_model(), batch, return_logits=True).logits)
        for at_most, num_tiles in ((10**6, 8), (2, -(-num_tokens // 2))):
            model, calls = head_model(), []
            monkeypatch.setattr(tiles, "LOGITS_AT_ONCE", VOCAB)
            monkeypatch.setattr(tiles, "LOGITS_PER_TILE", at_most * VOCAB)
            model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            with torch.no_grad():
                score_completions(model, batch, prompt_sharing="off")
            assert len(calls) == 2 + num_tiles  # two for the first token: the model's forward and a tile, compared

    def test_a_trained_tensor_beside_a_frozen_head_is_refused(self, monkeypatch):
        model, scale = with_frozen_head("llama"), torch.nn.Parameter(torch.tensor(0.5))
        use_tiles(monkeypatch.setattr, 5 * VOCAB)
        with pytest.raises(ValueError, match="`token_losses` reads a trained tensor of shape ()"):
            score_completions(model, make_batch(), token_losses=lambda logits, rows: {"own": (scale * logits).sum(-1)})

    @pytest.mark.parametrize("frozen", [False, True])
    def test_only_a_trained_head_is_read_again_in_backward(self, frozen, monkeypatch):
        model, batch, calls = with_frozen_head("llama") if frozen else head_model(), make_batch(), []
        use_tiles(monkeypatch.setattr, 5 * VOCAB)
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        logps = score_completions(model, batch, token_losses=lambda logits, rows: {}).per_token_logps
        in_forward = len(calls)
        logps.sum().backward()
        assert (len(calls) == in_forward) == frozen

    def test_what_fits_beside_the_gradients_is_kept(self, monkeypatch):
        model, batch, calls = head_model(), make_batch([(5, [40, 40])]), []
        use_tiles(monkeypatch.setattr, 5 * VOCAB)
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        found = {}
        for rows in (0, 30, 99):
            num_trained = rows * 4 * VOCAB
            monkeypatch.setattr(
                tiles.TiledLogits, "num_trained", property(lambda _, n=num_trained: n, lambda *_: None), raising=False
            )
            calls.clear(), model.zero_grad()
            score_completions(model, batch, prompt_sharing="off").per_token_logps.sum().backward()
            found[rows] = len(calls) - 2, [parameter.grad for parameter in model.parameters()]
        # 80 tokens in tiles of 5, read twice; one tile of 30 and then tiles of 5, read twice; one tile.
        assert [found[rows][0] for rows in found] == [16 + 16, 1 + 10 + 10, 1]
        for rows in (30, 99):
            torch.testing.assert_close(found[rows][1], found[0][1], rtol=1e-5, atol=1e-5)


class Halving(LlamaForCausalLM):
    """Does to its logits what nobody knows of."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits / 2
        return outputs


class TestFallBack:
    def test_a_head_that_does_more(self, monkeypatch):
        model, batch = Halving(head_model().config), make_batch()
        whole = score_completions(model, batch).per_token_logps
        use_tiles(monkeypatch.setattr, VOCAB)
        for _ in range(2):
            torch.testing.assert_close(score_completions(model, batch).per_token_logps, whole)
        assert "`Halving` changes its logits" in tiles.why_at_once(model)

    def test_an_adapter_that_is_switched_off(self, monkeypatch):
        model, batch = with_lora(), make_batch()
        use_tiles(monkeypatch.setattr, VOCAB)
        with model.disable_adapter(), torch.no_grad():
            base = score_completions(model, batch, return_logits=True).logits
        assert isinstance(base, torch.Tensor)
        assert (base - score_completions(model, batch, return_logits=True).logits[:]).abs().max() > 1e-2
