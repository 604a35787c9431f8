"""Training sets that cannot be trained on: told with the file, and before the training where that can be."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.blobs import SHAPE, tensor_blob, tiny, write_blobs
from vtrial.records import InputError
from vtrial.training import Job, StoredVolumes, write_low
from vtrial.training.batches import make_batch
from vtrial.training.data import read_extent


def torn(file: Path) -> None:
    """As a copy that was broken off."""
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["ct/S1.npy", "suv/S0.npy", "low/S2.npz", "subjects.parquet"])
def test_a_torn_file_of_a_training_set_is_told_before_the_training(name: str, tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "data", 3)
    write_low(data, "S2", tensor_blob(2), np.random.default_rng(0), 2)
    job = Job(tiny("global", steps=2), data, tmp_path / "run")
    job.check(lambda line: None)
    for break_it in (torn, lambda file: file.write_text("garbage"), lambda file: file.write_bytes(b"")):
        whole = (data / name).read_bytes()
        break_it(data / name)
        with pytest.raises(InputError, match=f"{name}: not .* make the training set again"):
            job.check(print)
        (data / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["ct/S0.npy", "low/S0.npz"])
def test_a_file_that_tears_while_a_training_runs_is_told(name: str, tmp_path: Path) -> None:
    source = StoredVolumes(write_blobs(tmp_path, 1))
    if name.startswith("low"):
        write_low(tmp_path, "S0", tensor_blob(0), np.random.default_rng(0), 2)
    torn(tmp_path / name)
    with pytest.raises(InputError, match=name):
        make_batch(tiny("global"), source, 1)
    if name.startswith("ct"):
        with pytest.raises(InputError, match=name):
            make_batch(tiny("super-resolution"), source, 1)


def test_every_broken_volume_of_a_training_set_is_told_at_once(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "data", 3)
    np.save(data / "suv" / "S0.npy", np.zeros((*SHAPE[:2], 60), np.float16))
    np.save(data / "ct" / "S2.npy", np.zeros(SHAPE[:2], np.int16))
    with pytest.raises(InputError) as caught:
        Job(tiny("global"), data, tmp_path / "run").check(print)
    assert len(caught.value.problems) == 2
    assert "S0.npy: 32×32×64 voxels, but" in caught.value.problems[0] and "32×32×60" in caught.value.problems[0]
    assert "S2.npy: not a volume" in caught.value.problems[1]
    for stage in ("global", "super-resolution"):
        with pytest.raises(InputError, match=r"voxels, but|not a volume"):
            make_batch(tiny(stage, batch=16), StoredVolumes(data), 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "Expecting"), ("[]", "no identity"), ('{"facts": {}}', "no identity"), ("\xff", "codec")],
)
def test_a_manifest_that_is_none_is_told(text: str, told: str, tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "data", 2)
    (data / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=rf"manifest\.json: not the manifest .*{told}.*make the training set again"):
        Job(tiny("global"), data, tmp_path / "run").check(print)


def test_facts_that_are_none_are_told(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "data", 2)
    (data / "manifest.json").write_text('{"facts": {"extent": {"slices": 3}, "support": {"age_years": "old"}}}')
    with pytest.raises(InputError, match=r"manifest\.json: .*extent"):
        read_extent(data)
    with pytest.raises(InputError, match=r"manifest\.json: .*support"):
        _ = StoredVolumes(data).support


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("sex", "female", "sex of 1 subjects is not F or M, the first is S1 with female"),
        ("sex", None, "sex of 1 subjects is not F or M, the first is S1"),
        ("age_years", np.inf, "age_years of 1 subjects is not a number, the first is S1"),
        ("height_cm", np.nan, "height_cm of 1 subjects is not a number, the first is S1"),
        ("weight_kg", "heavy", "weight_kg of 1 subjects is not a number, the first is S1 with heavy"),
    ],
)
def test_people_that_cannot_be_trained_on_are_told(column: str, value: object, told: str, tmp_path: Path) -> None:
    path = write_blobs(tmp_path / "data", 3) / "subjects.parquet"
    table = pd.read_parquet(path)
    if isinstance(value, str):
        table[column] = table[column].astype(str)
    table.loc[1, column] = value
    table.to_parquet(path)
    with pytest.raises(InputError, match=rf"subjects\.parquet: {told}"):
        StoredVolumes(path.parent)
