"""The frozen nouns that every part of vtrial speaks of: read this first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Sex = Literal["F", "M"]


class InputError(ValueError):
    """Bad input, told so that the reader can mend it: what, where, which value, what to do.

    All problems found are carried at once. The command line prints them and exits with code 2.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Subject:
    """One recruited person.

    `index` is the position in the run and `seed` the run's seed: together they fix every random number drawn for the
    subject (`vtrial.randomness`). Ages in years, heights in cm, weights in kg. `extra` carries further columns of the
    spec through.
    """

    subject_id: str
    index: int
    seed: int
    sex: Sex
    age_years: float
    height_cm: float
    weight_kg: float
    stratum: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bmi(self) -> float:
        """Body mass index in kg/m²."""
        return self.weight_kg / (self.height_cm / 100.0) ** 2

    @property
    def bsa_m2(self) -> float:
        """Body surface area in m² (Du Bois 1916)."""
        return float(0.007184 * self.weight_kg**0.425 * self.height_cm**0.725)


@dataclass(frozen=True)
class PetCt:
    """A registered PET/CT pair on one RAS+ grid.

    `ct_hu` int16 (x, y, z) in Hounsfield units, `suv` float32 (x, y, z) in g/ml (body-weight SUV), `spacing_mm` the
    voxel size along x (towards the patient's right), y (anterior), z (superior).
    """

    ct_hu: NDArray[np.int16]
    suv: NDArray[np.float32]
    spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.ct_hu.shape != self.suv.shape or self.ct_hu.ndim != 3:
            raise ValueError(f"CT {self.ct_hu.shape} and PET {self.suv.shape} must be one 3D grid")
