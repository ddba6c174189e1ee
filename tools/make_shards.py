"""Pack images of a folder tree, a CSV manifest or tars into WebDataset shards.

JPEG, PNG and WebP files are stored byte for byte; other formats that Pillow reads become PNG. The images of each shard
are chosen from sorted names before anything is written, so the same input gives the same bytes. Shards are written
atomically: after a kill, the same command continues with the missing shards. Each shard is read back as the trainer
reads it and compared with the source. What is left out, and why, is printed and recorded in OUTPUT/make_shards.json.

Tars are packed again with all members of a sample, even if these stand apart. If a sample has several images, the one
with a plain suffix is kept, or the one that --image_member names.

--folder_labels makes classes of the first folders: bonafide is 0, morph (or attack) is 1, and --label_map maps other
names. The mapping is always printed.

--layout reads published data sets as they are on disk (tools/PROTOCOLS.md): label, both identities, morphing tool
and source of each image come from its folder and name.

--max_side and --encode write images again: upright, in sRGB, without metadata. That destroys traces which a morph
detector may need (compression history, sensor noise, fine seams), so use them for pre-training sets only. A JPEG that
would be larger than the raw pixels is stored as PNG instead. Untouched images keep their colour profile.

--face_crop 1.3 finds the face of each photograph and stores the square around it, 1.3 times as long as the face, with
landmarks for self-morphs in its json. The pixels are those of the photograph, upright and in sRGB, as PNG. Photographs
without a usable face (none, several of about one size, tiny, turned away) are left out, counted, and listed in
OUTPUT/bad_images.csv. A detector that is trained on such shards crops in the same way when it is tested.

Usage: python tools/make_shards.py --source FOLDER_OR_CSV_OR_TARS --output_dir FOLDER [--name value]

Examples:
    python tools/make_shards.py --source faces --output_dir shards/train
    python tools/make_shards.py --source splits/train.csv --output_dir detect/train
    python tools/make_shards.py --source faces --output_dir shards/small --max_side 64 --encode jpeg
    python tools/make_shards.py --source portraits.csv --output_dir shards/cropped --face_crop 1.3
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import csv
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.data.byte_ranges import ByteRangeReader
from trainer.data.landmarks import landmarks_of, read_landmarks
from trainer.data.shards.members import FACE_CROP, LANDMARKS, NO_LABEL, Sample, Tally, samples_of
from trainer.data.shards.tar import BLOCK_BYTES, MAX_MEMBER_BYTES, RECORD_BYTES, Member, walk_tar
from trainer.data.transforms.decode import MIN_SIDE, colour_profile, suffix_of
from trainer.data.transforms.faces import FaceCropping
from trainer.data.writing.face_crops import (
    JSON_BYTES,
    count_refusals,
    cropped_image,
    is_refusal,
    with_crop,
    with_fields,
)
from trainer.data.writing.image_files import DAMAGE, Storing, describe_damage, stored_bytes_bound, stored_image
from trainer.data.writing.layouts import read_layout
from trainer.data.writing.source_images import (
    Entry,
    Source,
    group_values,
    names_tars,
    of_class,
    plain_text,
    read_source,
    with_distinct_keys,
)
from trainer.errors import ConfigError, DataError, SampleError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import draft_of, write_atomically
from trainer.parallel import num_cores, parallel_map
from trainer.progress import Progress

_PLAN_NAME = "make_shards.json"
_BAD_NAME = "bad_images.csv"
_BAD_COLUMNS = ("path", "key", "reason", "shard")
_NUM_PROBE_THREADS = 16
_REMEDY = "remove this shard and run the same command again; if it stays so, report the name"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    source: str = ""
    """Folder tree of images; a CSV with a column path and optional key, label and others; or tars to pack again."""
    output_dir: str = ""
    """Where the shards go."""
    max_shard_bytes: int = 1_000_000_000
    """Upper bound of a shard; a larger image gets one of its own, a rewritten one counts as its raw pixels [bytes]."""
    max_shard_samples: int = 10_000
    """Upper bound of images in a shard [images]."""
    folder_labels: bool = False
    """Make classes of the folders of the first level: bonafide 0, morph or attack 1, others as label_map says."""
    label_map: str | None = None
    """Numbers of classes, as 'real=0,fake=1'; or sorted, for numbers in the order of the names."""
    layout: Literal["none", "smdd", "frll", "frgc_feret", "mad22", "mordiff", "lma", "folders"] = "none"
    """Published data set that source is, as it is on disk; folders: raw, and one folder for each morphing tool."""
    split: str | None = None
    """With layout lma: the value of the CSV's column split whose rows are packed."""
    only: Literal["both", "bonafide", "morph"] = "both"
    """Pack the images of one class only, as for the recipe selfmad, which trains on bona fides."""
    image_member: str | None = None
    """Suffix of the image to keep, such as left.jpg, where the samples of tars hold several."""
    skip_bad: bool = False
    """Leave damaged images out, listed in OUTPUT/bad_images.csv, instead of leaving out their shards."""
    max_side: int | None = None
    """For pre-training sets: shrink larger images until their shorter side is this long; none keeps sizes [pixels]."""
    encode: Literal["keep", "jpeg", "png"] = "keep"
    """Keep the bytes of images that are not shrunk; or, for pre-training sets, encode all images again."""
    jpeg_quality: int = 95
    """Quality of JPEGs that are encoded again, from 1 to 100; their colours keep full resolution (4:4:4)."""
    face_crop: float | None = None
    """Crop to the face: side of the square as a multiple of the face's longer side (1.3); none keeps the image."""
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
        check_counts(self)
        if self.max_side is not None and self.max_side < MIN_SIDE:
            raise ConfigError(f"max_side is {self.max_side}, but must be at least {MIN_SIDE}: smaller is refused later")
        if self.landmarks and self.max_side is not None:
            raise ConfigError("landmarks and max_side are both set, but shrinking would move the landmarks: keep one")
        if self.landmarks and self.face_crop is not None:
            raise ConfigError("landmarks and face_crop are both set, but cropping finds its own landmarks: keep one")
        if self.landmarks and names_tars(self.source):
            raise ConfigError(
                f"landmarks is {self.landmarks!r}, but source names tars, which keep their own: leave it away"
            )
        if self.layout != "none" and (self.folder_labels or self.image_member or names_tars(self.source)):
            raise ConfigError(
                f"layout is {self.layout}, which reads a data set as published: take no tars, folder_labels or "
                "image_member with it"
            )
        if self.split and self.layout == "none":
            raise ConfigError(f"split is {self.split!r}, which needs a layout with a column split: --layout lma")
        self.storing  # noqa: B018  (checks face_crop)
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigError(f"jpeg_quality is {self.jpeg_quality}, but must be from 1 to 100 (try 95)")

    @property
    def rewriting(self) -> dict[str, Any]:
        """The settings that change the bytes of images; empty if JPEG, PNG and WebP files stay as they are."""
        cropping = {} if self.storing.crop is None else {FACE_CROP: str(self.storing.crop)}
        if self.encode == "keep" and self.max_side is None and not cropping:
            return {}
        names = ("max_side", "encode", "jpeg_quality")
        return {name: getattr(self, name) for name in names} | {"srgb": True} | cropping

    @property
    def storing(self) -> Storing:
        """How images are stored."""
        how = {name: getattr(self, name) for name in ("max_side", "encode", "jpeg_quality", "verify")}
        return Storing(**how, crop=None if self.face_crop is None else FaceCropping(self.face_crop))


@dataclass(frozen=True, slots=True)
class Bad:
    """An image that is not stored, as a row of bad_images.csv."""

    path: str
    key: str
    reason: str
    shard: str

    @property
    def has_no_face(self) -> bool:
        """Whether it is readable, but has no usable face: such images are left out without being asked."""
        return is_refusal(self.reason)


@dataclass(slots=True)
class Found:
    """Counts of what the trainer will read from shards."""

    tally: Tally = field(default_factory=Tally)
    formats: Counter[str] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    """Name of a colour profile -> images."""

    def add(self, other: "Found") -> None:
        """Add the counts of another shard."""
        self.tally.add(other.tally)
        self.formats.update(other.formats)
        self.profiles.update(other.profiles)


@dataclass(frozen=True, slots=True)
class _Job:
    """A shard to write, or one of an earlier run to verify."""

    path: Path
    entries: list[Entry]
    settings: Settings
    exists: bool


@dataclass(frozen=True, slots=True)
class _Result:
    job: _Job
    draft: Path | None
    """The written and verified draft; None if the shard exists, or if it must not be published."""
    bad: list[Bad]
    found: Found


CLI = CommandLine(Settings, __doc__, required=("source", "output_dir"))


def main(settings: Settings) -> int:
    """Pack images; returns the exit code."""
    make_shards(settings)
    return 0


def make_shards(settings: Settings) -> list[Path]:
    """Write the missing shards, compare all with the source, and return their paths.

    Raises:
        ConfigError: the source holds no image, two images have the same key, or the output belongs to another source.
        DataError: images are damaged; they are listed in OUTPUT/bad_images.csv and their shards are not written. Or a
            shard differs from the source.
    """
    import webdataset  # noqa: F401  (it imports torch, which forked workers then need not)

    output = Path(settings.output_dir)
    source = of_class(_listed(settings), settings.only)
    print(source.describe())
    entries = _with_landmarks(with_distinct_keys(source.entries), settings.landmarks)
    entries = with_crop(entries, settings.storing)
    entries, sizes, lost = _with_sizes(entries, settings)
    groups = list(_groups(entries, sizes, settings.max_shard_bytes, settings.max_shard_samples))
    output.mkdir(parents=True, exist_ok=True)
    plan = _claim(output, groups, sizes, settings)
    paths = [output / f"shard-{number:06d}.tar" for number in range(len(groups))]
    jobs = [_Job(path, group, settings, path.exists()) for path, group in zip(paths, groups, strict=True)]
    bad, found = _write_all(jobs, lost, output, settings)
    if found.tally.num_samples + len(bad) != len(source.entries):
        raise DataError(
            f"output_dir {output}: {found.tally.num_samples} samples and {len(bad)} images left out do not add up to "
            f"{len(source.entries)}: write into a new folder"
        )
    report = _report(settings, source, bad, found)
    write_atomically(output / _PLAN_NAME, json.dumps(plan | {"report": report}, indent=1) + "\n")
    written = [path for path in paths if path.exists()]
    print(f"{found.tally.num_samples} images in {len(written)} shards: {output / 'shard-*.tar'}")
    print(_describe(found, bad, output))
    return written


def _listed(settings: Settings) -> Source:
    if settings.layout != "none":
        return read_layout(settings.layout, settings.source, label_map=settings.label_map, split=settings.split)
    return read_source(
        settings.source,
        folder_labels=settings.folder_labels,
        label_map=settings.label_map,
        image_member=settings.image_member,
    )


def _with_landmarks(entries: list[Entry], landmarks: str | None) -> list[Entry]:
    if landmarks is None:
        return entries
    points, found = read_landmarks(Path(landmarks)), []
    for entry in entries:
        points_L2 = landmarks_of(entry.metadata.get("landmark_name"), entry.key, entry.path, points)
        known = {} if points_L2 is None else {LANDMARKS: np.round(points_L2.astype(np.float64), 2).tolist()}
        found.append(replace(entry, metadata=entry.metadata | known))
    num_found = sum(LANDMARKS in entry.metadata for entry in found)
    if not num_found:
        raise ConfigError(f"landmarks {landmarks} name none of {len(entries)} images: add a column landmark_name")
    print(f"landmarks {landmarks}: {num_found} of {len(entries)} images have some")
    return found


# ---------------------------------------------------------------------------------------------- the plan


def _with_sizes(entries: list[Entry], settings: Settings) -> tuple[list[Entry], list[int], list[Bad]]:
    """Return the images that can be opened, bounds of their bytes, and the unreadable images."""
    how = settings.storing
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        sizes = list(pool.map(lambda entry: _size_or_error(entry, how), entries))
    bad = [
        Bad(plain_text(entry.name), entry.key, _reason(size), "")
        for entry, size in zip(entries, sizes, strict=True)
        if isinstance(size, OSError)
    ]
    if bad and (not settings.skip_bad or len(bad) == len(entries)):
        windows = " (write / in paths, not \\)" if "\\" in bad[0].path else ""
        raise DataError(
            f"{len(bad)} of {len(entries)} images cannot be read, the first is {bad[0].path} ({bad[0].reason}): check "
            f"the paths{windows} and permissions, or leave them out with --skip_bad true"
        )
    both = [(entry, size) for entry, size in zip(entries, sizes, strict=True) if isinstance(size, int)]
    return [entry for entry, _ in both], [size for _, size in both], bad


def _size_or_error(entry: Entry, how: Storing) -> int | OSError:
    try:
        if entry.packed is not None:
            image, reader = entry.packed.image, ByteRangeReader()
            (head,) = reader.read([replace(image, size=min(12, image.size))])
            return stored_bytes_bound(head, image.size, lambda: io.BytesIO(reader.read([image])[0]), how)
        with entry.path.open("rb") as file:
            head = file.read(12)
        return stored_bytes_bound(head, entry.path.stat().st_size, lambda: entry.path, how)
    except OSError as error:
        return error


def _groups(entries: list[Entry], sizes: list[int], max_bytes: int, max_samples: int) -> Iterator[list[Entry]]:
    """Fill shards one after the other, in order, up to either limit.

    Example: an image of 1000 bytes with a json of 40 bytes takes 512 + 1024 and 512 + 512 bytes. A key above 90 bytes
    adds an extended header of at most four blocks to each member. The end of the tar is counted as one record.
    """
    group: list[Entry] = []
    filled = RECORD_BYTES
    for entry, size in zip(entries, sizes, strict=True):
        long_name = 4 * BLOCK_BYTES if len(entry.key.encode()) > 90 else 0
        members = [size, *_text_sizes(entry), *([JSON_BYTES] if FACE_CROP in entry.metadata else [])]
        needed = sum(BLOCK_BYTES + long_name + -(-member // BLOCK_BYTES) * BLOCK_BYTES for member in members)
        if group and (len(group) == max_samples or filled + needed > max_bytes):
            yield group
            group, filled = [], RECORD_BYTES
        group.append(entry)
        filled += needed
    yield group


def _text_sizes(entry: Entry) -> list[int]:
    if entry.packed is not None:
        return [span.size for _, span in entry.packed.others]
    return [len(entry.json_text())] + ([8] if entry.label is not None else [])


def _claim(output: Path, groups: list[list[Entry]], sizes: list[int], settings: Settings) -> dict[str, Any]:
    """Return the plan of the output; refuse a folder with shards of another source or other settings."""
    # Keys, jsons, packed members and sizes decide the content of all shards, so their hash identifies the plan.
    digest = hashlib.sha256()
    for group in groups:
        digest.update(b"shard")
        for entry in group:
            digest.update(entry.key.encode() + b"\0" + entry.json_text() + b"\0")
            if entry.packed is not None:
                digest.update(repr((entry.packed.others, entry.packed.crc32)).encode())
    digest.update(json.dumps(sizes).encode())
    plan = {"plan": digest.hexdigest(), "num_shards": len(groups)} | settings.rewriting
    path = output / _PLAN_NAME
    if path.exists() and _plan_in(path) != plan:
        raise ConfigError(f"output_dir {output} holds shards of another source or other settings: name a new folder")
    if not path.exists() and next(output.glob("shard-*.tar"), None):
        raise ConfigError(f"output_dir {output} holds shards that this tool did not plan: name a new folder")
    _remove_drafts(output)
    if not path.exists():
        write_atomically(path, json.dumps(plan) + "\n")
    return plan


def _remove_drafts(output: Path) -> None:
    for leftover in output.glob(".shard-*.tmp-*"):
        leftover.unlink(missing_ok=True)


def _plan_in(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = {}
    return {name: value for name, value in record.items() if name != "report"} if isinstance(record, dict) else {}


# ---------------------------------------------------------------------------------------------- writing


def _write_all(jobs: list[_Job], lost: list[Bad], output: Path, settings: Settings) -> tuple[list[Bad], Found]:
    """Write and verify all shards; return the images that are left out, and the counts."""
    earlier = _read_bad(output / _BAD_NAME)
    existing = {job.path.name for job in jobs if job.exists}
    bad, found, failed = [*lost, *(each for each in earlier if each.shard in existing)], Found(), list[Bad]()
    jobs = [_without(job, bad) if job.exists else job for job in jobs]
    num_images = sum(len(job.entries) for job in jobs)
    results = _results(jobs, settings)
    try:
        with Progress(num_images, unit="image", shown=settings.progress_bar) as bar:
            for result in results:
                bar.update(len(result.job.entries))
                found.add(result.found)
                damaged = [each for each in result.bad if not each.has_no_face]
                if damaged and not settings.skip_bad:
                    failed += damaged
                    continue
                if result.bad:
                    bad += result.bad
                    _write_bad(output / _BAD_NAME, bad)  # before the shard: a kill in between loses no name
                if result.draft is not None:
                    result.draft.replace(result.job.path)
    finally:
        results.close()  # first, so that no process still writes
        _remove_drafts(output)
    _write_bad(output / _BAD_NAME, bad + failed)
    if not failed and bad and not found.tally.num_samples and all(each.has_no_face for each in bad):
        raise DataError(
            f"none of {len(bad)} images has a usable face, the first is {bad[0].path} ({bad[0].reason}); "
            f"{output / _BAD_NAME} lists all: leave face_crop away if these are no photographs of faces"
        )
    if failed or not found.tally.num_samples:
        first = (failed or bad)[0]
        raise DataError(
            f"{len(failed or bad)} images are damaged, the first is {first.path} ({first.reason}); "
            f"{output / _BAD_NAME} lists all. Their shards were not written: leave them out with --skip_bad true, or "
            "remove them from the source and write into a new output_dir"
        )
    return bad, found


def _without(job: _Job, bad: list[Bad]) -> _Job:
    left_out = {each.key for each in bad if each.shard == job.path.name}
    return replace(job, entries=[entry for entry in job.entries if entry.key not in left_out])


def _results(jobs: list[_Job], settings: Settings) -> Generator[_Result, None, None]:
    num_processes = min(settings.num_processes or num_cores(), max(1, len(jobs)))
    yield from parallel_map(_write_shard, jobs, num_processes=num_processes, in_order=False)


def _read_bad(path: Path) -> list[Bad]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Bad(*(row.get(name) or "" for name in _BAD_COLUMNS)) for row in csv.DictReader(file)]


def _write_bad(path: Path, bad: Iterable[Bad]) -> None:
    rows = sorted((each.path, each.key, each.reason, each.shard) for each in bad)
    if not rows:
        path.unlink(missing_ok=True)
        return
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_BAD_COLUMNS, *rows])
    write_atomically(path, file.getvalue())


def _write_shard(job: _Job) -> _Result:
    """Write one shard as a draft and read it back; a damaged image leaves a draft only with --skip_bad."""
    if job.exists:
        return _Result(job, None, [], _read_back(job.path, job.path, job.entries))
    draft = draft_of(job.path)
    try:
        stored, bad, written = _write_draft(draft, job)
        if not stored or (not all(each.has_no_face for each in bad) and not job.settings.skip_bad):
            draft.unlink()
            return _Result(job, None, bad, Found())
        return _Result(job, draft, bad, _read_back(job.path, draft, stored, written))
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _write_draft(draft: Path, job: _Job) -> tuple[list[Entry], list[Bad], Counter[tuple[str, int]]]:
    """Write the tar; return the stored images, the damaged ones, and the members by name and CRC-32."""
    stored, bad, written = list[Entry](), list[Bad](), Counter[tuple[str, int]]()
    reader = ByteRangeReader()
    with draft.open("wb") as file:
        import webdataset as wds

        with wds.TarWriter(file, user="trainer", group="trainer", mode=0o444, mtime=0, encoder=False) as writer:
            for entry in job.entries:
                try:
                    members = _members_of(entry, job.settings.storing, reader)
                except DAMAGE as error:
                    bad.append(Bad(plain_text(entry.name), entry.key, _reason(error), job.path.name))
                    continue
                writer.write({"__key__": entry.key} | members)
                stored.append(entry)
                written.update((f"{entry.key}.{name}", zlib.crc32(payload)) for name, payload in members.items())
        file.flush()
        os.fsync(file.fileno())
    return stored, bad, written


def _members_of(entry: Entry, how: Storing, reader: ByteRangeReader) -> dict[str, bytes]:
    """Return suffix and bytes of each member of a sample.

    Raises:
        SampleError: the image cannot be stored.
        OSError: a file cannot be read.
    """
    if entry.packed is None:
        payload = entry.path.read_bytes()
        others = {"json": entry.json_text()} | ({} if entry.label is None else {"cls": str(entry.label).encode()})
    else:
        suffixes, spans = [s for s, _ in entry.packed.others], [span for _, span in entry.packed.others]
        payload, *texts = reader.read([entry.packed.image, *spans])
        others = dict(zip(suffixes, texts, strict=True))
        if tuple(map(zlib.crc32, (payload, *texts))) != entry.packed.crc32:
            raise SampleError("checksum", "the tar has changed while it was read")
    if how.crop is None:
        suffix, payload = stored_image(payload, how)
    else:
        suffix, payload, fields = cropped_image(payload, how)
        others["json"] = with_fields(others.get("json"), fields)
    if len(payload) > MAX_MEMBER_BYTES:
        raise SampleError("too_large", f"stored it has {len(payload)} bytes, more than {MAX_MEMBER_BYTES}")
    return {suffix: payload} | others


def _reason(error: Exception) -> str:
    remedy = " (--max_side shrinks it)" if isinstance(error, SampleError) and error.reason == "too_large" else ""
    return describe_damage(error) + remedy


# ---------------------------------------------------------------------------------------------- reading back


def _read_back(name: Path, path: Path, entries: list[Entry], written: Counter[tuple[str, int]] | None = None) -> Found:
    """Read a shard as the trainer does and compare it with the source.

    Args:
        name: the shard, for messages.
        path: the file, which may be a draft.
        entries: the images that it must hold.
        written: its members by name and CRC-32; None if an earlier run wrote them.

    Raises:
        DataError: the trainer would read something else.
    """
    found, expected, members = Found(), {entry.key: entry for entry in entries}, Counter[tuple[str, int]]()

    def noted(walk: Iterator[Member]) -> Iterator[Member]:
        for member in walk:
            members[member.name, member.crc32] += 1
            yield member

    walk = noted(walk_tar(path, keep_payload_below=MAX_MEMBER_BYTES + 1))
    for sample in samples_of(str(name), walk, tally=found.tally):
        entry = expected.pop(sample.key, None)
        if entry is None or not _is_as_stored(sample, entry):
            raise DataError(f"shard {name}: sample {sample.key!r} is not what the source holds: {_REMEDY}")
        payload = sample.image.payload or b""
        found.formats[suffix_of(payload[:12]) or "?"] += 1
        found.profiles.update(filter(None, [colour_profile(payload)]))
    lost = [entry.name for entry in expected.values()] or [key for key, _ in (written or members) - members]
    if lost:
        raise DataError(f"shard {name}: the trainer would not read {lost[0]} and {len(lost) - 1} others: {_REMEDY}")
    return found


def _is_as_stored(sample: Sample, entry: Entry) -> bool:
    label = NO_LABEL if entry.label is None else entry.label
    expected = bool(entry.metadata.get(LANDMARKS)) or FACE_CROP in entry.metadata
    has_landmarks = entry.packed is not None or bool(sample.landmarks_span[1]) == expected
    return sample.label == label and sample.groups == group_values(entry) and has_landmarks


# ---------------------------------------------------------------------------------------------- the report


def _report(settings: Settings, source: Source, bad: list[Bad], found: Found) -> dict[str, Any]:
    """Return the counts for the record: found = used + left out, and images = samples + damaged."""
    tally = source.tally
    return {
        "source": settings.source,
        "layout": settings.layout,
        "found": tally.num_members,
        "used": tally.num_used,
        "left_out": dict(tally.left_out),
        "examples": tally.examples,
        "images": len(source.entries),
        "samples": found.tally.num_samples,
        "damaged": sum(not each.has_no_face for each in bad),
        "without_face": count_refusals(each.reason for each in bad),
        "classes": source.classes,
        "labels": {_label_name(label): count for label, count in sorted(found.tally.labels.items())},
        "unusable": dict(tally.unusable + found.tally.unusable),
        "formats": dict(found.formats),
        "colour_profiles": dict(found.profiles),
    }


def _describe(found: Found, bad: list[Bad], output: Path) -> str:
    labels = ", ".join(f"{_label_name(label)}: {count}" for label, count in sorted(found.tally.labels.items()))
    lines = [
        f"labels: {labels}; formats: {', '.join(f'{count} {name}' for name, count in found.formats.most_common())}"
    ]
    lines += found.tally.notes()
    if found.profiles:
        profiles = ", ".join(f"{name}: {count}" for name, count in found.profiles.most_common())
        lines.append(f"colour profiles, whose numbers are kept: {profiles}")
    for what, some in (
        ("damaged images", [each for each in bad if not each.has_no_face]),
        ("images without a usable face", [each for each in bad if each.has_no_face]),
    ):
        if some:
            by_reason = ", ".join(
                f"{count} {reason}" for reason, count in count_refusals(e.reason for e in some).items()
            )
            example = f"such as {some[0].path} ({some[0].reason}): {output / _BAD_NAME}"
            lines.append(f"{len(some)} {what} are left out{f' ({by_reason})' if by_reason else ''}, {example}")
    return "\n".join(lines)


def _label_name(label: int) -> str:
    return "none" if label == NO_LABEL else str(label)


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
