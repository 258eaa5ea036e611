"""
The page of all fields is what the docstrings say. After a docstring was changed, write it again with
`python tests/test_configuration_page.py`.
"""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import grkd_trl
from grkd_trl.generation import GroupsConfig
from grkd_trl.trainers.base import GroupConfig


PAGE = Path(__file__).resolve().parents[1] / "examples/guides/configuration.md"
CONFIGS = [getattr(grkd_trl, name) for name in grkd_trl.__all__ if name.endswith("Config")] + [GroupsConfig]
FIELD = re.compile(r"^(\w+) \((.*?)\):\n((?:    .*\n|\n)*)", re.MULTILINE)
INTRODUCTION = """\
# Configuration

Every field that the configurations add to those of TRL and transformers, or give another default, as their docstrings have
it. All configurations of trainers of language models also have the shared fields, and those of
[`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig) (`DPOConfig` those of TRL's).
"""


def fields_of(config):
    """Name, type with default, and meaning of each field of a class's own docstring."""
    text = inspect.cleandoc(vars(config)["__doc__"])
    _, _, listed = text.partition("Parameters:\n")
    listed = re.split(r"^(?=\S)", listed, flags=re.MULTILINE)[0]
    for name, kind, meaning in FIELD.findall(textwrap.dedent(listed) + "\n"):
        kind = kind.replace("*optional*, defaults to", "default").replace("*optional*", "optional")
        meaning = re.sub(r"\[`(?:~\w+\.)?(.*?)`\]", r"`\1`", " ".join(meaning.split()))
        yield name, kind, re.sub(r"\\\\?\( (.*?) \\\\?\)", r"$\1$", meaning)


def written():
    parts = [INTRODUCTION]
    for config in [GroupConfig, *CONFIGS]:
        rows = list(fields_of(config))
        title = "Shared fields" if config is GroupConfig else config.__name__
        parts.append(f"\n## {title}\n\n| field | type | meaning |\n|---|---|---|\n")
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        parts += [f"| `{name}` | {kind} | {meaning} |\n" for name, kind, meaning in cells]
    return "".join(parts)


@pytest.mark.parametrize("config", [GroupConfig, *CONFIGS], ids=lambda config: config.__name__)
def test_every_own_field_is_documented(config):
    own = [name for name in vars(config).get("__annotations__", {}) if not name.startswith("_")]
    documented = [name for name, *_ in fields_of(config)]
    assert set(own) <= set(documented) <= set(config.__dataclass_fields__)
    assert len(set(documented)) == len(documented)
    assert all(meaning for *_, meaning in fields_of(config))


def test_the_page_is_what_the_docstrings_say():
    assert PAGE.read_text(encoding="utf-8") == written(), "run `python tests/test_configuration_page.py`"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
