"""The key: which subject is which study of the source. It identifies people, so it lies where the user asks and nowhere
else, and its owner alone can read it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vtrial.preparation.sources.study import Collection, LeftOut, Study
from vtrial.records import InputError
from vtrial.storage import LocalFolder, expanded, open_folder, write_atomic

_COLUMNS = ("subject_id", "path", "patient", "study_uid", "left_out")


def source_key(collection: Collection) -> list[dict[str, str]]:
    """One row for each subject, left-out ones too: which study of the source it is. This identifies people."""
    entries: list[tuple[Study | LeftOut, str]] = [(study, "") for study in collection.studies]
    entries += [(left, "; ".join(left.reasons)) for left in collection.left_out]
    return [
        {
            "subject_id": entry.subject_id,
            "path": entry.origin.path,
            "patient": entry.origin.patient,
            "study_uid": entry.origin.study_uid,
            "left_out": reasons,
        }
        for entry, reasons in sorted(entries, key=lambda pair: (len(pair[0].subject_id), pair[0].subject_id))
    ]


def check_key(path: Path, source: str | Path, demographics: Path | None, out: str) -> None:
    """InputError where a key would replace anything but an earlier key, or would lie in the training set `out`."""
    try:
        key, folder = path.resolve(), open_folder(out)
        for what, other in (("the source", source), ("the table of demographics", demographics)):
            if other is not None and key == expanded(other).resolve():
                raise InputError(f"--key {path}: that is {what} itself; name another file for the key")
        if isinstance(folder, LocalFolder) and key.is_relative_to(folder.path().resolve()):
            raise InputError(
                f"--key {path}: lies in the training set {out}; the key identifies people, so name a file elsewhere"
            )
        if key.exists() and not (key.is_file() and _is_key(key)):
            raise InputError(f"--key {path}: what lies there is no key; name another file, or remove it")
    except (OSError, RuntimeError) as error:
        raise _unfit(path, error) from None


def _is_key(path: Path) -> bool:
    """Whether a file begins as a key does, or is empty."""
    with path.open("rb") as file:
        return file.readline(1000).strip() in (b"", ",".join(_COLUMNS).encode())


def write_key(path: Path, collection: Collection) -> None:
    """Write `source_key` as CSV that its owner alone can read; InputError if that cannot be."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows(source_key(collection))
    try:
        write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"), mode=0o600)
    except OSError as error:
        raise _unfit(path, error) from None


def _unfit(path: Path, error: OSError | RuntimeError) -> InputError:
    why = getattr(error, "strerror", None) or "no such place"
    return InputError(f"--key {path}: cannot be written ({why}); name another file for the key")
