"""Soft labels across tokenizers: where both have read the same text, tokens by their strings and the rest by sorted mass."""

import pytest
import reference_step
import torch
from aligned_runs import BYTES, GIVEN, make_teacher, slow_step, spaced
from datasets import Dataset
from pretrained import GEMMA3, SMOLLM2, needs
from runs import VOCAB, logged, make_rows, make_student, make_trainer, shown_rows, to_ids, train
from test_teacher_prompt import relative_error
from tiny import use_tiles
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.teacher import CallableScorer, LocalTeacher
from grkd_trl.teacher.alignment import shared_tokens


@pytest.fixture
def folder(tmp_path):
    """A teacher of bytes, with its tokenizer."""
    make_teacher().save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


class TestWholeStep:
    STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **GIVEN}

    def compare(self, trainer, gradients, student, loss, losses):
        names, parameters = zip(*student.named_parameters(), strict=True)
        expected = torch.autograd.grad(loss, parameters)
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
        assert max(relative_error(gradients[name], own) for name, own in zip(names, expected, strict=True)) < 1e-5
        ratio = sum(own.item() > 0 for own in losses) / len(losses)
        assert 0.5 < ratio < 1
        assert logged(trainer, "completions/aligned_ratio") == [pytest.approx(ratio)]

    @pytest.mark.parametrize(
        "sharing, fields", [("on", {}), ("off", {}), ("on", {"max_length": 7}), ("off", {"tiles": 1})], ids=str
    )
    def test_kd(self, tmp_path, folder, monkeypatch, sharing, fields):
        if "tiles" in fields:
            use_tiles(monkeypatch.setattr, 100)
        fields = {name: value for name, value in fields.items() if name != "tiles"}
        rows, student, teacher = spaced(shown_rows()), make_student(), make_teacher().float()
        losses, _ = slow_step(student, teacher, rows, temperature=2.0, **fields)
        given = {
            "method": "KD",
            "divergence": "aligned",
            "temperature": 2.0,
            "prompt_sharing": sharing,
            **fields,
            **self.STEP,
        }
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=folder, **given)
        self.compare(trainer, gradients, student, sum(losses) / len(losses), losses)

    @pytest.mark.parametrize("sharing", ["on", pytest.param("off", marks=pytest.mark.slow)])
    def test_grkd(self, tmp_path, folder, sharing):
        rows, student, teacher = spaced(make_rows(scores=False)), make_student(), make_teacher().float()
        losses, scores = slow_step(student, teacher, rows)
        relative = [reference_step.pairwise(*both, None, reference_step.Options(vocab_size=VOCAB)) for both in scores]
        loss = 0.7 * sum(losses) / len(losses) + 0.3 * sum(relative) / len(relative)
        given = {"soft_label": "aligned", "prompt_sharing": sharing, "alpha_start": 0.3, **self.STEP}
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=folder, **given)
        self.compare(trainer, gradients, student, loss, losses)

    def test_evaluation(self, tmp_path, folder):
        rows = spaced(make_rows(5, scores=False))
        given = {"method": "KD", "divergence": "aligned", "per_device_eval_batch_size": 2, **GIVEN}
        trainer = make_trainer(tmp_path, rows, teacher_model=folder, eval_dataset=Dataset.from_list(rows), **given)
        losses, _ = slow_step(make_student(), make_teacher().float(), rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-5)


class TestRefusals:
    ROWS = make_rows(scores=False)

    @pytest.mark.parametrize(
        "fields, match",
        [
            ({"relative_level": "tokens"}, "ranks tokens that student and teacher share"),
            ({"min_aligned": 0.0}, "`min_aligned` is a share"),
            ({"min_aligned": 0.4, "soft_label": "token"}, "is for soft labels across tokenizers"),
        ],
    )
    def test_settings(self, tmp_path, fields, match):
        with pytest.raises(ValueError, match=match):
            make_trainer(tmp_path, self.ROWS, **{"soft_label": "aligned"} | fields)

    @pytest.mark.parametrize(
        "method, fields", [("GRKD", {"soft_label": "aligned"}), ("KD", {"divergence": "aligned"})]
    )
    def test_a_teacher_that_is_no_model(self, tmp_path, method, fields):
        teachers = [LocalTeacher(make_teacher(), BYTES), CallableScorer(lambda prompts, completions, **_: [])]
        for teacher in (teachers[0], teachers):
            with pytest.raises(ValueError, match="needs a teacher's logits"):
                make_trainer(tmp_path, self.ROWS, method=method, teacher_model=teacher, **fields)

    def test_too_few_positions(self, tmp_path, folder):
        """The words of the student end where no byte of the teacher's text does: a prompt without its space."""
        rows = [{"prompt": "a ", "completions": ["b c d", "p  p  p  p"]}]
        with pytest.raises(
            ValueError, match=r"at 6\d\.\d% of the tokens of the train completions, below `min_aligned=0.9`"
        ):
            make_trainer(tmp_path, rows, teacher_model=folder, soft_label="aligned", min_aligned=0.9)

    def test_a_row_that_does_not_fit(self, tmp_path):
        make_teacher(max_position_embeddings=20).save_pretrained(tmp_path / "t")
        BYTES.save_pretrained(tmp_path / "t")
        rows = [*self.ROWS, {"prompt": "a " * 20, "completions": ["b", "c"]}]
        with pytest.raises(ValueError, match="Row [0-4] has .* of the teacher's tokens, and its context holds 20"):
            make_trainer(tmp_path, rows, teacher_model=str(tmp_path / "t"), soft_label="aligned")

    @pytest.mark.parametrize("streams", [False, True])
    def test_token_ids_alone(self, tmp_path, folder, streams):
        dataset = Dataset.from_list([to_ids(row) for row in self.ROWS])
        dataset = dataset.to_iterable_dataset() if streams else dataset
        with pytest.raises(ValueError, match="give the text"):
            make_trainer(tmp_path, train_dataset=dataset, teacher_model=folder, soft_label="aligned", max_steps=1)

    def test_a_teacher_without_a_tokenizer(self, tmp_path):
        with pytest.raises((OSError, ValueError)):
            make_trainer(tmp_path, self.ROWS, teacher_model=make_teacher(), soft_label="aligned")


@pytest.mark.parametrize("sharing", ["off", "on"])
class TestRealPair:
    """Gemma 3 teaches SmolLM2."""

    pytestmark = needs(SMOLLM2, GEMMA3)
    ROWS = [
        {"prompt": "Question: What is 17 + 25?\nAnswer:", "completions": [" 17 + 25 = 42.", " It's 32, I think..."]},
        {
            "prompt": "The capital of France",
            "completions": [" is Paris, on the Seine.", " was moved to Bordeaux in 1914."],
        },
    ]

    def test_loss_and_gradients(self, tmp_path, sharing):
        folders = SMOLLM2, GEMMA3
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders
        )
        pairs = torch.tensor(shared_tokens(*tokenizers))
        losses, num_tokens = [], 0
        for row in self.ROWS:
            for text in row["completions"]:
                read = []
                for own, model in zip(tokenizers, (student, teacher), strict=True):
                    given = own(row["prompt"] + text + own.eos_token, return_offsets_mapping=True)
                    chances = model(torch.tensor([given["input_ids"]])).logits[0].softmax(-1)
                    starts = [start for start, _ in given["offset_mapping"]]
                    first = starts.index(len(row["prompt"]))
                    read.append({start: chances[at - 1] for at, start in enumerate(starts) if at >= first})
                num_tokens += len(read[0])
                for start in sorted(read[0].keys() & read[1].keys()):
                    both = read[0][start], read[1][start].detach()
                    rest = [
                        chances[torch.isin(torch.arange(len(chances)), ids, invert=True)].sort(descending=True).values
                        for chances, ids in zip(both, pairs, strict=True)
                    ]
                    size = max(map(len, rest))
                    rest = [torch.nn.functional.pad(values, (0, size - len(values))) for values in rest]
                    shared = (both[0][pairs[0]] - both[1][pairs[1]]).abs().sum()
                    losses.append(shared + (rest[0] - rest[1]).abs().sum())
        loss = sum(losses) / num_tokens
        norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(student.parameters()))]).norm().item()
        trainer, _ = train(
            tmp_path,
            self.ROWS,
            method="KD",
            model=str(SMOLLM2),
            teacher_model=str(GEMMA3),
            processing_class=tokenizers[0],
            divergence="aligned",
            prompt_sharing=sharing,
            learning_rate=1e-6,
        )
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-4)]
        assert logged(trainer, "grad_norm") == [pytest.approx(norm, rel=1e-3)]
        assert logged(trainer, "completions/aligned_ratio") == [pytest.approx(len(losses) / num_tokens)]
        assert len(losses) / num_tokens > 0.6
