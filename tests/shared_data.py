"""Real data that lies beside the repository, not in it."""

import os
from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """File or folder `name` of the shared data. Skips the test that asks where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("GRKD_TEST_DATA", default)) / name
    if not path.exists():
        pytest.skip(f"needs {path}: put the shared data there, or name its folder in GRKD_TEST_DATA")
    return path
