"""Who and what is in a set of shards, in eight bytes each, so that leaks between training and test sets are found.

A detector keeps the prints of its training and validation sets; an evaluation, perhaps elsewhere and long after,
compares those of its test sets. An image's print is its CRC-32 and its length; a person's is the start of a SHA-256.

Shapes: N distinct prints, ascending.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards.index import NO_GROUP, ShardIndex

_IDENTITY_FIELDS = ("identity", "identity_2")


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """The distinct images and people of a set, as uint64."""

    images_N: NDArray[np.uint64]
    people_N: NDArray[np.uint64]

    def save(self, path: Path) -> None:
        """Write a numpy .npz file."""
        with path.open("wb") as file:
            np.savez(file, images=self.images_N, people=self.people_N)

    @staticmethod
    def load(path: Path) -> "Fingerprints":
        """Read what `save` wrote; no code from the file is executed."""
        with np.load(path, allow_pickle=False) as arrays:
            return Fingerprints(arrays["images"], arrays["people"])

    def shared_with(self, other: "Fingerprints") -> str:
        """Describe what both sets hold; empty where nothing."""
        images, people = (
            len(np.intersect1d(ours, theirs, assume_unique=True))
            for ours, theirs in ((self.images_N, other.images_N), (self.people_N, other.people_N))
        )
        parts = [f"{count} {noun}" for count, noun in ((people, "people"), (images, "identical images")) if count]
        return " and ".join(parts)


def fingerprints_of(index: ShardIndex) -> Fingerprints:
    """Take the prints of all images and of both identities of each sample, where the samples name them."""
    images = (index.image_crc32.astype(np.uint64) << np.uint64(32)) | (index.image_bytes.astype(np.uint64) % (1 << 32))
    people: set[int] = set()
    for name in _IDENTITY_FIELDS:
        if name in index.group_fields:
            values, codes_N = index.groups(name)
            people |= {_print_of(values[code]) for code in np.unique(codes_N).tolist() if code != NO_GROUP}
    return Fingerprints(np.unique(images), np.array(sorted(people), dtype=np.uint64))


def _print_of(identity: str) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:8], "big")
