"""Fingerprints of the images and identities in a set of shards, to find leakage between training and test sets.

A detector keeps the fingerprints of its training and validation sets. An evaluation, perhaps elsewhere and much later,
compares them with those of its test sets. Each is a uint64: of an image its CRC-32 (high half) and its length in bytes
(low half), of an identity the first 8 bytes of a SHA-256.

Shapes: N distinct fingerprints, ascending.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards.index import NO_GROUP, ShardIndex
from trainer.data.shards.members import IDENTITY_FIELDS


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """The distinct images and identities of a set."""

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
        """Describe what both sets contain; empty if nothing."""
        images = len(np.intersect1d(self.images_N, other.images_N, assume_unique=True))
        people = len(np.intersect1d(self.people_N, other.people_N, assume_unique=True))
        parts = [f"{count} {noun}" for count, noun in ((people, "people"), (images, "identical images")) if count]
        return " and ".join(parts)


def fingerprints_of(index: ShardIndex) -> Fingerprints:
    """Compute the fingerprints of all images, and of the identities that the samples name."""
    images = (index.image_crc32.astype(np.uint64) << np.uint64(32)) | (index.image_bytes.astype(np.uint64) % (1 << 32))
    people: set[int] = set()
    for name in IDENTITY_FIELDS:
        if name in index.group_fields:
            values, codes_N = index.groups(name)
            people |= {_fingerprint(values[code]) for code in np.unique(codes_N).tolist() if code != NO_GROUP}
    return Fingerprints(np.unique(images), np.array(sorted(people), dtype=np.uint64))


def _fingerprint(identity: str) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:8], "big")
