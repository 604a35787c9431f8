"""Cohort specs in, subjects out.

`spec.read_spec` reads a table of strata or of subjects, `recruit.recruit` draws the subjects, `report.summarize` says
how near they came, `support.check_support` keeps them inside what a model was trained on, and `registry` knows the
cohorts that come with the package. A real cohort (`spec.match_table`) is the same type as a synthetic one.
"""
