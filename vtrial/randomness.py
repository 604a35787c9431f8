"""One independent random stream for each (run seed, subject index, purpose): nothing else enters.

So a subject's body and noise do not depend on how many subjects there are, their order, the workers or a restart.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random stream is for. The numbers are part of reproducibility: never renumber, only append."""

    DEMOGRAPHICS = 1
    GLOBAL = 2
    SUPER_RESOLUTION = 3
    PHANTOM = 4
    RESAMPLE = 5


def subject_rng(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """A numpy generator that depends on (seed, index, purpose) alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, index, int(purpose)]))


def subject_torch_seed(seed: int, index: int, purpose: Purpose) -> int:
    """A 63-bit seed for `torch.Generator.manual_seed` that depends on (seed, index, purpose) alone."""
    return int(subject_rng(seed, index, purpose).integers(0, 2**63 - 1))
