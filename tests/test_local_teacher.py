"""Local language models and functions as teachers."""

import doctest
import math

import pytest
import torch
from accelerate import cpu_offload
from scipy.stats import chisquare
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model, tiny_tokenizer
from torch.testing._internal.two_tensor import TwoTensor

from grkd_trl.data import describe_tokenizer, tokenizer_hash
from grkd_trl.teacher import CallableScorer, LocalTeacher, scorer
from grkd_trl.teacher.retokenize import reads_back


PROMPTS = ["a b c ", "d ", "e f g a b c d "]
COMPLETIONS = [["a", "b c d e f"], ["g a", "b", "c d e"], ["f"]]
CLIPPED = [[False, True], [False, False, True], [False]]


def make_teacher(architecture="llama", tokenizer=None, **kwargs):
    tokenizer = tokenizer or tiny_tokenizer()
    shape = {name: kwargs.pop(name) for name in ("max_position_embeddings", "seed") if name in kwargs}
    model = tiny_model(architecture, len(tokenizer), initializer_range=0.3, **shape)
    return LocalTeacher(model, tokenizer, **kwargs)


@torch.no_grad()
def plain_logps(model, prompt_ids, completion_ids):
    logps = model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0].log_softmax(-1)
    return [logps[len(prompt_ids) + t - 1, token].item() for t, token in enumerate(completion_ids)]


class TestLocalTeacher:
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
    @pytest.mark.parametrize("tokens_per_batch", [1, 30, 1000])
    def test_scores_as_one_completion_at_a_time(self, architecture, tokens_per_batch):
        teacher = make_teacher(architecture, tokens_per_batch=tokens_per_batch)
        scores, num_tokens, surprises = teacher.score(PROMPTS, COMPLETIONS, columns={"clipped": CLIPPED})
        teacher.model.eval()
        tokenizer = teacher.processing_class
        for prompt, group, cuts, row, counts in zip(PROMPTS, COMPLETIONS, CLIPPED, scores, num_tokens, strict=True):
            for text, cut, score, count in zip(group, cuts, row, counts, strict=True):
                ids = tokenizer.convert_tokens_to_ids(text.split()) + [tokenizer.eos_token_id] * (not cut)
                logps = plain_logps(teacher.model, tokenizer.convert_tokens_to_ids(prompt.split()), ids)
                assert score == pytest.approx(sum(logps) / len(logps), abs=1e-5)
                assert count == len(ids)
        assert not any(map(any, surprises))

    def test_prompt_sharing_changes_the_work_alone(self):
        scores, widths = {}, {}
        for sharing in ("auto", "on", "off"):
            teacher, read = make_teacher(prompt_sharing=sharing), []
            teacher.score(PROMPTS[:1], COMPLETIONS[:1])  # checks the model
            teacher.model.model.embed_tokens.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
            scores[sharing] = [score for row in teacher.score(PROMPTS, COMPLETIONS).scores for score in row]
            widths[sharing] = [tuple(ids.shape) for ids in read]
        assert scores["on"] == pytest.approx(scores["off"], abs=1e-5)
        assert scores["auto"] == pytest.approx(scores["off"], abs=1e-5)
        assert widths["off"] == [(6, 9)] and widths["on"] == [(1, 24)]
        with pytest.raises(ValueError, match="`prompt_sharing` must be 'auto', 'on' or 'off', got 'yes'"):
            make_teacher(prompt_sharing="yes")

    @pytest.mark.parametrize("sharing", ["on", "off"])
    def test_what_is_not_shared_counts_for_every_row(self, sharing):
        teacher, read = make_teacher(prompt_sharing=sharing, tokens_per_batch=30), []
        teacher.score(PROMPTS[:1], COMPLETIONS[:1])
        teacher.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        teacher.score(PROMPTS, COMPLETIONS)
        assert (len(read) == 1) == (sharing == "on") and all(ids.numel() <= 30 for ids in read)

    def test_reads_conversations_with_its_own_template(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATES["qwen"]
        teacher = make_teacher(tokenizer=tokenizer)
        prompt = [{"role": "user", "content": "Hi"}]
        (row,), (counts,), _ = teacher.score([prompt], [["Hello", [{"role": "assistant", "content": "Hello"}]]])
        start, end = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>\n"
        ids = [tokenizer(text)["input_ids"] for text in (start, end)]
        logps = plain_logps(teacher.model.eval(), *ids)
        assert row == pytest.approx([sum(logps) / len(logps)] * 2, abs=1e-5)
        assert counts == [len(logps)] * 2

    def test_writes_in_the_context_that_it_scores(self):
        """Columns for the chat template reach both halves."""
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{{ mood }}{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHAT_TEMPLATES["qwen"]
        )
        teacher, prompt = make_teacher(tokenizer=tokenizer), [{"role": "user", "content": "Hi"}]
        columns = {"tools": ['[{"name": "f"}]'], "chat_template_kwargs": [{"mood": "glad"}]}
        asked = {"seed": 0, "max_new_tokens": 5, "temperature": 0.0}
        written = teacher.generate([prompt], 1, columns=columns, **asked)
        context = "gladf<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert written == teacher.generate([context], 1, **asked)
        assert written != teacher.generate([prompt], 1, **asked)
        text = written.texts[0][0]
        scores = [
            teacher.score([start], [[text]], columns={"clipped": [[True]], **further}).scores[0][0]
            for start, further in ((prompt, columns), (context, {}), (prompt, {}))
        ]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
        assert abs(scores[0] - scores[2]) > 1e-3

    def test_what_cannot_be_scored_is_not_a_number(self):
        teacher = make_teacher(max_position_embeddings=8)
        texts = ["a", "b c d e f"]  # 7 and 6 tokens of prompt and completion with EOS; then 9
        (first, second), num_tokens, _ = teacher.score(
            ["a b c d "] * 2, [texts, ["", "a"]], columns={"clipped": [[False] * 2, [True, False]]}
        )
        assert [math.isnan(value) for value in first] == [False, True]
        assert [math.isnan(value) for value in second] == [True, False]
        assert num_tokens == [[2, 6], [0, 2]]
        assert first[0] == pytest.approx(second[1], abs=1e-6)

    def test_seed_decides_the_draws(self):
        teacher = make_teacher(prompts_per_batch=2)
        state = torch.get_rng_state()
        written = teacher.generate(PROMPTS, 3, seed=5, max_new_tokens=6)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        assert teacher.generate(PROMPTS, 3, seed=5, max_new_tokens=6) == written
        assert teacher.generate(PROMPTS, 3, seed=6, max_new_tokens=6).completion_ids != written.completion_ids
        for values in (written.texts, written.clipped, written.completion_ids):
            assert [len(group) for group in values] == [3] * 3

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}])
    def test_what_stands_beside_a_prompt_changes_nothing(self, sampling):
        teacher, asked = make_teacher(), {"max_new_tokens": 6, **sampling}
        together = teacher.generate(PROMPTS, 3, seed=5, **asked)
        assert together == teacher.generate(PROMPTS, 3, seed=[5, 6, 7], **asked)
        for row, prompt in enumerate(PROMPTS):
            alone = teacher.generate([prompt], 3, seed=5 + row, **asked)
            assert (together.texts[row], together.clipped[row]) == (alone.texts[0], alone.clipped[0])

    @pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
    def test_draws_follow_the_model(self, temperature, top_p):
        teacher = make_teacher()
        asked = {"seed": 3, "max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
        (texts,) = teacher.generate(["a b "], 4000, **asked).texts
        ids = torch.tensor([teacher.processing_class("a b ")["input_ids"]])
        with torch.no_grad():
            probs, order = (
                (teacher.model.eval()(input_ids=ids).logits[0, -1] / temperature).softmax(-1).sort(descending=True)
            )
        probs = probs * (probs.cumsum(-1) - probs < top_p)
        names = [teacher.processing_class.decode([token], skip_special_tokens=True) for token in order]
        expected = {kind: sum(p.item() for p, n in zip(probs, names, strict=True) if n == kind) for kind in set(names)}
        kinds = sorted(kind for kind, share in expected.items() if share > 0)
        counts = [texts.count(kind) for kind in kinds]
        assert sum(counts) == 4000
        total = sum(expected.values())
        assert chisquare(counts, [4000 * expected[kind] / total for kind in kinds]).pvalue > 1e-3

    def test_a_prompt_without_room_gets_no_completion(self):
        written = make_teacher(max_position_embeddings=8).generate(PROMPTS, 2, seed=0, max_new_tokens=4)
        for values in (written.texts, written.clipped, written.completion_ids):
            assert [len(group) for group in values] == [2, 2, 0]

    def test_describes_itself(self):
        teacher, other = make_teacher(), make_teacher(tokenizer=byte_tokenizer())
        assert teacher.describe()["dtype"] == "float32"
        assert teacher.describe()["tokenizer"] == make_teacher().describe()["tokenizer"]
        assert teacher.describe()["tokenizer"] != other.describe()["tokenizer"]

    def test_describes_weights_by_their_values(self):
        def described(**kwargs):
            teacher = make_teacher(**kwargs)
            teacher.model.config._commit_hash = "that of a hub, from which it was trained further"
            return teacher

        own = described().describe()
        assert own != described(seed=1).describe()
        offloaded = described()
        cpu_offload(offloaded.model, "cpu")
        assert offloaded.model.lm_head.weight.is_meta and offloaded.describe() == own

    def test_describes_weights_that_are_several_tensors(self):
        """As those of a model that is quantized by torchao, or sharded, of which many operations are not known."""
        found = []
        for bias in (0.0, 1.0, 1.0):
            teacher = make_teacher()
            head = teacher.model.lm_head.weight.detach()
            teacher.model.lm_head.weight = torch.nn.Parameter(TwoTensor(head, head + bias))
            found.append(teacher.describe())
        assert found[0] != found[1] == found[2]

    def test_refuses_an_unknown_score(self):
        with pytest.raises(ValueError, match="`score` must be 'mean' or 'sum', got 'median'"):
            make_teacher(score="median")


class TestRetokenization:
    @pytest.mark.parametrize(
        "text, expected",
        [("a b", True), (" a b ", True), ("a z", False), ("a <eos> b", False), ("a <pad>", False)],
    )
    def test_reads_back(self, text, expected):
        tokenizer = tiny_tokenizer()
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert reads_back(tokenizer, text, ids) is expected

    def test_surprises_are_counted(self):
        scores, _, surprises = make_teacher().score(["a "], [["b", "b <eos> c", "unknown"]])
        assert surprises == [[False, True, True]]
        assert all(map(math.isfinite, scores[0]))

    def test_merge_with_the_prompt_is_a_surprise(self):
        _, _, surprises = make_teacher().score(["a", "a"], [["b"], [" b"]])  # "ab" is one unknown word
        assert surprises == [[True], [False]]

    def test_what_tells_tokenizers_apart(self):
        """Ids mean the same under any chat template; a manifest names the template beside the vocabulary."""
        tokenizer, other = byte_tokenizer(), byte_tokenizer()
        assert describe_tokenizer(tokenizer) == describe_tokenizer(other)
        other.chat_template = CHAT_TEMPLATES["qwen"]
        assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
        assert describe_tokenizer(tokenizer)["chat_template"] != describe_tokenizer(other)["chat_template"]
        other.add_tokens(["<tool>"])
        assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


def count_words(prompts, completions, **columns):
    return [[len(text.split()) if text else None for text in group] for group in completions]


class TestCallableScorer:
    def test_docstring(self):
        results = [doctest.DocTestRunner().run(test) for test in doctest.DocTestFinder().find(scorer)]
        assert sum(result.attempted for result in results) >= 3
        assert not sum(result.failed for result in results)

    def test_scores(self):
        scores, num_tokens, surprises = CallableScorer(count_words).score(["x", "y"], [["a b", ""], ["a"]])
        assert scores[0][0] == 2.0 and math.isnan(scores[0][1]) and scores[1] == [1.0]
        assert num_tokens == [[0, 0], [0]] and surprises == [[False, False], [False]]
        assert CallableScorer(count_words).describe()["score_fn"].endswith("count_words")

    @pytest.mark.parametrize("given, error", [([[1.0]], "returned"), ([[1.0, math.inf]], "infinite")])
    def test_refuses_what_is_no_score(self, given, error):
        with pytest.raises(ValueError, match=error):
            CallableScorer(lambda prompts, completions: given).score(["x"], [["a", "b"]])
