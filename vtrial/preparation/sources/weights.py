"""One weight for a body and its SUV: a table's fills a gap in the header, and where the two differ nobody guesses."""

from __future__ import annotations

from dataclasses import replace

from vtrial.preparation.sources.dicoms import DicomPair
from vtrial.preparation.sources.people import NOBODY
from vtrial.preparation.sources.study import SUV_WEIGHT, Candidate

_APART = 0.05  # of the weight, and so of SUV: weights are rounded, and people are weighed twice


def weighed(candidate: Candidate) -> Candidate:
    """The candidate with SUV by the weight of its person; with the reason why not where there is none, or another.

    To be asked once tables have told who the person is. The fact `suv_weight_kg` is a table's weight that SUV goes by.
    """
    if candidate.reasons or not isinstance(candidate.load, DicomPair):
        return candidate
    study, weight_kg = candidate.load.study, (candidate.person or NOBODY).weight_kg
    used_kg = study.conversion.weight_kg
    if study.conversion.lacks_weight:
        if weight_kg is None:
            missing = "PatientWeight is missing; body-weight SUV needs it in kg: give it in a table of demographics"
            return replace(candidate, reasons=(missing,))
        return replace(
            candidate,
            load=DicomPair(replace(study, conversion=study.conversion.of_weight(weight_kg))),
            facts={**candidate.facts, SUV_WEIGHT: weight_kg},
            notes=(*candidate.notes, "PatientWeight is missing: SUV goes by the weight of the table"),
        )
    if used_kg and weight_kg and abs(weight_kg / used_kg - 1.0) > _APART:
        apart = (
            f"SUV goes by PatientWeight {used_kg:g} kg, and the table of demographics says {weight_kg:g} kg: more than "
            f"{_APART:.0%} apart; correct the table, or leave its cell empty, and if the header is wrong correct that"
        )
        return replace(candidate, reasons=(apart,))
    return candidate
