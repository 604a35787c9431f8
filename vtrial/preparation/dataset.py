"""Prepared studies as a training set: the table with its splits, what is said of the whole, and what was left out.

The layout is that of `vtrial.training.data.StoredVolumes`: subjects.parquet, ct/<id>.npy, suv/<id>.npy.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from vtrial.imaging.dicom.people import Person
from vtrial.imaging.dicom.suv import LeanMass, sul_per_suv
from vtrial.preparation.extent import fit_extents
from vtrial.preparation.sources.study import LeftOut, Study
from vtrial.preparation.split import SHARES, SPLITS, Member, Split, assign_splits
from vtrial.records import InputError, Subject, Support
from vtrial.storage import Folder, place, write_if_new

TABLE, LEFT_OUT, RECORD = "subjects", "left_out.csv", "splits.json"
_TOLD = 20  # reasons in an error
_RECORDED = TypeAdapter(dict[str, Split])
_NEEDED = ("sex", "age_years", "height_cm", "weight_kg")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A study whose arrays are on the disk, and the row that came with them (`volume.save_volume`)."""

    study: Study
    row: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What was written: the tables, and `facts` for the manifest (support, extent, splits, flags, left_out, and how
    many that had a split are `away`)."""

    table: pd.DataFrame
    left_out: pd.DataFrame
    facts: dict[str, Any]


def person_problems(person: Person) -> tuple[str, ...]:
    """Why a person cannot condition a model: what is not known of them, with the doubts that say why. To be asked
    before voxels are read."""
    missing = [name for name in _NEEDED if getattr(person, name) is None]
    if not missing:
        return ()
    return (f"unknown: {', '.join(missing)}; give them in a table of demographics", *person.doubts)


def finish_training_set(
    folder: Folder,
    prepared: Sequence[Prepared],
    left_out: Iterable[LeftOut],
    *,
    seed: int,
    shares: Mapping[Split, float] = SHARES,
    others: Iterable[Study] = (),
) -> TrainingSet:
    """Write subjects.parquet and .csv with a `split` column, and left_out.csv; each whole or not at all, if it changes.

    A split is given once: splits.json keeps it by the study's fingerprint, also while a study is away or fails.
    `others` are all that the source has now beside `prepared`: studies of one person keep its split. The support of the
    demographics and the fit of extents on heights are those of the training split, the latter without partial fields of
    view unless all are. InputError, after left_out.csv is written, where no study is left. The caller adds `facts` to
    the manifest.
    """
    reasons = {left.subject_id: left.reasons for left in left_out}
    for each in prepared:
        if problems := person_problems(each.study.person):
            reasons[each.study.subject_id] = problems
    kept = [each for each in prepared if each.study.subject_id not in reasons]
    rows = [{"subject_id": name, "reasons": "; ".join(why)} for name, why in sorted(reasons.items())]
    not_taken = pd.DataFrame(rows, columns=["subject_id", "reasons"])
    write_if_new(folder, LEFT_OUT, not_taken.to_csv(index=False).encode())
    if not kept:
        told = f"{folder.location}: none of {len(reasons)} studies can be trained on; {LEFT_OUT} there says why"
        raise InputError([told, *(f"{row['subject_id']}: {row['reasons']}" for row in rows[:_TOLD])])
    here = [*(each.study for each in prepared), *others]
    record = _recorded(folder)
    known = _of_people(record, here)
    members = [Member(p.study.fingerprint, p.study.patient, _body(p.study).sex) for p in kept]
    splits = assign_splits(members, seed, shares, known)
    away = len(record.keys() - {study.fingerprint for study in here})
    write_if_new(folder, RECORD, json.dumps(record | known | splits, indent=0, sort_keys=True).encode())
    table = _table(kept, splits)
    write_if_new(folder, f"{TABLE}.csv", table.to_csv(index=False).encode())
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_if_new(folder, f"{TABLE}.parquet", buffer.getvalue())
    return TrainingSet(table, not_taken, _facts(kept, table, len(reasons)) | {"away": away})


def _recorded(folder: Folder) -> dict[str, Split]:
    """The splits that were ever given, by fingerprint; those of the table in a set that was begun without a record."""
    if folder.size(RECORD) is not None:
        try:
            return _RECORDED.validate_json(folder.read(RECORD))
        except ValidationError:
            raise InputError(
                f"{place(folder.location, RECORD)}: not as vtrial prepare wrote it; restore it, as it tells whom "
                "training must not see, or choose another --out"
            ) from None
    if folder.size(f"{TABLE}.parquet") is None:
        return {}
    table = pd.read_parquet(io.BytesIO(folder.read(f"{TABLE}.parquet")))
    return dict(zip(table["fingerprint"], table["split"], strict=True)) if "fingerprint" in table else {}


def _of_people(record: Mapping[str, Split], studies: Sequence[Study]) -> dict[str, Split]:
    """The recorded split of each study's person, by the study's fingerprint; of several the one nearest to training."""
    people: dict[str, Split] = {}
    for study in studies:
        if split := record.get(study.fingerprint):
            people[study.patient] = min(split, people.get(study.patient, split), key=SPLITS.index)
    return {study.fingerprint: people[study.patient] for study in studies if study.patient in people}


def _body(study: Study) -> Subject:
    """The person of a study whose demographics are known, as a body."""
    person = study.person
    assert person.sex and person.age_years is not None and person.height_cm and person.weight_kg
    return Subject(study.subject_id, 0, 0, person.sex, person.age_years, person.height_cm, person.weight_kg)


def _table(kept: Sequence[Prepared], splits: Mapping[str, Split]) -> pd.DataFrame:
    """One row for each study. `person` is the first study of the same person, not what the source calls them."""
    first: dict[str, str] = {}
    rows = []
    for each in sorted(kept, key=lambda p: p.study.subject_id):
        study, body = each.study, _body(each.study)
        notes = [*study.notes, *study.person.doubts, *filter(None, [each.row.get("notes", "")])]
        rows.append(
            {
                "subject_id": study.subject_id,
                "person": first.setdefault(study.patient, study.subject_id),
                "split": splits[study.fingerprint],
                "sex": body.sex,
                "age_years": body.age_years,
                "height_cm": body.height_cm,
                "weight_kg": body.weight_kg,
                "bmi": body.bmi,
                **_lean_factors(body),
                **each.row,
                "notes": "; ".join(notes),
                "fingerprint": study.fingerprint,
            }
        )
        rows[-1] |= {name: fact for name, fact in study.facts.items() if name not in rows[-1]}
    table = pd.DataFrame(rows)
    for name in table.columns:  # a source's column may hold words in one row and numbers in another
        if table[name].dtype == object and table[name].map(type).nunique() > 1:
            table[name] = table[name].map(lambda value: value if value is None or value != value else str(value))
    return table


def _lean_factors(body: Subject) -> dict[str, float]:
    """By what the SUV of a body becomes SUL, by each formula of lean mass; NaN where one does not serve the body."""
    factors = {}
    for formula in get_args(LeanMass):
        try:
            factor = round(sul_per_suv(body.sex, body.weight_kg, body.height_cm / 100.0, formula), 4)
        except InputError:
            factor = math.nan
        factors[f"sul_per_suv_{formula}"] = factor
    return factors


def _facts(kept: Sequence[Prepared], table: pd.DataFrame, left_out: int) -> dict[str, Any]:
    """What the manifest says of the whole."""
    trained = table[table["split"] == "train"]
    taught = set(trained["subject_id"])
    bodies = [body for body in (_body(p.study) for p in kept) if body.subject_id in taught]
    whole = trained[~trained["partial"].astype(bool)]
    flags = Counter(name for told in table["flags"] for name in str(told).split(";") if name)
    facts: dict[str, Any] = {
        "support": asdict(Support.of(bodies)) if bodies else None,
        "splits": {split: int((table["split"] == split).sum()) for split in SPLITS},
        "flags": dict(flags.most_common()),
        "left_out": left_out,
    }
    if len(trained):
        # Bodies as they were trained on: any other extent would stretch or squeeze the twins.
        partial, fitting = whole.empty, trained if whole.empty else whole
        fitted = fit_extents(list(fitting["height_cm"]), list(fitting["extent_mm"]), level_only=partial)
        facts["extent"] = fitted.fit.model_dump()
        facts["extent_people"] = fitted.people
        facts["extent_median_residual_mm"] = fitted.median_residual_mm
        facts["extent_slope_is_the_papers"] = fitted.slope_is_the_papers
        facts["extent_of_partial"] = partial
    return facts
