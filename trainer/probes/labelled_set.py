"""Which samples of a set are probed, with their classes and people: a bounded choice that only the index decides.

Shapes: N chosen samples, S samples of the index, C classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.plan import evenly_spaced
from trainer.data.shards.index import NO_GROUP, ShardIndex, missing_labels
from trainer.data.shards.members import IDENTITY_FIELDS, NO_LABEL
from trainer.errors import DataError

LABEL, IDENTITY = "label", "identity"
MIN_SAMPLES = 21
"""Twenty neighbours and the sample itself."""
_MIN_OF_CLASS = 8
"""Samples that a class gives before further classes are left out."""


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Samples of an index, ascending."""

    field: str
    sample_N: NDArray[np.int64]
    class_N: NDArray[np.int64]
    """Number of each sample's class, counted from 0 over the chosen ones."""
    names: list[str]
    """Of the classes."""
    people: list[tuple[str, ...]] | None
    """The people in each image, to keep them apart; None if they are the classes, or if no sample names any."""
    num_single: int = 0
    """Classes that were left out because they have one sample only."""

    def without(self, unreadable: set[int], *, setting: str) -> "LabelledSet":
        """Return the set without some samples, and without classes of which one sample would be left.

        Raises:
            DataError: as `choose`.
        """
        kept_N = ~np.isin(self.sample_N, list(unreadable))
        sizes_C = np.bincount(self.class_N[kept_N], minlength=len(self.names))
        kept_N &= sizes_C[self.class_N] >= 2
        classes, class_N = np.unique(self.class_N[kept_N], return_inverse=True)
        people = None if self.people is None else [p for p, kept in zip(self.people, kept_N, strict=True) if kept]
        names = [self.names[i] for i in classes.tolist()]
        left = LabelledSet(self.field, self.sample_N[kept_N], class_N, names, people, self.num_single)
        _check(left, setting=setting)
        return left


def choose(index: ShardIndex, field: str, *, num_samples: int, setting: str) -> LabelledSet:
    """Choose up to ``num_samples`` labelled samples, evenly over the classes and over the samples of each.

    Each class gives at most ``num_samples / C`` samples, but not less than 8 because of that; then every so-manyth
    class is chosen, so that the samples fit. Classes with one sample cannot be probed.

    Args:
        index: of the shards.
        field: ``label``, or a field of the samples' json. As ``identity``, morphs of two people are left out.
        num_samples: at most.
        setting: the flag that named the shards, for messages.

    Raises:
        DataError: samples lack the field, there are fewer than two classes of two samples, or fewer than 21 samples.

    Example: of 2,048 samples, 2 classes give up to 1,024 each; of 1,000 people with 4 images, every other one gives all
    its images.
    """
    code_S, names = _classes(index, field, setting)
    sample_S = np.flatnonzero(code_S >= 0)
    # Sorted by class; within a class the samples stay in their order.
    sample_S = sample_S[np.argsort(code_S[sample_S], kind="stable")]
    codes, start_C, size_C = np.unique(code_S[sample_S], return_index=True, return_counts=True)
    usable = size_C >= 2
    num_single = int((~usable).sum())
    codes, start_C, size_C = codes[usable], start_C[usable], size_C[usable]
    if len(codes) < 2:
        raise DataError(
            f"{setting} by {field}: {len(codes)} of {len(codes) + num_single} values occur in two samples or more, but "
            "a probe compares at least two such classes: add samples, or choose another --probe_field"
        )
    most = max(_MIN_OF_CLASS, num_samples // len(codes))
    wanted_C = np.minimum(size_C, most)
    classes = evenly_spaced(max(2, int(num_samples / wanted_C.mean())), len(codes))
    while len(classes) > 2 and wanted_C[classes].sum() > num_samples:
        classes.pop()
    chosen = [start_C[i] + np.array(evenly_spaced(int(wanted_C[i]), int(size_C[i]))) for i in classes]
    sample_N = np.sort(sample_S[np.concatenate(chosen)])
    kept, class_N = np.unique(code_S[sample_N], return_inverse=True)
    people = None if field == IDENTITY else _people(index, sample_N)
    found = LabelledSet(field, sample_N, class_N, [names[i] for i in kept.tolist()], people, num_single)
    _check(found, setting=setting)
    return found


def _classes(index: ShardIndex, field: str, setting: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the class of each sample, negative for none, and the names of the classes."""
    if field == LABEL:
        code_S = np.array(index.labels, dtype=np.int64)
        if (code_S == NO_LABEL).all():
            raise DataError(f"{setting} by label: {missing_labels(index)}: add labels, or choose another --probe_field")
        return code_S, [str(label) for label in range(int(code_S.max()) + 1)]
    if field not in index.group_fields:
        known = [name for name in index.group_fields if name not in IDENTITY_FIELDS[1:]]
        raise DataError(
            f"{setting} by {field}: no sample has that field in its json (fields there: {', '.join(known) or 'none'}): "
            "write the shards from a manifest with that column (tools/make_shards.py), or choose another --probe_field"
        )
    names, codes_S = index.groups(field)
    code_S = np.array(codes_S, dtype=np.int64)
    for other in IDENTITY_FIELDS[1:] if field == IDENTITY else ():
        if other in index.group_fields:
            code_S[index.groups(other)[1] != NO_GROUP] = NO_GROUP
    return code_S, names


def _people(index: ShardIndex, sample_N: NDArray[np.int64]) -> list[tuple[str, ...]] | None:
    people: list[tuple[str, ...]] = [()] * len(sample_N)
    for field in IDENTITY_FIELDS:
        if field in index.group_fields:
            names, code_S = index.groups(field)
            codes = code_S[sample_N].tolist()
            people = [p if c == NO_GROUP else (*p, names[c]) for p, c in zip(people, codes, strict=True)]
    return people if any(people) else None


def _check(found: LabelledSet, *, setting: str) -> None:
    if len(found.names) < 2 or len(found.sample_N) < MIN_SAMPLES:
        raise DataError(
            f"{setting} by {found.field}: {len(found.sample_N)} readable samples of {len(found.names)} classes can be "
            f"probed, but {MIN_SAMPLES} samples of two classes are needed: add samples, or raise --probe_samples"
        )
