"""What is said of a whole training set: splits, extents on heights, its tables, and which volumes to look at."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from vtrial.diffusion.weights import ExtentFit
from vtrial.generation import twin_spacing_mm
from vtrial.geometry import EXTENT_SLICES_PER_M
from vtrial.imaging.dicom.people import Person
from vtrial.imaging.volume import Volume
from vtrial.preparation.dataset import Prepared, finish_training_set, person_problems
from vtrial.preparation.extent import Place, field_of_view, fit_extents
from vtrial.preparation.sheet import sheet_scans, sheet_subjects
from vtrial.preparation.sources.study import LeftOut, Origin, Study
from vtrial.preparation.split import SPLITS, Member, assign_splits
from vtrial.records import InputError, Sex
from vtrial.reporting.preview import preview_png
from vtrial.storage import open_folder


def members(people: int, first: int = 0) -> list[Member]:
    """Every third person has two studies; two thirds are women."""
    found = []
    for i in range(first, first + people):
        sex: Sex = "M" if i % 3 == 2 else "F"
        found += [Member(f"{i}-{k}", f"person {i}", sex) for k in range(2 if i % 3 == 0 else 1)]
    return found


def test_splits_keep_their_shares_in_both_sexes_and_never_part_a_person() -> None:
    everyone = members(300)
    splits = assign_splits(everyone, seed=1)
    for sex, people in (("F", 200), ("M", 100)):
        of_sex = {m.patient: splits[m.key] for m in everyone if m.sex == sex}
        counts = Counter(of_sex.values())
        assert len(of_sex) == people
        for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
            assert abs(counts[split] - share * people) <= 1.0
    assert all(len({splits[m.key] for m in everyone if m.patient == p}) == 1 for p in {m.patient for m in everyone})
    assert assign_splits(everyone[::-1], seed=1) == splits
    assert assign_splits(everyone, seed=2) != splits


def test_splits_stay_when_studies_are_added() -> None:
    before = assign_splits(members(40), seed=3)
    more = [*members(90), Member("5-again", "person 5", "M")]
    after = assign_splits(more, seed=3, known=before)
    assert {key: after[key] for key in before} == before
    assert after["5-again"] == before["5-0"]
    counts = Counter({m.patient: after[m.key] for m in more}.values())
    assert abs(counts["validation"] - 9) <= 2
    assert abs(counts["test"] - 9) <= 2


def test_a_person_found_in_two_splits_goes_where_it_was_trained_on() -> None:
    two = [Member("a", "one", "F"), Member("b", "one", "F")]
    assert assign_splits(two, 0, known={"a": "test", "b": "train"}) == {"a": "train", "b": "train"}


def test_shares_may_leave_splits_out() -> None:
    splits = assign_splits(members(20), 0, shares={"train": 3, "validation": 1})
    assert set(splits.values()) == {"train", "validation"}


def test_the_extent_fit_finds_its_line_among_outliers() -> None:
    rng = np.random.default_rng(0)
    heights = rng.normal(171.0, 9.0, 300)
    extents = 2.0 * (150.0 * heights / 100.0 + 105.0) + rng.normal(0.0, 8.0, 300)
    extents[::10] = rng.uniform(300.0, 450.0, 30)  # a tenth is cut short, the shorter the taller
    extents[::10] -= 2.0 * (heights[::10] - 171.0)
    fitted = fit_extents(heights, extents)
    assert fitted.people == 300
    assert not fitted.slope_is_the_papers
    assert fitted.fit.slices_per_m == pytest.approx(150.0, abs=8.0)
    assert fitted.fit.slices_per_m * 1.71 + fitted.fit.slices_at_0 == pytest.approx(150.0 * 1.71 + 105.0, rel=0.01)
    assert fitted.median_residual_mm < 10.0
    ordinary = np.polyfit(heights / 100.0, extents / 2.0, 1)[0]
    assert abs(ordinary - 150.0) > 8.0  # what least squares make of it


@pytest.mark.parametrize("heights", [[160.0, 180.0], [170.0] * 15 + [171.0] * 15], ids=["few", "alike"])
def test_too_little_to_fit_a_slope_takes_the_papers(heights: list[float]) -> None:
    fitted = fit_extents(heights, [2.0 * (EXTENT_SLICES_PER_M * h / 100.0 + 90.0) for h in heights])
    assert fitted.slope_is_the_papers
    assert fitted.fit.slices_per_m == pytest.approx(EXTENT_SLICES_PER_M)
    assert fitted.fit.slices_at_0 == pytest.approx(90.0, abs=0.01)


def test_a_slope_need_not_be_asked_of_what_cannot_tell_one() -> None:
    heights = np.linspace(150.0, 190.0, 40)
    fitted = fit_extents(heights, np.full(40, 1020.0), level_only=True)
    assert fitted.slope_is_the_papers and fitted.fit.slices_per_m == pytest.approx(EXTENT_SLICES_PER_M)


def test_a_field_of_view_without_one_end_takes_what_is_there() -> None:
    places = {"clavicles": Place(900.0, 930.0, 0.0), "liver": Place(600.0, 750.0, 80.0)}
    view = field_of_view(places, 500.0, 1400.0)
    assert (view.low_mm, view.high_mm) == (500.0, 970.0)
    assert view.partial == ("the organ mask has no sacrum",)
    whole = places | {"sacrum": Place(370.0, 470.0, 0.0), "hips": Place(290.0, 500.0, 0.0)}
    assert field_of_view(whole, 0.0, 1400.0) == replace(view, low_mm=250.0, partial=())
    cut = field_of_view(whole | {"hips": Place(320.0, 500.0, 0.0)}, 320.0, 1400.0)
    assert "missing at the lower end" in cut.partial[0]


def study(number: int, patient: str, **known: Any) -> Study:
    told: dict[str, Any] = {"sex": "F", "age_years": 50.0 + number, "height_cm": 150.0 + number, "weight_kg": 70.0}
    person = Person(**(told | known))
    origin = Origin(f"Quorzelda/{number}", "ZQX-778812", "1.2.3.4.5.6")
    facts = {"diagnosis": "MELANOMA" if number % 2 else 3.0}
    return Study(f"s{number:04d}", person, facts, (), f"print{number}", patient, never_loaded, origin)


def never_loaded() -> tuple[Volume, Volume]:
    raise AssertionError("tables need no voxels")


def row(number: int, flags: str = "", partial: bool = False) -> dict[str, Any]:
    extent = 2.0 * (EXTENT_SLICES_PER_M * (1.5 + number / 100.0) + 110.0) - 300.0 * partial
    return {"extent_mm": extent, "spacing_z_mm": extent / 384, "partial": partial, "flags": flags, "notes": ""} | {
        f"{kind}_path": f"{kind}/s{number:04d}.npy" for kind in ("ct", "suv")
    }


def test_a_collection_becomes_a_table(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    prepared = [Prepared(study(i, f"p{i // 2}"), row(i, "partial" if i == 7 else "", i == 7)) for i in range(1, 31)]
    prepared.append(Prepared(study(31, "p31", height_cm=None, doubts=("PatientSize is missing: unknown",)), row(31)))
    left = [LeftOut("s0099", ("the CT is no CT",), Origin("Quorzelda/99"))]
    done = finish_training_set(folder, prepared, left, seed=0)
    table = pd.read_parquet(tmp_path / "subjects.parquet")
    assert list(table["subject_id"]) == [f"s{i:04d}" for i in range(1, 31)]
    assert table.groupby("person")["split"].nunique().max() == 1
    assert table.loc[1, "person"] == table.loc[2, "person"] == "s0002"
    assert set(table["split"]) == set(SPLITS)
    why = pd.read_csv(tmp_path / "left_out.csv").set_index("subject_id")["reasons"]
    assert list(why.index) == ["s0031", "s0099"]
    assert "height_cm" in why["s0031"]
    assert "PatientSize is missing" in why["s0031"]
    written = "".join(path.read_bytes().decode("latin1") for path in tmp_path.iterdir())
    assert not any(secret in written for secret in ("Quorzelda", "ZQX", "1.2.3.4"))
    taught = table[table["split"] == "train"]
    assert done.facts["support"]["height_cm"] == (taught["height_cm"].min(), taught["height_cm"].max())
    assert done.facts["extent"]["slices_per_m"] == pytest.approx(EXTENT_SLICES_PER_M, rel=1e-3)
    assert done.facts["extent_people"] == int((~taught["partial"]).sum())
    assert (done.facts["flags"], done.facts["left_out"]) == ({"partial": 1}, 2)

    again = finish_training_set(folder, [*prepared, Prepared(study(40, "p40"), row(40))], left, seed=9)
    kept = again.table.set_index("fingerprint")["split"]
    assert all(kept[name] == split for name, split in zip(table["fingerprint"], table["split"], strict=True))


def test_a_split_once_given_outlives_a_source_that_was_away(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)

    def finish(numbers: list[int]) -> dict[str, str]:
        done = finish_training_set(folder, [Prepared(study(i, f"p{i}"), row(i)) for i in numbers], [], seed=0)
        assert done.facts["away"] == len(set(seen) - set(numbers))
        seen.extend(numbers)
        return dict(zip(done.table["fingerprint"], done.table["split"], strict=True))

    seen: list[int] = []
    first = finish(list(range(20)))
    tested = [i for i in range(20) if first[f"print{i}"] != "train"]
    staying = [i for i in range(20) if i not in tested][:8]
    finish([*staying, *range(20, 26)])
    back = finish(list(range(26)))
    assert len(tested) >= 3 and {name: back[name] for name in first} == first
    record = (tmp_path / "splits.json").read_text()
    assert len(json.loads(record)) == 26 and "Quorzelda" not in record
    (tmp_path / "splits.json").write_text(record[:-9])
    with pytest.raises(InputError, match=r"splits\.json: not as vtrial prepare wrote it; restore it"):
        finish(list(range(26)))


def test_a_study_that_is_lost_holds_its_person_in_their_split(tmp_path: Path) -> None:
    """Its person's new study is not given another one, nor does it come back to one."""
    folder = open_folder(tmp_path)
    first = finish_training_set(folder, [Prepared(study(i, f"p{i}"), row(i)) for i in range(20)], [], seed=0).table
    (lost, *_) = first.index[first["split"] == "test"]
    kept = [Prepared(study(i, f"p{i}"), row(i)) for i in range(20) if i != lost]
    failed, anew = study(lost, f"p{lost}"), Prepared(study(30, f"p{lost}"), row(30))
    again = finish_training_set(folder, [*kept, anew], [], seed=0, others=[failed]).table.set_index("subject_id")
    assert again.loc["s0030", "split"] == "test"
    (trained, *_) = first.index[first["split"] == "train"]
    united = [Prepared(study(30, f"p{trained}"), row(30)), *kept]
    assert finish_training_set(folder, united, [], seed=0, others=[study(lost, f"p{trained}")]).table is not None
    alone = finish_training_set(folder, [Prepared(failed, row(lost)), *kept], [], seed=0).table.set_index("subject_id")
    assert alone.loc[failed.subject_id, "split"] == "train", "they turned out to be somebody who was trained on"


def test_extents_of_partial_views_are_those_of_the_twins(tmp_path: Path) -> None:
    """Without one whole view the paper's extent would squeeze bodies of 1020 mm into 734."""
    views = [row(i, "partial", True) | {"extent_mm": 1020.0} for i in range(30)]
    prepared = [Prepared(study(i, f"p{i}", height_cm=165.0 + i % 20), views[i]) for i in range(30)]
    facts = finish_training_set(open_folder(tmp_path), prepared, [], seed=0).facts
    assert facts["extent_of_partial"] and facts["extent_slope_is_the_papers"]
    assert twin_spacing_mm(ExtentFit(**facts["extent"]), 175.0)[2] * 384 == pytest.approx(1020.0, abs=20.0)
    prepared += [Prepared(study(i, f"p{i}"), row(i)) for i in range(30, 40)]
    facts = finish_training_set(open_folder(tmp_path), prepared, [], seed=0).facts
    assert not facts["extent_of_partial"] and facts["extent_people"] <= 10


def test_lean_mass_has_its_columns(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [{"sex": "M", "weight_kg": 80.0}, {"sex": "F", "weight_kg": 130.0}]
    prepared = [Prepared(study(i, f"p{i}", height_cm=170.0, **told), row(i)) for i, told in enumerate(bodies)]
    table = finish_training_set(open_folder(tmp_path), prepared, [], seed=0).table
    assert table["sul_per_suv_janmahasatian"].tolist() == pytest.approx(
        [9270 / (6680 + 216 * 27.6817), 9270 / (8780 + 244 * 44.9827)], abs=1e-3
    )
    assert table.loc[0, "sul_per_suv_james"] == pytest.approx(1.10 - 128.0 * 80.0 / 170.0**2, abs=1e-3)
    assert np.isnan(pd.read_parquet(tmp_path / "subjects.parquet").loc[1, "sul_per_suv_james"]), "beyond its range"


def test_a_set_of_nobody_is_refused_and_says_why(tmp_path: Path) -> None:
    nobody = [Prepared(study(1, "p", sex=None), row(1))]
    assert person_problems(nobody[0].study.person)[0].startswith("unknown: sex")
    with pytest.raises(InputError, match=r"none of 1 studies"):
        finish_training_set(open_folder(tmp_path), nobody, [], seed=0)
    assert (tmp_path / "left_out.csv").is_file()
    assert not (tmp_path / "subjects.parquet").exists()


def test_the_sheet_shows_the_doubtful_first_and_some_of_the_rest(tmp_path: Path) -> None:
    table = pd.DataFrame([{"subject_id": f"s{i:04d}"} | row(i) for i in range(20)])
    table.loc[[5, 7, 9, 11, 13], "flags"] = ["arms_down", "partial;mirrored", "breathing", "body_cut", "partial"]
    shown = list(sheet_subjects(table, 8)["subject_id"])
    assert shown[:4] == ["s0007", "s0005", "s0009", "s0011"]
    assert shown[4:] == sorted(shown[4:])
    assert (shown[4], shown[7]) == ("s0000", "s0019")
    assert len(sheet_subjects(table.head(3), 8)) == 3
    for name, kind in (("ct", np.int16), ("suv", np.float16)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "s0007.npy", np.arange(8 * 8 * 12).reshape(8, 8, 12).astype(kind))
    ((title, scan),) = sheet_scans(open_folder(tmp_path), table[7:8])
    assert title == "s0007 partial, mirrored"
    assert scan.spacing_mm == pytest.approx((4.0, 4.0, 2.0 * table.loc[7, "spacing_z_mm"]))
    assert scan.ct_hu[1, 1, 1] == 2 * 96 + 2 * 12 + 2
    assert preview_png([(title, scan)])
