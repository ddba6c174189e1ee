"""Verify shards, describe what they hold, and copy the intact samples of damaged ones.

Every byte is read: the tar's structure, each image decoded as the trainer does, labels and group fields, images that
occur twice (by sha256 of their bytes). Exit code 0 means intact, 1 that something is damaged: it is listed.

Members that the trainer does not use are counted by kind; they are no damage. ``--repair FOLDER`` writes every complete
sample, even behind damaged bytes or with members apart, to new shards of the same names, and does not change the old
ones. Each lost sample is listed with the reason, all of them in FOLDER/lost.csv; the sums of members agree.

Usage: python tools/check_shards.py --data 'shards/*.tar' [--repair FOLDER] [--name value]

Examples:
    python tools/check_shards.py --data shards/train --num_processes 2
    python tools/check_shards.py --data 'shards/train/*.tar'
    python tools/check_shards.py --data 'shards/train/*.tar' --repair shards/repaired
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.data.shards.index import list_shards
from trainer.data.shards.members import GROUP_FIELDS, NO_LABEL, Sample, Tally, check_image_member, samples_of
from trainer.data.shards.tar import MAX_MEMBER_BYTES, walk_tar
from trainer.data.storage import is_url
from trainer.data.transforms.decode import colour_profile, decode_image
from trainer.data.writing.salvage import Saved, rewrite
from trainer.errors import ConfigError, DataError, SampleError
from trainer.fault_tolerance.exit_codes import run
from trainer.parallel import map_with_bar

EXIT_DAMAGED = 1
_MAX_LINES_SHOWN = 20
_MAX_VALUES_SHOWN = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    data: str = ""
    """Shards: paths, globs, URLs or {000..099} ranges, separated by commas."""
    image_member: str | None = None
    """Suffix of the image to read where samples hold several, as left.jpg; none: the only one, or the plain one."""
    repair: str | None = None
    """Folder for new shards with the complete samples; none repairs nothing."""
    num_processes: int | None = None
    """Shards read at a time; none uses every core."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        check_image_member(self.image_member)
        check_counts(self)


@dataclass(slots=True)
class Findings:
    """Contents and problems of one shard."""

    location: str
    tally: Tally = field(default_factory=Tally)
    num_bytes: int = 0
    sides: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(height, width) -> images."""
    profiles: Counter[str] = field(default_factory=Counter)
    """Name of the colour profile, "none" without one -> images."""
    groups: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in GROUP_FIELDS})
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    """First 16 bytes of an image's sha256, and the sample's key."""
    problems: list[str] = field(default_factory=list)
    saved: Saved | None = None


CLI = CommandLine(Settings, __doc__, required=("data",))


def main(settings: Settings) -> int:
    """Check shards; returns the exit code."""
    shards = list_shards(settings.data, setting="--data")
    target = _repair_folder(settings.repair, shards)
    findings = list(_all(shards, target, settings))
    describe(findings)
    problems = [problem for found in findings for problem in found.problems]
    if target is not None:
        problems += describe_repair(findings, target)
    for problem in problems[:_MAX_LINES_SHOWN]:
        print(f"damaged: {problem}")
    if len(problems) > _MAX_LINES_SHOWN:
        print(f"... and {len(problems) - _MAX_LINES_SHOWN} more")
    num_bad = sum(bool(found.problems) for found in findings)
    num_lost = sum(len(found.saved.lost) for found in findings if found.saved)
    print(f"{len(problems)} problems in {num_bad} of {len(shards)} shards")
    return EXIT_DAMAGED if problems or num_lost else 0


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
    num_processes = None if settings.num_processes is None else min(settings.num_processes, len(shards))
    work = partial(check, target=target, image_member=settings.image_member)
    return map_with_bar(work, shards, num_processes=num_processes, unit="shard", shown=settings.progress_bar)


def check(location: str, *, target: Path | None = None, image_member: str | None = None) -> Findings:
    """Read one shard, and write its complete samples to a shard of the same name in ``target``."""
    found = Findings(location)
    try:
        members = walk_tar(location, keep_payload_below=MAX_MEMBER_BYTES + 1)
        for sample in samples_of(location, members, image_member=image_member, tally=found.tally):
            _note(found, sample)
    except DataError as error:
        found.problems.append(str(error))
    if not found.tally.num_samples and not found.problems:
        found.problems.append(f"shard {location}: it holds no sample")
    if target is not None:
        found.saved = rewrite(Path(location), target, image_member=image_member)
    return found


def _note(found: Findings, sample: Sample) -> None:
    assert sample.image.payload is not None
    found.num_bytes += sample.image.size
    for name, value in sample.groups.items():
        found.groups[name][value] += 1
    found.digests.append((hashlib.sha256(sample.image.payload).digest()[:16], sample.key))
    found.profiles[colour_profile(sample.image.payload) or "none"] += 1
    try:
        found.sides[decode_image(sample.image.payload).shape[:2]] += 1
    except SampleError as error:
        found.problems.append(f"shard {found.location}: sample {sample.key!r} is {error}")


def describe(findings: list[Findings]) -> None:
    """Print counts, sizes, labels, groups and duplicates."""
    tally, num_bytes = Tally(), sum(f.num_bytes for f in findings)
    for found in findings:
        tally.add(found.tally)
    print(f"{tally.num_samples} samples, {num_bytes / 1e9:.3f} GB of images in {len(findings)} shards")
    sides = sorted((min(side), count) for f in findings for side, count in f.sides.items())
    if sides:
        expanded = Counter[int]()
        for side, count in sides:
            expanded[side] += count
        print(f"shorter sides {sides[0][0]} to {sides[-1][0]} px, most often {expanded.most_common(1)[0][0]} px")
    _histogram("label", Counter({_label(label): count for label, count in tally.labels.items()}))
    _histogram("colour profile", sum((f.profiles for f in findings), Counter()))
    for name in GROUP_FIELDS:
        _histogram(name, sum((f.groups[name] for f in findings), Counter()))
    for note in tally.notes():
        print(note)
    _describe_copies(findings)


def _describe_copies(findings: list[Findings]) -> None:
    first: dict[bytes, str] = {}
    twice = []
    for found in findings:
        for digest, key in found.digests:
            if first.setdefault(digest, key) is not key:
                twice.append((first[digest], key))
    for one, other in twice[:_MAX_LINES_SHOWN]:
        print(f"the same image twice: {one} and {other}")
    if twice:
        print(f"{len(twice)} images occur more than once, byte for byte")


def describe_repair(findings: list[Findings], target: Path) -> list[str]:
    """Print what was written and lost, and write all losses to a file; returns a problem for each wrong sum."""
    saved = [(found.location, found.saved) for found in findings if found.saved is not None]
    left_out = sum((each.left_out for _, each in saved), Counter[str]())
    lost = [(location, *entry) for location, each in saved for entry in each.lost]
    print(
        f"{sum(each.num_members for _, each in saved)} members were found: "
        f"{sum(each.num_written for _, each in saved)} were written as {sum(each.num_samples for _, each in saved)} "
        f"whole samples to {target}, {sum(count for *_, count in lost)} were lost, {left_out.total()} left out"
    )
    for reason, count in left_out.most_common():
        print(f"left out: {count} {reason}")
    for location, each in saved:
        for damage in each.damage:
            print(f"damaged: shard {location}: {damage}")
    for location, key, reason, count in lost[:_MAX_LINES_SHOWN]:
        print(f"lost: shard {location}: {key!r} ({count} members): {reason}")
    if lost:
        with (target / "lost.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([("shard", "key", "reason", "members"), *lost])
        print(f"{len(lost)} samples or members were lost, all are listed in {target / 'lost.csv'}")
    return [f"shard {location}: the sums of its members do not agree" for location, each in saved if not each.agrees]


def _label(label: int) -> str:
    return "none" if label == NO_LABEL else str(label)


def _histogram(title: str, counts: Counter[str]) -> None:
    if counts and set(counts) != {"none"}:
        shown = ", ".join(f"{value}: {count}" for value, count in counts.most_common(_MAX_VALUES_SHOWN))
        more = f", and {len(counts) - _MAX_VALUES_SHOWN} more values" if len(counts) > _MAX_VALUES_SHOWN else ""
        print(f"{title}  {shown}{more}")


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
