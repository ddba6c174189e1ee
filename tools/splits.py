"""Split a set of faces and morphs into train, dev and test so that no person is in two of them.

People are assigned to splits, and an image goes to the split of the people in it. A morph shows two people: if these
are in different splits, the morph is dropped and listed in OUTPUT/dropped.csv. The assignment depends only on the seed,
the shares and the set of people, not on the order of rows or files.

The people of an image come from one of: --layout, for a published data set as it is on disk (tools/PROTOCOLS.md);
columns identity and identity_2 of the manifest; --identities, a CSV with columns path, identity and optional
identity_2; or --identity_pattern on each path. Paths are those of the manifest, or relative to the source folder. Use
the same names in all sets that you join: '1' and '001' are two people here.

Usage: python tools/splits.py --source FOLDER_OR_CSV --output_dir FOLDER [--name value]

Examples:
    python tools/splits.py --source people.csv --output_dir splits
    python tools/splits.py --source people.csv --output_dir splits-even --shares 0.4,0.2,0.4 --seed 1
    python tools/splits.py --source faces --output_dir splits-faces --identity_pattern '(?P<a>person[0-9]+)/'
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import csv
import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.data.writing.layouts import read_layout
from trainer.data.writing.manifest import read_table
from trainer.data.writing.source_images import Entry, names_tars, plain_text, read_source
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import atomic_folder

SPLITS = ("train", "dev", "test")
PATTERNS = {
    # 001_03.jpg and the morphs 001_045.jpg, 001_03_045_03.jpg, 001_03_vs_045_03.jpg, 001_03_morph_045_02.png
    "frll": r"(?:^|/)(?P<a>\d{3})(?:_\d{2})?(?:_(?:(?:vs|morph)_)?(?P<b>\d{3})(?:_\d{2})?)?\.\w+$",
    # 04927d04.png and the morphs 04424d82-vs-04559d102.jpg, 02463d252.png_vs_04494d50.png
    "frgc": r"(?:^|/)(?P<a>\d{5})d\d+(?:(?:\.\w+)?[_-]vs[_-](?P<b>\d{5})d\d+)?\.\w+$",
    # img000184.png and the morphs morphed_img000184_img282038.png
    "smdd": r"(?:^|/)(?:morphed_)?(?P<a>img\d+)(?:_(?P<b>img\d+))?\.\w+$",
}

IdentitiesOf = Callable[[str, Entry], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    source: str = ""
    """Folder tree of images, or a CSV file with a column path and optional identity, identity_2, label and others."""
    output_dir: str = ""
    """Where train.csv, dev.csv, test.csv and dropped.csv go; must be empty or absent."""
    identities: str | None = None
    """CSV with columns path, identity and optional identity_2; none takes them from the source or the pattern."""
    identity_pattern: str | None = None
    """Naming of frll, frgc or smdd, or a regular expression on the path: (?P<a>...), and (?P<b>...) for morphs."""
    shares: str = "0.7,0.1,0.2"
    """Shares of the people in train, dev and test."""
    seed: int = 0
    """Other seeds give other splits."""
    keep_components: bool = False
    """Keep people together who are linked through morphs, so that nothing is dropped; refused where too many are."""
    folder_labels: bool = False
    """Make classes of the folders of the first level: bonafide 0, morph or attack 1, others as label_map says."""
    layout: Literal["none", "smdd", "frll", "frgc_feret", "mad22", "mordiff", "lma", "folders"] = "none"
    """Published data set that source is, as make_shards takes it: people, labels and tools come from its file names."""
    label_map: str | None = None
    """Numbers of classes, as 'real=0,fake=1'; or sorted, for numbers in the order of the names."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        parse_shares(self.shares)
        if self.identity_pattern is not None:
            compile_pattern(self.identity_pattern)
        if self.layout != "none" and (self.folder_labels or self.identities or self.identity_pattern):
            raise ConfigError(
                f"layout is {self.layout}, which names people and labels: take no folder_labels, identities or "
                "identity_pattern with it"
            )
        if self.identities is not None and self.identity_pattern is not None:
            raise ConfigError(f"identities is {self.identities!r}, but identity_pattern is set too: keep one of them")


@dataclass(frozen=True, slots=True)
class Photo:
    """One image and the people in it."""

    entry: Entry
    identities: tuple[str, ...]
    """One person, or both parents of a morph."""


CLI = CommandLine(Settings, __doc__, required=("source", "output_dir"))


def main(settings: Settings) -> int:
    """Write the splits; returns the exit code."""
    make_splits(settings)
    return 0


def make_splits(settings: Settings) -> None:
    """Read the images, assign the people, write the manifests and print the number of images of each split.

    Raises:
        ConfigError: an image has no identity, a split would stay empty, or the output is in use.
    """
    output, shares = Path(settings.output_dir).absolute(), parse_shares(settings.shares)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output_dir {output} is not empty: name a new folder")
    photos = read_photos(settings)
    people = sorted({person for photo in photos for person in photo.identities})
    groups = components(photos) if settings.keep_components else [[person] for person in people]
    _refuse_giant(groups, shares, len(people))
    split_of = assign(groups, shares, settings.seed)
    placed, dropped = place(photos, split_of)
    _refuse_empty(placed, shares, len(people))
    _write(output, placed, dropped, split_of)
    print(_table(placed, dropped, split_of))
    for split in SPLITS:
        missing = {_label(photo) for photo in photos} - {_label(photo) for photo in placed[split]}
        if placed[split] and missing:
            print(f"warning: {split} has no image with {', '.join(sorted(missing))}: try another seed or other shares")
    print(f"Next: python tools/make_shards.py --source {output / 'train.csv'} --output_dir shards/train")


# ---------------------------------------------------------------------------------------------- people to splits


def assign(groups: Sequence[Sequence[str]], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Assign each group of people to the split that lacks most of its share, large groups first, in hashed order.

    Groups of one person fill each share to within two people. A new person may move others to another split, so the
    splits of two versions of a set are not disjoint from each other.

    Example: 10 people with shares 0.7, 0.1, 0.2 want 7, 1 and 2. The first five go to train, which then lacks 2 like
    test; ties go to the first split.
    """
    wanted = [share * sum(map(len, groups)) for share in shares]
    split_of: dict[str, str] = {}
    for group in sorted(groups, key=lambda group: (-len(group), _hash(seed, min(group)))):
        number = max(range(len(wanted)), key=lambda i: wanted[i])
        wanted[number] -= len(group)
        split_of |= dict.fromkeys(group, SPLITS[number])
    return split_of


def place(photos: Iterable[Photo], split_of: dict[str, str]) -> tuple[dict[str, list[Photo]], list[Photo]]:
    """Return the images of each split, and the images whose people are in different splits."""
    placed: dict[str, list[Photo]] = {split: [] for split in SPLITS}
    dropped: list[Photo] = []
    for photo in photos:
        splits = {split_of[person] for person in photo.identities}
        (placed[splits.pop()] if len(splits) == 1 else dropped).append(photo)
    return placed, dropped


def components(photos: Iterable[Photo]) -> list[list[str]]:
    """Group the people who are linked through morphs, directly or through others."""
    linked: dict[str, set[str]] = defaultdict(set)
    for photo in photos:
        for person in photo.identities:
            linked[person].update(photo.identities)
    groups, seen = [], set[str]()
    for start in sorted(linked):
        group, waiting = set[str](), {start} - seen
        while waiting:
            group |= waiting
            waiting = {other for person in waiting for other in linked[person]} - group
        seen |= group
        if group:
            groups.append(sorted(group))
    return groups


def _hash(seed: int, person: str) -> str:
    return hashlib.sha256(f"{seed}\0{person}".encode()).hexdigest()


def _refuse_giant(groups: Sequence[Sequence[str]], shares: Sequence[float], num_people: int) -> None:
    largest = max(map(len, groups))
    if largest > 1 and largest > max(shares) * num_people:
        raise ConfigError(
            f"keep_components is True, but morphs link {largest} of {num_people} people, more than the largest share "
            f"({max(shares):.0%}): leave it away, then morphs across splits are dropped"
        )


def _refuse_empty(placed: dict[str, list[Photo]], shares: Sequence[float], num_people: int) -> None:
    for split, share in zip(SPLITS, shares, strict=True):
        if share > 0 and not placed[split]:
            raise ConfigError(
                f"shares gives {share} to {split}, but no image of the {num_people} people falls there: "
                "raise that share, set it to 0, or try another seed"
            )


# ---------------------------------------------------------------------------------------------- people of an image


def read_photos(settings: Settings) -> list[Photo]:
    """List the images with their identities, sorted by path.

    Raises:
        ConfigError: no source of identities or several, an image without one, or an image that is listed twice.
    """
    entries = sorted(_entries_of(settings), key=lambda entry: str(entry.path))
    source = Path(settings.source)
    for one, two in itertools.pairwise(entries):
        if one.path == two.path:
            raise ConfigError(f"source {source} lists {one.path} more than once: keep one of the rows")
    identities_of, remedy = _identities_by(settings, has_column=any("identity" in entry.metadata for entry in entries))
    root = source.parent if source.is_file() else source
    photos = [Photo(entry, identities_of(_name_below(root, entry.path), entry)) for entry in entries]
    _report_unused(settings, {_name_below(root, entry.path) for entry in entries})
    unknown = [str(photo.entry.path) for photo in photos if not photo.identities]
    if unknown:
        raise ConfigError(f"{unknown[0]} has no identity ({len(unknown)} images in all): {remedy}")
    return photos


def _entries_of(settings: Settings) -> list[Entry]:
    """Read the source and print what is left out of it."""
    if names_tars(settings.source):
        raise ConfigError(f"source is {settings.source!r}, but tars cannot be split: name a folder or a CSV file")
    if settings.layout != "none":
        source = read_layout(settings.layout, settings.source, label_map=settings.label_map)
    else:
        source = read_source(settings.source, folder_labels=settings.folder_labels, label_map=settings.label_map)
    print(source.describe())
    for entry in source.entries:
        if plain_text(str(entry.path)) != str(entry.path):
            raise ConfigError(
                f"{plain_text(str(entry.path))}: this name is no UTF-8, as CSV files need: rename the file"
            )
    return source.entries


def _report_unused(settings: Settings, names: set[str]) -> None:
    """Print how many rows of --identities belong to no image: their paths may be written differently."""
    if settings.identities is not None:
        unused = sorted(read_identities(Path(settings.identities)).keys() - names)
        if unused:
            print(f"identities {settings.identities}: {len(unused)} rows name no image, such as {unused[0]}")


def _name_below(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _identities_by(settings: Settings, *, has_column: bool) -> tuple[IdentitiesOf, str]:
    """Return the function that finds the people of an image, and the remedy for an image without any."""
    flag = next((name for name in ("identities", "identity_pattern") if getattr(settings, name) is not None), None)
    if has_column and flag is not None:
        raise ConfigError(f"{flag} is set, but source {settings.source} has a column identity: keep one of them")
    if has_column:
        remedy = "name it as published, or move it away" if settings.layout != "none" else "fill its column identity"
        return lambda _, entry: _people(entry.metadata), remedy
    if settings.identities is not None:
        known = read_identities(Path(settings.identities))
        return lambda name, _: known.get(name, ()), f"add its path to {settings.identities}"
    if settings.identity_pattern is not None:
        pattern = compile_pattern(settings.identity_pattern)
        return (
            lambda name, _: _people_in(pattern.search(name)),
            f"identity_pattern {settings.identity_pattern!r} does not match its path: fix it, or pass --identities",
        )
    raise ConfigError(
        f"source {settings.source} has no column identity: add it, or pass --identities or --identity_pattern"
    )


def read_identities(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a CSV with columns path, identity and optional identity_2.

    Raises:
        ConfigError: the file is absent, has other columns, or names a path twice.
    """
    if not path.is_file():
        raise ConfigError(f"identities is {str(path)!r}, but no such file exists: check the path")
    table = read_table(path, setting="identities")
    if sorted(table.columns) not in (["identity", "path"], ["identity", "identity_2", "path"]):
        raise ConfigError(f"identities {path} has columns {table.columns}, but must have path, identity and identity_2")
    known: dict[str, tuple[str, ...]] = {}
    for row in table.rows:
        name = Path(row["path"]).as_posix()
        if name in known:
            raise ConfigError(f"identities {path} names {name} more than once: keep one of the rows")
        known[name] = _people(row)
    return known


def _people(row: dict[str, str]) -> tuple[str, ...]:
    """Read both columns; a second person without a first counts as none."""
    first, second = (str(row.get(column) or "").strip() for column in ("identity", "identity_2"))
    return _distinct(first, second) if first else ()


def _people_in(match: re.Match[str] | None) -> tuple[str, ...]:
    groups = match.groupdict() if match else {}
    return _distinct(groups["a"], groups.get("b")) if groups.get("a") else ()


def _distinct(first: str, second: str | None) -> tuple[str, ...]:
    return (first, second) if second and second != first else (first,)


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile a named pattern or a regular expression.

    Raises:
        ConfigError: it is no regular expression with a group ``a`` and at most ``b`` beside it.
    """
    rule = (
        f"must be one of {', '.join(PATTERNS)} or a regular expression with a group (?P<a>...) and perhaps (?P<b>...)"
    )
    try:
        pattern = re.compile(PATTERNS.get(text, text))
    except re.error as error:
        raise ConfigError(f"identity_pattern is {text!r}, but {rule} ({error})") from error
    if set(pattern.groupindex) not in ({"a"}, {"a", "b"}):
        raise ConfigError(f"identity_pattern is {text!r}, but {rule}")
    return pattern


def parse_shares(text: str) -> list[float]:
    """Read three shares that add up to 1, or raise `ConfigError`."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or not all(share >= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"shares is {text!r}, but must be three numbers from 0 that add up to 1 (try 0.7,0.1,0.2)")
    return shares


# ---------------------------------------------------------------------------------------------- output


def _write(output: Path, placed: dict[str, list[Photo]], dropped: list[Photo], split_of: dict[str, str]) -> None:
    """Write the manifests, atomically."""
    with atomic_folder(output) as draft:
        for split, photos in placed.items():
            _write_csv(draft / f"{split}.csv", [_row(photo) for photo in photos])
        _write_csv(draft / "dropped.csv", [_row(photo) | _splits_of(photo, split_of) for photo in dropped])


def _row(photo: Photo) -> dict[str, str]:
    """Describe an image for make_shards; the key is that of the whole set, whatever else is in the split."""
    label = "" if photo.entry.label is None else str(photo.entry.label)
    first, second = (*photo.identities, "")[:2]
    own = {"path": str(photo.entry.path.absolute()), "key": photo.entry.key, "label": label}
    others = {name: value for name, value in photo.entry.metadata.items() if name != "path" and isinstance(value, str)}
    return own | others | {"identity": first, "identity_2": second}


def _splits_of(photo: Photo, split_of: dict[str, str]) -> dict[str, str]:
    return {f"split{suffix}": split_of[person] for suffix, person in zip(("", "_2"), photo.identities, strict=True)}


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(name for row in rows for name in row)  # only morphs of a layout have a tool
        writer = csv.DictWriter(file, list(columns) or ["path", "key", "label", "identity", "identity_2"])
        writer.writeheader()
        writer.writerows(rows)


def _table(placed: dict[str, list[Photo]], dropped: list[Photo], split_of: dict[str, str]) -> str:
    """Count people and images by split and label."""
    everywhere = placed | {"dropped": dropped}
    labels = sorted({_label(photo) for photos in everywhere.values() for photo in photos})
    people = Counter(split_of.values())
    lines = ["".join(f"{cell:>12}" for cell in ("", "people", "images", *labels))]
    for name, photos in everywhere.items():
        counts = Counter(map(_label, photos))
        cells = (name, people[name] if name in SPLITS else "", len(photos), *(counts[label] for label in labels))
        lines.append("".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _label(photo: Photo) -> str:
    return "no label" if photo.entry.label is None else f"label {photo.entry.label}"


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
