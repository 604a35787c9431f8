"""Flow matching: the same noisy data as diffusion, velocities against closed forms, samplers, learning, cards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.blobs import tiny, write_blobs
from vtrial.diffusion.cascade import load_cascade
from vtrial.diffusion.conditions import Demographics
from vtrial.diffusion.denoiser import Denoiser, NoiseConfig, StageConfig
from vtrial.diffusion.flow import path, preconditioning
from vtrial.diffusion.layers import MPConv
from vtrial.diffusion.network import Conditions, Network, NetworkConfig, Prepared
from vtrial.diffusion.sampler import SamplerConfig, flow_heun, heun, sample
from vtrial.diffusion.weights import StageCard, read_card
from vtrial.training import StoredVolumes, export_model, read_config, steps, train
from vtrial.training.batches import measure_scaling
from vtrial.training.checkpoint import new_state

NETWORK = NetworkConfig(channels=(8, 16), blocks=(1, 1), attention_head_channels=0)
BANDS = tuple(0.05 * (i + 1) for i in range(16))
MEAN, SD = 0.7, 0.4
FLOWS = ["flow-heun", "flow-stochastic"]


def flow_stage(**changes: object) -> StageConfig:
    return StageConfig.model_validate({"stage": "global", "network": NETWORK, "objective": "flow", **changes})


def nothing(batch: int) -> Conditions:
    return Conditions(torch.zeros(batch, 4))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(sd: float, mean: float = 0.0) -> Callable[[Tensor, float], Tensor]:
    """D for data ~ N(mean, sd²)."""
    return lambda x, sigma: mean + (x - mean) * sd**2 / (sd**2 + sigma**2)


def last(states: Iterator[Tensor]) -> Tensor:
    *_, x = states
    return x


class Linear(nn.Module):
    """The best F when data have another SD than the preconditioning takes them for: a multiple of its input."""

    def __init__(self, assumed: float, true: float, factor: float = 1.0) -> None:
        super().__init__()
        self.assumed, self.true = assumed**2, true**2
        self.factor = nn.Parameter(torch.tensor(factor))

    def prepare(self, conditions: Conditions, shape: tuple[int, int, int], dtype: torch.dtype) -> Prepared:
        return Prepared(conditions.vector, None)

    def forward(self, x: Tensor, c_noise: Tensor, prepared: Prepared, look: None = None) -> Tensor:
        # F = (D - c_skip x)/c_out with D = true²/(true² + σ²) x, for the input x/√(σ² + assumed²)
        square = (4.0 * c_noise).exp().square().view(-1, 1, 1, 1, 1)
        gain = self.true / (self.true + square) - self.assumed / (self.assumed + square)
        return self.factor * gain * (square + self.assumed) / (square * self.assumed).sqrt() * x


def linear_flow(true: float, factor: float = 1.0) -> Denoiser:
    denoiser = Denoiser(flow_stage())
    denoiser.network = Linear(0.5, true, factor)  # type: ignore[assignment]
    return denoiser


@pytest.mark.parametrize("bands", [(), BANDS])
def test_velocity_and_denoiser_are_one_network(bands: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    network = NETWORK.model_copy(update={"patch": 2, "gated_output": True})
    denoiser = Denoiser(flow_stage(network=network, band_sd=bands))
    for layer in denoiser.modules():
        if isinstance(layer, MPConv) and layer.gain is not None:
            layer.gain.data.fill_(1.0)
    x, sigma = torch.randn(3, 16, 4, 4, 4), torch.tensor([0.02, 0.7, 50.0])
    x = x * (1.0 + sigma).view(-1, 1, 1, 1, 1)
    prepared = denoiser.network.prepare(nothing(3), (4, 4, 4), torch.float32)
    keep, t = path(sigma.view(-1, 1, 1, 1, 1))
    u = denoiser.velocity(keep * x, sigma, prepared).detach()
    assert torch.allclose(keep * x - t * u, denoiser(x, sigma, prepared), atol=1e-5)
    skip, _ = preconditioning(sigma.view(-1, 1, 1, 1, 1), denoiser.config.channel_sd(x))
    assert float((u - skip * keep * x).abs().mean()) > 0.1, "the network has a say"


@pytest.mark.parametrize("sigma", [0.01, 0.4, 3.0, 500.0])
def test_the_target_of_the_network_has_variance_one(sigma: float) -> None:
    sds = torch.tensor([0.05, 0.5, 2.0]).view(-1, 1)
    clean = sds * torch.randn(3, 200_000, generator=generator(1))
    noise = torch.randn(3, 200_000, generator=generator(2))
    keep, t = path(sigma)
    x_t, u = keep * clean + t * noise, noise - clean
    skip, out = preconditioning(torch.tensor(sigma), sds)
    assert torch.allclose((u * x_t).mean(1) / x_t.square().mean(1), skip[:, 0], rtol=0.02, atol=0.02)
    target = (skip * x_t - u) / out
    assert torch.allclose(target.square().mean(1), torch.ones(3), atol=0.02)
    assert torch.allclose((target * x_t).mean(1) / x_t.std(1), torch.zeros(3), atol=0.01)


def test_an_optimal_linear_network_gives_the_posterior_mean() -> None:
    denoiser, x = linear_flow(1.3), torch.randn(4, 2, 4, 4, 4, generator=generator(0))
    sigma = torch.tensor([0.05, 0.5, 5.0, 100.0])
    prepared = denoiser.network.prepare(nothing(4), (4, 4, 4), torch.float32)
    s = sigma.view(-1, 1, 1, 1, 1)
    assert torch.allclose(denoiser(x, sigma, prepared), x * 1.69 / (1.69 + s**2), atol=1e-6)
    keep, t = path(s)
    expected = (t - keep * 1.69) / (t**2 + keep**2 * 1.69)  # E[ε - x_0 | x_t] of x_0 ~ N(0, 1.3²)
    assert torch.allclose(denoiser.velocity(x, sigma, prepared), expected * x, atol=1e-5)


def test_the_true_velocity_has_the_least_loss() -> None:
    true, count = 1.3, 512
    clean = true * torch.randn(count, 2, 8, 8, 8, generator=generator(3))
    noise = torch.randn(clean.shape, generator=generator(4))
    sigma = NoiseConfig().draw(count, generator(5))
    losses = {}
    for factor in (0.8, 1.0, 1.2):
        loss, _ = linear_flow(true, factor).loss(clean, sigma, noise, nothing(count), torch.float32)
        losses[factor] = float(loss.detach())
    # what no network can know: the variance of ε - x_0 when x_t is known
    _, out = preconditioning(sigma, torch.tensor(true))
    assert losses[1.0] == pytest.approx(float(out.square().mean()), rel=0.01)
    assert losses[1.0] < 0.99 * losses[0.8] and losses[1.0] < 0.99 * losses[1.2]


@pytest.mark.parametrize("objective", ["flow", "diffusion"])
@pytest.mark.parametrize("bands", [(), BANDS])
def test_the_error_begins_at_one_for_both_objectives(objective: str, bands: tuple[float, ...]) -> None:
    network = NETWORK.model_copy(update={"patch": 2})
    denoiser = Denoiser(flow_stage(network=network, objective=objective, band_sd=bands))
    clean = denoiser.config.channel_sd(torch.zeros(())) * torch.randn(300, 16, 2, 2, 2, generator=generator(0))
    noise, sigma = torch.randn(clean.shape, generator=generator(1)), NoiseConfig().draw(300, generator(2))
    _, error = denoiser.loss(clean, sigma, noise, nothing(300), torch.float32)
    assert error.shape == (300,) and float(error.mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [1e-7, 1e-3, 1e4, 1e8])
def test_gradients_are_finite_at_both_ends(sigma: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(flow_stage())
    shape = (2, 2, 8, 8, 8)
    loss, error = denoiser.loss(torch.randn(shape), torch.full((2,), sigma), torch.randn(shape), nothing(2), dtype)
    loss.backward()
    assert bool(torch.isfinite(error).all()) and float(loss.detach()) < 10.0
    found = [p.grad for p in denoiser.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in found), "and no parameter is idle"


def test_times_are_logit_normal() -> None:
    _, t = path(torch.cat([NoiseConfig(p_mean=-0.4, p_std=1.0).draw(8, generator(i)) for i in range(2000)]))
    logit = (t / (1.0 - t)).log()
    assert float(logit.mean()) == pytest.approx(-0.4, abs=0.02) and float(logit.std()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", FLOWS)
def test_samples_of_normal_data_keep_mean_and_sd(name: str) -> None:
    config = SamplerConfig(name=name, steps=64, s_churn=40.0, s_noise=1.0, s_min=0.0, s_max=1e9)
    noise = torch.randn(200_000, generator=generator(1), dtype=torch.float64)
    for sd in (0.1, SD, 3.0):
        x = last(sample(normal(sd, MEAN), noise, config, generator(2)))
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.01 + 0.01 * sd)
        assert float(x.std()) == pytest.approx(sd, rel=0.03)


def test_the_ode_converges_at_order_two() -> None:
    high, low = 5.0, 0.05
    x = torch.tensor([3.0, -4.0, 8.0], dtype=torch.float64)
    exact = MEAN + (x - MEAN) * math.sqrt((SD**2 + low**2) / (SD**2 + high**2))
    errors = []
    for n in (40, 80, 160, 320):
        times = np.linspace(path(high)[1], path(low)[1], n + 1)
        sigmas = [float(t / (1.0 - t)) for t in times]
        errors.append(float((last(flow_heun(normal(SD, MEAN), x, sigmas)) - exact).abs().max()))
    slopes = [math.log(a / b, 2) for a, b in pairwise(errors)]
    assert all(1.8 < s < 2.2 for s in slopes), slopes


def test_it_keeps_more_of_the_sd_than_steps_in_sigma() -> None:
    def lost(solver: Callable[..., Iterator[Tensor]]) -> float:
        sigmas = SamplerConfig(steps=25, sigma_min=0.01, sigma_max=2000.0).sigmas()
        start = torch.tensor([1.0], dtype=torch.float64)
        kept = [last(solver(normal(sd), start * math.hypot(sd, 2000.0), sigmas)) / sd for sd in (0.1, 0.5, 5.0, 75.0)]
        return float(torch.cat(kept).sub(1.0).square().mean().sqrt())

    assert lost(flow_heun) < 0.75 * lost(heun)


def test_the_sde_forgets_as_much_of_its_start_as_it_must() -> None:
    """The ODE of normal data keeps all of the start, and fresh noise up to σ̂ leaves √((s² + σ²)/(s² + σ̂²)) of it."""
    noise = torch.randn(100_000, generator=generator(1), dtype=torch.float64)
    config = SamplerConfig(name="flow-stochastic", steps=48, s_churn=6.0, s_noise=1.0, s_min=0.1, s_max=2.0)
    runs = [last(sample(normal(SD), noise, config, generator(seed))) for seed in (2, 2, 3)]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=0.1)
    gamma = 6.0 / 48
    kept = [
        (SD**2 + s**2) / (SD**2 + (s * (1.0 + gamma)) ** 2) if 0.1 <= s <= 2.0 else 1.0 for s in config.sigmas()[:-1]
    ]
    found = float(torch.corrcoef(torch.stack([noise, runs[0]]))[0, 1])
    assert 0.2 < found < 0.9 and found == pytest.approx(math.sqrt(math.prod(kept)), abs=0.01)


@pytest.mark.parametrize("name", FLOWS)
def test_evaluations_are_as_announced(name: str) -> None:
    calls: list[float] = []

    def counting(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return normal(SD)(x, sigma)

    config = SamplerConfig(name=name, steps=9)
    assert len(list(sample(counting, torch.zeros(3), config, generator(0)))) == 9
    assert len(calls) == config.evaluations and min(calls) > 0.0
    assert config.stochastic == (name == "flow-stochastic")


def test_two_kinds_of_bodies_are_learned() -> None:
    """Toy volumes are +0.5 or -0.5 throughout with a little noise; their first condition tells which."""
    torch.manual_seed(0)
    network = NETWORK.model_copy(update={"channels": (16,), "blocks": (1,), "condition_center": (0.0,) * 4})
    denoiser = Denoiser(flow_stage(network=network.model_copy(update={"condition_scale": (1.0,) * 4})))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.02, betas=(0.9, 0.99))
    shape, errors, random = (32, 2, 4, 4, 4), [], generator(6)
    for _ in range(150):
        kind = torch.randint(2, (32, 1), generator=random) * 2.0 - 1.0
        clean = 0.5 * kind.view(-1, 1, 1, 1, 1) + 0.2 * torch.randn(shape, generator=random)
        sigma = NoiseConfig(p_mean=0.0, p_std=1.5).draw(32, random)
        told = Conditions(torch.cat([kind, torch.zeros(32, 3)], dim=1))
        loss, error = denoiser.loss(clean, sigma, torch.randn(shape, generator=random), told, torch.float32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        denoiser.normalize_()
        errors.append(float(error.mean()))
    assert np.mean(errors[-20:]) < 0.5 * np.mean(errors[:5])

    kinds = torch.tensor([1.0] * 16 + [-1.0] * 16)
    prepared = denoiser.network.prepare(
        Conditions(torch.cat([kinds[:, None], torch.zeros(32, 3)], dim=1)), (4, 4, 4), torch.float32
    )
    for name in FLOWS:
        config = SamplerConfig(name=name, steps=12, sigma_min=0.02, sigma_max=40.0, s_churn=2.0, s_noise=1.0)
        with torch.inference_mode():
            x = last(
                sample(
                    lambda x, sigma: denoiser(x, torch.full((32,), sigma), prepared),
                    torch.randn(shape, generator=random),
                    config,
                    random,
                )
            )
        means = x.flatten(1).mean(1) * kinds
        assert float(means.min()) > 0.3, "each is of its kind"
        assert float(means.mean()) == pytest.approx(0.5, abs=0.05)
        assert 0.15 < float((x - x.flatten(1).mean(1).view(-1, 1, 1, 1, 1)).std()) < 0.3


def test_the_training_loop_learns_a_flow(tmp_path: Path) -> None:
    config = tiny("global", steps=100, objective="flow")
    source = StoredVolumes(write_blobs(tmp_path / "data", 3), phases=2)
    state = new_state(config, measure_scaling(config, source), source.support, source.device)
    reports = list(steps(config, source, state))
    errors = [float(np.mean(r.errors)) for r in reports]
    assert state.stage.objective == "flow" and state.skipped == 0
    assert np.mean(errors[-30:]) < 0.85 * np.mean(errors[:30])
    assert not any("uncertainty" in name for name in state.denoiser.state_dict())


def test_a_flow_model_of_experts_is_written_read_and_sampled(tmp_path: Path) -> None:
    data, runs = write_blobs(tmp_path / "data", 3), {}
    for stage in ("global", "global-detail", "super-resolution"):
        changes: dict[str, object] = {"objective": "flow", "steps": 20}
        if stage != "super-resolution":
            changes["scaling"] = {"center": (0.15, 0.05), "sd": (0.25, 0.1)}
        if stage == "global-detail":
            changes |= {"bands": True, "data": {"phases": 2, "patch_shape": (8, 4, 12)}}
        runs[stage] = tmp_path / stage
        train(tiny(stage, **changes), data, runs[stage])
    plain = SamplerConfig(name="flow-heun", steps=6, sigma_min=0.05, sigma_max=20.0)
    samplers = dict.fromkeys(runs, plain) | {"global-detail": plain.model_copy(update={"sigma_max": 0.5})}
    card = export_model(tmp_path / "model", runs, samplers, name="flow")
    assert read_card(tmp_path / "model") == card
    assert all(stage.config.objective == "flow" for stage in card.stages.values())

    cascade = load_cascade(tmp_path / "model", dtype=torch.float32)
    heard: dict[str, list[float]] = {"low": [], "detail": []}
    for name in heard:
        denoiser: Denoiser = getattr(cascade, name)
        denoiser.register_forward_pre_hook(lambda _, given, name=name: heard[name].append(float(given[1][0])))
    person = Demographics("F", 60.0, 165.0, 70.0)
    low = cascade.sample_low([person], noise=generator(0), sampler=plain.model_copy(update={"name": "flow-stochastic"}))
    assert bool(torch.isfinite(low).all()) and float(low.std()) > 0.01
    twin = cascade.refine(low[0, :, :8, :8, :16], person, noise=generator(1))
    assert twin.shape == (2, 32, 32, 64) and bool(torch.isfinite(twin).all())
    assert min(heard["low"]) >= 0.5 > max(heard["detail"]) and len(heard["detail"]) > 2


def test_cards_without_an_objective_are_of_diffusion() -> None:
    for name, stage in read_card("phantom-v1").stages.items():
        assert stage.config.objective == "diffusion", name
        written = stage.model_dump(mode="json")
        del written["config"]["objective"]
        assert StageCard.model_validate(written) == stage
    with pytest.raises(ValidationError, match="objective"):
        flow_stage(objective="score")


@pytest.mark.parametrize("name", ["paper-global", "paper-super-resolution"])
def test_the_papers_flow_is_the_papers_diffusion_but_for_objective_and_solver(name: str) -> None:
    config, diffusion = read_config(f"configs/{name}-flow.toml"), read_config(f"configs/{name}.toml")
    assert config.objective == "flow" and config.sampler is not None and config.sampler.name == "flow-heun"
    heun = config.sampler.model_copy(update={"name": "heun"})
    assert config.model_copy(update={"objective": "diffusion", "sampler": heun}) == diffusion
    assert (config.batch, config.optimizer.lr, config.optimizer.decay_after) == (2048, 0.017, 35_000)
    assert (config.noise.p_mean, config.noise.p_std) == (-0.4, 1.0)
    with torch.device("meta"):
        network = Network(config.network)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(78.8e6, rel=0.01)


@pytest.mark.parametrize("name", ["bundled-global", "bundled-global-detail", "bundled-super-resolution"])
def test_the_bundled_flow_has_network_data_and_budget_of_the_bundled_diffusion(name: str) -> None:
    flow, diffusion = (read_config(f"configs/{name}{twin}.toml") for twin in ("-flow", ""))
    assert flow.objective == "flow"
    for field in (
        "network",
        "bands",
        "scaling",
        "low_noise",
        "data",
        "batch",
        "steps",
        "stage",
        "phase_condition",
        "uptake_weight",
    ):
        assert getattr(flow, field) == getattr(diffusion, field), field
