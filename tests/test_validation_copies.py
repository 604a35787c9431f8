"""Copies of training subjects: found where they are, not where they are not, by a test that holds its level."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from vtrial.records import InputError
from vtrial.validation.nearest import NEARER, NO_SIGN, copies, nearest_distances


def people(rng: np.random.Generator, n: int, size: int = 150) -> np.ndarray:
    """Bodies that share a shape and differ in a few dozen ways, as volumes do."""
    shape, ways = np.sin(np.arange(size) / 9.0), np.random.default_rng(0).normal(0, 1, (30, size)) / np.sqrt(30)
    return (shape + rng.normal(0, 1, (n, 30)) @ ways + 0.05 * rng.normal(0, 1, (n, size))).astype(np.float32)


def test_a_planted_copy_is_found_and_fresh_twins_are_not_suspected() -> None:
    rng = np.random.default_rng(5)
    training, held_out, twins = (rng.normal(0, 1, (n, 5, 5, 6)) for n in (80, 40, 200))
    table = copies(twins, training, held_out)
    assert not table["suspected_copy"].any() and table.attrs["p_nearer"] > 1e-3
    assert table.attrs["verdict"] == NO_SIGN
    twins[7] = training[33] + 0.2 * rng.normal(0, 1, twins[7].shape)
    table = copies(twins, training, held_out)
    assert list(np.flatnonzero(table["suspected_copy"])) == [7] and table["nearest_training"][7] == 33
    assert table["distance"][7] == pytest.approx(0.2, abs=0.03) and table["held_out_nearer"][7] == 0
    assert table.attrs["verdict"] == f"{NEARER}: look at 7 (training subject 33)"


def test_distances_equal_those_by_hand_and_grids_must_agree() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(0, 1, (5, 3, 4)), rng.normal(0, 1, (9, 3, 4))
    by_hand = np.sqrt(((a[:, None] - b[None]) ** 2).mean(axis=(2, 3)))
    distance, which = nearest_distances(a, b)
    assert distance == pytest.approx(by_hand.min(axis=1)) and list(which) == list(by_hand.argmin(axis=1))
    with pytest.raises(InputError, match="differ in shape"):
        nearest_distances(a, b[:, :, :3])
    a[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        nearest_distances(a, b)


def test_leaving_out_never_finds_itself() -> None:
    rng = np.random.default_rng(7)
    volumes = rng.normal(0, 1, (300, 12)).astype(np.float32)  # more than one chunk
    distance, which = nearest_distances(volumes, volumes, itself=True)
    by_hand = np.sqrt(((volumes[:, None] - volumes[None]) ** 2).mean(axis=2)) + np.diag(np.full(300, np.inf))
    assert distance == pytest.approx(by_hand.min(axis=1), rel=1e-5) and list(which) == list(by_hand.argmin(axis=1))
    with pytest.raises(InputError, match="no others"):
        nearest_distances(volumes[:1], volumes[:1], itself=True)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_cohort_of_copies_is_caught_and_a_fresh_one_is_not(held_out: bool) -> None:
    rng = np.random.default_rng(8)
    training, others, fresh = people(rng, 150), people(rng, 60), people(rng, 80)
    names = [f"T{i}" for i in range(150)]
    control = others if held_out else None
    clean = copies(fresh, training, control, training_ids=names)
    assert clean.attrs["verdict"] == NO_SIGN and clean.attrs["p_share"] > 0.05
    assert clean.attrs["n_held_out"] == (60 if held_out else 150) and clean.attrs["ratio"] == pytest.approx(1, abs=0.1)
    rows = rng.permutation(150)[:80]
    noisy = training[rows] + 0.02 * rng.normal(0, 1, fresh.shape).astype(np.float32)
    found = copies(noisy, training, control, training_ids=names)
    assert found["suspected_copy"].all() and list(found["nearest_training"]) == [names[i] for i in rows]
    assert found.attrs["verdict"].startswith(NEARER) and found.attrs["verdict"].endswith("and 75 more")
    assert found.attrs["ratio"] < 0.2 and found.attrs["p_share"] < 1e-6 and found.attrs["share_nearer"] == 1.0
    # Half of a cohort half way to training subjects: nobody lies on one, but too many lie too near.
    drawn = np.where(np.arange(80)[:, None] % 2, fresh, 0.5 * (fresh + training[rows]))
    near = copies(drawn, training, control, copy_ratio=0.01)
    assert not near["suspected_copy"].any() and near.attrs["p_share"] < 0.05 and near.attrs["verdict"] != NO_SIGN


def test_the_share_test_holds_its_level_where_the_plain_binomial_does_not() -> None:
    rng = np.random.default_rng(9)
    exact, plain = [], []
    for _ in range(250):
        attrs = copies(rng.normal(0, 1, (1000, 1)), np.zeros((1, 1)), rng.normal(0, 1, (100, 1))).attrs
        exact.append(attrs["p_share"] < 0.05)
        plain.append(attrs["p_binomial"] < 0.05)
    assert 0.01 < np.mean(exact) < 0.09 and np.mean(plain) > 0.15  # of 5 % each


def test_without_held_out_people_it_holds_its_level_too() -> None:
    """Distances within a training set depend on each other; in few dimensions that would show."""
    rng = np.random.default_rng(11)
    false = [copies(rng.normal(0, 1, (100, 5)), rng.normal(0, 1, (60, 5)), seed=i).attrs for i in range(150)]
    assert np.mean([attrs["p_share"] < 0.05 for attrs in false]) < 0.08
    assert np.mean([attrs["p_nearer"] < 0.05 for attrs in false]) < 0.08


def test_p_share_is_beta_binomial_by_counting() -> None:
    """Of 3 twins and 4 held-out people in any order: how often are c or more twins before the first held-out one?"""
    training = np.zeros((1, 1))
    for before, chance in ((0, 1.0), (1, 3 / 7), (2, 3 / 7 * 2 / 6), (3, 3 / 7 * 2 / 6 * 1 / 5)):
        twins = np.where(np.arange(3) < before, 0.5, 2.0)[:, None]
        assert copies(twins, training, np.arange(1.0, 5.0)[:, None]).attrs["p_share"] == pytest.approx(chance)
    many = copies(np.full((50, 1), 0.5), training, np.linspace(1, 2, 399)[:, None]).attrs
    assert many["limit"] == pytest.approx(np.linspace(1, 2, 399)[3])  # the fourth of 399: one in a hundred
    assert many["p_binomial"] == pytest.approx(stats.binomtest(50, 50, 0.01, alternative="greater").pvalue)


def test_four_hundred_training_volumes_and_two_hundred_twins_are_quick() -> None:
    rng = np.random.default_rng(10)
    size = 2 * 28 * 28 * 48
    training = rng.random((400, size), dtype=np.float32)
    twins = training[:200] + np.float32(0.1)
    start = time.process_time()
    table = copies(twins, training)
    assert list(table["nearest_training"]) == list(range(200))
    assert time.process_time() - start < 20  # 2 to 3 s of one core
