"""Samplers in closed form: for normal data the denoiser, the path of the ODE and the samples' law are known."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vtrial.diffusion.sampler import SamplerConfig, dpmpp_2m, heun, sample
from vtrial.training import read_config

MEAN, SD = 0.7, 0.4


def normal_denoise(x: Tensor, sigma: float) -> Tensor:
    """Posterior mean for data ~ N(MEAN, SD²)."""
    return MEAN + (x - MEAN) * SD**2 / (SD**2 + sigma**2)


def last(steps: Iterator[Tensor]) -> Tensor:
    *_, x = steps
    return x


@pytest.mark.parametrize("name", ["heun", "heun-churn", "dpmpp-2m", "dpmpp-2m-churn"])
def test_samples_of_normal_data_have_its_mean_and_variance(name: str) -> None:
    config = SamplerConfig(name=name, steps=128, s_churn=20.0, s_noise=1.0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    x = last(sample(normal_denoise, noise, config, generator))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.std()) == pytest.approx(SD, rel=0.02)


@pytest.mark.parametrize("name", ["heun", "dpmpp-2m"])
def test_churn_adds_randomness_and_needs_it_to_be_named(name: str) -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    quiet = SamplerConfig(name=name, steps=12)
    churned = SamplerConfig(name=f"{name}-churn", steps=12)

    def run(config: SamplerConfig, seed: int) -> Tensor:
        return last(sample(normal_denoise, noise, config, torch.Generator().manual_seed(seed)))

    assert torch.equal(run(quiet, 1), run(quiet, 2))
    assert torch.equal(run(churned, 1), run(churned, 1))
    assert not torch.allclose(run(churned, 1), run(churned, 2), atol=0.05)


def test_churn_keeps_to_its_noise_levels() -> None:
    seen: list[float] = []

    def watching(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return normal_denoise(x, sigma)

    config = SamplerConfig(name="dpmpp-2m-churn", steps=30, s_min=0.5, s_max=5.0)
    list(sample(watching, torch.zeros(3), config, torch.Generator().manual_seed(0)))
    for hat, sigma in zip(seen, config.sigmas(), strict=False):
        assert hat == (pytest.approx(math.sqrt(2.0) * sigma) if 0.5 <= sigma <= 5.0 else sigma)


@pytest.mark.parametrize("solver", [heun, dpmpp_2m])
def test_order_of_convergence_is_two(solver) -> None:
    # Away from 0 the exact path is x(σ) = MEAN + (x₀ - MEAN) √((SD² + σ²)/(SD² + σ₀²)).
    high, low = 5.0, 0.05
    x = torch.tensor([3.0, -4.0, 8.0], dtype=torch.float64)
    exact = MEAN + (x - MEAN) * math.sqrt((SD**2 + low**2) / (SD**2 + high**2))
    counts = [40, 80, 160, 320]
    errors = []
    for n in counts:
        sigmas = [(high ** (1 / 7) + i / n * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n + 1)]
        errors.append(float((last(solver(normal_denoise, x, sigmas)) - exact).abs().max()))
    slopes = [math.log(a / b, 2) for a, b in pairwise(errors)]
    assert all(1.8 < s < 2.2 for s in slopes[1:]), slopes


@pytest.mark.parametrize("flow", ["", "-flow"])
@pytest.mark.parametrize(("stage", "steps", "most"), [("global", 35, 0.04), ("super-resolution", 100, 0.004)])
def test_the_papers_models_are_sampled_as_published(stage: str, steps: int, most: float, flow: str) -> None:
    """Yoon et al. 2025: Heun steps, 35 and 100, from 80 to 0.002. Residuals are small: their SD must be kept."""
    config = read_config(f"configs/paper-{stage}{flow}.toml").sampler
    assert config is not None
    assert (config.steps, config.sigma_max, config.sigma_min, config.rho) == (steps, 80.0, 0.002, 7.0)
    for sd in (0.02, 0.05, 0.1, 0.5):
        x = last(sample(lambda x, sigma: x * sd**2 / (sd**2 + sigma**2), torch.ones(1, dtype=torch.float64), config))  # noqa: B023
        assert float(x) / sd == pytest.approx(1.0, abs=most)


def test_noise_levels_follow_the_published_schedule() -> None:
    config = SamplerConfig(steps=35)
    sigmas = config.sigmas()
    assert len(sigmas) == 36 and sigmas[0] == pytest.approx(80.0) and sigmas[-2] == pytest.approx(0.002)
    assert sigmas[-1] == 0.0 and sigmas == sorted(sigmas, reverse=True)
    middle = (80 ** (1 / 7) + 17 / 34 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigmas[17] == pytest.approx(middle)


@pytest.mark.parametrize("name", ["heun", "heun-churn", "dpmpp-2m", "dpmpp-2m-churn"])
def test_evaluations_are_as_announced(name: str) -> None:
    calls = []

    def counting(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return normal_denoise(x, sigma)

    config = SamplerConfig(name=name, steps=9)
    assert len(list(sample(counting, torch.zeros(3), config, torch.Generator()))) == 9
    assert len(calls) == config.evaluations
    assert min(calls) > 0.0


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"name": "euler"}, {"sigma_min": 90.0}, {"stepz": 3}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        SamplerConfig(**wrong)
