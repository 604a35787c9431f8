"""The network: published size, magnitude preservation, equations, equivalence of its inference-only form."""

import math
from typing import Literal

import pytest
import torch

from vtrial.diffusion import layers
from vtrial.diffusion.conditions import Demographics, coordinates, from_grid, to_grid, upsample
from vtrial.diffusion.denoiser import Denoiser, NoiseConfig, Scaling, StageConfig
from vtrial.diffusion.ema import PowerEma, decay, gamma_of
from vtrial.diffusion.emphasis import EVEN, Emphasis
from vtrial.diffusion.network import Conditions, Network, NetworkConfig
from vtrial.diffusion.voxels import VoxelView
from vtrial.training import read_config

SMALL = NetworkConfig(patch=2, channels=(16, 24, 32), blocks=(1, 1, 2), coordinates=True, gated_output=True)


def conditions_for(config: NetworkConfig, shape: tuple[int, int, int], batch: int = 2) -> Conditions:
    grid = tuple(n // config.patch for n in shape)
    where = coordinates((0, 0, 0), shape, shape, config.patch).expand(batch, -1, -1, -1, -1)
    low = torch.randn(batch, config.grid_channels, *grid) if config.low_resolution else None
    return Conditions(torch.rand(batch, config.conditions), low, where if config.coordinates else None)


def open_gains(network: torch.nn.Module, value: float = 1.0) -> None:
    """Every learned gain starts at 0, which would hide what is behind it."""
    for layer in network.modules():
        if isinstance(layer, layers.MPConv) and layer.gain is not None:
            layer.gain.data.fill_(value)


@pytest.mark.parametrize("name", ["paper-global", "paper-super-resolution"])
def test_paper_network_has_the_published_parameter_count(name: str) -> None:
    with torch.device("meta"):
        network = Network(read_config(f"configs/{name}.toml").network)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(78.8e6, rel=0.01)


@pytest.mark.parametrize("name", ["bundled-global", "bundled-super-resolution"])
def test_bundled_networks_fit_their_file(name: str) -> None:
    with torch.device("meta"):
        network = Network(read_config(f"configs/{name}.toml").network)
    assert sum(p.numel() for p in network.parameters()) <= 8.0e6


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(layout="edm2", channels=(16, 32, 48, 64), blocks=(2, 2, 2, 2), demographics="channels"),
        SMALL,
        SMALL.model_copy(update={"merge": "sum", "embedding_shift": True, "edge_kernel": 1}),
    ],
)
def test_activations_keep_magnitude_one_at_initialisation(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = Network(config)
    network.normalize_()
    magnitudes: dict[str, float] = {}
    for name, module in network.named_modules():
        if isinstance(module, layers.Block):
            module.register_forward_hook(
                lambda _m, _i, out, name=name: magnitudes.__setitem__(name, float(out.detach().square().mean().sqrt()))
            )
    shape = (32, 32, 32)
    prepared = network.prepare(conditions_for(config, shape), tuple(n // config.patch for n in shape), torch.float32)
    x = to_grid(torch.randn(2, 2, *shape), config.patch)
    out = network(x, torch.tensor([-0.5, 0.3]), prepared)
    assert torch.equal(out, torch.zeros_like(out))
    assert magnitudes and all(0.6 < value < 1.5 for value in magnitudes.values()), magnitudes


def test_magnitude_preserving_operations() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 24, 24, 24), torch.randn(2, 16, 24, 24, 24)

    def rms(x: torch.Tensor) -> float:
        return float(x.square().mean().sqrt())

    assert rms(layers.mp_silu(a)) == pytest.approx(1.0, abs=0.01)
    assert rms(layers.mp_sum(a[:, :16], b, 0.3)) == pytest.approx(1.0, abs=0.01)
    joined = layers.mp_concat(a, b, 0.5)
    assert rms(joined) == pytest.approx(1.0, abs=0.01)
    # both inputs contribute alike although one has four times the channels
    assert float(joined[:, :64].square().sum() / joined[:, 64:].square().sum()) == pytest.approx(1.0, abs=0.02)
    assert rms(layers.MPFourier(4096)(torch.linspace(-1, 1, 50))) == pytest.approx(1.0, abs=0.02)
    assert rms(layers.MPConv(64, 32, 3)(a)[..., 1:-1, 1:-1, 1:-1]) == pytest.approx(1.0, abs=0.05)
    assert torch.allclose(layers.pixel_norm(5.0 * a).square().mean(1), torch.ones(2, 24, 24, 24), atol=1e-3)


def test_weight_gradient_is_orthogonal_to_the_weights() -> None:
    # Equation 47 normalises inside the graph, so a step can only turn the weight vectors.
    layer = layers.MPConv(8, 4, 3)
    layer.normalize_()
    layer(torch.randn(1, 8, 6, 6, 6)).square().sum().backward()
    cosine = torch.nn.functional.cosine_similarity(layer.weight.grad.flatten(1), layer.weight.flatten(1))
    assert float(cosine.abs().max()) < 1e-3


def test_folded_network_equals_the_trained_one() -> None:
    torch.manual_seed(1)
    network = Network(SMALL)
    open_gains(network, 0.7)
    shape, grid = (16, 16, 24), (8, 8, 12)
    known, x = conditions_for(SMALL, shape), to_grid(torch.randn(2, 2, *shape), 2)
    level = torch.tensor([0.1, -0.4])
    expected = network(x, level, network.prepare(known, grid, torch.float32))
    assert float(expected.abs().mean()) > 0.1
    network.fold_(torch.float32)
    assert torch.allclose(network(x, level, network.prepare(known, grid, torch.float32)), expected, atol=1e-5)


def test_shapes_and_conditions_that_do_not_fit_are_named() -> None:
    network = Network(SMALL)
    with pytest.raises(ValueError, match="multiples of 4"):
        network.prepare(conditions_for(SMALL, (16, 16, 20)), (8, 8, 10), torch.float32)
    with pytest.raises(ValueError, match="coordinates"):
        network.prepare(Conditions(torch.rand(2, 4)), (8, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="levels"):
        NetworkConfig(channels=(8, 16), blocks=(1,))


def test_every_condition_reaches_the_output() -> None:
    torch.manual_seed(2)
    config = SMALL.model_copy(update={"low_resolution": True, "embedding_shift": True})
    network = Network(config)
    open_gains(network)
    shape, grid = (16, 16, 16), (8, 8, 8)
    known, x, level = conditions_for(config, shape), to_grid(torch.randn(2, 2, *shape), 2), torch.zeros(2)

    def run(known: Conditions, level: torch.Tensor = level) -> torch.Tensor:
        return network(x, level, network.prepare(known, grid, torch.float32))

    base = run(known)
    assert not torch.allclose(run(known, level + 0.3), base, atol=1e-3)
    for i in range(config.conditions):
        vector = known.vector.clone()
        vector[:, i] += 0.3
        assert not torch.allclose(run(Conditions(vector, known.low, known.coordinates)), base, atol=1e-3)
    assert not torch.allclose(run(Conditions(known.vector, known.low * 0.5, known.coordinates)), base, atol=1e-3)
    assert not torch.allclose(run(Conditions(known.vector, known.low, known.coordinates * 0.5)), base, atol=1e-3)


def test_untrained_denoiser_is_the_best_guess_without_knowledge() -> None:
    # F = 0 leaves c_skip x, the posterior mean for independent normal voxels of SD sigma_data.
    stage = StageConfig(stage="global", network=SMALL)
    denoiser = Denoiser(stage)
    x, sigma = torch.randn(2, 16, 8, 8, 8), torch.tensor([0.2, 5.0])
    prepared = denoiser.network.prepare(conditions_for(SMALL, (16, 16, 16)), (8, 8, 8), torch.float32)
    expected = x * (0.25 / (0.25 + sigma**2)).view(2, 1, 1, 1, 1)
    assert torch.allclose(denoiser(x, sigma, prepared), expected, atol=1e-6)


@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_a_voxel_head_corrects_voxels_and_begins_with_nothing(
    objective: Literal["diffusion", "flow"], bands: bool
) -> None:
    """What the head answers is a correction of D in voxels, in units of σs/√(σ² + s²), whatever the grid holds."""
    torch.manual_seed(3)
    network = SMALL.model_copy(update={"voxel_channels": 12})
    sd = tuple(float(v) for v in torch.linspace(1.3, 0.1, network.grid_channels)) if bands else ()
    scaling = Scaling(center=(0.3, 0.1), sd=(0.2, 0.05))
    stage = StageConfig(stage="global", network=network, objective=objective, band_sd=sd, scaling=scaling)
    denoiser = Denoiser(stage)
    x, sigma = torch.randn(2, 16, 8, 8, 8), torch.tensor([0.2, 5.0])
    prepared = denoiser.network.prepare(conditions_for(network, (16, 16, 16)), (8, 8, 8), torch.float32)
    head, seen = denoiser.network.voxel_head, list[VoxelView]()
    assert head is not None
    head.register_forward_hook(lambda _m, given, _out: seen.append(given[2]))
    alone = denoiser(x, sigma, prepared)
    answer = torch.randn(2, 2, 16, 16, 16)
    head.register_forward_hook(lambda _m, _given, _out: answer)
    changed = denoiser(x, sigma, prepared)
    s = sigma.view(2, 1, 1, 1, 1)
    assert torch.allclose(stage.voxels_of(changed - alone), answer * s * 0.5 / (s**2 + 0.25).sqrt(), atol=1e-5)
    assert torch.allclose(seen[0].noise, stage.voxels_of(x - alone) / s, atol=1e-4)
    assert torch.allclose(seen[0].scaled, stage.voxels_of(alone) / 0.5, atol=1e-5)
    assert torch.allclose(seen[0].pair, stage.decode(alone), atol=1e-5)
    with pytest.raises(ValueError, match="look at voxels"):
        denoiser.network(x, sigma.log() / 4.0, prepared)


def test_a_voxel_head_learns_what_blocks_cannot_tell() -> None:
    """Voxels of two values with little noise: which one a voxel has is plain, but a linear answer keeps the noise."""
    generator = torch.Generator().manual_seed(4)
    network = SMALL.model_copy(update={"voxel_channels": 12, "demographics": "channels", "coordinates": False})
    torch.manual_seed(4)
    denoiser = Denoiser(StageConfig(stage="global", network=network))
    head = denoiser.network.voxel_head
    assert head is not None
    adam = torch.optim.Adam(head.parameters(), lr=0.01)
    conditions, sigma = Conditions(torch.rand(1, 4)), torch.tensor([0.15])
    errors = []
    for _ in range(150):
        clean = to_grid((torch.rand(1, 2, 16, 16, 16, generator=generator) < 0.5).float() - 0.5, 2)
        noise = torch.randn(clean.shape, generator=generator)
        loss, error = denoiser.loss(clean, sigma, noise, conditions, torch.float32)
        adam.zero_grad()
        loss.backward()
        adam.step()
        errors.append(float(error[0]))
    assert errors[-1] < 0.2 * errors[0]


def test_high_uptake_counts_more_in_the_loss_and_not_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(StageConfig(stage="global", network=SMALL))
    clean = torch.zeros(1, 16, 8, 8, 8)
    clean[:, 8:, 2:4] = 4.0  # PET, eight SDs in a quarter of the places
    fault = torch.full(clean.shape, 0.01, requires_grad=True)
    monkeypatch.setattr(denoiser, "forward", lambda *given: clean + fault)
    known, sigma = conditions_for(SMALL, (16, 16, 16), 1), torch.tensor([0.1])

    def pulls(weight: float) -> tuple[torch.Tensor, float]:
        """How the loss pulls at each place of D along x, and the error."""
        emphasis = Emphasis(uptake=weight)
        loss, error = denoiser.loss(clean, sigma, torch.zeros_like(clean), known, torch.float32, emphasis)
        return torch.autograd.grad(loss, fault)[0].mean((0, 1, 3, 4)), float(error[0])

    (plain, error), (weighted, same) = pulls(0.0), pulls(1.0)
    assert error == same
    assert torch.allclose(plain, plain[:1].expand(8))
    assert float(weighted[2] / weighted[0]) == pytest.approx(1.0 + 8.0**2, rel=0.02)
    assert float(weighted.mean()) == pytest.approx(float(plain.mean()), rel=1e-4), "of all places as much as before"


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_space_to_depth_round_trip_and_layout(patch: int) -> None:
    volume = torch.arange(2 * 8 * 8 * 12, dtype=torch.float32).reshape(1, 2, 8, 8, 12)
    grid = to_grid(volume, patch)
    assert grid.shape == (1, 2 * patch**3, 8 // patch, 8 // patch, 12 // patch)
    assert grid.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(from_grid(grid, patch), volume)
    assert torch.equal(grid[0, : patch**3, 1, 0, 0], volume[0, 0, patch : 2 * patch, :patch, :patch].flatten())


def test_upsampling_keeps_the_samples_and_is_linear_between_them() -> None:
    full = torch.rand(2, 32, 24, 40)
    low = full[:, 1::4, 1::4, 1::4]
    up = upsample(low)
    assert up.shape == full.shape
    assert torch.equal(up[:, 1::4, 1::4, 1::4], low)
    assert torch.allclose(up[:, 3, 1, 1], (low[:, 0, 0, 0] + low[:, 1, 0, 0]) / 2)
    assert torch.equal(up[:, 0, 1, 1], low[:, 0, 0, 0])
    ramp = torch.arange(32.0)[None, :, None, None].expand(2, 32, 24, 40)
    assert torch.allclose(upsample(ramp[:, 1::4, 1::4, 1::4])[:, 1:30], ramp[:, 1:30], atol=1e-5)
    assert torch.allclose(upsample(low, (8, 4, 16), (16, 12, 20)), up[:, 8:24, 4:16, 16:36], atol=1e-6)


def test_coordinates_of_a_patch_are_a_part_of_the_whole() -> None:
    whole = coordinates((0, 0, 0), (224, 224, 384), (224, 224, 384), 4)
    part = coordinates((64, 32, 128), (64, 64, 64), (224, 224, 384), 4)
    assert torch.equal(part, whole[:, 16:32, 8:24, 32:48])
    assert float(whole.min()) > -1.0 and float(whole.mean()) == pytest.approx(0.0, abs=1e-6)


def test_demographics_enter_as_published() -> None:
    assert Demographics("M", 60.0, 175.0, 80.0).vector() == pytest.approx((0.75, 0.5, 1.0, 0.6))
    assert Demographics("F", 60.0, 175.0, 80.0).vector()[2] == 0.0


def test_scaling_round_trip() -> None:
    scaling, volume = Scaling(center=(0.3, 0.1), sd=(0.2, 0.05)), torch.rand(1, 2, 4, 4, 4)
    assert torch.allclose(scaling.decode(scaling.encode(volume, 0.5), 0.5), volume, atol=1e-6)
    assert torch.allclose(scaling.encode(volume, 0.5)[:, 1], (volume[:, 1] - 0.1) * 10.0, atol=1e-5)


def test_training_noise_has_the_stated_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = NoiseConfig(p_mean=-0.4, p_std=1.3)
    logs = torch.cat([normal.draw(8, generator) for _ in range(4000)]).log()
    assert float(logs.mean()) == pytest.approx(-0.4, abs=0.02) and float(logs.std()) == pytest.approx(1.3, abs=0.02)
    mixed = NoiseConfig(p_mean=0.0, p_std=0.1, uniform=0.5, sigma_min=0.01, sigma_max=100.0)
    logs = torch.cat([mixed.draw(8, generator) for _ in range(4000)]).log()
    outside = logs.abs() > 0.5
    assert float(outside.float().mean()) == pytest.approx(0.5 * (1 - 0.5 / math.log(100.0)), abs=0.02)
    assert float(logs.abs().max()) <= math.log(100.0) + 1e-5


def test_power_ema_equals_the_reference_sum() -> None:
    # Equation 121: the average after n steps has weights proportional to t^γ on the values at t; summed exactly here
    # from the product of decays, and compared with the continuous profile.
    for length in (0.05, 0.10):
        gamma = gamma_of(length)
        assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(length**2)
        n = 400
        values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
        parameter = {"w": torch.zeros(1, dtype=torch.float64)}
        average = PowerEma(parameter, (length,))
        for t in range(1, n + 1):
            average.update({"w": values[t - 1 : t]}, t)
        weights = torch.ones(n, dtype=torch.float64)
        for t in range(1, n + 1):
            weights[t - 1] *= 1.0 - decay(t, gamma)
            weights[: t - 1] *= decay(t, gamma)
        assert float(weights.sum()) == pytest.approx(1.0)
        assert float(average.averages[length]["w"]) == pytest.approx(float((weights * values).sum()), rel=1e-9)
        times = torch.arange(1, n + 1, dtype=torch.float64) / n
        center = float((weights * times).sum())
        width = float((weights * (times - center) ** 2).sum()) ** 0.5
        assert center == pytest.approx((gamma + 1) / (gamma + 2), abs=0.01) and width == pytest.approx(length, rel=0.02)


def test_hot_spots_of_a_voxel_count_more_in_the_loss_than_large_hot_organs() -> None:
    wary = Emphasis(contrast=2.0)
    uptake, pet = torch.zeros(1, 1, 10, 10, 10), torch.zeros(1, 1, 20, 20, 20)
    assert torch.equal(wary.counts(uptake, pet, 2), EVEN.counts(uptake, pet, 2))
    pet[0, 0, :, :, 12:] = 8.0  # a large organ
    pet[0, 0, 5, 5, 5], pet[0, 0, 15, 15, 5] = 2.5, -2.5
    counts = wary.counts(uptake, pet, 2)[0, 0]
    plain = float(counts[9, 0, 0])
    assert float(counts.mean()) == pytest.approx(1.0)
    assert float(counts[2, 2, 2]) / plain == pytest.approx(1.0 + 2.0 * (2.5 * 124 / 125) ** 4)
    assert float(counts[2, 2, 9]) == pytest.approx(plain), "within the organ"
    assert plain < float(counts[2, 2, 6]) < plain * (1.0 + 2.0 * (8.0 * 0.4) ** 4 + 1e-3), "its rim"
    assert float(counts[7, 7, 2]) < plain * (1.0 + 2.0 * 0.021**4), "a cold spot is none"


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_the_loss_looks_at_hot_spots_as_they_are_seen(
    objective: Literal["diffusion", "flow"], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser(StageConfig(stage="global", network=SMALL, objective=objective))
    voxels = torch.zeros(1, 2, 16, 16, 16)
    voxels[0, 1, 7, 7, 7] = 2.0
    seen = denoiser.config.grid_of(voxels).requires_grad_()
    clean, sigma = torch.zeros(1, 16, 8, 8, 8), torch.tensor([0.2])
    x_t = clean / 1.2
    monkeypatch.setattr(denoiser, "forward", lambda *given: seen)
    monkeypatch.setattr(denoiser, "velocity", lambda *given: (x_t - seen) * 6.0)
    known = conditions_for(SMALL, (16, 16, 16), 1)

    def pull(emphasis: Emphasis) -> torch.Tensor:
        loss, _ = denoiser.loss(clean, sigma, clean, known, torch.float32, emphasis)
        return denoiser.config.voxels_of(torch.autograd.grad(loss, seen)[0])[0, 1, 7, 7, 7]

    counted = 1.0 + (4.0 * 124 / 125) ** 4  # 2.0 is 4 SDs; one of 512 places
    assert float(pull(Emphasis(contrast=1.0)) / pull(EVEN)) == pytest.approx(counted / (1.0 + (counted - 1.0) / 512))
