"""Endless phantoms as a training set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vtrial.cohort.registry import find_spec
from vtrial.records import InputError
from vtrial.training import PhantomStream


def test_draws_depend_on_seed_and_epoch_alone_and_the_pool_moves_on() -> None:
    stream = PhantomStream(find_spec("phantom-training"), seed=3, pool=1)
    first = stream.draw(np.random.default_rng(0), epoch=0)
    low, phase, who = stream.draw_low(np.random.default_rng(1), epoch=0)
    assert low.shape == (2, 56, 56, 96) and who == first.demographics
    x, y, z = (slice(p, None, 4) for p in phase)
    assert torch.equal(low, first.pair[:, x, y, z].float())
    assert float(first.pair.min()) >= 0.0 and float(first.pair.max()) <= 1.0
    later = stream.draw(np.random.default_rng(0), epoch=1)
    assert later.demographics != first.demographics
    again = PhantomStream(find_spec("phantom-training"), seed=3, pool=1).draw(np.random.default_rng(5), epoch=0)
    assert torch.equal(again.pair, first.pair)


def test_support_covers_the_spec() -> None:
    support = PhantomStream(find_spec("phantom-training"), seed=0).support
    assert support.age_years[0] < 19 and support.age_years[1] > 90 and support.sex == ("F", "M")


def test_a_bad_spec_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("stratum,share,sex\nall,1,X\n")
    with pytest.raises(InputError):
        PhantomStream(bad)
