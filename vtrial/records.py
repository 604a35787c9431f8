"""The frozen nouns that every part of vtrial speaks of: read this first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # `vtrial --help` should not wait for it
    import numpy as np
    from numpy.typing import NDArray

Sex = Literal["F", "M"]

# What a model's volumes hold (Yoon et al. 2025, section 2.2): `vtrial.imaging.codec` clips CT and PET there.
MODEL_HU = (-500.0, 500.0)
MODEL_SUV = 25.0
# What a PET in SUV may hold, in a voxel as in a measurement (g/ml).
HIGHEST_SUV = 10_000.0  # a tenth of the dose in 1 ml of a man of 100 kg
LOWEST_SUV = -50.0  # reconstructions may dip below zero, but not so far


class InputError(ValueError):
    """Bad input, told so that the reader can mend it: what, where, which value, what to do.

    All problems found are carried at once. The command line prints them and exits with code 2.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class CannotRead(RuntimeError):
    """A file that cannot be read here and now, whatever it holds: another time it may be. Its words name no file."""


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
        return bmi_of(self)

    @property
    def bsa_m2(self) -> float:
        """Body surface area in m² (Du Bois 1916)."""
        return float(0.007184 * self.weight_kg**0.425 * self.height_cm**0.725)


class Body(Protocol):
    """Whoever has a sex, an age, a height and a weight."""

    @property
    def sex(self) -> Sex:
        """F or M."""

    @property
    def age_years(self) -> float:
        """Age in years."""

    @property
    def height_cm(self) -> float:
        """Height in cm."""

    @property
    def weight_kg(self) -> float:
        """Weight in kg."""


def bmi_of(body: Body) -> float:
    """Body mass index in kg/m²."""
    return body.weight_kg / (body.height_cm / 100.0) ** 2


@dataclass(frozen=True)
class Support:
    """The bodies that a model knows: inclusive ranges in years, cm, kg and kg/m²."""

    age_years: tuple[float, float]
    height_cm: tuple[float, float]
    weight_kg: tuple[float, float]
    bmi: tuple[float, float] = (0.0, 1000.0)
    sex: tuple[Sex, ...] = ("F", "M")

    @classmethod
    def of(cls, people: Iterable[Body]) -> Support:
        """The ranges that `people` cover."""
        known = list(people)
        values = zip(*((p.age_years, p.height_cm, p.weight_kg, bmi_of(p)) for p in known), strict=True)
        ages, heights, weights, bmis = ((min(v), max(v)) for v in values)
        return cls(ages, heights, weights, bmis, tuple(sorted({p.sex for p in known})))

    def union(self, other: Support) -> Support:
        """The ranges of both together."""
        return Support(
            _spanning(self.age_years, other.age_years),
            _spanning(self.height_cm, other.height_cm),
            _spanning(self.weight_kg, other.weight_kg),
            _spanning(self.bmi, other.bmi),
            tuple(sorted({*self.sex, *other.sex})),
        )


def _spanning(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(a[0], b[0]), max(a[1], b[1])


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
