"""Make groups offline: write completions, keep the most varied, score them, and keep all that was done."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Features, Sequence, Value
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import read_group
from ..teacher import Teacher
from .card import summary, write_card
from .select import drop_repeats, select_diverse
from .shards import Shards


logger = logging.get_logger(__name__)

_OWN_COLUMNS = {"prompt", "completions", "clipped", "written_by", "num_tokens", "teacher_scores", "chosen", "rejected"}


@dataclass
class GroupsConfig:
    r"""
    What decides the groups that [`generate_groups`] makes.

    Parameters:
        output_dir (`str`):
            Folder of the groups. One that was made with the same parameters is gone on with.
        completion_source (`str`, *optional*, defaults to `"student"`):
            Who writes: `"student"`, `"teacher"`, `"mixed"` (both), or `"dataset"` (its `completions`, all kept).
        num_completions (`int`, *optional*, defaults to `4`):
            Completions in a group (G).
        num_drawn (`int`, *optional*, defaults to `5`):
            Completions written for a prompt, of which the `num_completions` furthest apart are kept.
        num_teacher_completions (`int`, *optional*, defaults to `1`):
            How many of the group the teacher writes, for `"mixed"`. The student writes the others and the spare ones.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `0.95`):
            Share of the probability to sample from.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest completion, in the writer's tokens.
        prompts_per_unit (`int`, *optional*, defaults to `64`):
            Prompts in a unit of work, which has a seed and a shard of its own: what is lost when the process is
            killed.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all draws.
    """

    output_dir: str = field(metadata={"help": "Folder of the groups, gone on with if it was made alike."})
    completion_source: str = field(
        default="student", metadata={"help": "Who writes: 'student', 'teacher', 'mixed' or 'dataset'."}
    )
    num_completions: int = field(default=4, metadata={"help": "Completions in a group."})
    num_drawn: int = field(default=5, metadata={"help": "Completions written, of which the furthest apart are kept."})
    num_teacher_completions: int = field(default=1, metadata={"help": "Of the group, by the teacher, for 'mixed'."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability to sample from."})
    max_completion_length: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    prompts_per_unit: int = field(default=64, metadata={"help": "Prompts in a unit of work, with a seed and shard."})
    seed: int = field(default=42, metadata={"help": "Seed of all draws."})

    def __post_init__(self):
        sources = ("student", "teacher", "mixed", "dataset")
        if self.completion_source not in sources:
            raise ValueError(f"`completion_source` must be one of {sources}, got {self.completion_source!r}.")
        if self.num_completions < 2:
            raise ValueError(f"`num_completions` must be 2 or above to rank a group, got {self.num_completions}.")
        if self.num_drawn < self.num_completions:
            raise ValueError(
                f"`num_drawn` ({self.num_drawn}) must be at least `num_completions` ({self.num_completions})."
            )
        if self.completion_source == "mixed" and not 0 < self.num_teacher_completions < self.num_completions:
            raise ValueError(
                f"`num_teacher_completions` must lie between 1 and `num_completions` - 1 for mixed groups of "
                f"{self.num_completions}, got {self.num_teacher_completions}."
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"`temperature` must be 0 or above and `top_p` in (0, 1], got {self.temperature} and {self.top_p}."
            )
        for name in ("max_completion_length", "prompts_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or above, got {getattr(self, name)}.")

    def shares(self) -> dict[str, tuple[int, int]]:
        """
        Who writes how many.

        Returns:
            `dict[str, tuple[int, int]]`: Completions drawn and kept, of each writer.
        """
        if self.completion_source == "mixed":
            by_teacher = self.num_teacher_completions
            student = (self.num_drawn - by_teacher, self.num_completions - by_teacher)
            return {"teacher": (by_teacher, by_teacher), "student": student}
        return {self.completion_source: (self.num_drawn, self.num_completions)}


def unit_seed(seed: int, unit: int, writer: str) -> int:
    """
    Seed of one writer's draws in one unit of work; what is drawn for the prompt at place i adds i to it.

    Args:
        seed (`int`):
            Seed of all.
        unit (`int`):
            Unit: a number of prompts offline, those that groups are made for at once online.
        writer (`str`):
            `"student"`, `"teacher"`, or another who draws.

    Returns:
        `int`: A seed below 2 ** 32.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {unit} {writer}".encode()).digest()[:4], "big")


def content_seed(prompt: Any) -> int:
    """
    Seed from a prompt itself, for draws that are to be the same whenever it comes.

    Args:
        prompt (`str`, `list[dict]` or `list[int]`):
            Prompt, as text, messages or token ids.

    Returns:
        `int`: A seed below 2 ** 48.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(prompt).encode()).digest()[:6], "big")


def write_unit(
    prompts: list[Any],
    writers: dict[str, tuple[Teacher, int]],
    unit: int,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    columns: dict[str, list] | None = None,
    places: list[int] | None = None,
) -> tuple[list[list[str]], list[list[bool]], list[list[str]]]:
    """
    Write the completions of one unit of work, without dropping any.

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            P prompts.
        writers (`dict[str, tuple[Teacher, int]]`):
            Who writes, by name, and how many completions for each prompt.
        unit (`int`):
            Unit, for [`unit_seed`].
        seed (`int`):
            Seed of all.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`):
            Sampling temperature.
        top_p (`float`):
            Share of the probability to sample from.
        columns (`dict[str, list]`, *optional*):
            Further columns, a value a prompt, for the chat template.
        places (`list[int]`, *optional*):
            Place of each prompt in the unit, where these are not all of it in order.

    Returns:
        `tuple`: Texts, whether each was cut, and who wrote it, each `(P, number written)`.
    """
    texts, clipped, written_by = ([[] for _ in prompts] for _ in range(3))
    places = list(range(len(prompts))) if places is None else places
    for name, (writer, num_completions) in writers.items():
        written = writer.generate(
            prompts,
            num_completions,
            seed=[unit_seed(seed, unit, name) + place for place in places],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            columns=columns,
        )
        for row, (group, cuts) in enumerate(zip(*written, strict=True)):
            texts[row] += group
            clipped[row] += cuts
            written_by[row] += [name] * len(group)
    return texts, clipped, written_by


def generate_groups(
    dataset: Dataset,
    config: GroupsConfig,
    *,
    student: Teacher | None = None,
    teacher: Teacher | None = None,
    scorer: Teacher | None = None,
) -> Dataset:
    """
    Make a folder of groups from prompts: write completions, drop empty and repeated ones, keep those furthest apart,
    score them. Work is cut into units with a seed each, so the result depends neither on the number of processes (of
    `accelerate launch`) nor on interruptions: run it again and it goes on. The folder holds Parquet shards, a manifest
    with all that decides their content and what was dropped, and a data card.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, and for `completion_source="dataset"` with `completions` or a preference. Further
            columns are kept, and given to the scorer.
        config ([`GroupsConfig`]):
            What to make, and where.
        student ([`~teacher.Teacher`], *optional*):
            Writes, as `completion_source` says.
        teacher ([`~teacher.Teacher`], *optional*):
            Writes, as `completion_source` says, and scores.
        scorer ([`~teacher.Teacher`], *optional*):
            Scores in place of the teacher. Without either the groups have no `teacher_scores`.

    Returns:
        [`~datasets.Dataset`]: Groups, with `prompt`, `completions`, `clipped`, `written_by`, and `teacher_scores` and
        `num_tokens` where there is a scorer; [`GRKDTrainer`] takes it as it is.

    Raises:
        `ValueError`: If something is missing to make them, the folder was made otherwise, or no group is left.
        `OSError`: If the folder cannot be written to; what was done is kept.
    """
    writers = {"student": student, "teacher": teacher}
    scorer = scorer or teacher
    missing = [name for name in config.shares() if name != "dataset" and writers[name] is None]
    if missing:
        raise ValueError(f'`completion_source="{config.completion_source}"` needs `{missing[0]}`, and none was given.')
    if config.completion_source == "dataset" and "completions" not in dataset.column_names:
        dataset = dataset.map(read_group, with_indices=True, remove_columns=dataset.column_names)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"The dataset has the columns {dataset.column_names}, and needs `prompt`.")

    roles = {"student": student, "teacher": teacher, "scorer": scorer}
    manifest = {
        "parameters": {name: value for name, value in asdict(config).items() if name != "output_dir"},
        "dataset": {"rows": len(dataset), "sha256": _content_hash(dataset)},
        "versions": {name: version(name) for name in ("grkd_trl", "transformers", "torch")},
        **{name: role.describe() if role is not None else None for name, role in roles.items()},
    }
    state = PartialState(cpu=not torch.accelerator.is_available())  # it finds other processes of a CPU only if told
    features = _features(dataset, config, scorer)
    size = config.prompts_per_unit
    shards = Shards(config.output_dir, math.ceil(len(dataset) / size), manifest)
    if state.is_main_process:
        shards.open()
    state.wait_for_everyone()
    mine = range(state.process_index, shards.num_units, state.num_processes)
    for unit in tqdm(mine, desc="Making groups", disable=not state.is_main_process):
        if shards.read_counts(unit) is None:
            rows = dataset.select(range(unit * size, min((unit + 1) * size, len(dataset)))).to_list()
            shards.write(unit, *_make_unit(rows, unit, config, writers, scorer, features))
    state.wait_for_everyone()

    total = sum((shards.read_counts(unit, verify=False) for unit in range(shards.num_units)), Counter())
    if total["groups"] == 0:
        raise ValueError(f"No group is left of {len(dataset)} prompts.\n{summary(total)}")
    groups = shards.load()
    if state.is_main_process:
        shards.finish(total)
        write_card(shards.folder, groups, shards.manifest, total, content=_content_hash(groups))
        logger.info(summary(total))
    state.wait_for_everyone()
    return groups


def _content_hash(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _features(dataset: Dataset, config: GroupsConfig, scorer: Teacher | None) -> Features:
    texts = dataset.features["completions"] if config.completion_source == "dataset" else Sequence(Value("string"))
    own = {"completions": texts, "clipped": Sequence(Value("bool")), "written_by": Sequence(Value("string"))}
    if scorer is not None:
        own |= {"teacher_scores": Sequence(Value("float64")), "num_tokens": Sequence(Value("int64"))}
    further = {name: feature for name, feature in dataset.features.items() if name not in _OWN_COLUMNS}
    return Features({"prompt": dataset.features["prompt"], **own, **further})


def _make_unit(rows, unit, config, writers, scorer, features) -> tuple[list[dict[str, Any]], Features, Counter]:
    counts = Counter(prompts=len(rows))
    with_prompt = [row for row in rows if row["prompt"]]
    counts["empty_prompts"] = len(rows) - len(with_prompt)
    prompts = [row["prompt"] for row in with_prompt]
    if config.completion_source == "dataset":
        drawn = [row["completions"] or [] for row in with_prompt]
        clipped = [row.get("clipped") or [False] * len(group) for row, group in zip(with_prompt, drawn, strict=True)]
        written_by = [
            row.get("written_by") or ["dataset"] * len(group) for row, group in zip(with_prompt, drawn, strict=True)
        ]
    else:
        drawn, clipped, written_by = write_unit(
            prompts,
            {name: (writers[name], num_drawn) for name, (num_drawn, _) in config.shares().items()},
            unit,
            seed=config.seed,
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            columns={
                name: [row[name] for row in with_prompt]
                for name in ("tools", "chat_template_kwargs")
                if name in features
            },
        )
        num_asked = sum(num_drawn for num_drawn, _ in config.shares().values())
        counts["not_written"] = sum(num_asked - len(group) for group in drawn)

    groups = []
    for row, group in zip(with_prompt, zip(drawn, clipped, written_by, strict=True), strict=True):
        kept = _select(group[0], group[2], config, counts)
        if not group[0] and config.completion_source != "dataset":
            counts["long_prompts"] += 1
        elif len(kept) < 2:
            counts["small_groups"] += 1
        else:
            own = {name: [values[i] for i in kept] for name, values in zip(_GROUP, group, strict=True)}
            groups.append(row | own)
    if scorer is not None and groups:
        groups = _score(groups, scorer, counts)
    counts["groups"] = len(groups)
    counts["completions"] = sum(len(row["completions"]) for row in groups)
    counts["clipped"] = sum(sum(row["clipped"]) for row in groups)
    return groups, features, counts


_GROUP = ("completions", "clipped", "written_by")


def _select(completions, written_by, config, counts) -> list[int]:
    """Positions to keep: neither empty nor repeated, and of each writer the furthest apart."""
    texts = [text if isinstance(text, str) else json.dumps(text, sort_keys=True) for text in completions]
    different = drop_repeats(texts)
    counts["drawn"] += len(texts)
    counts["empty_completions"] += sum(not text.strip() for text in texts)
    counts["duplicates"] += sum(bool(text.strip()) for text in texts) - len(different)
    if config.completion_source == "dataset":
        return different
    kept = []
    for name, (_, num_kept) in config.shares().items():
        own = [position for position in different if written_by[position] == name]
        kept += [own[place] for place in select_diverse([texts[position] for position in own], num_kept)]
    counts["not_selected"] += len(different) - len(kept)
    return sorted(kept)


def _score(groups, scorer, counts) -> list[dict[str, Any]]:
    further = {name for row in groups for name in row} - {*_OWN_COLUMNS} | {"clipped"}
    scored = scorer.score(
        [row["prompt"] for row in groups],
        [row["completions"] for row in groups],
        columns={name: [row[name] for row in groups] for name in sorted(further)},
    )
    finished = []
    for row, scores, num_tokens, surprises in zip(groups, *scored, strict=True):
        fine = [position for position, score in enumerate(scores) if math.isfinite(score)]
        counts["unscored"] += len(scores) - len(fine)
        if len(fine) < 2:
            counts["small_groups"] += 1
            continue
        row = row | {"teacher_scores": scores, "num_tokens": num_tokens}
        finished.append(
            row | {name: [row[name][i] for i in fine] for name in (*_GROUP, "teacher_scores", "num_tokens")}
        )
        counts["surprises"] += sum(surprises[position] for position in fine)
        counts["tokens"] += sum(num_tokens[position] for position in fine)
    return finished
