"""Labels of a served teacher that are asked for while earlier steps train: the same numbers, errors in time, a clean end."""

import random
import threading
import time

import pytest
import torch
from online_runs import logged, make_model, make_trainer, record_groups
from runs import TOKENIZER
from teacher_server import serve
from transformers import TrainerCallback

from grkd_trl.teacher import CallableScorer, ServerTeacher, TeacherEnsemble, TeacherError


@pytest.fixture(scope="module")
def running():
    with serve(make_model(1), TOKENIZER) as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def make_teacher(server, **kwargs):
    return ServerTeacher(server.url, "tiny", TOKENIZER, **{"max_retries": 0, "max_concurrency": 4} | kwargs)


def lengths(prompts, completions, **columns):
    return [[float(len(text)) if position else None for position, text in enumerate(group)] for group in completions]


def make_run(folder, teacher, *, ahead=True, **kwargs):
    fields = {"generate_every": 3, "soft_label": "token", "soft_label_top_k": 4, "alpha_start": 0.3}
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    trainer = make_trainer(folder, teacher=teacher, **fields | kwargs)
    assert trainer.online._ahead is not None
    if not ahead:
        trainer.online._ahead = None
    return trainer


class AtStep(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def label_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("labels")]


class TestSameNumbers:
    @pytest.mark.parametrize(
        "kind",
        [
            "labels",
            "a function scores",
            pytest.param("scores", marks=pytest.mark.slow),
            pytest.param("several", marks=pytest.mark.slow),
            pytest.param("reused", marks=pytest.mark.slow),
            pytest.param("a function in a thread", marks=pytest.mark.slow),
        ],
    )
    def test_whatever_arrives_first(self, tmp_path, server, kind):
        draw, runs = random.Random(0), []
        fields = {
            "scores": {"soft_label": "group"},
            "reused": {"reuse_groups": 2, "max_steps": 12},
            "a function scores": {"score_fn": lengths},
            "a function in a thread": {"score_fn": CallableScorer(lengths, in_background=True), "soft_label": "none"},
        }.get(kind, {})
        for ahead in (True, False):
            server.reset(*[lambda answer: time.sleep(draw.random() / 50)] * (10**3 if ahead else 0))
            teacher = make_teacher(server)
            if kind == "several":
                teacher = TeacherEnsemble({"a": teacher, "b": make_teacher(server)}, weights={"a": 0.75, "b": 0.25})
            trainer = make_run(tmp_path, None if kind.endswith("thread") else teacher, ahead=ahead, **fields)
            seen = record_groups(trainer)
            trainer.train()
            runs.append((seen, logged(trainer, "loss"), logged(trainer, "rank/accuracy"), trainer.model))
            assert not label_threads()
        assert runs[0][:3] == runs[1][:3] and len(runs[0][1]) == trainer.args.max_steps
        for ours, theirs in zip(runs[0][3].parameters(), runs[1][3].parameters(), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.slow
    def test_resumed_is_uninterrupted(self, tmp_path, server):
        whole = make_run(tmp_path / "whole", make_teacher(server), save_strategy="steps", save_steps=3)
        expected = record_groups(whole)
        whole.train()
        resumed = make_run(tmp_path / "resumed", make_teacher(server))
        seen = record_groups(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
        assert seen == expected[3:]
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


class TestOverlap:
    def test_later_steps_are_asked_for_in_their_order(self, tmp_path, server):
        """After the first step the caller asks for nothing, and the server gets what the round still needs."""
        trainer, num_probes = make_run(tmp_path, make_teacher(server, max_concurrency=1)), 1
        steps = record_groups(trainer)
        num_requests = 3 * 4 * 3  # steps, prompts and completions of a round
        trainer.add_callback(AtStep(1, lambda: wait_until(lambda: len(server.requests) == num_probes + num_requests)))
        trainer.train()
        assert server.most_under_way == 1
        asked = [body["prompt"] for _, body, _ in server.requests[num_probes:]]
        rows = [
            [token for token, real in zip(ids, mask, strict=True) if real]
            for step in steps
            for batch in step
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert asked == rows and len(rows) == 2 * num_requests

    def test_one_step_a_round_has_nothing_to_overlap(self, tmp_path, server):
        trainer = make_trainer(tmp_path, teacher=make_teacher(server))
        assert trainer.online._ahead is None

    def test_what_computes_here_is_not_asked_beside_training(self, tmp_path, server):
        assert make_trainer(tmp_path, generate_every=2, score_fn=lengths).online._ahead is None
        mixed = TeacherEnsemble([make_teacher(server), CallableScorer(lengths)])
        assert make_trainer(tmp_path, generate_every=2, teacher=mixed).online._ahead is None

    def test_table_of_each_step(self, tmp_path, server, capsys):
        make_run(tmp_path, make_teacher(server), log_completions=2, max_steps=3).train()
        printed = capsys.readouterr().out
        assert [f"Step {step}" in printed for step in range(3)] == [True, False, True]


class TestEnd:
    def test_an_error_is_raised_before_its_step(self, tmp_path, server):
        trainer = make_run(tmp_path, make_teacher(server, max_concurrency=1))
        server.reset(*[None] * 12, (400, {}))  # the first request of the second step
        with pytest.raises(TeacherError, match="status 400"):
            trainer.train()
        assert trainer.state.global_step == 1 and not label_threads()
        server.reset()
        trainer.train()  # from the start, with all of the round
        assert trainer.state.global_step == 6

    @pytest.mark.parametrize("error", [RuntimeError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow), None])
    def test_does_not_wait_for_a_server_that_hangs(self, tmp_path, server, error):
        """Training fails, is interrupted, or has all its steps, while the next labels are under way."""
        trainer = make_run(tmp_path, make_teacher(server, max_retries=6), max_steps=1)
        server.reset(*[None] * 12, *["stall"] * 100)

        def end():
            wait_until(lambda: server.under_way)
            if error is not None:
                raise error("here")

        trainer.add_callback(AtStep(1, end))
        start = time.monotonic()
        if error is None:
            trainer.train()
        else:
            with pytest.raises(error, match="here"):
                trainer.train()
        assert not label_threads() and trainer.state.global_step == 1
        assert time.monotonic() - start < 10
        num_requests = len(server.requests)
        wait_until(lambda: server.under_way == 0)
        assert len(server.requests) == num_requests < 36
