"""What a regime starts from: models trained from scratch, groups of prompts that neither has seen, and items to test on."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from grkd_trl.evaluation import MathWordProblem, scan_split, solves
from grkd_trl.examples.comparison.tasks import ask_problem, draw_prompts, keyed, split_problems, trained
from grkd_trl.examples.demonstration.models import PROMPT, word_tokenizer
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import CallableScorer, LocalTeacher, Scorer


NUM_TEST, NUM_VALIDATION, NUM_HELD_OUT_GROUPS = 400, 200, 100
# Of student and teacher: layers, width, learning rate, steps, batch. Few enough steps that samples of the student differ.
SIZES = {
    "math_word": {"student": (2, 48, 2e-3, 200, 32), "teacher": (3, 96, 2e-3, 350, 32)},
    # Its teacher with another tokenizer has twice as many tokens to learn.
    "scan": {
        "student": (2, 64, 3e-3, 500, 64),
        "teacher": (3, 128, 2e-3, 1500, 64),
        "other_tokenizer": (3, 128, 2e-3, 4500, 64),
    },
}
NUM_STUDENT_ROWS = {"math_word": 300, "scan": 800}
GROUP_SETTINGS = ("group_size", "num_drawn", "written_by")  # what a method may change of its groups


class Item(NamedTuple):
    """
    An item to test on.

    Args:
        row (`dict`):
            Its `prompt`, and for a teacher that sees more `teacher_prompt`.
        is_right (`Callable`):
            From a text to whether it is right.
    """

    row: dict[str, Any]
    is_right: Callable[[str], bool]


class Start(NamedTuple):
    """
    What the runs of a regime, task and seed share.

    Args:
        student (`str`):
            Path of the student.
        teacher (`str`):
            Path of the teacher, which may be the student's.
        groups ([`~datasets.Dataset`]):
            Groups to train on, of up to four different completions: one by the teacher, the others by the student, which
            writes all of them where the teacher sees the solution.
        held_out ([`~datasets.Dataset`]):
            Groups of validation items, for the rank accuracy.
        items (`dict[str, list[Item]]`):
            Items of `"validation"` and `"test"`, disjoint.
        max_new_tokens (`int`):
            Longest completion, in the student's tokens.
    """

    student: str
    teacher: str
    groups: Dataset
    held_out: Dataset
    items: dict[str, list[Item]]
    max_new_tokens: int


def verdicts(prompts: list[str], completions: list[list[str]], numbers: list, answer: list, **columns) -> list:
    """The verifier of MAWPS: 1 for an equation that comes to the answer, 0 for another text."""
    problems = [MathWordProblem("", *known) for known in zip(numbers, [""] * len(answer), answer, strict=True)]
    groups = zip(completions, problems, strict=True)
    return [[float(solves(text, problem)) for text in group] for group, problem in groups]


def subword_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 3000 tokens, which cuts rare words into parts. No token crosses from a prompt into a completion."""
    core = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(" ", "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def made_groups(
    folder: Path, start: tuple[str, str], rows: Dataset, scorer: Scorer | None = None, **config: Any
) -> Dataset:
    """
    Groups, made once.

    Args:
        folder (`Path`):
            Folder to keep them in, to whose name a key of all that they are made of is added.
        start (`tuple[str, str]`):
            Paths of the student and the teacher.
        rows ([`~datasets.Dataset`]):
            Prompts.
        scorer ([`~teacher.Scorer`], *optional*):
            Scores the completions in place of the teacher.
        **config:
            Fields of [`~generation.GroupsConfig`].

    Returns:
        [`~datasets.Dataset`]: The groups.
    """
    folder = keyed(folder, [Path(path).name for path in start], rows.to_list(), config)
    if not (folder / "done").exists():
        models = [AutoModelForCausalLM.from_pretrained(path) for path in start]
        student, teacher = map(LocalTeacher, models, map(AutoTokenizer.from_pretrained, start))
        given = GroupsConfig(output_dir=str(folder / "made"), **config)
        groups = generate_groups(rows, given, student=student, teacher=teacher, scorer=scorer)
        groups.save_to_disk(folder / "part")
        (folder / "part").rename(folder / "done")  # complete or not at all
    return load_from_disk(folder / "done")


def make_start(settings: dict[str, Any], seed: int) -> Start:
    """
    Models, groups and items, made where they are not there yet.

    Args:
        settings (`dict[str, Any]`):
            `task` (`"scan"` or `"math_word"`), `teacher` (`"same_tokenizer"`, `"other_tokenizer"`, or `"sees_solution"`,
            which is the student), `scores` (by `"teacher"` or `"verifier"`), `data`, `work_dir`, `num_prompts`,
            `pretraining` (share of the steps that models are trained for) and `max_new_tokens`; and perhaps of the groups to
            train on `group_size` (4), `num_drawn` (one less than twice as many) and `written_by` (`"teacher"`, `"student"`
            or `"mixed"`).
        seed (`int`):
            Decides the prompts, and what is written for them.

    Returns:
        [`Start`]: All of it.
    """
    pairs, held_out, ask = {"scan": _scan, "math_word": _math_word}[settings["task"]](settings)
    known, unseen = pairs[: len(pairs) * 3 // 5], pairs[len(pairs) * 3 // 5 :]  # to the teacher
    folder = Path(settings["work_dir"]) / settings["task"]
    texts = [text for row, reference in [*pairs, *held_out] for text in (ask(row), reference)]
    words = word_tokenizer([*(text for row, text in pairs for text in (ask(row), text)), "; ="])
    plain = [(ask(row), text) for row, text in known[: NUM_STUDENT_ROWS[settings["task"]]]]

    def make(name: str, size: str, tokenizer, rows: list[tuple[str, str]], times: int = 1) -> str:
        num_layers, width, lr, steps, batch_size = SIZES[settings["task"]][size]
        steps = max(round(steps * settings["pretraining"]), 1) * times
        sizes = {"num_layers": num_layers, "width": width, "lr": lr, "batch_size": min(batch_size, len(rows))}
        return trained(folder / name, tokenizer, rows, max_steps=steps, **sizes)

    if settings["teacher"] == "sees_solution":
        any_text = random.Random(0).choices([text for _, text in known], k=3 * len(known))  # to learn to copy it
        others = zip([row for row, _ in known] * 3, any_text, strict=True)
        hinted = [(row["teacher_prompt"], text) for row, text in map(_with_hint(ask), [*known, *others])]
        student = teacher = make("sees_solution", "student", words, plain + hinted, times=3)
    else:
        student = make("student", "student", words, plain)
        own = subword_tokenizer(texts) if settings["teacher"] == "other_tokenizer" else words
        rows = [(ask(row), text) for row, text in known]
        size = settings["teacher"] if settings["teacher"] in SIZES[settings["task"]] else "teacher"
        teacher = make(f"teacher_{settings['teacher']}", size, own, rows)

    test, validation = held_out[:NUM_TEST], held_out[NUM_TEST:]
    kind = f"{settings['task']}-{settings['teacher']}"
    longer = 3 if settings["teacher"] == "other_tokenizer" else 1  # whose tokens are shorter
    shared = {"max_completion_length": longer * settings["max_new_tokens"], "prompts_per_shard": 200}

    shared["completion_source"] = "student" if student == teacher else "mixed"

    def make_groups(name: str, pairs: list, seed: int, scorer: Scorer | None = None, **own: Any) -> Dataset:
        rows = Dataset.from_list([_row(settings, ask, *pair) for pair in pairs])
        size = own.get("num_completions", 4)
        config = shared | {"num_completions": size, "num_drawn": 2 * size - 1, "seed": seed} | own
        return made_groups(Path(settings["work_dir"]) / name, (student, teacher), rows, scorer, **config)

    chosen = draw_prompts(unseen, settings["num_prompts"], seed)
    scorer = CallableScorer(verdicts) if settings["scores"] == "verifier" else None
    fields = zip(GROUP_SETTINGS, ("num_completions", "num_drawn", "completion_source"), strict=True)
    own = {field: settings[name] for name, field in fields if name in settings}
    groups = make_groups(f"{kind}-{settings['scores']}-{seed}", chosen, seed, scorer, **own)
    ranked = make_groups(f"{kind}-held_out", validation[:NUM_HELD_OUT_GROUPS], 10**6)
    items = {
        split: [Item(_row(settings, ask, *pair), partial(_is_right, pair)) for pair in part]
        for split, part in (("test", test), ("validation", validation))
    }
    return Start(student, teacher, groups, ranked, items, settings["max_new_tokens"])


def _scan(settings: dict[str, Any]) -> tuple[list, list, Callable[[Any], str]]:
    train, held_out = scan_split(NUM_TEST + NUM_VALIDATION)
    return train, held_out, PROMPT.format


def _math_word(settings: dict[str, Any]) -> tuple[list, list, Callable[[Any], str]]:
    parts = split_problems(settings["data"], NUM_TEST + NUM_VALIDATION)
    train, held_out = ([(problem, problem.equation) for problem in part] for part in parts)
    return train, held_out, ask_problem


def _with_hint(ask: Callable[[Any], str]) -> Callable[[tuple], tuple[dict[str, str], str]]:
    return lambda pair: ({"teacher_prompt": f"{pair[1]} ; {ask(pair[0])}"}, pair[1])


def _row(settings: dict[str, Any], ask: Callable[[Any], str], task: Any, reference: str) -> dict[str, Any]:
    row = {"prompt": ask(task), "reference": reference}
    if settings["teacher"] == "sees_solution":
        row |= _with_hint(ask)((task, reference))[0]
    if isinstance(task, MathWordProblem):
        row |= {"numbers": task.numbers, "answer": task.answer}
    return row


def _is_right(pair: tuple[Any, str], text: str) -> bool:
    task, reference = pair
    return solves(text, task) if isinstance(task, MathWordProblem) else text.strip() == reference
