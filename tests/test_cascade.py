"""The cascade: whole volume against tiles, seams, randomness from its generators alone, bad models."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.blobs import tiny, write_blobs
from vtrial.diffusion.cascade import Cascade, CascadeSampler, load_cascade
from vtrial.diffusion.conditions import Demographics, from_grid, to_grid
from vtrial.diffusion.sampler import SamplerConfig, sample
from vtrial.diffusion.tiles import blend_tiles, tile_for, tiles
from vtrial.diffusion.weights import list_models, read_card
from vtrial.records import InputError
from vtrial.training import export_model, train

PERSON = Demographics("F", 60.0, 165.0, 70.0)
FAST = CascadeSampler(
    SamplerConfig(name="dpmpp-2m", steps=3, sigma_min=0.05), SamplerConfig(name="heun", steps=2, sigma_min=0.05)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cascade")
    data = write_blobs(folder / "data", 3)
    for stage in ("global", "super-resolution"):
        train(tiny(stage, steps=60, checkpoint_steps=60, metric_steps=60), data, folder / stage)
    runs = {"global": folder / "global", "super-resolution": folder / "super-resolution"}
    export_model(folder / "model", runs, {"global": FAST.low, "super-resolution": FAST.high}, name="tiny")
    return folder / "model"


@pytest.fixture(scope="module")
def cascade(model: Path) -> Cascade:
    return load_cascade(model, dtype=torch.float32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_pair(shape: tuple[int, int, int] = (12, 12, 24)) -> Tensor:
    return torch.rand(2, *shape, generator=generator(0)) * 0.2 + 0.4


def test_a_twin_has_the_grid_and_the_range(model: Path) -> None:
    cascade = load_cascade(model)
    seen: list[tuple[str, int, int]] = []
    twin = cascade.sample(
        PERSON, global_noise=generator(1), sr_noise=generator(2), progress=lambda *step: seen.append(step)
    )
    assert twin.shape == (2, 224, 224, 384) and twin.dtype == torch.float32
    assert float(twin.min()) >= 0.0 and float(twin.max()) <= 1.0 and bool(torch.isfinite(twin).all())
    assert seen == [("global", i, 3) for i in (1, 2, 3)] + [("super-resolution", i, 2) for i in (1, 2)]


def test_noise_comes_from_the_generators_alone(cascade: Cascade) -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)  # must not matter
        return cascade.refine(low_pair(), PERSON, noise=generator(seed % 2), sampler=FAST.high)

    assert torch.equal(run(1), run(3))
    assert not torch.allclose(run(1), run(2), atol=0.01)


def test_stage_one_batches_subjects(cascade: Cascade) -> None:
    people = [PERSON, Demographics("M", 40.0, 180.0, 100.0)]
    low = cascade.sample_low(people, noise=generator(0))
    assert low.shape == (2, 2, 56, 56, 96)
    assert not torch.allclose(low[0], low[1], atol=0.05)


def test_tiles_cover_the_grid_aligned_and_overlapping() -> None:
    covered = torch.zeros(24, 24, 48)
    places = list(tiles((24, 24, 48), (12, 24, 16), 4, 2))
    for where in places:
        covered[where] += 1
        assert all(s.start % 2 == 0 and s.stop <= n for s, n in zip(where, (24, 24, 48)))
    assert float(covered.min()) >= 1.0
    z = sorted({w[2].start for w in places})
    assert all(b - a <= 16 - 4 for a, b in pairwise(z))


def test_blending_tiles_of_a_pointwise_function_is_exact() -> None:
    x = torch.randn(1, 3, 24, 24, 48)
    blended = blend_tiles(lambda w: x[(slice(None), slice(None), *w)] ** 2, x, (12, 12, 16), 4, 2)
    assert torch.allclose(blended, x**2, atol=1e-6)


def test_tile_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples"):
        list(tiles((24, 24, 48), (11, 24, 16), 4, 2))
    with pytest.raises(ValueError, match="overlap"):
        list(tiles((24, 24, 48), (8, 24, 16), 8, 2))


def test_tiles_agree_with_the_whole_volume_and_leave_no_seam(cascade: Cascade) -> None:
    low = low_pair((24, 24, 48))
    config = SamplerConfig(name="dpmpp-2m", steps=8, sigma_min=0.02, sigma_max=10.0)
    whole = cascade.refine(low, PERSON, noise=generator(5), sampler=config)
    tiled = cascade.refine(low, PERSON, noise=generator(5), sampler=config, tile=(64, 64, 96))
    assert float((whole - tiled).abs().mean()) < 0.05 * float((whole - whole.mean()).abs().mean())
    step = (tiled[..., 1:] - tiled[..., :-1]).abs().mean(dim=(0, 1, 2))
    # the borders of the tiles along z: where one begins or ends inside the volume
    edges = sorted({e for w in tiles((24, 24, 48), (16, 16, 24), 8, 2) for e in (w[2].start * 4, w[2].stop * 4)})
    borders = [e - 1 for e in edges if 0 < e < 192]
    # every fourth gradient is inside a block of the grid's size, so compare like with like
    inside = [i for i in range(3, step.numel(), 4) if i not in borders and 16 < i < step.numel() - 16]
    assert len(borders) >= 2
    assert float(step[borders].mean()) <= 1.05 * float(step[inside].mean())


def test_hard_cut_slabs_would_show_in_the_seam_measure() -> None:
    # the measure itself can fail: independent halves make a seam
    def denoise(x: Tensor, sigma: float) -> Tensor:
        weight = 1.0 / (1.0 + sigma**2)
        return torch.nn.functional.avg_pool3d(x, 5, stride=1, padding=2) * weight

    def run(seed: int) -> Tensor:
        noise = torch.randn(1, 2, 16, 16, 32, generator=generator(seed))
        *_, x = sample(denoise, noise, SamplerConfig(steps=6))
        return x

    joined = torch.cat([run(1), run(2)], dim=-1)
    step = (joined[..., 1:] - joined[..., :-1]).abs().mean(dim=(0, 1, 2, 3))
    assert float(step[31]) > 1.5 * float(step[[i for i in range(4, 59) if i != 31]].mean())


def test_bfloat16_agrees_with_float32(model: Path, cascade: Cascade) -> None:
    half = load_cascade(model, dtype=torch.bfloat16)
    low = low_pair()
    a = cascade.refine(low, PERSON, noise=generator(3), sampler=FAST.high)
    b = half.refine(low, PERSON, noise=generator(3), sampler=FAST.high)
    assert float((a - b).abs().mean()) < 0.02 * float((a - a.mean()).abs().mean()) + 0.002


def test_sampler_options(model: Path) -> None:
    chosen = CascadeSampler.of(read_card(model)).with_options(name="heun-churn", steps_global=11)
    assert (chosen.low.name, chosen.low.steps, chosen.high.name, chosen.high.steps) == (
        "heun-churn",
        11,
        "heun-churn",
        2,
    )
    with pytest.raises(InputError, match="steps-sr 1"):
        chosen.with_options(steps_sr=1)
    with pytest.raises(InputError, match=r"euler.*heun-churn"):
        chosen.with_options(name="euler")


def test_unknown_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such bundled model"):
        load_cascade(tmp_path / "absent")
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(InputError, match="not a model card"):
        load_cascade(tmp_path)
    assert all((isinstance(name, str) and name) for name in list_models())


def test_bundled_models_are_whole() -> None:
    for name in list_models():
        assert set(load_cascade(name).card.stages) >= {"global", "super-resolution"}


def test_grids_of_noise_round_trip() -> None:
    x = torch.randn(1, 128, 4, 4, 8)
    assert torch.equal(to_grid(from_grid(x, 4), 4), x)


def test_small_memory_gets_tiles_that_fit_the_grid() -> None:
    assert tile_for(24 * 10**9) is None
    tile = tile_for(4 * 10**9)
    assert tile is not None and all(t % 16 == 0 and t <= n for t, n in zip(tile, (224, 224, 384)))
