import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from grkd_trl.scoring import predicted_mask, score_completions, sequence_scores, to_groups


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox"]
VOCAB = 41
PAD = 7  # an ordinary token: masks come from lengths


def make_model(architecture, vocab_size, **kwargs):
    """Far from uniform: of weights as small as usual, attention and positions would hardly be seen in the logits."""
    if architecture == "gemma2":
        kwargs = {"sliding_window": 4} | kwargs  # below the length of the rows
    return tiny_model(architecture, vocab_size, **{"initializer_range": 0.3} | kwargs).eval()


def make_rows(seed=0, num=6, vocab=VOCAB):
    """Rows of (prompt, completion), of 4 to 16 tokens."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(vocab) for _ in range(p)], [draw.randrange(vocab) for _ in range(c)])
        for p, c in [(9, 7), (3, 1), (6, 4), (2, 5), (8, 2), (4, 7)][:num]
    ]


def make_batch(rows, side="right"):
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    columns = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, completion in rows:
        absent = length - len(prompt) - len(completion)
        for name, values, fill in (
            ("input_ids", prompt + completion, PAD),
            ("attention_mask", [1] * len(prompt + completion), 0),
            ("completion_mask", [0] * len(prompt) + [1] * len(completion), 0),
        ):
            padding = [fill] * absent
            columns[name].append(values + padding if side == "right" else padding + values)
    return {name: torch.tensor(values) for name, values in columns.items()}


def plain(model, row):
    """Logits that predict a completion, and its log-probabilities, by a forward of this row alone."""
    prompt, completion = row
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    logits = logits[-len(completion) - 1 : -1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, wide.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def plain_logps(model, rows):
    return torch.cat([plain(model, row)[1] for row in rows])


def completion_logps(model, rows, side="right"):
    batch = make_batch(rows, side)
    return score_completions(model, batch).per_token_logps[predicted_mask(batch["completion_mask"])]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, rows, *, side="right", weights=None):
    weights = torch.linspace(-1, 2, sum(len(completion) for _, completion in rows)) if weights is None else weights
    ours = gradients(model, (completion_logps(model, rows, side) * weights).sum())
    theirs = gradients(model, (plain_logps(model, rows) * weights).sum())
    assert set(ours) == set(theirs)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 0.1
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.fixture(params=["off", "on"])
def each_sharing(request, monkeypatch):
    """Everything here holds whether or not the rows are packed."""
    monkeypatch.setitem(globals(), "score_completions", partial(score_completions, prompt_sharing=request.param))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return make_model(request.param, VOCAB)


@pytest.mark.usefixtures("each_sharing")
class TestEveryArchitecture:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padded_rows_equal_plain_ones(self, model, side):
        rows = make_rows()
        torch.testing.assert_close(completion_logps(model, rows, side), plain_logps(model, rows), rtol=0, atol=1e-5)

    def test_unpadded_rows_equal_plain_ones(self, model):
        for row in make_rows():
            torch.testing.assert_close(completion_logps(model, [row]), plain_logps(model, [row]), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_gradients_equal_plain_ones(self, model, side):
        assert_same_gradients(model, make_rows(), side=side)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_logits_are_the_plain_ones_row_after_row(self, model, side):
        rows = make_rows()
        logits = score_completions(model, make_batch(rows, side), return_logits=True).logits
        expected = torch.cat([plain(model, row)[0] for row in rows])
        assert logits.shape == (26, VOCAB)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    def test_head_sees_completion_tokens_alone(self, model):
        shapes = []
        handle = model.get_output_embeddings().register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
        try:
            score_completions(model, make_batch(make_rows()))
        finally:
            handle.remove()
        assert [shape[:-1].numel() for shape in shapes] == [26]

    def test_logps_off_the_completion_are_zero(self, model):
        batch = make_batch(make_rows())
        scores = score_completions(model, batch)
        mask = predicted_mask(batch["completion_mask"])
        assert scores.per_token_logps.shape == mask.shape
        assert (scores.per_token_logps[~mask] == 0).all()
        assert (scores.per_token_logps[mask] < 0).all()
        assert scores.logits is None and scores.aux_loss is None

    def test_position_ids_of_the_batch_are_taken(self, model):
        batch = make_batch(make_rows(num=1))
        batch["position_ids"] = 3 * torch.arange(16)[None]
        logits = score_completions(model, batch, return_logits=True).logits
        expected = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, 8:15]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(logits, plain(model, make_rows(num=1)[0])[0], atol=1e-2)


@pytest.mark.usefixtures("each_sharing")
class TestAbsolutePositions:
    def test_left_padding_does_not_shift_them(self):
        """The models above turn positions into differences, so they would forgive a shift; GPT-2 does not."""
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        model, rows = GPT2LMHeadModel(config).eval(), make_rows()
        for side in ("right", "left"):
            torch.testing.assert_close(
                completion_logps(model, rows, side), plain_logps(model, rows), rtol=0, atol=1e-5
            )


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.usefixtures("each_sharing")
class TestMemory:
    @pytest.mark.parametrize("return_logits", [False, True])
    def test_no_tensor_of_all_logits_in_forward_or_backward(self, return_logits):
        rows, vocab = make_rows(), 5003
        model, batch = make_model("llama", vocab), make_batch(rows)
        every_logit = batch["input_ids"].numel() * vocab
        with LargestTensor() as ours:
            score_completions(model, batch, return_logits=return_logits).per_token_logps.sum().backward()
        assert ours.numel < every_logit / 2
        with LargestTensor() as theirs:
            model(input_ids=batch["input_ids"]).logits.sum().backward()
        assert theirs.numel >= every_logit


@pytest.mark.usefixtures("each_sharing")
class TestDtypes:
    def test_bf16_model_is_scored_in_float32(self):
        rows = make_rows()
        model = make_model("llama", VOCAB, dtype=torch.bfloat16)
        exact = plain_logps(make_model("llama", VOCAB, dtype=torch.bfloat16).double(), rows)
        batch = make_batch(rows)
        scores = score_completions(model, batch, return_logits=True)
        ours = scores.per_token_logps[predicted_mask(batch["completion_mask"])]
        assert ours.dtype == torch.float32 and scores.logits.dtype == torch.bfloat16
        error = (plain_logps(model, rows) - exact).abs().max()
        assert (ours - exact).abs().max() <= 2 * error
        # The softmax itself is float32: it equals that of the very logits returned.
        targets = torch.tensor([token for _, completion in rows for token in completion])
        expected = scores.logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)

    def test_float64_stays_float64(self):
        batch = make_batch(make_rows())
        assert score_completions(make_model("llama", VOCAB, dtype=torch.float64), batch)[0].dtype == torch.float64


def lora(**kwargs):
    model = make_model("llama", VOCAB)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **kwargs))


@pytest.mark.usefixtures("each_sharing")
class TestAdapters:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"target_modules": ["q_proj", "v_proj"]},
            {"target_modules": "all-linear"},
            {"target_modules": ["down_proj", "embed_tokens"]},
            {"target_modules": ["o_proj", "lm_head"]},
            {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
        ],
        ids=str,
    )
    def test_lora(self, kwargs):
        model, rows = lora(**kwargs).eval(), make_rows()
        with torch.no_grad():
            for side in ("right", "left"):
                ours = completion_logps(model, rows, side)
                torch.testing.assert_close(ours, plain_logps(model, rows), rtol=0, atol=1e-5)
            with model.disable_adapter():
                assert (plain_logps(model, rows) - ours).abs().max() > 1e-3
        assert_same_gradients(model, rows)
        moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)

    @pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
    def test_virtual_tokens(self, config):
        rows = make_rows()
        torch.manual_seed(5)
        model = get_peft_model(make_model("llama", VOCAB), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        with torch.no_grad():  # the default start may be too faint to be seen
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_()
            ours = completion_logps(model, rows)
            torch.testing.assert_close(ours, plain_logps(model, rows), rtol=0, atol=1e-5)
            assert (plain_logps(model.get_base_model(), rows) - ours).abs().max() > 1e-3
        assert_same_gradients(model, rows)

    def test_tied_embeddings(self):
        model = make_model("llama", VOCAB, tie_word_embeddings=True)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        rows = make_rows()
        torch.testing.assert_close(completion_logps(model, rows), plain_logps(model, rows), rtol=0, atol=1e-5)
        assert_same_gradients(model, rows)


@pytest.mark.usefixtures("each_sharing")
class TestHook:
    def test_is_removed(self):
        model, batch = make_model("llama", VOCAB), make_batch(make_rows())
        before = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        score_completions(model, batch)
        assert not model.lm_head._forward_pre_hooks
        torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"]).logits, before)

    @pytest.mark.parametrize("where", ["lm_head", "model"])
    def test_is_removed_after_an_exception(self, where):
        model, batch = make_model("llama", VOCAB), make_batch(make_rows())

        def fail(*_):
            raise RuntimeError("in the forward")

        handle = getattr(model, where).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the forward"):
            score_completions(model, batch)
        handle.remove()
        assert not model.lm_head._forward_pre_hooks
        assert model(batch["input_ids"]).logits.shape == (6, 16, VOCAB)


@pytest.mark.usefixtures("each_sharing")
class TestEdges:
    def test_completion_from_the_first_column(self):
        """Truncated from the left, a row may hold no prompt: nothing predicts its first token."""
        model, batch = make_model("llama", VOCAB), make_batch([([], [3, 4, 5]), ([1], [2])])
        logps = score_completions(model, batch).per_token_logps
        expected = model(torch.tensor([[3, 4, 5]])).logits[0].log_softmax(-1)
        torch.testing.assert_close(logps[0], torch.stack([expected[0, 4], expected[1, 5]]), rtol=0, atol=1e-5)
        scores = sequence_scores(logps, batch["completion_mask"], score="mean")
        torch.testing.assert_close(scores, torch.stack([logps[0].mean(), logps[1, 0]]))

    def test_batch_without_completion_tokens(self):
        model, batch = make_model("llama", VOCAB), make_batch(make_rows())
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        logps = score_completions(model, batch).per_token_logps
        assert (logps == 0).all()
        assert all((gradient == 0).all() for gradient in gradients(model, logps.sum()).values())


class TestSequenceScores:
    LOGPS = torch.tensor([[0.0, -1.0, -3.0, 0.0], [-2.0, -4.0, -6.0, -8.0], [0.0, 0.0, 0.0, -7.0]])
    MASK = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])

    def test_by_hand(self):
        assert sequence_scores(self.LOGPS, self.MASK, score="sum").tolist() == [-4.0, -20.0, 0.0]
        assert sequence_scores(self.LOGPS, self.MASK, score="mean").tolist() == [-2.0, -5.0, 0.0]

    def test_what_is_off_the_mask_does_not_matter(self):
        logps = self.LOGPS.masked_fill(~predicted_mask(self.MASK), torch.nan).requires_grad_()
        scores = sequence_scores(logps, self.MASK, score="mean")
        assert scores.tolist() == [-2.0, -5.0, 0.0]
        scores.sum().backward()
        assert logps.grad.tolist() == [[0.0, 0.5, 0.5, 0.0], [0.25] * 4, [0.0] * 4]

    def test_other_names_are_refused(self):
        with pytest.raises(ValueError, match="`score` must be 'mean' or 'sum', got 'max'"):
            sequence_scores(self.LOGPS, self.MASK, score="max")

    def test_predicted_mask(self):
        mask = predicted_mask(torch.tensor([[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]))
        assert mask.tolist() == [[False, True, True, False], [True, False, False, False]]


class TestToGroups:
    MASK = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])

    def test_layout(self):
        values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
        assert to_groups(values, self.MASK).tolist() == [[1, 2, 0], [3, 4, 5], [0, 6, 7]]
        assert to_groups(values.long(), self.MASK).dtype == torch.long

    def test_gradient(self):
        values = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        weights = torch.arange(9, dtype=torch.float64).view(3, 3)
        (to_groups(values, self.MASK) * weights).sum().backward()
        assert values.grad.tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_peak_memory_sees_an_allocation():
    """In a process of its own, whose peak is near."""
    script = (
        "import torch\nfrom accelerate import Accelerator\nfrom grkd_trl.trainers.metrics import peak_memory\n"
        "accelerator = Accelerator(cpu=True)\nprint(peak_memory(accelerator)['memory/peak_gib'])\n"
        "torch.ones(2**27).sum()\nprint(peak_memory(accelerator)['memory/peak_gib'])\n"  # half a GiB
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    before, after = map(float, run.stdout.split())
    assert 0.4 < after - before < 0.6
