import gc
import logging
import os

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and the workers share the cores


def pytest_collection_finish():
    """`Trainer.train` collects garbage: without all that was imported it takes a hundredth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def tokenizer():
    """Of words."""
    from tiny import tiny_tokenizer  # not before the environment is set

    return tiny_tokenizer()


@pytest.fixture(scope="module")
def words(tokenizer):
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


@pytest.fixture
def warnings():
    """Messages of the package's loggers, wherever transformers sends them."""
    said, handler, logger = [], logging.Handler(), logging.getLogger("grkd_trl")
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
