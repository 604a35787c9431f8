"""One nnU-Net predictor for each model, kept from case to case, in place of TotalSegmentator's load and spawn per call.

TotalSegmentator calls `totalsegmentator.nnunet.nnUNetv2_predict` for each case and model; that loads the weights and
starts two process pools, about 5 s. The stand-in here gives the same predictor the same files in this process, by name,
as nnU-Net starts processes even to list a folder. All else (orientation, resampling, tiling, labels) stays
TotalSegmentator's, and so do the voxels. Where the package is not one this was written for, it stays out of the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vtrial.segmentation.forks import forks_end_plainly

TESTED = ((2, 12), (3, 0))  # versions of TotalSegmentator, from and below
_CHECKPOINT = "checkpoint_final.pth"
# The parameters of nnUNetv2_predict known here; another one may change what is asked for.
_REQUIRED = ("dir_in", "dir_out", "task_id", "model", "folds", "trainer", "tta", "plans", "device", "step_size")
_OPTIONAL = (
    "num_threads_preprocessing",
    "num_threads_nifti_save",
    "quiet",
    "save_probabilities_path",
    "use_cropped_logits_resampling",
)


def totalsegmentator_version() -> str:
    """The version installed, "" where there is none."""
    try:
        return version("TotalSegmentator")
    except PackageNotFoundError:
        return ""


def totalsegmentator_release() -> tuple[int, ...]:
    """The first two numbers of the version installed."""
    return tuple(int(part) for part in totalsegmentator_version().split(".")[:2] if part.isdigit())


def why_not_resident(runner: Any) -> str:
    """Why the module `totalsegmentator.nnunet` cannot have the stand-in; "" if it can."""
    if not TESTED[0] <= totalsegmentator_release() < TESTED[1]:
        return f"TotalSegmentator {totalsegmentator_version() or 'of unknown version'} is not known here"
    predict, predictor = getattr(runner, "nnUNetv2_predict", None), getattr(runner, "nnUNetPredictor", None)
    if predict is None or not hasattr(runner, "get_output_folder"):
        return "totalsegmentator.nnunet has no nnUNetv2_predict or get_output_folder"
    found = set(inspect.signature(predict).parameters)
    if not set(_REQUIRED) <= found or found - {*_REQUIRED, *_OPTIONAL}:
        return f"nnUNetv2_predict has other parameters: {', '.join(sorted(found))}"
    for name in ("predict_from_files_sequential", "initialize_from_trained_model_folder"):
        if not hasattr(predictor, name):
            return f"nnUNetPredictor has no {name}"
    return ""


class ResidentPredictor:
    """Stands in for `nnUNetv2_predict` of the module `runner`; keeps what it has loaded."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._stock = runner.nnUNetv2_predict
        self._loaded: dict[tuple[str, ...], Any] = {}
        self._windows: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Predict the files of a folder into another, as the stock function with these arguments."""
        bound = inspect.signature(self._stock).bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        special = (asked["tta"], asked.get("save_probabilities_path"), asked.get("use_cropped_logits_resampling"))
        if any(special):
            self._stock(*args, **kwargs)
            return
        predictor = self._predictor(asked)
        cases = _cases(Path(asked["dir_in"]), predictor.dataset_json["file_ending"])
        with _windows_kept(self._windows):
            predictor.predict_from_files_sequential(cases, str(asked["dir_out"]), save_probabilities=False)

    def _predictor(self, asked: dict[str, Any]) -> Any:
        import torch

        folder = self._runner.get_output_folder(asked["task_id"], asked["trainer"], asked["plans"], asked["model"])
        device, folds, step = asked["device"], asked["folds"], asked["step_size"]
        key = (str(Path(folder).resolve()), str(device), str(folds), str(step))
        if key not in self._loaded:
            options: dict[str, Any] = {
                "tile_step_size": step,
                "use_gaussian": True,
                "use_mirroring": False,
                "device": torch.device(device) if isinstance(device, str) else device,
                "verbose": False,
                "verbose_preprocessing": False,
                "allow_tqdm": False,
            }
            known = inspect.signature(self._runner.nnUNetPredictor).parameters
            options["perform_everything_on_" + ("device" if "perform_everything_on_device" in known else "gpu")] = True
            predictor = self._runner.nnUNetPredictor(**options)
            predictor.initialize_from_trained_model_folder(folder, use_folds=folds, checkpoint_name=_CHECKPOINT)
            self._loaded[key] = predictor
        return self._loaded[key]


@contextmanager
def _windows_kept(kept: dict[str, Any]) -> Iterator[None]:
    """Keeps the weights of voxels within a window from case to case; nnU-Net computes them for each, in up to 1 s."""
    try:
        import nnunetv2.inference.predict_from_raw_data as module

        compute = module.compute_gaussian
    except (ImportError, AttributeError):  # another version: then as it does
        yield
        return

    def compute_once(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in kept:
            kept[key] = compute(*args, **kwargs)
        return kept[key]

    compute_once.cache_clear = lambda: None  # type: ignore[attr-defined]
    module.compute_gaussian = compute_once
    try:
        yield
    finally:
        module.compute_gaussian = compute


def _cases(folder: Path, ending: str) -> list[list[str]]:
    """The files of each case in a folder, one a channel (`<case>_0000.nii.gz`, …), as nnU-Net finds them."""
    cases: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"*_[0-9][0-9][0-9][0-9]{ending}")):
        cases.setdefault(path.name[: -len("_0000" + ending)], []).append(str(path))
    return list(cases.values())


@contextmanager
def installed(runner: Any, stand_in: ResidentPredictor | None) -> Iterator[None]:
    """Put the stand-in in the place of the stock function for a while; None leaves that as it is."""
    stock = runner.nnUNetv2_predict
    runner.nnUNetv2_predict = stand_in or stock
    try:
        with forks_end_plainly():  # the stand-in, too, leaves some calls to the stock function
            yield
    finally:
        runner.nnUNetv2_predict = stock
