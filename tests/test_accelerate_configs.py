"""The configurations of accelerate: each says when to choose it, and those that the tests run are those shipped."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file


TESTS = Path(__file__).resolve().parent
SHIPPED = sorted((TESTS.parent / "accelerate_configs").glob("*.yaml"))
TWINS = sorted((TESTS / "accelerate_configs").glob("*.yaml"))


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShipped:
    def test_says_first_when_to_choose_it(self, path):
        assert path.read_text(encoding="utf-8").startswith("# Choose this ")

    def test_is_read_by_accelerate(self, path):
        config = load_config_from_file(str(path))
        assert config.distributed_type.value == read(path)["distributed_type"]
        assert (config.use_cpu, config.mixed_precision) == ((True, "no") if path.stem == "cpu" else (False, "bf16"))


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_what_is_tested_is_what_is_shipped(path):
    twin, shipped = read(path), read(TESTS.parent / "accelerate_configs" / path.name)
    assert twin["distributed_type"] == shipped["distributed_type"]
    for part in ("deepspeed_config", "fsdp_config"):
        ours, theirs = twin.get(part, {}), shipped.get(part, {})
        loading = "fsdp_cpu_ram_efficient_loading"  # moves the weights from the first process's GPU
        assert {name: ours[name] for name in ours if name != loading} == {
            name: theirs[name] for name in theirs if name != loading
        }


def test_finds_them():
    names = {path.stem for path in SHIPPED}
    assert names == {"cpu", "single_process", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"}
    assert {path.stem for path in TWINS} == {"zero2", "zero3", "fsdp2"}
