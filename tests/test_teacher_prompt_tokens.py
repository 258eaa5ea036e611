"""Tokens of a teacher's own prompt, and what of it is refused."""

import copy

import pytest
from datasets import Dataset
from runs import TOKENIZER, make_rows, make_teacher, make_trainer, shown_rows, to_ids, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grkd_trl.data import DataCollatorForGroups, encode_teacher_prompt, tokenize_group
from grkd_trl.teacher import LocalTeacher, cache_soft_labels, score_groups


class TestTokens:
    def test_batch(self):
        rows = [
            {"prompt_ids": [5, 6], "completion_ids": [[7, 8, 1], [9, 1]], "teacher_prompt_ids": [10, 11, 12]},
            {"prompt_ids": [5], "completion_ids": [[7, 8, 9, 1]], "teacher_prompt_ids": [5]},
        ]
        batch = DataCollatorForGroups(pad_token_id=0, max_length=4)(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 1], [5, 7, 8, 9]]
        assert batch["teacher_input_ids"].tolist() == [[10, 11, 12, 7, 8], [10, 11, 12, 9, 1], [5, 7, 8, 9, 0]]
        assert batch["teacher_completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
        assert batch["teacher_attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 1, 0]]

    @staticmethod
    def merging():
        """A tokenizer in which a space merges with the digit after it."""
        vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *"abc=4", "Ġ", "Ġ4", "Ġa"])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "4"), ("Ġ", "a")]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")

    def test_what_merges_with_the_completion_is_left_out_of_both(self):
        tokenizer = self.merging()
        row = {"prompt": "a= ", "teacher_prompt": "b=a= ", "completions": ["4", "4c"]}
        ids = tokenize_group(row, 0, processing_class=tokenizer)
        whole = tokenizer("b=a= 4<eos>")["input_ids"]
        assert ids["teacher_prompt_ids"] + ids["completion_ids"][0] == whole
        with pytest.raises(ValueError, match="`prompt` of row 3 ends in"):
            tokenize_group(row | {"teacher_prompt": "b=a="}, 3, processing_class=tokenizer)

    def test_messages_and_tools_reach_the_template(self):
        tokenizer = copy.deepcopy(TOKENIZER)
        tokenizer.chat_template = "{% if tools %}p {% endif %}{% for m in messages %}{{ m.content }} {% endfor %}"
        row = {
            "prompt": [{"role": "user", "content": "a"}],
            "teacher_prompt": [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}],
            "tools": [{"type": "function"}],
        }
        assert tokenizer.decode(encode_teacher_prompt(tokenizer, row, tokenizer("p a")["input_ids"], 0)) == "p b a"


class TestRefusals:
    @pytest.mark.parametrize(
        "shown, message",
        [
            ("", "`teacher_prompt` of row 1 is ''"),
            (3, "`teacher_prompt` of row 1 is 3"),
            ([{"role": "user", "content": "a"}], "`teacher_prompt` of row 1 is messages and `prompt` is text"),
        ],
    )
    def test_bad_cells(self, shown, message):
        row = make_rows(1)[0] | {"teacher_prompt": shown}
        with pytest.raises(ValueError, match=message):
            tokenize_group(row, 1, processing_class=TOKENIZER)
        with pytest.raises(ValueError, match=message.replace("row 1", "row 0")):
            LocalTeacher(make_teacher(), TOKENIZER).score(
                [row["prompt"]], [row["completions"]], columns={"teacher_prompt": [shown]}
            )

    @pytest.mark.parametrize("method", ["GRKD", "KD", "SimPO"])
    def test_context(self, tmp_path, method):
        rows = shown_rows()
        rows[2]["teacher_prompt"] = "a " * 31
        teacher = make_teacher(max_position_embeddings=32)
        with pytest.raises(ValueError, match="`teacher_prompt` of row 2 has 31 tokens.*context holds 32"):
            make_trainer(tmp_path, rows, method=method, teacher_model=teacher)

    def test_context_of_a_stream_cache_and_online_groups(self, tmp_path):
        rows = shown_rows()
        rows[2]["teacher_prompt"] = "a " * 31
        teacher, message = make_teacher(max_position_embeddings=32), "`teacher_prompt` of row 2 has 31 tokens"
        dataset = Dataset.from_list(rows)
        with pytest.raises(ValueError, match=message):
            train(tmp_path, train_dataset=dataset.to_iterable_dataset(), teacher_model=teacher, max_steps=1)
        with pytest.raises(ValueError, match=message):
            cache_soft_labels(teacher, TOKENIZER, dataset, k=4, progress=False)
        with pytest.raises(ValueError, match=message):
            score_groups(teacher, TOKENIZER, dataset, progress=False)
        with pytest.raises(ValueError, match=message):
            prompts = dataset.remove_columns("completions")
            fields = {"completion_source": "student", "max_completion_length": 6, "num_completions": 2}
            make_trainer(tmp_path, train_dataset=prompts, teacher_model=teacher, **fields)

    def test_tokenized_without_its_ids(self, tmp_path):
        rows = [{**to_ids(row), "teacher_prompt": "a "} for row in make_rows(scores=False)]
        with pytest.raises(ValueError, match="`teacher_prompt` without `teacher_prompt_ids`"):
            make_trainer(tmp_path, rows)

    def test_minillm(self, tmp_path):
        with pytest.raises(ValueError, match="MiniLLM draws each token"):
            make_trainer(tmp_path, shown_rows(), method="MiniLLM")

    def test_images(self):
        row = {"prompt": "a ", "teacher_prompt": "b ", "images": [object()]}
        with pytest.raises(ValueError, match="Row 2 has images and a `teacher_prompt`"):
            encode_teacher_prompt(TOKENIZER, row, [4], 2)
