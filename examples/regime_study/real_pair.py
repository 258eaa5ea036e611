"""What runs of `real_pair.py` start from and how they are measured: a pretrained model without some of its layers, trained to follow the whole one."""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grkd_trl.data import encode_prompt
from grkd_trl.examples.comparison.tasks import pair_agreement
from grkd_trl.examples.pruning.layers import claim_folder, drop_layers
from grkd_trl.examples.regime_study.measures import written_columns
from grkd_trl.examples.regime_study.run import carry_out
from grkd_trl.examples.regime_study.tasks import Start, made_groups
from grkd_trl.teacher import LocalTeacher


NUM_SAMPLES = 2
MAX_PROMPT, MAX_ANSWER, MAX_PREFERENCES = 80, 128, 64  # tokens of a prompt, of an answer in a preference; rows
NUM_HELD_OUT = {"validation": 24, "test": 48}
SHOWN = 64  # tokens of the reference answer that a teacher is shown
ASKED = ("prompt", "teacher_prompt", "reference")
HINT = "{prompt}\n\nA good answer begins like this:\n\n{reference}"


def read_rows(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Rows of `prompt` (as messages, no longer than `MAX_PROMPT`), `chosen` and `rejected`: with long answers, and with short ones."""
    rows = load_dataset("json", data_files=path, split="train").select_columns(["prompt", "chosen", "rejected"])
    rows = rows.map(lambda row: {"messages": [{"role": "user", "content": row["prompt"]}]}, remove_columns="prompt")
    rows = rows.rename_column("messages", "prompt")
    rows = rows.filter(lambda row: len(encode_prompt(tokenizer, row["prompt"])) <= MAX_PROMPT)

    def is_short(row: dict[str, Any]) -> bool:
        return max(len(tokenizer(row[name]).input_ids) for name in ("chosen", "rejected")) <= MAX_ANSWER

    return rows.filter(lambda row: not is_short(row)), rows.filter(is_short)


def make_start(settings: dict[str, Any], seed: int) -> Start:
    """
    Models, groups, and held-out rows and groups of both splits, made where they are not there yet.

    Args:
        settings (`dict[str, Any]`):
            `teacher` (`"same_tokenizer"`, or `"sees_reference"`, which is shown how the reference answer begins), `model`, `drop`
            (layers to leave out, see [`~examples.pruning.layers.layers_to_drop`]), `data` (two files of rows of `prompt`,
            `chosen` and `rejected`, whose prompts are trained on and tested on), `work_dir`, `num_prompts`, `max_new_tokens`.
        seed (`int`):
            Decides the prompts, and what is written for them.

    Returns:
        [`~examples.regime_study.tasks.Start`]: All of it. Its items are the rows of the splits, and `held_out` their groups.
    """
    folder = Path(settings["work_dir"]) / "pair"
    claim_folder(folder, model=settings["model"], drop=settings["drop"])
    paths = {name: str(folder / name) for name in ("student", "teacher")}
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    if not (folder / "student" / "tokenizer_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        for name, made in (("teacher", model), ("student", drop_layers(model, settings["drop"]))):
            made.save_pretrained(paths[name])
            tokenizer.save_pretrained(paths[name])
    (prompts, preferred), parts = (read_rows(path, tokenizer) for path in settings["data"])
    held_out = concatenate_datasets(list(parts))
    tested = [*held_out["prompt"], *preferred["prompt"]]
    prompts = prompts.filter(lambda row: row["prompt"] not in tested)
    drawn = prompts.shuffle(seed=seed).select(range(settings["num_prompts"]))
    places = iter(range(len(held_out)))
    items = {
        name: held_out.select([next(places) for _ in range(min(count, len(held_out) // 2))])
        for name, count in NUM_HELD_OUT.items()
    }
    if settings["teacher"] == "sees_reference":
        drawn, *shown = (
            _with_reference(rows, tokenizer, settings["max_new_tokens"]) for rows in (drawn, *items.values())
        )
        items = dict(zip(items, shown, strict=True))
    kind = "" if settings["teacher"] == "same_tokenizer" else "shown-"

    def make_groups(name: str, rows: Dataset, seed: int) -> Dataset:
        rows = rows.select_columns([name for name in ASKED if name in rows.column_names])
        own = {"completion_source": "mixed", "num_completions": 4, "num_drawn": 4, "num_teacher_completions": 2}
        own |= {"max_completion_length": settings["max_new_tokens"], "seed": seed}
        return made_groups(
            Path(settings["work_dir"]) / (kind + name), (paths["student"], paths["teacher"]), rows, **own
        )

    groups = make_groups(f"groups-{seed}", drawn, seed)
    watched = {name: make_groups(name, rows, 10**6) for name, rows in items.items()}
    return Start(paths["student"], paths["teacher"], groups, watched, items, settings["max_new_tokens"])


def _with_reference(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Dataset:
    """Rows with what a teacher is shown, and as `reference` as much of the chosen answer as a completion may have."""

    def show(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["chosen"]).input_ids
        texts = {"prompt": row["prompt"][-1]["content"], "reference": tokenizer.decode(ids[:SHOWN])}
        shown = [*row["prompt"][:-1], {"role": "user", "content": HINT.format(**texts)}]
        return {"teacher_prompt": shown, "reference": tokenizer.decode(ids[:max_new_tokens])}

    return rows.map(show)


def _teacher(path: str) -> LocalTeacher:
    return LocalTeacher(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))


def measure(
    model: PreTrainedModel, start: Start, split: str, preferences: Dataset | None = None, *, is_teacher: bool = False
) -> dict[str, list[float]]:
    """
    Measure a model on held-out prompts. All models draw their samples by the same random numbers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        start ([`~examples.regime_study.tasks.Start`]):
            Teacher, and held-out rows and groups.
        split (`str`):
            `"validation"` or `"test"`.
        preferences ([`~datasets.Dataset`], *optional*):
            Rows of `prompt`, `chosen` and `rejected`.
        is_teacher (`bool`, *optional*, defaults to `False`):
            Whether the model sees what only the teacher is shown.

    Returns:
        `dict[str, list[float]]`: For each prompt `"score of samples"` (the teacher's, in nats a token), `"ROUGE-L"` of the samples
        to as many words of the reference, `"new trigrams"` (share of a sample's trigrams of words that it has not had before),
        `"length"` in tokens; for each held-out group `"teacher's text"` (the model's score of it, in nats a token) and `"rank
        accuracy"`; with `preferences` `"preferences"`, whether the chosen answer has the higher score; and where the teacher is
        shown the reference answer `"reference"`, the model's score of its beginning.
    """
    teacher = _teacher(start.teacher)
    writer = LocalTeacher(model, teacher.processing_class)
    rows, groups = start.items[split], start.held_out[split]
    shown = {"teacher_prompt": list(rows["teacher_prompt"])} if "teacher_prompt" in rows.column_names else {}
    own_prompt = "teacher_prompt" if shown and is_teacher else "prompt"
    asked = list(rows[own_prompt])
    written = writer.generate(asked, NUM_SAMPLES, seed=0, max_new_tokens=start.max_new_tokens)
    scores = teacher.score(asked, written.texts, columns=written_columns(written) | shown).scores
    found = {
        "score of samples": [_mean([score for score in own if math.isfinite(score)] or [-20.0]) for own in scores]
    }
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(written.texts, rows["chosen"], strict=True))
    found["ROUGE-L"] = [_mean([_rouge(rouge, text, reference) for text in texts]) for texts, reference in pairs]
    found["new trigrams"] = [_mean(list(map(_new_trigrams, texts))) for texts in written.texts]
    found["length"] = [_mean([float(len(ids)) for ids in group]) for group in written.completion_ids or []]
    columns = {name: list(groups[name]) for name in ("clipped", "prompt_ids", "completion_ids", "tokenizer_hash")}
    columns |= {"teacher_prompt": list(groups["teacher_prompt"])} if own_prompt == "teacher_prompt" else {}
    ours = writer.score(list(groups["prompt"]), list(groups["completions"]), columns=columns).scores
    authors = groups["written_by"]
    found["teacher's text"] = [
        _mean([score for score, author in zip(own, names, strict=True) if author == "teacher"])
        for own, names in zip(ours, authors, strict=True)
        if "teacher" in names
    ]
    theirs = list(groups["teacher_scores"])
    found["rank accuracy"] = [pair_agreement(*scores, without=0.5) for scores in zip(ours, theirs, strict=True)]
    if shown:
        texts = [[text] for text in rows["reference"]]
        known = writer.score(asked, texts, columns={"clipped": [[True]] * len(texts)}).scores  # which goes on
        found["reference"] = [score for (score,) in known]
    if preferences is not None:
        answers = [[row["chosen"], row["rejected"]] for row in preferences]
        judged = writer.score(list(preferences["prompt"]), answers).scores
        found["preferences"] = [float(chosen > rejected) for chosen, rejected in judged]
    return found


def run(request_path: str, result_path: str) -> None:
    """One run, see [`carry_out`]."""
    carry_out(request_path, result_path, make_start=make_start, measure=_measure, decides="score of samples")


def _measure(
    model: PreTrainedModel, tokenizer: Any, start: Start, split: str, settings: dict[str, Any], is_teacher: bool
) -> dict:
    preferences = None  # about prompts that are not trained on
    if split == "test":
        _, preferences = read_rows(settings["data"][0], tokenizer)
        preferences = preferences.select(range(min(len(preferences), MAX_PREFERENCES)))
    return measure(model, start, split, preferences, is_teacher=is_teacher)


def _rouge(rouge: RougeScorer, text: str, reference: str) -> float:
    beginning = " ".join(reference.split()[: max(len(text.split()), 1)])
    return rouge.score(beginning, text)["rougeL"].fmeasure


def _new_trigrams(text: str) -> float:
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
