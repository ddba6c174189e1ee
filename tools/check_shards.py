"""Verify shards, describe what they hold, and save what is whole from damaged ones.

Every byte is read: the tar's structure, each image decoded as the trainer does, labels and group fields, images that
occur twice (by sha256 of their bytes). Exit code 0 means sound, 1 that something is damaged: it is listed.

``--repair FOLDER`` writes every sample that is whole, also those behind a damaged stretch, to new shards of the same
names, and leaves the old ones alone.

Usage: python tools/check_shards.py --data 'shards/*.tar' [--repair FOLDER] [--name value]

Examples:
    python tools/check_shards.py --data 'shards/train/*.tar'
    python tools/check_shards.py --data 'shards/train/*.tar' --repair shards/repaired
"""

import hashlib
import io
import os
import sys
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from launch.command_line import configure_tool, run
from trainer.config import check_types
from trainer.data.decode import decode_image
from trainer.data.members import GROUP_FIELDS, Sample, samples_of
from trainer.data.shards import list_shards
from trainer.data.storage import is_url
from trainer.data.tar import MAX_MEMBER_BYTES, Member, walk_tar
from trainer.errors import ConfigError, DataError, SampleError

EXIT_DAMAGED = 1
_BLOCK = 512
_LISTED = 20
_HISTOGRAM_ROWS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    data: str = ""
    """Shards: paths, globs, URLs or {000..099} ranges, separated by commas."""
    repair: str | None = None
    """Folder for new shards with the samples that are whole; none repairs nothing."""
    num_processes: int | None = None
    """Shards read at a time; none uses every core."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_processes is not None and self.num_processes < 1:
            raise ConfigError(f"num_processes is {self.num_processes}, but must be at least 1")


@dataclass(slots=True)
class Findings:
    """What one shard holds and what is wrong with it."""

    location: str
    num_samples: int = 0
    num_bytes: int = 0
    sides: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(height, width) -> images."""
    labels: Counter[str] = field(default_factory=Counter)
    groups: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in GROUP_FIELDS})
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    """First 16 bytes of an image's sha256, and the sample's key."""
    problems: list[str] = field(default_factory=list)
    num_saved: int = 0


def main(words: list[str]) -> int:
    """Check shards; returns the exit code."""
    settings = configure_tool(words, Settings(), __doc__, required=("data",))
    if settings is None:
        return 0
    shards = list_shards(settings.data, setting="--data")
    target = _repair_folder(settings.repair, shards)
    findings = list(_all(shards, target, settings))
    describe(findings)
    problems = [problem for found in findings for problem in found.problems]
    if target is not None:
        print(f"{sum(found.num_saved for found in findings)} whole samples were written to {target}")
    for problem in problems[:_LISTED]:
        print(f"damaged: {problem}")
    if len(problems) > _LISTED:
        print(f"... and {len(problems) - _LISTED} more")
    print(f"{len(problems)} problems in {sum(bool(found.problems) for found in findings)} of {len(shards)} shards")
    return EXIT_DAMAGED if problems else 0


def _repair_folder(folder: str | None, shards: list[str]) -> Path | None:
    if folder is None:
        return None
    remote = next((shard for shard in shards if is_url(shard)), None)
    if remote:
        raise ConfigError(f"repair is {folder!r}, but {remote} is remote: copy the damaged shards, then repair them")
    names = Counter(Path(shard).name for shard in shards).most_common(1)[0]
    if names[1] > 1:
        raise ConfigError(f"repair is {folder!r}, but {names[1]} shards are named {names[0]}: repair folder by folder")
    path = Path(folder)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"repair is {folder!r}, but that folder is not empty: name a new one")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _all(shards: list[str], target: Path | None, settings: Settings) -> Iterator[Findings]:
    num_processes = min(settings.num_processes or len(os.sched_getaffinity(0)), len(shards))
    work = partial(check, target=target)
    with tqdm(total=len(shards), unit="shard", disable=not settings.progress_bar) as bar:
        if num_processes == 1:
            for shard in shards:
                yield work(shard)
                bar.update()
            return
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            for found in pool.map(work, shards):
                yield found
                bar.update()


def check(location: str, *, target: Path | None = None) -> Findings:
    """Read one shard, and write its whole samples to a shard of the same name in ``target``."""
    found = Findings(location)
    try:
        for sample in samples_of(location, walk_tar(location, keep_payload_below=MAX_MEMBER_BYTES + 1)):
            _note(found, sample)
    except DataError as error:
        found.problems.append(str(error))
    if target is not None:
        found.num_saved = _rewrite(Path(location), target)
    return found


def _note(found: Findings, sample: Sample) -> None:
    assert sample.image is not None
    assert sample.image.payload is not None
    found.num_samples += 1
    found.num_bytes += sample.image.size
    found.labels[str(sample.label) if sample.label >= 0 else "none"] += 1
    for name, value in sample.groups.items():
        found.groups[name][value] += 1
    found.digests.append((hashlib.sha256(sample.image.payload).digest()[:16], sample.key))
    try:
        found.sides[decode_image(sample.image.payload).shape[:2]] += 1
    except SampleError as error:
        found.problems.append(f"shard {found.location}: sample {sample.key!r} is {error}")


def describe(findings: list[Findings]) -> None:
    """Print counts, sizes, labels, groups and duplicates."""
    num_samples, num_bytes = sum(f.num_samples for f in findings), sum(f.num_bytes for f in findings)
    print(f"{num_samples} samples, {num_bytes / 1e9:.3f} GB of images in {len(findings)} shards")
    sides = sorted((min(side), count) for f in findings for side, count in f.sides.items())
    if sides:
        expanded = Counter[int]()
        for side, count in sides:
            expanded[side] += count
        print(f"shorter sides {sides[0][0]} to {sides[-1][0]} px, most often {expanded.most_common(1)[0][0]} px")
    _histogram("label", sum((f.labels for f in findings), Counter()))
    for name in GROUP_FIELDS:
        _histogram(name, sum((f.groups[name] for f in findings), Counter()))
    first: dict[bytes, str] = {}
    twice = []
    for found in findings:
        for digest, key in found.digests:
            if first.setdefault(digest, key) is not key:
                twice.append((first[digest], key))
    for one, other in twice[:_LISTED]:
        print(f"the same image twice: {one} and {other}")
    if twice:
        print(f"{len(twice)} images occur more than once, byte for byte")


def _histogram(title: str, counts: Counter[str]) -> None:
    if counts and set(counts) != {"none"}:
        shown = ", ".join(f"{value}: {count}" for value, count in counts.most_common(_HISTOGRAM_ROWS))
        more = f", and {len(counts) - _HISTOGRAM_ROWS} more values" if len(counts) > _HISTOGRAM_ROWS else ""
        print(f"{title}  {shown}{more}")


def _rewrite(source: Path, target: Path) -> int:
    """Copy whole samples into a new shard; nothing is written where there is none. Returns their number."""
    draft = target / f".{source.name}.tmp-{uuid.uuid4().hex[:8]}"
    num_saved = 0
    try:
        with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
            for members in _whole_samples(source):
                num_saved += 1
                for member in members:
                    info = tarfile.TarInfo(member.name)
                    info.size, info.mode = member.size, 0o444
                    tar.addfile(info, io.BytesIO(member.payload or b""))
        if num_saved:
            draft.replace(target / source.name)
    finally:
        draft.unlink(missing_ok=True)
    return num_saved


def _whole_samples(source: Path) -> Iterator[list[Member]]:
    """Group what can be saved and keep each sample that passes every check; of two with one key, the first."""
    seen: set[str] = set()
    group: list[Member] = []
    for member in _salvaged(source):
        if group and _key(member) != _key(group[0]):
            yield from _if_whole(source, group, seen)
            group = []
        group.append(member)
    yield from _if_whole(source, group, seen)


def _key(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _if_whole(source: Path, group: list[Member], seen: set[str]) -> Iterator[list[Member]]:
    try:
        samples = list(samples_of(str(source), iter(group)))
        if len(samples) == 1 and samples[0].key not in seen and samples[0].image is not None:
            decode_image(samples[0].image.payload or b"")
            seen.add(samples[0].key)
            yield group
    except DataError:
        return


def _salvaged(source: Path) -> Iterator[Member]:
    """Yield every member whose header and length are sound, looking for the next header behind damage.

    A member whose content is damaged is met by the decoder: a tar has no checksum of contents.
    """
    raw = source.read_bytes()
    position, long_name = 0, None
    while position + _BLOCK <= len(raw):
        try:
            info = tarfile.TarInfo.frombuf(raw[position : position + _BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            position, long_name = position + _BLOCK, None
            continue
        start, size = position + _BLOCK, info.size
        if not 0 <= size <= len(raw) - start:
            position, long_name = position + _BLOCK, None
            continue
        payload = raw[start : start + size]
        position = start + size + -size % _BLOCK
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            long_name = _long_name(info.type, payload)
            continue
        if info.isreg():
            yield Member(long_name or info.name, start, size, 0, payload)
        long_name = None


def _long_name(kind: bytes, payload: bytes) -> str | None:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
    for line in payload.split(b"\n"):
        if b" path=" in line:
            return line.partition(b" path=")[2].decode("utf-8", "surrogateescape")
    return None


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
