"""The real `totalsegmentator` package as a segmenter: in this process, offline, with its models kept in memory."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtrial.execution import CannotGoOn, Resources
from vtrial.memory import keep_freed_memory
from vtrial.records import InputError
from vtrial.segmentation.card import Mode
from vtrial.segmentation.home import Home, end_session, make_home, new_session
from vtrial.segmentation.nnunet import CHECKPOINT, DATASETS, built_model, trainer_folder
from vtrial.segmentation.resident import ResidentPredictor, installed, why_not_resident
from vtrial.segmentation.segmenter import Segmenter

_TRAINERS = (
    ("nnUNetTrainer", "nnUNetTrainer"),
    ("variants.data_augmentation.nnUNetTrainerNoMirroring", "nnUNetTrainerNoMirroring"),
    ("variants.training_length.nnUNetTrainer_Xepochs_NoMirroring", "nnUNetTrainer_4000epochs_NoMirroring"),
)
# Gives masks back to the fine grid by linear interpolation, organ by organ, in place of the nearest voxel. In 2.15 and
# later; `higher_order_resampling`, without LEGACY, was the same in earlier ones and is something else in these.
SMOOTH = "higher_order_resampling_LEGACY"
NEEDS_SMOOTH = "segmenters of vtrial's own need; install totalsegmentator 2.15 or newer, below 3"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadTotalSegmentator:
    """Loads TotalSegmentator's task `total` in a worker.

    `weights` is the folder of the official weights; where it is empty, `model` names a segmenter of our own, built into
    `cache` (the default one if empty), whose masks are smoothed (option `SMOOTH`). `resident` keeps models in memory;
    without it every call is the stock one.
    """

    mode: Mode
    weights: str = ""
    model: str = ""
    cache: str = ""
    session: str = ""
    resident: bool = True

    def __call__(self, resources: Resources) -> Segmenter:
        """The segmenter on the worker's device; InputError if its weights are not there."""
        if self.weights:
            weights = Path(self.weights)
        else:
            weights = built_model(self.model, Path(self.cache) if self.cache else None)
        session = self.session or new_session()
        home = make_home(session, weights, resources.threads)
        if not self.session:
            weakref.finalize(home, end_session, session)
        return TotalSegmentator(self.mode, home, resources, smooth=not self.weights, resident=self.resident)

    def in_session(self, session: str) -> LoadTotalSegmentator:
        """The same, with its workers' homes in a session that the caller ends."""
        return replace(self, session=session)


class TotalSegmentator:
    """CT (bytes of a NIfTI file) → mask (bytes of an uncompressed one, uint8 class ids, the CT's grid and header)."""

    def __init__(self, mode: Mode, home: Home, resources: Resources, *, smooth: bool, resident: bool = True) -> None:
        self._mode, self._home, self._threads = mode, home, resources.threads
        self._options = {SMOOTH: True} if smooth else {}
        self._device = "gpu" if resources.device == "cuda" else "cpu"
        with home.entered():
            self._api, self._runner = _imported(home.weights)
        if unknown := self._options.keys() - inspect.signature(self._api.totalsegmentator).parameters.keys():
            raise InputError(f"this totalsegmentator has no option {', '.join(unknown)}, which {NEEDS_SMOOTH}")
        reason = why_not_resident(self._runner) if resident else "not asked for"
        if resident and reason:
            _log.warning("%s: models are loaded anew for every case", reason)
        self._stand_in = None if reason else ResidentPredictor(self._runner)

    @property
    def resident(self) -> bool:
        """Whether models stay in memory between cases."""
        return self._stand_in is not None

    def __call__(self, ct: bytes) -> bytes:
        """Segment one CT; RuntimeError with what TotalSegmentator said if it gives up."""
        import torch

        torch.set_num_threads(self._threads)
        if self._device == "cpu":
            keep_freed_memory()  # halves the time of a case
        _check_weights(self._home.weights, self._mode)
        with (
            self._home.entered() as folder,
            self._home.temporary_files() if self.resident else contextlib.nullcontext(),
            _offline(self._api),
            installed(self._runner, self._stand_in),
        ):
            path = folder / ("ct.nii.gz" if ct[:2] == b"\x1f\x8b" else "ct.nii")
            path.write_bytes(ct)
            try:
                with _quiet() as said:
                    image = self._api.totalsegmentator(
                        path,
                        ml=True,
                        fast=self._mode == "fast",
                        fastest=self._mode == "fastest",
                        device=self._device,
                        quiet=True,
                        nr_thr_resamp=1,
                        nr_thr_saving=1,
                        **self._options,
                    )
            except SystemExit as end:  # it ends the process where it does not like something
                raise RuntimeError(f"TotalSegmentator gave up: {said.getvalue().strip() or end}") from None
            finally:
                path.unlink(missing_ok=True)
            mask: bytes = image.to_bytes()
        return mask


def _imported(weights: Path) -> tuple[Any, Any]:
    """The modules `python_api` and `nnunet` of totalsegmentator. The environment must be a home's."""
    try:
        with _quiet():
            runner = importlib.import_module("totalsegmentator.nnunet")
            api = importlib.import_module("totalsegmentator.python_api")
            paths = importlib.import_module("nnunetv2.paths")
    except ImportError as error:
        raise InputError(
            f"the totalsegmentator package cannot be imported ({error}); install it: pip install totalsegmentator"
        ) from None
    # nnU-Net before 2.8 takes the folder of models once, on import: another one would be ignored silently.
    if str(paths.nnUNet_results) != str(weights):
        raise CannotGoOn("this nnunetv2 cannot change to another segmenter in one process; start a new one")
    _register_trainers(runner)
    return api, runner


def _register_trainers(runner: Any) -> None:
    """Tell TotalSegmentator the trainer classes it needs.

    nnU-Net finds them by importing every module of its package, of which some need torchvision: with a CPU build of
    torch that import fails, and with it every prediction.
    """
    known = getattr(runner, "custom_trainers", None)
    if not isinstance(known, dict):
        return
    for module, name in _TRAINERS:
        with contextlib.suppress(ImportError, AttributeError):
            found = getattr(importlib.import_module(f"nnunetv2.training.nnUNetTrainer.{module}"), name)
            known.setdefault(name, found)


def _check_weights(weights: Path, mode: Mode) -> None:
    """TotalSegmentator would download what is not there: InputError instead, should weights vanish during a run."""
    for dataset in DATASETS[mode]:
        path = weights / dataset / trainer_folder(mode) / CHECKPOINT
        if not path.is_file():
            raise InputError(f"{path}: the segmenter's weights are gone; restore them and go on")


@contextlib.contextmanager
def _offline(api: Any) -> Iterator[None]:
    """No downloads: the function that would is out of place. It also deletes folders of old weights unasked."""
    name = "download_pretrained_weights"
    stock = getattr(api, name)
    setattr(api, name, lambda task_id: None)  # what is needed was looked for before
    try:
        yield
    finally:
        setattr(api, name, stock)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Catch what is printed."""
    said, stdout = io.StringIO(), sys.stdout
    sys.stdout = said
    try:
        yield said
    finally:
        sys.stdout = stdout
