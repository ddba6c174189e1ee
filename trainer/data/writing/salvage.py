"""Save what is intact in a damaged shard: every complete sample, and a reason for every other one.

Members are joined by key wherever they stand. If it is not clear which members belong together, the sample counts as
lost: a label beside the wrong face is worse than a missing face. Sums agree: members found = written + lost + left out.

`_members` is a second walk over tars beside `walk_tar`, on purpose. The strict walk reads a stream once and stops at
the first fault. This one needs random access: it searches for the next header block by block behind damage, and
follows hard links back to their files. Block size and header parsing are shared.
"""

import contextlib
import io
import mmap
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.data.shards.members import Sample, Tally, key_of, samples_of, why_left_out
from trainer.data.shards.tar import BLOCK_BYTES, MAX_MEMBER_BYTES, Member, parse_header, walk_tar
from trainer.data.transforms.decode import decode_image
from trainer.errors import DataError
from trainer.files import draft_of

_EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_NO_MEMBERS = (tarfile.XGLTYPE, tarfile.DIRTYPE, b"V", b"D")
_NO_BYTES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)


@dataclass(slots=True)
class Saved:
    """What became of the members of one shard."""

    num_members: int = 0
    num_written: int = 0
    """Members in the new shard."""
    num_samples: int = 0
    """Samples in the new shard."""
    lost: list[tuple[str, str, int]] = field(default_factory=list)
    """Key or name, the reason, and the number of its members."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why a member is no part of a sample -> members."""
    damage: list[str] = field(default_factory=list)
    """Ranges of bytes that are no members."""

    @property
    def agrees(self) -> bool:
        """Whether every member that came in is accounted for."""
        lost = sum(count for _, _, count in self.lost)
        return self.num_members == self.num_written + lost + sum(self.left_out.values())


def rewrite(source: Path, target: Path, *, image_member: str | None = None) -> Saved:
    """Copy complete samples into a new shard of the same name; write nothing if there is none.

    Raises:
        DataError: the new shard does not read as it was written.
    """
    saved = Saved()
    draft = draft_of(target / source.name)
    try:
        with _bytes_of(source) as raw:
            groups = _by_key(_members(raw, saved), saved)
            labels = _write(draft, raw, groups, saved, image_member)
        if labels:
            _compare(draft, labels, saved, image_member)
            draft.replace(target / source.name)
    finally:
        draft.unlink(missing_ok=True)
    return saved


def _write(
    draft: Path, raw: "mmap.mmap | bytes", groups: dict[str, list[list[Member]]], saved: Saved, image_member: str | None
) -> dict[str, int]:
    """Write the complete samples; returns their labels by key."""
    labels: dict[str, int] = {}
    usual = _usual_suffixes(groups) if saved.damage else set()
    are_apart = _are_apart(groups)
    with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, runs in groups.items():
            members, problem = _joined(key, runs, saved, raw)
            if saved.damage and len(runs) > 1 and not are_apart:
                problem = "its members stand apart in a damaged shard: nothing says that they belong together"
            complete = [replace(m, payload=raw[m.offset : m.offset + m.size]) for m in members]
            sample, problem = (None, problem) if problem else _checked(complete, image_member, usual)
            if sample is None:
                saved.lost.append((key, problem, len(members)))
                continue
            labels[key] = sample.label
            saved.num_written += len(complete)
            for member in complete:
                info = tarfile.TarInfo(member.name)
                info.size, info.mode = member.size, 0o444
                tar.addfile(info, io.BytesIO(member.payload or b""))
    saved.num_samples = len(labels)
    return labels


def _joined(key: str, runs: list[list[Member]], saved: Saved, raw: "mmap.mmap | bytes") -> tuple[list[Member], str]:
    """Join the members of a key; returns them, and the reason why they cannot be one sample, or an empty text."""
    members: list[Member] = []
    for run in runs:
        for member in run:
            same = [m for m in members if m.name == member.name and _content(raw, m) == _content(raw, member)]
            if same:
                saved.left_out["copies of a member"] += 1
            else:
                members.append(member)
    repeated = [suffix for suffix, count in Counter(map(_suffix, members)).items() if count > 1]
    if not repeated:
        return members, ""
    shapes = [sorted(map(_suffix, run)) for run in runs]
    if all(shape == shapes[0] and len(set(shape)) == len(shape) for shape in shapes):
        for run in runs[1:]:  # several complete samples share a key, as in joined tars: the first one stays
            kept = [member for member in run if member in members]
            saved.lost.append((key, "another sample of this key stands before it", len(kept)))
        return runs[0], ""
    return members, f"it has several members .{repeated[0]}, and nothing says which of its members belong together"


def _checked(members: list[Member], image_member: str | None, usual: set[str]) -> tuple[Sample | None, str]:
    """Return the sample, or the reason why it is not complete."""
    try:
        (sample,) = samples_of("", iter(members), image_member=image_member)
        decode_image(sample.image.payload or b"")
    except DataError as error:
        return None, str(error).removeprefix("shard : ")
    missing = sorted(usual - sample.suffixes)
    if missing:
        return None, f"it has no .{missing[0]}, as most others have: it stood where the shard is damaged"
    return sample, ""


def _are_apart(groups: dict[str, list[list[Member]]]) -> bool:
    """Whether the members of most samples stand apart: then that is the order of the shard, not damage."""
    return 2 * sum(len(runs) > 1 for runs in groups.values()) > len(groups)


def _usual_suffixes(groups: dict[str, list[list[Member]]]) -> set[str]:
    """Return the text members that most samples have: a sample without them has lost them to damage."""
    counts = Counter(suffix for runs in groups.values() for suffix in {_suffix(m) for run in runs for m in run})
    return {s for s, count in counts.items() if 2 * count > len(groups) and s.rpartition(".")[2] in ("cls", "json")}


def _compare(draft: Path, labels: dict[str, int], saved: Saved, image_member: str | None) -> None:
    """Read what was written as the trainer does."""
    tally = Tally()
    members = walk_tar(draft, keep_payload_below=MAX_MEMBER_BYTES + 1)
    found = {s.key: s.label for s in samples_of(str(draft), members, image_member=image_member, tally=tally)}
    if found != labels or tally.num_members != saved.num_written:
        raise DataError(f"{draft.name}: the new shard does not read as it was written: please report this")


def _suffix(member: Member) -> str:
    split = key_of(member.name)
    assert split is not None
    return split[1]


def _by_key(members: Iterator[Member], saved: Saved) -> dict[str, list[list[Member]]]:
    """Return the runs of neighbouring members of each key, in order of appearance."""
    groups: dict[str, list[list[Member]]] = {}
    last = None
    for member in members:
        split = key_of(member.name)
        if split is None:
            saved.left_out[why_left_out(member.name)] += 1
        elif split[0] == last:
            groups[last][-1].append(member)
        else:
            last = split[0]
            groups.setdefault(last, []).append([member])
    return groups


def _members(raw: "mmap.mmap | bytes", saved: Saved) -> Iterator[Member]:
    """Yield every member whose header and length are valid; search for the next header behind damage.

    A tar has checksums of headers only, so damage inside a file shows in the decoder.

    Example: headers at bytes 0, 1536 and 3072, the second one damaged. Blocks 1536, 2048 and 2560 hold no valid header,
    so the walk goes on at 3072 and reports that bytes 1536 to 3072 are damaged.
    """
    position, damaged_from, long_name, has_end = 0, None, None, False
    places: dict[str, Member] = {}
    while position + BLOCK_BYTES <= len(raw):
        info = _header(raw[position : position + BLOCK_BYTES])
        size = 0 if info is None or info.type in _NO_BYTES else info.size
        if info is None or not 0 <= size <= len(raw) - position - BLOCK_BYTES:
            is_zero = not raw[position : position + BLOCK_BYTES].strip(b"\0")
            has_end |= is_zero
            if not is_zero and damaged_from is None:
                damaged_from = position
            position, long_name = position + BLOCK_BYTES, None
            continue
        if damaged_from is not None:
            saved.damage.append(f"bytes {damaged_from} to {position} are damaged")
            damaged_from = None
        start = position + BLOCK_BYTES
        position = start + size + -size % BLOCK_BYTES
        if info.type in _EXTENDED:
            long_name = _long_name(info.type, raw[start : start + size]) or long_name
            continue
        name, long_name = long_name or info.name, None
        if info.type in _NO_MEMBERS:
            continue
        saved.num_members += 1
        member = _member(info, name, start, places)
        if member is None:
            saved.lost.append((name, "it is a link without its file, a sparse file or a device", 1))
        else:
            yield member
    if damaged_from is not None or not has_end:
        since = position if damaged_from is None else damaged_from
        saved.damage.append(f"its end is missing or damaged from byte {since}")


def _member(info: tarfile.TarInfo, name: str, start: int, places: dict[str, Member]) -> Member | None:
    """Return a regular file, or the file that a hard link names; None for every other kind."""
    if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:
        places[name] = Member(name, start, info.size, 0, None)
    elif info.type == tarfile.LNKTYPE and info.linkname in places:
        places[name] = replace(places[info.linkname], name=name)
    else:
        return None
    return places[name]


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return parse_header(block)
    except tarfile.HeaderError:
        return None


def _long_name(kind: bytes, payload: bytes) -> str | None:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
    for line in payload.split(b"\n") if kind == tarfile.XHDTYPE else ():
        if b" path=" in line:
            return line.partition(b" path=")[2].decode("utf-8", "surrogateescape")
    return None


def _content(raw: "mmap.mmap | bytes", member: Member) -> bytes:
    return raw[member.offset : member.offset + member.size]


@contextlib.contextmanager
def _bytes_of(path: Path) -> "Iterator[mmap.mmap | bytes]":
    """Map a file into memory; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        yield raw
