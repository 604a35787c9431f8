"""An endless stream of fresh phantoms as a training set: nothing is stored, and no body is met for long.

A pool of neighbours in an endless row of people is in memory; at every refresh, by default after each step, it moves on
by one. Which people are in the pool depends on the refresh alone, so training resumes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vtrial.cohort.recruit import recruit
from vtrial.cohort.spec import read_spec
from vtrial.cohort.support import support_of
from vtrial.diffusion.conditions import Demographics
from vtrial.imaging.codec import encode_ct, encode_suv
from vtrial.phantom.population import render_phantom
from vtrial.records import Subject, Support
from vtrial.training.data import PHASES, TensorVolume, Triple, sample_low

PEOPLE = 50_000  # recruited once; a longer training meets them again, in other bodies


@dataclass
class PhantomStream:
    """Phantoms of a cohort spec, rendered on `device` as they are needed; `pool` of them are kept, in float16.

    Rendering takes 2-4 s on two CPU cores and is meant for a GPU. Threads need streams of their own. InputError for a
    bad spec.
    """

    refresh_steps: ClassVar[int] = 1

    spec: Path
    seed: int = 0
    pool: int = 24
    support: Support = field(init=False)
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __post_init__(self) -> None:
        spec = read_spec(self.spec)
        self.support = support_of(spec)
        self._people = recruit(spec, PEOPLE, self.seed)
        self._kept: dict[int, TensorVolume] = {}

    def draw(self, rng: np.random.Generator, epoch: int) -> TensorVolume:
        """A random phantom of the pool of this epoch."""
        return self._phantom(epoch + int(rng.integers(self.pool)), epoch)

    def draw_low(self, rng: np.random.Generator, epoch: int) -> tuple[Tensor, Triple, Demographics]:
        """A random one of the 64 subvolumes of a random phantom of the pool."""
        volume = self.draw(rng, epoch)
        phase = PHASES[int(rng.integers(len(PHASES)))]
        return sample_low(volume, phase), phase, volume.demographics

    def _phantom(self, number: int, epoch: int) -> TensorVolume:
        for left in [n for n in self._kept if not epoch <= n < epoch + self.pool]:
            del self._kept[left]
        if number not in self._kept:
            s = self._people[number % PEOPLE]
            phantom = render_phantom(
                Subject(s.subject_id, number, self.seed, s.sex, s.age_years, s.height_cm, s.weight_kg), self.device
            )
            pair = torch.stack([encode_ct(phantom.ct_hu.round()), encode_suv(phantom.suv)]).half()
            self._kept[number] = TensorVolume(pair, _demographics(s))
        return self._kept[number]


def _demographics(s: Subject) -> Demographics:
    return Demographics(s.sex, s.age_years, s.height_cm, s.weight_kg)
