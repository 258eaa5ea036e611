import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and the workers share the cores


def pytest_collection_finish():
    """`Trainer.train` collects garbage: without all that was imported it takes a hundredth of the time."""
    gc.collect()
    gc.freeze()
