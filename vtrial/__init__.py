"""vtrial: whole-body FDG PET/CT digital twins from demographics, and how like a real cohort they are."""

__version__ = "0.1.0"
