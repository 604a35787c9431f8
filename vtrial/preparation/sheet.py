"""Which volumes of a training set to look at, thinned for a contact sheet (`vtrial.reporting.preview.preview_png`)."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from vtrial.geometry import IN_PLANE_MM
from vtrial.records import PetCt
from vtrial.storage import Folder

_THIN = 2  # every second voxel: a sheet has no room for more, and memory for a dozen whole volumes is dear


def sheet_subjects(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Up to `count` rows to look at: those with most flags take up to half of the places, others the rest."""
    flags = table["flags"].astype(str).str.split(";").map(lambda names: sum(map(bool, names)))
    flagged = table[flags > 0].loc[flags[flags > 0].sort_values(ascending=False, kind="stable").index]
    plain = table[flags == 0]
    doubtful = flagged.head(max(count // 2, count - len(plain)))
    places = np.unique(np.linspace(0, len(plain) - 1, min(count - len(doubtful), len(plain))).round().astype(int))
    return pd.concat([doubtful, plain.iloc[places]])


def sheet_scans(folder: Folder, table: pd.DataFrame, count: int = 12) -> list[tuple[str, PetCt]]:
    """The title and the thinned scan (14 MB each) of every row of `sheet_subjects`; OSError for a file that is gone."""
    scans = []
    for row in sheet_subjects(table, count).to_dict("records"):
        ct, suv = (
            np.load(io.BytesIO(folder.read(row[f"{kind}_path"])))[::_THIN, ::_THIN, ::_THIN] for kind in ("ct", "suv")
        )
        spacing = (_THIN * IN_PLANE_MM, _THIN * IN_PLANE_MM, _THIN * float(row["spacing_z_mm"]))
        title = f"{row['subject_id']} {row['flags'].replace(';', ', ')}".strip()
        scans.append((title, PetCt(np.ascontiguousarray(ct), suv.astype(np.float32), spacing)))
    return scans
