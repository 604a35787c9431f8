"""Endless phantoms as a training set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.blobs import SHAPE, tiny
from vtrial.cohort.registry import find_spec
from vtrial.records import InputError, Subject
from vtrial.training import PhantomStream, StoredVolumes, train
from vtrial.training import stream as streams
from vtrial.training.batches import make_batch


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Phantoms that are made at once: noise. Gives the numbers of those made."""
    made: list[int] = []

    def render(subject: Subject, device: torch.device) -> SimpleNamespace:
        made.append(subject.index)
        noise = torch.rand(SHAPE, generator=torch.Generator().manual_seed(subject.index))
        return SimpleNamespace(ct_hu=1000.0 * noise - 500.0, suv=5.0 * noise)

    monkeypatch.setattr(streams, "PEOPLE", 300)
    monkeypatch.setattr(streams, "render_phantom", render)
    return made


def test_a_stream_moves_on_after_each_step_and_holds_its_pool_alone(quick: list[int]) -> None:
    config = tiny("global", data={"refresh_steps": 0})
    stream = PhantomStream(find_spec("phantom-training"), pool=3)
    make_batch(config, stream, 10**9)  # as when scalings are measured
    for step in range(1, 31):
        before = len(quick)
        make_batch(config, stream, step)
        assert set(quick[before:]) <= set(range(step, step + 3))
        assert len(stream._kept) <= 3
    assert len(set(quick)) > 20
    slower = tiny("global", data={"refresh_steps": 10})
    assert [slower.data.epoch(step, stream.refresh_steps) for step in (9, 10, 25)] == [0, 1, 2]
    assert [config.data.epoch(step, StoredVolumes.refresh_steps) for step in (0, 9, 25)] == [0, 0, 0]


def test_pictures_do_not_move_the_stream_that_is_trained_on(
    quick: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: dict[int, list[int]] = {}
    phantom = PhantomStream._phantom

    def noted(stream: PhantomStream, number: int, epoch: int) -> object:
        epochs.setdefault(id(stream), []).append(epoch)
        return phantom(stream, number, epoch)

    monkeypatch.setattr(PhantomStream, "_phantom", noted)
    train(tiny("global", steps=6, watch={"sample_steps": 2}), find_spec("phantom-training"), tmp_path)
    assert len(list((tmp_path / "samples").iterdir())) == 3
    trained, pictured = ([e for e in seen if e < 10**9] for seen in epochs.values())
    assert trained == sorted(trained) and set(trained) == set(range(1, 7)) and set(pictured) == {0}
