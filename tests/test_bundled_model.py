"""The models that come with the package: whole, small enough, honest about itself, and making people."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtrial.cohort.recruit import recruit
from vtrial.cohort.registry import find_spec, shipped_cohorts
from vtrial.cohort.spec import read_spec
from vtrial.cohort.support import check_support
from vtrial.diffusion.cascade import TILE_OVERLAP, CascadeSampler, load_cascade
from vtrial.diffusion.conditions import Demographics
from vtrial.diffusion.tiles import tile_for, tiles
from vtrial.diffusion.weights import model_folder, verify_model
from vtrial.fidelity import measure_body
from vtrial.geometry import LOW_SHAPE, SHAPE, spacing_mm
from vtrial.imaging.codec import decode_ct, decode_suv
from vtrial.training.checkpoint import stage_to_start_from
from vtrial.training.config import read_config

NAME, FLOW = "phantom-v1", "phantom-v1-flow"
MAN, WOMAN = Demographics("M", 58.0, 180.0, 95.0), Demographics("F", 59.0, 162.0, 58.0)


@pytest.mark.parametrize(("name", "objective"), [(NAME, "diffusion"), (FLOW, "flow")])
def test_the_card_says_what_the_model_is(name: str, objective: str) -> None:
    card = verify_model(name)
    assert card.name == name and card.support == verify_model(NAME).support
    assert "phantom" in card.data and "patients" in card.description
    assert card.hardware and card.license == "Apache-2.0"
    for stage in card.stages.values():
        assert stage.steps > 0 and stage.seconds > 0 and stage.loss
        assert stage.config.objective == objective
        assert (model_folder(name) / stage.file).stat().st_size <= 16 * 2**20


@pytest.mark.parametrize("name", [NAME, FLOW])
def test_the_configuration_of_the_voxel_head_goes_on_from_it(name: str, repository: Path) -> None:
    config = read_config(repository / "configs" / "bundled-voxel-head.toml")
    _, stage = stage_to_start_from(config, name)
    assert config.network == stage.config.network and config.scaling == stage.config.scaling
    assert stage.training["trains"] == config.trains == "voxel-head"
    assert not config.sees_whole(900) and config.sees_whole(901)


def test_all_weights_together_stay_small() -> None:
    files = ("global", "global_detail", "super_resolution")
    assert {p.stem for name in (NAME, FLOW) for p in model_folder(name).glob("*.safetensors")} == set(files)
    found = model_folder(NAME).parent.parent.rglob("*.safetensors")
    assert sum(path.stat().st_size for path in found) <= 40 * 10**6


@pytest.mark.parametrize("cohort", sorted(set(shipped_cohorts()) - {"phantom-training"}))
def test_it_knows_everybody_in_the_shipped_cohorts(cohort: str) -> None:
    support = verify_model(NAME).support
    assert check_support(recruit(read_spec(find_spec(cohort)), 3000, 1), support) == []


@pytest.mark.parametrize("name", [NAME, FLOW])
def test_stage_one_makes_different_people_of_the_right_size(name: str) -> None:
    cascade = load_cascade(name)
    sampler = CascadeSampler.of(cascade.card).with_options(steps_global=16).low
    torch.set_num_threads(2)
    people = [MAN, WOMAN]
    pairs = cascade.sample_low(people, noise=torch.Generator().manual_seed(1), sampler=sampler)
    other = cascade.sample_low(people[:1], noise=torch.Generator().manual_seed(2), sampler=sampler)
    assert pairs.shape == (2, 2, *LOW_SHAPE)
    assert float((other[0] - pairs[0]).abs().mean()) > 0.005
    man, woman = (
        measure_body(decode_ct(p[0]).numpy(), decode_suv(p[1]).numpy(), spacing_mm(d.height_cm, LOW_SHAPE))
        for p, d in zip(pairs, people)
    )
    # 0.62 l a kg of body, less 3.8 l: what the phantoms have
    assert man["body_ml"] == pytest.approx(0.62 * 95_000 - 3800, rel=0.2)
    assert woman["body_ml"] == pytest.approx(0.62 * 58_000 - 3800, rel=0.2)
    assert man["lung_ml"] > 1000 and woman["lung_ml"] > 600
    assert 0.5 < man["liver_box_suv"] < 6


@pytest.mark.slow
def test_the_whole_cascade_keeps_what_stage_one_made(tmp_path: Path) -> None:
    cascade = load_cascade(NAME)
    low = cascade.sample_low([MAN], noise=torch.Generator().manual_seed(1))[0]
    high = cascade.refine(low, MAN, noise=torch.Generator().manual_seed(2))
    assert high.shape == (2, *SHAPE) and bool(torch.isfinite(high).all())
    coarse, fine = (
        measure_body(decode_ct(v[0]).numpy(), decode_suv(v[1]).numpy(), spacing_mm(180.0, tuple(v.shape[1:])))
        for v in (low, high)
    )
    for measure in ("body_ml", "activity_g", "liver_box_suv"):
        assert fine[measure] == pytest.approx(coarse[measure], rel=0.08), measure


@pytest.mark.slow
def test_the_tiles_of_a_machine_with_little_memory_leave_no_seam() -> None:
    cascade = load_cascade(NAME)
    tile = tile_for(4 * 10**9, cascade.high.config.network)
    assert tile is not None
    low = cascade.sample_low([MAN], noise=torch.Generator().manual_seed(1))[0]
    twin = cascade.refine(low, MAN, noise=torch.Generator().manual_seed(2), tile=tile)
    step = (twin[..., 1:] - twin[..., :-1]).abs().mean(dim=(1, 2))  # by modality and place along z
    network = cascade.high.config.network
    patch, align = network.patch, network.divisor // network.patch
    grid, small = (tuple(n // patch for n in shape) for shape in (SHAPE, tile))
    edges = {e * patch for w in tiles(grid, small, TILE_OVERLAP // patch, align) for e in (w[2].start, w[2].stop)}
    borders = torch.tensor(sorted(e - 1 for e in edges if 0 < e < SHAPE[2]))
    # inside: near the borders, where the anatomy is alike, and likewise between two of the network's blocks
    inside = torch.cat([borders + patch * k for k in (-3, -2, -1, 1, 2, 3)])
    assert len(borders) >= 2
    ratio = step[:, borders].mean(dim=1) / step[:, inside].mean(dim=1)
    assert float(ratio.max()) <= 1.05, f"CT and PET: {ratio.tolist()}"
