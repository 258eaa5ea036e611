"""Make groups offline: write completions, keep the most varied, score them, and store all of it in a folder."""

import json
import math
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import as_read, check_prompt, read_group, require_rows
from ..data.rows import check_completions, check_one_each
from ..data.teacher_prompts import PROMPT_HASHES, check_made_with, prompt_hash
from ..teacher import Scorer, Teacher, TeacherEnsemble
from .card import summary, write_card
from .checks import check_chat_templates, check_soft_labels, check_text_beside_ids, reads_teacher_prompts
from .core import add_scores, keep, write_groups
from .manifest import content_hash, group_features
from .select import drop_repeats, select_diverse
from .shards import Shards, readable_folder


logger = logging.get_logger(__name__)


@dataclass
class GroupsConfig:
    r"""
    Parameters of [`generate_groups`].

    Parameters:
        output_dir (`str`):
            Folder of the groups, in which `~` is the home folder. Resumes if it already holds groups made with the same
            parameters.
        completion_source (`str`, *optional*, defaults to `"student"`):
            Who writes: `"student"`, `"teacher"`, `"mixed"` (both), or `"dataset"` (its `completions`, all kept).
        num_completions (`int`, *optional*, defaults to `4`):
            Completions in a group (G).
        num_drawn (`int`, *optional*, defaults to `5`):
            Completions written for a prompt, of which the `num_completions` furthest apart are kept.
        num_teacher_completions (`int`, *optional*, defaults to `1`):
            How many completions of a group the teacher writes, for `"mixed"`. The student writes all others.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `0.95`):
            Share of the probability to sample from.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest completion, in the writer's tokens.
        prompts_per_shard (`int`, *optional*, defaults to `64`):
            Prompts in a shard, which has a seed and a file of its own. A process that is killed loses the shard that it
            was making.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all draws.
        soft_labels (`int`, *optional*):
            The teacher's most likely tokens to store at each position, as token soft labels that need no teacher in
            training, see [`~teacher.cache_soft_labels`]. A server has a limit, for vLLM 20 or `--max-logprobs`.
        prompts_per_unit (`int`, *optional*):
            Former name of `prompts_per_shard`, accepted until 0.3.
    """

    output_dir: str = field(
        metadata={"help": "Folder of the groups. Resumes if it holds groups made with the same parameters."}
    )
    completion_source: str = field(
        default="student", metadata={"help": "Who writes: 'student', 'teacher', 'mixed' or 'dataset'."}
    )
    num_completions: int = field(default=4, metadata={"help": "Completions in a group."})
    num_drawn: int = field(default=5, metadata={"help": "Completions written, of which the furthest apart are kept."})
    num_teacher_completions: int = field(default=1, metadata={"help": "Of the group, by the teacher, for 'mixed'."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability to sample from."})
    max_completion_length: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    prompts_per_shard: int = field(default=64, metadata={"help": "Prompts in a shard, which has a seed of its own."})
    seed: int = field(default=42, metadata={"help": "Seed of all draws."})
    soft_labels: int | None = field(
        default=None, metadata={"help": "The teacher's most likely tokens to store at each position, as soft labels."}
    )
    prompts_per_unit: int | None = field(default=None, metadata={"help": "Former name of `prompts_per_shard`."})

    def __post_init__(self):
        if self.prompts_per_unit is not None:
            message = "`prompts_per_unit` is now `prompts_per_shard`; the old name will be removed in 0.3."
            warnings.warn(message, FutureWarning, stacklevel=3)
            self.prompts_per_shard, self.prompts_per_unit = self.prompts_per_unit, None
        self.output_dir = str(readable_folder(self.output_dir))
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
        for name in ("max_completion_length", "prompts_per_shard", "soft_labels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or above, got {getattr(self, name)}.")

    def shares(self) -> dict[str, tuple[int, int]]:
        """
        Completions by writer.

        Returns:
            `dict[str, tuple[int, int]]`: Completions drawn and kept, of each writer.
        """
        if self.completion_source == "mixed":
            by_teacher = self.num_teacher_completions
            student = (self.num_drawn - by_teacher, self.num_completions - by_teacher)
            return {"teacher": (by_teacher, by_teacher), "student": student}
        return {self.completion_source: (self.num_drawn, self.num_completions)}


def generate_groups(
    dataset: Dataset,
    config: GroupsConfig,
    *,
    student: Teacher | None = None,
    teacher: Teacher | None = None,
    scorer: Scorer | None = None,
) -> Dataset:
    """
    Make a folder of groups from prompts: write completions, drop empty and repeated ones, keep those furthest apart,
    score them. Work is cut into shards with a seed each, so the result depends neither on the number of processes (of
    `accelerate launch`) nor on interruptions: rerun it to resume. The folder holds Parquet shards, a manifest with all
    that decides their content and what was dropped, and a data card.

    What a local model or vLLM wrote is kept as its token ids as well, which trainers and local teachers with the same
    tokenizer read. A completion without text for a person to read, such as one of an end token alone, is dropped; two
    of the same text count as one, whatever their tokens.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, and for `completion_source="dataset"` with `completions` or a preference. Further
            columns are kept, and given to the scorer. A transform (`with_transform`) is applied.
        config ([`GroupsConfig`]):
            What to make, and where.
        student ([`~teacher.Teacher`], *optional*):
            Writes, as `completion_source` says.
        teacher ([`~teacher.Teacher`], *optional*):
            Writes, as `completion_source` says, scores, and gives the soft labels.
        scorer ([`~teacher.Scorer`], *optional*):
            Scores in place of the teacher. Without either the groups have no `teacher_scores`. Without a teacher it gives
            the soft labels.

    Returns:
        [`~datasets.Dataset`]: Groups, with `prompt`, `completions`, `clipped`, `written_by`; `prompt_ids`,
        `completion_ids` and `tokenizer_hash` of what models wrote; and `teacher_scores` and `num_tokens` where there is a
        scorer; the columns of [`~teacher.cache_soft_labels`] with `soft_labels`. [`GRKDTrainer`] accepts it.

    Raises:
        `ValueError`: If something is missing to make them, a cell holds no prompt or completion, the folder was created
            with different parameters, or no group is left.
        `OSError`: If the folder cannot be written to. Finished shards are kept.
    """
    writers = {"student": student, "teacher": teacher}
    scorer = scorer or teacher
    missing = [name for name in config.shares() if name != "dataset" and writers[name] is None]
    if missing:
        raise ValueError(f'`completion_source="{config.completion_source}"` needs `{missing[0]}`, and none was given.')
    require_rows(dataset=dataset)
    dataset = as_read(dataset)
    if config.completion_source == "dataset" and "completions" not in dataset.column_names:
        dataset = dataset.map(read_group, with_indices=True, remove_columns=dataset.column_names)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"The dataset has the columns {dataset.column_names}, and needs `prompt`.")

    roles = {"student": student, "teacher": teacher, "scorer": scorer}
    check_chat_templates(dataset, config.completion_source, *roles.values())
    for role in (teacher, scorer):
        if isinstance(role, TeacherEnsemble):
            role.check_routes(dataset)
    not_content = ("output_dir", "prompts_per_unit")
    manifest = {
        "parameters": {name: value for name, value in asdict(config).items() if name not in not_content},
        "dataset": {"rows": len(dataset), "sha256": content_hash(dataset)},
        "versions": {name: version(name) for name in ("grkd_trl", "transformers", "torch")},
        **{name: role.describe() if role is not None else None for name, role in roles.items()},
    }
    state = PartialState(cpu=not torch.accelerator.is_available())  # it finds other processes of a CPU only if told
    features = group_features(dataset, config, scorer)
    if config.soft_labels is not None:
        is_new = not (Path(config.output_dir) / "manifest.json").exists()  # a folder was checked when it was made
        check_soft_labels(teacher or scorer, student, config.soft_labels, ask=is_new)
    size = config.prompts_per_shard
    shards = Shards(config.output_dir, math.ceil(len(dataset) / size), manifest)
    if state.is_main_process:
        shards.open()
    state.wait_for_everyone()
    mine = range(state.process_index, shards.num_shards, state.num_processes)
    for shard in tqdm(mine, desc="Making groups", disable=not state.is_main_process):
        if shards.read_counts(shard) is None:
            rows = dataset.select(range(shard * size, min((shard + 1) * size, len(dataset)))).to_list()
            groups, counts = _make_shard(rows, shard, config, writers, scorer)
            shards.write(shard, groups, features, counts)
    state.wait_for_everyone()

    total = sum(
        (shards.read_counts(shard, verify=False) or Counter() for shard in range(shards.num_shards)), Counter[str]()
    )
    if total["groups"] == 0:
        raise ValueError(f"No group is left of {len(dataset)} prompts.\n{summary(total)}")
    groups = shards.load()
    if state.is_main_process:
        shards.finish(total)
        write_card(shards.folder, groups, shards.manifest, total, content=content_hash(groups))
        logger.info(summary(total))
    state.wait_for_everyone()
    return groups


def _make_shard(rows, shard, config, writers, scorer) -> tuple[list[dict[str, Any]], Counter]:
    counts = Counter(prompts=len(rows))
    with_prompt = []
    for index, row in enumerate(rows, start=shard * config.prompts_per_shard):
        if row["prompt"]:
            check_prompt(row["prompt"], index)
            if config.completion_source == "dataset":
                row = _group_of(row, index)
                check_text_beside_ids(
                    row, index, scorer, *([writers["teacher"]] if writers["teacher"] is not scorer else [])
                )
                if config.soft_labels is None:  # those of the row are kept
                    check_made_with({name: row[name] for name in row if name != "teacher_scores"}, index)
            with_prompt.append(row)
    counts["empty_prompts"] = len(rows) - len(with_prompt)
    if config.completion_source == "dataset":
        drawn = with_prompt
    else:
        drawn = write_groups(
            with_prompt,
            {name: (partial(nullcontext, writers[name]), num) for name, (num, _) in config.shares().items()},
            seed=config.seed,
            index=shard,
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        num_asked = sum(num_drawn for num_drawn, _ in config.shares().values())
        counts["not_written"] = sum(num_asked - len(group["completions"]) for group in drawn)

    groups = []
    for group in drawn:
        kept = _select(group["completions"], group["written_by"], config, counts)
        if not group["completions"] and config.completion_source != "dataset":
            counts["long_prompts"] += 1
        elif len(kept) < 2:
            counts["small_groups"] += 1
        else:
            groups.append(keep(group, kept))
    if scorer is not None and groups:
        num_before = sum(len(group["completions"]) for group in groups)
        labels = {"teacher": writers["teacher"] or scorer, "k": config.soft_labels} if config.soft_labels else {}
        scored = add_scores(groups, scorer, **labels)
        if labels or reads_teacher_prompts(scorer):
            scored = [
                group | {column: prompt_hash(group.get(name)) for name, column in PROMPT_HASHES.items()}
                for group in scored
            ]
        counts["unscored"] = num_before - sum(len(group["completions"]) for group in scored)
        groups = [group for group in scored if len(group["completions"]) >= 2]
        counts["small_groups"] += len(scored) - len(groups)
        counts["surprises"] = sum(sum(group["surprises"]) for group in groups)
        counts["tokens"] = sum(sum(group["num_tokens"]) for group in groups)
    counts["groups"] = len(groups)
    counts["completions"] = sum(len(group["completions"]) for group in groups)
    counts["clipped"] = sum(sum(group["clipped"]) for group in groups)
    return groups, counts


def _group_of(row: dict[str, Any], index: int) -> dict[str, Any]:
    """A row of the dataset as what was drawn."""
    completions = [] if row["completions"] is None else row["completions"]
    check_completions(row["prompt"], completions, index, min_completions=0)
    lists = {"clipped": row.get("clipped"), "written_by": row.get("written_by")}
    group = row | {name: values for name, values in lists.items() if values is not None} | {"completions": completions}
    group = {"clipped": [False] * len(completions), "written_by": ["dataset"] * len(completions)} | group
    for name in ("clipped", "written_by", "completion_ids"):
        if group.get(name) is not None:
            check_one_each(group, name, index)
    return group


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
        kept += [own[index] for index in select_diverse([texts[position] for position in own], num_kept)]
    counts["not_selected"] += len(different) - len(kept)
    return sorted(kept)
