"""Where two tokenizers have read the same text, which of their tokens are the same string, and batches of both."""

import pytest
from aligned_runs import BYTES, bpe
from pretrained import GEMMA3, SMOLLM2, missing
from runs import TOKENIZER
from transformers import AutoTokenizer

from grkd_trl.data import DataCollatorForGroups, first_groups
from grkd_trl.teacher.alignment import align_completion, shared_tokens, token_starts


class TestAlignment:
    AB, BC = bpe(("a", "b")), bpe(("b", "c"))

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("abc", ([0], [0])),  # ab c, a bc
            ("abc abc", ([0, 2, 3], [0, 2, 3])),  # ab c _ ab c, a bc _ a bc
            ("aabb", ([0, 1, 2], [0, 1, 3])),  # a ab b, a a b b
            ("xyz", ([0, 1, 2], [0, 1, 2])),
        ],
    )
    def test_by_hand(self, text, expected):
        both = [own(text)["input_ids"] for own in (self.AB, self.BC)]
        assert align_completion(self.AB, both[0], self.BC, both[1]) == expected

    def test_the_end_is_aligned(self):
        both = [own("abc<eos>")["input_ids"] for own in (self.AB, self.BC)]
        assert align_completion(self.AB, both[0], self.BC, both[1]) == ([0, 2], [0, 2])

    def test_texts_that_part(self):
        """A template may change the text: what comes after is not compared."""
        both = self.AB("x yz")["input_ids"], self.BC("x wz")["input_ids"]
        assert align_completion(self.AB, both[0], self.BC, both[1]) == ([0, 1, 2], [0, 1, 2])

    def test_inside_a_character(self):
        ids = self.AB("é!")["input_ids"]
        assert token_starts(self.AB, ids) == [0, None, 1]

    @pytest.mark.parametrize("own", [AB, BYTES, TOKENIZER], ids=["bpe", "bytes", "words"])
    def test_long_texts(self, own):
        """Decoded in windows, as if whole."""
        text = "a b c d ab bc o n a c " * 7 if own is TOKENIZER else "ab bc é abc ab日本 " * 7
        ids = own(text.strip())["input_ids"]
        whole = [own.decode(ids[:place]) for place in range(len(ids))]
        assert token_starts(own, ids) == [None if text.endswith("\ufffd") else len(text) for text in whole]

    def test_shared_tokens(self):
        student, teacher = shared_tokens(self.AB, self.BC)
        pairs = {
            (self.AB.decode([ours]), self.BC.decode([theirs])) for ours, theirs in zip(student, teacher, strict=True)
        }
        assert all(ours == theirs for ours, theirs in pairs)
        assert {("a", "a"), (" ", " "), ("<eos>", "<eos>")} <= pairs
        assert not {"ab", "bc", "\ufffd"}.intersection(ours for ours, _ in pairs)

    @pytest.mark.pretrained
    @pytest.mark.slow
    @pytest.mark.skipif(missing(SMOLLM2, GEMMA3) is not None, reason=missing(SMOLLM2, GEMMA3) or "")
    def test_is_trls_gold_with_real_tokenizers(self):
        gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
        student, teacher = (AutoTokenizer.from_pretrained(folder) for folder in (SMOLLM2, GEMMA3))
        text = (
            "The quick brown fox, 12345 + 678 = 13023; antidisestablishmentarianism isn't\n\n    def f(x): return x**2"
        )
        read = [own(text, add_special_tokens=False, return_offsets_mapping=True) for own in (student, teacher)]
        groups = gold.ULDLoss._align_by_byte_offsets(*(both["offset_mapping"] for both in read))
        ours = align_completion(student, read[0]["input_ids"], teacher, read[1]["input_ids"])
        assert [list(places) for places in ours] == [[group[0] for group in side] for side in groups]
        assert len(ours[0]) / len(read[0]["input_ids"]) > 0.6
        assert len(shared_tokens(student, teacher)[0]) > 20000


class TestBatch:
    ROWS = [
        {
            "prompt_ids": [1, 2][:size], "completion_ids": [[3, 4, 5], [6]], "aligned_prompt_ids": [7] * size,
            "aligned_completion_ids": [[8, 9], [10, 11, 12]], "aligned_student": [[0, 2], [0]], "aligned_teacher": [[0, 1], [1]],
        }
        for size in (1, 2, 1)
    ]  # fmt: skip

    def test_places(self):
        batch = DataCollatorForGroups(0)(self.ROWS[:2])
        assert batch["aligned_student"].tolist() == [0, 2, 3, 4, 6, 7]
        assert batch["aligned_teacher"].tolist() == [0, 1, 3, 5, 6, 8]
        assert batch["teacher_input_ids"].tolist()[:2] == [[7, 8, 9, 0, 0], [7, 10, 11, 12, 0]]
        assert batch["teacher_completion_mask"].sum() == 10

    def test_nothing_predicts_the_first_token_of_a_row(self):
        row = self.ROWS[0] | {"prompt_ids": [], "aligned_prompt_ids": []}
        batch = DataCollatorForGroups(0)([row, self.ROWS[1]])
        assert batch["aligned_student"].tolist() == [
            1,
            2,
            4,
            5,
        ]  # of the first row the first on both sides is left out
        assert batch["aligned_teacher"].tolist() == [0, 3, 4, 6]

    @pytest.mark.parametrize("num", [0, 1, 2])
    def test_first_groups(self, num):
        """What accelerate repeats is cut off, on both sides."""
        cut = first_groups(DataCollatorForGroups(0)(self.ROWS), num)
        whole = DataCollatorForGroups(0)(self.ROWS[: max(num, 1)])
        for name in ("aligned_student", "aligned_teacher"):
            assert cut[name].tolist() == (whole[name].tolist() if num else [])
        for name in ("completion_mask", "teacher_completion_mask"):
            assert cut[name].sum() == (whole[name].sum() if num else 0)
