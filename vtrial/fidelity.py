"""How like held-out phantoms a model's twins are, one by one with the same demographics: the table of the model card.

Measured on whole bodies, without any segmentation: volumes by HU, total activity, and the SUV of a fixed box where the
liver lies. Stage 1 is measured at 56×56×96, the cascade at 224×224×384.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage

from vtrial.cohort.recruit import recruit
from vtrial.cohort.registry import find_spec
from vtrial.cohort.spec import read_spec
from vtrial.diffusion.cascade import Cascade, load_cascade
from vtrial.diffusion.conditions import PHASE, Demographics
from vtrial.diffusion.weights import model_folder, write_card
from vtrial.generation import twin_spacing_mm
from vtrial.geometry import FACTOR, spacing_mm
from vtrial.imaging.codec import decode, decode_ct, decode_suv, encode_ct, encode_suv
from vtrial.phantom.population import make_phantom, render_phantom
from vtrial.randomness import Purpose, subject_torch_seed
from vtrial.records import InputError, Sex, Subject
from vtrial.reporting.preview import preview_png
from vtrial.runs import identity_hash

Level = Literal["global", "full"]
MEASURES = ("body_ml", "lung_ml", "bone_ml", "activity_g", "liver_box_suv")
BODY_HU, LUNG_HU, BONE_HU = -300.0, -350.0, 220.0
# Fractions of the grid (x, y, z) where the liver lies in most people, whatever their size.
LIVER_BOX = ((0.60, 0.70), (0.47, 0.62), (0.575, 0.635))
LUNGS_ABOVE = 0.50  # fraction of z: gas below it is bowel
ON_SHEET = 2  # women, and men
Say = Callable[[str], None]
# Names a measured person in a file of kept rows: by seed and index alone, another cohort's would be taken for it.
_WHO = ("seed", "index", "sex", "age_years", "height_cm", "weight_kg")


@dataclass(frozen=True)
class Agreement:
    """One measure of twins against phantoms, for one sex or all: means and SDs of both."""

    measure: str
    sex: str
    n: int
    phantoms_mean: float
    phantoms_sd: float
    twins_mean: float
    twins_sd: float

    @property
    def difference_percent(self) -> float:
        """Difference of means in percent of the phantoms'."""
        return 100.0 * (self.twins_mean / self.phantoms_mean - 1.0)

    @property
    def sd_ratio(self) -> float:
        """SD of the twins over SD of the phantoms."""
        return self.twins_sd / self.phantoms_sd


def measure_body(ct_hu: NDArray[np.float32], suv: NDArray[np.float32], voxel_mm: Sequence[float]) -> dict[str, float]:
    """Volumes in ml, activity (SUV integral, g) and liver-box SUV of a body on any (x, y, z) grid over the full view.

    Body: voxels above -300 HU, holes of every axial slice filled. Lungs: voxels under -350 HU in it, upper half.
    """
    ml = float(np.prod(voxel_mm)) / 1000.0
    tissue = ct_hu > BODY_HU
    body = np.stack([ndimage.binary_fill_holes(tissue[:, :, k]) for k in range(tissue.shape[2])], axis=2)
    chest = int(LUNGS_ABOVE * body.shape[2])
    x, y, z = (slice(round(a * n), max(round(b * n), round(a * n) + 1)) for (a, b), n in zip(LIVER_BOX, ct_hu.shape))
    return {
        "body_ml": float(body.sum() * ml),
        "lung_ml": float((body & (ct_hu < LUNG_HU))[:, :, chest:].sum() * ml),
        "bone_ml": float((ct_hu > BONE_HU).sum() * ml),
        "activity_g": float(suv.sum(dtype=np.float64) * ml),
        "liver_box_suv": float(suv[x, y, z].mean()),
    }


def _measure_pair(pair: torch.Tensor, height_cm: float) -> dict[str, float]:
    """`measure_body` of a model-space pair (2, x, y, z)."""
    shape = (pair.shape[1], pair.shape[2], pair.shape[3])
    return measure_body(decode_ct(pair[0]).numpy(), decode_suv(pair[1]).numpy(), spacing_mm(height_cm, shape))


def held_out(spec: str | Path, each_sex: int, seed: int) -> list[Subject]:
    """The first `each_sex` women and men recruited from a spec with a seed that no training used.

    InputError where the cohort has too few of either.
    """
    subjects = recruit(read_spec(spec), 4 * each_sex + 20, seed)
    sexes: tuple[Sex, Sex] = ("F", "M")
    chosen = [[s for s in subjects if s.sex == sex][:each_sex] for sex in sexes]
    if min(map(len, chosen)) < each_sex:
        raise InputError(
            f"{spec}: not {each_sex} women and men among {len(subjects)}; choose a cohort with more of both"
        )
    return [*chosen[0], *chosen[1]]


def measure_phantom(subject: Subject) -> dict[str, float]:
    """What a subject's phantom measures, through the same intensity clipping as the model's volumes.

    At both levels, as "global body_ml", "full body_ml" and so on: rendering takes longest.
    """
    phantom = render_phantom(subject)
    full = torch.stack([encode_ct(phantom.ct_hu), encode_suv(phantom.suv)])
    px, py, pz = PHASE
    pairs = {"global": full[:, px::FACTOR, py::FACTOR, pz::FACTOR].contiguous(), "full": full}
    measured = {level: _measure_pair(pair, subject.height_cm) for level, pair in pairs.items()}
    return {f"{level} {name}": value for level, row in measured.items() for name, value in row.items()}


def measure_twin(cascade: Cascade, s: Subject, level: Level) -> dict[str, float]:
    """What the model's twin with a subject's demographics measures."""
    return _measure_pair(_twin(cascade, s, level), s.height_cm)


def _twin(cascade: Cascade, s: Subject, level: Level) -> torch.Tensor:
    """A twin in model space, (2, 56, 56, 96) or (2, 224, 224, 384)."""
    person = Demographics(s.sex, s.age_years, s.height_cm, s.weight_kg)
    noise = torch.Generator().manual_seed(subject_torch_seed(s.seed, s.index, Purpose.GLOBAL))
    if level == "global":
        return cascade.sample_low([person], noise=noise)[0].cpu()
    refine = torch.Generator().manual_seed(subject_torch_seed(s.seed, s.index, Purpose.SUPER_RESOLUTION))
    return cascade.sample(person, global_noise=noise, sr_noise=refine).cpu()


def _who(row: Mapping[Any, Any]) -> tuple[object, ...]:
    """What tells measured people apart; rounded, as a CSV file need not keep the last bit."""
    return tuple(round(row[key], 6) if isinstance(row[key], float) else row[key] for key in _WHO)


def measure_all(
    what: str, subjects: Sequence[Subject], measure: Callable[[Subject], dict[str, float]], keep: Path | None, say: Say
) -> pd.DataFrame:
    """One row a subject: demographics and measures. Rows already in `keep`, a CSV file, are not measured again."""
    known = pd.DataFrame()
    if keep is not None and keep.is_file():
        known = pd.read_csv(keep)
    rows: list[dict[str, object]] = known.to_dict("records")  # type: ignore[assignment]
    done = {_who(row) for row in rows}
    for i, s in enumerate(subjects):
        who = {key: getattr(s, key) for key in _WHO}
        if _who(who) in done:
            continue
        rows.append(who | measure(s))
        if keep is not None:
            part = keep.with_suffix(".part")
            pd.DataFrame(rows).to_csv(part, index=False)
            part.replace(keep)
        if (i + 1) % 10 == 0 or i + 1 == len(subjects):
            say(f"{what}: {i + 1} of {len(subjects)}")
    table = pd.DataFrame(rows)
    wanted = {_who(vars(s)) for s in subjects}
    return table[[_who(row) in wanted for row in table.to_dict("records")]]


def agreements(phantoms: pd.DataFrame, twins: pd.DataFrame) -> list[Agreement]:
    """Every measure for women, men and all, in the order of MEASURES."""
    out = []
    for measure in MEASURES:
        for sex in ("F", "M", "all"):
            a, b = (t[measure] if sex == "all" else t.loc[t["sex"] == sex, measure] for t in (phantoms, twins))
            moments = (float(a.mean()), float(a.std(ddof=1)), float(b.mean()), float(b.std(ddof=1)))
            out.append(Agreement(measure, sex, len(a), *moments))
    return out


@dataclass(frozen=True)
class Slope:
    """A slope of a least-squares fit and its standard error: with few people the phantoms' own is uncertain too."""

    value: float
    error: float


def slopes(table: pd.DataFrame) -> dict[str, Slope]:
    """Slopes that conditioning must carry: lung volume on height, body volume on weight (ml per unit).

    Adjusted for sex, so that they tell of bodies within a sex.
    """
    male = (table["sex"] == "M").to_numpy(dtype=float)
    out = {}
    for measure, cause in (("lung_ml", "height_cm"), ("body_ml", "weight_kg")):
        design = np.column_stack([np.ones(len(table)), table[cause].to_numpy(dtype=float), male])
        target = table[measure].to_numpy(dtype=float)
        fit = np.linalg.lstsq(design, target)[0]
        freedom = max(len(table) - design.shape[1], 1)
        variance = float(((target - design @ fit) ** 2).sum()) / freedom * np.linalg.pinv(design.T @ design)[1, 1]
        out[f"{measure} per {cause}"] = Slope(float(fit[1]), float(np.sqrt(variance)))
    return out


def assess(
    model: str,
    level: Level,
    each_sex: int,
    spec: str,
    seed: int,
    *,
    keep: Path | None = None,
    write: bool = False,
    sheet: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Phantoms and twins of the same people, measured and compared; the table for the model card.

    `keep` is a folder for the measured rows, so that an interrupted assessment goes on; `write` puts the table into the
    card of the model in place of an older one of the same level; `sheet` is a PNG to draw of the first people of each
    sex.
    """
    cascade = load_cascade(model)
    subjects = held_out(find_spec(spec), each_sex, seed)
    files: dict[str, Path | None] = {"phantoms": None, "twins": None}
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        samplers = {f"{stage} sampler": s.sampler.model_dump_json() for stage, s in cascade.card.stages.items()}
        made_by = identity_hash({**cascade.card.files, **samplers})
        files = {"phantoms": keep / "phantoms.csv", "twins": keep / f"twins-{level}-{made_by}.csv"}
    phantoms = measure_all("phantoms", subjects, measure_phantom, files["phantoms"], say)
    phantoms = phantoms.rename(columns={f"{level} {name}": name for name in MEASURES})
    twins = measure_all("twins", subjects, lambda s: measure_twin(cascade, s, level), files["twins"], say)
    truth, made = slopes(phantoms), slopes(twins)
    rows = [
        asdict(a) | {"difference_percent": round(a.difference_percent, 2), "sd_ratio": round(a.sd_ratio, 3)}
        for a in agreements(phantoms, twins)
    ]
    table: dict[str, Any] = {
        "level": level,
        "command": f"vtrial fidelity {model} --level {level} --each-sex {each_sex} --spec {spec} --seed {seed}",
        "measures": rows,
        "slopes": {
            name: {
                "phantoms": truth[name].value,
                "phantoms_se": truth[name].error,
                "twins": made[name].value,
                "twins_se": made[name].error,
            }
            for name in truth
        },
    }
    if write:
        others = [t for t in cascade.card.fidelity if isinstance(t, dict) and t.get("level") != level]
        write_card(model_folder(model), cascade.card.model_copy(update={"fidelity": [*others, table]}))
    if sheet is not None:
        people = [s for pair in zip(subjects[:ON_SHEET], subjects[each_sex:]) for s in pair]
        sheet.write_bytes(contact_sheet(cascade, people))
        say(f"drawn: {sheet}")
    return table


def contact_sheet(cascade: Cascade, people: Sequence[Subject]) -> bytes:
    """PNG with a row for each person: the held-out phantom, and the twin at full resolution beside it."""
    scans = []
    for s in people:
        twin = decode(_twin(cascade, s, "full"), twin_spacing_mm(cascade.card.extent, s.height_cm))
        title = f"{s.sex}, {s.age_years:.0f} y, {s.height_cm:.0f} cm, {s.weight_kg:.0f} kg"
        scans += [(f"phantom: {title}", make_phantom(s).pet_ct), ("twin", twin)]
    return preview_png(scans)


def as_table(table: dict[str, Any]) -> str:
    """The table for people."""
    lines = [f"{'measure':<14} sex      n   phantoms (mean ± SD)      twins (mean ± SD)    difference  SD ratio"]
    for row in table["measures"]:
        phantoms = f"{row['phantoms_mean']:>11.5g} ± {row['phantoms_sd']:<9.4g}"
        twins = f"{row['twins_mean']:>11.5g} ± {row['twins_sd']:<9.4g}"
        verdict = f"{row['difference_percent']:>+9.1f} % {row['sd_ratio']:>8.2f}"
        lines.append(f"{row['measure']:<14} {row['sex']:<4} {row['n']:>5} {phantoms} {twins} {verdict}")
    for name, slope in table["slopes"].items():
        sides = [f"{side} {slope[side]:.4g} (SE {slope[f'{side}_se']:.2g})" for side in ("phantoms", "twins")]
        lines.append(f"slope {name}: {', '.join(sides)}, ratio {slope['twins'] / slope['phantoms']:.2f}")
    return "\n".join(lines)
