"""What the painters share: the plan, the canvas, the outlines, noise fields, and the male template fitted to women."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vtrial.phantom.anthropometry import BodyPlan
from vtrial.phantom.body import Frame, Outlines, spine_y
from vtrial.phantom.canvas import Box, Canvas

# z fraction: shift of the female template's y (mm) and z (fraction) against the male's (ICRP 110 organ centroids).
_FEMALE_Y = np.array([[0.0, 0.0], [0.35, 0.0], [0.5, -16.0], [0.6, -24.0], [1.2, -24.0]])
_FEMALE_Z = np.array([[0.0, 0.0], [0.2, -0.012], [0.4, -0.03], [1.2, -0.03]])


@dataclass(frozen=True)
class Workbench:
    """One body being painted."""

    plan: BodyPlan
    frame: Frame
    canvas: Canvas
    outlines: Outlines
    rng: np.random.Generator
    coarse: tuple[Tensor, Tensor]  # smooth unit-variance fields, about 30 mm
    fine: tuple[Tensor, Tensor]  # the same, about 11 mm
    lift_mm: float  # how far the diaphragm stands above its reference height

    @property
    def length(self) -> float:
        """Reference mm of one z fraction."""
        return self.plan.reference_length_mm

    @property
    def female(self) -> bool:
        """Whether the body is a woman's."""
        return self.plan.sex == "F"

    def at(self, x: float, y: float, z_fraction: float, lift: float = 0.0) -> tuple[float, float, float]:
        """Point of the male template in this body, in mm; `lift` is the share of the diaphragm's height it follows."""
        if self.female:
            x, y = 0.9 * x, y + float(np.interp(z_fraction, _FEMALE_Y[:, 0], _FEMALE_Y[:, 1]))
            z_fraction += float(np.interp(z_fraction, _FEMALE_Z[:, 0], _FEMALE_Z[:, 1]))
        return x, y, z_fraction * self.length + lift * self.lift_mm

    def spine(self, z_fraction: float) -> float:
        """Reference y of the vertebral bodies' centre, bent by kyphosis."""
        bend = self.plan.kyphosis_mm * float(np.exp(-(((z_fraction - 0.78) / 0.14) ** 2)))
        return spine_y(self.plan.sex, z_fraction) - bend

    def jitter(self, sd_mm: float) -> np.ndarray:
        """A random displacement in mm, clipped at two SDs."""
        return np.clip(self.rng.normal(0, 1, 3), -2, 2) * sd_mm

    def bumps(self, box: Box, millimetres: float) -> Tensor:
        """A random smooth unevenness of a surface in a box."""
        a, b = self.rng.normal(0, 0.7, 2)
        return (self.coarse[0][box.index] * float(a) + self.coarse[1][box.index] * float(b)).mul_(millimetres)

    def inside(self, box: Box, depth_mm: float = 1.0) -> Tensor:
        """Mask of the box inside the cavity by at least `depth_mm`."""
        return self.outlines.cavity[box.index] < -depth_mm
