"""Which studies lie under a path: the form of the collection recognised, people joined, duplicates left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vtrial.imaging.dicom.fields import names_nobody
from vtrial.imaging.dicom.people import Person
from vtrial.imaging.dicom.suv import Tracer
from vtrial.imaging.discovery import FoundScan, names_patient
from vtrial.preparation.sources.content import fingerprint, stamp, twins_of
from vtrial.preparation.sources.dicoms import dicom_candidates
from vtrial.preparation.sources.listed import listed_candidates
from vtrial.preparation.sources.niftis import called, nifti_candidates
from vtrial.preparation.sources.people import NOBODY, could_be_one, person_of, together
from vtrial.preparation.sources.study import Candidate, Collection, Kind, LeftOut, Study
from vtrial.preparation.sources.tables import (
    Joined,
    facts_of,
    folded,
    join,
    other_tracer,
    read_people,
    tables_beside,
    told_columns,
    told_header,
)
from vtrial.preparation.sources.weights import weighed
from vtrial.records import InputError
from vtrial.storage import expanded

_FORMS: Mapping[Kind, str] = {"dicom": "DICOM", "pairs": "CTres and SUV files", "nnunet": "nnU-Net cases"}

_WANTED = "name a folder of PET/CT studies, or a table of their paths"


def find_studies(source: str | Path, demographics: str | Path | None = None, *, tracer: Tracer = "fdg") -> Collection:
    """The PET/CT studies of a source: a folder of DICOM, FDG-PET-CT-Lesions or nnU-Net raw, or a table of paths.

    `demographics` is a table to join. Tables in a folder of NIfTI files, or beside it, fill what it leaves open, and
    headers fill the rest. A study without demographics is a study all the same: its `person` says what is missing.
    Raises InputError where nothing is found, two forms lie side by side, or `demographics` cannot be read or is about
    no study here. No file under the source is named in it, as its name may be somebody's.
    """
    place = expanded(source).absolute()
    kind, candidates, notes = _recognised(place, tracer)
    joined = _joined(place, kind, candidates, demographics)
    notes += [f"{j.strangers} rows of demographics are about no study here" for j in joined if j.strangers]
    if joined:
        candidates = [_with_people(i, candidate, joined, tracer) for i, candidate in enumerate(candidates)]
    candidates = [weighed(candidate) for candidate in candidates]
    prints = [fingerprint(candidate.files) if not candidate.reasons else "" for candidate in candidates]
    twins = twins_of(prints, [candidate.files for candidate in candidates])
    patients = _patients(candidates, joined, twins)
    notes += _doubtful_people(candidates, joined, patients)
    notes += _doubtful_folders(candidates, joined) if kind == "pairs" else []
    studies, left_out = [], []
    for i, each in enumerate(candidates):
        subject_id = _id(i)
        reasons = each.reasons
        if i in twins:
            reasons = (f"a duplicate: its files are those of {_id(twins[i])}",)
        elif not reasons and not prints[i]:  # without a fingerprint no journal could know it again
            reasons = ("its files cannot be read now: once they can, the same command takes it",)
        if reasons or each.load is None:
            left_out.append(LeftOut(subject_id, reasons, each.origin))
        else:
            person = each.person or NOBODY
            known = prints[i], patients[i], each.load, each.origin, stamp(each.files)
            studies.append(Study(subject_id, person, each.facts, each.notes, *known))
    return Collection(kind, tuple(studies), tuple(left_out), tuple(notes))


def _id(i: int) -> str:
    return f"s{i + 1:04d}"


def _recognised(place: Path, tracer: Tracer) -> tuple[Kind, list[Candidate], list[str]]:
    """The form of a collection, what it offers in an order that depends on names alone, and notes."""
    try:
        is_table, is_folder = place.is_file(), place.is_dir()
    except OSError as error:  # a name too long, a folder above it without leave
        raise InputError(f"{place}: cannot be looked for ({error.strerror}); {_WANTED}") from None
    if is_table:
        return "table", listed_candidates(place), []
    if not is_folder:
        raise InputError(f"{place}: nothing is there; {_WANTED}")
    found = nifti_candidates(place, tracer)
    found["dicom"], others, no_images = dicom_candidates(place, tracer)
    usable = {kind: sum(not c.reasons for c in some) for kind, some in found.items()}
    forms = [kind for kind, count in usable.items() if count]
    if len(forms) > 1:
        told = " and ".join(f"{usable[kind]} studies as {_FORMS[kind]}" for kind in forms)
        raise InputError(f"{place}: holds {told}; the same people may be in both: name the folder of one of them")
    everything = sorted((c for some in found.values() for c in some), key=lambda c: c.origin.path)
    if not everything:
        told = (
            f"{place}: no PET/CT is there; name a folder of DICOM, of CTres.nii.gz with SUV.nii.gz, or of "
            "<case>_0000.nii.gz (CT) with <case>_0001.nii.gz (SUV), or a table of paths"
        )
        raise InputError([told, *no_images])
    kind = forms[0] if forms else max(found, key=lambda kind: len(found[kind]))
    return kind, everything, [f"{count} {what}: passed over" for what, count in others.items() if kind == "dicom"]


def scanned_people(root: Path, scans: Sequence[FoundScan]) -> list[Candidate]:
    """The scans found in a folder with what the tables there, or beside it, say of their people."""
    candidates = [Candidate(*called(scan)) for scan in scans]
    joined = _beside(root, candidates)
    return [_with_people(i, candidate, joined, "any") for i, candidate in enumerate(candidates)]


def _joined(place: Path, kind: Kind, candidates: Sequence[Candidate], demographics: str | Path | None) -> list[Joined]:
    """The table asked for, then those beside NIfTI files that are about any of them."""
    beside = _beside(place, candidates) if kind in ("pairs", "nnunet") else []
    return beside if demographics is None else [_asked(expanded(demographics), place, candidates), *beside]


def _beside(place: Path, candidates: Sequence[Candidate]) -> list[Joined]:
    return [joined for table in tables_beside(place) if (joined := join(table, candidates)).rows]


def _asked(path: Path, place: Path, candidates: Sequence[Candidate]) -> Joined:
    table = read_people(path)
    if not told_columns(table):
        raise InputError(
            f"{table.path}: no table of demographics: it needs a column that says whom a row is about (File Location, "
            "study, case, StudyInstanceUID, PatientID, subject_id) and any of sex, age, height, weight; "
            f"{told_header(table)}"
        )
    joined = join(table, candidates)
    if not joined.rows:
        raise InputError(
            f"{table.path}: none of its {len(table.rows)} rows is about a study of {place}; its key must be a study's "
            "path below there, its folder, case or StudyInstanceUID, or the patient's folder or PatientID"
        )
    return joined


def _with_people(i: int, candidate: Candidate, joined: Sequence[Joined], tracer: Tracer) -> Candidate:
    """A candidate with what tables say of it, in their order, before what it says itself."""
    found = [each.rows[i] for each in joined if i in each.rows]
    if not found:
        known = candidate.person or NOBODY
        doubts = (*known.doubts, "no row of demographics is about this study")
        return replace(candidate, person=replace(known, doubts=doubts))
    person = candidate.person
    for rows in reversed(found):
        person = person_of(rows) if person is None else together(person_of(rows), person)
    facts = {key: value for rows in reversed(found) for key, value in facts_of(rows).items()}
    reasons = candidate.reasons
    if tracer == "fdg" and any(map(other_tracer, found)):
        reasons = (*reasons, "its tracer is not FDG by the table: --tracer any takes it")
    return replace(candidate, person=person, facts={**candidate.facts, **facts}, reasons=reasons)


def _patients(candidates: Sequence[Candidate], joined: Sequence[Joined], twins: Mapping[int, int]) -> list[str]:
    """A name for each candidate's person: one for all that anything says to be of one person.

    Folders, headers and tables may each call people in their own way, and a study may lie there twice under two names.
    What anonymisers call everybody (ANON) unites nobody.
    """
    parent: dict[str, str] = {}

    def root(label: str) -> str:
        while parent.setdefault(label, label) != label:
            label = parent[label]
        return label

    def unite(a: str, b: str) -> None:
        first, second = sorted((root(a), root(b)))
        parent[second] = first

    own = [f"\0{i}" if names_nobody(c.origin.patient) else folded(c.origin.patient) for i, c in enumerate(candidates)]
    for each in joined:
        for i, name in each.patients.items():
            if not names_nobody(name):
                unite(own[i], folded(name))
    for i, j in twins.items():
        unite(own[i], own[j])
    return [hashlib.sha256(root(label).encode("utf-8", "surrogateescape")).hexdigest()[:16] for label in own]


def _doubtful_people(candidates: Sequence[Candidate], joined: Sequence[Joined], patients: Sequence[str]) -> list[str]:
    """Notes on whose the studies are: where nothing tells, and where one name seems to be several people's."""
    named = _named(joined)
    usable = [i for i, candidate in enumerate(candidates) if not candidate.reasons]
    nameless = sum(names_nobody(candidates[i].origin.patient) and i not in named for i in usable)
    notes = []
    if nameless and len(usable) > 1:
        notes.append(
            f"{nameless} studies do not tell whose they are (no PatientID, or one such as ANON): each was taken to be "
            "of another person; a column PatientID in a table of demographics tells"
        )
    people: dict[str, list[Person]] = {}
    for i in usable:
        people.setdefault(patients[i], []).append(candidates[i].person or NOBODY)
    several = [len(same) for same in people.values() if not could_be_one(same)]
    if several:
        notes.append(
            f"{sum(several)} studies are of {len(several)} people by their names, but of several sexes or heights: "
            "does a PatientID stand for many? They stay in one split; column person of subjects.csv shows them"
        )
    return notes


def _named(joined: Sequence[Joined]) -> set[int]:
    """The candidates whose person a table names."""
    return {i for each in joined for i, name in each.patients.items() if not names_nobody(name)}


def _doubtful_folders(candidates: Sequence[Candidate], joined: Sequence[Joined]) -> list[str]:
    """A note where folders above those of the people hold several: they may be sites, or be the people themselves."""
    people: dict[PurePosixPath, set[str]] = {}
    for i in {i for i, candidate in enumerate(candidates) if not candidate.reasons} - _named(joined):
        place = PurePosixPath(candidates[i].origin.path)
        if len(place.parts) > 2 and not any(map(names_patient, place.parts)):
            people.setdefault(place.parent.parent, set()).add(place.parent.name)
    if len(people) < 2 or max(map(len, people.values())) < 2:
        return []
    return [
        f"{sum(map(len, people.values()))} folders that hold studies were taken to be a person's each; they lie in "
        f"{len(people)} folders, as of sites: if these are the people, a column PatientID in a table of demographics "
        "unites them"
    ]
