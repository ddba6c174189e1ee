"""Pack a folder tree or a CSV manifest of images into WebDataset shards.

JPEG and PNG files are stored byte for byte; other formats become PNG. Which image goes into which shard is decided
before anything is written, from sorted names, so the same input gives the same bytes. A shard is whole or absent:
after a kill, the same command goes on with the missing shards.

--max_side and --encode write images anew, upright and without metadata. That destroys traces which a morph detector
may need (compression history, sensor noise, fine seams), so use them for pre-training sets only. A JPEG that
would be larger than the raw pixels is stored as PNG instead.

Shapes: H, W image size; HWC uint8 RGB.

Usage: python tools/make_shards.py --source FOLDER_OR_CSV --output_dir FOLDER [--name value]

Examples:
    python tools/make_shards.py --source faces --output_dir shards/train
    python tools/make_shards.py --source splits/train.csv --output_dir detect/train
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from launch.command_line import configure_tool, run
from tools.landmarks import landmarks_of, read_landmarks
from trainer.config import check_types
from trainer.data.decode import MIN_SIDE, decode_image
from trainer.data.members import LANDMARKS
from trainer.errors import ConfigError, DataError, SampleError

READ_SUFFIXES = {".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp", ".tif", ".tiff", ".webp"}
_PLAN_NAME = "make_shards.json"
_PROBERS = 16
_TAR_BLOCK = 512
_TAR_RECORD = 10240
# What Pillow may raise for a damaged image; SampleError is what decode_image makes of it.
DAMAGE = (SampleError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)

cv2.setNumThreads(0)  # one process a shard: the processes are the parallelism


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    source: str = ""
    """Folder tree of images, or a CSV file with a column path and optional columns key, label and others."""
    output_dir: str = ""
    """Where the shards go."""
    max_shard_bytes: int = 1_000_000_000
    """Upper bound of a shard; a larger image gets one of its own, a rewritten one counts as its raw pixels [bytes]."""
    max_shard_samples: int = 10_000
    """Upper bound of images in a shard [images]."""
    folder_labels: bool = False
    """Number the folders of the first level in sorted order and use the number as label."""
    max_side: int | None = None
    """For pre-training sets: shrink larger images until their shorter side is this long; none keeps sizes [pixels]."""
    encode: Literal["keep", "jpeg", "png"] = "keep"
    """Keep untouched bytes and write what is shrunk in its own format; or, for pre-training sets, write all anew."""
    jpeg_quality: int = 95
    """Quality of JPEGs that are written anew, from 1 to 100; their colours keep full resolution (4:4:4)."""
    landmarks: str | None = None
    """An .npz with names and points in pixels, as make_morphs takes; self-morphs find them in the samples' json."""
    verify: bool = True
    """Decode every image before it is stored, so that no damaged one gets in."""
    num_processes: int | None = None
    """Shards written at a time; none uses every core."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_shard_bytes", "max_shard_samples", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        if self.max_side is not None and self.max_side < MIN_SIDE:
            raise ConfigError(f"max_side is {self.max_side}, but must be at least {MIN_SIDE}: smaller is refused later")
        if self.landmarks and self.max_side is not None:
            raise ConfigError("landmarks and max_side are both set, but shrinking would move the landmarks: keep one")
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigError(f"jpeg_quality is {self.jpeg_quality}, but must be from 1 to 100 (try 95)")

    @property
    def rewriting(self) -> dict[str, Any]:
        """The settings that decide the bytes of images; empty where all JPEG and PNG files stay untouched."""
        if self.encode == "keep" and self.max_side is None:
            return {}
        return {name: getattr(self, name) for name in ("max_side", "encode", "jpeg_quality")}


@dataclass(frozen=True, slots=True)
class Entry:
    """One image on its way into a shard."""

    path: Path
    key: str
    label: int | None
    metadata: dict[str, Any] = field(hash=False)

    def json_text(self) -> bytes:
        """The sample's json member."""
        label = {} if self.label is None else {"label": self.label}
        return json.dumps(label | self.metadata, sort_keys=True, ensure_ascii=False).encode()


_Job = tuple[Path, list[Entry], Settings]


def main(words: list[str]) -> int:
    """Pack images; returns the exit code."""
    settings = configure_tool(words, Settings(), __doc__, required=("source", "output_dir"))
    if settings is None:
        return 0
    make_shards(settings)
    return 0


def make_shards(settings: Settings) -> list[Path]:
    """Write the shards that are missing and return the paths of all.

    Raises:
        ConfigError: the source holds no image, names twice the same key, or the output belongs to another source.
        DataError: images are damaged; they are listed in OUTPUT/bad_images.csv and their shards are not written.
    """
    source, output = Path(settings.source), Path(settings.output_dir)
    entries = read_manifest(source) if source.is_file() else walk_folder(source, folder_labels=settings.folder_labels)
    entries = _with_landmarks(_with_distinct_keys(entries), settings.landmarks)
    with ThreadPoolExecutor(_PROBERS) as pool:
        sizes = list(pool.map(lambda entry: _stored_size(entry.path, settings), entries))
    groups = list(_groups(entries, sizes, settings.max_shard_bytes, settings.max_shard_samples))
    output.mkdir(parents=True, exist_ok=True)
    _claim(output, groups, sizes, settings)
    paths = [output / f"shard-{number:06d}.tar" for number in range(len(groups))]
    jobs = [(path, group, settings) for path, group in zip(paths, groups, strict=True)]
    _write_all([job for job in jobs if not job[0].exists()], output, len(entries), settings)
    print(f"{len(entries)} images in {len(paths)} shards: {output / 'shard-*.tar'}")
    return paths


def walk_folder(root: Path, *, folder_labels: bool) -> list[Entry]:
    """List the images below a folder, sorted by their relative paths; hidden files and folders are left out."""
    if not root.is_dir():
        raise ConfigError(f"source is {str(root)!r}, but no such folder or CSV file exists: check the path")
    found = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in READ_SUFFIXES)
    relative = sorted((p for p in found if not any(part.startswith(".") for part in p.parts)), key=Path.as_posix)
    relative = [path for path in relative if (root / path).is_file()]
    if not relative:
        raise ConfigError(f"source {root} holds no image ({', '.join(sorted(READ_SUFFIXES))}): check the path")
    classes = sorted({path.parts[0] for path in relative})
    if folder_labels and any(len(path.parts) == 1 for path in relative):
        raise ConfigError(f"folder_labels is true, but images lie directly in {root}: put each class into a folder")
    return [
        Entry(
            root / path,
            _key_of(path.with_suffix("")),
            classes.index(path.parts[0]) if folder_labels else None,
            {"path": path.as_posix()} | ({"class": path.parts[0]} if folder_labels else {}),
        )
        for path in relative
    ]


def _with_landmarks(entries: list[Entry], landmarks: str | None) -> list[Entry]:
    if landmarks is None:
        return entries
    points, found = read_landmarks(Path(landmarks)), []
    for entry in entries:
        mine = landmarks_of(entry.metadata.get("landmark_name"), entry.key, entry.path, points)
        known = {} if mine is None else {LANDMARKS: np.round(mine.astype(np.float64), 2).tolist()}
        found.append(replace(entry, metadata=entry.metadata | known))
    if not any(LANDMARKS in entry.metadata for entry in found):
        raise ConfigError(f"landmarks {landmarks} name none of {len(entries)} images: add a column landmark_name")
    return found


def read_manifest(manifest: Path) -> list[Entry]:
    """Read a CSV with a column ``path`` (relative to the CSV), and optional ``key``, ``label`` and others.

    The order of the rows is kept. Other columns go into each sample's json as text.
    """
    with manifest.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "path" not in (reader.fieldnames or []):
            raise ConfigError(f"source {manifest} has columns {reader.fieldnames}, but needs a column 'path'")
        rows = list(reader)
    if not rows:
        raise ConfigError(f"source {manifest} has no rows: list one image a row")
    paths = [manifest.parent / row["path"] for row in rows]
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    entries = []
    for number, (row, path) in enumerate(zip(rows, paths, strict=True), start=2):
        if None in row or None in row.values():
            raise ConfigError(f"source {manifest}, line {number}: it does not have one value for each column")
        relative = path.absolute().relative_to(root)
        metadata = {name: value for name, value in row.items() if name not in ("path", "key", "label")}
        key = _key_of(Path(row["key"]) if row.get("key") else relative.with_suffix(""))
        entries.append(Entry(path, key, _label_of(row, manifest, number), {"path": relative.as_posix(), **metadata}))
    return entries


def _label_of(row: dict[str, str], manifest: Path, number: int) -> int | None:
    text = row.get("label", "")
    if text and not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"source {manifest}, line {number}: label is {text!r}, but must be a number from 0")
    return int(text) if text else None


def _key_of(path: Path) -> str:
    """Keys end at the first dot and must not begin with one: dots become underscores."""
    return path.as_posix().lstrip("/").replace(".", "_")


def _with_distinct_keys(entries: list[Entry]) -> list[Entry]:
    """Tell a.jpg from a.png by adding the suffix where two images would share a key."""
    counts = Counter(entry.key for entry in entries)
    named = [
        Entry(entry.path, entry.key + entry.path.suffix.replace(".", "_"), entry.label, entry.metadata)
        if counts[entry.key] > 1
        else entry
        for entry in entries
    ]
    key, count = Counter(entry.key for entry in named).most_common(1)[0]
    if count > 1:
        paths = [str(entry.path) for entry in named if entry.key == key]
        raise ConfigError(
            f"{paths[0]} and {paths[1]} would both be stored as {key!r}: add a column key to the manifest"
        )
    return named


def _stored_size(path: Path, settings: Settings) -> int:
    """Bound the bytes of the image member: exact for what stays untouched, uncompressed for what is written anew."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            suffix = _suffix_of(file.read(8))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path and the permissions") from error
    try:
        if suffix is not None and _stays_untouched(path, settings):
            return num_bytes
        with Image.open(path) as image:
            profile = image.info.get("icc_profile") or b""
            size = _shrunk_size(image.size, settings.max_side)
            return _png_bound(size, num_channels=max(3, len(image.getbands()))) + len(profile)
    except DAMAGE:
        return num_bytes  # never stored: the writer lists it with the other damaged images


def _stays_untouched(jpeg_or_png: Path | io.BytesIO, settings: Settings) -> bool:
    if settings.encode != "keep" or settings.max_side is None:
        return settings.encode == "keep"
    with Image.open(jpeg_or_png) as image:
        return min(image.size) <= settings.max_side


def _shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Scale a size so that its shorter side becomes ``max_side``; smaller ones stay as they are [pixels]."""
    if max_side is None or min(size) <= max_side:
        return size
    scale = max_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _png_bound(size: tuple[int, int], *, num_channels: int) -> int:
    """Bound a PNG of 8-bit channels: deflate and the chunks add little to the pixels and one byte a row [bytes]."""
    width, height = size
    return int((width * height * num_channels + max(size)) * 1.01) + 4096


def _suffix_of(head: bytes) -> str | None:
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "png" if head.startswith(b"\x89PNG\r\n\x1a\n") else None


def _groups(entries: list[Entry], sizes: list[int], max_bytes: int, max_samples: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    filled = _TAR_RECORD
    for entry, size in zip(entries, sizes, strict=True):
        members = [size, len(entry.json_text())] + ([8] if entry.label is not None else [])
        long_name = 4 * _TAR_BLOCK if len(entry.key.encode()) > 90 else 0
        needed = sum(_TAR_BLOCK + long_name + -(-member // _TAR_BLOCK) * _TAR_BLOCK for member in members)
        if group and (len(group) == max_samples or filled + needed > max_bytes):
            yield group
            group, filled = [], _TAR_RECORD
        group.append(entry)
        filled += needed
    yield group


def _claim(output: Path, groups: list[list[Entry]], sizes: list[int], settings: Settings) -> None:
    """Refuse to mix shards of two sources or two settings in one folder."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(b"shard")
        for entry in group:
            digest.update(entry.key.encode() + b"\0" + entry.json_text() + b"\0")
    digest.update(json.dumps(sizes).encode())
    record = json.dumps({"plan": digest.hexdigest(), "num_shards": len(groups)} | settings.rewriting) + "\n"
    path = output / _PLAN_NAME
    if path.exists() and path.read_text() != record:
        raise ConfigError(f"output_dir {output} holds shards of another source or other settings: name a new folder")
    if not path.exists() and next(output.glob("shard-*.tar"), None):
        raise ConfigError(f"output_dir {output} holds shards that this tool did not plan: name a new folder")
    for leftover in output.glob(".shard-*.tmp-*"):
        leftover.unlink()
    path.write_text(record)


def _write_all(jobs: list[_Job], output: Path, num_images: int, settings: Settings) -> None:
    bad: list[tuple[str, str]] = []
    num_processes = min(settings.num_processes or len(os.sched_getaffinity(0)), max(1, len(jobs)))
    done = num_images - sum(len(group) for _, group, _ in jobs)
    with (
        tqdm(total=num_images, initial=done, unit="image", disable=not settings.progress_bar) as bar,
        contextlib.ExitStack() as stack,
    ):
        results: Iterator[list[tuple[str, str]]] = map(_write_shard, jobs)
        if num_processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")))
            results = pool.map(_write_shard, jobs)
        for (_, group, _), problems in zip(jobs, results, strict=True):
            bar.update(len(group))
            bad += problems
    report = output / "bad_images.csv"
    report.unlink(missing_ok=True)
    if bad:
        with report.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "reason"), *bad])
        raise DataError(
            f"{len(bad)} images are damaged, the first is {bad[0][0]} ({bad[0][1]}); {report} lists all. Their shards "
            "were not written: remove the images from the source and write into a new output_dir"
        )


def _write_shard(job: _Job) -> list[tuple[str, str]]:
    """Write one shard and return its damaged images; with any, the shard stays absent."""
    path, group, settings = job
    bad = []
    draft = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("wb") as file:
            with wds.TarWriter(file, user="trainer", group="trainer", mode=0o444, mtime=0, encoder=False) as writer:
                for entry in group:
                    try:
                        writer.write(_sample(entry, settings))
                    except DAMAGE as error:
                        bad.append((str(entry.path), str(error)))
            file.flush()
            os.fsync(file.fileno())
        if not bad:
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return bad


def _sample(entry: Entry, settings: Settings) -> dict[str, Any]:
    suffix, payload = _stored_image(entry.path.read_bytes(), settings)
    label = {} if entry.label is None else {"cls": str(entry.label).encode()}
    return {"__key__": entry.key, suffix: payload, "json": entry.json_text(), **label}


def as_jpeg_or_png(payload: bytes) -> bytes:
    """Return a JPEG or PNG file as it is, another one as an upright PNG; damage raises Pillow's errors."""
    return payload if _suffix_of(payload[:8]) else _converted_to_png(payload)


def _stored_image(payload: bytes, settings: Settings) -> tuple[str, bytes]:
    """Return the suffix and the bytes of the image member.

    Raises:
        SampleError: the image is damaged; where Pillow finds out first, its own error.
    """
    suffix, payload = _suffix_of(payload[:8]) or "png", as_jpeg_or_png(payload)
    if _stays_untouched(io.BytesIO(payload), settings):
        if settings.verify:
            decode_image(payload)
        return suffix, payload
    wanted = {"keep": suffix, "jpeg": "jpg", "png": "png"}[settings.encode]
    return _encoded(_shrunk(decode_image(payload), settings.max_side), wanted, settings.jpeg_quality)


def _converted_to_png(payload: bytes) -> bytes:
    converted = io.BytesIO()
    with Image.open(io.BytesIO(payload)) as image:
        ImageOps.exif_transpose(image).save(converted, "PNG")  # the orientation would not come along
    return converted.getvalue()


def _shrunk(image_HWC: NDArray[np.uint8], max_side: int | None) -> NDArray[np.uint8]:
    height, width, _ = image_HWC.shape
    size = _shrunk_size((width, height), max_side)
    if size == (width, height):
        return image_HWC
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _encoded(image_HWC: NDArray[np.uint8], suffix: str, jpeg_quality: int) -> tuple[str, bytes]:
    """Encode as asked, but never larger than planned: a JPEG that outgrows the raw pixels is no gain over PNG."""
    image, file = Image.fromarray(image_HWC), io.BytesIO()
    if suffix == "jpg":
        image.save(file, "JPEG", quality=jpeg_quality, subsampling="4:4:4")
        if file.tell() <= _png_bound(image.size, num_channels=3):
            return "jpg", file.getvalue()
        file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
