import gc
import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and the workers share the cores
# A cache of its own for each worker: datasets 5.2 takes a folder that an earlier run of the tests wrote for the one of now.
_cache = tempfile.TemporaryDirectory(prefix="datasets-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _cache.name


def pytest_collection_finish():
    """`Trainer.train` collects garbage: without all that was imported it takes a hundredth of the time."""
    gc.collect()
    gc.freeze()
