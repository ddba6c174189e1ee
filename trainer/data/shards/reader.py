"""Reads samples of indexed shards: image bytes, labels, landmarks."""

import json
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.byte_ranges import ByteRangeReader
from trainer.data.shards.contents import with_retries
from trainer.data.shards.index import SampleRef
from trainer.data.shards.members import LANDMARKS
from trainer.data.storage import Span
from trainer.errors import DataError, SampleError


class ShardReader:
    """Reads image bytes and checks them. A read that fails is tried again, with growing pauses."""

    def __init__(
        self, spans: ByteRangeReader | None = None, *, num_retries: int = 4, first_wait_s: float = 0.5
    ) -> None:
        self._spans = spans or ByteRangeReader()
        self._num_retries, self._first_wait_s = num_retries, first_wait_s

    def read(self, ref: SampleRef) -> bytes:
        """Return the image bytes of one sample.

        Raises:
            SampleError: the bytes differ from the indexed ones (reason ``checksum``).
            DataError: the shard is gone, shorter than indexed, or every attempt to read it failed.
        """
        return self.check(ref, self.read_all([ref])[0])

    def read_all(self, refs: Sequence[SampleRef], blocks: Sequence[Span] | None = None) -> list[bytes]:
        """Return the bytes of several samples, unchecked; blocks as in `ByteRangeReader.read`.

        Raises:
            DataError: as `read`.
        """
        return self._read_spans([Span(ref.shard, ref.offset, ref.size) for ref in refs], refs, blocks)

    def _read_spans(
        self, spans: list[Span], refs: Sequence[SampleRef], blocks: Sequence[Span] | None = None
    ) -> list[bytes]:
        def describe(error: OSError, attempts: int) -> str:
            key = next((ref.key for ref in refs if ref.shard == error.filename), refs[0].key)
            return (
                f"shard {error.filename}: {key} cannot be read ({error.strerror}) after {attempts} attempts: "
                "check the storage, then resume"
            )

        return with_retries(
            lambda: self._spans.read(spans, blocks),
            describe,
            on_failure=lambda error: self._spans.forget(str(error.filename)),
            num_retries=self._num_retries,
            first_wait_s=self._first_wait_s,
        )

    def read_landmarks(self, refs: Sequence[SampleRef]) -> list[NDArray[np.float32] | None]:
        """Return the landmarks (L, 2) of several samples [pixels]; None for a sample without valid ones."""
        have = [ref for ref in refs if ref.landmarks_size]
        spans = [Span(ref.shard, ref.landmarks_offset, ref.landmarks_size) for ref in have]
        texts = iter(self._read_spans(spans, have))
        return [_landmarks_of(next(texts)) if ref.landmarks_size else None for ref in refs]

    def check(self, ref: SampleRef, payload: bytes) -> bytes:
        """Return the payload if it equals the indexed one; raises as `read`."""
        if len(payload) < ref.size:
            raise DataError(f"shard {ref.shard} is shorter than when it was indexed: restore the file")
        if zlib.crc32(payload) != ref.crc32:
            raise SampleError("checksum", f"{ref.key} in {ref.shard} differs from what was indexed")
        return payload


def _landmarks_of(text: bytes) -> NDArray[np.float32] | None:
    try:
        points_L2 = np.asarray(json.loads(text)[LANDMARKS], dtype=np.float32)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    valid = points_L2.ndim == 2 and points_L2.shape[1] == 2 and len(points_L2) >= 3 and np.isfinite(points_L2).all()
    return points_L2 if valid else None
