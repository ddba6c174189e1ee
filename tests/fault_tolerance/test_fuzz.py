"""Ten thousand mutated shards and images: a typed refusal or a right result, in bounded time and memory.

A failure names its seed, from which `tar_mutant` or `image_mutant` makes that one input again.
"""

import faulthandler
import io
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.formats import (
    BLOCK,
    END,
    MIB,
    PNG_MAGIC,
    STRAY,
    base256,
    chunk,
    encoded,
    exif_with,
    little_memory,
    padded,
    pax,
    raw_pax,
    segment,
    tar_header,
    with_checksum,
    with_segments,
)
from tests.helpers.shards import display_p3
from trainer.data.shards.members import samples_of
from trainer.data.shards.tar import Member, walk_tar
from trainer.data.transforms.decode import colour_profile, decode_image, upright_jpeg_size
from trainer.errors import DataError, SampleError

pytestmark = pytest.mark.slow

INPUTS_PER_KIND = 625
SECONDS_PER_INPUT = 5
MAX_PIXELS = 1_000_000
REASONS = {"empty", "not_an_image", "too_large", "too_small", "corrupt"}

Mutation = Callable[[np.random.Generator, bytes], bytes]


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Ends a loop that never comes back: in Python by a failure, in a C library by the traceback of a killed run."""

    def late(*_: object) -> None:
        pytest.fail(f"more than {SECONDS_PER_INPUT} s for one input")  # no Exception: nothing below catches it

    before = signal.signal(signal.SIGALRM, late)
    faulthandler.dump_traceback_later(180, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, before)


@contextmanager
def one_input(*seed: object) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_INPUT)
    try:
        yield
    except BaseException as error:
        error.add_note(f"the input of seed {seed}")
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---------------------------------------------------------------------------------------------- blind mutations


def somewhere(rng: np.random.Generator, raw: bytes, step: int = 1) -> int:
    """A place in the bytes; every other time a multiple of the step, one time in three near the beginning."""
    end = min(len(raw), 800) if rng.integers(3) == 0 else len(raw)
    at = int(rng.integers(end))
    return at - at % step if rng.integers(2) else at


def flip(rng: np.random.Generator, raw: bytes) -> bytes:
    """Change a few bytes, in blocks of their own: several in one tar header could cancel out in its check sum."""
    changed = bytearray(raw)
    places = [somewhere(rng, raw) for _ in range(rng.integers(1, 5))]
    for at in {at // BLOCK: at for at in places}.values():
        changed[at] ^= int(rng.integers(1, 256)) if rng.integers(2) else 1 << int(rng.integers(8))
    return bytes(changed)


def cut(rng: np.random.Generator, raw: bytes) -> bytes:
    return raw[: int(rng.integers(len(raw)))]


def insert(rng: np.random.Generator, raw: bytes) -> bytes:
    at, size = somewhere(rng, raw, BLOCK), int(rng.choice([1, 7, 511, 512, 513, 1024]))
    return raw[:at] + (rng.bytes(size) if rng.integers(2) else bytes(size)) + raw[at:]


def duplicate(rng: np.random.Generator, raw: bytes) -> bytes:
    source, at = somewhere(rng, raw, BLOCK), somewhere(rng, raw, BLOCK)
    return raw[:at] + raw[source : source + int(rng.choice([16, BLOCK]))] + raw[at:]


def zero(rng: np.random.Generator, raw: bytes) -> bytes:
    at = somewhere(rng, raw, BLOCK)
    size = min(int(rng.choice([1, 16, 200, BLOCK])), len(raw) - at)
    return raw[:at] + bytes(size) + raw[at + size :]


def overwrite(rng: np.random.Generator, raw: bytes) -> bytes:
    """Put a copy of one block, perhaps a header, over another."""
    source, at = (int(rng.integers(len(raw) // BLOCK)) * BLOCK for _ in range(2))
    return raw[:at] + raw[source : source + BLOCK] + raw[at + BLOCK :]


BLIND: dict[str, Mutation] = {f.__name__: f for f in (flip, cut, insert, duplicate, zero, overwrite)}


# ---------------------------------------------------------------------------------------------- tars


def tar_of(long_name: Callable[[str], bytes]) -> bytes:
    """Four samples of an image and a json, no member empty; longer names stand in front of each header."""
    rng, parts = np.random.default_rng(0), []
    for name in (f"s{i}.{suffix}" for i in range(4) for suffix in ("jpg", "json")):
        payload = rng.bytes(int(rng.integers(1, 1500)))
        parts += [long_name(name), tar_header(name.encode(), len(payload)), padded(payload)]
    return b"".join([*parts, END])


TARS = [
    tar_of(lambda name: b""),
    tar_of(lambda name: pax(("path", "n" * 120 + "/" + name), ("mtime", "1.5"))),
    tar_of(lambda name: tar_header(b"L", 130, b"L") + padded(b"n" * 120 + b"/" + name.encode() + b"\0")),
]


def headers_in(raw: bytes) -> list[int]:
    return [at for at in range(0, len(raw), BLOCK) if raw[at + 257 : at + 262] == b"ustar"]


def field(rng: np.random.Generator, raw: bytes) -> bytes:
    """Set fields of one header to what hurts, and make its check sum right again."""
    at = int(rng.choice(headers_in(raw)))
    header = raw[at : at + BLOCK]
    number = int(rng.choice([0, 1, 511, 512, 513, 1500, 1 << 20, 1 << 28, (1 << 28) + 1, 8 << 30, -1, -512, -513]))
    wild = rng.bytes(int(rng.integers(1, 13)))
    start, value = [
        (124, base256(number)),
        (124, b"%011o\0" % max(number, 0)),
        (124, b"%o" % number),
        (124, wild.ljust(12, b" ")),
        (124, bytes(12)),
        (156, bytes([int(rng.integers(256))])),
        (156, bytes([int(rng.choice(list(b"xgXLKSV1257")))])),
        (0, wild),
        (0, bytes(100)),
        (0, b"../" * 33),
        (257, wild),
        (257, bytes(8)),
        (345, wild),
        (int(rng.integers(BLOCK - 12)), wild),
    ][int(rng.integers(14))]
    return raw[:at] + with_checksum(header[:start] + value + header[start + len(value) :])[:BLOCK] + raw[at + BLOCK :]


def extended(rng: np.random.Generator, raw: bytes) -> bytes:
    """Put one more extended header, true or lying, in front of some header."""
    at = int(rng.choice(headers_in(raw)))
    name = str(
        rng.choice(["path", "size", "linkpath", "mtime", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset", "x"])
    )
    value = str(rng.choice(["", "0", "5", "-5", "511", "9" * 30, "9" * 5000, "\u0665", "/etc/x", "a\0b", "a=b", "\n"]))
    true = pax((name, value), kind=bytes([int(rng.choice(list(b"xgX")))]))
    content = bytearray(true[BLOCK:].rstrip(b"\0"))
    for _ in range(rng.integers(1, 4)):
        content[int(rng.integers(len(content)))] = int(rng.choice(list(b"0123456789 =\n\0x")))
    lying = raw_pax(bytes(content))
    long_name = tar_header(b"L", int(rng.integers(600)), b"L") + padded(rng.bytes(int(rng.integers(600))))
    return raw[:at] + [true, lying, long_name][int(rng.integers(3))] + raw[at:]


TAR_MUTATIONS = BLIND | {"field": field, "extended": extended}


def tar_mutant(kind: str, number: int) -> tuple[bytes, bytes]:
    """Return one of the tars and its mutant."""
    rng = np.random.default_rng([list(TAR_MUTATIONS).index(kind), number])
    raw = TARS[number % len(TARS)]
    return raw, TAR_MUTATIONS[kind](rng, raw)


def images_among(members: list[Member]) -> list[tuple[int, int]]:
    samples = samples_of("a.tar", iter(members))
    return [(sample.image.offset, sample.image.size) for sample in samples if sample.image is not None]


def check_members(members: list[Member], raw: bytes) -> None:
    end = 0
    for member in members:
        assert member.offset % BLOCK == 0
        assert member.offset >= end + BLOCK
        end = member.offset + member.size
        assert 0 <= member.size <= len(raw) - member.offset
        assert member.crc32 == zlib.crc32(raw[member.offset : end])
        assert member.payload == raw[member.offset : end]


@pytest.mark.parametrize("kind", TAR_MUTATIONS)
def test_a_mutated_tar_is_refused_or_loses_no_sample(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    num_refused = 0
    with little_memory(64 * MIB):
        for number in range(INPUTS_PER_KIND):
            raw, mutant = tar_mutant(kind, number)
            path.write_bytes(raw)
            whole = images_among(list(walk_tar(path)))
            path.write_bytes(mutant)
            with one_input(kind, number):
                try:
                    members = list(walk_tar(path, keep_payload_below=1 << 30))
                    check_members(members, mutant)
                    found = images_among(members)
                except DataError as error:
                    assert STRAY not in str(error)
                    num_refused += 1
                    continue
                if kind == "overwrite":  # below a long name of its own another header is as good, but for the size
                    assert [offset for offset, _ in found] == [offset for offset, _ in whole]
                elif kind in BLIND:  # the others are whole tars, only of another content
                    assert found == whole
    assert 0 < num_refused < INPUTS_PER_KIND


# ---------------------------------------------------------------------------------------------- images


def photo(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 8, (48, 40, 3))
    y, x = np.mgrid[:48, :40]
    smooth = np.stack([y * 5, x * 6, (x + y) * 2], axis=2)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


@cache
def jpegs() -> list[bytes]:
    icc = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(300))
    return [
        encoded(photo(), "JPEG"),
        encoded(photo("L"), "JPEG"),
        encoded(photo("CMYK"), "JPEG"),
        encoded(photo(), "JPEG", progressive=True),
        encoded(photo(), "JPEG", restart_marker_blocks=2, subsampling=0),
        encoded(photo(), "JPEG", keep_rgb=True),
        with_segments(encoded(photo(), "JPEG", exif=exif_with(6)), icc, segment(0xED, b"Photoshop 3.0\0008BIM\0\0")),
        encoded(photo("CMYK"), "JPEG", exif=exif_with(5)),
    ]


@cache
def pngs() -> list[bytes]:
    deep = Image.fromarray(np.asarray(photo("L")) * np.uint16(257))
    palette = photo().quantize(16)
    return [
        encoded(photo(), "PNG"),
        encoded(photo("L"), "PNG"),
        encoded(photo("RGBA"), "PNG", exif=exif_with(8)),
        encoded(photo("LA"), "PNG"),
        encoded(photo("1"), "PNG"),
        encoded(palette, "PNG"),
        encoded(palette, "PNG", transparency=3),
        encoded(deep, "PNG"),
    ]


def splice(rng: np.random.Generator, raw: bytes) -> bytes:
    """Go on with another image in the middle."""
    others = jpegs() if raw.startswith(b"\xff\xd8") else pngs()
    other = others[int(rng.integers(len(others)))]
    return raw[: somewhere(rng, raw)] + other[somewhere(rng, other) :]


def jpeg_segments(raw: bytes) -> list[int]:
    """Where the segments up to the first scan begin."""
    found, at = [], 2
    while raw[at + 1] != 0xDA:
        found.append(at)
        at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return [*found, at]


def jpeg_field(rng: np.random.Generator, raw: bytes) -> bytes:
    """Change the marker, the length, or a few bytes of one segment, or give the frame another size."""
    changed = bytearray(raw)
    at = int(rng.choice(jpeg_segments(raw)))
    length = int.from_bytes(raw[at + 2 : at + 4], "big")
    match int(rng.integers(4)):
        case 0:
            changed[at + 1] = int(rng.integers(0xC0, 0x100))
        case 1:
            changed[at + 2 : at + 4] = int(rng.choice([0, 1, 2, 3, length - 1, length + 1, 65535])).to_bytes(2, "big")
        case 2:
            for _ in range(rng.integers(1, 6)):
                changed[at + 4 + int(rng.integers(length - 2))] = int(rng.choice([0, 1, 4, 17, 0x7F, 0x80, 0xFF]))
        case 3:
            frame = next(at for at in jpeg_segments(raw) if raw[at + 1] in (0xC0, 0xC1, 0xC2))
            sides = rng.choice([0, 1, 7, 8, 40, 999, 1001, 65535], size=2)
            changed[frame + 5 : frame + 9] = struct.pack(">HH", *sides.tolist())
    return bytes(changed)


def png_chunks(raw: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(PNG_MAGIC)
    while at < len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        found.append((raw[at + 4 : at + 8], raw[at + 8 : end - 4]))
        at = end
    return found


def png_field(rng: np.random.Generator, raw: bytes) -> bytes:
    """Change, drop, repeat, rename or add a chunk, all check sums right."""
    chunks = png_chunks(raw)
    at = int(rng.integers(len(chunks)))
    kind, content = chunks[at]
    match int(rng.integers(6)):
        case 0:
            chunks[at] = (kind, flip(rng, content) if content else rng.bytes(5))
        case 1:
            del chunks[at]
        case 2:
            chunks.insert(int(rng.integers(len(chunks))), (kind, content))
        case 3:
            names = [b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"qqqq"]
            chunks[at] = (names[int(rng.integers(len(names)))], content)
        case 4:
            width, height = (int(rng.choice([0, 1, 8, 40, 999, 1001, 2**31 - 1, 2**32 - 1])) for _ in range(2))
            odd = [int(rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])) for _ in range(2)]
            chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", width, height, *odd, 0, 0, int(rng.integers(3))))
        case 5:
            names = [b"tRNS", b"PLTE", b"gAMA", b"pHYs", b"cHRM", b"sRGB", b"iTXt", b"zTXt", b"tEXt", b"iCCP", b"eXIf"]
            chunks.insert(1, (names[int(rng.integers(len(names)))], rng.bytes(int(rng.integers(40)))))
    return PNG_MAGIC + b"".join(chunk(*each) for each in chunks)


def image_field(rng: np.random.Generator, raw: bytes) -> bytes:
    return jpeg_field(rng, raw) if raw.startswith(b"\xff\xd8") else png_field(rng, raw)


def metadata(rng: np.random.Generator, raw: bytes) -> bytes:
    """Add damaged EXIF."""
    exif = bytearray(exif_with(int(rng.integers(1, 9))))
    for _ in range(rng.integers(1, 6)):
        exif[int(rng.integers(6, len(exif)))] = int(rng.choice([0, 1, 2, 3, 5, 8, 12, 13, 16, 0x12, 0x7F, 0xFF]))
    odd = bytes(exif[: int(rng.integers(6, len(exif) + 1))])
    if raw.startswith(b"\xff\xd8"):
        return with_segments(raw, segment(0xE1, odd))
    return raw[:33] + chunk(b"eXIf", odd[6:]) + raw[33:]


IMAGE_MUTATIONS = {**BLIND, "splice": splice, "field": image_field, "metadata": metadata}
del IMAGE_MUTATIONS["overwrite"]  # blocks mean nothing in an image


def image_mutant(kind: str, number: int) -> tuple[np.random.Generator, bytes]:
    """Return one mutant and the generator that goes on drawing for it."""
    rng = np.random.default_rng([100 + list(IMAGE_MUTATIONS).index(kind), number])
    images = jpegs() + pngs()
    return rng, IMAGE_MUTATIONS[kind](rng, images[number % len(images)])


def check_image(image_HWC: np.ndarray, size: tuple[int, int] | None, shrink: int) -> None:
    assert image_HWC.dtype == np.uint8
    assert image_HWC.ndim == 3
    assert image_HWC.shape[2] == 3
    assert image_HWC.flags.c_contiguous
    assert 0 < image_HWC.shape[0] * image_HWC.shape[1] <= MAX_PIXELS
    if size is not None:
        assert image_HWC.shape[:2] == (-(-size[0] // shrink), -(-size[1] // shrink))


@pytest.mark.parametrize("kind", IMAGE_MUTATIONS)
def test_a_mutated_image_is_refused_with_a_reason_or_decoded(kind: str) -> None:
    num_refused = 0
    with little_memory(128 * MIB):
        for number in range(INPUTS_PER_KIND):
            rng, mutant = image_mutant(kind, number)
            shrink, fast = int(rng.choice([1, 1, 2, 4, 8])), bool(rng.integers(2))
            with one_input(kind, number):
                try:
                    image_HWC = decode_image(mutant, shrink=shrink, fast=fast, max_pixels=MAX_PIXELS)
                except SampleError as error:
                    assert error.reason in REASONS, error.reason
                    num_refused += 1
                else:
                    check_image(image_HWC, upright_jpeg_size(mutant), shrink)
    if kind == "metadata":
        assert num_refused == 0  # however damaged they are
    else:
        assert 0 < num_refused < INPUTS_PER_KIND


def test_a_mutated_webp_or_colour_profile_is_refused_with_a_reason_or_decoded() -> None:
    image = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3))
    files = []
    for kind, options in (("WEBP", {}), ("WEBP", {"lossless": True}), ("JPEG", {}), ("PNG", {})):
        file = io.BytesIO()
        image.save(file, kind, icc_profile=display_p3(), **options)
        files.append(file.getvalue())
    blind, outcomes = [f for name, f in BLIND.items() if name != "overwrite"], set()
    with little_memory(128 * MIB):
        for number in range(INPUTS_PER_KIND // 3):
            rng = np.random.default_rng([300, number])
            mutant = blind[number % len(blind)](rng, files[int(rng.integers(len(files)))])
            with one_input("webp", number):
                try:
                    check_image(decode_image(mutant, srgb=True, max_pixels=MAX_PIXELS), None, 1)
                    outcomes.add("decoded")
                except SampleError as error:
                    outcomes.add(error.reason)
                colour_profile(mutant)
    assert {"decoded", "corrupt"} <= outcomes <= REASONS | {"decoded"}


def test_the_mutants_number_ten_thousand() -> None:
    assert INPUTS_PER_KIND * (len(TAR_MUTATIONS) + len(IMAGE_MUTATIONS)) >= 10_000
