"""Quiet, offline settings for every test, and the real data where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before ray is imported: no usage report, no access token written into the home folder, no copy of the environment.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: VTRIAL_SHARED_DATA, or `shared/data` beside the source tree. Skips without it."""
    folder = Path(os.environ.get("VTRIAL_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set VTRIAL_SHARED_DATA to their folder")
    return folder
