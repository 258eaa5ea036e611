"""
Training with the token soft labels of a served teacher against training from a local cache of the same labels.

    python examples/benchmarks/served_labels.py --output_dir results

The teacher's answers, in vLLM's format, are computed beforehand; a process of its own sends them over the loopback after a
sleep of `--latency` seconds, as a server on another machine would that is this fast. Online groups with given completions are
labelled by it, with nothing to overlap (`generate_every=1`) and with the labels of later steps asked for while earlier ones
train. Whole runs are timed on the wall clock in interleaved rounds: throughput over that of the cache, with the quartiles of
single rounds. Memory is what a process of its own adds at its peak to what it has after its imports, in MiB.
"""

import argparse
import statistics
import tempfile
import time

import torch
from datasets import Dataset, disable_progress_bars

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.data import tokenize_completions
from grkd_trl.examples.benchmarks import common
from grkd_trl.examples.benchmarks.answering_server import answer, in_process, serve
from grkd_trl.teacher import ServerTeacher, cache_soft_labels


VOCAB_SIZE, K = 8192, 20
GROUPS_PER_STEP, GROUP_SIZE, PROMPT, COMPLETION = 2, 4, 64, 64


def make_trainer(args, kind, groups, url, folder):
    """Of `cached` labels, `served` ones (with `generate_every`), a teacher `in memory`, or scores and the `student alone`."""
    tokenizer, sizes = common.make_tokenizer(VOCAB_SIZE), (VOCAB_SIZE, args.width, args.num_layers)
    student, given = common.make_model(*sizes), {"train_dataset": groups}
    fields = {"max_steps": args.steps, "per_device_train_batch_size": GROUPS_PER_STEP, "save_strategy": "no"}
    fields |= {"soft_label_top_k": K, "soft_label": "none" if kind == "student alone" else "token"}
    if kind == "in memory":
        given["teacher_model"] = common.make_model(*sizes, seed=1)
    if kind.startswith("served"):
        texts = dict(zip(groups["prompt"], groups["completions"], strict=True))
        given = {"train_dataset": groups.select_columns("prompt")}
        given |= {"completion_fn": lambda prompts, **_: [texts[prompt] for prompt in prompts]}
        given |= {"teacher_model": ServerTeacher(url, "teacher", tokenizer)}
        fields |= {"completion_source": "student", "num_completions": GROUP_SIZE}
        fields |= {"max_completion_length": COMPLETION + 1, "generate_every": int(kind.split()[1])}
    config = GRKDConfig(**common.trainer_fields(folder), **fields, logging_steps=args.steps)
    return GRKDTrainer(model=student, args=config, processing_class=tokenizer, **given)


def memory(args, kind, groups, url, result):
    groups, before = Dataset.from_list(groups), common.in_status("VmHWM")
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(args, kind, groups, url, folder).train()
    result.send(common.in_status("VmHWM") - before)


def measure(args):
    torch.set_num_threads(1)
    tokenizer = common.make_tokenizer(VOCAB_SIZE)
    teacher = common.make_model(VOCAB_SIZE, args.width, args.num_layers, seed=1).eval()
    shapes = common.make_shapes(f"{PROMPT}/{COMPLETION}", args.steps * GROUPS_PER_STEP, GROUP_SIZE)
    rows = [{name: row[name] for name in ("prompt", "completions")} for row in common.make_groups(shapes, VOCAB_SIZE)]
    cached = cache_soft_labels(teacher, tokenizer, Dataset.from_list(rows), k=K, progress=False)
    answers = {None: answer(teacher, tokenizer("a b", add_special_tokens=False)["input_ids"][:1] * 2, K)}
    for row in rows:
        prompt_ids, completion_ids = tokenize_completions(tokenizer, row["prompt"], row["completions"])
        answers |= {(*prompt_ids, *ids): answer(teacher, prompt_ids + ids, K) for ids in completion_ids}
    port, server = in_process(serve, answers, args.latency)
    url, kinds = f"http://127.0.0.1:{port}/v1", ["cached", "served 1", f"served {args.generate_every}"]
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    seconds = {clock: {kind: [] for kind in kinds} for clock in clocks}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: make_trainer(args, kind, cached, url, f"{folder}/{kind}") for kind in kinds}
        for round_ in range(args.rounds + 1):
            for kind in kinds[round_ % 3 :] + kinds[: round_ % 3]:
                starts = {clock: read() for clock, read in clocks.items()}
                trainers[kind].train()
                for clock, read in clocks.items() if round_ else ():  # the first one warms up
                    seconds[clock][kind].append(read() - starts[clock])
    for kind in kinds:
        row = {"labels": kind, "wall seconds a step": round(statistics.median(seconds["wall"][kind]) / args.steps, 3)}
        row |= {"throughput over cached": common.ratio(seconds["wall"], "cached", kind)}
        yield row | {"CPU seconds over cached": common.ratio(seconds["CPU"], kind, "cached")}
    scored = [row | {"teacher_scores": own} for row, own in zip(rows, cached["teacher_scores"], strict=True)]
    for kind in ("student alone", "cached", kinds[-1], "in memory"):
        given = {"student alone": scored, "cached": cached.to_list()}.get(kind, rows)
        peaks = sorted(round(in_process(memory, args, kind, given, url)[0]) for _ in range(3))
        yield {"labels": kind, "peak MiB": peaks[1], "lowest and highest": [peaks[0], peaks[2]]}
    server.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of student and teacher")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds that the server takes for an answer")
    parser.add_argument("--generate_every", type=int, default=16, help="steps of a round")
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output_dir", help="where served_labels.json is written")
    args = parser.parse_args()
    disable_progress_bars()
    output_dir = vars(args).pop("output_dir")
    settings = vars(args) | {"k": K, "groups a step": GROUPS_PER_STEP, "shape": f"{PROMPT}/{COMPLETION}/{GROUP_SIZE}"}
    common.report("served_labels", measure(args), settings, output_dir)
