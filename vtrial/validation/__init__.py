"""A synthetic cohort against a real one: per-subject statistics, strata, inference and verdicts, each apart.

`references.read_reference` and `statistic.cohort_of` give cohorts, `compare.compare` compares two and `anova.anova`
several, `conditional` looks at slopes on body size and correlations between organs, `diversity` at lost spread,
`nearest` at copies of training subjects, and `match.pair` pairs twins with the people whose demographics they have.
"""

from vtrial.validation.anova import anova
from vtrial.validation.compare import Comparison, compare
from vtrial.validation.references import Reference, Summary, list_references, read_reference
from vtrial.validation.settings import AnalysisSettings, read_settings
from vtrial.validation.statistic import Cohort, cohort_of

__all__ = [
    "AnalysisSettings",
    "Cohort",
    "Comparison",
    "Reference",
    "Summary",
    "anova",
    "cohort_of",
    "compare",
    "list_references",
    "read_reference",
    "read_settings",
]
