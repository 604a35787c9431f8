"""Stage 1 by two experts: one for high noise, whole volumes; one for low noise, from patches, in bands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.blobs import tiny, write_blobs
from vtrial.diffusion.cascade import load_cascade
from vtrial.diffusion.conditions import Demographics
from vtrial.diffusion.denoiser import Scaling
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import read_card
from vtrial.records import InputError
from vtrial.training import StoredVolumes, export_model, train
from vtrial.training.batches import make_batch

SCALING = {"center": (0.15, 0.05), "sd": (0.25, 0.1)}
PEOPLE = [Demographics("F", 60.0, 165.0, 70.0), Demographics("M", 50.0, 180.0, 90.0)]
HANDOVER = 0.5
SAMPLER = SamplerConfig(name="dpmpp-2m", steps=6, sigma_min=0.05, sigma_max=20.0)
STAGES = ("global", "global-detail", "super-resolution")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("experts")
    data = write_blobs(folder / "data", 3)
    found = {}
    for stage in STAGES:
        changes: dict[str, object] = {} if stage == "super-resolution" else {"scaling": SCALING}
        if stage == "global-detail":
            changes |= {"bands": True, "data": {"phases": 2, "patch_shape": (8, 4, 12)}}
        found[stage] = folder / stage
        train(tiny(stage, steps=20, **changes), data, found[stage])
    return found


def export(runs: dict[str, Path], out: Path, handover: float = HANDOVER) -> Path:
    samplers = dict.fromkeys(STAGES, SAMPLER)
    samplers["global-detail"] = SAMPLER.model_copy(update={"sigma_max": handover})
    export_model(out, runs, samplers, name="experts")
    return out


def test_a_share_of_the_patches_lies_in_a_region(tmp_path: Path) -> None:
    data = StoredVolumes(write_blobs(tmp_path / "data", 2), phases=2)
    region = ((0.0, 0.5, 0.25), (0.5, 1.0, 0.75))

    def origins(**changes: object) -> list[tuple[int, int, int]]:
        cut = {"phases": 2, "patch_shape": (4, 4, 4), **changes}
        return list(make_batch(tiny("global-detail", data=cut, batch=128), data, 1).origins)

    all_there = origins(region=region, region_share=1.0)
    assert {x for x, _, _ in all_there} == {0} and {y for _, y, _ in all_there} == {4}
    assert {z for _, _, z in all_there} == {4, 6, 8}, "volumes of 8x8x16: 4 to 12 holds patches of 4 from there"
    inside = [o in set(all_there) for o in origins(region=region, region_share=0.5)]
    assert 0.4 < sum(inside) / 128 < 0.8
    assert origins(region=region, region_share=0.0) != origins(), "a draw more"
    narrow = origins(region=((0.4, 0.4, 0.5), (0.6, 0.6, 0.6)), region_share=1.0)
    assert all(0 <= v <= n - 4 and v % 2 == 0 for o in narrow for v, n in zip(o, (8, 8, 16), strict=True))
    with pytest.raises(ValidationError, match="first corner"):
        origins(region=region[::-1])
    with pytest.raises(ValidationError, match=r"data\.region"):
        tiny("global", data={"region": region})


def test_the_expert_trains_on_patches_where_they_lie(tmp_path: Path) -> None:
    data = StoredVolumes(write_blobs(tmp_path / "data", 2), phases=2)
    config = tiny("global-detail", data={"phases": 2, "patch_shape": (4, 4, 8)}, batch=64)
    batch = make_batch(config, data, 1)
    assert batch.target.shape == (64, 2, 4, 4, 8) and batch.whole == (8, 8, 16)
    assert len(set(batch.origins)) > 8
    where = batch.conditions(config.stage_config(Scaling(), Scaling())).coordinates
    assert where is not None
    for origin, place in zip(batch.origins, where, strict=True):
        centre = (origin[0] + 0.5) / 7 * 2 - 1
        assert float(place[0, 0, 0, 0]) == pytest.approx(centre, abs=1e-6)


def test_the_expert_sees_whole_volumes_at_the_end(tmp_path: Path) -> None:
    data = StoredVolumes(write_blobs(tmp_path / "data", 2), phases=2)
    settings = {"phases": 2, "patch_shape": (4, 4, 8), "whole_after": 3}
    config = tiny("global-detail", data=settings, batch=4, steps=5)
    assert [make_batch(config, data, step).target.shape[0] for step in range(1, 6)] == [4, 4, 4, 1, 1]
    last = make_batch(config, data, 4)
    assert last.target.shape[2:] == last.whole and last.origins == ((0, 0, 0),)
    state = train(config, data, tmp_path / "run")
    assert state.step == 5 and state.skipped == 0
    assert [config.images(step) for step in (2, 3, 5)] == [8, 12, 14]
    later = tiny("super-resolution", data=settings | {"patch_shape": (16, 16, 32)}, batch=4)
    assert later.images(5) == 20, "patches to the end"


def test_each_expert_works_on_its_side_of_the_handover(runs: dict[str, Path], tmp_path: Path) -> None:
    cascade = load_cascade(export(runs, tmp_path / "model"), dtype=torch.float32)
    assert cascade.detail is not None
    heard: dict[str, list[float]] = {"global": [], "global-detail": []}
    for name, denoiser in (("global", cascade.low), ("global-detail", cascade.detail)):
        denoiser.register_forward_pre_hook(lambda _, given, name=name: heard[name].append(float(given[1][0])))
    cascade.sample_low(PEOPLE, noise=torch.Generator().manual_seed(0))
    sigmas = SAMPLER.sigmas()[:-1]
    assert heard["global"] == pytest.approx([s for s in sigmas if s >= HANDOVER])
    assert heard["global-detail"] == pytest.approx([s for s in sigmas if s < HANDOVER])


def test_changing_hands_changes_nothing_but_the_network(runs: dict[str, Path], tmp_path: Path) -> None:
    """With an expert whose answer is known on any grid (all zero), the other one's grid comes back exactly."""
    cascade = load_cascade(export(runs, tmp_path / "model"), dtype=torch.float32)
    assert cascade.detail is not None and cascade.detail.config.band_sd and not cascade.low.config.band_sd
    volume = torch.randn(2, 2, 56, 56, 96)
    there = cascade.detail.config.grid_of(volume)
    assert torch.allclose(cascade.detail.config.voxels_of(there), volume, atol=1e-5)
    assert float(there.std()) == pytest.approx(float(volume.std()), rel=1e-4), "a rotation: noise stays white"
    alone = load_cascade(export(runs, tmp_path / "never", handover=0.051), dtype=torch.float32)
    both = [c.sample_low(PEOPLE[:1], noise=torch.Generator().manual_seed(0)) for c in (cascade, alone)]
    assert not torch.allclose(*both, atol=1e-3)
    assert float((both[0] - both[1]).abs().mean()) < 0.2


def test_stages_that_make_no_model_are_told(runs: dict[str, Path], tmp_path: Path) -> None:
    train(tiny("global", steps=2), write_blobs(tmp_path / "data", 3), tmp_path / "other")  # measures its own scaling
    with pytest.raises(InputError, match=r"same scaling.*what was trained is safe"):
        export(runs | {"global": tmp_path / "other"}, tmp_path / "model")
    with pytest.raises(InputError, match="differs in bands"):
        train(
            tiny("global-detail", scaling=SCALING, data={"phases": 2, "patch_shape": (8, 4, 12)}),
            tmp_path / "data",
            tmp_path / "third",
            start_from=export(runs, tmp_path / "whole"),
        )


def test_experts_need_one_scaling(runs: dict[str, Path], tmp_path: Path) -> None:
    card = read_card(export(runs, tmp_path / "model"))
    assert card.handover == HANDOVER
    detail = card.stages["global-detail"]
    other = detail.model_copy(update={"config": detail.config.model_copy(update={"scaling": Scaling()})})
    changed = card.model_dump() | {
        "stages": card.model_copy(update={"stages": card.stages | {"global-detail": other}}).model_dump()["stages"]
    }
    with pytest.raises(ValidationError, match="same scaling"):
        type(card).model_validate(changed)
