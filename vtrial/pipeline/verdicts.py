"""The comparison of two measured cohorts on disk: made once, and read again as long as nothing has changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vtrial import __version__
from vtrial.execution import CannotGoOn
from vtrial.pipeline.evidence import gather
from vtrial.pipeline.parts import Parts, Steps, silent
from vtrial.pipeline.scans import plain_name
from vtrial.pipeline.sides import Parties, Side
from vtrial.reporting.report import build_report
from vtrial.storage import Folder, place
from vtrial.validation import AnalysisSettings, Cohort, Comparison, Reference, Summary, compare
from vtrial.validation.match import pair

TABLE, PAGE, NUMBERS = "comparisons.parquet", "report.html", "report.json"
_KEY = b"vtrial.compared"  # in the table's metadata: of what it is the comparison
_OF = b"vtrial.reference"  # and where the reference comes from
_READ = {"reference", "verdict", "headline", "counts", "copies"}  # of the report's JSON


@dataclass(frozen=True)
class Verdict:
    """How a cohort stands against a reference. `counts` has verdict to cells; `new` says that it was made just now.

    `so_far` tells which runs are not complete, "" where all are;
    `report`, `numbers` and `table` are the places of the page, its JSON and the comparisons; `copies` is the verdict on
    copies of training subjects, "" where none were looked for; `failures` says why subjects are not in it, by cohort
    and subject.
    """

    run: str
    reference: str
    verdict: str
    headline: str
    counts: dict[str, int]
    report: str
    numbers: str
    table: str
    copies: str
    new: bool
    so_far: str = ""
    failures: dict[str, str] = field(default_factory=dict)


def judge(
    parties: Parties,
    settings: AnalysisSettings,
    by: str,
    steps: Steps = silent,
    *,
    paired: bool = False,
    command: Sequence[str] = (),
) -> Verdict:
    """Compare, and write `validation/<reference>/` of the run, unless just that is there."""
    twins = parties.twins
    synthetic = twins.cohort(settings)
    references = _references(parties, settings, synthetic.name)
    reference = references[0]
    folder, source = twins.scans.folder, _origin(parties)
    under = _place_for(folder, reference.name, source)
    key = _key(synthetic, references, settings, [by, paired, parties.training and parties.training.digest])
    document = _document(folder, under, key)
    new = document is None
    if document is None:
        if paired and isinstance(reference.data, Cohort):
            synthetic, data = pair(synthetic, reference.data)
            references[0] = replace(reference, data=data)  # all parts of the report are about the pairs
        with steps(f"compare {synthetic.name} with {reference.name}") as report:
            parts = Parts(report, 1)

            def tell(stratum: str, of: int) -> None:
                parts.total = of
                parts.ended(stratum)

            comparison = compare(synthetic, references[0], by=by, settings=settings, paired=paired, tell=tell)
        content = gather(parties, comparison, synthetic, references, by, steps, command)
        built = build_report(content)
        document = json.loads(built.json)
        table = _bytes(_told(comparison, parties, reference), {_KEY: key, _OF: source.encode()})
        try:
            with twins.scans.held():
                folder.write(f"{under}/{PAGE}", built.html.encode())
                folder.write(f"{under}/{NUMBERS}", built.json.encode())
                folder.write(f"{under}/{TABLE}", table)  # last, as it says that the others are there
        except OSError as error:
            raise CannotGoOn(f"{folder.location}: cannot write {under} ({error}); measurements are safe") from error
    return _verdict(document, folder, under, parties.sides, new=new)


def _origin(parties: Parties) -> str:
    """Where the reference is, seen from the run, so that both may be moved together; its name if it comes with us."""
    real, run = parties.real, parties.twins.scans.folder.location
    source = real.location or real.name if isinstance(real, Reference) else real.scans.source
    local = Path(source).is_absolute() and "://" not in run
    return os.path.relpath(source, run) if local else source


def _place_for(folder: Folder, name: str, source: str) -> str:
    """The folder for a comparison: by the reference's name, with a hash of its source where another has that."""
    usual = f"validation/{plain_name(name)}"
    if _metadata(folder, usual).get(_OF, source.encode()) == source.encode():
        return usual
    return f"{usual}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _references(parties: Parties, settings: AnalysisSettings, beside: str) -> list[Reference]:
    """The reference and the further cohorts, no two under one name, nor under that of the cohort `beside` them."""
    found: list[Reference] = []
    for known in (parties.real, *parties.also):
        reference = known if isinstance(known, Reference) else _measured_reference(known, settings)
        taken = {beside, *(other.name for other in found)}
        names = (reference.name, f"{reference.name}-reference", *(f"{reference.name}-{i}" for i in range(2, 99)))
        name = next(name for name in names if name not in taken)
        if name != reference.name:
            reference = replace(reference, name=name, data=replace(reference.data, name=name))
        found.append(reference)
    return found


def _measured_reference(real: Side, settings: AnalysisSettings) -> Reference:
    scans, role = real.scans, "real" if real.scans.real else "stand-in"
    data = real.cohort(settings)
    return Reference(scans.name, data, scans.title, role, source=scans.source, segmenter=data.segmenter)


def _key(
    synthetic: Cohort, references: Sequence[Reference], settings: AnalysisSettings, asked: Sequence[object]
) -> bytes:
    """Changes with anything that changes the report."""
    named: list[object] = [__version__, settings.model_dump_json(), *asked, *_content(synthetic)]
    for reference in references:
        named += [*_content(reference.data), reference.slopes.to_csv(), reference.correlations.to_csv()]
        named += [reference.name, reference.title, reference.source, reference.note]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest().encode()


def _content(data: Cohort | Summary) -> list[str]:
    if isinstance(data, Summary):
        return [data.name, data.segmenter, data.table.to_csv()]
    numbers = hashlib.sha256(data.values.tobytes() + data.ceiling.tobytes()).hexdigest()
    return [data.name, data.segmenter, data.people.to_csv(), str(data.cells), *data.notes, numbers]


def _metadata(folder: Folder, under: str) -> dict[bytes, bytes]:
    """What the table of a comparison says of itself; nothing where it is not there, or spoilt."""
    if folder.size(f"{under}/{TABLE}") is None:
        return {}
    try:
        return pq.read_schema(io.BytesIO(folder.read(f"{under}/{TABLE}"))).metadata or {}
    except (OSError, pa.ArrowException):
        return {}


def _document(folder: Folder, under: str, key: bytes) -> dict[str, Any] | None:
    """The report's JSON where all is there and of just this question, else None; a spoilt one is not there."""
    if folder.size(f"{under}/{PAGE}") is None or folder.size(f"{under}/{NUMBERS}") is None:
        return None
    if _metadata(folder, under).get(_KEY) != key:
        return None
    try:
        found = json.loads(folder.read(f"{under}/{NUMBERS}"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= _READ else None


def _told(comparison: Comparison, parties: Parties, reference: Reference) -> pd.DataFrame:
    """The table of comparisons, with whose masks are behind each side and why not to trust them, if so."""
    sides = (parties.twins, parties.real)
    cautions = [side.masks.caution for side in sides if isinstance(side, Side) and side.masks.caution]
    return comparison.table.assign(
        segmenter_synthetic=parties.twins.masks.segmenter,
        segmenter_reference=reference.data.segmenter,
        caution="; ".join(dict.fromkeys(cautions)),
    )


def _bytes(table: pd.DataFrame, about: dict[bytes, bytes]) -> bytes:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    buffer = io.BytesIO()
    pq.write_table(arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **about}), buffer)
    return buffer.getvalue()


def _verdict(document: dict[str, Any], folder: Folder, under: str, sides: Sequence[Side], *, new: bool) -> Verdict:
    """What the report's JSON says, whether it was written now or before."""
    counts: dict[str, int] = {}
    for stratum in document["counts"].values():
        for word, count in stratum.items():
            counts[word] = counts.get(word, 0) + count
    failures: dict[str, str] = {}
    for side in sides:
        failures |= {f"{side.scans.name}: {subject}": reason for subject, reason in side.failures.items()}
    return Verdict(
        run=folder.location,
        reference=document["reference"],
        verdict=document["verdict"],
        headline=document["headline"],
        counts=counts,
        report=place(folder.location, f"{under}/{PAGE}"),
        numbers=place(folder.location, f"{under}/{NUMBERS}"),
        table=place(folder.location, f"{under}/{TABLE}"),
        copies="" if document["copies"] is None else document["copies"]["verdict"],
        new=new,
        so_far="; ".join(side.scans.so_far for side in sides if side.scans.so_far),
        failures=failures,
    )
