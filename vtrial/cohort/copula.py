"""Truncated normals joined by a Gaussian copula, with the stated moments met after truncation.

A normal cut to [min, max] has another mean and SD than the uncut one, and the correlation of transformed normal
scores is not the scores' own. Both are inverted here, so that the people drawn have what the spec states:

- marginal: among the densities p(t) ∝ exp(θ₁ t − θ₂ t²/2) on [min, max], θ₂ ≥ 0 (the truncated normals and their limit,
  the truncated exponential), the one with the stated mean and SD. Where even θ₂ = 0 is too narrow, that limit is taken:
  the mean stays, the SD is the largest that truncation allows.
- dependence (Nataf 1962; Liu and Der Kiureghian 1986, doi 10.1016/0266-8920(86)90033-0): the score correlation ρ for
  which ∫∫ x(z₁) y(z₂) φ₂(z₁, z₂; ρ) is the stated Pearson correlation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, roots_hermitenorm, roots_legendre

from vtrial.cohort.spec import Marginal

Array = NDArray[np.float64]

_WINDOW = 40.0  # in SDs around the mean: the densities have decayed to nothing there
_NODES, _WEIGHTS = roots_legendre(1000)
_SCORES, _SCORE_WEIGHTS = roots_hermitenorm(64)
_MAX_SCORE = 0.9999  # of a score correlation


@dataclass(frozen=True)
class FittedMarginal:
    """A marginal that can be drawn from. `mean` and `sd` are what truncation allows of the stated ones.

    `quantiles` at the probabilities `levels` tabulate the inverse distribution.
    """

    stated: Marginal
    mean: float
    sd: float
    levels: Array
    quantiles: Array

    def from_scores(self, scores: Array) -> Array:
        """Values whose normal scores are `scores`, of any shape."""
        values: Array = np.interp(ndtr(scores), self.levels, self.quantiles)
        return values


def outside(stated: Marginal) -> float:
    """The part of the uncut normal with the stated mean and SD that lies beyond the limits."""
    if stated.sd == 0.0:
        return 0.0
    return float(ndtr((stated.min - stated.mean) / stated.sd) + ndtr((stated.mean - stated.max) / stated.sd))


def fit_marginal(stated: Marginal) -> FittedMarginal:
    """The truncated normal with the stated mean and SD after truncation, or the nearest there is."""
    mean, sd = stated.mean, stated.sd
    if sd == 0.0:
        return FittedMarginal(stated, mean, 0.0, np.array([0.0, 1.0]), np.array([mean, mean]))
    low, high = (stated.min - mean) / sd, (stated.max - mean) / sd
    low, high = max(low, -_WINDOW), min(high, _WINDOW)
    half = (high - low) / 2.0
    nodes, weights = low + half * (_NODES + 1.0), half * _WEIGHTS
    theta1, theta2, variance = _solve(nodes, weights)
    grid = np.linspace(low, high, 20_001)
    exponent = theta1 * grid - theta2 * grid**2 / 2.0
    density = np.exp(exponent - exponent.max())
    levels = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return FittedMarginal(stated, mean, sd * float(np.sqrt(variance)), levels / levels[-1], mean + sd * grid)


def _solve(nodes: Array, weights: Array) -> tuple[float, float, float]:
    """θ₁, θ₂ ≥ 0 and the variance, for mean 0 and variance 1 or the largest below it, on quadrature nodes."""

    def moments(theta1: float, theta2: float) -> tuple[float, float]:
        exponent = theta1 * nodes - theta2 * nodes**2 / 2.0
        mass = weights * np.exp(exponent - exponent.max())
        mass /= mass.sum()
        centre = float(mass @ nodes)
        return centre, float(mass @ (nodes - centre) ** 2)

    def slope(theta2: float) -> float:
        reach = 1.0
        while moments(-reach, theta2)[0] > 0.0 or moments(reach, theta2)[0] < 0.0:
            reach *= 2.0
        return float(brentq(lambda theta1: moments(theta1, theta2)[0], -reach, reach, xtol=1e-12))

    def variance(theta2: float) -> float:
        return moments(slope(theta2), theta2)[1]

    widest = variance(0.0)
    if widest <= 1.0:
        return slope(0.0), 0.0, widest
    top = 2.0
    while variance(top) > 1.0:
        top *= 2.0
    theta2 = float(brentq(lambda value: variance(value) - 1.0, 0.0, top, xtol=1e-10))
    return slope(theta2), theta2, variance(theta2)


def pearson(first: FittedMarginal, second: FittedMarginal, score_correlation: float) -> float:
    """Pearson correlation of two marginals whose normal scores correlate by ρ; 0 where one is constant."""
    if first.sd == 0.0 or second.sd == 0.0:
        return 0.0
    weights = _SCORE_WEIGHTS / _SCORE_WEIGHTS.sum()
    one, other = np.meshgrid(_SCORES, _SCORES, indexing="ij")
    x = first.from_scores(_SCORES)
    y = second.from_scores(score_correlation * one + np.sqrt(1.0 - score_correlation**2) * other) @ weights
    plain = second.from_scores(_SCORES)
    deviation = [float(np.sqrt(weights @ (v - weights @ v) ** 2)) for v in (x, plain)]
    return float(weights @ ((x - weights @ x) * (y - weights @ y)) / (deviation[0] * deviation[1]))


def score_correlation(first: FittedMarginal, second: FittedMarginal, stated: float) -> float:
    """The correlation of the normal scores that gives the stated Pearson correlation, or the nearest there is."""
    if first.sd == 0.0 or second.sd == 0.0 or stated == 0.0:
        return 0.0
    low, high = (pearson(first, second, rho) for rho in (-_MAX_SCORE, _MAX_SCORE))
    if not low < stated < high:
        return -_MAX_SCORE if stated <= low else _MAX_SCORE
    return float(brentq(lambda rho: pearson(first, second, rho) - stated, -_MAX_SCORE, _MAX_SCORE, xtol=1e-8))


@dataclass(frozen=True)
class Copula:
    """Three marginals and the Cholesky factor that gives independent scores their dependence.

    `correlations` are the Pearson ones that are met: of the first and second, first and third, second and third.
    """

    marginals: tuple[FittedMarginal, FittedMarginal, FittedMarginal]
    factor: Array
    correlations: tuple[float, float, float]

    def from_scores(self, independent: Array) -> Array:
        """Values (n, 3) from independent normal scores (n, 3)."""
        scores = independent @ self.factor.T
        return np.stack([m.from_scores(scores[:, k]) for k, m in enumerate(self.marginals)], axis=1)


def fit_copula(stated: tuple[Marginal, Marginal, Marginal], correlations: tuple[float, float, float]) -> Copula:
    """Fit marginals and score correlations; a score matrix that is not positive definite is moved to the nearest."""
    first, second, third = (fit_marginal(m) for m in stated)
    pairs = ((first, second), (first, third), (second, third))
    rho = [score_correlation(*pair, r) for pair, r in zip(pairs, correlations)]
    matrix = np.array([[1.0, rho[0], rho[1]], [rho[0], 1.0, rho[2]], [rho[1], rho[2], 1.0]])
    values, vectors = np.linalg.eigh(matrix)
    if values[0] < 1e-6:
        matrix = (vectors * np.maximum(values, 1e-6)) @ vectors.T
        matrix /= np.sqrt(np.outer(np.diag(matrix), np.diag(matrix)))
    met = [pearson(*pair, float(matrix[i, j])) for pair, (i, j) in zip(pairs, ((0, 1), (0, 2), (1, 2)))]
    return Copula((first, second, third), np.linalg.cholesky(matrix), (met[0], met[1], met[2]))
