"""Soft labels across tokenizers of groups that are not known before training: from a stream, or written online."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference_step
import torch
from aligned_runs import BYTES, GIVEN, make_teacher, slow_step, spaced
from datasets import Dataset
from runs import TOKENIZER, VOCAB, Recorder, logged, make_rows, make_student, make_trainer, shown_rows, train, weights
from test_teacher_prompt import relative_error

from grkd_trl.data import tokenizer_hash
from grkd_trl.generation.online import OnlineGroups
from grkd_trl.teacher import Completions


STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **GIVEN}
ONLINE = {"soft_label": "aligned", "num_completions": 3, "max_completion_length": 6, "min_aligned": 0.05}
PROMPTS = ["a b ", "c ", "d e f ", "b a "]

# A step on two processes of which the second writes what the teacher cannot read.
WORKER = """
import os
from pathlib import Path

from runs import end_process
from test_aligned_online import TestOnline

long = "a b c d e f g h i j k" if os.environ["RANK"] == "1" else "c"
write = lambda prompts, **_: [["a", "b", long]] * len(prompts)
fields = {"gradient_accumulation_steps": 1, "completion_source": "student", "completion_fn": write}
trainer = TestOnline().make("out", "t", **fields)
try:
    trainer.train()
except ValueError as error:
    Path(f"said{os.environ['RANK']}").write_text(str(error))
end_process()
"""


@pytest.fixture
def folder(tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture
def made(monkeypatch):
    """Groups that are written online, with their text and the student's tokens."""
    groups, write, make = [], OnlineGroups._write, OnlineGroups._make

    def recorded_write(self, *args):
        groups.append(write(self, *args))
        return groups[-1]

    def recorded_make(self, *args):
        parts = list(make(self, *args))
        groups[-1] = [
            {name: group[name] for name in ("prompt", "teacher_prompt", "completions", "clipped") if name in group}
            | {"completion_ids": own["completion_ids"]}
            for group, own in zip(groups[-1], sum(parts, []), strict=True)
        ]
        return iter(parts)

    monkeypatch.setattr(OnlineGroups, "_write", recorded_write)
    monkeypatch.setattr(OnlineGroups, "_make", recorded_make)
    return groups


def assert_step(trainer, gradients, student, rows, *, alpha=0.3, temperature=1.0):
    """The first step is the slow one; `alpha` of it is the ranking of these rows."""
    losses, scores = slow_step(student, make_teacher().float(), rows, temperature=temperature)
    loss = sum(losses) / len(losses)
    if alpha:
        relative = [reference_step.pairwise(*both, None, reference_step.Options(vocab_size=VOCAB)) for both in scores]
        loss = (1 - alpha) * loss + alpha * sum(relative) / len(relative)
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-5)
    assert max(relative_error(gradients[name], own) for name, own in zip(names, expected, strict=True)) < 1e-5
    ratio = sum(own.item() > 0 for own in losses) / len(losses)
    assert logged(trainer, "completions/aligned_ratio")[0] == pytest.approx(ratio)
    return ratio


class TestOnline:
    def make(self, folder, teacher, rows=None, **kwargs):
        dataset = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS] if rows is None else rows)
        given = {"alpha_start": 0.3, **STEP, **ONLINE, **kwargs}
        return make_trainer(folder, train_dataset=dataset, teacher_model=teacher, **given)

    @pytest.mark.parametrize(
        "source, fields",
        [
            ("student", {"prompt_sharing": "on"}),
            ("mixed", {"prompt_sharing": "off"}),
            pytest.param("teacher", {"prompt_sharing": "on"}, marks=pytest.mark.slow),
            pytest.param("student", {"prompt_sharing": "off"}, marks=pytest.mark.slow),
        ],
    )
    def test_whole_step(self, tmp_path, folder, made, source, fields):
        """Whoever writes, with its own tokenizer: both models score what stands there."""
        trainer, recorder = self.make(tmp_path, folder, completion_source=source, **fields), Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        (rows,) = made
        assert len(rows) == 4 and all(len(row["completions"]) == 3 for row in rows)
        texts = [text for row in rows for text in row["completions"]]
        if source != "student":  # bytes that no word of the student's is
            assert any(set(text) - set("abcdefghijklmnop ") for text in texts)
        assert_step(trainer, recorder.gradients[0], make_student(), rows)

    def test_a_teacher_that_sees_more(self, tmp_path, folder, made):
        rows = [{"prompt": prompt, "teacher_prompt": f"h {prompt}"} for prompt in PROMPTS]
        rows[1]["teacher_prompt"] = None
        trainer, recorder = self.make(tmp_path, folder, rows, completion_source="student"), Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        assert {row["teacher_prompt"] for row in made[0]} == {row["teacher_prompt"] for row in rows}
        assert_step(trainer, recorder.gradients[0], make_student(), made[0])

    @pytest.mark.parametrize("own, expected", [(TOKENIZER, [[0], [5, 6, 1], [1]]), (BYTES, [[1], [5, 6, 1], [1]])])
    def test_completions_without_text(self, tmp_path, folder, made, own, expected):
        """One was cut after a special token: the student scores the tokens of its own tokenizer, else the end."""
        words = own("b c")["input_ids"] + [own.eos_token_id]
        written = (["", "b c", ""], [True, False, False], [[own.pad_token_id], words, [own.eos_token_id]])

        def write(prompts, **_):
            prompt_ids = [own(prompt)["input_ids"] for prompt in prompts]
            return Completions(*([part] * len(prompts) for part in written), prompt_ids, tokenizer_hash(own))

        trainer = self.make(tmp_path, folder, completion_source="student", completion_fn=write)
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        assert [row["completion_ids"] for row in made[0]] == [expected] * 4
        assert assert_step(trainer, recorder.gradients[0], make_student(), made[0]) == 1.0

    def test_groups_of_several_steps(self, tmp_path, folder, made):
        """Made at once, and trained on twice; each step has its own share."""
        fields = {"generate_every": 2, "reuse_groups": 2, "max_steps": 4, "learning_rate": 0.0}
        trainer = self.make(
            tmp_path, folder, completion_source="student", **{**fields, "gradient_accumulation_steps": 1}
        )
        trainer.train()
        losses, ratios = logged(trainer, "loss/soft"), logged(trainer, "completions/aligned_ratio")
        assert len(made) == 1
        assert losses[:2] == pytest.approx(losses[2:]) and losses[0] != losses[1]
        for step, rows in enumerate((made[0][:2], made[0][2:])):
            soft, _ = slow_step(make_student(), make_teacher().float(), rows)
            assert losses[step] == pytest.approx((sum(soft) / len(soft)).item(), rel=1e-5)
            assert ratios[step] == pytest.approx(sum(own.item() > 0 for own in soft) / len(soft))

    @pytest.mark.slow
    def test_resumed_is_uninterrupted(self, tmp_path, folder):
        given = {"completion_source": "mixed", "max_steps": 4}
        whole = self.make(tmp_path / "whole", folder, save_strategy="steps", save_steps=2, **given)
        whole.train()
        resumed = self.make(tmp_path / "resumed", folder, **given)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
        ours, expected = weights(resumed.model), weights(whole.model)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert logged(resumed, "loss") == logged(whole, "loss")

    def test_evaluation(self, tmp_path, folder, made):
        evaluated = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:3]])
        trainer = self.make(tmp_path, folder, completion_source="student", eval_dataset=evaluated)
        metrics = trainer.evaluate()
        losses, _ = slow_step(make_student(), make_teacher().float(), sum(made, []))
        assert metrics["eval_loss/soft"] == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-5)

    def test_a_prompt_that_leaves_no_room(self, tmp_path):
        make_teacher(max_position_embeddings=20).save_pretrained(tmp_path / "t")
        BYTES.save_pretrained(tmp_path / "t")
        rows = [{"prompt": "a "}, {"prompt": "a b c d e f g h "}]
        match = "prompt of row 1 has 16 of the teacher's tokens and leaves no room for `max_completion_length=6`"
        with pytest.raises(ValueError, match=match):
            self.make(tmp_path, str(tmp_path / "t"), rows, completion_source="student")
        with pytest.raises(ValueError, match="has 1[0-9] of the teacher's tokens"):
            longer = [{"prompt": "a ", "teacher_prompt": "a b c d e f g h "}]
            self.make(tmp_path, str(tmp_path / "t"), longer, completion_source="student")

    def test_a_group_that_does_not_fit(self, tmp_path):
        """The completion has more of the teacher's tokens than of its writer's."""
        make_teacher(max_position_embeddings=20).save_pretrained(tmp_path / "t")
        BYTES.save_pretrained(tmp_path / "t")
        trainer = self.make(
            tmp_path, str(tmp_path / "t"), completion_source="student",
            completion_fn=lambda prompts, **_: [["a", "b", "a b c d e f g h i j k"]] * len(prompts),
        )  # fmt: skip
        with pytest.raises(ValueError, match="of the teacher's tokens, and its context holds 20.*its prompt is"):
            trainer.train()

    @pytest.mark.slow
    @pytest.mark.distributed
    def test_a_group_of_one_process_that_does_not_fit(self, tmp_path):
        """Both raise the same; the other would wait for it forever."""
        make_teacher(max_position_embeddings=20).save_pretrained(tmp_path / "t")
        BYTES.save_pretrained(tmp_path / "t")
        (tmp_path / "worker.py").write_text(WORKER)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        here = Path(__file__).resolve().parent
        path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        subprocess.run([*start, str(tmp_path / "worker.py")], cwd=tmp_path, env=environment, check=True, timeout=240)
        said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
        assert said[0] == said[1] and said[0].startswith("Process 1: Row 0 has ")

    def test_too_few_positions(self, tmp_path, folder):
        words = iter([["a b", "c", "d"]] * 4 + [["p  p  p  p  p", "p  p  p  p", "p  p  p  p"]] * 4)
        trainer = self.make(
            tmp_path, folder, completion_source="student", min_aligned=0.6, max_steps=2,
            completion_fn=lambda prompts, **_: [next(words) for _ in prompts],
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"at \d+\.\d% of the tokens of the completions of step 2, below `min_al"):
            trainer.train()


class TestStream:
    @pytest.mark.parametrize(
        "method, fields",
        [
            ("KD", {"divergence": "aligned", "temperature": 2.0, "prompt_sharing": "on"}),
            pytest.param(
                "GRKD", {"soft_label": "aligned", "alpha_start": 0.3, "prompt_sharing": "off"}, marks=pytest.mark.slow
            ),
        ],
    )
    def test_whole_step(self, tmp_path, folder, method, fields):
        rows = spaced(shown_rows())
        stream = Dataset.from_list(rows).to_iterable_dataset()
        given = {"method": method, "train_dataset": stream, "teacher_model": folder, "max_steps": 1}
        trainer, (gradients,) = train(tmp_path, **given, **fields, **STEP)
        kd = method == "KD"
        assert_step(trainer, gradients, make_student(), rows, alpha=0 if kd else 0.3, temperature=2.0 if kd else 1.0)

    @pytest.mark.slow
    def test_resumed_is_uninterrupted(self, tmp_path, folder):
        def make(folder_of_run, **fields):
            stream = Dataset.from_list(spaced(make_rows(7, scores=False))).to_iterable_dataset()
            given = {"method": "KD", "divergence": "aligned", "max_steps": 4, **STEP, "min_aligned": 0.3}
            return make_trainer(
                folder_of_run, train_dataset=stream, teacher_model=folder, shuffle_dataset=True, **given, **fields
            )

        whole = make(tmp_path / "whole", save_strategy="steps", save_steps=2)
        whole.train()
        resumed = make(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
        assert logged(resumed, "loss") == logged(whole, "loss")

    ALIGNED = [{"prompt": "a ", "completions": ["b c d", "c"]}] * 4
    APART = [{"prompt": "a ", "completions": ["p  p  p  p  p", "p  p  p  p"]}] * 4

    def test_too_few_positions(self, tmp_path, folder):
        stream = Dataset.from_list(self.ALIGNED + self.APART).to_iterable_dataset()
        given = {"method": "KD", "divergence": "aligned", **STEP, "max_steps": 2, "min_aligned": 0.6}
        trainer = make_trainer(tmp_path, train_dataset=stream, teacher_model=folder, **given)
        match = (
            r"at \d+\.\d% of the tokens of the completions of step 2 \(rows 4, 5, 6, 7 of the stream\), below `min_al"
        )
        with pytest.raises(ValueError, match=match):
            trainer.train()
        assert trainer.state.global_step == 1

    def test_an_evaluation_is_checked(self, tmp_path, folder):
        streams = [Dataset.from_list(rows).to_iterable_dataset() for rows in (self.ALIGNED, self.APART)]
        given = {"method": "KD", "divergence": "aligned", **STEP, "max_steps": 1, "min_aligned": 0.6}
        trainer = make_trainer(
            tmp_path, train_dataset=streams[0], eval_dataset=streams[1], teacher_model=folder, **given
        )
        with pytest.raises(ValueError, match="of the tokens of the eval completions, below `min_aligned=0.6`"):
            trainer.evaluate()
        assert math.isfinite(trainer.evaluate(streams[0])["eval_loss"])
