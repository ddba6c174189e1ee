"""The strict walk through a tar: every member, every byte, or an error.

Python's own ``tarfile`` takes a damaged header in the middle for the end of the archive and silently returns fewer
members, and it opens compressed archives of any size. Here everything that is not a complete, plain tar is refused.

A tar is a sequence of blocks of 512 bytes. A member is one header block, then its bytes, padded with zeros to a whole
block; a file of 700 bytes takes 512 + 1024 bytes. What does not fit into a header (names above 100 bytes, sizes above
8 GiB) comes in a member in front of it: an extended header of pax records, or GNU's long name. Two blocks of zeros end
the archive, and writers fill the last record (20 blocks by default) with more zeros.

Source: POSIX.1-2001, pax; GNU tar manual, "Basic Tar Format".
"""

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.data.storage import ReadOnly, reading, stamp
from trainer.errors import DataError

MAX_MEMBER_BYTES = 256 << 20
BLOCK_BYTES = tarfile.BLOCKSIZE
RECORD_BYTES = tarfile.RECORDSIZE
"""Writers fill a tar with zeros to a multiple of this: 20 blocks."""

_MAX_EXTENDED_HEADER_BYTES = 1 << 20
_MAX_PADDING_BYTES = 64 << 10
"""This much padding is always accepted; writers fill a record of 10 kB by default."""
_LONG_RECORDS_BLOCKS = (256, 512, 1024, 2048)
"""Longer records in common use: powers of two up to tar -b 2048, for tapes and parallel file systems [blocks]."""
_CHUNK_BYTES = 1 << 20
_PACK = "write plain, uncompressed tars with tools/make_shards.py"
_MAGIC = {
    b"\x1f\x8b": ("gzip-compressed", "decompress it with gunzip (images do not shrink)"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "decompress it with unzstd"),
    b"\xfd7zXZ": ("xz-compressed", "decompress it with unxz"),
    b"BZh": ("bzip2-compressed", "decompress it with bunzip2"),
    b"\x04\x22\x4d\x18": ("lz4-compressed", "decompress it with unlz4"),
    b"PK\x03\x04": ("a zip file", "unpack it with unzip, then pack the images with tools/make_shards.py"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-zip file", "unpack it with 7z x, then pack the images with tools/make_shards.py"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "bring the file with git lfs pull"),
}
_WEB_PAGE = ("a web page or a message, perhaps of a failed download, not a tar file", "download it again")
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_GNU_DIRECTORY, _GNU_VOLUME_LABEL = b"D", b"V"
"""A folder with the list of its files (tar --listed-incremental), and the name of the archive (tar --label)."""
_GNU_MAGIC = b"ustar  \0"
_REFUSED = {
    tarfile.LNKTYPE: ("a hard link", "write the tar with --hard-dereference, or copy the file with {repair}"),
    tarfile.SYMTYPE: ("a symbolic link", "write the tar with --dereference (-h)"),
    tarfile.GNUTYPE_SPARSE: ("a sparse file", "write the tar without --sparse (-S)"),
    b"M": ("the rest of another volume", "join the volumes: tar --multi-volume extracts them"),
}
_REPAIR = "tools/check_shards.py --repair FOLDER"


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file inside a tar."""

    name: str
    offset: int
    """Offset of its bytes in the tar [bytes]."""
    size: int
    crc32: int
    payload: bytes | None
    """The bytes themselves, of small members only."""


def walk_tar(
    location: str | os.PathLike[str], *, digest: "hashlib._Hash | None" = None, keep_payload_below: int = 0
) -> Iterator[Member]:
    """Yield every regular file of a plain tar in order; read every byte of the tar once.

    Args:
        location: the tar, a path or a URL.
        digest: is updated with every byte of the file.
        keep_payload_below: members smaller than this carry their bytes [bytes].

    Raises:
        DataError: it is no tar, compressed, cut or damaged, or holds links or sparse files.
    """
    location = os.fspath(location)
    try:
        total = stamp(location)["num_bytes"]
        with reading(location) as file:
            yield from _TarWalk(location, file, total, digest, keep_payload_below)
    except OSError as error:
        raise DataError(f"{location} cannot be read ({error.strerror}): check the storage and permissions") from error


def parse_header(block: bytes) -> tarfile.TarInfo:
    """Parse one header block.

    ``tarfile`` reads bytes 345 to 500 as the beginning of the name in every format, but GNU tar keeps dates there.

    Raises:
        tarfile.HeaderError: it is no header, or damaged.
    """
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if block[257:265] == _GNU_MAGIC:
        info.name = _text(block[:100].partition(b"\0")[0])
    return info


class _TarWalk:
    def __init__(
        self, location: str, file: ReadOnly, total: int, digest: "hashlib._Hash | None", keep_payload_below: int
    ) -> None:
        self._location, self._file, self._digest, self._keep_below = location, file, digest, keep_payload_below
        self._position, self._total = 0, total

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}  # from extended headers: name and size of the member that follows them
        while not self._at_end(header := self._read_exactly(BLOCK_BYTES, "a header"), extended):
            info = self._parse(header)
            size = self._number(extended["size"]) if "size" in extended else info.size
            if size < 0:
                raise self._broken(f"the header at byte {self._position - BLOCK_BYTES} gives the size {size}")
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended |= self._pax_records(self._padded(size, _MAX_EXTENDED_HEADER_BYTES))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(self._padded(size, _MAX_EXTENDED_HEADER_BYTES).rstrip(b"\0"))
            elif info.type == tarfile.XGLTYPE:
                self._check_global(self._pax_records(self._padded(size, _MAX_EXTENDED_HEADER_BYTES)))
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                self._padded(size, _MAX_EXTENDED_HEADER_BYTES)
            else:
                name = extended.get("path", info.name)
                self._check_kind(info, name, extended)
                extended = {}
                if info.type in _REGULAR:
                    yield self._read_member(name, size)
                elif info.type != tarfile.DIRTYPE:  # a folder may state a size, but no bytes follow
                    self._padded(size, _MAX_EXTENDED_HEADER_BYTES)

    def _read_member(self, name: str, size: int) -> Member:
        if size > MAX_MEMBER_BYTES:
            raise self._broken(f"member {name!r} has {size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
        offset = self._position
        crc, kept, left = 0, [], size
        while left:
            chunk = self._read_exactly(min(left, _CHUNK_BYTES), f"member {name!r}")
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            if size < self._keep_below:
                kept.append(chunk)
        self._read_exactly(-size % BLOCK_BYTES, f"the padding of {name!r}")
        return Member(name, offset, size, crc, b"".join(kept) if size < self._keep_below else None)

    def _parse(self, header: bytes) -> tarfile.TarInfo:
        try:
            return parse_header(header)
        except tarfile.HeaderError as error:
            if self._position > BLOCK_BYTES:
                raise self._broken(f"the header at byte {self._position - BLOCK_BYTES} is damaged ({error})") from error
            known = (found for magic, found in _MAGIC.items() if header.startswith(magic))
            kind, remedy = next(known, ("not a tar file", _PACK))
            if header.lstrip()[:1] in (b"<", b"{"):
                kind, remedy = _WEB_PAGE
            raise self._broken(f"it is {kind}", remedy) from error

    def _check_kind(self, info: tarfile.TarInfo, name: str, extended: dict[str, str]) -> None:
        kind = info.type
        if any(field.startswith("GNU.sparse") for field in extended):
            kind = tarfile.GNUTYPE_SPARSE
        if kind not in (*_REGULAR, tarfile.DIRTYPE, _GNU_DIRECTORY, _GNU_VOLUME_LABEL):
            what, remedy = _REFUSED.get(kind, ("a device or of an unknown kind", "store regular files only"))
            raise self._broken(f"member {name!r} is {what}", remedy.format(repair=_REPAIR))

    def _pax_records(self, block: bytes) -> dict[str, str]:
        r"""Parse ``LENGTH NAME=VALUE NEWLINE`` records (POSIX.1-2001, pax extended header).

        LENGTH counts the whole record, with its own digits and the newline: ``12 path=a/b\n`` has 12 bytes. A value may
        contain newlines, so only LENGTH finds the next record.
        """
        records, rest = {}, block
        while rest.rstrip(b"\0"):
            match = re.match(rb"([0-9]{1,9}) ([^= \n][^=\n]*)=", rest)
            end = int(match[1]) if match else 0
            if not match or not match.end() < end <= len(rest) or rest[end - 1 : end] != b"\n":
                raise self._broken(f"the extended header before byte {self._position} is damaged")
            records[_text(match[2])] = _text(rest[match.end() : end - 1])
            rest = rest[end:]
        return records

    def _number(self, text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise self._broken(f"the extended header before byte {self._position} gives the size {text[:20]!r}")
        return int(text)

    def _check_global(self, records: dict[str, str]) -> None:
        """Accept comments for the whole archive; refuse records that would rename or resize its members."""
        for name in records:
            if name in ("path", "linkpath", "size") or name.startswith("GNU.sparse"):
                raise self._broken(f"a global header sets {name!r} for every member")

    def _at_end(self, header: bytes, extended: dict[str, str]) -> bool:
        """Whether the archive ends here; then only a plausible amount of zeros may follow."""
        if header.strip(b"\0"):
            return False
        if extended:
            raise self._broken(f"the member of the extended header before byte {self._position} is missing")
        if not self._is_padding(self._total - self._position):
            start = self._position - BLOCK_BYTES
            raise self._broken(
                f"from byte {start} on it holds {self._total - start} zeros, perhaps of an interrupted copy"
            )
        while self._position < self._total:
            if self._read_exactly(min(_CHUNK_BYTES, self._total - self._position), "the end").strip(b"\0"):
                raise self._broken("data stands behind its end mark", "join tars with tar -A, not with cat")
        return True

    def _is_padding(self, num_bytes: int) -> bool:
        """Whether ``num_bytes`` zeros behind the first block of the end mark may fill a last record.

        If so, the tar is a multiple of that record, and the padding is no longer than the record. Example: tar -b 256
        writes a multiple of 131,072 bytes, of which the last 131,072 may be zeros.
        """
        if num_bytes <= _MAX_PADDING_BYTES:
            return True
        records = (BLOCK_BYTES * blocks for blocks in _LONG_RECORDS_BLOCKS)
        return any(self._total % record == 0 and num_bytes <= record for record in records)

    def _padded(self, size: int, limit: int) -> bytes:
        if size > limit:
            raise self._broken(f"the extended header at byte {self._position} claims {size} bytes")
        return self._read_exactly(size + -size % BLOCK_BYTES, "an extended header")[:size]

    def _read_exactly(self, size: int, what: str) -> bytes:
        chunk = self._file.read(size)
        self._position += len(chunk)
        if self._digest is not None:
            self._digest.update(chunk)
        if len(chunk) < size:
            if self._total == 0:
                raise self._broken("it is empty (0 bytes)")
            if self._position == len(chunk):  # shorter than one header: perhaps another kind of file
                self._parse(chunk.ljust(BLOCK_BYTES, b"\0"))
            raise self._broken(f"it ends at byte {self._position}, inside {what} or before its end mark: it was cut")
        return chunk

    def _broken(self, problem: str, remedy: str = "copy or write this shard again") -> DataError:
        return DataError(f"shard {self._location}: {problem}: {remedy}")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
