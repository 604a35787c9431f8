"""Haar bands: an orthonormal change of basis, and the preconditioning that each band gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.blobs import tiny, write_blobs
from vtrial.diffusion.bands import from_bands, haar_matrix, to_bands
from vtrial.diffusion.conditions import to_grid
from vtrial.diffusion.denoiser import Denoiser, Scaling, StageConfig
from vtrial.diffusion.network import Conditions, NetworkConfig
from vtrial.training import StoredVolumes
from vtrial.training.batches import make_batch, measure_scaling

NETWORK = NetworkConfig(patch=2, channels=(16, 24), blocks=(1, 1), attention_head_channels=0)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_transform_is_orthonormal_and_begins_with_the_mean(patch: int) -> None:
    matrix = haar_matrix(patch)
    assert torch.allclose(matrix @ matrix.T, torch.eye(patch**3), atol=1e-6)
    assert torch.allclose(matrix[0], torch.full((patch**3,), patch**-1.5))


@pytest.mark.parametrize("patch", [2, 4])
def test_round_trip_and_where_the_energy_goes(patch: int) -> None:
    volume = torch.randn(2, 2, 8, 8, 12)
    grid = to_grid(volume, patch)
    bands = to_bands(grid, patch)
    assert bands.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.allclose(from_bands(bands, patch), grid, atol=1e-5)
    assert float(bands.square().sum()) == pytest.approx(float(grid.square().sum()), rel=1e-5)
    # a step along z is in one band beside the mean, and in its own modality alone
    step = torch.zeros(1, 2, patch, patch, patch)
    step[0, 1, :, :, patch // 2 :] = 1.0
    found = to_bands(to_grid(step, patch), patch)[0, :, 0, 0, 0]
    assert torch.nonzero(found.abs() > 1e-6).flatten().tolist() == [patch**3, patch**3 + 1]


def test_each_band_is_preconditioned_by_its_own_sd() -> None:
    # F = 0 leaves c_skip x: in each band the posterior mean for independent normal coefficients of that band's SD.
    sds = tuple(0.1 * (i + 1) for i in range(16))
    denoiser = Denoiser(StageConfig(stage="global", network=NETWORK, band_sd=sds))
    x, sigma = torch.randn(2, 16, 4, 4, 4), torch.tensor([0.2, 5.0])
    prepared = denoiser.network.prepare(Conditions(torch.rand(2, 4)), (4, 4, 4), torch.float32)
    variance = torch.tensor(sds).square().view(1, 16, 1, 1, 1)
    expected = x * variance / (variance + sigma.square().view(2, 1, 1, 1, 1))
    assert torch.allclose(denoiser(x, sigma, prepared), expected, atol=1e-6)
    # and the loss is 1 at the start, on data that have those SDs
    clean = torch.randn(400, 16, 2, 2, 2) * variance.sqrt()
    known = Conditions(torch.rand(400, 4))
    _, error = denoiser.loss(clean, torch.full((400,), 0.5), torch.randn(clean.shape), known, torch.float32)
    assert float(error.mean()) == pytest.approx(1.0, abs=0.03)


def test_sds_are_measured_and_volumes_come_back(tmp_path: Path) -> None:
    config = tiny("global").model_copy(update={"bands": True})
    data = StoredVolumes(write_blobs(tmp_path / "data", 4), phases=4)
    stage = measure_scaling(config, data)
    batch = torch.cat([make_batch(config, data, step).target for step in range(1, 13)])
    grid = stage.encode(batch)
    assert len(stage.band_sd) == grid.shape[1]
    measured = grid.transpose(0, 1).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(measured, torch.tensor(stage.band_sd), rtol=0.25, atol=0.01)
    assert stage.band_sd[0] == max(stage.band_sd)
    assert torch.allclose(stage.decode(grid), batch, atol=1e-5)
    assert measure_scaling(tiny("global"), data).band_sd == ()


def test_as_many_sds_as_channels() -> None:
    with pytest.raises(ValidationError, match="16 values"):
        StageConfig(stage="global", network=NETWORK, scaling=Scaling(), band_sd=(0.5, 0.5))
