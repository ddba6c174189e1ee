"""Every way in which a shard or an image is known to break, and what must happen then: a typed error, never less data.

What `test_shards.py` and `test_decode.py` already show is not repeated here.
"""

import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.helpers.formats import (
    BLOCK,
    END,
    MIB,
    STRAY,
    base256,
    chunk,
    encoded,
    exif_with,
    flat_png,
    little_memory,
    padded,
    pax,
    png,
    raw_pax,
    segment,
    tar_header,
    with_segments,
)
from tests.helpers.shards import jpeg, write_tar
from trainer.data.shards.index import open_index
from trainer.data.shards.members import NO_LABEL
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.tar import Member, walk_tar
from trainer.data.transforms.decode import decode_image
from trainer.errors import DataError, SampleError

PLAIN = tar_header() + padded(b"hello")


def walked(path: Path, *parts: bytes) -> list[Member]:
    path.write_bytes(b"".join(parts))
    return list(walk_tar(path))


def reason_of(payload: bytes) -> str:
    with pytest.raises(SampleError) as caught:
        decode_image(payload)
    return caught.value.reason


def files_under(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_relative_to(folder / "index")}


# ---------------------------------------------------------------------------------------------- damaged tars


def small_tar(path: Path, format: int) -> list[Member]:
    long = "d" * 120 + "/" if format != tarfile.USTAR_FORMAT else ""
    write_tar(path, [("a.jpg", b"\xff" * 513), (f"{long}b.jpg", b"b"), ("c.jpg", b"c" * 512)], format=format)
    return list(walk_tar(path))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_cut_at_any_byte_is_an_error_or_loses_nothing(tmp_path: Path, format: int) -> None:
    path = tmp_path / "a.tar"
    whole = small_tar(path, format)
    content_end = whole[-1].offset + whole[-1].size
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        try:
            found = list(walk_tar(path))
        except DataError as error:
            assert STRAY not in str(error)
            continue
        assert found == whole
        assert length > content_end, f"cut at {length}, inside the content"


def test_any_flipped_bit_of_a_header_is_an_error_or_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = small_tar(path, tarfile.USTAR_FORMAT)
    raw = path.read_bytes()
    num_unnoticed = 0
    with path.open("r+b", buffering=0) as file:
        for member in whole:
            for at in range(member.offset - BLOCK, member.offset):
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << bit]), at)
                    try:
                        assert list(walk_tar(path)) == whole, f"byte {at}, bit {bit}"
                        num_unnoticed += 1
                    except DataError as error:
                        assert STRAY not in str(error)
                os.pwrite(file.fileno(), raw[at : at + 1], at)
    # The check sum covers all but itself; its own filler (a blank, leading zeros) may differ without changing it.
    assert num_unnoticed <= len(whole) * 12


def test_a_header_of_zeros_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = small_tar(path, tarfile.USTAR_FORMAT)
    raw = path.read_bytes()
    for member in whole:
        with pytest.raises(DataError, match="end mark"):
            walked(path, raw[: member.offset - BLOCK], bytes(BLOCK), raw[member.offset :])


def test_the_zeros_of_an_interrupted_copy_are_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", bytes([i]) * 2000) for i in range(1, 100)])
    raw = path.read_bytes()
    with pytest.raises(DataError, match="zeros"):  # a copy into a file of full length, stopped in the middle
        walked(path, raw[: len(raw) // 2], bytes(len(raw) - len(raw) // 2))


def test_any_flipped_bit_of_an_image_is_a_checksum_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    index = open_index([path])
    ref, reader, raw = index.sample(1), ShardReader(), path.read_bytes()
    assert reader.read(ref) == jpeg(2)
    with path.open("r+b", buffering=0) as file:
        for at in range(ref.offset, ref.offset + ref.size):
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << at % 8]), at)
            with pytest.raises(SampleError) as caught:
                reader.read(ref)
            assert caught.value.reason == "checksum"
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    assert reader.read(ref) == jpeg(2)


# ---------------------------------------------------------------------------------------------- hostile tars


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.SYMTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"M",
        b"N",
        b"A",
        b"Z",
        b"9",
        b"\xff",
    ],
)
def test_only_regular_files_are_taken(tmp_path: Path, kind: bytes) -> None:
    for size in (0, 5):
        with pytest.raises(DataError, match=r"a (hard|symbolic) link|a sparse file|a device|another volume|damaged"):
            walked(tmp_path / "a.tar", PLAIN, tar_header(kind=kind, size=size), padded(b"hello")[: size * BLOCK], END)


@pytest.mark.parametrize(
    "records",
    [
        (("GNU.sparse.size", "9"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.offset", "0")),
        (("GNU.sparse.map", "0,5"), ("GNU.sparse.name", "a.jpg")),
        (("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "99999999999")),
    ],
)
def test_sparse_files_in_pax_are_refused(tmp_path: Path, records: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(DataError, match="sparse"):
        walked(tmp_path / "a.tar", pax(*records), PLAIN, END)


@pytest.mark.parametrize("field", [b"77777777777", base256(8 << 30), base256((1 << 87) - 1)])
def test_a_member_that_claims_gigabytes_is_refused_unread(tmp_path: Path, field: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(size=field))
    os.truncate(path, 9 << 30)  # as long as it claims, without taking room on the disk
    start_s = time.process_time()
    with little_memory(32 * MIB), pytest.raises(DataError, match="limit"):
        open_index([path])
    assert time.process_time() - start_s < 0.5


def test_a_member_that_is_shorter_than_it_claims_costs_no_memory(tmp_path: Path) -> None:
    with little_memory(32 * MIB), pytest.raises(DataError, match="cut"):
        walked(tmp_path / "a.tar", tar_header(size=200 * MIB), b"hello")


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
def test_an_extended_header_that_claims_gigabytes_is_refused_unread(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(size=b"77777777777", kind=kind))
    os.truncate(path, 9 << 30)
    with little_memory(32 * MIB), pytest.raises(DataError, match="claims"):
        list(walk_tar(path))


@pytest.mark.parametrize("field", [base256(-1), base256(-BLOCK), base256(-BLOCK - 5), b"-0000000005"])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_a_negative_size_is_refused(tmp_path: Path, field: bytes, kind: bytes) -> None:
    with pytest.raises(DataError, match="gives the size -"):
        walked(tmp_path / "a.tar", tar_header(size=field, kind=kind), PLAIN, END)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-5",
        "+5",
        "5.0",
        "1_0",
        "0x5",
        " 5",
        "\u0665",
        "\uff15",
        "9" * 30,
        "9" * 5000,
    ],
)
def test_a_pax_size_that_is_no_size_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"gives the size|more than the limit|is damaged"):
        walked(tmp_path / "a.tar", pax(("size", text)), PLAIN, END)


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense",
        b"999 path=b.jpg\n",  # longer than the header
        b"13 path=b.jpg\n",  # one byte too short
        b"15 path=b.jpg\n\0",  # one too long
        b"14 path=b.jpgX",  # no end of line
        b"0 path=b.jpg\n",
        b"-14 path=b.jpg\n",
        b"14 pathXb.jpg\n",
        b"14  =b.jpgxxx\n",
        b"99999999999999999999 path=b.jpg\n",
        b"14 path=b.jpg\n3\n",
        b"14 path=b.jpg\n10 size=5\n\nzz",
    ],
)
def test_pax_records_that_lie_about_themselves_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    assert walked(path, raw_pax(b"14 path=b.jpg\n10 size=5\n"), PLAIN, END)[0].name == "b.jpg"
    with pytest.raises(DataError, match="damaged"):
        walked(path, raw_pax(content), PLAIN, END)


def test_pax_records_and_long_names_stand_above_the_header(tmp_path: Path) -> None:
    long = b"n" * 300 + b".jpg"
    found = walked(
        tmp_path / "a.tar",
        pax(("path", "\u00e9t\u00e9/\u4eba.jpg"), ("size", "5"), ("mtime", "1.5"), ("comment", "a=b\nc")),
        tar_header(size=0) + padded(b"hello"),
        pax(("comment", "of all"), kind=b"g"),
        tar_header(b"././@LongLink", len(long) + 1, b"L") + padded(long + b"\0"),
        PLAIN,
        PLAIN,
        END,
    )
    assert [member.name for member in found] == ["\u00e9t\u00e9/\u4eba.jpg", long.decode(), "a.jpg"]
    assert {(member.size, member.crc32) for member in found} == {(5, zlib.crc32(b"hello"))}


@pytest.mark.parametrize("record", [("path", "b.jpg"), ("size", "2"), ("GNU.sparse.major", "1")])
def test_global_records_that_would_change_members_are_refused(tmp_path: Path, record: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="a global header sets"):
        walked(tmp_path / "a.tar", pax(record, kind=b"g"), PLAIN, END)


@pytest.mark.parametrize("last", [pax(("path", "b.jpg")), tar_header(b"L", 5, b"L") + padded(b"b.jpg")])
def test_an_extended_header_without_its_member_is_a_loss(tmp_path: Path, last: bytes) -> None:
    with pytest.raises(DataError, match="is missing"):
        walked(tmp_path / "a.tar", PLAIN, last, END)


@pytest.mark.parametrize(
    "name", ["../../etc/x", "/etc/x", "a/../../../x", "..", "c:\\x", "~/x", "$HOME/x", "n\nx", ";x"]
)
def test_a_name_is_never_a_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    path = write_tar(tmp_path / "deep/er/a.tar", [("first.jpg", jpeg(1)), (f"{name}/b.jpg", jpeg(2))])
    before = files_under(tmp_path)
    index = open_index([path], index_dir=tmp_path / "index")
    ref = index.sample(1)
    assert ref.key == f"{name}/b"
    assert decode_image(ShardReader().read(ref)).shape == (40, 36, 3)
    assert files_under(tmp_path) == before
    assert not Path("/etc/x").exists()


def test_nothing_in_a_tar_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    evil = pickle.dumps(Evil())
    suffixes = ["pyd", "pickle", "pkl", "pth", "x.pyd", "pyd.gz", "npy", "json", "txt.gz", "__worker__.pyd"]
    members = [(f"face.{suffix}", evil) for suffix in suffixes]
    members += [("face.jpg", jpeg(1)), ("other.PYD", evil), ("other.PTH", evil), ("other.jpg", evil)]
    members += [("__evil__", evil), ("__evil__/x.pyd", evil), ("evil", evil)]
    index = open_index([write_tar(tmp_path / "a.tar", members)], index_dir=tmp_path / "index")
    payloads = [ShardReader().read(index.sample(i)) for i in range(len(index))]
    assert decode_image(payloads[0]).shape == (40, 36, 3)
    assert reason_of(payloads[1]) == "not_an_image"
    assert files_under(tmp_path) == {tmp_path / "a.tar"}
    pickle.loads(evil)
    assert (tmp_path / "owned").is_dir()  # so the pickle would have worked


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"PK\x03\x04", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS"),
        (b'{"error": "not found"}', "failed download"),
    ],
)
def test_what_poses_as_a_tar_is_called_by_its_name(tmp_path: Path, magic: bytes, kind: str) -> None:
    for length in (0, 4096):
        (tmp_path / "a.tar").write_bytes(magic + bytes(range(1, 256)) * (length // 255))
        with pytest.raises(DataError, match=kind):
            open_index([tmp_path / "a.tar"])


def test_a_compressed_image_member_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image member"):
        open_index([write_tar(tmp_path / "a.tar", [("a.jpg.gz", jpeg(1))])])


def test_a_mistake_of_the_program_is_not_called_a_failure_of_the_storage(tmp_path: Path) -> None:
    class Mistaken:
        def update(self, _: bytes) -> None:
            raise KeyError("a mistake")

    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1))])
    with pytest.raises(KeyError, match="a mistake"):
        list(walk_tar(path, digest=Mistaken()))


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "text", ["-1", "+1", "1_0", "0x1", "", " ", "1 2", "9999999999", "\u0661", "\uff11", "\u00b2", "1\0", "1e3", "23.5"]
)
def test_a_class_that_means_nothing_is_no_label_and_is_counted(tmp_path: Path, text: str) -> None:
    index = open_index([write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1)), ("a.cls", text.encode())])])
    assert index.labels.tolist() == [NO_LABEL]
    assert index.tally.unusable["label"] == 1


@pytest.mark.parametrize(
    ("suffix", "content", "label"),
    [
        ("cls", b" 7\n", 7),
        ("cls", b"007", 7),
        ("json", b'{"label": 7}', 7),
        ("json", b'{"label": 2147483647}', 2**31 - 1),
        ("json", b'{"label": 2147483648}', NO_LABEL),
        ("json", b'{"label": -1}', NO_LABEL),
        ("cls", b"1.0", 1),
        ("cls", b"bonafide", 0),
        ("json", b'{"label": 1.0}', 1),
        ("json", b'{"label": "7"}', 7),
        ("json", b'{"label": true}', 1),
        ("json", b'{"label": "Morph"}', 1),
        ("json", b'{"label": 0.5}', NO_LABEL),
        ("json", b'{"label": ' + b"9" * 5000 + b"}", NO_LABEL),
        ("json", b"[" * 60_000, NO_LABEL),
        ("json", b'\xff{"label": 7}', NO_LABEL),
        ("json", b"[7]", NO_LABEL),
        ("json", b"", NO_LABEL),
    ],
)
def test_a_label_is_a_class_number_or_none(tmp_path: Path, suffix: str, content: bytes, label: int) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1)), (f"a.{suffix}", content)])
    assert open_index([path]).labels.tolist() == [label]


# ---------------------------------------------------------------------------------------------- not an image


@pytest.mark.parametrize(
    ("payload", "reason"),
    [(b"", "empty"), (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "not_an_image")],
)
def test_a_failed_download_is_indexed_and_refused_when_decoded(tmp_path: Path, payload: bytes, reason: str) -> None:
    index = open_index([write_tar(tmp_path / "a.tar", [("a.jpg", payload), ("b.jpg", jpeg(1))])])
    assert reason_of(ShardReader().read(index.sample(0))) == reason
    assert ShardReader().read(index.sample(1)) == jpeg(1)


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "EPS", "PDF"])
def test_other_formats_named_jpg_are_refused(kind: str) -> None:
    payload = encoded(Image.new("RGB", (32, 32), (200, 100, 50)), kind)
    assert reason_of(payload) == "not_an_image"


@pytest.mark.parametrize("magic", [b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("rest", [b"", b"\0" * 100, b"<html>" * 100, b"\xff" * 100, b"\xff\xd8" * 100])
def test_a_right_beginning_is_not_enough(magic: bytes, rest: bytes) -> None:
    assert reason_of(magic + rest) == "corrupt"


# ---------------------------------------------------------------------------------------------- colour


PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (flat_png(8, 0, b"\x80"), (128, 128, 128)),
        (flat_png(16, 0, b"\x80\x40"), (128, 128, 128)),
        (flat_png(16, 0, b"\x01\x2c"), (1, 1, 1)),  # 300: convert() would make 255 of it
        (flat_png(16, 0, b"\x9c\x40"), (156, 156, 156)),
        (flat_png(16, 0, b"\xff\xff"), (255, 255, 255)),
        (flat_png(8, 2, b"\x0a\x14\x1e"), (10, 20, 30)),
        (flat_png(16, 2, b"\x0a\xff\x14\x00\x1e\x80"), (10, 20, 30)),
        (flat_png(8, 3, b"\x01", PALETTE), (200, 100, 50)),
        (flat_png(8, 3, b"\x01", PALETTE + chunk(b"tRNS", b"\xff\x80")), (100, 50, 25)),
        (flat_png(8, 3, b"\x01", PALETTE + chunk(b"tRNS", b"\xff\x00")), (0, 0, 0)),
        (flat_png(8, 3, b"\x01", PALETTE + chunk(b"tRNS", b"\x00")), (200, 100, 50)),  # only colour 0 is clear
        (flat_png(8, 4, b"\xc8\x80"), (100, 100, 100)),
        (flat_png(16, 4, b"\xc8\x00\xff\xff"), (200, 200, 200)),
        (flat_png(8, 6, b"\xc8\x64\x32\x80"), (100, 50, 25)),
        (flat_png(8, 6, b"\xc8\x64\x32\xff"), (200, 100, 50)),
        (flat_png(8, 6, b"\xc8\x64\x32\x00"), (0, 0, 0)),
        (flat_png(16, 6, b"\xc8\x00\x64\x00\x32\x00\xff\xff"), (200, 100, 50)),
    ],
)
def test_every_kind_of_png_has_the_colour_it_shows_on_black(payload: bytes, expected: tuple[int, int, int]) -> None:
    decoded = decode_image(payload).astype(int)
    assert decoded.shape == (8, 8, 3)
    assert np.abs(decoded - np.array(expected)).max() <= 1


def test_one_bit_a_pixel_is_black_and_white() -> None:
    decoded = decode_image(png(8, 8, 1, 0, b"\0\xf0" * 8))
    assert (decoded[:, :4] == 255).all()
    assert (decoded[:, 4:] == 0).all()


def test_sixteen_bits_keep_their_order() -> None:
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    decoded = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert (decoded == (ramp // 256)[..., None]).all()


@pytest.mark.parametrize("keep_adobe_marker", [True, False])
@pytest.mark.parametrize(
    ("inks", "expected"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 128), (127, 127, 127)),
    ],
)
def test_cmyk_is_ink_on_paper(inks: tuple[int, ...], expected: tuple[int, ...], keep_adobe_marker: bool) -> None:
    payload = encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    at = payload.index(b"\xff\xee\x00\x0eAdobe")
    if not keep_adobe_marker:
        payload = payload[:at] + payload[at + 16 :]
    assert np.abs(decode_image(payload).astype(int) - np.array(expected)).max() <= 2


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    grey = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8))
    decoded = decode_image(encoded(grey, "JPEG"))
    assert decoded.shape == (32, 32, 3)
    assert (decoded == decoded[..., :1]).all()
    assert decoded.std() > 50


# ---------------------------------------------------------------------------------------------- orientation


def picture(mode: str = "RGB") -> Image.Image:
    return Image.open(io.BytesIO(jpeg(3))).convert(mode)


def as_shown(payload: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB")).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG")])
def test_every_orientation_is_shown_as_pillow_shows_it(orientation: int, mode: str, kind: str) -> None:
    payload = encoded(picture(mode), kind, exif=exif_with(orientation))
    decoded = decode_image(payload)
    assert decoded.flags.c_contiguous
    assert decoded.shape[:2] == ((36, 40) if orientation > 4 else (40, 36))
    assert np.abs(decoded.astype(int) - as_shown(payload)).max() <= 2


@pytest.mark.parametrize(
    "before",
    [
        [segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(5000))],
        [segment(0xED, b"Photoshop 3.0\0" + bytes(65_000))] * 5,
        [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), segment(0xFE, b"a comment")],
        [segment(0xE1, b"Exif"), segment(0xE5, b"\xff\xda\xff\xd9" * 2000)],
        [b"\xff\xff\xff"],  # fill bytes
    ],
)
def test_the_orientation_is_found_behind_other_segments(before: list[bytes]) -> None:
    payload = encoded(picture(), "JPEG")
    turned = with_segments(payload, *before, segment(0xE1, exif_with(6)))
    assert (decode_image(turned) == np.rot90(decode_image(payload), -1)).all()


def test_the_word_exif_elsewhere_turns_nothing() -> None:
    payload = encoded(picture(), "JPEG")
    comment = with_segments(payload, segment(0xFE, segment(0xE1, exif_with(6))))
    for odd in (comment, payload + segment(0xE1, exif_with(6))):
        assert (decode_image(odd) == decode_image(payload)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II",
        b"Exif\0\0nonsense" * 9,
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 30,
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0six\0\0\0\0\0",  # a word where a number belongs
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\5\0\1\0\0\0\xff\xff\xff\x7f\0\0\0\0",  # a fraction beyond the end
        exif_with(0),
        exif_with(9),
        exif_with(65535),
    ],
)
def test_damaged_metadata_do_not_cost_the_picture(exif: bytes, kind: str) -> None:
    payload = encoded(picture(), kind)
    odd = (
        with_segments(payload, segment(0xE1, exif))
        if kind == "JPEG"
        else payload[:33] + chunk(b"eXIf", exif[6:]) + payload[33:]
    )
    assert (decode_image(odd) == decode_image(payload)).all()


# ---------------------------------------------------------------------------------------------- too large


def claiming(payload: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header states another size."""
    at = payload.index(b"\xff\xc0")
    return payload[: at + 5] + struct.pack(">HH", height, width) + payload[at + 9 :]


@pytest.fixture(scope="module")
def young() -> Iterator[ProcessPoolExecutor]:
    """A process that has freed nothing yet: a heap with free room could hold an image that RLIMIT_AS should refuse."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def refused_in_little_memory(payload: bytes) -> float:
    """Returns the CPU seconds that the refusal took."""
    start_s = time.process_time()
    with little_memory(32 * MIB):
        assert reason_of(payload) == "too_large"
        with pytest.raises(MemoryError):
            bytearray(64 * MIB)  # so one plane of the image would not have fitted
    return time.process_time() - start_s


def giant_png(width: int, height: int, depth: int, colour: int) -> bytes:
    return png(width, height, depth, colour, bytes(1000), before=PALETTE if colour == 3 else b"")


@pytest.mark.parametrize(
    "payload",
    [
        giant_png(20_000, 20_000, 8, 2),
        giant_png(10_000, 10_000, 16, 6),
        giant_png(8_000, 8_000, 1, 0),
        giant_png(2**31 - 1, 2**31 - 1, 8, 3),
        giant_png(2**31 - 1, 1, 8, 0),
        claiming(jpeg(1), 65_500, 65_500),
        claiming(jpeg(1), 8_000, 8_000),
        claiming(encoded(picture(), "JPEG", exif=exif_with(6)), 65_500, 65_500),
        claiming(encoded(picture("CMYK"), "JPEG"), 65_500, 65_500),
        claiming(encoded(picture("L"), "JPEG"), 65_500, 65_500),
    ],
)
def test_a_giant_is_refused_before_its_pixels_are_made(payload: bytes, young: ProcessPoolExecutor) -> None:
    assert young.submit(refused_in_little_memory, payload).result() < 0.5


def compressed(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"Comment\0\0" + compressed(200 * MIB)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + compressed(200 * MIB)),
        chunk(b"iCCP", b"Profile\0\0" + compressed(200 * MIB)),
        b"".join(chunk(b"zTXt", b"Comment%d\0\0" % i + compressed(1_000_000)) for i in range(300)),
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_metadata_that_inflate_without_end_cost_no_memory(metadata: bytes, place: str) -> None:
    payload = png(8, 8, 8, 0, b"\0" * 72, **{place: metadata})
    start_s = time.process_time()
    with little_memory(128 * MIB):
        try:
            assert decode_image(payload).shape == (8, 8, 3)
        except SampleError as error:
            assert error.reason == "corrupt"
    assert time.process_time() - start_s < 1


# ---------------------------------------------------------------------------------------------- cut images


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": exif_with(6)}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_cut_anywhere_is_refused(mode: str, options: dict[str, object]) -> None:
    payload = encoded(picture(mode), "JPEG", **options)
    assert decode_image(payload).size
    for length in range(2, len(payload) - 2):
        assert reason_of(payload[:length]) == "corrupt"


@pytest.mark.parametrize("options", [{}, {"exif": exif_with(6)}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_cut_jpeg_with_an_end_mark_is_refused_or_has_all_its_pixels(mode: str, options: dict[str, object]) -> None:
    payload = encoded(picture(mode), "JPEG", **options)
    whole = decode_image(payload)
    num_whole = 0
    for length in range(2, len(payload) - 2):
        try:
            assert (decode_image(payload[:length] + b"\xff\xd9") == whole).all(), f"half a picture, cut at {length}"
            num_whole += 1
        except SampleError as error:
            assert error.reason == "corrupt"
    assert num_whole <= 2  # the last bits may be filler


@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_a_jpeg_with_stray_bytes_keeps_its_picture(shrink: int) -> None:
    payload = encoded(picture(), "JPEG", progressive=True)
    scan = payload.index(b"\xff\xc4", payload.index(b"\xff\xda"))
    for stray in (payload + b"trailer" * 100, payload[:scan] + b"\0\0\0" + payload[scan:]):
        assert np.array_equal(decode_image(stray, shrink=shrink), decode_image(payload, shrink=shrink))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16"])
def test_a_png_cut_anywhere_is_refused_or_has_all_its_pixels(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode) if mode != "I;16" else Image.fromarray(noise[..., 0] * np.uint16(257))
    payload = encoded(image, "PNG")
    whole = decode_image(payload)
    pixels_end = payload.index(b"IEND") - 8
    for length in range(8, len(payload)):
        try:
            assert (decode_image(payload[:length]) == whole).all(), f"half a picture, cut at {length}"
            assert length >= pixels_end - 12, f"cut at {length}, before the pixels end"
        except SampleError as error:
            assert error.reason == "corrupt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_png_whose_pixels_stop_early_is_refused(share: float) -> None:
    rows = np.random.default_rng(0).bytes(17 * 16)
    rows = b"".join(b"\0" + rows[17 * i + 1 : 17 * i + 17] for i in range(16))
    stream = zlib.compress(rows)
    payload = png(16, 16, 8, 0, rows)
    assert decode_image(payload).shape == (16, 16, 3)
    shorter = payload.replace(chunk(b"IDAT", stream), chunk(b"IDAT", stream[: int(len(stream) * share)]))
    assert reason_of(shorter) == "corrupt"
    fewer_rows = png(16, 16, 8, 0, rows[: int(len(rows) * share)])
    assert reason_of(fewer_rows) == "corrupt"
