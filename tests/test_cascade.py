"""The cascade: whole volume against tiles, seams, memory, randomness from its generators alone, bad models."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.blobs import tiny, write_blobs
from vtrial.diffusion.cascade import Cascade, CascadeSampler, load_cascade
from vtrial.diffusion.conditions import Demographics, from_grid, to_grid, upsample
from vtrial.diffusion.network import Conditions, Network, NetworkConfig
from vtrial.diffusion.sampler import SamplerConfig, sample
from vtrial.diffusion.tiles import TILES, blend_tiles, body_box, pass_bytes, tile_for, tiles
from vtrial.diffusion.voxels import VoxelView
from vtrial.diffusion.weights import list_models, read_card
from vtrial.execution import Resources
from vtrial.generation import LoadCascade, cascade_plan
from vtrial.geometry import SHAPE
from vtrial.records import InputError, Subject
from vtrial.training import export_model, read_config, train
from vtrial.training.estimate import _Peak

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


def test_stage_two_sees_the_low_resolution_volume_as_in_training(cascade: Cascade) -> None:
    seen: list[Tensor] = []
    hook = cascade.high.network.entry.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    for seed in (1, 2):
        cascade.refine(low_pair(), PERSON, noise=generator(seed), sampler=FAST.high)
    hook.remove()
    stage = cascade.high.config
    assert any(stage.low_noise)
    contexts = [entered for entered in seen if entered.shape[1] == stage.network.context_channels]
    low = from_grid((contexts[0] - contexts[1])[:, -stage.network.grid_channels :].float(), stage.network.patch)
    added = low[0, :, 1::4, 1::4, 1::4] * torch.tensor(stage.low_scaling.sd).view(2, 1, 1, 1) / 2**0.5
    for channel, sd in enumerate(stage.low_noise):
        assert float(added[channel].std()) == pytest.approx(sd, rel=0.1)


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


def test_tile_options(model: Path) -> None:
    own = CascadeSampler.of(read_card(model))
    assert own.with_options(tile=None, divisor=16).tile is None
    assert own.with_options(tile="48", divisor=16).tile == (224, 224, 48)
    assert own.with_options(tile="none", divisor=16).tile == own.with_options(tile="384").tile == SHAPE
    for wrong in ("32", "100", "400", "-64", "all", ""):
        with pytest.raises(InputError, match=rf"--tile {wrong}: .*multiples of 16 from 48 to 384"):
            own.with_options(tile=wrong, divisor=16)
    with pytest.raises(InputError) as error:
        own.with_options(steps_sr=1, tile="100", divisor=16)
    assert "--steps-sr 1" in str(error.value) and "--tile 100" in str(error.value)


def test_a_tile_as_large_as_the_volume_is_one_pass(cascade: Cascade) -> None:
    def refine(tile: tuple[int, int, int] | None) -> Tensor:
        return cascade.refine(low_pair(), PERSON, noise=generator(5), sampler=FAST.high, tile=tile)

    assert torch.equal(refine((48, 48, 96)), refine(None))


def test_stage_two_leaves_air_as_it_is(cascade: Cascade) -> None:
    low = torch.zeros(2, 24, 24, 48)
    low[:, 9:15, 5:9] = 0.5
    corner, shape = body_box(low, 4, 16)
    # 8 voxels of air on each side, then up to a multiple of 16
    assert corner == (28, 12, 0) and shape == (48, 32, 192)
    body = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
    twin = cascade.refine(low, PERSON, noise=generator(5), sampler=FAST.high)
    added = (twin - upsample(low)).abs()
    assert float(added[(slice(None), *body)].max()) > 0.01
    added[(slice(None), *body)] = 0.0
    assert float(added.max()) == 0.0


def test_a_body_in_its_box_is_the_body_in_the_whole_volume(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    low = torch.zeros(2, 24, 24, 48)
    low[:, 8:16, 8:16] = low_pair((8, 8, 48))

    def refine() -> Tensor:
        return cascade.refine(low, PERSON, noise=generator(5), sampler=FAST.high)[:, 32:64, 32:64]

    boxed = refine()
    monkeypatch.setattr("vtrial.diffusion.tiles.MARGIN", SHAPE[2])
    whole = refine()
    assert not torch.equal(boxed, whole)
    assert float((boxed - whole).abs().mean()) < 0.05 * float((whole - whole.mean()).abs().mean())


def test_a_body_at_the_rim_and_none_at_all() -> None:
    low = torch.zeros(2, 24, 24, 48)
    assert body_box(low, 4, 16) == ((0, 0, 0), (96, 96, 192))
    low[1, 23, 0, 20] = 0.2
    assert body_box(low, 4, 16) == ((80, 0, 72), (16, 16, 32))


def test_a_tile_that_is_asked_for_names_the_run_and_no_other_does() -> None:
    card = read_card("phantom-v1")
    low, high = (card.stages[stage].sampler.model_dump_json() for stage in ("global", "super-resolution"))
    words = f"global {low}, super-resolution {high}, global-detail below {card.handover:g}"
    plain, tiled, whole = (cascade_plan("phantom-v1", tile=tile) for tile in (None, "128", "none"))
    assert plain.identity["sampler"] == words and plain.standard  # as in every manifest that there is
    assert tiled.identity["sampler"] == f"{words}, tiles of 128" and not tiled.standard
    assert whole.identity["sampler"] == f"{words}, tiles of 384" and not whole.standard


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


PAPER = read_config("configs/paper-super-resolution.toml").network
BUNDLED = read_config("configs/bundled-super-resolution.toml").network


def counted_bytes(network: NetworkConfig, shape: tuple[int, int, int]) -> int:
    """The most bytes at once of one evaluation, its context too, on tensors without content."""
    grid = (1, network.grid_channels, *(side // network.patch for side in shape))
    with torch.device("meta"), torch.no_grad():
        net = Network(network).fold_(torch.bfloat16)
        with _Peak(net.parameters()) as peak:
            x = torch.empty(grid).contiguous(memory_format=torch.channels_last_3d)
            where = torch.empty(1, 3, *grid[2:])
            context = net.prepare(Conditions(torch.empty(1, 4), x, where), grid[2:], torch.bfloat16)  # type: ignore[arg-type]
            pair = torch.empty(1, 2, *shape)
            view = VoxelView(pair, pair, pair)
            net(
                (x / 2.0).to(torch.bfloat16),
                torch.ones(1),
                context,
                lambda _: (view, lambda v: to_grid(v, network.patch)),
            )
    return peak.most


@pytest.mark.parametrize(
    "network",
    [
        PAPER,
        BUNDLED,
        PAPER.model_copy(update={"layout": "light"}),
        PAPER.model_copy(update={"patch": 2, "channels": (96, 96), "blocks": (1, 1), "attention_head_channels": 0}),
        PAPER.model_copy(update={"channels": (32,), "blocks": (2,), "attention_head_channels": 0}),
        BUNDLED.model_copy(update={"patch": 2, "voxel_channels": 32}),
    ],
)
def test_the_memory_of_a_pass_is_foreseen(network: NetworkConfig) -> None:
    counted = counted_bytes(network, (96, 96, 96))
    assert 0.95 < pass_bytes(network, (96, 96, 96)) / counted < 1.5


def test_a_pass_in_float32_takes_more_and_is_tiled_sooner() -> None:
    half, single = (pass_bytes(PAPER, SHAPE, value_bytes) for value_bytes in (2, 4))
    assert 1.7 * half < single < 2.0 * half
    assert tile_for(70 * 10**9, PAPER, 2) is None
    assert tile_for(70 * 10**9, PAPER, 4) is not None


def test_the_bundled_model_is_tiled_as_it_has_always_been() -> None:
    assert read_card("phantom-v1").stages["super-resolution"].config.network == BUNDLED
    for megabytes in range(1000, 100_000, 50):
        assert tile_for(megabytes * 10**6, BUNDLED) == ((224, 224, 128) if megabytes < 6000 else None)


def test_a_large_network_is_tiled_where_a_pass_would_not_fit() -> None:
    lengths = {gb: (tile_for(gb * 10**9, PAPER) or SHAPE)[2] for gb in (8, 16, 24, 40, 80)}
    assert lengths == {8: 64, 16: 64, 24: 128, 40: 128, 80: 384}
    for tile in TILES:
        assert list(tiles(SHAPE, tile, 32, 32)), "takes networks of every divisor that divides the volume"


def test_the_machine_chooses_the_tile_for_the_models_network(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def sample(*person: object, sampler: CascadeSampler, **noise: object) -> None:
        raise Seen(sampler.tile)

    high = SimpleNamespace(config=SimpleNamespace(network=PAPER))
    loaded = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, high=high, sample=sample)
    monkeypatch.setattr("vtrial.generation.load_cascade", lambda *unused: loaded)
    monkeypatch.setattr("vtrial.generation.total_memory_bytes", lambda: 24 * 10**9)
    person = Subject("A", 0, 0, "F", 60.0, 165.0, 70.0, "s")
    for asked, tile in ((None, (224, 224, 128)), ((224, 224, 96), (224, 224, 96)), (SHAPE, SHAPE)):
        with pytest.raises(Seen) as seen:
            LoadCascade("m", CascadeSampler(FAST.low, FAST.high, asked))(Resources())(person)
        assert seen.value.args == (tile,)
