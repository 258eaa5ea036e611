"""The README's sections on teachers and groups, block after block as they stand, with tiny models in place of the named."""

import re
from pathlib import Path

import pytest
from teacher_server import serve
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl import GRKDConfig, GRKDTrainer


README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SECTIONS = ["Make groups", "Use a remote teacher", "Online", "Your own scorer"]


def blocks(section):
    (text,) = re.findall(rf"^## {section}\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the blocks define, from one section to the next, in a folder with the models that they name."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = byte_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("Qwen/Qwen3-0.6B", 0), ("Qwen/Qwen3-4B", 1)):
            tiny_model("llama", len(tokenizer), seed=seed, initializer_range=0.3).save_pretrained(name)
            tokenizer.save_pretrained(name)
        teacher = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-4B")
        with serve(teacher, AutoTokenizer.from_pretrained("Qwen/Qwen3-4B")) as server:
            yield {"url": server.url}


@pytest.fixture
def small_machine(monkeypatch):
    """What a README need not say: no GPU, and one step is enough."""
    plain = GRKDConfig.__init__

    def init(self, *args, **kwargs):
        small = {"bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 1, "gradient_checkpointing": False}
        plain(self, *args, **small | {"save_strategy": "no"} | kwargs)

    monkeypatch.setattr(GRKDConfig, "__init__", init)


@pytest.mark.parametrize("section", SECTIONS)
def test_section(names, small_machine, section):
    code = blocks(section)
    assert code
    for block in code:
        block = block.replace("http://localhost:8000/v1", names["url"])
        exec(compile(block, f"README.md, {section}", "exec"), names)
    if section == "Make groups":
        assert len(names["groups"]) == len(names["rescored"]) == 4
        assert names["rescored"]["teacher_scores"] != names["groups"]["teacher_scores"]
        assert len(names["cached"][0]["teacher_top_ids"][0][0]) == 64
    if section == "Use a remote teacher":
        for row, expected in zip(names["served"]["teacher_scores"], names["groups"]["teacher_scores"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
    if section in ("Online", "Your own scorer"):
        assert isinstance(names["trainer"], GRKDTrainer) and names["trainer"].state.global_step == 1
    if section == "Your own scorer":
        assert names["scored"]["teacher_scores"] == [[1.0, 0.0]] * 2
