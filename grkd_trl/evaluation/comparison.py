"""Compare methods under equal budgets: every run in a process of its own, resumed where it was stopped."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from .results import append_result, check_result, decisive_metric, read_results


_BUDGETS = ("max_steps", "max_tokens", "max_seconds")
_ERROR_CHARACTERS = 2000


def compare(
    start: Sequence[str] | Callable[[str, str], None],
    output_dir: str | Path,
    *,
    task: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    budget: dict[str, float],
    shared: dict[str, Any] | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    search_space: dict[str, list[dict[str, Any]]] | None = None,
    tune: int = 0,
    tuning_seed: int | Sequence[int] = 1000,
    num_workers: int = 1,
) -> Path:
    """
    Run every method with every seed and write a row of `results.jsonl` for each. What trains and tests is a command or
    a function of a module: it gets two paths, of a request and of the result that it is to write, and each run is a
    process of its own. A function's processes are forked from one that has imported its module, so that only the first
    run waits for the imports; where processes cannot be forked (Windows), give a command.

    A request is `{"task", "method", "seed", "split", "settings"}`, where `split` is `"test"`, or `"validation"` while
    tuning. A result holds `metrics`, `per_item`, `seconds`, `tokens`, `peak_memory_bytes`, `versions`, and perhaps
    `curve`, `curve_items` and `samples`, as in [`~grkd_trl.evaluation.results.append_result`]. A process that ends with another status
    than 0, or without a result, makes a failed row with the end of what it printed.

    Runs that are in the file are not repeated, so a comparison that was stopped, even killed, goes on when it is started
    again; failed runs are tried again. Runs know nothing of each other: neither their order nor a stop changes a result.

    Args:
        start (`Sequence[str]` or `Callable[[str, str], None]`):
            Command, as a list, or a function of a module that can be imported and holds no GPU when it is.
        output_dir (`str` or `Path`):
            Folder for `results.jsonl`, `tuning.jsonl` and `logs`. Several tasks may share it.
        task (`str`):
            Name of the task.
        methods (`Sequence[str]`):
            Methods.
        seeds (`Sequence[int]`):
            Seeds; each method is run with all.
        budget (`dict[str, float]`):
            One of `max_steps`, `max_tokens` and `max_seconds`, the same for all runs.
        shared (`dict[str, Any]`, *optional*):
            Settings that all methods get.
        settings (`dict[str, dict[str, Any]]`, *optional*):
            By method, settings of its own.
        search_space (`dict[str, list[dict[str, Any]]]`, *optional*):
            By method, the settings to choose from, as many for each method.
        tune (`int`, *optional*, defaults to `0`):
            Trials for each method: points of its search space, the same points in each, drawn once. Each is run with
            `tuning_seed` on the validation split, and the one with the best metric that decides goes into the comparison.
        tuning_seed (`int` or `Sequence[int]`, *optional*, defaults to `1000`):
            Seed of the trials, none of `seeds`. With several, each trial is run with all of them, and its metric is the mean.
        num_workers (`int`, *optional*, defaults to `1`):
            Runs at a time. More than one shares the machine, and with it `seconds`.

    Returns:
        `Path`: Path of `results.jsonl`.

    Raises:
        `ValueError`: If the budget is not one of the three, or settings have one of their own, the search spaces differ in
            size, or the folder holds runs with other settings.
    """
    if len(budget) != 1 or not budget.keys() <= set(_BUDGETS) or not next(iter(budget.values())) > 0:
        raise ValueError(f"`budget` must be one of {_BUDGETS}, above 0 and the same for all methods, got {budget}.")
    if not methods or len(set(methods)) < len(methods) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`methods` and `seeds` must each hold something, once, got {methods} and {seeds}.")
    told = [
        shared or {},
        *(settings or {}).values(),
        *(point for space in (search_space or {}).values() for point in space),
    ]
    if other := sorted({name for some in told for name in some}.intersection(_BUDGETS)):
        raise ValueError(
            f"{other} in `shared`, `settings` or `search_space` would give a run another budget than `budget`, {budget}: leave it out."
        )
    folder = Path(output_dir).expanduser()
    given = {method: (shared or {}) | budget | (settings or {}).get(method, {}) for method in methods}
    if tune:
        drawn = [tuning_seed] if isinstance(tuning_seed, int) else list(tuning_seed)
        given = _tuned(start, folder, task, given, search_space or {}, tune, drawn, seeds, num_workers)
    requests = [
        {"task": task, "method": method, "seed": seed, "split": "test", "settings": given[method]}
        for seed in seeds  # all methods of a seed first, so that what is there when it is stopped can be compared
        for method in methods
        if method in given
    ]
    _run_all(start, requests, folder / "results.jsonl", folder / "logs", num_workers)
    return folder / "results.jsonl"


def _tuned(
    start: Sequence[str] | Callable[[str, str], None],
    folder: Path,
    task: str,
    given: dict[str, dict[str, Any]],
    search_space: dict[str, list[dict[str, Any]]],
    tune: int,
    tuning_seeds: list[int],
    seeds: Sequence[int],
    num_workers: int,
) -> dict[str, dict[str, Any]]:
    sizes = {method: len(search_space.get(method, [])) for method in given}
    if len(set(sizes.values())) > 1 or min(sizes.values()) < tune:
        raise ValueError(
            f"`search_space` must hold the same number of settings for each method, {tune} (`tune`) or more, got {sizes}."
        )
    if tested := sorted(set(tuning_seeds) & set(seeds)):
        raise ValueError(f"`tuning_seed` {tested[0]} is one of `seeds`: tune with a seed that is not tested.")
    if not tuning_seeds:
        raise ValueError("`tuning_seed` is empty: give a seed, or several, to tune with.")
    points = sorted(random.Random(0).sample(range(next(iter(sizes.values()))), tune))
    trials = [
        {
            "task": task,
            "method": f"{method} trial {number}",
            "seed": seed,
            "split": "validation",
            "settings": settings | search_space[method][point],
        }
        for seed in tuning_seeds
        for number, point in enumerate(points)
        for method, settings in given.items()
    ]
    path = folder / "tuning.jsonl"
    _run_all(start, trials, path, folder / "logs", num_workers)
    rows = {(row["method"], row["seed"]): row for row in read_results(path) if row["task"] == task}
    best = {}
    for method, settings in given.items():
        # Where every trial failed, the comparison shows the method as failed, with the first trial's settings.
        best[method], highest = settings | search_space[method][points[0]], -math.inf
        for number, point in enumerate(points):
            runs = [rows[f"{method} trial {number}", seed] for seed in tuning_seeds]
            if all(row["status"] == "done" for row in runs):
                mean = sum(row["metrics"][decisive_metric(row)] for row in runs) / len(runs)
                if mean > highest:  # the first of equals
                    best[method], highest = settings | search_space[method][point], mean
    return best


def _run_all(
    start: Sequence[str] | Callable[[str, str], None],
    requests: list[dict[str, Any]],
    path: Path,
    logs: Path,
    num_workers: int,
) -> None:
    known = {}
    if path.exists():
        known = {(row["task"], row["method"], row["seed"]): row for row in read_results(path)}
    open_requests = []
    for request in requests:
        row = known.get((request["task"], request["method"], request["seed"]))
        if row and row["status"] == "done" and row["settings"] != json.loads(json.dumps(request["settings"])):
            names = row["settings"].keys() | request["settings"].keys()
            differing = sorted(name for name in names if row["settings"].get(name) != request["settings"].get(name))
            raise ValueError(
                f"{path} holds {request['method']} seed {request['seed']} of {request['task']} with other settings "
                f"({', '.join(differing)}): give another `output_dir`, or the settings of that comparison."
            )
        if not row or row["status"] != "done":
            open_requests.append(request)
    logs.mkdir(parents=True, exist_ok=True)
    if callable(start) and open_requests:
        _warm_up(start)
    lock = threading.Lock()

    def run(request: dict[str, Any]) -> None:
        row = _run(start, request, logs)
        with lock:
            append_result(path, row)
            print(f"{row['task']}, {row['method']}, seed {row['seed']}: {row['status']} {row['metrics']}", flush=True)

    pool = ThreadPoolExecutor(num_workers)
    try:
        for future in [pool.submit(run, request) for request in open_requests]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt no other run starts


def _run(start: Sequence[str] | Callable[[str, str], None], request: dict[str, Any], logs: Path) -> dict[str, Any]:
    parts = [str(request[part]) for part in ("task", "method", "seed")]
    name = re.sub(r"[^\w+.-]+", "_", "_".join(parts))[:120]
    if name != "_".join(parts):  # other names may become the same
        name += f"_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"
    row = {name: request[name] for name in ("task", "method", "seed", "settings")}
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "request.json", Path(scratch) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        log = logs / f"{name}.log"
        status = _process(start, str(asked), str(answered), log)
        try:
            if status:
                raise RuntimeError(f"ended with status {status}")
            return check_result(row | {"status": "done"} | json.loads(answered.read_text(encoding="utf-8")))
        except (RuntimeError, OSError, ValueError) as error:
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-_ERROR_CHARACTERS:]
            failed: dict[str, Any] = {
                "metrics": {},
                "per_item": None,
                "seconds": 0,
                "tokens": None,
                "peak_memory_bytes": None,
            }
            return row | failed | {"versions": {}, "status": "failed", "error": f"{error}\n{said}".strip()}


def _process(start: Sequence[str] | Callable[[str, str], None], asked: str, answered: str, log: Path) -> int:
    if not callable(start):
        with log.open("wb") as file:
            return subprocess.run([*start, asked, answered], stdout=file, stderr=subprocess.STDOUT).returncode
    process = multiprocessing.get_context("forkserver").Process(
        target=_logged, args=(start, asked, answered, str(log))
    )
    process.start()
    process.join()
    return process.exitcode or 0  # a number, once it has ended


def _warm_up(start: Callable[[str, str], None]) -> None:
    """Start the process that imports the module once, and that runs are forked from."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([start.__module__])
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which Python 3.11's server does not get otherwise
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if known is not None:
            os.environ["PYTHONPATH"] = known


def _logged(start: Callable[[str, str], None], asked: str, answered: str, log: str) -> None:
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    start(asked, answered)
