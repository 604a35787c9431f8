"""One call from a subject to a phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtrial.geometry import IN_PLANE_MM, SHAPE
from vtrial.memory import keep_freed_memory
from vtrial.phantom.anatomy import paint_body
from vtrial.phantom.anthropometry import BodyPlan, plan_body
from vtrial.phantom.render import render_ct, render_pet
from vtrial.phantom.uptake import UptakePlan, plan_uptake
from vtrial.randomness import Purpose, subject_rng
from vtrial.records import PetCt, Subject


@dataclass(frozen=True)
class PhantomTensors:
    """A phantom on its device: `ct_hu` and `suv` float32, `labels` uint8 TotalSegmentator ids, each 224×224×384."""

    ct_hu: Tensor
    suv: Tensor
    labels: Tensor
    plan: BodyPlan
    uptake: UptakePlan


@dataclass(frozen=True)
class Phantom:
    """A PET/CT with exact masks. `truth` holds the drawn volumes (ml) and uptake (SUV)."""

    pet_ct: PetCt
    labels: NDArray[np.uint8]
    truth: dict[str, float]


def render_phantom(subject: Subject, device: str | torch.device = "cpu") -> PhantomTensors:
    """Plan, paint and render a subject on a device; the result depends on (seed, index, demographics, device kind)."""
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    rng = subject_rng(subject.seed, subject.index, Purpose.PHANTOM)
    generator = torch.Generator(device=device).manual_seed(int(rng.integers(0, 2**62)))
    with torch.no_grad():
        plan, uptake = plan_body(subject, rng), plan_uptake(subject, rng)
        anatomy = paint_body(plan, rng, generator)
        ct = render_ct(anatomy, plan, rng, generator)
        suv = render_pet(anatomy, plan, uptake, generator)
        return PhantomTensors(
            ct_hu=anatomy.full(ct, -1000.0),
            suv=anatomy.full(suv, 0.0),
            labels=anatomy.full(anatomy.labels, 0),
            plan=plan,
            uptake=uptake,
        )


def make_phantom(subject: Subject, device: str | torch.device = "cpu") -> Phantom:
    """Phantom of a subject as arrays: CT int16 HU, SUV float32, labels uint8, all (224, 224, 384) RAS+."""
    tensors = render_phantom(subject, device)
    spacing = (IN_PLANE_MM, IN_PLANE_MM, tensors.plan.extent_mm / SHAPE[2])
    ct = tensors.ct_hu.round().clamp(-1024, 3071).to(torch.int16)
    truth = {f"{organ}_volume_ml": v for organ, v in tensors.plan.volumes.items()}
    truth |= {f"{organ}_suv": v for organ, v in tensors.uptake.drawn.items()}
    truth["body_volume_ml"] = tensors.plan.body_ml
    return Phantom(PetCt(ct.cpu().numpy(), tensors.suv.cpu().numpy(), spacing), tensors.labels.cpu().numpy(), truth)
