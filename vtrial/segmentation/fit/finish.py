"""The last steps of a segmenter: volumes without bias, its score on unseen phantoms, and its folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vtrial.execution import Resources
from vtrial.phantom.population import Phantom
from vtrial.segmentation.card import SegmenterCard
from vtrial.segmentation.choice import segmenter_plan
from vtrial.segmentation.fit.export import export_segmenter
from vtrial.segmentation.fit.judge import Judgement, held_out, judge

FIRST_STEP = 4.0  # how far a logit is moved for a bias of 1, before it is known what that does
LARGEST = 1.5  # that a logit is moved in all
_LEAST_STEP, _LEAST_SLOPE = 0.02, 0.02


def finish_segmenter(
    run: str | Path,
    out: str | Path,
    spec: str | Path,
    *,
    seed: int,
    calibrate_on: int = 20,
    judge_on: int = 20,
    rounds: int = 2,
    threads: int = 1,
    description: str = "",
    hardware: str = "",
    progress: Callable[[str, int], None] | None = None,
) -> tuple[SegmenterCard, Judgement]:
    """Calibrate a training `run` on phantoms of `spec`, judge it on others, and write the segmenter to `out`.

    Everything goes through TotalSegmentator at full size. Calibration uses phantoms of `seed`, judgement those of
    `seed` + 1; neither may be the training set's. `progress` gets what is being done and the number of phantoms done.
    """

    def told(what: str) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(what, done)

    with tempfile.TemporaryDirectory(prefix="vtrial-fit-") as temporary:
        place = Path(temporary)

        def judged(offsets: Mapping[str, float], phantoms: Sequence[Phantom], what: str) -> Judgement:
            folder = place / "segmenter"
            card = export_segmenter(run, folder, offsets=offsets)
            segment = segmenter_plan(str(folder), cache=place / "cache").load(Resources(threads=threads))
            return judge(segment, phantoms, card.heads, told(what))

        offsets: dict[str, float] = {}
        if calibrate_on:
            known = list(held_out(spec, calibrate_on, seed))
            offsets = calibrated(lambda tried: judged(tried, known, "calibrating").volume_bias, rounds)
            del known
        folder = place / "judged"
        card = export_segmenter(run, folder, offsets=offsets)
        segment = segmenter_plan(str(folder), cache=place / "cache").load(Resources(threads=threads))
        found = judge(segment, held_out(spec, judge_on, seed + 1), card.heads, told("judging"))
    card = export_segmenter(
        run,
        out,
        offsets=offsets,
        dice={name: round(value, 4) for name, value in found.mean_dice.items() if not np.isnan(value)},
        volume_bias={name: round(100.0 * v, 2) for name, v in found.volume_bias.items() if not np.isnan(v)},
        description=description,
        hardware=hardware,
    )
    return card, found


def calibrated(bias_of: Callable[[Mapping[str, float]], Mapping[str, float]], rounds: int) -> dict[str, float]:
    """Offsets of logits, by head, at which volumes have no bias: the secant method, a step for every round.

    `bias_of` gives the volume bias of each head (and of sums, which are left alone) for the offsets tried. A head whose
    volume does not follow its offset keeps the offset at which its bias was least.
    """
    before: dict[str, float] = {}
    bias = dict(bias_of(before))
    names = [name for name, value in bias.items() if not np.isnan(value)]
    best = {name: (abs(bias[name]), 0.0) for name in names}
    now = {name: _within(-FIRST_STEP * bias[name]) for name in names}
    slope: dict[str, float] = {}
    for _ in range(rounds):
        found = bias_of(now)
        following = dict(now)
        for name in names:
            moved, change = now[name] - before.get(name, 0.0), found[name] - bias[name]
            best[name] = min(best[name], (abs(found[name]), now[name]))
            if abs(moved) > _LEAST_STEP:
                slope[name] = change / moved
            if slope.get(name, 0.0) > _LEAST_SLOPE:
                following[name] = _within(now[name] - found[name] / slope[name])
            else:
                following[name] = best[name][1]
        before, bias, now = now, {**bias, **found}, following
    return now


def _within(offset: float) -> float:
    return float(np.clip(offset, -LARGEST, LARGEST))
