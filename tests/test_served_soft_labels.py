"""Token soft labels from a server: its most likely tokens, equal to those of a local teacher, and trained on as those are."""

import json
import math

import pytest
import torch
from datasets import Dataset
from interrupted import config, make_prompts
from runs import TOKENIZER, VOCAB, make_rows
from teacher_server import serve
from tiny import byte_tokenizer, tiny_model

from grkd_trl.generation import generate_groups
from grkd_trl.teacher import (
    CalibratedTeacher,
    CallableScorer,
    LocalTeacher,
    ServerTeacher,
    TeacherError,
    cache_soft_labels,
)


SERVERS = ["vllm", "sglang"]
TOP = ["teacher_top_ids", "teacher_top_logps", "teacher_token_ids"]


@pytest.fixture(scope="module")
def local():
    return LocalTeacher(tiny_model("llama", VOCAB, seed=1, initializer_range=0.3), TOKENIZER)


@pytest.fixture(scope="module")
def running(local):
    with serve(local.model, TOKENIZER) as server:
        yield server


@pytest.fixture
def server(running):
    running.reset(max_logprobs=VOCAB)
    return running


@pytest.fixture
def remote(server):
    def make(kind="vllm", **kwargs):
        quick = {"timeout": 5.0, "max_retries": 1, "backoff": 0.01, "max_concurrency": 2}
        return ServerTeacher(server.url, "tiny", TOKENIZER, server=kind, **quick | kwargs)

    return make


def make_groups(num=4):
    rows = make_rows(num, scores=False)
    return Dataset.from_list([row | {"clipped": [i % 2 == 1 for i in range(len(row["completions"]))]} for row in rows])


def assert_same_labels(left, right, atol=1e-5):
    for row, other in zip(left, right, strict=True):
        assert row["teacher_token_ids"] == other["teacher_token_ids"]
        assert row["teacher_top_ids"] == other["teacher_top_ids"]
        assert row["teacher_scores"] == pytest.approx(other["teacher_scores"], abs=atol)
        for logps, others in zip(row["teacher_top_logps"], other["teacher_top_logps"], strict=True):
            torch.testing.assert_close(torch.tensor(logps), torch.tensor(others), rtol=0, atol=atol)


class TestReading:
    @pytest.mark.parametrize("kind, k", [("vllm", 1), ("vllm", 5), ("sglang", 5), ("sglang", VOCAB)])
    def test_equals_the_cache_of_the_model(self, server, remote, local, kind, k):
        """At k = 1 most tokens are not the most likely, and vLLM gives them as an entry more."""
        groups = make_groups()
        served = cache_soft_labels(remote(kind), TOKENIZER, groups, k=k)
        assert_same_labels(served, cache_soft_labels(local.model, TOKENIZER, groups, k=k, progress=False))
        assert served.features["teacher_top_logps"].feature.feature.feature.dtype == "float32"
        assert len(server.requests) == 1 + sum(map(len, groups["completions"]))  # one that asks, and one a completion
        plain = remote(kind).score(groups["prompt"], groups["completions"], columns={"clipped": groups["clipped"]})
        for row, other in zip(served["teacher_scores"], plain.scores, strict=True):
            assert row == pytest.approx(other, abs=1e-5)

    @pytest.mark.parametrize("kind", SERVERS)
    def test_a_teacher_that_sees_more(self, server, remote, local, kind):
        groups = make_groups(3)
        plain = cache_soft_labels(remote(kind), TOKENIZER, groups, k=3)
        groups = groups.add_column("teacher_prompt", ["e f g ", None, "a "])
        served = cache_soft_labels(remote(kind), TOKENIZER, groups, k=3)
        assert_same_labels(served, cache_soft_labels(local.model, TOKENIZER, groups, k=3, progress=False))
        assert served["teacher_token_ids"][:] == plain["teacher_token_ids"][:]
        assert served[0]["teacher_top_logps"] != plain[0]["teacher_top_logps"]
        assert served[1]["teacher_top_logps"] == plain[1]["teacher_top_logps"]

    def test_a_masked_token_has_no_probability(self, server, remote, monkeypatch):
        """vLLM writes -9999 for the minus infinity that JSON does not have."""
        logps = torch.tensor([[-0.1, math.log(1 - math.exp(-0.1)), *[-9999.0] * (VOCAB - 2)]])
        monkeypatch.setattr(server, "all_logps", lambda ids: logps.expand(len(ids) - 1, -1))
        given = remote().top_k(["a "], [["b"]], 3)
        assert given.top_logps[0][0][0][:2] == pytest.approx(logps[0, :2].tolist()) and math.isnan(
            given.scored.scores[0][0]
        )
        assert given.top_logps[0][0][0][2] == -math.inf

    def test_what_exceeds_the_context_has_none(self, server, remote):
        given = remote(context_length=4).top_k(["a "], [["c", "c d e"]], 2)
        assert len(given.top_ids[0][0]) == 2 and given.top_ids[0][1] == given.top_logps[0][1] == []
        with pytest.raises(ValueError, match="row 0 holds 4 tokens at position 1, which have no soft labels"):
            groups = Dataset.from_list([{"prompt": "a ", "completions": ["c", "c d e"]}])
            cache_soft_labels(remote(context_length=4), TOKENIZER, groups, k=2)

    def test_an_adapter_of_sglang_is_named(self, server, remote):
        remote("sglang", max_concurrency=1).check_top_k(2)
        teacher = ServerTeacher(server.url, "tiny:mine", TOKENIZER, server="sglang")
        teacher.check_top_k(2)
        assert [body.get("lora_path") for _, body, _ in server.requests] == [None, "mine"]

    def test_calibrated_scores_beside_plain_labels(self):
        asked, tokenizer = (["Name a colour: "], [["red", "a light blue"]]), byte_tokenizer()
        plain = LocalTeacher(tiny_model("llama", len(tokenizer), initializer_range=0.3), tokenizer)
        teacher = CalibratedTeacher(plain, ratio=0.5)
        given, labels = teacher.top_k(*asked, 3), plain.top_k(*asked, 3)
        assert given.top_ids == labels.top_ids and given.scored == teacher.score(*asked) != labels.scored


class TestLimits:
    def test_of_vllm(self, server, remote):
        server.max_logprobs = 4
        remote().check_top_k(4)
        with pytest.raises(TeacherError, match="`tiny` does not give the 5(.)*max allowed: 4(.)*--max-logprobs 5"):
            remote().check_top_k(5)
        assert len(server.requests) == 2

    def test_fewer_than_asked_for(self, server, remote):
        server.reset(lambda answer: [top and top.pop() for top in answer["meta_info"]["input_top_logprobs"]])
        with pytest.raises(TeacherError, match="does not give the 5 (.)*: 4 most likely tokens at position 1, 5 were"):
            remote("sglang").check_top_k(5)
        assert len(server.requests) == 1

    @pytest.mark.parametrize("kind, says", [("llama.cpp", "by their text"), ("openai", "no log-probabilities")])
    def test_kinds_without(self, remote, kind, says):
        with pytest.raises(ValueError, match=says):
            remote(kind).check_top_k(2)

    @pytest.mark.parametrize("k", [0, VOCAB + 1])
    def test_k(self, server, remote, k):
        with pytest.raises(ValueError, match=f"between 1 and the vocabulary's {VOCAB}, got {k}"):
            remote().check_top_k(k)
        assert server.requests == []

    def test_another_tokenizer(self, remote):
        with pytest.raises(ValueError, match="'tiny' are not the student's"):
            cache_soft_labels(remote(), byte_tokenizer(), make_groups(), k=2)


def vllm(change):
    return lambda answer: change(answer["choices"][0]["prompt_logprobs"])


def sglang(change):
    return lambda answer: change(answer["meta_info"])


def shift(values):
    values.insert(1, values.pop())


class TestWrongAnswers:
    """Plausible numbers that are not those of the tokens sent: never a soft label."""

    FAULTS = {
        "vllm, one fewer": ("vllm", vllm(lambda tops: tops[2].popitem()), "most likely tokens at position 2"),
        "vllm, two more": (
            "vllm",
            vllm(lambda tops: tops[2].update({i: {"logprob": -9.0, "rank": 4} for i in ("1000", "1001")})),
            "most likely tokens at position 2",
        ),
        "vllm, a position less": ("vllm", vllm(lambda tops: tops.pop()), "of other tokens than"),
        "vllm, first not null": (
            "vllm",
            vllm(lambda tops: tops.__setitem__(0, dict(tops[1]))),
            "of other tokens than",
        ),
        "vllm, shifted": ("vllm", vllm(shift), "in place of a log-probability|of another position"),
        "vllm, text for an id": (
            "vllm",
            vllm(lambda tops: tops[2].update({"a": tops[2].pop(list(tops[2])[-1])})),
            "that has no id",
        ),
        "vllm, logits": (
            "vllm",
            vllm(lambda tops: [value.update(logprob=-0.1) for value in tops[2].values()]),
            "probabilities sum to",
        ),
        "sglang, shifted": (
            "sglang",
            sglang(lambda said: shift(said["input_top_logprobs"])),
            "of another position than the token sent",
        ),
        "sglang, other ids": (
            "sglang",
            sglang(lambda said: said["input_token_logprobs"][2].__setitem__(1, 1)),
            "of other tokens than",
        ),
        "sglang, BOS put before": (
            "sglang",
            sglang(lambda said: said["input_token_logprobs"].insert(0, [None, 2, None])),
            "of other tokens than",
        ),
        "sglang, a position less": (
            "sglang",
            sglang(lambda said: said["input_top_logprobs"].pop()),
            "of other tokens than",
        ),
        "sglang, first not null": (
            "sglang",
            sglang(lambda said: said["input_top_logprobs"].__setitem__(0, said["input_top_logprobs"][1])),
            "of the first token",
        ),
        "sglang, other count": ("sglang", sglang(lambda said: said.update(prompt_tokens=9)), "of other tokens than"),
        "sglang, one twice": (
            "sglang",
            sglang(lambda said: said["input_top_logprobs"][2].__setitem__(0, said["input_top_logprobs"][2][1])),
            "at position 2, 3 were",
        ),
        "sglang, null": (
            "sglang",
            sglang(lambda said: said["input_top_logprobs"][2][0].__setitem__(0, None)),
            "None in place of",
        ),
        "sglang, no lists": (
            "sglang",
            sglang(lambda said: said["input_top_logprobs"].__setitem__(2, {"a": -1.0})),
            "no lists of",
        ),
        "sglang, no count": (
            "sglang",
            lambda answer: answer["meta_info"].pop("prompt_tokens"),
            "of other tokens than",
        ),
    }

    @pytest.mark.parametrize("fault", FAULTS)
    def test_is_refused(self, server, remote, fault):
        kind, change, says = self.FAULTS[fault]
        server.reset(change, max_logprobs=VOCAB)
        with pytest.raises(TeacherError, match=f"malformed answer: .*({says})"):
            remote(kind, max_retries=0).top_k(["a b "], [["c d e"]], 3)

    @pytest.mark.parametrize("kind", SERVERS)
    def test_another_attempt_mends_it(self, server, remote, local, kind):
        server.reset("malformed", (503, {}), "cut", max_logprobs=VOCAB)
        given = remote(kind, max_retries=3).top_k(["a b "], [["c d e"]], 3)
        assert given.top_ids == local.top_k(["a b "], [["c d e"]], 3).top_ids and len(server.requests) == 4

    @pytest.mark.parametrize("kind", SERVERS)
    def test_none_at_all_stops_at_once(self, server, remote, kind):
        def strip(answer):
            answer.pop("meta_info", None)
            for choice in answer.get("choices", []):
                choice["prompt_logprobs"] = None

        server.reset(strip, max_logprobs=VOCAB)
        with pytest.raises(TeacherError, match="without log-probabilities of the prompt"):
            remote(kind).top_k(["a b "], [["c d e"]], 3)
        assert len(server.requests) == 1


class TestGroups:
    def make(self, folder, teacher, num=6, **kwargs):
        small = {"completion_source": "student", "soft_labels": 5, "prompts_per_shard": 2}
        args = config(folder, **small | kwargs)
        student = LocalTeacher(tiny_model("llama", VOCAB, seed=0, initializer_range=0.3), TOKENIZER)
        return generate_groups(make_prompts(num), args, student=student, teacher=teacher)

    def test_scores_and_labels_are_written(self, tmp_path, server, remote, local):
        served = self.make(tmp_path / "served", remote("sglang"))
        plain = self.make(tmp_path / "local", local)
        assert_same_labels(served, plain)
        bare = served.remove_columns([*TOP, "teacher_scores"])
        assert_same_labels(plain, cache_soft_labels(local.model, TOKENIZER, bare, k=5, progress=False))
        assert served["teacher_token_ids"][:] == served["completion_ids"][:]

    def test_a_run_that_was_stopped_resumes(self, tmp_path, server, remote):
        whole = self.make(tmp_path / "whole", remote())
        server.reset(*[None] * 9, (401, {}), max_logprobs=VOCAB)
        with pytest.raises(TeacherError):
            self.make(tmp_path / "part", remote(max_concurrency=1))
        kept = {path.name: path.read_bytes() for path in (tmp_path / "part" / "data").iterdir()}
        assert 0 < len(kept) < 3
        server.reset(max_logprobs=VOCAB)
        assert self.make(tmp_path / "part", remote()).to_list() == whole.to_list()
        assert all((tmp_path / "part" / "data" / name).read_bytes() == content for name, content in kept.items())
        with pytest.raises(ValueError, match="`parameters.soft_labels`: 5 then, None now"):
            self.make(tmp_path / "part", remote(), soft_labels=None)

    def test_the_limit_is_found_before_there_is_a_folder(self, tmp_path, server, remote):
        server.max_logprobs = 4
        with pytest.raises(TeacherError, match="--max-logprobs 5"):
            self.make(tmp_path / "groups", remote())
        assert len(server.requests) == 1 and not (tmp_path / "groups").exists()

    def test_another_scorer_ranks_what_the_teacher_labels(self, tmp_path, local):
        """Completions that it drops take their labels with them."""
        fn = CallableScorer(lambda prompts, completions, **_: [[None, *range(len(g) - 1)] for g in completions])
        args = config(tmp_path, completion_source="dataset", soft_labels=5)
        groups = generate_groups(make_groups(), args, teacher=local, scorer=fn)
        assert groups["teacher_scores"][0] == [0.0, 1.0]
        own = groups.remove_columns(TOP)
        labelled = cache_soft_labels(local.model, TOKENIZER, own, k=5, progress=False)
        assert_same_labels(groups, labelled)
        rest = groups.filter(lambda row: len(row["completions"]) > 2)  # without labels asked for, its own are kept
        again = generate_groups(rest, config(tmp_path / "2", completion_source="dataset"), scorer=fn)
        assert again["teacher_top_ids"][:] == [row[1:] for row in rest["teacher_top_ids"]]

    @pytest.mark.parametrize(
        "teacher, says",
        [
            (lambda local: CallableScorer(len), "`CallableScorer` has none"),
            (lambda local: None, "no teacher was given"),
            (lambda local: LocalTeacher(local.model, byte_tokenizer()), "are not the student's"),
        ],
    )
    def test_refusals(self, tmp_path, local, teacher, says):
        with pytest.raises(ValueError, match=says):
            self.make(tmp_path / "groups", teacher(local))
        assert not (tmp_path / "groups").exists()


def test_the_request_is_that_of_the_servers_documentation(server, remote):
    for kind in SERVERS:
        remote(kind).top_k(["a "], [["b"]], 2)
    (vllm_path, vllm_body, _), (sglang_path, sglang_body, _) = server.requests
    ids = TOKENIZER("a b")["input_ids"] + [TOKENIZER.eos_token_id]
    assert vllm_path == "/v1/completions" and sglang_path == "/generate"
    assert (vllm_body["prompt"], vllm_body["prompt_logprobs"]) == (ids, 2)
    assert json.dumps(sglang_body, sort_keys=True) == json.dumps(
        {"input_ids": ids, "logprob_start_len": 0, "return_logprob": True, "top_logprobs_num": 2}
        | {"sampling_params": {"max_new_tokens": 1, "temperature": 0.0}},
        sort_keys=True,
    )
