"""A teacher behind a real server on the loopback, and all that can go wrong between."""

import logging
import math
import socket
import time

import pytest
from datasets import Dataset
from interrupted import config, make_prompts
from teacher_server import serve
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model

from grkd_trl.generation import generate_groups
from grkd_trl.teacher import LocalTeacher, ServerTeacher, TeacherError


KEY = "sk-not-to-be-seen"
CHAT = [{"role": "user", "content": "Hi"}]
PROMPTS = ["Name a colour: ", CHAT, "x"]
COMPLETIONS = [["red", "a very light blue", "r"], ["Hello", "Hi there"], ["y"]]
CLIPPED = [[False, True, False], [False, True], [False]]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["qwen"]
    return tokenizer


@pytest.fixture(scope="module")
def local(tokenizer):
    return LocalTeacher(tiny_model("llama", len(tokenizer), initializer_range=0.3), tokenizer)


@pytest.fixture(scope="module")
def running(local):
    with serve(local.model, local.processing_class) as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


@pytest.fixture
def teacher(server, tokenizer, monkeypatch):
    monkeypatch.setenv("GRKD_TEACHER_API_KEY", KEY)

    def make(**kwargs):
        quick = {"timeout": 5.0, "max_retries": 3, "backoff": 0.01, "max_concurrency": 2}
        return ServerTeacher(server.url, "tiny", tokenizer, **quick | kwargs)

    return make


class TestScores:
    @pytest.mark.parametrize("kind", ["vllm", "sglang"])
    @pytest.mark.parametrize("score", ["mean", "sum"])
    def test_equal_those_of_the_local_teacher(self, teacher, local, kind, score):
        given = teacher(server=kind, score=score).score(PROMPTS, COMPLETIONS, columns={"clipped": CLIPPED})
        there = LocalTeacher(local.model, local.processing_class, score=score)
        expected = there.score(PROMPTS, COMPLETIONS, columns={"clipped": CLIPPED})
        assert given.num_tokens == expected.num_tokens and given.surprises == expected.surprises
        for row, other, counts in zip(given.scores, expected.scores, given.num_tokens, strict=True):
            for value, other_value, count in zip(row, other, counts, strict=True):
                assert abs(value - other_value) <= 1e-4 * (1 if score == "mean" else count)
        assert len({value for row in given.scores for value in row}) == 6

    def test_asks_for_the_tokens_by_id_with_the_key(self, server, teacher, tokenizer):
        teacher().score(["x"], [["y"]])
        ((path, body, authorization),) = server.requests
        assert path == "/v1/completions" and authorization == f"Bearer {KEY}"
        assert body["prompt"] == [*tokenizer("xy")["input_ids"], tokenizer.eos_token_id]
        assert body["model"] == "tiny" and body["prompt_logprobs"] == 0

    def test_what_exceeds_the_context_is_not_sent(self, server, teacher):
        (row,), _, _ = teacher(context_length=8).score(["abc"], [["d", "defgh"]])
        assert math.isfinite(row[0]) and math.isnan(row[1])
        assert len(server.requests) == 1

    def test_probability_of_zero_is_no_score(self, teacher, server, monkeypatch):
        monkeypatch.setattr(server, "logps", lambda ids: [-9999.0] * (len(ids) - 1))
        assert math.isnan(teacher().score(["x"], [["y"]]).scores[0][0])

    def test_requests_under_way_are_limited(self, server, teacher):
        server.reset(delay=0.02)
        teacher(max_concurrency=3).score(["x"] * 3, [["a", "b", "c"]] * 3)
        assert 1 < server.most_under_way <= 3

    def test_any_other_server_cannot_score(self, teacher):
        with pytest.raises(ValueError, match="gives no log-probabilities of a prompt"):
            teacher(server="openai").score(["x"], [["y"]])


class TestWriting:
    @pytest.mark.parametrize("prompt", ["Name a colour: ", CHAT])
    def test_greedy_is_that_of_the_local_teacher(self, teacher, local, prompt):
        asked = {"seed": 0, "max_new_tokens": 6, "temperature": 0.0}
        assert teacher().generate([prompt], 1, **asked)[:2] == local.generate([prompt], 1, **asked)[:2]

    def test_draws_follow_the_seed(self, server, teacher, local):
        asked = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 0.8}
        written = teacher().generate(PROMPTS, 3, seed=4, **asked)
        assert written == teacher().generate(PROMPTS, 3, seed=4, **asked)
        assert written != teacher().generate(PROMPTS, 3, seed=5, **asked)
        for row, prompt in enumerate(PROMPTS):
            (texts,), (clipped,), *_ = local.generate([prompt], 3, seed=4 + row, **asked)
            assert (written.texts[row], written.clipped[row]) == (texts, clipped)
        assert {path for path, _, _ in server.requests} == {"/v1/completions", "/v1/chat/completions"}

    def test_a_prompt_without_room(self, teacher):
        assert teacher(context_length=6).generate(["abc", "abcd"], 1, seed=0, max_new_tokens=3).texts[1] == []


class TestFaults:
    @pytest.mark.parametrize(
        "fault", [(500, {}), (503, {}), (429, {"Retry-After": "0.05"}), "cut", "malformed", "stall", "other tokens"]
    )
    def test_another_try_mends_it(self, server, teacher, local, fault):
        server.reset(fault)
        scores = teacher(timeout=0.4 if fault == "stall" else 5.0).score(["x"], [["y"]]).scores
        assert scores[0] == pytest.approx(local.score(["x"], [["y"]]).scores[0], abs=1e-4)
        assert len(server.requests) == 2

    def test_waits_as_long_as_it_is_asked_to(self, server, teacher):
        server.reset((429, {"Retry-After": "0.6"}))
        start = time.monotonic()
        teacher().score(["x"], [["y"]])
        assert time.monotonic() - start > 0.6

    @pytest.mark.parametrize("fault", [(500, {}), (429, {}), "cut", "malformed", "stall", "other tokens"])
    def test_stops_after_its_retries(self, server, teacher, fault):
        server.reset(*[fault] * 9)
        with pytest.raises(TeacherError, match="Given up after 3 tries"):
            teacher(timeout=0.3 if fault == "stall" else 5.0, max_retries=2).score(["x"], [["y"]])
        assert len(server.requests) == 3

    def test_writing_is_tried_again_too(self, server, teacher, local):
        server.reset("malformed", (502, {}))
        asked = {"seed": 1, "max_new_tokens": 4}
        assert teacher().generate([CHAT], 2, **asked)[:2] == local.generate([CHAT], 2, **asked)[:2]

    @pytest.mark.parametrize("kind", ["vllm", "sglang"])
    def test_missing_logprobs_stop_at_once(self, server, teacher, kind):
        server.reset("missing")
        with pytest.raises(TeacherError, match="without log-probabilities of the prompt"):
            teacher(server=kind).score(["x"], [["y"]])
        assert len(server.requests) == 1

    def test_a_refused_request_is_not_repeated(self, server, teacher):
        server.reset((400, {}))
        with pytest.raises(TeacherError, match="status 400(.)*told to fail(.)*not repeated"):
            teacher().score(["x"], [["y"]])
        assert len(server.requests) == 1

    def test_connection_refused(self, tokenizer):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        teacher = ServerTeacher(f"http://127.0.0.1:{port}/v1", "tiny", tokenizer, max_retries=1, backoff=0.01)
        with pytest.raises(TeacherError, match=f"127.0.0.1:{port}(.)*Given up after 2 tries"):
            teacher.score(["x"], [["y"]])

    def test_the_key_is_never_shown(self, server, teacher, caplog):
        """The server sends it back in its error."""
        caplog.set_level(logging.DEBUG)
        server.reset(*[(500, {})] * 9)
        with pytest.raises(TeacherError) as error:
            teacher().score(["x"], [["y"]])
        assert "[key]" in str(error.value)
        shown = [str(error.value), repr(teacher().describe()), caplog.text]
        assert not [text for text in shown if KEY in text]
        assert error.value.__cause__ is None and error.value.__context__ is None  # which would be in the traceback


class TestGroups:
    def test_what_was_done_is_kept(self, server, teacher, local, tmp_path):
        prompts = make_prompts(12)
        args = config(tmp_path, completion_source="teacher")
        server.delay = 0.0
        writer = teacher(max_retries=0, max_concurrency=1)
        server.faults = [None] * 18 + [(500, {})]  # four writes and up to twelve scores are a unit
        with pytest.raises(TeacherError):
            generate_groups(prompts, args, teacher=writer)
        kept = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
        assert 0 < len(kept) < 3
        server.reset((500, {}), "cut", None, "malformed")
        groups = generate_groups(prompts, args, teacher=teacher())
        assert all(path.read_bytes() == content for path, content in kept.items())
        expected = local.score(groups["prompt"], groups["completions"], columns={"clipped": groups["clipped"]})
        for row, other in zip(groups["teacher_scores"], expected.scores, strict=True):
            assert row == pytest.approx(other, abs=1e-4)
        assert isinstance(groups, Dataset) and len(groups) > 6


@pytest.mark.parametrize("kwargs, error", [({"server": "tgi"}, "`server`"), ({"score": "max"}, "`score`")])
def test_choices(teacher, kwargs, error):
    with pytest.raises(ValueError, match=error):
        teacher(**kwargs)
