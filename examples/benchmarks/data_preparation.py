"""
What it takes to prepare conversational groups of four.

    python examples/benchmarks/data_preparation.py data_against_dpo data_starts --model path/to/model --data rows.jsonl.gz

`data_against_dpo`: against TRL's DPO on the same texts as pairs. `data_starts`: how soon a run takes its first step, with its
groups in the cache and not, and the memory it needs, without pages of files, which the system takes back. `--data` holds rows
with `prompt`, `chosen` and `rejected`, which are repeated with another ending each time, so that no text is tokenized twice.
Seconds are those of the clock and the process's own; ratios are of interleaved rounds.
"""

import argparse
import gzip
import itertools
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.data import prepare_groups
from grkd_trl.examples.benchmarks.common import STATUS, in_status, make_model, ratio, report, trainer_fields


MAX_LENGTH = 1024


def groups_of(path, first, num, longest=None):
    """
    Groups `first` to `first + num`: the completions of a row and of another, scored in that order; of each text its first
    `longest` characters.
    """
    text = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    for index in range(first, first + num):
        row, other = rows[index % len(rows)], rows[(7 * index + 3) % len(rows)]
        texts = [row["chosen"], row["rejected"], other["chosen"], other["rejected"]]
        yield {
            "prompt": [{"role": "user", "content": f"{row['prompt'][:longest]} ({index})"}],
            "completions": [[{"role": "assistant", "content": f"{text[:longest]} ({index})"}] for text in texts],
            "teacher_scores": [3.0, 2.0, 1.0, 0.0],
        }


def pairs_of(groups):
    """The same texts as TRL's preferences: two pairs a group."""
    for group, first in itertools.product(groups, (0, 2)):
        chosen, rejected = group["completions"][first : first + 2]
        yield {"prompt": group["prompt"], "chosen": chosen, "rejected": rejected}


def data_against_dpo(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dpo = DPOConfig(**trainer_fields("unused"), max_length=MAX_LENGTH)
    own = SimpleNamespace(_tokenizer=tokenizer)  # all that the method reads of its trainer
    functions = {
        "ours": lambda groups, _: prepare_groups(groups, tokenizer, max_length=MAX_LENGTH),
        "theirs": lambda _, pairs: DPOTrainer._prepare_dataset(own, pairs, tokenizer, dpo, "train"),
    }
    spent, num = (
        {clock: {name: [] for name in functions} for clock in ("process", "clock")},
        args.groups // args.rounds,
    )
    for round_ in range(-1, args.rounds):  # the first one to warm up, of a few groups
        groups = list(groups_of(args.data, num * round_, num) if round_ >= 0 else groups_of(args.data, 0, 10))
        data = Dataset.from_list(groups), Dataset.from_list(list(pairs_of(groups)))
        for name in list(functions)[:: 1 - 2 * (round_ % 2)]:
            start = time.process_time(), time.perf_counter()
            functions[name](*data)
            if round_ >= 0:
                spent["process"][name].append(time.process_time() - start[0])
                spent["clock"][name].append(time.perf_counter() - start[1])
    for clock, seconds in spent.items():
        total = {f"seconds, {name}": round(sum(of_rounds), 1) for name, of_rounds in seconds.items()}
        yield (
            {"groups": args.groups, "seconds of": clock} | total | {"ours / theirs": ratio(seconds, "ours", "theirs")}
        )


class Started(TrainerCallback):
    """Stops a run after its first step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class PeakOfProcess(threading.Thread):
    """Most memory of this process in MiB, looked at twenty times a second. Pages of mapped files are counted only off Linux."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self):
        while STATUS.exists():
            self.most = max(self.most, in_status("RssAnon"))
            time.sleep(0.05)

    @property
    def mebibytes(self):
        return round(self.most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def run(model, path, folder):
    """A run up to its first step; the peak of its memory in MiB, and its own seconds."""
    peak = PeakOfProcess()
    peak.start()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    groups = load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
    args = GRKDConfig(
        **trainer_fields(folder), soft_label="none", max_length=MAX_LENGTH, per_device_train_batch_size=1
    )
    student = make_model(len(tokenizer), 32, 1)
    GRKDTrainer(student, args=args, processing_class=tokenizer, train_dataset=groups, callbacks=[Started()]).train()
    return peak.mebibytes, time.process_time()


def data_starts(args):
    """Of runs in processes of their own, the second of which finds the groups of the first in the cache."""
    for num in args.run_groups:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "groups.jsonl"
            with path.open("w") as file:
                file.writelines(
                    json.dumps(group) + "\n" for group in groups_of(args.data, 0, num, args.run_characters)
                )
            for cache in ("empty", "full"):
                start = time.perf_counter()
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    memory, own = pool.apply(run, (args.model, path, folder))
                seconds = {
                    "seconds to the first step": round(time.perf_counter() - start, 1),
                    "of the process": round(own, 1),
                }
                row = {"groups": num, "characters of a text": args.run_characters or "all", "cache": cache}
                yield row | seconds | {"peak MiB": memory}


BENCHMARKS = {"data_against_dpo": data_against_dpo, "data_starts": data_starts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--model", required=True, help="Path or hub id, for its tokenizer.")
    parser.add_argument("--data", required=True, help="JSON lines, perhaps with gzip, of rows to make groups of.")
    parser.add_argument("--groups", type=int, default=20_000, help="Groups to prepare, over all rounds.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--run_groups", type=int, nargs="+", default=[15_000, 60_000], help="Groups of whole runs.")
    parser.add_argument("--run_characters", type=int, default=None, help="Of each text in whole runs; all by default.")
    parser.add_argument("--output_dir", default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    names = {"model": Path(args.model).name, "data": Path(args.data).name, "max_length": MAX_LENGTH}
    for name in args.benchmarks:
        settings = {field: value for field, value in vars(args).items() if field not in ("benchmarks", "output_dir")}
        report(name, BENCHMARKS[name](args), settings | names, args.output_dir)


if __name__ == "__main__":
    main()
