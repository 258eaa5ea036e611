"""The course of a study, the same in `regimes.py` and `real_pair.py`: trials, the test, and its report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.results import read_results
from grkd_trl.examples.regime_study.grid import LORA_TIMES
from grkd_trl.examples.regime_study.report import write
from grkd_trl.examples.regime_study.verdicts import at_baseline_rate


def study(
    run: Callable[[str, str], None],
    output_dir: Path,
    methods: dict[str, dict[str, Any]],
    *,
    seeds: list[int],
    rates: Sequence[float],
    tune: int,
    tuning_seeds: list[int],
    **common: Any,
) -> None:
    """
    Tune the methods of a task, test them, test ranking again where it ended at another rate than the same losses without it, and
    write the report of all tasks that are done.

    Args:
        run (`Callable`):
            One run, as [`~grkd_trl.evaluation.compare`] starts it.
        output_dir (`Path`):
            Folder of the study.
        methods (`dict[str, dict]`):
            Settings of each method.
        seeds (`list[int]`):
            Seeds of the test.
        rates (`Sequence[float]`):
            Learning rates, a trial each. LoRA's are `LORA_TIMES` as high.
        tune (`int`):
            Trials of each method. 0 tests the first rate.
        tuning_seeds (`list[int]`):
            Seeds of each trial.
        **common:
            `task`, `budget`, `shared` and `num_workers`, as for [`~grkd_trl.evaluation.compare`].
    """
    known = compare(run, output_dir, methods=["student before", "teacher"], seeds=[0], **common)
    if warning := poor_teacher(known, common["task"]):
        print(warning)
    times = {name: LORA_TIMES if "lora_rank" in own else 1 for name, own in methods.items()}
    space = {name: [own | {"learning_rate": rate * times[name]} for rate in rates] for name, own in methods.items()}
    tuned: dict[str, Any] = {"search_space": space, "tune": tune, "tuning_seed": tuning_seeds}
    if not tune:
        tuned = {"settings": {name: points[0] for name, points in space.items()}}
    results = compare(run, output_dir, methods=list(methods), seeds=seeds, **tuned, **common)
    again = at_baseline_rate(results, common["task"], methods)
    if again:
        compare(run, output_dir, methods=list(again), seeds=seeds, settings=again, **common)
    write(output_dir, output_dir / "report")
    print(output_dir / "report" / "verdicts.md")


def poor_teacher(results: Path, task: str) -> str | None:
    """
    What to say where a teacher is no better than its student, from which no method can learn.

    Args:
        results (`Path`):
            Runs, with the student and the teacher before training.
        task (`str`):
            Task.

    Returns:
        `str`, *optional*: A warning.
    """
    done = {row["method"]: row for row in read_results(results) if row["task"] == task and row["status"] == "done"}
    student, teacher = (done[who]["metrics"][done[who]["metric"]] for who in ("student before", "teacher"))
    if teacher > student:
        return None
    return f"{task}: the teacher is no better than the student ({teacher:.3f}, {student:.3f}), so no method can be judged by it."
