"""Configurations that cannot be trained: told with file and field before anything is."""

from pathlib import Path

import pytest

from tests.blobs import tiny, write_blobs
from vtrial.records import InputError
from vtrial.training import StoredVolumes, read_config
from vtrial.training.batches import make_batch

LEVELS = "channels = [8, 8, 8, 8, 8]\nblocks = [1, 1, 1, 1, 1]"
EXPERT = 'stage = "global-detail"\ndata.patch_shape = [8, 8, 8]'
SECOND = 'stage = "super-resolution"'


@pytest.mark.parametrize(
    ("line", "network", "told"),
    [
        ("ema = []", "", "ema: "),
        ("seed = -1", "", "seed: "),
        ("seed = 100000000000000", "", "seed: "),
        ("noise = { sigma_min = 80.0 }", "", r"noise: .*sigma_min \(80\) must be below sigma_max \(80\)"),
        (f"{EXPERT}\nnoise = {{ sigma_min = 50.0 }}", "", "sigma_min must be below half of sigma_max"),
        ("", "channels = []\nblocks = []", r"network\.channels: "),
        ("", "channels = [16, 40]\nblocks = [1, 1]\nattention_head_channels = 12", r"network: .*channels \(40\)"),
        ("", LEVELS, "network: .*multiples of 16 voxels, which 56×56×96 are not"),
        ('stage = "global-detail"', LEVELS, "network: .*multiples of 16 voxels, which 56×56×96 are not"),
        (SECOND, f"patch = 4\nlow_resolution = true\n{LEVELS}", "network: .*64 voxels, which 224×224×384 are not"),
        ('stage = "global-detail"', "", r"data\.patch_shape \(64×64×64\) is larger than the volumes of 56×56×96"),
        (f"{SECOND}\ndata.patch_shape = [64, 64, 512]", "low_resolution = true", r"data\.patch_shape \(64×64×512\)"),
    ],
)
def test_configurations_that_cannot_be_trained_are_told(line: str, network: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    stage = "" if "stage" in line else 'stage = "global"\n'
    levels = "" if "channels" in network else "channels = [8, 16]\nblocks = [1, 1]\n"
    path.write_text(f"{stage}steps = 2\n{line}\n[network]\n{levels}{network}\n")
    with pytest.raises(InputError, match=f"wrong.toml: (the file: )?.*{told}"):
        read_config(path)


@pytest.mark.parametrize(("stage", "shape"), [("super-resolution", "32×32×64"), ("global-detail", "8×8×16")])
def test_patches_larger_than_the_volumes_are_told(stage: str, shape: str, tmp_path: Path) -> None:
    config = tiny(stage, data={"phases": 2, "patch_shape": (16, 16, 96)})
    source = StoredVolumes(write_blobs(tmp_path / "data", 1))
    with pytest.raises(InputError, match=rf"data\.patch_shape: patches of 16×16×96 .* volume of {shape}"):
        make_batch(config, source, 1)
