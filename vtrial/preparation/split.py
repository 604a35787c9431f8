"""Training, validation and test: by person, stratified by sex, and once decided never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vtrial.records import Sex

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES: Mapping[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Member:
    """A study to be assigned: `key` names it for good, `patient` its person."""

    key: str
    patient: str
    sex: Sex


def assign_splits(
    members: Iterable[Member],
    seed: int,
    shares: Mapping[Split, float] = SHARES,
    known: Mapping[str, Split] | None = None,
) -> dict[str, Split]:
    """The split of every study by its key; studies of one person share theirs.

    `known` has the splits of an earlier call by key: persons among them stay where they were, whatever is added. New
    ones come in an order that depends on seed and patient alone, each to the split of their sex that is furthest below
    its share, so that no split is off by more than about one person of either sex. A person known in two splits, since
    studies turned out to be of one person, goes to the one nearer to training, where the damage is done.
    """
    members, known = list(members), known or {}
    sexes = {member.patient: member.sex for member in members}
    decided: dict[str, Split] = {}
    for member in members:
        earlier = [split for split in (decided.get(member.patient), known.get(member.key)) if split is not None]
        if earlier:
            decided[member.patient] = min(earlier, key=SPLITS.index)
    whole = sum(shares.values())
    counts = {sex: dict.fromkeys(SPLITS, 0) for sex in set(sexes.values())}
    for patient, split in decided.items():
        counts[sexes[patient]][split] += 1
    for patient in sorted(sexes.keys() - decided.keys(), key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).digest()):
        count = counts[sexes[patient]]
        people = sum(count.values()) + 1
        below = {split: shares.get(split, 0.0) / whole * people - count[split] for split in SPLITS}
        decided[patient] = max(SPLITS, key=lambda split: below[split])
        count[decided[patient]] += 1
    return {member.key: decided[member.patient] for member in members}
