"""Whole runs with a small renderer: the same voxels whatever the machines, every subject exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from engine import PEOPLE, LoadFake, fake_plan, plant, ray_cluster  # noqa: F401

from vtrial.diffusion.weights import ExtentFit, model_folder
from vtrial.execution import (
    Attempt,
    CannotGoOn,
    Executor,
    LocalExecutor,
    Progress,
    Resources,
    Saved,
    gpu_shares,
    threads_that_fit,
)
from vtrial.generation import CascadePlan, LoadPhantom, cascade_plan
from vtrial.imaging.files import read_nifti, voxel_sha256
from vtrial.pipeline import Cohort, making
from vtrial.production import Plan, RunSummary, carry_out
from vtrial.records import Subject
from vtrial.storage import LocalFolder, open_folder


def people(n: int, seed: int = 3) -> list[Subject]:
    return [
        Subject(f"A{i}", i, seed, "F" if i % 2 else "M", 50.0 + i, 170.0, 70.0, "s", {"arm": "x"}) for i in range(n)
    ]


def run(
    out: Path | str,
    n: int,
    executor: Executor | None = None,
    *,
    load: LoadFake | LoadPhantom | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    **changes: object,
) -> RunSummary:
    plan = Plan("generate", str(out), {"seed": 3}, {}, people(n), n, load or LoadFake(), ["test"])
    return carry_out(replace(plan, **changes), executor or LocalExecutor(threads=1), report)  # type: ignore[arg-type]


def hashes(out: Path) -> list[tuple[str, str, str]]:
    table = pd.read_parquet(out / "subjects.parquet")
    return list(zip(table.subject_id, table.ct_sha256, table.suv_sha256))


def ray(workers: int) -> Executor:
    from vtrial.cluster import RayExecutor

    return RayExecutor(workers=workers, threads=1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str]]:
    out = tmp_path_factory.mktemp("reference") / "run"
    run(out, 5)
    return hashes(out)


def test_the_table_and_the_files_agree(tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = run(out, 3)
    assert (summary.done, summary.new, summary.total, summary.failures) == (3, 3, 3, {})
    table = pd.read_parquet(out / "subjects.parquet")
    assert table.equals(pd.read_csv(out / "subjects.csv", keep_default_na=False).astype(table.dtypes))
    assert table.status.tolist() == ["ok"] * 3
    assert table["arm"].tolist() == ["x"] * 3
    assert table["index"].tolist() == [0, 1, 2]
    for row in table.itertuples():
        for path, digest in ((row.ct_path, row.ct_sha256), (row.suv_path, row.suv_sha256)):
            assert voxel_sha256(*read_nifti(out / path)) == digest
    assert len({h for row in hashes(out) for h in row[1:]}) == 6


def test_two_are_the_first_two_of_five_and_are_left_alone(tmp_path: Path, reference: Sequence[object]) -> None:
    out = tmp_path / "run"
    run(out, 2)
    assert hashes(out) == reference[:2]
    times = {p: p.stat().st_mtime_ns for p in out.glob("scans/*/*")}
    assert len(times) == 4
    assert run(out, 5).new == 3
    assert hashes(out) == reference
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, 2)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    summary = run(out, 2, NoExecutor())
    assert (summary.done, summary.new) == (2, 0)
    assert {p: p.stat().st_mtime_ns for p in before} == before


class NoExecutor:
    """There is nothing to do, so no machine must be taken."""

    name = "none"

    def start(self) -> Resources:
        raise AssertionError("started")

    def run(self, *unused: object) -> object:
        raise AssertionError("ran")

    def stop(self) -> None:
        pass


def test_lost_tables_are_written_again_and_nothing_is_made(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, 2)
    before = {p: p.stat().st_mtime_ns for p in out.glob("scans/*/*")}
    whole = (out / "subjects.csv").read_bytes()
    (out / "subjects.csv").unlink()
    assert run(out, 2).new == 0
    assert (out / "subjects.csv").read_bytes() == whole
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_table_is_there_before_the_first_subject(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(progress: Progress) -> None:
        if progress.latest is None:
            seen.append(pd.read_parquet(tmp_path / "run/subjects.parquet").status.tolist())

    run(tmp_path / "run", 2, report=look)
    assert seen == [["pending"] * 2]


class WatchedExecutor(LocalExecutor):
    """Writes down in which order its workers and its machines are let go."""

    events: ClassVar[list[str]] = []

    def run(self, *arguments: Any) -> Generator[Attempt]:
        try:
            yield from super().run(*arguments)
        finally:
            self.events.append("workers gone")

    def stop(self) -> None:
        self.events.append("machines given back")


def test_an_interrupted_driver_lets_go_in_order(tmp_path: Path) -> None:
    """Ctrl-C while the driver has an attempt in its hands: the pool is left suspended, and must be closed first."""

    def interrupt(progress: Progress) -> None:
        if progress.latest is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 2, WatchedExecutor(threads=1), report=interrupt)
    assert WatchedExecutor.events == ["workers gone", "machines given back"]
    assert pd.read_parquet(tmp_path / "run/subjects.parquet").status.tolist() == ["ok", "pending"]


def test_the_table_of_an_interrupted_driver_has_all_that_is_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come when an entry has just reached the disk."""
    append = LocalFolder.append

    def interrupted(folder: LocalFolder, name: str, line: str) -> None:
        append(folder, name, line)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFolder, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 2)
    assert pd.read_parquet(tmp_path / "run/subjects.parquet").status.tolist() == ["ok", "pending"]


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [([2], 1, 2), ([2], 2, 1), ([2], 3, 1), ([8, 8, 8, 8], 1, 8), ([8, 8], 2, 8), ([8, 16], 3, 8), ([8, 8], 3, 4)],
)
def test_workers_get_no_more_threads_than_a_machine_has(cores: list[int], workers: int, threads: int) -> None:
    assert threads_that_fit(cores, workers) == threads


@pytest.mark.parametrize(("gpus", "share", "workers"), [(4, 1.0, 4), (2, 0.5, 4), (2, 0.4, 4), (3, 0.1, 30), (4, 2, 2)])
def test_a_share_never_lies_across_two_gpus(gpus: float, share: float, workers: int) -> None:
    assert gpu_shares(gpus, share) == workers


def test_verify_makes_a_spoilt_file_again(tmp_path: Path, reference: Sequence[object]) -> None:
    out = tmp_path / "run"
    run(out, 2)
    victim = out / "scans/A1/SUV.nii.gz"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    assert run(out, 2).new == 0
    assert run(out, 2, verify=True).new == 1
    assert voxel_sha256(*read_nifti(victim)) == reference[1][2]  # type: ignore[index]


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_the_same_voxels(
    tmp_path: Path,
    reference: Sequence[object],
    workers: int,
    ray_cluster: None,  # noqa: F811
) -> None:
    run(tmp_path / "run", 5, ray(workers))
    assert hashes(tmp_path / "run") == reference


def test_dying_workers_lose_nobody(tmp_path: Path, reference: Sequence[object], ray_cluster: None) -> None:  # noqa: F811
    """Kill -9 of a worker in the middle of a subject, twice for one and once for another; a raised error besides."""
    plant(tmp_path / "faults", "kill", 1, 2)
    plant(tmp_path / "faults", "kill", 4, 1)
    plant(tmp_path / "faults", "raise", 2, 1)
    out = tmp_path / "run"
    assert run(out, 5, ray(2), load=LoadFake(str(tmp_path / "faults"))).failures == {}
    assert hashes(out) == reference
    table = pd.read_parquet(out / "subjects.parquet")
    assert table.attempts[1] == 3
    assert table.attempts[4] >= 2
    assert table.attempts[2] >= 2


def test_a_deadly_subject_is_given_up_and_harms_no_other(
    tmp_path: Path,
    reference: Sequence[object],
    ray_cluster: None,  # noqa: F811
) -> None:
    plant(tmp_path / "faults", "kill", 2, 99)
    out = tmp_path / "run"
    summary = run(out, 5, ray(2), load=LoadFake(str(tmp_path / "faults")))
    assert list(summary.failures) == ["A2"]
    assert "worker died" in summary.failures["A2"]
    table = pd.read_parquet(out / "subjects.parquet")
    assert table.status.tolist() == ["ok", "ok", "failed", "ok", "ok"]
    assert table.attempts[2] == 3
    assert table.attempts.drop(2).max() <= 2
    assert not (out / "scans/A2").exists()
    assert run(out, 5, ray(1)).new == 1  # what killed it is gone
    assert hashes(out) == reference


def test_three_attempts_then_recorded(tmp_path: Path) -> None:
    plant(tmp_path / "faults", "raise", 0, 99)
    plant(tmp_path / "faults", "raise", 1, 2)
    attempts: list[Attempt] = []
    summary = run(
        tmp_path / "run",
        3,
        load=LoadFake(str(tmp_path / "faults")),
        report=lambda progress: attempts.append(progress.latest) if progress.latest else None,
    )
    assert {k: "planted failure" in v for k, v in summary.failures.items()} == {"A0": True}
    told = [(a.item.index, a.number, a.saved is not None, a.final) for a in attempts]
    assert told == [
        (0, 1, False, False),
        (0, 2, False, False),
        (0, 3, False, True),
        (1, 1, False, False),
        (1, 2, False, False),
        (1, 3, True, True),
        (2, 1, True, True),
    ]
    table = pd.read_parquet(tmp_path / "run/subjects.parquet")
    assert table.status.tolist() == ["failed", "ok", "ok"]
    assert table.attempts.tolist() == [3, 3, 1]
    assert "planted failure" in table.error[0]


class BrokenLoad(LoadFake):
    """A model that does not load."""

    def __call__(self, resources: Resources) -> Callable[[Subject], object]:  # type: ignore[override]
        raise OSError("no such weights")


@pytest.mark.parametrize("machines", ["local", "ray"])
def test_a_model_that_does_not_load_stops_the_run(tmp_path: Path, machines: str, ray_cluster: None) -> None:  # noqa: F811
    import test_generate
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(test_generate)
    executor = ray(2) if machines == "ray" else LocalExecutor(threads=1)
    with pytest.raises(CannotGoOn, match="no such weights"):
        run(tmp_path / "run", 3, executor, load=BrokenLoad())
    assert run(tmp_path / "run", 3).done == 3


class FailingSave:
    """Saving fails once for item 1 and always for item 2."""

    def __init__(self) -> None:
        self.saves: list[int] = []

    def make(self, item: int) -> int:
        return item * 10

    def save(self, item: int, product: int) -> Saved:
        self.saves.append(item)
        if item == 2 or (item == 1 and self.saves.count(1) == 1):
            raise ConnectionError("storage hiccup")
        return Saved({}, {"product": product})


def test_failed_saves_are_attempts_too() -> None:
    attempts = list(LocalExecutor(threads=1).run(lambda resources: FailingSave(), [0, 1, 2, 3]))
    assert [(a.item, a.number) for a in attempts if a.saved] == [(0, 1), (1, 2), (3, 1)]
    assert [(a.item, a.number) for a in attempts if not a.saved and a.final] == [(2, 3)]


@pytest.mark.parametrize("machines", ["local", "ray"])
def test_a_url_is_a_place_to_write_to(
    tmp_path: Path,
    reference: Sequence[object],
    machines: str,
    ray_cluster: None,  # noqa: F811
) -> None:
    url = f"file://{tmp_path}/run" if machines == "ray" else f"memory://{tmp_path.name}"
    executor = ray(1) if machines == "ray" else LocalExecutor(threads=1)
    assert run(url, 2, executor).new == 2
    assert run(url, 3, executor).new == 1
    folder = open_folder(url)
    (tmp_path / "table.parquet").write_bytes(folder.read("subjects.parquet"))
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert list(zip(table.subject_id, table.ct_sha256, table.suv_sha256)) == reference[:3]
    assert sum(name.endswith(".nii.gz") for name in folder.sizes()) == 6


def test_training_layout_is_what_training_maps(tmp_path: Path) -> None:
    out = tmp_path / "data"
    run(out, 2, layout="training")
    ct = np.load(out / "ct/A1.npy", mmap_mode="r")
    suv = np.load(out / "suv/A1.npy", mmap_mode="r")
    assert (ct.dtype, suv.dtype, ct.shape) == (np.int16, np.float16, (16, 16, 16))
    assert ct.flags.c_contiguous
    assert run(out, 2, NoExecutor(), layout="training").new == 0


@pytest.mark.slow
def test_a_real_phantom_has_masks_and_truth(tmp_path: Path) -> None:
    run(tmp_path / "run", 1, LocalExecutor(threads=2), load=LoadPhantom())
    labels, _ = read_nifti(tmp_path / "run/segmentations/A0.nii.gz")
    ct, affine = read_nifti(tmp_path / "run/scans/A0/CTres.nii.gz")
    assert labels.dtype == np.uint8
    assert labels.shape == ct.shape
    truth = pd.read_parquet(tmp_path / "run/truth.parquet").iloc[0]
    litres = (labels == 5).sum() * abs(np.linalg.det(affine[:3, :3])) / 1e6
    assert litres == pytest.approx(truth.liver_volume_ml / 1e3, rel=0.02)


def test_the_manifest_tells_how_long_the_models_bodies_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*asked: Any) -> CascadePlan:
        return replace(fake_plan(LoadFake())(*asked), extent=ExtentFit(slices_per_m=100.0, slices_at_0=200.0))

    monkeypatch.setattr(making, "cascade_plan", plan)
    (tmp_path / "people.csv").write_text(PEOPLE)
    cohort, out = Cohort(str(tmp_path / "people.csv")), tmp_path / "run"
    making.generate(cohort, LocalExecutor(threads=1), lambda progress: None, out=str(out), model="m")
    told = json.loads((out / "manifest.json").read_text())["geometry"]
    assert (told["extent_slices_per_m"], told["extent_slices_at_0"]) == (100.0, 200.0)


def test_a_model_folders_own_extent_is_the_plans(tmp_path: Path) -> None:
    for file in model_folder("phantom-v1").iterdir():
        (tmp_path / file.name).symlink_to(file)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").unlink()
    (tmp_path / "card.json").write_text(json.dumps(card | {"extent": {"slices_per_m": 99.5, "slices_at_0": 201.0}}))
    assert cascade_plan(str(tmp_path), None, None, None).extent == ExtentFit(slices_per_m=99.5, slices_at_0=201.0)


def test_a_run_with_another_geometry_in_its_manifest_goes_on(tmp_path: Path, reference: Sequence[object]) -> None:
    out = tmp_path / "run"
    run(out, 2)
    other = ExtentFit(slices_per_m=100.0, slices_at_0=200.0)
    assert run(out, 2, NoExecutor(), extent=other).new == 0
    assert run(out, 5, extent=other).new == 3 and hashes(out) == reference
