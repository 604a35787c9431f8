"""The nnU-Net folder that TotalSegmentator loads, built from a segmenter of our own, in a cache of our own.

nnU-Net wants its checkpoint as a pickle and reads it with code execution allowed, so none is shipped: it is made here
from safetensors, and one found in the cache is used only if its hash is the one written down when it was made.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtrial.diffusion.weights import sha256_of
from vtrial.records import InputError
from vtrial.segmentation.card import SPACING_MM, Mode, SegmenterCard, read_segmenter, read_segmenter_card

STAMP = "vtrial_segmenter"  # in dataset.json: what makes one of our models known for what it is
CONFIGURATION = "3d_fullres"
CHECKPOINT = "fold_0/checkpoint_final.pth"
BUILD = 1  # raise when what is built from the same card changes
_BUILT = "built.json"  # the hashes of the files beside it
_FAST_TRAINER = "nnUNetTrainer_4000epochs_NoMirroring"
_TOTAL_TRAINER = "nnUNetTrainerNoMirroring"

# Data set and trainer of TotalSegmentator's task `total`, by mode; its folders have these very names.
DATASETS: dict[Mode, tuple[str, ...]] = {
    "total": (
        "Dataset291_TotalSegmentator_part1_organs_1559subj",
        "Dataset292_TotalSegmentator_part2_vertebrae_1532subj",
        "Dataset293_TotalSegmentator_part3_cardiac_1559subj",
        "Dataset294_TotalSegmentator_part4_muscles_1559subj",
        "Dataset295_TotalSegmentator_part5_ribs_1559subj",
    ),
    "fast": ("Dataset297_TotalSegmentator_total_3mm_1559subj",),
    "fastest": ("Dataset298_TotalSegmentator_total_6mm_1559subj",),
}
TRAINERS: dict[Mode, str] = {"total": _TOTAL_TRAINER, "fast": _FAST_TRAINER, "fastest": _FAST_TRAINER}


def trainer_folder(mode: Mode) -> str:
    """Name of the folder inside a data set's that holds plans and checkpoint."""
    return f"{TRAINERS[mode]}__nnUNetPlans__{CONFIGURATION}"


def dataset_json(card: SegmenterCard) -> dict[str, Any]:
    """nnU-Net's description of the labels: regions that write TotalSegmentator ids, and whose model this is."""
    labels = {head.name: list(head.covers) if len(head.covers) > 1 else head.covers[0] for head in card.heads}
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **labels},
        "regions_class_order": [head.writes for head in card.heads],
        "numTraining": 1,
        "file_ending": ".nii.gz",
        STAMP: {"name": card.name, "sha256": card.sha256, "phantoms_only": card.phantoms_only},
    }


def plans_json(card: SegmenterCard) -> dict[str, Any]:
    """nnU-Net's plans: grid, patch, intensities and network of a segmenter."""
    dataset = DATASETS[card.mode][0]
    spacing = [SPACING_MM[card.mode]] * 3
    shape = list(card.median_shape)
    resampling: dict[str, Any] = {}
    for what, is_seg, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        resampling[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{what}_kwargs"] = {
            "is_seg": is_seg,
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
    return {
        "dataset_name": dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": shape,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": card.intensity.model_dump()},
        "configurations": {
            CONFIGURATION: {
                "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(card.patch_size),
                "median_image_size_in_voxels": shape,
                "spacing": spacing,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "batch_dice": True,
                **resampling,
                "architecture": {
                    "network_class_name": card.architecture.network_class,
                    "arch_kwargs": card.architecture.arguments,
                    "_kw_requires_import": list(card.architecture.requires_import),
                },
            }
        },
    }


def write_model(
    folder: Path, mode: Mode, dataset: Mapping[str, Any], plans: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write what nnU-Net loads: `dataset.json`, `plans.json` and the checkpoint's pickle."""
    checkpoint = folder / CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1))
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))
    state = {
        "network_weights": dict(weights),
        "trainer_name": TRAINERS[mode],
        "init_args": {"configuration": CONFIGURATION},
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(state, checkpoint)


def default_cache() -> Path:
    """Where built models are kept: `vtrial/segmenters` in XDG_CACHE_HOME, or in `.cache` of the home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return base / "vtrial" / "segmenters"


def built_model(name_or_dir: str | Path, cache: Path | None = None) -> Path:
    """The weights folder (with `Dataset…` in it) of a segmenter of our own, built unless it is in the cache.

    Any number of processes may ask at once: each builds beside the place and the first rename wins. InputError if the
    segmenter is not sound or the cache cannot be written.
    """
    card = read_segmenter_card(name_or_dir)
    root = default_cache() if cache is None else cache.absolute()
    place = root / f"{card.name}-{card.identity[:16]}-{BUILD}"
    if _is_whole(place):
        return place
    part = root / f".{place.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        part.mkdir(mode=0o700)
        try:
            _build(part, name_or_dir)
            _put(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{root}: cannot keep the model {card.name} there ({error.strerror or error}); set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from None
    return place


def _build(part: Path, name_or_dir: str | Path) -> None:
    card, weights = read_segmenter(name_or_dir)
    folder = part / DATASETS[card.mode][0] / trainer_folder(card.mode)
    write_model(folder, card.mode, dataset_json(card), plans_json(card), weights)
    files = {str(path.relative_to(part)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (part / _BUILT).write_text(json.dumps(files, indent=1))


def _put(part: Path, place: Path) -> None:
    """Give a finished folder its name; where another process was first, its folder stays."""
    for _ in range(2):
        with suppress(OSError):  # a folder that is not empty cannot be renamed over
            part.rename(place)
            return
        if _is_whole(place):
            return
        broken = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.part")
        with suppress(FileNotFoundError):
            place.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    part.rename(place)


def _is_whole(place: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((place / _BUILT).read_text())
        return bool(files) and all(sha256_of(place / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, AttributeError):
        return False
