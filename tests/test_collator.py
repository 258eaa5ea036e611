"""Batches of groups."""

import doctest

import pytest
import torch

from grkd_trl.data import DataCollatorForGroups, collator, count_items


def collate(examples, **kwargs):
    return DataCollatorForGroups(**{"pad_token_id": 0} | kwargs)(examples)


class TestCollator:
    def test_docstring(self):
        results = [
            doctest.DocTestRunner().run(test)
            for test in doctest.DocTestFinder().find(collator)
            if test.name.endswith("DataCollatorForGroups")
        ]
        assert sum(result.attempted for result in results) >= 6
        assert sum(result.failed for result in results) == 0

    def test_pad_may_be_eos(self):
        eos = 3
        batch = collate([{"prompt_ids": [1, eos], "completion_ids": [[5, eos], [6, 7, eos, eos]]}], pad_token_id=eos)
        assert batch["input_ids"].tolist() == [[1, 3, 5, 3, 3, 3], [1, 3, 6, 7, 3, 3]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
        assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]

    def test_clipped(self):
        groups = [
            {"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5], [3], [3, 4]], "clipped": [False, True, False]},
            {"prompt_ids": [1], "completion_ids": [[3, 4, 5], [3, 4]], "clipped": [True, False]},
        ]
        assert collate(groups)["clipped"].tolist() == [False, True, False, True, False]
        assert collate(groups, max_length=4)["clipped"].tolist() == [True, True, False, True, False]
        assert collate(groups, max_length=3)["clipped"].tolist() == [True, True, True, True, False]
        # With the end kept, what is cut is the prompt.
        end = collate(groups, max_length=3, truncation_mode="keep_end")
        assert end["clipped"].tolist() == [False, True, False, True, False]
        assert end["input_ids"][0].tolist() == [3, 4, 5]
        assert end["completion_mask"][2].tolist() == [0, 1, 1]
        bare = [{"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5], [3]]}]
        assert collate(bare, max_length=4)["clipped"].tolist() == [True, False]

    @pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
    def test_truncation(self, mode):
        batch = collate(
            [{"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5, 6], [7]]}], max_length=4, truncation_mode=mode
        )
        expected = {"keep_start": [[1, 2, 3, 4], [1, 2, 3, 7]], "keep_end": [[3, 4, 5, 6], [1, 2, 3, 7]]}
        assert batch["input_ids"].tolist() == expected[mode]
        masks = {"keep_start": [[0, 0, 0, 1], [0, 0, 0, 1]], "keep_end": [[0, 1, 1, 1], [0, 0, 0, 1]]}
        assert batch["completion_mask"].tolist() == masks[mode]

    def test_pad_to_multiple_of(self):
        groups = [{"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5], [3]], "teacher_scores": [1.0, 2.0]}]
        batch = collate(groups, pad_to_multiple_of=8)
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert batch[name].shape == (2, 8)
        assert batch["group_mask"].tolist() == [[True, True]]
        assert batch["teacher_scores"].tolist() == [[1.0, 2.0]]
        assert batch["attention_mask"].sum() == 8
        assert collate(groups, pad_to_multiple_of=5)["input_ids"].shape == (2, 5)

    def test_dtypes_and_names(self):
        groups = [{"prompt_ids": [1], "completion_ids": [[3], [4]], "teacher_scores": [1, 2]}]
        dtypes = {name: value.dtype for name, value in collate(groups).items()}
        assert dtypes == {
            "group_mask": torch.bool,
            "input_ids": torch.long,
            "attention_mask": torch.long,
            "completion_mask": torch.long,
            "clipped": torch.bool,
            "teacher_scores": torch.float32,
        }
        # `Trainer` reads the number of examples off the first tensor.
        assert next(iter(collate(groups))) == "group_mask"
        del groups[0]["teacher_scores"]
        assert "teacher_scores" not in collate(groups)

    def test_count_items(self):
        """Groups, and the tokens that something predicts: a row cut down to its completion has one less."""
        groups = [{"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5], [3]]}]
        whole, cut = collate(groups * 2), collate(groups, max_length=3, truncation_mode="keep_end")
        assert count_items([whole]).tolist() == [2, 8]
        assert count_items([cut]).tolist() == [1, 3]
        assert count_items([whole, cut]).tolist() == [3, 11]
        assert count_items([]).tolist() == [0, 0]
