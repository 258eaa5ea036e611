"""A teacher behind a real server on the loopback, and all that can go wrong between."""

import json
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
        with pytest.raises(TeacherError, match="Giving up after 3 attempts"):
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
        with pytest.raises(TeacherError, match=f"127.0.0.1:{port}(.)*Giving up after 2 attempts"):
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


def echoed(change):
    """A fault of an answer that echoes the prompt."""
    return lambda answer: change(answer, answer["choices"][0]["logprobs"])


def insert(answer, logprobs):
    logprobs["tokens"].insert(0, "<bos>")
    logprobs["token_logprobs"][0] = -2.0
    logprobs["token_logprobs"].insert(0, None)


def drop(answer, logprobs):
    del logprobs["tokens"][0], logprobs["token_logprobs"][1]


def shift(answer, logprobs):
    """Cut at the left and filled at the right, as a server does whose context is too short."""
    logprobs["tokens"] = [*logprobs["tokens"][1:], "z"]
    logprobs["token_logprobs"] = [None, *logprobs["token_logprobs"][2:], -1.0]


def swap(answer, logprobs):
    other = {**answer["choices"][0], "logprobs": {**logprobs, "token_logprobs": [None, -1.0, -1.0, -1.0, -1.0]}}
    answer["choices"] = [other | {"index": 1}, answer["choices"][0]]


class TestWrongAnswers:
    """Plausible numbers that are not those of the tokens sent: never a score."""

    ECHOED = {
        "BOS put before": (insert, "log-probabilities, 4 tokens were sent"),
        "first token dropped": (drop, "log-probabilities, 4 tokens were sent"),
        "cut at the left and filled": (shift, "where 'x' was sent"),
        "other text": (lambda answer, logprobs: logprobs.update(tokens=["q"] * 5), "where 'x' was sent"),
        "no text": (lambda answer, logprobs: logprobs.pop("tokens"), "no `tokens`"),
        "choices swapped": (swap, r"`index` \[1, 0\], 1 were asked for"),
        "choice of another index": (lambda answer, _: answer["choices"][0].update(index=1), r"`index` \[1\]"),
        "index that is no number": (lambda answer, _: answer["choices"][0].update(index=False), "`index`"),
        "other count": (lambda answer, _: answer["usage"].update(prompt_tokens=5), "5 prompt tokens in `usage`"),
        "no count": (lambda answer, _: answer.pop("usage"), "None prompt tokens in `usage`"),
        "first token has a value": (
            lambda answer, logprobs: logprobs["token_logprobs"].__setitem__(0, -1.0),
            "of the first token",
        ),
        "false": (lambda answer, logprobs: logprobs["token_logprobs"].__setitem__(2, False), "False in place of"),
        "text": (lambda answer, logprobs: logprobs["token_logprobs"].__setitem__(2, "-1"), "'-1' in place of"),
        "NaN": (lambda answer, logprobs: logprobs["token_logprobs"].__setitem__(2, math.nan), "nan in place of"),
        "above 0": (lambda answer, logprobs: logprobs["token_logprobs"].__setitem__(2, 0.5), "0.5 in place of"),
        "null": (lambda answer, logprobs: logprobs["token_logprobs"].__setitem__(2, None), "None in place of"),
        "other model": (lambda answer, _: answer.update(model="other"), "the model 'other', 'tiny' was asked"),
    }

    @pytest.mark.parametrize("fault", ECHOED)
    def test_echoed(self, server, teacher, fault):
        change, says = self.ECHOED[fault]
        server.reset(echoed(change))
        with pytest.raises(TeacherError, match=f"malformed answer: .*{says}"):
            teacher(server="sglang", max_retries=0).score(["x"], [["yz"]])

    VLLM = {
        "another id": (lambda choice: choice["prompt_logprobs"].__setitem__(1, {"7": {"logprob": -1.0}}), "None in place"),
        "first has a value": (lambda choice: choice["prompt_logprobs"].__setitem__(0, {}), "of other tokens"),
        "one more": (lambda choice: choice["prompt_logprobs"].append(None), "of other tokens"),
        "other ids": (lambda choice: choice["prompt_token_ids"].reverse(), "of other tokens"),
        "false": (lambda choice: [*choice["prompt_logprobs"][1].values()][0].update(logprob=False), "False in place"),
    }  # fmt: skip

    @pytest.mark.parametrize("fault", VLLM)
    def test_vllm(self, server, teacher, fault):
        change, says = self.VLLM[fault]
        server.reset(lambda answer: change(answer["choices"][0]))
        with pytest.raises(TeacherError, match=f"malformed answer: .*{says}"):
            teacher(max_retries=0).score(["x"], [["yz"]])

    @pytest.mark.parametrize("kind", ["vllm", "sglang"])
    def test_an_empty_prompt_has_no_score_and_no_completion(self, server, teacher, kind):
        assert math.isnan(teacher(server=kind).score([""], [["y"]]).scores[0][0])
        assert teacher(server=kind).generate([""], 2, seed=0, max_new_tokens=2).texts == [[]]
        assert server.requests == []


def withheld(index, reason="stop", **message):
    """A fault that withholds one completion."""

    def change(answer):
        (choice,) = (choice for choice in answer["choices"] if choice["index"] == index)
        choice |= {"finish_reason": reason, "message": {"role": "assistant", "content": None, **message}}

    return change


class TestWithheld:
    @pytest.mark.parametrize(
        "reason, message, name",
        [
            ("content_filter", {}, "filtered"),
            ("content_filter", {"content": "The beginning of"}, "filtered"),
            ("stop", {"refusal": "I cannot help with that."}, "refused"),
            ("tool_calls", {"tool_calls": []}, "tool calls"),
            (
                "stop",
                {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                "tool calls",
            ),
            ("function_call", {"function_call": {"name": "f", "arguments": "{}"}}, "tool calls"),
        ],
    )
    def test_is_dropped_and_counted(self, server, teacher, local, caplog, reason, message, name):
        server.reset(withheld(1, reason, **message))
        asked = {"seed": 1, "max_new_tokens": 4}
        written = teacher().generate([CHAT], 3, **asked)
        (texts,), (clipped,), *_ = local.generate([CHAT], 3, **asked)
        assert written[:2] == ([[texts[0], texts[2]]], [[clipped[0], clipped[2]]])
        assert len(server.requests) == 1
        assert f"withheld 1 of 3 completions (1 {name})" in caplog.text

    def test_groups_are_made_of_the_others(self, server, teacher, tmp_path):
        server.reset(
            *[withheld(0, "content_filter")] * 2,
            *[lambda answer: [withheld(i, "content_filter")(answer) for i in range(5)]],
        )
        prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("a", "b", "c", "d")]})
        args = config(tmp_path, completion_source="teacher", num_drawn=5, num_completions=2)
        groups = generate_groups(prompts, args, teacher=teacher(max_concurrency=1))
        counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
        assert len(groups) == 3 and counts["not_written"] == 2 + 5 and counts["long_prompts"] == 1

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    @pytest.mark.parametrize("content, reason", [("4", "stop"), (None, "length")])
    def test_an_answer_without_its_reasoning_is_refused(self, server, teacher, name, content, reason):
        server.reset(withheld(0, reason, content=content, **{name: "2 and 2 is"}))
        with pytest.raises(TeacherError, match=f"into `{name}`: its reasoning parser is on"):
            teacher().generate([CHAT], 2, seed=0, max_new_tokens=4)
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "change, says",
        [
            (lambda answer: answer["choices"].pop(), r"`index` \[1\], 2 were asked for"),
            (lambda answer: answer["choices"][0].update(index=0), r"`index` \[0, 0\]"),
            (lambda answer: answer["choices"][0].update(finish_reason="abort"), "ended with 'abort'"),
            (lambda answer: answer["choices"][0].update(message={"content": ["a"]}), "is no text"),
            (lambda answer: answer["choices"][0].pop("message"), "neither `text` nor `message`"),
            (lambda answer: answer.update(choices=None), "no list of `choices`"),
            (lambda answer: answer.update(model="other"), "the model 'other'"),
        ],
    )
    def test_other_forms_are_malformed(self, server, teacher, change, says):
        server.reset(change)
        with pytest.raises(TeacherError, match=f"malformed answer: .*{says}"):
            teacher(max_retries=0).generate([CHAT], 2, seed=0, max_new_tokens=4)


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
