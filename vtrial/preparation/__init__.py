"""Real PET/CT made into a training set: `sources` finds the studies, the rest frames, judges and splits them."""
