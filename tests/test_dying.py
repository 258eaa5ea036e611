"""Training that is killed, or told to end, and goes on: with the same numbers, on as many processes or more or fewer."""

import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import pytest
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers.trainer_utils import get_last_checkpoint


pytestmark = pytest.mark.distributed

HERE = Path(__file__).resolve().parent
PATHS = os.pathsep.join(map(str, (HERE, HERE.parent)))
STEPS, RUN = 30, "GRKD+mixed+damped"  # online groups, of student and teacher
EVENTS = ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_save"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        tiny_model("llama", len(tokenizer), seed=seed, initializer_range=0.2).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has imported all that is slow, and has started nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_worker"])
    with pytest.MonkeyPatch.context() as patch:  # where the server of forks finds its modules
        patch.setenv("PYTHONPATH", PATHS)
        ready = context.Process(target=time.sleep, args=(0,))
        ready.start()
    ready.join()
    return context


@pytest.fixture(scope="module")
def train(forks, models):
    """Train in a folder on some processes, and give their exit codes."""

    def train(folder, world, death=None, save_steps=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = [
            forks.Process(
                target=distributed_worker.train_until,
                args=(RUN, models, folder, death, rank, world, port, save_steps),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            process.kill()  # one that hangs
        return [process.exitcode for process in processes]

    return train


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder, 1) == [0]
    return weights(folder)


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


class TestKilled:
    @pytest.mark.parametrize(
        "worlds, bound", [([1] * 11, 0.0), ([2] * 11, 1e-6), ([1, 2, 1, 2], 1e-6)], ids=["one", "two", "changing"]
    )
    def test_resumed_is_uninterrupted(self, train, uninterrupted, tmp_path, worlds, bound):
        """Killed at random steps, at any point of them, and resumed, on `worlds` processes one after the other."""
        draw = random.Random(0)
        steps = sorted(draw.sample(range(1, STEPS), len(worlds) - 1))
        for world, step in zip(worlds, steps, strict=False):
            deaths = train(tmp_path, world, (step, draw.choice(EVENTS), signal.SIGKILL))
            assert deaths == [-signal.SIGKILL] * world
        assert not (tmp_path / "student").exists()
        assert train(tmp_path, worlds[-1]) == [0] * worlds[-1]
        assert distance(weights(tmp_path), uninterrupted) <= bound


class TestKilledWhileSaving:
    """The folder that is left is not the last checkpoint."""

    # What a checkpoint gets first, after the weights, and last
    FILES = {4: "config.json", 9: "tokenizer_config.json", 17: "trainer_state.json"}

    def test_resumed_is_uninterrupted(self, train, uninterrupted, tmp_path):
        for step, file in self.FILES.items():
            assert train(tmp_path, 1, (step, file, signal.SIGKILL)) == [-signal.SIGKILL]
            assert get_last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
            assert not (tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists()
        assert (tmp_path / f"checkpoint-{step}" / "optimizer.pt").exists()
        assert train(tmp_path, 1) == [0]
        assert distance(weights(tmp_path), uninterrupted) == 0


class TestTold:
    def test_sigterm_ends_with_a_checkpoint(self, train, uninterrupted, tmp_path):
        assert train(tmp_path, 1, (10, "on_step_begin", signal.SIGTERM), save_steps=STEPS) == [0]
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
        assert train(tmp_path, 1) == [0]
        assert distance(weights(tmp_path), uninterrupted) == 0


@pytest.mark.slow
class TestRankDies:
    @pytest.mark.parametrize("how, error", [("raise", "This step cannot be done"), ("kill", "Signal 9")])
    def test_the_other_ends_within_a_minute(self, models, tmp_path, how, error):
        worker = [str(HERE / "distributed_worker.py"), "--models", str(models), "--output_dir", str(tmp_path)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        ended = subprocess.run(
            [*torchrun, *worker, "--runs", "GRKD", "--death", "3", how],
            env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.returncode != 0 and error in ended.stderr
        (died,) = re.findall(r"died at ([\d.]+)", ended.stderr)
        assert time.time() - float(died) < 60
