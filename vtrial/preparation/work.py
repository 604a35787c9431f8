"""One study as the work of an executor: read, segment, fit to the grid, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtrial.execution import Resources, Saved
from vtrial.imaging.files import nifti_bytes, nifti_from_bytes, spacing_of
from vtrial.imaging.volume import Volume
from vtrial.preparation.sources.study import SUV_WEIGHT, Fact, Study
from vtrial.preparation.volume import TrainingVolume, check_pair, ct_to_segment, fit_volume, save_volume
from vtrial.records import CannotRead, InputError
from vtrial.storage import Folder, open_folder

Segment = Callable[[bytes], bytes]
"""CT to mask, both as bytes of NIfTI files on one grid."""
# the columns of a row that say why a study was left out, of which files, and whether partial ones were allowed
REASONS, STAMP, ALLOWED = "reasons", "stamp", "allow_partial"


@dataclass(frozen=True)
class PrepareWork:
    """The work on one study. What is wrong with a study's content is its result, until its files are written again.

    What may be mended is no result: files that cannot be read are this attempt's failure, and what the segmenter lacks
    (InputError) ends the run, as every study would meet it.
    """

    segment: Segment | None
    folder: Folder
    allow_partial: bool

    def make(self, study: Study) -> TrainingVolume | tuple[str, ...]:
        """The training volume of a study, or why there is none; exceptions are the executor's to retry."""
        try:
            ct, suv = _loaded(study)
            check_pair(ct, suv)
        except InputError as error:
            return error.problems
        labels = None if self.segment is None else self._labels(ct, suv)
        try:
            return fit_volume(ct, suv, labels, allow_partial=self.allow_partial)
        except InputError as error:
            return error.problems

    def _labels(self, ct: Volume, suv: Volume) -> Volume:
        assert self.segment is not None
        upright = ct_to_segment(ct, suv)
        data, _ = nifti_bytes(upright.voxels, spacing_of(upright.affine))
        mask = self.segment(data)
        try:
            labels, _ = nifti_from_bytes(mask, "the segmenter's mask")
        except InputError as error:
            raise RuntimeError(str(error)) from None
        return Volume(labels, upright.affine)

    def save(self, study: Study, product: TrainingVolume | tuple[str, ...]) -> Saved:
        """Write the volume, whole or not at all; OSError if that cannot be. Only the row, for a study left out."""
        known: dict[str, Fact] = {"fingerprint": study.fingerprint}
        if SUV_WEIGHT in study.facts:
            known[SUV_WEIGHT] = study.facts[SUV_WEIGHT]
        if isinstance(product, tuple):
            return Saved({}, known | {REASONS: list(product), STAMP: study.stamp, ALLOWED: self.allow_partial})
        saved = save_volume(self.folder, study.subject_id, product)
        return Saved(saved.files, known | saved.row)


def _loaded(study: Study) -> tuple[Volume, Volume]:
    """The study's CT and PET; what goes wrong unforeseen is told without its words, as they may quote a file's name."""
    try:
        return study.load()
    except (InputError, CannotRead):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__} while the study was read") from None


@dataclass(frozen=True)
class PrepareWorkFactory:
    """Builds the work in a worker: opens the folder there and loads the segmenter, if there is one."""

    load: Callable[[Resources], Segment] | None
    location: str
    allow_partial: bool

    def __call__(self, resources: Resources) -> PrepareWork:
        """The work with these resources."""
        segment = None if self.load is None else self.load(resources)
        return PrepareWork(segment, open_folder(self.location), self.allow_partial)
