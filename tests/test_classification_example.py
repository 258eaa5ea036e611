"""The example of classifiers, on rows small enough to train on in seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from shared_data import shared_data

from grkd_trl import GRKDForClassificationConfig
from grkd_trl.examples import classify
from grkd_trl.examples.classification import hashed_ngrams


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TOPICS = {"animals": "cat dog horse cow", "food": "bread cheese apple rice", "rain": "cloud wet storm umbrella"}


def write_csv(path, header, size):
    random, lines = np.random.default_rng(0), [header]
    for row in range(size):
        topic = list(TOPICS)[row % 3]
        lines.append(f"{' '.join(random.choice(TOPICS[topic].split(), 3))},{topic}")
    path.write_text("\n".join(lines) + "\n")


def run_example(folder, name, **kwargs):
    config = GRKDForClassificationConfig(
        str(folder / "out"),
        num_train_epochs=4,
        learning_rate=5e-2,
        per_device_train_batch_size=16,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        hard_label_weight=0.1,
    )
    classify.main(classify.ClassificationArguments(dataset_name=name, **{"teacher_epochs": 60} | kwargs), config)


class TestExample:
    def test_a_csv_of_the_users_own_and_a_saved_teacher(self, tmp_path, capsys):
        write_csv(tmp_path / "mine.csv", "text,label", 90)
        run_example(tmp_path, str(tmp_path / "mine.csv"))
        printed = capsys.readouterr().out
        assert "Teacher's accuracy on the test rows: 1.0000" in printed
        assert "eval_accuracy           =        1.0" in printed
        saved = classify.NgramForSequenceClassification.from_pretrained(tmp_path / "out")
        assert saved.config.id2label == dict(enumerate(TOPICS)) and saved.idf.max() > 1
        teacher = {"teacher_path": str(tmp_path / "out/teacher"), "teacher_epochs": 0}
        run_example(tmp_path, str(tmp_path / "mine.csv"), method="dist", **teacher)
        assert "Teacher's accuracy on the test rows: 1.0000" in capsys.readouterr().out

    @pytest.mark.parametrize("method", ["hard", "kd", "listnet", "ranknet", "pld", "rkd_distance", "rkd_angle"])
    def test_every_rival(self, tmp_path, method):
        write_csv(tmp_path / "mine.csv", "text,label", 60)
        run_example(tmp_path, str(tmp_path / "mine.csv"), method=method, teacher_epochs=1)
        assert (tmp_path / "out/model.safetensors").exists()

    def test_digits(self):
        pytest.importorskip("sklearn")
        rows = classify.load_rows("digits", None, 0)
        assert {part: len(rows[part]) for part in rows} == {"train": 1005, "validation": 252, "test": 540}
        classify.set_seed(0)
        model = classify.make_model("student", classify.Rows.of(rows["train"]))
        batch = rows["train"].with_format("torch")[:8]
        assert model(pixel_values=batch["pixel_values"]).logits.shape == (8, 10)

    def test_published_files(self):
        for name, classes, sizes in [("banking77", 77, (8002, 2001, 3080)), ("clinc150", 150, (6000, 1500, 4500))]:
            rows = classify.load_rows(name, str(shared_data(name)), 0)
            assert rows["train"].features["labels"].num_classes == classes
            assert tuple(len(rows[part]) for part in ("train", "validation", "test")) == sizes
            assert set(rows["test"].unique("labels")) == set(range(classes))
            held_out = {tuple(ids) for ids in rows["validation"]["input_ids"]}
            assert len(held_out & {tuple(ids) for ids in rows["train"]["input_ids"]}) < 15  # a few texts occur twice


class TestLabelNoise:
    def rows(self, size=6000):
        """Classes 0 and 1 look alike, and 2 and 3."""
        labels = [row % 4 for row in range(size)]
        ids = [[label // 2 + 1, 10 + label] for label in labels]
        rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
        return rows.cast_column("labels", ClassLabel(names=list("abcd")))

    @pytest.mark.parametrize("noise_type", ["uniform", "asymmetric"])
    @pytest.mark.parametrize("share", [0.0, 0.3])
    def test_share_and_kind(self, share, noise_type):
        rows = self.rows()
        noisy = classify.add_label_noise(rows, share, noise_type, 0)
        before, after = np.array(rows["labels"]), np.array(noisy["labels"])
        wrong = before != after
        assert wrong.mean() == pytest.approx(share, abs=0.02)
        assert noisy.features["labels"] == rows.features["labels"] and noisy["input_ids"][:] == rows["input_ids"][:]
        if noise_type == "asymmetric":
            assert (after[wrong] == (before ^ 1)[wrong]).all()
        elif share:
            shifts = np.bincount((after - before)[wrong] % 4, minlength=4) / wrong.sum()
            assert shifts[1:] == pytest.approx([1 / 3] * 3, abs=0.04)
        assert after.tolist() == classify.add_label_noise(rows, share, noise_type, 0)["labels"][:]
        assert share == 0 or after.tolist() != classify.add_label_noise(rows, share, noise_type, 1)["labels"][:]


class TestNgrams:
    def test_words_come_first_and_zero_pads(self):
        ids = hashed_ngrams.hash_ngrams("Cat, dog cat", 64)
        assert len(ids) == 64 and ids[-1] == 0 and ids[0] == ids[3] and len(set(ids[:3])) == 3
        assert ids[:3] == hashed_ngrams.hash_ngrams("cat , dog", 3)
        assert all(0 < value < 2**31 for value in ids if value)

    def test_inverse_document_frequency(self):
        config = hashed_ngrams.NgramConfig(num_buckets=50, hidden_size=4, num_labels=2)
        rows = torch.tensor([[7, 7, 9], [7, 8, 0], [7, 0, 0]])
        model = hashed_ngrams.NgramForSequenceClassification(config).fit_idf(rows)
        expected = {7: 3, 8: 1, 9: 1}
        for hashed, count in expected.items():
            assert model.idf[hashed + 1].item() == pytest.approx(np.log(4 / (1 + count)) + 1)
        assert model.idf[0] == 0 and torch.equal(
            model(torch.tensor([[7, 8, 0]])).logits, model(torch.tensor([[7, 8]])).logits
        )
