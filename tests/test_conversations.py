"""Conversations of a group, tokenized from where they part: the ids of each tokenized alone."""

import pytest
from pretrained import GEMMA3, SMOLLM2, needs
from test_written_ids import TEMPLATES, sentencepiece_tokenizer, with_tags
from tiny import byte_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from grkd_trl._trl import tokenize
from grkd_trl.data import conversations
from grkd_trl.data.conversations import encode_conversations


TEXTS = [
    "The answer is 4.",
    " 4 \n",
    "<think>\nOkay\n</think>\n\nHi 🦜",
    "<|im_start|>user",
    "Okay, the user said so.",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

OF_PROCESSORS = {"idefics3", "llava_next", "smolvlm"}  # which read parts alone


def of_group(prompt):
    prompt = [{"role": "user", "content": prompt}]
    answers = [(prompt + [{"role": "assistant", "content": text}], {}) for text in TEXTS]
    cut = (answers[0][0], {"continue_final_message": True})
    return [(prompt, {"add_generation_prompt": True}), *answers, cut]


def assert_ids_are_those_of_each_alone(tokenizer, **kwargs):
    for prompt in ("Hi", " What is 2 + 2?\n", "<|im_end|> ", "Hi"):  # the first is read whole
        group = of_group(prompt)
        expected = [tokenize(tokenizer, messages, **own, **kwargs)["input_ids"] for messages, own in group]
        assert encode_conversations(tokenizer, group, **kwargs) == expected


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - OF_PROCESSORS))
def test_ids_of_templates(template):
    tokenizer = with_tags(byte_tokenizer())
    tokenizer.chat_template = TEMPLATES[template]
    assert_ids_are_those_of_each_alone(tokenizer)
    assert ("<|im_start|>" in conversations._CUTS[tokenizer][1]) == ("<|im_start|>" in TEMPLATES[template])


@pytest.mark.parametrize(
    "other",
    [
        {"content": "\n<|im_start|>"},
        {"content": "x<"},
        {"content": "<|im_start|>user\nWhat"},
        {"content": "<|im_end|>\n", "rstrip": True},
        {"content": "\n", "single_word": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [{}, {"lstrip": True}, {"single_word": True}, {"normalized": True}], ids=str)
def test_ids_beside_other_added_tokens(own, other):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", **{"special": True, "normalized": False} | own)])
    tokenizer.add_tokens([AddedToken(**{"normalized": False} | other)])
    tokenizer.chat_template = CHATML
    assert_ids_are_those_of_each_alone(tokenizer)
    assert "<|im_start|>" not in conversations._CUTS[tokenizer][1] or not own


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_settings_that_change(make):
    tokenizer = with_tags(make())
    tokenizer.chat_template = CHATML
    assert_ids_are_those_of_each_alone(tokenizer)
    tokenizer.split_special_tokens = True
    assert_ids_are_those_of_each_alone(tokenizer)
    assert conversations._CUTS[tokenizer][1] == []
    tokenizer.split_special_tokens = False
    tokenizer.add_tokens(["t|im_start|>"])
    assert_ids_are_those_of_each_alone(tokenizer)


@pytest.mark.parametrize("path", [pytest.param(path, marks=needs(path)) for path in (SMOLLM2, GEMMA3)], ids=str)
def test_pretrained_tokenizers(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = tokenizer.chat_template or CHATML.replace("<|im_start|>", "<start_of_turn>")
    assert_ids_are_those_of_each_alone(tokenizer)
    assert conversations._CUTS[tokenizer][1]
