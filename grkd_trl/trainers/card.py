"""The part of a model card that says what was minimised."""

from importlib.metadata import version
from pathlib import Path

from transformers import TrainingArguments

from .config import own_fields


def add_objective(card: Path, equation: str, args: TrainingArguments, config_class: type[TrainingArguments]) -> None:
    """
    Add to a model card what was minimised, and by which version of this package: the equation, and the method's own
    fields with their values.

    Args:
        card (`Path`):
            Model card, which exists.
        equation (`str`):
            LaTeX of the loss.
        args ([`~transformers.TrainingArguments`]):
            Configuration of the run.
        config_class (`type`):
            Class whose own fields are listed.
    """
    rows = "\n".join(f"| `{name}` | `{getattr(args, name)}` |" for name in own_fields(config_class))
    section = (
        f"\n\n## Objective\n\nMinimised with grkd_trl {version('grkd_trl')}:\n\n$$ {equation} $$\n\n"
        f"| field | value |\n|---|---|\n{rows}\n"
    )
    card.write_text(card.read_text(encoding="utf-8") + section, encoding="utf-8")
