"""The segmenter that comes with the package: what its card promises, and one phantom segmented on Ray, and measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.test_cli import vtrial_command
from vtrial.imaging.files import read_nifti
from vtrial.organs import ORGAN_IDS, labels_of
from vtrial.segmentation import read_segmenter_card

NAME = "phantom-v1"
LEAST_DICE = {
    **{"lungs": 0.97, "liver": 0.95, "heart": 0.92, "spleen": 0.90},
    **{"kidney_left": 0.88, "kidney_right": 0.88, "aorta": 0.85},
}
LARGEST_BIAS = 2.0  # percent
# Of 20 phantoms; of the 200 of docs/study.md all are within 1.5 %.
BIASED = {"stomach": 3.7, "pancreas": 2.15, "lung_upper_lobe_right": 2.15}
ALIKE = ("liver", "spleen", "kidney_left", "kidney_right", "heart", "aorta", "sacrum", "lung_lower_lobe_left")


def test_its_card_reaches_what_was_aimed_at(repository: Path) -> None:
    card = read_segmenter_card(NAME)
    assert card.phantoms_only and "not for patients" in card.description
    assert all(card.dice[organ] >= least for organ, least in LEAST_DICE.items())
    beyond = {organ: abs(bias) for organ, bias in card.volume_bias.items() if abs(bias) > LARGEST_BIAS}
    assert beyond == BIASED
    limits = (repository / "README.md").read_text().replace("−", "-")
    for organ, words in (
        ("stomach", "stomach"),
        ("pancreas", "pancreas"),
        ("lung_upper_lobe_right", "right upper lobe"),
    ):
        assert f"{words} ({card.volume_bias[organ]:+.1f} %)" in limits


def test_a_phantom_is_segmented_on_ray_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ("--n", "1", "--seed", "4711", "--out", "run", "--executor", "local")
    for command in (
        ("phantom", "oncology", *made),
        ("segment", "run", "--segmenter", NAME),
        ("measure", "run", "--segmenter", NAME, "--executor", "local"),
    ):
        code, _, err = vtrial_command(capfd, *command)
        assert code == 0, err
    (exact,), (drawn,) = (
        list(Path("run", folder).glob("*.nii.gz")) for folder in ("segmentations", f"segmentations-{NAME}")
    )
    truth, found = read_nifti(exact)[0], read_nifti(drawn)[0]
    for organ in ALIKE:
        a, b = (np.isin(mask, labels_of(organ)) for mask in (truth, found))
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85, organ
    table = pd.read_parquet(f"run/measurements-{NAME}.parquet").set_index("organ")
    assert set(table["segmenter"]) == {NAME} and "rib_left_1" not in table.index
    liver = float((truth == ORGAN_IDS["liver"]).sum() / (found == ORGAN_IDS["liver"]).sum())
    assert liver == pytest.approx(1.0, abs=0.05) and table.loc["ribs", "volume_ml"] > 100
