"""MiniLLM's own parts: what it samples, what it computes of that, and that the reverse KL falls."""

import itertools
import math
from contextlib import nullcontext

import pytest
import reference
import torch
from datasets import Dataset
from runs import TOKENIZER, VOCAB, Recorder, logged, make_rows, make_student, make_teacher, make_trainer, weights
from test_scoring import LargestTensor
from tiny import use_tiles

from grkd_trl.teacher import mixture as mixture_module
from grkd_trl.teacher import sample_from_mixture


EOS, SHARE = TOKENIZER.eos_token_id, 0.2
TEXTS = [" ".join("abcdefghijklmnop"[i : i + 4]) for i in range(12)]


def next_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)


def mixture(student, teacher, ids, share=SHARE):
    return share * next_probabilities(teacher, ids) + (1 - share) * next_probabilities(student, ids)


def sample(student, teacher, prompts, **kwargs):
    width = max(map(len, prompts))
    options = {"teacher_share": SHARE, "max_new_tokens": 6, "eos_token_ids": [EOS], "vocab_size": VOCAB}
    options["numbers"] = torch.rand(len(prompts), kwargs.get("max_new_tokens", 6), dtype=torch.float64)
    return sample_from_mixture(
        student,
        lambda: nullcontext(teacher),
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        **options | kwargs,
    )


@pytest.fixture(scope="module")
def models():
    return make_student(), make_teacher().eval()


class TestSampling:
    PROMPTS = [[4], [5, 6, 7], [8, 9], [4, 5, 6, 7, 8, 9]]

    @pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
    def test_each_draw_is_from_the_mixture(self, monkeypatch, architecture, share):
        """What is drawn from, step by step against keys and values, is what whole forwards of each row alone give."""
        # In float64 the attention of Gemma-2 masks by a number that is infinite in the float32 of its softmax
        student, teacher = make_student(architecture, dtype=torch.float32), make_teacher().eval()
        drawn, draw = [], mixture_module.draw_tokens
        monkeypatch.setattr(mixture_module, "draw_tokens", lambda p, numbers: drawn.append(p) or draw(p, numbers))
        torch.manual_seed(0)
        written = sample(student.train(), teacher, self.PROMPTS, teacher_share=share)
        assert student.training
        student.eval()
        for row, (prompt, completion) in enumerate(zip(self.PROMPTS, written, strict=True)):
            for step in range(len(completion)):
                expected = mixture(student, teacher, prompt + completion[:step], share)
                torch.testing.assert_close(drawn[step][row].double(), expected.double(), rtol=1e-4, atol=1e-6)
        assert max(map(len, written)) > 2

    def test_frequencies(self, models):
        """Of completions of two tokens, in 20000 draws."""
        student, teacher = models
        torch.manual_seed(1)
        written = sample(student, teacher, [[4, 5]] * 20000, max_new_tokens=2)
        student.eval()
        chances, first = {}, mixture(student, teacher, [4, 5])
        for token in range(VOCAB):
            if token == EOS:
                chances[token,] = first[token].item()
                continue
            second = mixture(student, teacher, [4, 5, token])
            chances |= {(token, other): (first[token] * second[other]).item() for other in range(VOCAB)}
        student.train()
        assert sum(chances.values()) == pytest.approx(1)
        counts = dict.fromkeys(chances, 0)
        for completion in written:
            counts[tuple(completion)] += 1
        likely = [key for key, chance in chances.items() if chance > 0.001]
        surprises = [
            (counts[key] - 20000 * chances[key]) / math.sqrt(20000 * chances[key] * (1 - chances[key]))
            for key in likely
        ]
        assert max(map(abs, surprises)) < 4.5
        assert sum(surprise**2 for surprise in surprises) / len(likely) < 1.5

    def test_ends(self, models):
        written = sample(*models, [[4]] * 64, max_new_tokens=5, eos_token_ids=[EOS, 7])
        assert any(completion[-1] in (EOS, 7) for completion in written)
        for completion in written:
            assert not {EOS, 7} & set(completion[:-1]) and len(completion) <= 5
            assert completion[-1] in (EOS, 7) or len(completion) == 5

    def test_no_token_beyond_the_shared_vocabulary(self):
        student, teacher = make_student(vocab_size=VOCAB + 7), make_teacher(vocab_size=VOCAB + 3)
        written = sample(student, teacher, [[4]] * 200)
        assert max(token for completion in written for token in completion) < VOCAB

    def test_teacher_is_not_asked_without_a_share(self, models):
        assert sample(models[0], None, [[4]], teacher_share=0.0)


# The step


def slow_step(student, teacher, rows, texts, args):
    """The loss on given samples, one completion and token at a time."""
    long_term, single_step, text_losses = [], [], []
    for prompt, completion in rows:
        ids = prompt + completion
        logits, teacher_logits = (model(input_ids=torch.tensor([ids])).logits[0] for model in (student, teacher))
        places = range(len(prompt) - 1, len(ids) - 1)
        logps = [(logits[t] - torch.logsumexp(logits[t], 0))[ids[t + 1]] for t in places]
        teacher_logps = [
            (teacher_logits[t] - torch.logsumexp(teacher_logits[t], 0))[ids[t + 1]].detach() for t in places
        ]
        rewards = [t.item() - s.item() for s, t in zip(logps, teacher_logps, strict=True)]
        returns = reference.minillm_returns(rewards, args.gamma, args.length_norm)
        returns = [*returns[1:], 0.0] if args.return_from == "next" else returns
        for s, t, advantage in zip(logps, teacher_logps, returns, strict=True):
            mixed = args.teacher_share * math.exp(t.item()) + (1 - args.teacher_share) * math.exp(s.item())
            weight = torch.exp(s) / mixed
            bounded = weight.clamp(1 - args.clip_range, 1 + args.clip_range)
            long_term.append(torch.maximum(-advantage * weight, -advantage * bounded))
        for t in places:
            p = torch.exp(logits[t] - torch.logsumexp(logits[t], 0))
            q = torch.exp(teacher_logits[t] - torch.logsumexp(teacher_logits[t], 0)).detach()
            single_step.append(sum(p[v] * torch.log(p[v] / q[v]) for v in range(VOCAB)))
    for ids in texts:
        logits = student(input_ids=torch.tensor([ids])).logits[0]
        text_losses += [torch.logsumexp(logits[t], 0) - logits[t][ids[t + 1]] for t in range(len(ids) - 1)]
    loss = sum(long_term) / len(long_term) + args.single_step * sum(single_step) / len(single_step)
    if text_losses:
        loss = loss + args.text_weight * sum(text_losses) / len(text_losses)
    return loss


def samples_of(batches):
    """Prompts and completions of batches, and their rows of text."""
    rows, texts = [], []
    for batch in batches:
        for index, (ids, attended, mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
        ):
            ids, mask = ids[attended.bool()].tolist(), mask[attended.bool()].tolist()
            start = mask.index(1)
            if index < len(batch["group_mask"]):
                rows.append((ids[:start], ids[start:]))
            else:
                texts.append(ids)
    return rows, texts


def run(folder, **kwargs):
    """Train, and give the trainer, the gradients and the samples of its steps."""
    recorder, steps = Recorder(), []
    trainer = make_trainer(folder, method="MiniLLM", **kwargs)
    trainer.add_callback(recorder)
    get_batch_samples = trainer.get_batch_samples

    def record(*args):
        batches, counts = get_batch_samples(*args)
        steps.append(samples_of(batches))
        return batches, counts

    trainer.get_batch_samples = record
    trainer.train()
    return trainer, recorder.gradients, steps


class TestWholeStep:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"text_dataset": Dataset.from_dict({"text": TEXTS}), "text_weight": 0.7},
            {"return_from": "next"},
            {"gamma": 0.8, "length_norm": False, "clip_range": 0.05},
            {"teacher_share": 0.0},
            {"teacher_share": 0.9, "single_step": False},
        ],
        ids=lambda fields: " ".join(fields) or "defaults",
    )
    @pytest.mark.parametrize("rows_per_tile", [None, 3])
    def test_loss_and_every_gradient(self, tmp_path, monkeypatch, fields, rows_per_tile):
        if rows_per_tile is not None:
            use_tiles(monkeypatch.setattr, rows_per_tile * VOCAB)
        split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer, (gradients,), [(rows, texts)] = run(tmp_path, **split, **fields)
        assert len(rows) == 4 and len(texts) == (4 if "text_dataset" in fields else 0)
        student = make_student()
        loss = slow_step(student, make_teacher(), rows, texts, trainer.args)
        loss.backward()
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-6)]
        for name, parameter in student.named_parameters():
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-6, name
        clipped = logged(trainer, "importance/clipped_ratio")[0]
        assert (clipped > 0) == (trainer.args.teacher_share > 0)

    def test_logits_never_exist_at_once(self, tmp_path, monkeypatch):
        vocab = 5003
        use_tiles(monkeypatch.setattr, 2 * vocab)
        models = {"model": make_student(vocab_size=vocab), "teacher_model": make_teacher(vocab_size=vocab)}
        trainer = make_trainer(tmp_path, make_rows(12), method="MiniLLM", per_device_train_batch_size=12, **models)
        (batch,), counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        assert batch["completion_mask"].sum() > trainer.model.config.hidden_size
        with LargestTensor() as largest:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).backward()
        assert largest.numel == trainer.model.lm_head.weight.numel()  # above 2 rows of logits, below all

    def test_splitting_the_batch_changes_nothing(self, tmp_path):
        """The samples of a batch, as one micro-batch or as four."""
        trainer = make_trainer(tmp_path, method="MiniLLM")
        (batch,), counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        whole = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
        parts = [
            trainer.compute_loss(
                trainer.model, {name: value[row : row + 1] for name, value in batch.items()}, num_items_in_batch=counts
            )
            for row in range(4)
        ]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-9)
        assert counts.tolist() == [4, int(batch["completion_mask"].sum()), 0, 1]

    @pytest.mark.parametrize("batch, accumulation", [(4, 1), (1, 4)])
    def test_text_is_read_on_whatever_the_split(self, tmp_path, batch, accumulation):
        texts = Dataset.from_dict({"text": TEXTS})
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer, _, steps = run(tmp_path, rows=make_rows(12), text_dataset=texts, **split)
        read = [TOKENIZER.decode(ids) for _, rows in steps for ids in rows]
        assert sorted(read) == sorted(text + " <eos>" for text in TEXTS)  # each once in three steps of four
        shuffled = [TOKENIZER.decode(ids) for ids in trainer.rollouts.text_ids]
        assert read == shuffled

    def test_importance_weights_average_to_one(self, tmp_path):
        """Under the distribution that was sampled from: it is the one that the step takes it for."""
        trainer, _, _ = run(tmp_path, rows=make_rows(1) * 600, per_device_train_batch_size=600, learning_rate=0.0)
        assert logged(trainer, "importance/mean")[0] == pytest.approx(1, abs=0.06)

    def test_identical_models_are_at_the_minimum(self, tmp_path):
        trainer, (gradients,), _ = run(tmp_path, teacher_model=make_student())
        assert logged(trainer, "loss") == [pytest.approx(0, abs=1e-9)]
        assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-9

    def test_completions_of_the_dataset_are_not_read(self, tmp_path):
        prompts = [{"prompt": row["prompt"]} for row in make_rows()]
        losses = []
        for rows in (make_rows(), prompts):
            losses.append(logged(run(tmp_path, rows=rows)[0], "loss"))
        assert losses[0] == losses[1]

    def test_teacher_may_be_the_base_of_the_adapters(self, tmp_path):
        from peft import LoraConfig

        model, before = make_student(), weights(make_student())
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        trainer, (gradients,), _ = run(tmp_path, model=model, teacher_model=model, peft_config=lora)
        assert trainer.teacher_model is trainer.model
        assert logged(trainer, "loss/single_step")[0] > 1e-4 and gradients
        with trainer.teaching(trainer.model) as teacher:
            again = teacher(input_ids=torch.tensor([[4, 5]])).logits
        torch.testing.assert_close(again, make_student()(input_ids=torch.tensor([[4, 5]])).logits)
        assert before


class TestLearning:
    def test_exact_reverse_kl_falls(self, tmp_path):
        """Of completions of at most two tokens, all of which are summed over."""
        prompt, length = TOKENIZER("a b")["input_ids"], 2
        student, teacher = make_student(initializer_range=0.1), make_teacher(initializer_range=0.2)
        strings = [[EOS], *([i, j] for i, j in itertools.product(range(VOCAB), repeat=2) if i != EOS)]
        ids = torch.tensor([prompt + string + [0] * (length - len(string)) for string in strings])
        mask = torch.tensor([[1] * len(string) + [0] * (length - len(string)) for string in strings])

        @torch.no_grad()
        def exact():
            logps = []
            for model in (student, teacher):
                logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
                logps.append((logits.gather(-1, ids[:, len(prompt) :, None]).squeeze(-1) * mask).sum(-1))
            assert logps[0].exp().sum().item() == pytest.approx(1)
            return (logps[0].exp() * (logps[0] - logps[1])).sum().item()

        start = exact()
        rows = [{"prompt": "a b"}] * 64
        fields = {"max_completion_length": length, "per_device_train_batch_size": 64, "learning_rate": 5e-3}
        run(tmp_path, rows=rows, model=student, teacher_model=teacher, max_steps=40, logging_steps=10, **fields)
        assert start > 0.1 and exact() < 0.1 * start


class TestErrors:
    def test_no_teacher(self, tmp_path):
        with pytest.raises(ValueError, match="`MiniLLMTrainer` learns from its.*`SeqKDTrainer` completions"):
            make_trainer(tmp_path, method="MiniLLM", teacher_model=None)

    def test_across_tokenizers(self, tmp_path):
        with pytest.raises(ValueError, match="cannot read the student's tokens"):
            make_trainer(tmp_path, method="MiniLLM", teacher_model=make_teacher(vocab_size=VOCAB - 1))

    def test_text_without_text(self, tmp_path):
        with pytest.raises(ValueError, match=r"`text_dataset` has the columns \['words'\], and needs `text`"):
            make_trainer(tmp_path, method="MiniLLM", text_dataset=Dataset.from_dict({"words": TEXTS}))

    def test_no_room(self, tmp_path):
        with pytest.raises(ValueError, match="`max_length=5` leaves no prompt beside `max_completion_length=5`"):
            make_trainer(tmp_path, method="MiniLLM", max_length=5)
        with pytest.raises(
            ValueError, match="1 of 1 train prompts leave no room for `max_completion_length=5`.*Raise"
        ):
            make_trainer(tmp_path, [{"prompt": "a b c d e"}], method="MiniLLM", max_length=6)

    def test_no_prompt(self, tmp_path):
        with pytest.raises(ValueError, match="`prompt` of row 1 is ''"):
            make_trainer(tmp_path, [{"prompt": "a"}, {"prompt": ""}], method="MiniLLM")
