"""What users get wrong: an error before the first step, which names what was given, what is accepted, what to do."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from good_input import good_rows, make_trainer
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from grkd_trl.losses import token_relative_loss, token_soft_label_loss
from grkd_trl.scoring import predicted_mask


NAN, INF = math.nan, math.inf


@pytest.fixture
def refuse(tmp_path, tokenizer):
    """Make a trainer, expect an error with these words in it, and nothing written or lost."""
    earlier = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"trained before")

    def refuse(rows=None, *, says, error=ValueError, config=None, **kwargs):
        with pytest.raises(error) as caught:
            make_trainer(tmp_path, tokenizer, rows, config=config, **kwargs)
        missing = [word for word in says if word not in str(caught.value)]
        assert not missing, str(caught.value)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [earlier]
        assert earlier.read_bytes() == b"trained before"
        return str(caught.value)

    return refuse


def test_good_rows_are_accepted(tmp_path, tokenizer, warnings):
    """That what the tests below change is what is refused."""
    for rows in (good_rows(), good_rows(scores=False)):
        assert len(make_trainer(tmp_path, tokenizer, rows).train_dataset) == 6
    pairs = [{"prompt": "a b ", "chosen": "c", "rejected": "d", "score_chosen": 2.0, "score_rejected": 1.0}] * 6
    assert len(make_trainer(tmp_path, tokenizer, pairs).train_dataset) == 6
    assert warnings == []


# What is wrong with a row, and what the error says beside "row 3".
BAD_ROWS = {
    "one completion": (
        {"completions": ["d"], "teacher_scores": [1.0]},
        ["`completions`", "has 1 entries", "2 or more", "Sample more", "drop the row"],
    ),
    "no completions": (
        {"completions": [], "teacher_scores": []},
        ["`completions`", "has 0 entries", "2 or more", "drop the row"],
    ),
    "null completions": ({"completions": None}, ["`completions`", "has 0 entries", "2 or more", "drop the row"]),
    "scores too few": (
        {"teacher_scores": [1.0, 2.0]},
        ["`teacher_scores`", "has 2 entries for 3 completions", "one for each", "same order"],
    ),
    "scores too many": ({"teacher_scores": [1.0] * 4}, ["`teacher_scores`", "has 4 entries for 3", "one for each"]),
    "scores empty": ({"teacher_scores": []}, ["`teacher_scores`", "has 0 entries for 3", "one for each"]),
    "scores null": (
        {"teacher_scores": None},
        ["`teacher_scores`", "has 0 entries for 3", "in every row of the dataset or in none"],
    ),
    "score NaN": (
        {"teacher_scores": [1.0, NAN, 2.0]},
        ["`teacher_scores`", "nan for completion 1", "finite", "Drop the completion, or score it again"],
    ),
    "score infinite": (
        {"teacher_scores": [1.0, 2.0, -INF]},
        ["`teacher_scores`", "-inf for completion 2", "finite", "Drop the completion"],
    ),
    "score None": ({"teacher_scores": [None, 1.0, 2.0]}, ["`teacher_scores`", "None for completion 0", "finite"]),
    "empty prompt": ({"prompt": ""}, ["`prompt`", "''", "text or messages", "drop the row"]),
    "null prompt": ({"prompt": None}, ["`prompt`", "None", "text or messages", "drop the row"]),
    "flags too few": ({"clipped": [True]}, ["`clipped`", "has 1 entries for 3 completions", "one for each"]),
}


def with_bad_row(change, row=3):
    rows = [good | {"clipped": [False] * 3} for good in good_rows()]
    rows[row] |= change
    return rows


class TestRows:
    @pytest.mark.parametrize("change, says", BAD_ROWS.values(), ids=BAD_ROWS)
    def test_error_names_the_row(self, refuse, change, says):
        refuse(with_bad_row(change), says=["row 3", *says])

    @pytest.mark.parametrize("row", [0, 5])
    def test_first_and_last_row(self, refuse, row):
        refuse(with_bad_row({"completions": ["d"]}, row), says=[f"row {row} ", "`completions`", "has 1 entries"])

    @pytest.mark.parametrize("name", ["one completion", "score NaN"])
    def test_in_several_processes(self, refuse, name):
        change, says = BAD_ROWS[name]
        refuse(with_bad_row(change, row=5), config={"dataset_num_proc": 2}, says=["row 5", *says])

    @pytest.mark.parametrize("kind", ["dataset", "dict"])
    def test_rows_of_evaluation(self, refuse, kind):
        bad = Dataset.from_list(with_bad_row({"completions": ["d"]}))
        eval_dataset = bad if kind == "dataset" else {"good": Dataset.from_list(good_rows()), "bad": bad}
        refuse(eval_dataset=eval_dataset, says=["row 3", "`completions`", "has 1 entries"])

    def test_no_completions_list(self, refuse):
        rows = [{"prompt": "a b ", "teacher_scores": [1.0, 2.0]}] * 4
        refuse(rows, says=["Row 0", "['prompt', 'teacher_scores']", '"completions": [...]', '"chosen", "rejected"'])

    def test_unknown_columns_only(self, refuse):
        rows = [{"text": "a b", "label": 1}] * 4
        refuse(rows, says=["Row 0", "['label', 'text']", '{"prompt", "completions": [...]', '"chosen", "rejected"'])

    def test_no_prompt_column(self, refuse):
        refuse([{"completions": ["a", "b"]}] * 4, says=["`prompt` of row 0", "None", "text or messages"])

    def test_completion_without_tokens(self, refuse):
        rows = [row | {"clipped": [False, True, False]} for row in good_rows()]
        rows[3]["completions"] = ["d", "", "e"]
        refuse(rows, says=["`completions` of row 3", "position 1", "drop the empty completion"])

    @pytest.mark.parametrize(
        "scores, says",
        [
            ({"score_chosen": NAN, "score_rejected": 1.0}, ["`score_chosen`", "nan"]),
            ({"score_chosen": 2.0, "score_rejected": None}, ["`score_rejected`", "None"]),
            ({"score_chosen": 2.0, "score_rejected": INF}, ["`score_rejected`", "inf"]),
        ],
        ids=str,
    )
    def test_scores_of_a_preference(self, refuse, scores, says):
        rows = [{"prompt": "a b ", "chosen": "c", "rejected": "d", "score_chosen": 2.0, "score_rejected": 1.0}] * 6
        refuse([*rows[:3], rows[3] | scores, *rows[4:]], says=["row 3", *says, "finite"])

    def test_conversations(self, refuse, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
        rows = [{"prompt": [{"role": "user", "content": "a b"}], "completions": ["c", "d"]} for _ in range(5)]
        assert len(make_trainer(tmp_path, tokenizer, rows).train_dataset) == 5
        rows[3]["prompt"] = []
        refuse(rows, processing_class=tokenizer, says=["`prompt` of row 3", "[]", "text or messages"])

    def test_lazy_rows_are_refused_when_they_are_read(self, tmp_path, tokenizer):
        rows = with_bad_row({"completions": ["d"]})
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
            config={"max_steps": 2, "per_device_train_batch_size": 8},
        )
        with pytest.raises(ValueError, match="`completions` of row 3 has 1 entries"):
            trainer.train()
        assert trainer.state.global_step == 0


class TestTies:
    @staticmethod
    def rows(tied, num=6):
        rows = good_rows(num)
        for row in rows[:tied]:
            row["teacher_scores"] = [-2.0] * 3
        return rows

    @pytest.mark.parametrize("tied, share", [(6, "100.0%"), (3, "50.0%"), (1, "16.7%")])
    def test_warning_tells_the_share(self, tmp_path, tokenizer, warnings, tied, share):
        trainer = make_trainer(tmp_path, tokenizer, self.rows(tied))
        assert len(trainer.train_dataset) == 6
        (message,) = warnings
        assert message.startswith(f"{share} of the train groups have equal `teacher_scores`")
        assert "add nothing to the relative loss" in message and "Sample more varied completions" in message

    def test_min_gap_makes_ties(self, tmp_path, tokenizer, warnings):
        make_trainer(tmp_path, tokenizer, config={"min_gap": 1.9})  # below the gap of 2 between best and worst
        assert warnings == []
        make_trainer(tmp_path, tokenizer, config={"min_gap": 2.0})
        (message,) = warnings
        assert message.startswith("100.0%") and "min_gap=2.0" in message

    def test_evaluation_is_told_apart(self, tmp_path, tokenizer, warnings):
        make_trainer(tmp_path, tokenizer, eval_dataset={"hard": Dataset.from_list(self.rows(6))})
        (message,) = warnings
        assert message.startswith("100.0% of the hard groups")

    def test_ties_train_without_a_relative_loss(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, self.rows(6), config={"soft_label": "none", "max_steps": 1, "learning_rate": 0.1}
        )
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        assert trainer.train().training_loss == 0.0
        assert all(map(torch.equal, before, trainer.model.parameters()))


class TestTeacher:
    @pytest.mark.parametrize("soft_label", ["token", "group", "none"])
    def test_no_teacher_and_no_scores(self, refuse, soft_label):
        refuse(
            good_rows(scores=False),
            teacher_model=None,
            config={"soft_label": soft_label},
            says=["`teacher_model`", "`teacher_scores`", "Pass a teacher", "score the groups beforehand"],
        )

    @pytest.mark.parametrize("config", [{}, {"soft_label": "none", "relative_level": "tokens"}])
    def test_scores_without_a_teacher(self, refuse, config):
        refuse(
            teacher_model=None,
            config=config,
            says=[
                "`teacher_model`",
                '`soft_label="token"`',
                '`relative_level="tokens"`',
                '"group" or "none"'.replace(" or ", "` or `"),
            ],
        )

    def test_no_scores_in_evaluation(self, refuse):
        refuse(
            teacher_model=None,
            config={"soft_label": "none"},
            eval_dataset=Dataset.from_list(good_rows(scores=False)),
            says=["`teacher_model`", "`teacher_scores`", "Pass a teacher"],
        )

    @pytest.mark.parametrize("soft_label", ["group", "none"])
    def test_scores_are_enough(self, tmp_path, tokenizer, soft_label):
        trainer = make_trainer(tmp_path, tokenizer, teacher_model=None, config={"soft_label": soft_label})
        assert trainer.teacher_model is None

    def test_teacher_is_the_model(self, refuse, tokenizer):
        model = tiny_model("llama", len(tokenizer))
        refuse(model=model, teacher_model=model, says=["`model` and `teacher_model`", "same object", "frozen"])
        assert all(parameter.requires_grad for parameter in model.parameters())


def assert_names_both_sizes(message, student, teacher):
    assert f"{student} for the student" in message and f"{teacher} for the teacher" in message
    assert "score the groups beforehand" in message and '`soft_label="group"`' in message


class TestVocabularies:
    def test_teacher_too_small(self, refuse, tokenizer):
        size = len(tokenizer)
        message = refuse(teacher_model=tiny_model("llama", size - 1), says=["`vocab_size`"])
        assert_names_both_sizes(message, size, size - 1)

    def test_student_too_small(self, refuse, tokenizer):
        size = len(tokenizer)
        message = refuse(model=tiny_model("llama", size - 1), says=["`vocab_size`"])
        assert_names_both_sizes(message, size - 1, size)

    @pytest.mark.parametrize("config", [{}, {"soft_label": "none", "relative_level": "tokens"}])
    @pytest.mark.parametrize("same_size", [True, False])
    def test_other_tokenizer(self, refuse, tokenizer, tmp_path_factory, config, same_size):
        other, folder = tiny_tokenizer(), tmp_path_factory.mktemp("teacher")
        if same_size:  # the same words under other ids
            core = other.backend_tokenizer.to_str()
            first, second = sorted(set(other.get_vocab()) - set(other.all_special_tokens))[:2]
            swapped = (
                core.replace(f'"{first}":', '"@@":')
                .replace(f'"{second}":', f'"{first}":')
                .replace('"@@":', f'"{second}":')
            )
            other = type(other)(
                tokenizer_object=type(other.backend_tokenizer).from_str(swapped),
                eos_token=other.eos_token,
                pad_token=other.pad_token,
            )
            assert (
                sorted(other.get_vocab()) == sorted(tokenizer.get_vocab())
                and other.get_vocab() != tokenizer.get_vocab()
            )
        else:
            other.add_tokens(["a-new-word", "another"])
        teacher = tiny_model("llama", len(other))
        teacher.save_pretrained(folder)
        other.save_pretrained(folder)
        message = refuse(teacher_model=str(folder), config=config, says=["tokenizers", f"{len(other)} entries"])
        assert_names_both_sizes(message, len(tokenizer), len(other))

    @pytest.mark.parametrize("sizes", [(0, 13), (13, 0), (5, 13)], ids=str)
    @pytest.mark.parametrize("loss", ["soft", "relative"])
    @pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
    def test_padded_sizes_are_cut(self, tmp_path, tokenizer, sizes, loss, saved):
        student, teacher = (tiny_model("llama", len(tokenizer) + extra, seed=seed) for seed, extra in enumerate(sizes))
        shared = len(tokenizer) + min(sizes)
        given = teacher
        if saved:
            teacher.save_pretrained(tmp_path / "teacher")
            tokenizer.save_pretrained(tmp_path / "teacher")
            given = str(tmp_path / "teacher")
        config = {"soft": {"alpha_start": 0.0}, "relative": {"soft_label": "none", "relative_level": "tokens"}}[loss]
        trainer = make_trainer(tmp_path, tokenizer, config=config, model=student, teacher_model=given)
        batch = next(iter(trainer.get_train_dataloader()))
        ours = trainer.compute_loss(trainer.model, batch)

        mask = predicted_mask(batch["completion_mask"])
        logits = [
            model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][mask][:, :shared]
            for model in (student, teacher)
        ]
        if loss == "soft":
            expected = token_soft_label_loss(*logits).mean()
        else:
            expected = token_relative_loss(*logits, top_k=8).mean()
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_scores_of_another_tokenizer_are_fine(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, config={"soft_label": "group"}, teacher_model=tiny_model("llama", 7)
        )
        assert trainer.teacher_model is None


class TestMaxLength:
    def test_leaves_no_completion(self, refuse):
        refuse(
            config={"max_length": 2},
            says=[
                "6 of 6 train prompts",
                "`max_length=2`",
                "no room for a completion",
                "Raise `max_length`",
                "shorten",
            ],
        )

    @pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
    @pytest.mark.parametrize("max_length", [1, 0, -1])
    def test_leaves_no_predicted_token_at_the_end(self, refuse, max_length):
        config = {"max_length": max_length, "truncation_mode": "keep_end"}
        refuse(config=config, says=["`max_length` must be 2 or above", f"got {max_length}"])

    def test_of_prepared_rows(self, refuse, tmp_path, tokenizer):
        prepared = make_trainer(tmp_path, tokenizer).train_dataset
        refuse(train_dataset=prepared, config={"max_length": 2}, says=["6 of 6 train prompts", "`max_length=2`"])

    def test_of_evaluation(self, refuse):
        rows = [{"prompt": "a b c d e f g ", "completions": ["a", "b"], "teacher_scores": [1.0, 2.0]}]
        refuse(
            config={"max_length": 7},
            eval_dataset={"long": Dataset.from_list(rows)},
            says=["1 of 1 long prompts", "`max_length=7`", "Raise `max_length`"],
        )

    def test_drops_some(self, tmp_path, tokenizer, warnings):
        lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in good_rows()]
        trainer = make_trainer(tmp_path, tokenizer, config={"max_length": lengths[4]})
        assert len(trainer.train_dataset) == 4
        (message,) = warnings
        assert f"2 of 6 train prompts fill `max_length={lengths[4]}`" in message and "dropped" in message


class TestArguments:
    def test_images(self, refuse):
        for column in ("image", "images"):
            rows = [row | {column: "picture.png"} for row in good_rows()]
            refuse(rows, says=["Row 0 has images", "text-only model", "remove the column"])
            refuse(eval_dataset=Dataset.from_list(rows), says=["Row 0 has images", "remove the column"])

    @pytest.mark.parametrize("config", [SFTConfig, DPOConfig, TrainingArguments])
    def test_other_arguments(self, refuse, tmp_path, config):
        args = config(tmp_path / "out", use_cpu=True, report_to="none", bf16=False)
        refuse(args=args, error=TypeError, says=["`args`", "`GRKDConfig`", f"`{config.__name__}`"])

    def test_no_dataset(self, refuse):
        refuse(train_dataset=None, says=["`train_dataset` is required"])
        refuse(train_dataset=None, teacher_model=None, config={"soft_label": "none"}, says=["`train_dataset`"])

    def test_dataset_of_another_type(self, refuse):
        refuse(train_dataset=good_rows(), error=TypeError, says=["`train_dataset` must be a `Dataset`", "`list`"])

    def test_eos_token_that_is_unknown(self, refuse):
        refuse(config={"eos_token": "<nothing>"}, says=["`eos_token`", "<nothing>", "vocabulary"])
