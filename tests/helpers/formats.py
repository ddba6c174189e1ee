"""Tar headers, PNG chunks and JPEG segments byte by byte, as no library writes them; and a bound on memory."""

import io
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

BLOCK = 512
END = bytes(2 * BLOCK)
MIB = 1 << 20
STRAY = "cannot be read"
"""Said of storage that fails, and so of any stray exception of the walk, which is not the refusal that is due."""
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@contextmanager
def little_memory(num_bytes: int) -> Iterator[None]:
    """Let this process grow by no more than so many bytes: more is a MemoryError, in C libraries too."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def tar_header(name: bytes = b"a.jpg", size: int | bytes = 5, kind: bytes = b"0") -> bytes:
    """One ustar header; bytes as the size stand in the field as they are."""
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    start = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
    return with_checksum((start.ljust(257, b"\0") + b"ustar\00000").ljust(BLOCK, b"\0"))


def base256(number: int) -> bytes:
    """A size as GNU tar writes it when 11 octal digits do not hold it."""
    return (0x80 if number >= 0 else 0xFF).to_bytes(1, "big") + number.to_bytes(11, "big", signed=True)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    content = b""
    for name, value in records:
        record = f" {name}={value}\n".encode("utf-8", "surrogateescape")
        length = next(n for n in range(len(record), len(record) + 9) if n == len(record) + len(str(n)))
        content += str(length).encode() + record
    return raw_pax(content, kind)


def raw_pax(content: bytes, kind: bytes = b"x") -> bytes:
    return tar_header(b"pax", len(content), kind) + padded(content)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG of unfiltered rows (each begins with a zero byte), with more chunks before and after its pixels."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG_MAGIC + start + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def flat_png(depth: int, colour: int, pixel: bytes, before: bytes = b"", side: int = 8) -> bytes:
    return png(side, side, depth, colour, (b"\0" + pixel * side) * side, before=before)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(payload: bytes, *segments: bytes) -> bytes:
    """A JPEG with more segments at its front."""
    return payload[:2] + b"".join(segments) + payload[2:]
