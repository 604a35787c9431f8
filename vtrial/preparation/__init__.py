"""Real PET/CT made into a training set: `sources` finds the studies, `autopet.py` writes such a collection."""
