"""Whether measurements depend on the body as they do in people: slopes on body size, and correlations between organs.

Slopes are least squares with standard errors that allow for unequal scatter (HC3: Long & Ervin 2000), adjusted for sex
or for what a published slope was adjusted for. Correlations are Pearson's, compared through Fisher's z.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from vtrial.records import InputError
from vtrial.validation.inference import Array
from vtrial.validation.multiplicity import benjamini_hochberg, holm
from vtrial.validation.references import Reference, literature_slopes
from vtrial.validation.settings import AnalysisSettings
from vtrial.validation.sides import off_scale_of
from vtrial.validation.statistic import Cohort
from vtrial.validation.verdict import DIFFERENT, EQUIVALENT, NOT_COMPARED, TOO_FEW

PREDICTORS = ("bsa_m2", "height_cm", "weight_kg", "bmi", "age_years", "sex")


@dataclass(frozen=True)
class SlopeQuestion:
    """A measurement, what it is regressed on, and what else is in the model (`PREDICTORS`)."""

    organ: str
    metric: str
    on: str
    adjusted_for: tuple[str, ...] = ("sex",)


@dataclass(frozen=True)
class Slope:
    """A fitted or published slope, in units of the metric per unit of the predictor; NaN where there is none."""

    n: int
    slope: float
    se: float
    df: float
    message: str = ""


def usual_questions(organs: Sequence[str]) -> list[SlopeQuestion]:
    """Organ volume on body surface, height and weight, and SUVmean on BMI, each adjusted for sex."""
    sizes = ("bsa_m2", "height_cm", "weight_kg")
    return [SlopeQuestion(o, "volume_ml", on) for o in organs for on in sizes] + [
        SlopeQuestion(o, "suv_mean", "bmi") for o in organs
    ]


def fit_slope(cohort: Cohort, question: SlopeQuestion, min_subjects: int = 5) -> Slope:
    """The slope of a question in a cohort, over the subjects that have the measurement and all predictors."""
    y = cohort.column((question.organ, question.metric))
    if (question.organ, question.metric) not in cohort.cells:
        return _no_slope(0, f"{cohort.name} has no {question.metric} of {question.organ}")
    columns = [predictor(cohort.people, name) for name in (question.on, *question.adjusted_for)]
    lacking = [n for n, c in zip((question.on, *question.adjusted_for), columns) if not np.isfinite(c).any()]
    if lacking:
        return _no_slope(0, f"{cohort.name} has no {', '.join(lacking)}")
    use = np.isfinite(y) & np.isfinite(np.column_stack(columns)).all(axis=1)
    n = int(use.sum())
    # What does not vary, as sex in a cohort of men, explains nothing and would only make the fit singular.
    others = [c[use] for c in columns[1:] if n and np.ptp(c[use]) > 0]
    x = np.column_stack([columns[0][use], np.ones(n), *others])
    if n < min_subjects + x.shape[1]:
        return _no_slope(n, f"{cohort.name}: only {n} subjects with {question.on} and {question.metric}")
    scaled = (x - np.r_[x[:, 0].mean(), np.zeros(x.shape[1] - 1)]) / np.maximum(np.abs(x).max(axis=0), 1e-300)
    if np.linalg.matrix_rank(scaled, tol=1e-6) < x.shape[1]:
        return _no_slope(
            n, f"{cohort.name}: {question.on} does not vary apart from {' and '.join(question.adjusted_for)}"
        )
    inverse = np.linalg.pinv(x)
    beta = inverse @ y[use]
    leverage = np.einsum("ij,ji->i", x, inverse)
    residual = (y[use] - x @ beta) / np.maximum(1.0 - leverage, 1e-9)
    se = float(np.sqrt((inverse[0] ** 2 * residual**2).sum()))
    if se <= 1e-9 * abs(beta[0]):
        return _no_slope(n, f"{cohort.name}: {question.metric} follows {question.on} without any scatter")
    return Slope(n, float(beta[0]), se, float(n - x.shape[1]))


def _no_slope(n: int, message: str) -> Slope:
    return Slope(n, float("nan"), float("nan"), float("nan"), message)


def predictor(people: pd.DataFrame, name: str) -> Array:
    """A predictor of every subject, NaN where unknown: sex as 1 for men, body surface by Du Bois 1916."""
    if name == "sex":
        return np.asarray(people["sex"] == "M", dtype=float)
    if name == "bsa_m2" and {"height_cm", "weight_kg"} <= set(people.columns):
        return (0.007184 * people["weight_kg"] ** 0.425 * people["height_cm"] ** 0.725).to_numpy(dtype=float)
    if name not in people.columns:
        return np.full(len(people), np.nan)
    return people[name].to_numpy(dtype=float)


def compare_slopes(
    synthetic: Cohort,
    reference: Cohort | Reference,
    settings: AnalysisSettings | None = None,
    questions: Sequence[SlopeQuestion] | None = None,
) -> pd.DataFrame:
    """One row a question: both slopes with intervals, their difference, and a verdict.

    A reference with subjects is fitted in the same way; a summary brings its published slopes, and the literature's
    are added. A published slope without a standard error counts as exact, which the message says.
    `inside_reference` tells whether the synthetic slope lies in the reference's interval. Equivalent: within
    ± `slope_percent` of the reference slope (two one-sided tests); different: Holm over the questions. Slopes of cells
    that a model's scale decides (`sides.off_scale`) are shown and not judged.
    """
    settings = settings or AnalysisSettings()
    data = reference.data if isinstance(reference, Reference) else reference
    rows = []
    if isinstance(data, Cohort):
        for q in questions or usual_questions([o for o in settings.organs if o in {c[0] for c in data.cells}]):
            rows.append(_slope_row(synthetic, q, fit_slope(data, q, settings.min_subjects), data.name, settings))
    else:
        own = reference.slopes if isinstance(reference, Reference) else pd.DataFrame()
        for r in pd.concat([own, literature_slopes()]).to_dict("records"):
            q = SlopeQuestion(r["organ"], r["metric"], r["on"], tuple(str(r["adjusted_for"]).split()))
            rows.append(_slope_row(synthetic, q, _published(r, q), str(r["source"]), settings))
    table = pd.DataFrame(rows)
    if table.empty:
        raise InputError(f"{data.name}: no slopes can be compared; it has neither subjects nor published slopes")
    reasons = off_scale_of([synthetic, data], list(zip(table["organ"], table["metric"])), settings)
    table.loc[[bool(reason) for reason in reasons], ["p", "p_tost"]] = np.nan
    table["message"] = ["; ".join(m for m in both if m) for both in zip(table["message"], reasons)]
    p = table["p"].to_numpy(dtype=float)
    table["p_holm"], table["p_bh"] = holm(p), benjamini_hochberg(p)
    table["verdict"] = np.select(
        [
            ~np.isfinite(p),
            table["p_tost"] < settings.alpha,
            table["p_bh" if settings.adjustment == "bh" else "p_holm"] < settings.alpha,
        ],
        [NOT_COMPARED, EQUIVALENT, DIFFERENT],
        TOO_FEW,
    )
    return table


def _published(row: dict[Hashable, Any], question: SlopeQuestion) -> Slope:
    """A published slope. Without a standard error it counts as exact; as many people as it has terms tell no slope."""
    n, se = int(row["n"]), float(row["se"])
    df = n - 2 - len(question.adjusted_for)
    if se > 0 and df < 1:
        return _no_slope(n, f"published from {n} people, too few beside {', '.join(question.adjusted_for) or 'it'}")
    return Slope(n, float(row["slope"]), se, df, "" if se > 0 else "published without standard error, taken as exact")


def _slope_row(
    a: Cohort, q: SlopeQuestion, theirs: Slope, source: str, settings: AnalysisSettings
) -> dict[str, object]:
    ours = fit_slope(a, q, settings.min_subjects)
    row: dict[str, object] = {
        "organ": q.organ,
        "metric": q.metric,
        "on": q.on,
        "adjusted_for": " ".join(q.adjusted_for),
        "source": source,
    }
    tail = 1.0 - settings.alpha / 2.0
    intervals = {}
    for end, s in (("synthetic", ours), ("reference", theirs)):
        half = float(special.stdtrit(s.df, tail)) * s.se
        intervals[end] = (s.slope - half, s.slope + half)
        row |= {f"n_{end}": s.n, f"slope_{end}": s.slope, f"se_{end}": s.se}
        row |= {f"slope_{end}_low": intervals[end][0], f"slope_{end}_high": intervals[end][1]}
    se_ref = theirs.se if np.isfinite(theirs.se) else 0.0

    def apart(r: float) -> tuple[float, float, float]:
        """slope(a) - r slope(b), its standard error and degrees of freedom."""
        va, vb = ours.se**2, (r * se_ref) ** 2
        df = (va + vb) ** 2 / (va**2 / ours.df + (vb**2 / theirs.df if vb > 0 else 0.0))
        return ours.slope - r * theirs.slope, float(np.sqrt(va + vb)), float(df)

    difference, se, df = apart(1.0)
    half = float(special.stdtrit(df, tail)) * se
    row |= {"difference": difference, "difference_low": difference - half, "difference_high": difference + half}
    row["ratio"] = ours.slope / theirs.slope if theirs.slope else float("nan")
    row["p"] = float(2.0 * special.stdtr(df, -abs(difference / se))) if se > 0 else float("nan")
    margin, sign = settings.margins.slope_percent / 100.0, float(np.sign(theirs.slope))
    sides = [(side * sign, *apart(1.0 - side * margin)) for side in (1.0, -1.0)]
    row["p_tost"] = max(float(special.stdtr(k, -side * d / s)) if s > 0 else float("nan") for side, d, s, k in sides)
    low, high = intervals["reference"]
    row["inside_reference"] = bool(low <= ours.slope <= high) if np.isfinite(low + ours.slope) else None
    row["message"] = "; ".join(m for m in (ours.message, theirs.message) if m)
    return row


@dataclass(frozen=True)
class CorrelationComparison:
    """Correlations between organs in both cohorts.

    `synthetic` and `reference` are square tables by organ, NaN where unknown. `pairs` has one row a pair of organs:
    r and n of both, difference, p (Fisher's z), p_holm, p_bh. `rms` is the root mean square difference, and
    `rms_expected` what it would be for two samples of these sizes from one population.
    """

    synthetic: pd.DataFrame
    reference: pd.DataFrame
    pairs: pd.DataFrame
    rms: float
    rms_expected: float


def correlations(
    cohort: Cohort, organs: Sequence[str], metric: str = "suv_mean", *, within_sex: bool = False
) -> pd.DataFrame:
    """Pearson correlation between organs over the subjects that have both, as a square table; NaN under 4 or no spread.

    `within_sex`: after the mean of each sex is taken away.
    """
    values, _ = cohort.select([(o, metric) for o in organs])
    frame = pd.DataFrame(values, columns=list(organs), index=cohort.people.index)
    if within_sex:
        frame = frame - frame.groupby(cohort.people["sex"]).transform("mean")
    frame.loc[:, ~(frame.std() > 0)] = np.nan
    return frame.corr(min_periods=4)


def compare_correlations(
    synthetic: Cohort,
    reference: Cohort | Reference,
    settings: AnalysisSettings | None = None,
    metric: str = "suv_mean",
) -> CorrelationComparison:
    """Correlations of a metric between organs, synthetic against real (within the sexes) or published (over both).

    Organs of which a model's scale cuts the averages are left out (`sides.off_scale`).
    InputError where the reference has neither subjects nor published correlations of this metric.
    """
    settings = settings or AnalysisSettings()
    data = reference.data if isinstance(reference, Reference) else reference
    if isinstance(data, Cohort):
        cells = [(o, metric) for o in settings.organs if (o, metric) in data.cells]
        reasons = off_scale_of([synthetic, data], cells, settings)
        organs = [organ for (organ, _), reason in zip(cells, reasons) if not reason]
        theirs = correlations(data, organs, metric, within_sex=True)
        n_theirs = _counts(data, organs, metric)
    else:
        published = reference.correlations if isinstance(reference, Reference) else pd.DataFrame()
        published = published[published["metric"] == metric] if len(published) else published
        if published.empty:
            raise InputError(f"{data.name}: no published correlations of {metric}; choose a reference with subjects")
        organs = list(dict.fromkeys([*published["organ_a"], *published["organ_b"]]))
        theirs = pd.DataFrame(np.where(np.eye(len(organs)) > 0, 1.0, np.nan), index=organs, columns=organs)
        n_theirs = theirs * np.nan
        for r in published.to_dict("records"):
            for i, j in ((str(r["organ_a"]), str(r["organ_b"])), (str(r["organ_b"]), str(r["organ_a"]))):
                theirs.loc[i, j], n_theirs.loc[i, j] = r["r"], r["n"]
    ours = correlations(synthetic, organs, metric, within_sex=isinstance(data, Cohort))
    pairs = _pairs_table(
        ours, theirs, _counts(synthetic, organs, metric), n_theirs, 1 if isinstance(data, Cohort) else 0
    )
    known = pairs.dropna(subset=["difference"])
    noise = (1 - known["r_reference"] ** 2) ** 2 * (1 / (known["n_synthetic"] - 1) + 1 / (known["n_reference"] - 1))
    rms, expected = (
        float(np.sqrt(v.mean())) if len(known) else float("nan") for v in (known["difference"] ** 2, noise)
    )
    return CorrelationComparison(ours, theirs, pairs, rms, expected)


def _counts(cohort: Cohort, organs: Sequence[str], metric: str) -> pd.DataFrame:
    there = np.isfinite(cohort.select([(o, metric) for o in organs])[0]).astype(float)
    return pd.DataFrame(there.T @ there, index=list(organs), columns=list(organs))


def _pairs_table(
    ours: pd.DataFrame, theirs: pd.DataFrame, n_a: pd.DataFrame, n_b: pd.DataFrame, used: int
) -> pd.DataFrame:
    i, j = np.triu_indices(len(ours), 1)
    ra, rb, na, nb = (t.to_numpy(dtype=float)[i, j] for t in (ours, theirs, n_a, n_b))
    with np.errstate(all="ignore"):
        se = np.sqrt(1.0 / (na - 3 - used) + 1.0 / (nb - 3 - used))
        p = 2.0 * special.ndtr(-np.abs(np.arctanh(ra) - np.arctanh(rb)) / se)
    names = np.asarray(ours.index)
    table = pd.DataFrame({"organ_a": names[i], "organ_b": names[j], "n_synthetic": na, "r_synthetic": ra})
    table["n_reference"], table["r_reference"], table["difference"] = nb, rb, ra - rb
    table["p"], table["p_holm"], table["p_bh"] = p, holm(p), benjamini_hochberg(p)
    return table
