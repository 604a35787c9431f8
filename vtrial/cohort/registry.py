"""The cohorts that come with vtrial, by name."""

from __future__ import annotations

from pathlib import Path

from vtrial.records import InputError

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (_PACKAGE / "assets" / "cohorts", _PACKAGE.parent / "cohorts")  # a wheel's copy, the source tree


def shipped_cohorts() -> dict[str, Path]:
    """Name and file of every shipped cohort, by name."""
    found = {path.stem: path for folder in reversed(_FOLDERS) for path in folder.glob("*.csv")}
    return dict(sorted(found.items()))


def find_spec(name_or_path: str | Path) -> Path:
    """A spec's file: the path itself, or a shipped cohort by name (`oncology`) or by the path it has in the repository.

    The latter so that `cohorts/oncology.csv` works in any folder. Raises InputError where there is neither.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    shipped = shipped_cohorts()
    if path.as_posix() in (path.stem, f"cohorts/{path.stem}.csv") and path.stem in shipped:
        return shipped[path.stem]
    raise InputError(f"{path}: no such file; give a CSV or Parquet spec, or a shipped one: {', '.join(shipped)}")
