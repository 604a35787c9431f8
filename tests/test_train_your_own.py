"""docs/train-your-own.md: its lines, as they stand there, take a collection to a model and its twins to a verdict."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from vtrial.diffusion.weights import verify_model
from vtrial.pipeline.training import data_sha256


def lines_of(page: Path) -> list[list[str]]:
    """The commands of the page's first block, as arguments."""
    block = re.search(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    assert block is not None
    return [line.split()[1:] for line in block[1].splitlines()]


@pytest.mark.slow
def test_the_loop_closes(repository: Path, tmp_path: Path) -> None:
    for name in ("cohorts", "configs"):
        (tmp_path / name).symlink_to(repository / name)
    told: list[dict[str, object]] = []
    for words in lines_of(repository / "docs" / "train-your-own.md"):
        command = [sys.executable, "-m", "vtrial.cli", *words, "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        told.append(json.loads(done.stdout))
    people = pd.read_parquet(tmp_path / "data/subjects.parquet")
    assert len(people) == 6 and "train" in set(people["split"]) <= {"train", "validation", "test"}
    assert (tmp_path / "data/sheet.png").is_file() and not people["partial"].any()

    card = verify_model(tmp_path / "models/mine")
    assert set(card.stages) == {"global", "super-resolution"} and card.extent.slices_per_m > 0
    assert {stage.data_sha256 for stage in card.stages.values()} == {data_sha256(tmp_path / "data")}
    assert all(stage.steps == 20 and len(stage.loss) == 4 for stage in card.stages.values())

    twins = pd.read_parquet(tmp_path / "runs/mine/subjects.parquet")
    assert list(twins["status"]) == ["ok", "ok"]
    assert set(twins["subject_id"]) <= set(pd.read_csv(tmp_path / "collection/demographics.csv")["subject_id"])
    report = json.loads((tmp_path / "runs/mine/validation/collection/report.json").read_text())
    assert report["provenance"]["reference"]["segmenter"] == "phantom-v1"
