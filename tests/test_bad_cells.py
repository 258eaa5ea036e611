"""Cells, datasets, tokenizers, scorers and teachers that are not as they should be: refused by name, or read aright."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import METHODS, TOKENIZER, make_rows, make_student, make_teacher, make_trainer, train
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model, tiny_tokenizer
from trl.trainer.utils import remove_none_values

from grkd_trl.data import prepare_groups, tokenize_group
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.scoring import refuse_not_finite
from grkd_trl.teacher import CallableScorer, LocalTeacher, cache_soft_labels, generate_completions, score_groups


USER = [{"role": "user", "content": "a"}]
MESSAGE = {"role": "assistant", "content": "b"}

# A row, and what its error says beside "row 7"
CELLS = {
    "completions as text": ({"prompt": "a ", "completions": "hello"}, "`completions` .*'hello' .str.: give a list"),
    "completion None": ({"prompt": "a ", "completions": ["b", None]}, "Completion 1 .*`completions`, is None"),
    "completion a number": ({"prompt": "a ", "completions": [4, 5]}, "Completion 0 .*`completions`, is 4 .int."),
    "completion without messages": ({"prompt": USER, "completions": ["b", []]}, "Completion 1 .*is \\[\\]"),
    "completion None in a chat": ({"prompt": USER, "completions": ["b", None]}, "Completion 1 .*`completions`, is None"),
    "no role": ({"prompt": USER, "completions": ["b", [{"content": "b"}]]}, "Completion 1 .*which is no message"),
    "text and messages": ({"prompt": "a ", "completions": ["b", [MESSAGE]]}, "is text and completion 1.*is messages"),
    "content a number": ({"prompt": [{"role": "user", "content": 5}], "completions": ["b", "c"]}, "content 5 .int."),
    "ids without a prompt": (
        {"prompt": "a ", "completions": ["b", "c"], "completion_ids": [[5], [6]], "tokenizer_hash": "0"},
        "`prompt_ids` .*is None",
    ),
    "ids of one completion": (
        {"prompt": "a ", "completions": ["b", "c"], "prompt_ids": [4], "completion_ids": [[5]], "tokenizer_hash": "0"},
        "`completion_ids` .*1 entries for 2",
    ),
    "chosen None": ({"prompt": "a ", "chosen": None, "rejected": "b"}, "`chosen` .*is None"),
    "chosen None, prompt in it": ({"chosen": None, "rejected": "b"}, "`chosen` .*is None"),
    "rejected a number": ({"chosen": "b", "rejected": 1.5}, "`rejected` .*is 1.5 .float."),
    "chosen one message": ({"prompt": USER, "chosen": MESSAGE, "rejected": MESSAGE}, "`chosen` .*one message.*wrap it"),
    "chosen text, rejected messages": ({"prompt": USER, "chosen": "b", "rejected": [MESSAGE]}, "must both be text"),
    "prompt one message": ({"prompt": USER[0], "completions": ["b", "c"]}, "`prompt` .*one message.*wrap it in a list"),
    "prompt a number": ({"prompt": 3, "completions": ["b", "c"]}, "`prompt` .*is 3 .int."),
    "scores as text": ({"prompt": "a ", "completions": ["b", "c"], "teacher_scores": ["1", "2"]}, "`teacher_scores`.*'1'"),
    "score of chosen as text": (
        {"prompt": "a ", "chosen": "b", "rejected": "c", "score_chosen": "8.0", "score_rejected": "7.0"},
        "`score_chosen` .*'8.0'",
    ),
    "one score": ({"prompt": "a ", "completions": ["b", "c"], "teacher_scores": 0.5}, "`teacher_scores` .*give a list"),
    "score beyond float32": (
        {"prompt": "a ", "completions": ["b", "c"], "teacher_scores": [1e39, 0.0]}, "`teacher_scores` .*1e.39.*float32"
    ),
    "clipped None": ({"prompt": "a ", "completions": ["b", "c"], "clipped": [None, True]}, "`clipped` .*None.*`True` or"),
}  # fmt: skip


class TestCells:
    @pytest.mark.parametrize("row, says", CELLS.values(), ids=CELLS)
    def test_are_refused_with_field_and_row(self, row, says):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATES["qwen"]
        with pytest.raises(ValueError, match=says) as caught:
            tokenize_group(row, 7, processing_class=tokenizer)
        assert "row 7" in str(caught.value)

    @pytest.mark.parametrize("name", ["completions as text", "completion None", "completion a number"])
    def test_by_whatever_reads_them(self, name, tmp_path):
        row, says = CELLS[name]
        good = {"prompt": "a ", "completions": ["b", "c"]} if name == "completion None" else row
        dataset = Dataset.from_list([good, row])
        config = GroupsConfig(str(tmp_path / "groups"), completion_source="dataset")
        scorer = CallableScorer(lambda prompts, completions, **columns: [[1.0] * len(group) for group in completions])
        with pytest.raises(ValueError, match=says):
            generate_groups(dataset, config, scorer=scorer)
        with pytest.raises(ValueError, match=says):
            score_groups(make_teacher(), tiny_tokenizer(), dataset, progress=False)
        with pytest.raises(ValueError, match=says):
            make_trainer(tmp_path, [good, row], method="KD", teacher_model=make_teacher())

    def test_numbers_of_other_types_are_read(self):
        row = {"prompt": "a ", "completions": ["b", "c", "d"], "teacher_scores": [np.float32(1.5), True, 2]}
        assert tokenize_group(row, 0, processing_class=tiny_tokenizer())["teacher_scores"] == [1.5, True, 2]


class TestEmptyDatasets:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
    def test_are_named(self, method, name, tmp_path):
        rows, empty = Dataset.from_list(make_rows()), Dataset.from_list(make_rows()).select([])
        datasets = {"train_dataset": rows, "eval_dataset": rows} | {name: empty}
        with pytest.raises(ValueError, match=f"`{name}` is empty: it has no row"):
            make_trainer(tmp_path, method=method, teacher_model=make_teacher(), **datasets)

    def test_in_a_dictionary_and_in_a_stream(self, tmp_path):
        rows = make_rows()
        evaluation = {"good": Dataset.from_list(rows), "bad": Dataset.from_list(rows).select([])}
        with pytest.raises(ValueError, match=r"`eval_dataset\['bad'\]` is empty"):
            make_trainer(tmp_path, rows, teacher_model=make_teacher(), eval_dataset=evaluation)
        stream = IterableDataset.from_generator(lambda: iter(()))
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            make_trainer(tmp_path, teacher_model=make_teacher(), train_dataset=stream, max_steps=1)

    def test_elsewhere(self, tmp_path):
        empty = Dataset.from_list(make_rows()).select([])
        with pytest.raises(ValueError, match="The eval dataset is empty"):
            prepare_groups(empty, tiny_tokenizer(), name="eval")
        with pytest.raises(ValueError, match="`dataset` is empty"):
            generate_groups(empty, GroupsConfig(str(tmp_path)), student=LocalTeacher(make_student(), tiny_tokenizer()))
        assert len(score_groups(make_teacher(), tiny_tokenizer(), empty, progress=False)) == 0


class TestTokenizers:
    def test_without_eos(self):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        row = {"prompt": "a ", "completions": ["b", "c"]}
        with pytest.raises(ValueError, match="The tokenizer has no `eos_token`.*Set one"):
            tokenize_group(row, 0, processing_class=tokenizer)
        cut = tokenize_group(row | {"clipped": [True, True]}, 0, processing_class=tokenizer)  # nothing ends
        assert [tokenizer.decode(ids) for ids in cut["completion_ids"]] == ["b", "c"]
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} g {% endfor %}"
        chat = tokenize_group({"prompt": USER, "completions": ["b", "c"]}, 0, processing_class=tokenizer)
        assert [tokenizer.decode(ids) for ids in chat["completion_ids"]] == ["b g", "c g"]

    def test_without_eos_and_pad(self):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = tokenizer.pad_token = None
        with pytest.raises(ValueError, match="neither a `pad_token` nor an `eos_token`"):
            generate_completions(make_student(), tokenizer, ["a", "a b"], max_new_tokens=2, progress=False)


def losses(folder, method="GRKD", dataset=None, **kwargs):
    trainer, _ = train(
        folder, method=method, teacher_model=make_teacher(), max_steps=2, train_dataset=dataset, **kwargs
    )
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestColumnsAndFormats:
    @pytest.mark.parametrize("method", ["GRKD", "PRO", "MiniLLM", "DPO"])
    @pytest.mark.parametrize("values", [["r1", "r2", "r3", "r4"], [1, None, 2, 3]], ids=["text", "numbers"])
    def test_a_column_named_row_changes_nothing(self, method, values, tmp_path):
        rows = Dataset.from_list(make_rows())
        fields = {"max_completion_length": 4} if method == "MiniLLM" else {}
        expected = losses(tmp_path, method, rows, **fields)
        assert losses(tmp_path, method, rows.add_column("row", values), **fields) == expected

    @pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
    @pytest.mark.parametrize("method", ["GRKD", "SeqKD", "MiniLLM", "DPO"])
    def test_formats_change_nothing(self, method, kind, tmp_path):
        rows = Dataset.from_list(make_rows())
        fields = {"max_completion_length": 4} if method in ("MiniLLM", "SeqKD") else {}
        expected = losses(tmp_path, method, rows, **fields)
        assert losses(tmp_path, method, rows.with_format(kind), **fields) == expected

    @pytest.mark.parametrize("method", ["GRKD", "SimPO", "SeqKD", "MiniLLM"])
    def test_transforms_are_applied(self, method, tmp_path):
        rows = make_rows(scores=False)
        raw = Dataset.from_list([{"question": row["prompt"], "answers": row["completions"]} for row in rows])

        def transform(batch):
            return {"prompt": batch["question"], "completions": batch["answers"]}

        fields = {"max_completion_length": 4} if method in ("MiniLLM", "SeqKD") else {}
        expected = losses(tmp_path, method, Dataset.from_list(rows), **fields)
        assert losses(tmp_path, method, raw.with_transform(transform), **fields) == expected

    def test_generate_groups_applies_a_transform(self, tmp_path):
        """TRL's cure for the fields with which Arrow fills tool calls."""
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}\n{% endfor %}"
        )
        calls = [
            [{"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]}]
            for name, arguments in (("f", {"x": 1}), ("g", {"y": 2}))
        ]
        rows = Dataset.from_list([{"prompt": USER, "completions": calls}]).with_transform(remove_none_values)
        scorer = CallableScorer(lambda prompts, completions, **columns: [[1.0, 0.0]] * len(prompts))
        made = generate_groups(rows, GroupsConfig(str(tmp_path), completion_source="dataset"), scorer=scorer)
        for dataset in (rows, made):
            ids = prepare_groups(dataset, tokenizer)[0]["completion_ids"]
            texts = [tokenizer.decode(own) for own in ids]
            assert ['"x": 1' in texts[0], '"y": 2' in texts[1]] == [True, True] and "null" not in "".join(texts)


class TestToolCalls:
    @pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}], ids=["None", "absent", "empty"])
    def test_are_scored_as_they_are_trained_on(self, content, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}:{% if m.content %}{{ m.content }}{% endif %}"
            "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        call = [{"role": "assistant", **content, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]
        group = [call, [{"role": "assistant", "content": "No."}]]
        rows = Dataset.from_list([{"prompt": USER, "completions": group}])
        model = tiny_model("llama", len(tokenizer), initializer_range=0.3).eval()
        ids = prepare_groups(rows, tokenizer)[0]
        assert '{"name": "f", "arguments": {"x": 1}}' in tokenizer.decode(ids["completion_ids"][0])
        with torch.no_grad():
            expected = []
            for own in ids["completion_ids"]:
                logits = model(input_ids=torch.tensor([ids["prompt_ids"] + own])).logits[
                    0, len(ids["prompt_ids"]) - 1 : -1
                ]
                expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(own)[:, None]).mean().item())
        assert score_groups(model, tokenizer, rows, progress=False)["teacher_scores"][0] == pytest.approx(
            expected, abs=1e-5
        )
        config = GroupsConfig(str(tmp_path), completion_source="dataset")
        made = generate_groups(rows, config, teacher=LocalTeacher(model, tokenizer))
        assert made["teacher_scores"][0] == pytest.approx(expected, abs=1e-5)


class TestScoreFunctions:
    @pytest.mark.parametrize(
        "given, says",
        [
            ([1.0, 0.0, 1.0, 0.0], r"returned \[1.0, 0.0, 1.0, 0.0\] scores for groups of \[2, 2\]"),
            (None, "returned None scores"),
            ([[1.0, 0.0]], r"returned \[2\] scores for groups of \[2, 2\]"),
            ({"a": [1.0, 0.0], "b": [1.0, 0.0]}, "returned {"),
            (["ab", "cd"], "scores for groups of"),
            ([[1.0, "0.5"], [1.0, 0.0]], "returned '0.5' for completion 1 of prompt 0"),
            ([[1.0, 1e39], [1.0, 0.0]], r"returned 1e\+39 for completion 1 of prompt 0"),
            ([[1.0, -math.inf], [1.0, 0.0]], "returned -inf for completion 1 of prompt 0"),
        ],
        ids=str,
    )
    def test_wrong_returns(self, given, says):
        scorer = CallableScorer(lambda prompts, completions, **columns: given)
        with pytest.raises(ValueError, match=f"{says}.*Return a list for each prompt"):
            scorer.score(["a", "b"], [["x", "y"], ["x", "y"]])

    @pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
    def test_arrays(self, make):
        scorer = CallableScorer(lambda prompts, completions, **columns: make([[1.0, math.nan], [1.5, 0.0]]))
        scores = scorer.score(["a", "b"], [["x", "y"], ["x", "y"]]).scores
        assert scores[1] == [1.5, 0.0] and scores[0][0] == 1.0 and math.isnan(scores[0][1])

    @pytest.mark.parametrize("name", ["prompts", "completions"])
    def test_a_column_of_the_name_of_an_argument(self, name):
        scorer = CallableScorer(lambda prompts, completions, **columns: [[1.0, 0.0]])
        with pytest.raises(ValueError, match=f"a column `{name}`.*Rename the column"):
            scorer.score(["a"], [["x", "y"]], columns={name: ["q"]})


def broken_teacher(value=math.nan):
    model = make_teacher(dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = value
    return model


class TestTeachersThatAreNotFinite:
    ROWS = Dataset.from_list(make_rows(scores=False))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_are_named_as_such(self, value):
        tokenizer = tiny_tokenizer()
        says = "logits are not finite in rows .*float16.*weights that are not finite"
        with pytest.raises(ValueError, match=f"The teacher's {says}"):
            score_groups(broken_teacher(value), tokenizer, self.ROWS, progress=False)
        with pytest.raises(ValueError, match=f"The teacher's {says}"):
            cache_soft_labels(broken_teacher(value), tokenizer, self.ROWS, k=3, progress=False)
        with pytest.raises(ValueError, match=says):
            LocalTeacher(broken_teacher(value), tokenizer).generate(["a"], 2, seed=1, max_new_tokens=3)
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=says):
                generate_completions(
                    broken_teacher(value), tokenizer, ["a"], temperature=temperature, max_new_tokens=3, progress=False
                )

    @pytest.mark.parametrize("method, fields", [("MiniLLM", {"max_completion_length": 4}), ("SeqKD", {}), ("PRO", {})])
    def test_before_a_weight_moves(self, method, fields, tmp_path):
        student = make_student(dtype=torch.float32)
        before = {name: value.clone() for name, value in student.named_parameters()}
        with pytest.raises(ValueError, match="logits are not finite"):
            make_trainer(
                tmp_path,
                method=method,
                model=student,
                teacher_model=broken_teacher(),
                train_dataset=self.ROWS,
                **fields,
            ).train()
        assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())

    def test_a_masked_vocabulary_is_no_such_thing(self):
        """A head whose bias rules a token out: what has the token cannot be scored, what has not is."""
        tokenizer, teacher = tiny_tokenizer(), make_teacher(dtype=torch.float32)
        teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        with torch.no_grad():
            teacher.lm_head.bias[tokenizer.convert_tokens_to_ids("c")] = -math.inf
        ((one, other),), _, _ = LocalTeacher(teacher, tokenizer).score(["a "], [["b", "c"]])
        assert math.isfinite(one) and math.isnan(other)
        texts, _ = generate_completions(
            teacher, tokenizer, ["a b"], num_completions=20, max_new_tokens=4, progress=False
        )
        assert not any("c" in text.split() for text in texts[0])
        rows = Dataset.from_list([{"prompt": "a ", "completions": ["b", "c"]}])
        with pytest.raises(ValueError, match="`completions` of row 0 .*position 1.*possible for the teacher"):
            score_groups(teacher, tokenizer, rows, progress=False)

    def test_which_rows(self):
        values = torch.tensor([[0.0, 1.0], [0.0, math.nan], [-math.inf, 0.0]])
        with pytest.raises(ValueError, match="Its values are not finite in rows 1, 2 of a batch of 3"):
            refuse_not_finite(values, "Its values")
        with pytest.raises(ValueError, match="in rows 1 of a batch of 3"):
            refuse_not_finite(values, "Its values", allow_impossible=True)
        refuse_not_finite(values[::2], "Its values", allow_impossible=True)


def test_scores_beyond_float32_never_reach_a_step(tmp_path):
    rows = make_rows()
    rows[2]["teacher_scores"][0] = -1e39
    with pytest.raises(ValueError, match="`teacher_scores` of row 2 holds -1e.39 for completion 0.*finite in float32"):
        make_trainer(tmp_path, rows, soft_label="group")


class TestTokenizedByTheUser:
    GROUP = {"prompt_ids": [4], "completion_ids": [[5, 1], [6, 1]], "teacher_scores": [-1.0, -2.0]}

    @pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
    @pytest.mark.parametrize(
        "cell, message",
        [
            ({"teacher_scores": [math.nan, -1.0]}, "`teacher_scores` of row 1 holds nan for completion 0"),
            ({"teacher_scores": [-1.0, math.inf]}, "`teacher_scores` of row 1 holds inf for completion 1"),
            ({"teacher_scores": [-1.0]}, "`teacher_scores` of row 1 has 1 entries for 2 completions"),
            ({"completion_ids": [[5, 1], []]}, r"`completion_ids` of \[2, 0\] tokens"),
            ({"completion_ids": [[5, 1]], "teacher_scores": [-1.0]}, r"`completion_ids` of \[2\] tokens"),
            ({"prompt_ids": None}, "Row 1 has `prompt_ids` None"),
        ],
        ids=str,
    )
    def test_is_refused(self, cell, message, stream):
        groups = Dataset.from_list([self.GROUP, self.GROUP | cell])
        with pytest.raises(ValueError, match=message):
            list(prepare_groups(groups.to_iterable_dataset() if stream else groups, TOKENIZER))

    def test_is_not_cut_unless_it_says_so(self):
        rows = [self.GROUP, self.GROUP | {"clipped": [True, False]}]
        read = [prepare_groups(Dataset.from_list([row]), TOKENIZER)[0] for row in rows]
        assert [row["clipped"] for row in read] == [[False, False], [True, False]]
        assert read[0]["completion_ids"] == self.GROUP["completion_ids"]
