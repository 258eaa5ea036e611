"""Soft labels across tokenizers: where both have read the same text, tokens by their strings and the rest by sorted mass."""

from types import SimpleNamespace

import pytest
import reference_step
import torch
from datasets import Dataset
from pretrained import GEMMA3, SMOLLM2, missing, needs
from runs import TOKENIZER, VOCAB, logged, make_rows, make_student, make_trainer, shown_rows, to_ids, train
from test_teacher_prompt import relative_error
from tiny import byte_tokenizer, tiny_model, use_tiles
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from grkd_trl.data import DataCollatorForGroups, first_groups
from grkd_trl.losses import aligned_soft_label_loss
from grkd_trl.teacher import CallableScorer, LocalTeacher
from grkd_trl.teacher.alignment import align_completion, shared_tokens, token_starts


BYTES = byte_tokenizer()


def bpe(*merges):
    """Bytes, of which these pairs are one token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def slow_loss(student, teacher, pairs):
    """The definition for one position: two lists of probabilities, and the pairs of tokens that are one string."""
    apart = sum(abs(student[ours] - teacher[theirs]) for ours, theirs in pairs)
    rest = []
    for chances, side in ((student, 0), (teacher, 1)):
        shared = {pair[side] for pair in pairs}
        rest.append(sorted((p for token, p in enumerate(chances) if token not in shared), key=float, reverse=True))
    for place in range(max(map(len, rest))):
        ours, theirs = (side[place] if place < len(side) else 0.0 for side in rest)
        apart = apart + abs(ours - theirs)
    return apart


class TestLoss:
    PAIRS = [(0, 3), (4, 1), (2, 8)]
    IDS = dict(zip(("student_ids", "teacher_ids"), torch.tensor(PAIRS).unbind(-1), strict=True))

    def draw(self, *shape, seed):
        return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("sizes", [(6, 11), (12, 9)])
    def test_value(self, sizes, temperature):
        student, teacher = (self.draw(5, size, seed=size) for size in sizes)
        losses = aligned_soft_label_loss(student, teacher, temperature=temperature, **self.IDS)
        for ours, *rows in zip(losses, student, teacher, strict=True):
            chances = [(row / temperature).softmax(-1).tolist() for row in rows]
            assert ours.item() == pytest.approx(slow_loss(*chances, self.PAIRS), abs=1e-12)

    def test_gradcheck(self):
        student, teacher = self.draw(3, 6, seed=0).requires_grad_(), self.draw(3, 11, seed=1)
        loss = lambda logits: aligned_soft_label_loss(logits, teacher, temperature=2.0, **self.IDS)  # noqa: E731
        assert torch.autograd.gradcheck(loss, student)

    def test_one_vocabulary_is_total_variation(self):
        student, teacher = self.draw(4, 7, seed=0), self.draw(4, 7, seed=1)
        every = torch.arange(7)
        losses = aligned_soft_label_loss(student, teacher, student_ids=every, teacher_ids=every)
        torch.testing.assert_close(losses, (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1))
        assert (aligned_soft_label_loss(student, student, student_ids=every, teacher_ids=every) == 0).all()

    def test_order_of_the_rest_does_not_matter(self):
        student, teacher = self.draw(4, 6, seed=0), self.draw(4, 11, seed=1)
        moved = teacher[:, [10, 1, 9, 3, 7, 6, 5, 4, 8, 2, 0]]  # 1, 3 and 8 stay
        given = self.IDS
        torch.testing.assert_close(
            aligned_soft_label_loss(student, moved, **given), aligned_soft_label_loss(student, teacher, **given)
        )

    def test_no_position(self):
        assert aligned_soft_label_loss(torch.zeros(0, 6), torch.zeros(0, 11), **self.IDS).shape == (0,)

    def test_extreme_logits_are_finite(self):
        student = torch.tensor([[1e4, -1e4, 0.0, -torch.inf, 0.0]], requires_grad=True)
        loss = aligned_soft_label_loss(student, torch.tensor([[0.0] * 8 + [-torch.inf]]), **self.IDS)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all() and gradient.isfinite().all()

    @pytest.mark.parametrize(
        "change, error",
        [
            ({"temperature": 0.0}, "`temperature`"),
            ({"teacher_ids": torch.tensor([1])}, "one shape"),
            ({}, "leading dimensions"),
        ],
    )
    def test_refusals(self, change, error):
        with pytest.raises(ValueError, match=error):
            aligned_soft_label_loss(torch.zeros(2 if change else 3, 6), torch.zeros(2, 11), **self.IDS | change)

    def test_is_trls_gold_on_the_rest(self):
        """Its sorted part is the same; its shared part is a Jensen-Shannon divergence with a weight, ours a distance."""
        gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
        fields = (
            "uld_crossentropy_weight",
            "uld_distillation_weight",
            "uld_student_temperature",
            "uld_teacher_temperature",
        )
        config = SimpleNamespace(
            **dict(zip(fields, (0.0, 1.0, 2.0, 2.0), strict=True)), uld_skip_student_eos=False, uld_skip_teacher_eos=False,
            use_extended_uld=False, uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=False, beta=0.5,
        )  # fmt: skip
        theirs = gold.ULDLoss(config)
        student, teacher = self.draw(1, 8, 6, seed=0), self.draw(1, 8, 11, seed=1)
        labels = torch.full((1, 8), -100)
        labels[:, 3:] = 1  # a prompt of three tokens
        none = torch.zeros(0, dtype=torch.long)
        ours = aligned_soft_label_loss(
            student[:, 2:-1], teacher[:, 2:-1], student_ids=none, teacher_ids=none, temperature=2.0
        )
        expected = theirs(student, teacher, labels, labels, labels.clamp(min=0), labels.clamp(min=0))
        torch.testing.assert_close(ours.mean(), expected)

        theirs.mapping_tensor = torch.full((11,), -1)
        theirs.mapping_tensor[self.IDS["teacher_ids"]] = self.IDS["student_ids"]
        theirs._teacher_matched_ids, theirs._student_matched_ids = (
            set(self.IDS["teacher_ids"].tolist()),
            set(self.IDS["student_ids"].tolist()),
        )
        both = [(logits[0, 2:-1] / 2.0).softmax(-1) for logits in (student, teacher)]
        theirs._compute_hybrid_uld_loss(*both)
        ours = aligned_soft_label_loss(student[0, 2:-1], teacher[0, 2:-1], temperature=2.0, **self.IDS)
        shared = (both[0][:, self.IDS["student_ids"]] - both[1][:, self.IDS["teacher_ids"]]).abs().sum(-1)
        torch.testing.assert_close((ours - shared).mean(), theirs.last_unmatched_loss)


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


def make_teacher(**kwargs):
    return tiny_model("qwen3", 258, **{"seed": 2, "initializer_range": 0.3, "dtype": torch.float64} | kwargs)


@pytest.fixture
def folder(tmp_path):
    """A teacher of bytes, with its tokenizer."""
    make_teacher().save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


GIVEN = {"teacher_model_init_kwargs": {"dtype": "float32"}, "min_aligned": 0.55}


def spaced(rows):
    """Every other completion has two spaces before its third word, and from there on the tokenizers have read other text."""

    def space(text):
        words = text.split()
        return " ".join(words[:2] + ["", *words[2:]]) if len(words) > 2 else text

    return [
        row | {"completions": [space(text) if i % 2 else text for i, text in enumerate(row["completions"])]}
        for row in rows
    ]


def slow_step(student, teacher, rows, *, temperature=1.0, max_length=None):
    """Soft labels of each completion token, and each side's scores: bytes of a text are its characters."""
    vocab, bytes_of = TOKENIZER.get_vocab(), BYTES.get_vocab()
    pairs = [(vocab[word], bytes_of[word]) for word in "abcdefghijklmnop"] + [(vocab["<eos>"], bytes_of["<eos>"])]
    options = reference_step.Options(vocab_size=VOCAB, max_length=max_length)
    losses, scores = [], []
    for row in rows:
        group, read = to_ids(row), row.get("teacher_prompt") or row["prompt"]
        scores.append(([], []))
        for ids, text in zip(group["completion_ids"], row["completions"], strict=True):
            score, own_logits = reference_step.read_completion(student, group["prompt_ids"], ids, options)
            characters = [bytes_of["Ġ" if c == " " else c] for c in read + text] + [bytes_of["<eos>"]]
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([characters])).logits[0]
            own = [logits[place - 1].log_softmax(-1)[characters[place]] for place in range(len(read), len(characters))]
            scores[-1][0].append(score)
            scores[-1][1].append(float(sum(own)) / len(own))
            words = text.split()
            for place, student_row in enumerate(own_logits):
                read_before = " ".join(words[:place])
                if not text.startswith(read_before):  # the student reads one space, the teacher as many as there are
                    losses.append(student_row.sum() * 0.0)
                    continue
                row_of_teacher = logits[len(read) + len(read_before) - 1]
                chances = [torch.softmax(row / temperature, -1) for row in (student_row, row_of_teacher)]
                losses.append(slow_loss(chances[0].unbind(), chances[1].tolist(), pairs))
    return losses, scores


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


class TestWholeStep:
    STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **GIVEN}

    def compare(self, trainer, gradients, student, loss, losses):
        names, parameters = zip(*student.named_parameters(), strict=True)
        expected = torch.autograd.grad(loss, parameters)
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
        assert max(relative_error(gradients[name], own) for name, own in zip(names, expected, strict=True)) < 1e-5
        ratio = sum(own.item() > 0 for own in losses) / len(losses)
        assert 0.5 < ratio < 1
        assert logged(trainer, "completions/aligned_ratio") == [pytest.approx(ratio)]

    @pytest.mark.parametrize(
        "sharing, fields", [("on", {}), ("off", {}), ("on", {"max_length": 7}), ("off", {"tiles": 1})], ids=str
    )
    def test_kd(self, tmp_path, folder, monkeypatch, sharing, fields):
        if "tiles" in fields:
            use_tiles(monkeypatch.setattr, 100)
        fields = {name: value for name, value in fields.items() if name != "tiles"}
        rows, student, teacher = spaced(shown_rows()), make_student(), make_teacher().float()
        losses, _ = slow_step(student, teacher, rows, temperature=2.0, **fields)
        given = {
            "method": "KD",
            "divergence": "aligned",
            "temperature": 2.0,
            "prompt_sharing": sharing,
            **fields,
            **self.STEP,
        }
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=folder, **given)
        self.compare(trainer, gradients, student, sum(losses) / len(losses), losses)

    @pytest.mark.parametrize("sharing", ["on", pytest.param("off", marks=pytest.mark.slow)])
    def test_grkd(self, tmp_path, folder, sharing):
        rows, student, teacher = spaced(make_rows(scores=False)), make_student(), make_teacher().float()
        losses, scores = slow_step(student, teacher, rows)
        relative = [reference_step.pairwise(*both, None, reference_step.Options(vocab_size=VOCAB)) for both in scores]
        loss = 0.7 * sum(losses) / len(losses) + 0.3 * sum(relative) / len(relative)
        given = {"soft_label": "aligned", "prompt_sharing": sharing, "alpha_start": 0.3, **self.STEP}
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=folder, **given)
        self.compare(trainer, gradients, student, loss, losses)

    def test_evaluation(self, tmp_path, folder):
        rows = spaced(make_rows(5, scores=False))
        given = {"method": "KD", "divergence": "aligned", "per_device_eval_batch_size": 2, **GIVEN}
        trainer = make_trainer(tmp_path, rows, teacher_model=folder, eval_dataset=Dataset.from_list(rows), **given)
        losses, _ = slow_step(make_student(), make_teacher().float(), rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-5)


class TestRefusals:
    ROWS = make_rows(scores=False)

    @pytest.mark.parametrize(
        "fields, match",
        [
            ({"completion_source": "student"}, "aligns the groups before training, and online"),
            ({"relative_level": "tokens"}, "ranks tokens that student and teacher share"),
            ({"min_aligned": 0.0}, "`min_aligned` is a share"),
            ({"min_aligned": 0.4, "soft_label": "token"}, "is for soft labels across tokenizers"),
        ],
    )
    def test_settings(self, tmp_path, fields, match):
        with pytest.raises(ValueError, match=match):
            make_trainer(tmp_path, self.ROWS, **{"soft_label": "aligned"} | fields)

    @pytest.mark.parametrize(
        "method, fields", [("GRKD", {"soft_label": "aligned"}), ("KD", {"divergence": "aligned"})]
    )
    def test_a_teacher_that_is_no_model(self, tmp_path, method, fields):
        teachers = [LocalTeacher(make_teacher(), BYTES), CallableScorer(lambda prompts, completions, **_: [])]
        for teacher in (teachers[0], teachers):
            with pytest.raises(ValueError, match="needs a teacher's logits"):
                make_trainer(tmp_path, self.ROWS, method=method, teacher_model=teacher, **fields)

    def test_too_few_positions(self, tmp_path, folder):
        """The words of the student end where no byte of the teacher's text does: a prompt without its space."""
        rows = [{"prompt": "a ", "completions": ["b c d", "p  p  p  p"]}]
        with pytest.raises(ValueError, match=r"at 6\d\.\d% of the train completions' tokens, below `min_aligned=0.9`"):
            make_trainer(tmp_path, rows, teacher_model=folder, soft_label="aligned", min_aligned=0.9)

    def test_a_row_that_does_not_fit(self, tmp_path):
        make_teacher(max_position_embeddings=20).save_pretrained(tmp_path / "t")
        BYTES.save_pretrained(tmp_path / "t")
        rows = [*self.ROWS, {"prompt": "a " * 20, "completions": ["b", "c"]}]
        with pytest.raises(ValueError, match="Row [0-4] has .* of the teacher's tokens, and its context holds 20"):
            make_trainer(tmp_path, rows, teacher_model=str(tmp_path / "t"), soft_label="aligned")

    @pytest.mark.parametrize("how, match", [("stream", "a stream cannot be"), ("ids", "give the text")])
    def test_data(self, tmp_path, folder, how, match):
        dataset = Dataset.from_list(self.ROWS)
        if how == "ids":
            dataset = Dataset.from_list([to_ids(row) for row in self.ROWS])
        else:
            dataset = dataset.to_iterable_dataset()
        with pytest.raises(ValueError, match=match):
            make_trainer(tmp_path, train_dataset=dataset, teacher_model=folder, soft_label="aligned", max_steps=1)

    def test_a_teacher_without_a_tokenizer(self, tmp_path):
        with pytest.raises((OSError, ValueError)):
            make_trainer(tmp_path, self.ROWS, teacher_model=make_teacher(), soft_label="aligned")


@pytest.mark.parametrize("sharing", ["off", "on"])
class TestRealPair:
    """Gemma 3 teaches SmolLM2."""

    pytestmark = needs(SMOLLM2, GEMMA3)
    ROWS = [
        {"prompt": "Question: What is 17 + 25?\nAnswer:", "completions": [" 17 + 25 = 42.", " It's 32, I think..."]},
        {
            "prompt": "The capital of France",
            "completions": [" is Paris, on the Seine.", " was moved to Bordeaux in 1914."],
        },
    ]

    def test_loss_and_gradients(self, tmp_path, sharing):
        folders = SMOLLM2, GEMMA3
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders
        )
        pairs = torch.tensor(shared_tokens(*tokenizers))
        losses, num_tokens = [], 0
        for row in self.ROWS:
            for text in row["completions"]:
                read = []
                for own, model in zip(tokenizers, (student, teacher), strict=True):
                    given = own(row["prompt"] + text + own.eos_token, return_offsets_mapping=True)
                    chances = model(torch.tensor([given["input_ids"]])).logits[0].softmax(-1)
                    starts = [start for start, _ in given["offset_mapping"]]
                    first = starts.index(len(row["prompt"]))
                    read.append({start: chances[at - 1] for at, start in enumerate(starts) if at >= first})
                num_tokens += len(read[0])
                for start in sorted(read[0].keys() & read[1].keys()):
                    both = read[0][start], read[1][start].detach()
                    rest = [
                        chances[torch.isin(torch.arange(len(chances)), ids, invert=True)].sort(descending=True).values
                        for chances, ids in zip(both, pairs, strict=True)
                    ]
                    size = max(map(len, rest))
                    rest = [torch.nn.functional.pad(values, (0, size - len(values))) for values in rest]
                    shared = (both[0][pairs[0]] - both[1][pairs[1]]).abs().sum()
                    losses.append(shared + (rest[0] - rest[1]).abs().sum())
        loss = sum(losses) / num_tokens
        norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(student.parameters()))]).norm().item()
        trainer, _ = train(
            tmp_path,
            self.ROWS,
            method="KD",
            model=str(SMOLLM2),
            teacher_model=str(GEMMA3),
            processing_class=tokenizers[0],
            divergence="aligned",
            prompt_sharing=sharing,
            learning_rate=1e-6,
        )
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-4)]
        assert logged(trainer, "grad_norm") == [pytest.approx(norm, rel=1e-3)]
        assert logged(trainer, "completions/aligned_ratio") == [pytest.approx(len(losses) / num_tokens)]
        assert len(losses) / num_tokens > 0.6
