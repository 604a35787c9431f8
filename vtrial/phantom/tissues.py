"""Materials: what a voxel of the phantom is made of, its HU, and how much its texture varies.

HU are for a portal-venous contrast-enhanced CT at 120 kVp; `enhancement` is the rise at full contrast (typical values
of the radiology literature). PET uptake is drawn for each subject in `uptake`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto

import torch
from torch import Tensor


class Material(IntEnum):
    """One physical tissue; 0 means nothing painted yet."""

    NONE = 0
    AIR = auto()
    SKIN = auto()
    FAT = auto()
    VISCERAL_FAT = auto()
    MUSCLE = auto()
    BREAST = auto()
    BONE = auto()
    CORTICAL = auto()
    MARROW = auto()
    DISC = auto()
    CARTILAGE = auto()
    CORD = auto()
    LUNG = auto()
    LUNG_VESSEL = auto()
    AIRWAY = auto()
    BLOOD = auto()
    VEIN = auto()
    LV_WALL = auto()
    HEART_WALL = auto()
    LIVER = auto()
    LIVER_VESSEL = auto()
    GALLBLADDER = auto()
    SPLEEN = auto()
    PANCREAS = auto()
    ADRENAL = auto()
    RENAL_CORTEX = auto()
    RENAL_MEDULLA = auto()
    RENAL_PELVIS = auto()
    STOMACH_WALL = auto()
    STOMACH_CONTENT = auto()
    BOWEL = auto()
    COLON_WALL = auto()
    COLON_CONTENT = auto()
    GAS = auto()
    OESOPHAGUS = auto()
    BLADDER_WALL = auto()
    URINE = auto()
    PELVIC_ORGAN = auto()
    THYROID = auto()


@dataclass(frozen=True)
class Look:
    """CT appearance: unenhanced HU, rise at full portal-venous contrast, SD of tissue texture (HU)."""

    hu: float
    enhancement: float = 0.0
    texture_hu: float = 4.0


M = Material
LOOKS: dict[Material, Look] = {
    M.NONE: Look(-1000, 0, 0),
    M.AIR: Look(-1000, 0, 0),
    M.SKIN: Look(10, 15),
    M.FAT: Look(-105, 0, 9),
    M.VISCERAL_FAT: Look(-98, 0, 12),
    M.MUSCLE: Look(52, 10, 12),
    M.BREAST: Look(-20, 15, 45),
    M.BONE: Look(230, 0, 60),
    M.CORTICAL: Look(620, 0, 60),
    M.MARROW: Look(165, 15, 35),
    M.DISC: Look(85, 0, 8),
    M.CARTILAGE: Look(110, 0, 30),
    M.CORD: Look(32, 5),
    M.LUNG: Look(-850, 8, 25),
    M.LUNG_VESSEL: Look(-40, 110, 120),
    M.AIRWAY: Look(-990, 0, 0),
    M.BLOOD: Look(42, 105, 3),
    M.VEIN: Look(42, 95, 3),
    M.LV_WALL: Look(45, 62, 5),
    M.HEART_WALL: Look(42, 60, 5),
    M.LIVER: Look(56, 52, 5),
    M.LIVER_VESSEL: Look(44, 100, 5),
    M.GALLBLADDER: Look(8, 0, 2),
    M.SPLEEN: Look(48, 70, 4),
    M.PANCREAS: Look(38, 50, 14),
    M.ADRENAL: Look(28, 40, 6),
    M.RENAL_CORTEX: Look(34, 145, 6),
    M.RENAL_MEDULLA: Look(32, 120, 6),
    M.RENAL_PELVIS: Look(6, 30, 3),
    M.STOMACH_WALL: Look(38, 45, 6),
    M.STOMACH_CONTENT: Look(22, 0, 14),
    M.BOWEL: Look(30, 38, 16),
    M.COLON_WALL: Look(36, 38, 6),
    M.COLON_CONTENT: Look(15, 0, 55),
    M.GAS: Look(-930, 0, 5),
    M.OESOPHAGUS: Look(35, 30, 6),
    M.BLADDER_WALL: Look(36, 20, 3),
    M.URINE: Look(6, 0, 1),
    M.PELVIC_ORGAN: Look(42, 45, 8),
    M.THYROID: Look(95, 60, 8),
}


def lookup(values: dict[Material, float], device: torch.device) -> Tensor:
    """Table (len(Material),) float32 of one value a material; materials left out get 0."""
    table = torch.zeros(len(Material), dtype=torch.float32)
    for material, value in values.items():
        table[int(material)] = value
    return table.to(device)
