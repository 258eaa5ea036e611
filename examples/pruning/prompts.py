"""Prompts of our own, for a run without a file, and the choice of short ones."""

from datasets import Dataset

from grkd_trl.data import encode_prompt


SUBJECTS = [
    "bread",
    "the moon",
    "bicycles",
    "a library",
    "honey bees",
    "rain",
    "chess",
    "the heart",
    "trains",
    "coffee",
    "volcanoes",
    "a garden",
    "electricity",
    "football",
    "whales",
    "money",
    "glass",
    "music lessons",
    "a lighthouse",
    "the desert",
    "sleep",
    "bridges",
    "winter",
    "maps",
]
TASKS = [
    "Explain {} to a child in two sentences.",
    "Write a short poem about {}.",
    "List three facts about {}.",
    "Why do people care about {}?",
    "Write one question for a quiz about {}, and its answer.",
    "Tell a very short story in which {} matters.",
    "What is a common mistake that people make about {}?",
    "Give me some advice about {}.",
    "Name three words that go well with {}, and say why.",
    "Write a polite message to a friend about {}.",
    "How has {} changed in the last hundred years?",
    "Compare {} with something unlike it.",
]
# The subject changes fastest, so the last prompts, which are held out, are other tasks about the same subjects.
PROMPTS = [task.format(subject) for task in TASKS for subject in SUBJECTS]


def short_prompts(rows: list, tokenizer, max_length: int, count: int, *, seed: int) -> Dataset:
    """
    Prompts that are short enough, as messages.

    Args:
        rows (`list[str]` or `list[list[dict]]`):
            Prompts, as text or messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        max_length (`int`):
            Longest prompt to keep, in tokens, with what the template adds.
        count (`int`):
            Number of prompts to take.
        seed (`int`):
            Seed of their order.

    Returns:
        [`~datasets.Dataset`]: `count` rows with `prompt`.

    Raises:
        `ValueError`: If there are fewer.
    """
    messages = [[{"role": "user", "content": row}] if isinstance(row, str) else row for row in rows]
    short = [prompt for prompt in messages if len(encode_prompt(tokenizer, prompt)) <= max_length]
    if len(short) < count:
        raise ValueError(
            f"{len(short)} of {len(rows)} prompts have at most {max_length} tokens, and {count} are needed. Ask for fewer "
            "prompts, or allow longer ones."
        )
    return Dataset.from_dict({"prompt": short}).shuffle(seed).select(range(count))
