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


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small collection of PET/CT to prepare, the same for all tests of a module: not to be changed."""
    from tests.patients import write_collection

    return write_collection(tmp_path_factory.mktemp("module"))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` in this process makes volumes of a thirty-second of the voxels."""
    from tests.preparer import IN_PLANE_MM, SHAPE

    monkeypatch.setattr("vtrial.preparation.volume.SHAPE", SHAPE)
    monkeypatch.setattr("vtrial.preparation.volume.IN_PLANE_MM", IN_PLANE_MM)
