import gzip
import math

import pytest
import torch
from shared_data import shared_data
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grkd_trl.evaluation import exact_match, scan_pairs, scan_split, wilson_interval


FIGURE_1 = {  # of the SCAN paper; its LTURN is the files' I_TURN_LEFT
    "jump": "JUMP",
    "jump left": "LTURN JUMP",
    "jump around right": "RTURN JUMP RTURN JUMP RTURN JUMP RTURN JUMP",
    "turn left twice": "LTURN LTURN",
    "jump thrice": "JUMP JUMP JUMP",
    "jump opposite left and walk thrice": "LTURN LTURN JUMP WALK WALK WALK",
    "jump opposite left after walk around left": (
        "LTURN WALK LTURN WALK LTURN WALK LTURN WALK LTURN LTURN JUMP"  # the walk comes first
    ),
}
SPELLING = {"LTURN": "I_TURN_LEFT", "RTURN": "I_TURN_RIGHT", "JUMP": "I_JUMP", "WALK": "I_WALK"}


class TestScan:
    def test_equals_the_published_pairs(self):
        with gzip.open(shared_data("scan/tasks.txt.gz"), "rt") as file:
            published = [tuple(line.strip().removeprefix("IN: ").split(" OUT: ")) for line in file]
        assert sorted(scan_pairs()) == sorted(published)

    @pytest.mark.parametrize("command", FIGURE_1)
    def test_examples_of_the_paper(self, command):
        actions = " ".join(SPELLING[action] for action in FIGURE_1[command].split())
        assert dict(scan_pairs())[command] == actions

    def test_all_commands_once_and_no_others(self):
        commands = [command for command, _ in scan_pairs()]
        assert len(commands) == len(set(commands)) == 20910
        assert {word for command in commands for word in command.split()} == set(
            "walk look run jump turn left right opposite around twice thrice and after".split()
        )
        assert not {"turn", "turn twice", "walk and turn", "left", "walk twice left"} & set(commands)

    def test_order_and_shuffle_never_change(self):
        assert scan_pairs()[:2] == [("walk", "I_WALK"), ("walk twice", "I_WALK I_WALK")]
        train, test = scan_split(seed=0)
        assert train[0][0] == "turn around left thrice and look opposite right twice"
        assert test[0][0] == "look around left and run opposite right thrice"

    def test_split_is_a_partition(self):
        train, test = scan_split(4182, seed=3)
        assert (len(train), len(test)) == (16728, 4182)
        assert sorted(train + test) == sorted(scan_pairs())
        assert len(scan_split()[1]) == 1000

    def test_seed_decides_the_split(self):
        assert scan_split(50, seed=1) == scan_split(50, seed=1)
        assert set(scan_split(50, seed=1)[1]) != set(scan_split(50, seed=2)[1])

    @pytest.mark.parametrize("num_test", [-1, 0, 20910])
    def test_split_refuses_an_empty_part(self, num_test):
        with pytest.raises(ValueError, match=f"from 1 to 20909, got {num_test}"):
            scan_split(num_test)


class TestWilsonInterval:
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3.
    @pytest.mark.parametrize(
        "successes, total, low, high",
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_textbook(self, successes, total, low, high):
        assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize("confidence, z", [(0.9, 1.6448536269514722), (0.99, 2.5758293035489004)])
    def test_limits_solve_the_score_equation(self, confidence, z):
        for limit in wilson_interval(7, 30, confidence=confidence):
            assert abs(7 / 30 - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / 30), rel=1e-9)

    @pytest.mark.parametrize("total", [1, 3, 200, 10**6])
    def test_none_and_all(self, total):
        z2 = 1.959963984540054**2
        low, high = wilson_interval(0, total)
        assert 0 <= low < 1e-12
        assert high == pytest.approx(z2 / (total + z2), rel=1e-9)
        low, high = wilson_interval(total, total)
        assert low == pytest.approx(total / (total + z2), rel=1e-9)
        assert 1 - 1e-12 < high <= 1

    @pytest.mark.parametrize(
        "arguments, confidence, message",
        [
            ((0, 0), 0.95, "`total` must be 1 or above, got 0"),
            ((-1, 5), 0.95, r"`successes` must be from 0 to `total` \(5\), got -1"),
            ((6, 5), 0.95, r"`successes` must be from 0 to `total` \(5\), got 6"),
            ((1, 5), 0.0, "`confidence` must lie between 0 and 1, both excluded, got 0.0"),
            ((1, 5), 95, "got 95: write 95 % as 0.95"),
        ],
    )
    def test_refuses(self, arguments, confidence, message):
        with pytest.raises(ValueError, match=message):
            wilson_interval(*arguments, confidence=confidence)


# Prompts of different length, so that every batch pads; completions of different length, so that rows end apart.
PAIRS = {
    "a": "x",
    "b": "y y y",
    "a b": "z",
    "b a": "x y z x",
    "a a a a": "y",
    "c b a b a": "z z",
    "c c c c c c c": "x z y",
    "b c": "y z",
}
PROMPTS, REFERENCES = list(PAIRS), list(PAIRS.values())
UNSEEN = ["c", "a c b", "c a", "a b c a b c", "b b b b b", "a c a c", "c c c", "b a c"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <{{ message.role }}> {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def as_messages(prompt):
    return [{"role": "user", "content": prompt}]


@pytest.fixture(scope="module")
def tokenizer():
    # LlamaConfig's own EOS, id 2, is a word of no completion: only the tokenizer's EOS ends one.
    words = "<unk> a b c x y z junk <user> <assistant> <bos> <eos> <pad>".split()
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def training_batch(tokenizer):
    # "junk" after EOS makes a completion wrong unless generation stops at EOS.
    rows, labels = [], []
    for prompt, completion in PAIRS.items():
        chat = tokenizer.apply_chat_template(as_messages(prompt), add_generation_prompt=True)["input_ids"]
        for prompt_ids in (tokenizer(prompt)["input_ids"], chat):
            completion_ids = tokenizer(f"{completion} <eos> junk junk", add_special_tokens=False)["input_ids"]
            rows.append(prompt_ids + completion_ids)
            labels.append([-100] * len(prompt_ids) + completion_ids)
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return input_ids, torch.tensor([row + [-100] * (length - len(row)) for row in labels])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    input_ids, labels = training_batch(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02
    return model


def matches(model, tokenizer, prompts=PROMPTS, references=REFERENCES, **kwargs):
    return exact_match(model, tokenizer, prompts, references, **{"max_new_tokens": 12, "progress": False} | kwargs)


class TestExactMatch:
    def test_learnt_pairs_match(self, model, tokenizer):
        assert matches(model, tokenizer) == [True] * 8

    def test_other_references_do_not(self, model, tokenizer):
        assert matches(model, tokenizer, references=[text + " x" for text in REFERENCES]) == [False] * 8
        assert matches(model, tokenizer, references=["z"] + REFERENCES[1:]) == [False] + [True] * 7
        # A reference is not a prefix of what was written, and special tokens are not part of the text.
        assert (
            matches(model, tokenizer, ["b"], ["y y"]) == matches(model, tokenizer, ["b"], ["y y y <eos>"]) == [False]
        )

    def test_whitespace_at_the_ends_is_ignored(self, model, tokenizer):
        assert matches(model, tokenizer, ["b", "b"], [" y y y\n", "y  y y"]) == [True, False]

    def test_conversational(self, model, tokenizer):
        assert matches(model, tokenizer, [as_messages(prompt) for prompt in PROMPTS]) == [True] * 8

    def test_most_likely_tokens_are_taken(self, model, tokenizer, monkeypatch):
        monkeypatch.setattr(model.generation_config, "do_sample", True)
        handle = model.lm_head.register_forward_hook(lambda module, args, logits: logits / 100)  # flat, same order
        try:
            assert matches(model, tokenizer) == [True] * 8
        finally:
            handle.remove()

    def test_prompts_as_the_model_sees_them(self, model, tokenizer, monkeypatch):
        seen = []
        monkeypatch.setattr(
            model, "generate", lambda **kwargs: seen.append(kwargs) or LlamaForCausalLM.generate(model, **kwargs)
        )
        prompts = [prompt for text in PROMPTS for prompt in (text, as_messages(text))]
        matches(model, tokenizer, prompts, [""] * 16, batch_size=4)
        # A batch goes on without the rows that ended.
        starts = [call for call in seen if len(call["input_ids"]) == 4]
        assert len(starts) == 4 and max(len(call["input_ids"]) for call in seen) == 4
        for call in starts:
            input_ids, attention_mask = call["input_ids"], call["attention_mask"]
            assert ((input_ids == tokenizer.bos_token_id).sum(-1) == 1).all()
            assert ((input_ids == tokenizer.pad_token_id) == (attention_mask == 0)).all()
            assert attention_mask[:, -1].all()
            of_user = (input_ids == tokenizer.convert_tokens_to_ids("<user>")).any(-1)
            assert (of_user == (input_ids[:, -1] == tokenizer.convert_tokens_to_ids("<assistant>"))).all()
        assert any((call["attention_mask"] == 0).any() for call in seen)

    def test_length_limit(self, model, tokenizer):
        assert matches(model, tokenizer, ["b", "a"], ["y y", "x"], max_new_tokens=2) == [True, True]
        assert matches(model, tokenizer, ["b", "a"], ["y y y", "x"], max_new_tokens=2) == [False, True]

    @pytest.mark.parametrize("batch_size", [1, 3, 16])
    def test_batches_and_order_do_not_matter(self, model, tokenizer, batch_size):
        prompts = [prompt for pair in zip(PROMPTS, UNSEEN, strict=True) for prompt in pair]
        references = [text for pair in zip(REFERENCES, [""] * 8, strict=True) for text in pair]
        expected = [True, False] * 8
        assert matches(model, tokenizer, prompts, references, batch_size=batch_size) == expected
        turned = matches(model, tokenizer, prompts[::-1], references[::-1], batch_size=batch_size)
        assert turned == expected[::-1]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_tokenizer_is_left_as_it_was(self, model, tokenizer, monkeypatch, side):
        monkeypatch.setattr(tokenizer, "padding_side", side)
        assert matches(model, tokenizer) == [True] * 8
        assert tokenizer.padding_side == side

    @pytest.mark.parametrize("training", [True, False])
    def test_evaluates_in_eval_mode_and_restores_the_mode(self, model, tokenizer, monkeypatch, training):
        for layer in model.model.layers:
            monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.99)
        model.train(training)
        assert matches(model, tokenizer) == [True] * 8
        assert {module.training for module in model.modules()} == {training}

    def test_nothing_to_do(self, model, tokenizer):
        assert matches(model, tokenizer, [], []) == []

    def test_refuses_lists_of_different_length(self, model, tokenizer):
        with pytest.raises(ValueError, match="got 7 for 8 prompts"):
            matches(model, tokenizer, references=REFERENCES[1:])
