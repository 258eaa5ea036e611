"""Prompts whose token ids a model wrote: text that was edited beside them, and another chat template than the writer's."""

import pytest
from datasets import Dataset
from runs import FIELDS
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model
from tokenizers import normalizers

from grkd_trl import SeqKDConfig, SeqKDTrainer
from grkd_trl.data import encode_prompt, prepare_groups, tokenize_group, tokenizer_hash
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher, cache_soft_labels, score_groups


USER = {"role": "user", "content": " Name a colour. "}
SYSTEM = {"role": "system", "content": "Be brief."}
SILENT = CHAT_TEMPLATES["plain"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES.get(template, template)
    return tokenizer


def written(tokenizer, prompt):
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("red", "blue")]
    row = {"prompt": prompt, "completions": ["red", "blue"], "completion_ids": ids, "clipped": [False, False]}
    return row | {"prompt_ids": encode_prompt(tokenizer, prompt), "tokenizer_hash": tokenizer_hash(tokenizer)}


@pytest.mark.parametrize("template", ["plain", "llama3", "gemma2", "qwen"])
@pytest.mark.parametrize(
    "before, after",
    [("1 + 1 =", "1 + 2 ="), ([USER], [SYSTEM, USER]), ([USER], [USER | {"content": "Name a bird."}])],
    ids=["text", "system prompt", "message"],
)
def test_edited_prompts(template, before, after, tmp_path):
    tokenizer = tokenizer_with(template)
    row, edited = written(tokenizer, before), written(tokenizer, before) | {"prompt": after}
    assert tokenize_group(row, 0, processing_class=tokenizer)["prompt_ids"] == encode_prompt(tokenizer, before)
    with pytest.raises(
        ValueError, match="`prompt` of row 3 holds text that is not in its `prompt_ids`, .*drop the col"
    ):
        tokenize_group(edited, 3, processing_class=tokenizer)
    model = tiny_model("llama", len(tokenizer))
    for read in (score_groups, cache_soft_labels):
        with pytest.raises(ValueError, match="`prompt` of row 0 holds text that is not in its `prompt_ids`"):
            read(model, tokenizer, Dataset.from_list([edited]))
    config = GroupsConfig(str(tmp_path), completion_source="dataset")
    with pytest.raises(ValueError, match="`prompt` of row 0 holds text that is not in its `prompt_ids`"):
        generate_groups(Dataset.from_list([edited]), config, teacher=LocalTeacher(model, tokenizer))


def test_a_template_that_does_not_show_the_system_prompt():
    tokenizer = tokenizer_with(SILENT)
    row = written(tokenizer, [SYSTEM, USER])
    assert tokenize_group(row, 0, processing_class=tokenizer)["prompt_ids"] == encode_prompt(tokenizer, [USER])


@pytest.mark.parametrize("template, warns", [("plain", False), ("qwen", True)])
def test_another_template_is_told(template, warns, caplog):
    groups = Dataset.from_list([written(tokenizer_with("plain"), [USER])])
    with caplog.at_level("WARNING"):
        prepare_groups(groups, tokenizer_with(template))
    assert ("were written with another chat template" in caplog.text) == warns


@pytest.mark.parametrize("template", ["qwen", "{{ raise_exception('no such role') }}"])
def test_ids_of_a_template_that_the_reader_has_not(template, caplog):
    """They are of the same text, which the tokenizer normalizes."""
    writer, reader = tokenizer_with("plain"), tokenizer_with(template)
    for tokenizer in (writer, reader):
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = written(writer, [SYSTEM, USER | {"content": "Cafe\u0301 noir."}])
    assert tokenize_group(row, 0, processing_class=reader)["prompt_ids"] == row["prompt_ids"]
    with caplog.at_level("WARNING"):
        assert prepare_groups(Dataset.from_list([row]), reader)[0]["prompt_ids"] == row["prompt_ids"]
    assert "were written with another chat template" in caplog.text
    with pytest.raises(ValueError, match="`prompt` of row 0 holds text that is not in its `prompt_ids`"):
        tokenize_group(row | {"prompt": [SYSTEM, USER]}, 0, processing_class=reader)


@pytest.mark.parametrize("student", ["qwen", "plain", None])
def test_seqkd_trains_in_the_format_of_the_student(student, tmp_path):
    for name, template in (("student", student), ("teacher", "plain")):
        tokenizer = tokenizer_with(template)
        tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    args = SeqKDConfig(str(tmp_path / "out"), decoding="greedy", max_completion_length=4, **FIELDS)
    data = Dataset.from_list([{"prompt": [USER]}])
    trainer = SeqKDTrainer(str(tmp_path / "student"), str(tmp_path / "teacher"), args, train_dataset=data)
    expected = encode_prompt(
        tokenizer_with(student or "plain"), [USER]
    )  # without a template the teacher's is all there is
    assert trainer.train_dataset[0]["prompt_ids"] == expected
