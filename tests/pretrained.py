"""Pretrained models for the tests that need real ones: their folder is named by GRKD_TEST_MODELS."""

import os
from pathlib import Path

import pytest


MODELS = Path(os.environ.get("GRKD_TEST_MODELS", "models"))
SMOLLM2 = MODELS / "smollm2-135m-instruct"
PRUNED = MODELS / "smollm2-15-layers"  # every second layer of it
GEMMA3 = MODELS / "gemma-3-270m"


def missing(*folders: Path) -> str | None:
    """Why a test of these models is skipped, or `None` where all are there."""
    absent = [folder.name for folder in folders if not (folder / "config.json").is_file()]
    return f"needs {' and '.join(absent)} in {MODELS}: name another folder in GRKD_TEST_MODELS" if absent else None


def needs(*folders: Path) -> list[pytest.MarkDecorator]:
    """Marks of a test of these models."""
    reason = missing(*folders)
    return [pytest.mark.pretrained, pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=reason or "")]
