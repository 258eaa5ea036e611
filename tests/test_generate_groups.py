"""Groups made offline: what is kept and dropped, and that nothing which happens on the way changes the result."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import interrupted
import pytest
from datasets import Dataset, load_dataset
from interrupted import config, make_prompts, make_teacher
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model, tiny_tokenizer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.data import prepare_groups
from grkd_trl.generation import generate_groups, preview
from grkd_trl.teacher import CallableScorer, LocalTeacher


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An uninterrupted run, and what it gave."""
    folder = tmp_path_factory.mktemp("groups")
    groups = generate_groups(make_prompts(), config(folder), student=make_teacher(0), teacher=make_teacher(1))
    return folder, groups


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def counts_of(folder):
    return json.loads((folder / "manifest.json").read_text())["counts"]


class TestWhatIsMade:
    def test_rows(self, made):
        _, groups = made
        assert groups.column_names == [
            "prompt", "completions", "clipped", "written_by", "prompt_ids", "completion_ids", "tokenizer_hash",
            "teacher_scores", "num_tokens", "scored_prompt_hash", "source_index",
        ]  # fmt: skip
        assert groups["source_index"] == sorted(groups["source_index"])
        teacher, tokenizer = make_teacher(1), tiny_tokenizer()
        for row in groups:
            assert row["prompt"] == make_prompts()["prompt"][row["source_index"]]
            assert 2 <= len(set(row["completions"])) == len(row["completions"]) <= 3
            assert row["written_by"].count("teacher") <= 1 and set(row["written_by"]) <= {"teacher", "student"}
            assert row["num_tokens"] == list(map(len, row["completion_ids"]))
            for text, cut, ids in zip(row["completions"], row["clipped"], row["completion_ids"], strict=True):
                assert text == tokenizer.decode(ids, skip_special_tokens=True)
                assert (ids[-1] == tokenizer.eos_token_id) is (not cut)
        columns = {name: groups[name] for name in ("clipped", "prompt_ids", "completion_ids", "tokenizer_hash")}
        expected = teacher.score(groups["prompt"], groups["completions"], columns=columns)
        for row, scores in zip(groups["teacher_scores"], expected.scores, strict=True):
            assert row == pytest.approx(scores, abs=1e-5)

    def test_folder_loads_and_trains(self, made, tmp_path):
        folder, groups = made
        loaded = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.to_list() == groups.to_list()
        tokenizer = tiny_tokenizer()
        args = GRKDConfig(
            str(tmp_path), max_steps=1, soft_label="group", bf16=False, use_cpu=True, report_to="none",
            gradient_checkpointing=False,
        )  # fmt: skip
        model = tiny_model("llama", len(tokenizer))
        trainer = GRKDTrainer(model=model, args=args, train_dataset=loaded, processing_class=tokenizer)
        assert trainer.train().training_loss > 0

    def test_folders_of_one_name_are_told_apart(self, tmp_path):
        """datasets keeps what it loaded, and knows a folder by its last name and its card."""
        texts = []
        for seed in (0, 1):
            folder = tmp_path / str(seed) / "groups"
            student = make_teacher(0)
            groups = generate_groups(
                make_prompts(4), config(folder, completion_source="student", seed=seed), student=student
            )
            loaded = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
            assert loaded["completions"][:] == groups["completions"][:]
            texts.append(groups["completions"][:])
        assert texts[0] != texts[1]

    def test_counts_add_up(self, made):
        folder, groups = made
        counts = counts_of(folder)
        assert counts["prompts"] == 40
        assert counts["groups"] == len(groups) == 40 - counts.get("small_groups", 0)
        assert counts["completions"] == sum(map(len, groups["completions"]))
        assert counts["clipped"] == sum(map(sum, groups["clipped"])) > 0
        assert counts["tokens"] == sum(map(sum, groups["num_tokens"]))
        assert counts["drawn"] == 40 * 5
        assert counts["not_selected"] > 0

    def test_card_and_preview(self, made):
        folder, groups = made
        card = (folder / "README.md").read_text()
        assert f"{len(groups)} prompts" in card and "| 200 | completions written" in card
        assert (folder / "lengths.png").read_bytes()[:4] == (folder / "scores.png").read_bytes()[:4] == b"\x89PNG"
        lines = preview(groups, 1).splitlines()
        assert lines[0] == f"prompt: {groups[0]['prompt']}"
        shown = [float(line.split()[0]) for line in lines[1:]]
        assert shown == sorted(shown, reverse=True) and len(shown) == len(groups[0]["completions"])

    def test_manifest_says_what_decides(self, made):
        manifest = json.loads((made[0] / "manifest.json").read_text())
        assert manifest["parameters"]["temperature"] == 1.0
        assert manifest["teacher"]["tokenizer"] == make_teacher(1).describe()["tokenizer"]
        assert set(manifest["versions"]) == {"grkd_trl", "transformers", "torch"}


class TestSources:
    def test_conversations_by_one_writer(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATES["qwen"]
        writer = LocalTeacher(tiny_model("llama", len(tokenizer), initializer_range=0.3), tokenizer)
        dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in "xyz"])
        groups = generate_groups(dataset, config(tmp_path, completion_source="student"), student=writer)
        assert groups["prompt"] == dataset["prompt"]
        assert "teacher_scores" not in groups.column_names
        assert all(group == ["student"] * 3 for group in groups["written_by"])

    def test_rescore_keeps_the_completions(self, made, tmp_path):
        _, groups = made
        again = generate_groups(groups, config(tmp_path, completion_source="dataset"), scorer=make_teacher(2))
        assert list(again["completions"]) == groups["completions"]
        assert again["written_by"] == groups["written_by"] and again["clipped"] == groups["clipped"]
        assert again["teacher_scores"] != groups["teacher_scores"]

    def test_preferences_and_a_function(self, tmp_path):
        rows = [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}] * 3

        def length(prompts, completions, **columns):
            return [[float(text == "4") for text in group] for group in completions]

        groups = generate_groups(
            Dataset.from_list(rows), config(tmp_path, completion_source="dataset"), scorer=CallableScorer(length)
        )
        assert groups["teacher_scores"] == [[1.0, 0.0]] * 3
        assert groups["written_by"] == [["dataset"] * 2] * 3

    def test_further_columns_reach_the_scorer(self, tmp_path):
        rows = [{"prompt": "q", "completions": ["4", "5"], "answer": answer} for answer in "45"]

        def is_right(prompts, completions, answer, **columns):
            return [[float(text == right) for text in group] for group, right in zip(completions, answer, strict=True)]

        groups = generate_groups(
            Dataset.from_list(rows), config(tmp_path, completion_source="dataset"), scorer=CallableScorer(is_right)
        )
        assert groups["teacher_scores"] == [[1.0, 0.0], [0.0, 1.0]]


class TestDrops:
    def test_are_counted(self, tmp_path):
        groups = [
            ["a b", "c"],
            ["a", "a", "b"],  # a duplicate
            ["a", "", " "],  # two empty, and one is no group
            ["a b c d e f g", "a", "b"],  # longer than the context
            ["a", "unknown"],  # read as another word
        ]
        rows = [{"prompt": "d ", "completions": group} for group in groups]
        dataset = Dataset.from_list(
            [*rows, {"prompt": "", "completions": ["a", "b"]}, {"prompt": "d", "completions": None}]
        )
        teacher = make_teacher(0, max_position_embeddings=6)
        made = generate_groups(dataset, config(tmp_path, completion_source="dataset"), teacher=teacher)
        assert made["completions"] == [["a b", "c"], ["a", "b"], ["a", "b"], ["a", "unknown"]]
        counts = counts_of(tmp_path)
        expected = {
            "prompts": 7, "empty_prompts": 1, "drawn": 13, "duplicates": 1, "empty_completions": 2, "small_groups": 2,
            "unscored": 1, "surprises": 1, "groups": 4, "completions": 8,
        }  # fmt: skip
        assert {name: counts[name] for name in expected} == expected
        card = (tmp_path / "README.md").read_text()
        assert "| 1 | prompts dropped: empty |" in card

    def test_prompt_longer_than_the_context(self, tmp_path):
        teacher = make_teacher(0, max_position_embeddings=12)
        dataset = Dataset.from_dict({"prompt": ["a b ", "a b c d e f ", "c "]})
        made = generate_groups(dataset, config(tmp_path, completion_source="teacher"), teacher=teacher)
        assert made["prompt"] == ["a b ", "c "]
        assert counts_of(tmp_path)["long_prompts"] == 1

    def test_nothing_left(self, tmp_path):
        dataset = Dataset.from_dict({"prompt": ["a "], "completions": [["b", "b"]]})
        with pytest.raises(
            ValueError, match="No group is left of 1 prompts(.|\n)*| 1 | completions dropped: the same"
        ):
            generate_groups(dataset, config(tmp_path, completion_source="dataset"), teacher=make_teacher(0))


class TestResuming:
    def test_a_second_run_changes_nothing(self, made, monkeypatch):
        folder, groups = made
        before = files(folder)
        teacher = make_teacher(1)
        monkeypatch.setattr(teacher, "generate", None)  # nothing is written again
        again = generate_groups(make_prompts(), config(folder), student=make_teacher(0), teacher=teacher)
        assert again.to_list() == groups.to_list()
        assert files(folder) == before

    @pytest.mark.parametrize("damage", ["cut", "flip 5", "flip 30", "flip -9", "empty", "another's"])
    def test_a_damaged_shard_is_made_again(self, made, damage):
        folder, _ = made
        before = files(folder)
        checksums = json.loads((folder / "manifest.json").read_text())["checksums"]
        assert checksums == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "data").iterdir()
        }
        shards = sorted((folder / "data").iterdir())
        content = bytearray(shards[3].read_bytes())
        if damage.startswith("flip"):  # in a page's header, in its data, and in the last footer
            content[int(damage.split()[1])] ^= 1
        whole = {"cut": content[: len(content) // 2], "empty": b"", "another's": shards[4].read_bytes()}
        shards[3].write_bytes(whole.get(damage, content))
        generate_groups(make_prompts(), config(folder), student=make_teacher(0), teacher=make_teacher(1))
        assert files(folder) == before

    @pytest.mark.parametrize("content", ["", '{"parameters": {"tem', "[]"])
    def test_a_cut_manifest_is_named(self, made, content):
        path, whole = made[0] / "manifest.json", (made[0] / "manifest.json").read_bytes()
        path.write_text(content)
        with pytest.raises(ValueError, match=f"The manifest {path} is damaged"):
            generate_groups(make_prompts(), config(made[0]), student=make_teacher(0), teacher=make_teacher(1))
        path.write_bytes(whole)

    @pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a::b"])
    def test_paths_that_datasets_reads_as_patterns_are_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match="reads as a pattern"):
            config(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_home_that_cannot_be_written_to_is_found_before_the_work(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file/cache"))
        with pytest.raises(OSError, match="Cannot write to .*file/cache .*HF_DATASETS_CACHE"):
            generate_groups(make_prompts(), config(tmp_path / "out"), student=make_teacher(0), teacher=make_teacher(1))
        assert not (tmp_path / "out").exists()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert config("~/out").output_dir == str(tmp_path / "out")

    @pytest.mark.parametrize(
        "change, named",
        [
            ({"temperature": 0.7}, "`parameters.temperature`: 1.0 then, 0.7 now"),
            ({"seed": 1}, "`parameters.seed`: 42 then, 1 now"),
            ({"prompts_per_shard": 5}, "`parameters.prompts_per_shard`: 4 then, 5 now"),
        ],
    )
    def test_other_parameters_are_refused(self, made, change, named):
        before = files(made[0])
        with pytest.raises(ValueError, match=named):
            generate_groups(
                make_prompts(), config(made[0], **change), student=make_teacher(0), teacher=make_teacher(1)
            )
        assert files(made[0]) == before

    def test_other_prompts_and_teachers_are_refused(self, made):
        with pytest.raises(ValueError, match="`dataset.rows`: 40 then, 39 now; `dataset.sha256`"):
            generate_groups(make_prompts(39), config(made[0]), student=make_teacher(0), teacher=make_teacher(1))
        with pytest.raises(ValueError, match="different parameters: `student.weights`: '[0-9a-f]{16}' then, "):
            generate_groups(make_prompts(), config(made[0]), student=make_teacher(2), teacher=make_teacher(1))
        other = make_teacher(1)
        other.processing_class.chat_template = CHAT_TEMPLATES["plain"]
        with pytest.raises(ValueError, match="`scorer.chat_template`(.)*`teacher.chat_template`"):
            generate_groups(make_prompts(), config(made[0]), student=make_teacher(0), teacher=other)

    def test_a_folder_of_an_older_version(self, made, tmp_path):
        """It is not resumed, for its groups have no token ids; it loads and trains as it is."""
        folder = tmp_path / "groups"
        shutil.copytree(made[0], folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["versions"]["grkd_trl"] = "0.0.9"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        for path in (folder / "data").iterdir():
            shard = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
            shard.remove_columns(["prompt_ids", "completion_ids", "tokenizer_hash"]).to_parquet(path)
        with pytest.raises(ValueError, match="different parameters: `versions.grkd_trl`: '0.0.9' then"):
            generate_groups(make_prompts(), config(folder), student=make_teacher(0), teacher=make_teacher(1))
        loaded = load_dataset(
            "parquet", data_dir=str(folder / "data"), split="train", cache_dir=str(tmp_path / "cache")
        )
        tokens, own = prepare_groups(loaded, tiny_tokenizer()), prepare_groups(made[1], tiny_tokenizer())
        special = set(tiny_tokenizer().all_special_ids) - {tiny_tokenizer().eos_token_id}
        for row, expected in zip(tokens, own, strict=True):
            written = [[token for token in ids if token not in special] for ids in expected["completion_ids"]]
            assert row["completion_ids"] == written  # what text keeps

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "other.parquet").touch()
        with pytest.raises(ValueError, match="holds Parquet files and no manifest"):
            generate_groups(make_prompts(), config(tmp_path), student=make_teacher(0), teacher=make_teacher(1))


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported all that is slow, and has started nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interrupted"])
    with pytest.MonkeyPatch.context() as patch:  # where the server of forks finds its modules
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))))
        ready = context.Process(target=time.sleep, args=(0,))
        ready.start()
    ready.join()
    return context


class TestProcesses:
    def test_killed_twenty_times(self, made, processes, tmp_path):
        """At random moments, counted in shards: how long one takes depends on what else the machine does."""
        draw, kills, runs, folder = random.Random(0), 0, 0, tmp_path / "0"

        def num_shards():
            return len(list(folder.glob("data/*.parquet")))

        while kills < 20:
            process = processes.Process(target=interrupted.make, args=(str(folder),))
            reached = num_shards() + draw.randint(0, 2)
            process.start()
            while process.is_alive() and num_shards() < reached:
                time.sleep(0.005)
            process.join(draw.uniform(0.0, 0.2))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            else:  # done: compare, and begin another folder
                assert process.exitcode == 0
                assert files(folder) == files(made[0])
                runs, folder = runs + 1, tmp_path / str(runs + 1)
        last = processes.Process(target=interrupted.make, args=(str(folder),))
        last.start()
        last.join(120)
        assert last.exitcode == 0
        assert files(folder) == files(made[0])

    def test_two_processes_make_the_same_rows(self, made, processes, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        both = [processes.Process(target=interrupted.make, args=(str(tmp_path), rank, 2, port)) for rank in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(120)
        assert [process.exitcode for process in both] == [0, 0]
        assert files(tmp_path) == files(made[0])


class TestDisk:
    def test_full(self, made, tmp_path):
        """A shard that does not fit leaves nothing behind, and what was there is kept."""
        run = dict(student=make_teacher(0), teacher=make_teacher(1))
        largest = max(path.stat().st_size for path in (made[0] / "data").iterdir())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
        try:
            with pytest.raises(OSError, match=r"Cannot write to .* \d+ of 10 shards are finished and kept"):
                generate_groups(make_prompts(), config(tmp_path), **run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        left = files(tmp_path)
        assert 0 < len(left) < len(files(made[0])) and not [name for name in left if name.endswith(".tmp")]
        assert all(files(made[0])[name] == content for name, content in left.items() if name.startswith("data/"))
        generate_groups(make_prompts(), config(tmp_path), **run)
        assert files(tmp_path) == files(made[0])

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"Cannot write to .*file/groups .*choose a folder that can be written to"):
            generate_groups(
                make_prompts(), config(tmp_path / "file" / "groups"), student=make_teacher(0), teacher=make_teacher(1)
            )
