"""Who is who: unusable studies keep their identity for the key alone, and a key replaces nothing but a key."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pandas as pd
import pytest

from tests.dicoms import PATIENT, ROOT_UID, Edit, setting, write_series, write_study
from tests.patients import write_patient
from tests.petcts import write_fdg
from tests.test_cli import vtrial_command
from vtrial.preparation.sources import check_key, find_studies, source_key, write_key
from vtrial.records import InputError

Capture = pytest.CaptureFixture[str]
NAME = "Quorzelda"


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrial.preparation.volume.SHAPE", (28, 28, 48))
    monkeypatch.setattr("vtrial.preparation.volume.IN_PLANE_MM", 16.0)


def prepare(capfd: Capture, *arguments: object) -> tuple[int, str]:
    usual = ["--segmenter", "none", "--allow-partial", "--executor", "local", "--threads-per-worker", "1"]
    code, out, err = vtrial_command(capfd, "prepare", *map(str, arguments), *usual)
    return code, out + err


def person(name: str, **values: object) -> dict[str, Edit]:
    edit = setting(PatientID=name, **values)
    return {"ct": edit, "pet": edit}


def table(path: Path, *names: str) -> Path:
    path.write_text("PatientID,sex,age,height,weight\n" + "".join(f"{name},F,60,165,70\n" for name in names))
    return path


def test_a_collection_of_unusable_dicom_says_why_and_who(tmp_path: Path, capfd: Capture) -> None:
    write_study(tmp_path / "src" / NAME / "20190704", **person(PATIENT, PatientWeight=900))
    people, key = table(tmp_path / "people.csv", PATIENT), tmp_path / "key.csv"
    code, told = prepare(capfd, tmp_path / "src", "--out", tmp_path / "out", "--demographics", people, "--key", key)
    assert code == 2 and "none of 1 studies can be trained on; left_out.csv there says why" in told
    (left,) = pd.read_csv(tmp_path / "out" / "left_out.csv").itertuples()
    assert "PatientWeight is 900 kg" in left.reasons
    (row,) = pd.read_csv(key).itertuples()
    assert (row.path, row.patient, row.study_uid) == (f"{NAME}/20190704", PATIENT, f"{ROOT_UID}.1")
    written = told + "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".csv", ".json"))
    for secret in (NAME, PATIENT, ROOT_UID, "20190704"):
        assert secret not in written.replace(str(tmp_path), ""), secret


def test_rows_about_unusable_studies_are_no_strangers(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write_study(source / NAME, **person("A", PatientWeight=900))
    write_study(source / "sound", study=2, **person("B"))
    assert find_studies(source, table(tmp_path / "people.csv", "A", "B")).notes == ()
    (note,) = find_studies(source, table(tmp_path / "people.csv", "B", "C")).notes
    assert note == "1 rows of demographics are about no study here"


def test_a_row_about_a_folder_is_about_the_study_that_can_be_used(tmp_path: Path) -> None:
    """Beside it lie files that cannot be read, and another study without a PET."""
    source, folder = tmp_path / "src", tmp_path / "src" / NAME
    write_study(folder, **person("A"))
    write_series(folder / "ct", "CT", study=2, edit=setting(PatientID="A"), name="more {:d}")
    write_series(folder, "CT", study=4, edit=setting(PatientID="A"), skip=range(11))
    write_series(folder / "pet", "CT", study=4, edit=setting(PatientID="A"), name="more {:d}", skip=[11])
    (folder / "torn").symlink_to(tmp_path / "nowhere")
    write_study(source / "sound", study=3, **person("B"))
    (tmp_path / "people.csv").write_text(f"study,sex,age,height,weight\n{NAME},F,33,165,70\n")
    found = find_studies(source, tmp_path / "people.csv")
    assert [study.person.age_years for study in found.studies] == [33.0, 68.0]
    left_out = [row for row in source_key(found) if row["left_out"]]
    assert [(row["path"], row["patient"]) for row in left_out] == [
        (NAME, "A"),
        (f"{NAME}/ct", "A"),
        (f"{NAME}/torn", ""),
    ]


def test_two_people_in_a_study_are_neither(tmp_path: Path) -> None:
    write_study(tmp_path, ct=setting(PatientID="A"), pet=setting(PatientID="B"))
    (row,) = source_key(find_studies(tmp_path))
    assert (row["path"], row["patient"], row["study_uid"]) == (".", "", f"{ROOT_UID}.1")


def test_a_key_replaces_a_key_alone(tmp_path: Path, capfd: Capture) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    write_patient(source / NAME, 1)
    people, elsewhere = table(tmp_path / "people.csv", PATIENT), table(tmp_path / "other.csv", PATIENT)
    before = people.read_text()
    (tmp_path / "link").symlink_to(out)
    for key, told in (
        (people, "that is the table of demographics itself"),
        (source, "that is the source itself"),
        (out / "key.csv", "lies in the training set"),
        (tmp_path / "link" / "below" / "key.csv", "lies in the training set"),
        (elsewhere, "what lies there is no key"),
        (tmp_path, "what lies there is no key"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        code, answer = prepare(capfd, source, "--out", out, "--demographics", people, "--key", key)
        assert code == 2 and told in answer, answer
    assert people.read_text() == elsewhere.read_text() == before and not out.exists()
    for key in (tmp_path / "new" / "key.csv", tmp_path / "empty.csv"):
        (tmp_path / "empty.csv").touch()
        for _ in range(2):
            assert prepare(capfd, source, "--out", out, "--demographics", people, "--key", key)[0] == 0
        assert pd.read_csv(key)["path"].tolist() == [NAME]


def test_a_list_of_paths_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("subject_id,path,patient,study_uid,left_out\n")  # as a key begins
    with pytest.raises(InputError, match="that is the source itself"):
        check_key(tmp_path / "list.csv", tmp_path / "list.csv", None, str(tmp_path / "out"))
    check_key(tmp_path / "list.csv", tmp_path / "src", None, "memory://out")


def test_a_key_is_its_owners_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fdg(tmp_path / "src")
    modes = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    before = os.umask(0)
    try:
        write_key(tmp_path / "key.csv", find_studies(tmp_path / "src"))
    finally:
        os.umask(before)
    assert modes == [0o600] and stat.S_IMODE((tmp_path / "key.csv").stat().st_mode) == 0o600
