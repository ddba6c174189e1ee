"""The one reader of CSV files, as spreadsheets, editors and scripts write them.

It reads UTF-8 with or without a byte order mark, and UTF-16 with one; commas, semicolons, tabs or bars between the
columns; spaces around names and values; empty lines. A column that is almost a known one is refused: without that, a
column ``Label`` would be ignored and all labels lost.
"""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from trainer.data.shards.members import GROUP_FIELDS
from trainer.errors import ConfigError

KNOWN_COLUMNS = ("path", "key", "label", *GROUP_FIELDS, "control", "landmark_name")
"""Columns that some command reads; all others are copied as text."""

_DELIMITERS = (",", ";", "\t", "|")
_MIN_CHARS_FOR_TYPOS = 4
"""Names shorter than this are compared exactly: one letter more or less makes another word."""
_MAGIC = {
    b"PAR1": "a Parquet file: write its table as CSV (pandas: read_parquet(...).to_csv(..., index=False))",
    b"PK\x03\x04": "a zip file or a spreadsheet: save the sheet as 'CSV UTF-8', or unpack the zip",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet: save the sheet as 'CSV UTF-8'",
    b"\x1f\x8b": "compressed with gzip: run gunzip on it first",
    b"SQLite": "a database: export the table as CSV",
    b"\x93NUMPY": "a numpy array: write its table as CSV",
    b"\x89HDF": "an HDF5 file: write its table as CSV",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A CSV file."""

    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]
    """Line of the file where each row ends, from 1."""

    @property
    def numbered(self) -> Iterable[tuple[int, dict[str, str]]]:
        """The rows with their line numbers."""
        return zip(self.lines, self.rows, strict=True)


def read_table(path: Path, *, setting: str, needs: tuple[str, ...] = ("path",)) -> Table:
    """Read a CSV file with a header.

    Args:
        path: the file.
        setting: the flag that named it, for messages.
        needs: columns that must exist and have a value in every row.

    Raises:
        ConfigError: there is no such file; it has another format or encoding; a column is missing, repeated or
            misspelled; or a row has other columns than the header.
    """
    where = f"{setting} {path}"
    header, *body = _filled_rows(_text_of(path, where), needs, where)
    columns, body = _without_empty_columns(header[1], body)
    _check_columns(columns, needs, where)
    if not body:
        raise ConfigError(f"{where} has no rows: list one image a row")
    for line, cells in body:
        if len(cells) != len(columns):
            raise ConfigError(
                f"{where}, line {line}: it does not have one value for each column ({len(cells)} for {len(columns)}): "
                "put values that hold the column separator into quotation marks"
            )
        empty = next((name for name, cell in zip(columns, cells, strict=True) if name in needs and not cell), None)
        if empty:
            raise ConfigError(f"{where}, line {line}: {empty} is empty: fill it, or remove the row")
    rows = [dict(zip(columns, cells, strict=True)) for _, cells in body]
    return Table(columns, rows, [line for line, _ in body])


def _filled_rows(text: str, needs: tuple[str, ...], where: str) -> list[tuple[int, list[str]]]:
    """Return line number and cells of each row that is not empty, the header first."""
    first, _, rest = text.partition("\n")
    skipped = 0
    if re.fullmatch("sep=.", first.strip(), re.IGNORECASE):  # Excel's own hint about the separator
        text, delimiter, skipped = rest, first.strip()[-1], 1
    else:
        delimiter = _delimiter_of(first, needs)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        found = [(reader.line_num + skipped, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        line = reader.line_num + skipped
        raise ConfigError(f"{where}, line {line}: {error}: close each quotation mark, double those inside") from error
    filled = [(line, cells) for line, cells in found if any(cells)]
    if not filled:
        raise ConfigError(f"{where} is empty: write a header with {_listed(needs)}, then one row an image")
    return filled


def _without_empty_columns(
    columns: list[str], body: list[tuple[int, list[str]]]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Drop empty columns without a name, which spreadsheets leave at the right."""
    while len(columns) > 1 and not columns[-1] and not any(any(cells[len(columns) - 1 :]) for _, cells in body):
        columns = columns[:-1]
        body = [(line, cells[: len(columns)]) for line, cells in body]
    width = len(columns)
    return columns, [(line, cells if any(cells[width:]) else cells[:width]) for line, cells in body]


def _text_of(path: Path, where: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}): name a CSV file") from error
    kind = _kind_of(path, raw)
    if kind:
        raise ConfigError(f"{where} is {kind}")
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{where}, line {line}: it is not UTF-8, but perhaps Windows-1252 or Latin-1: save it as 'CSV UTF-8', or "
            f"convert it (iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8.csv)"
        ) from error
    if "\0" in text:
        raise ConfigError(f"{where} holds zero bytes, so it is no CSV in UTF-8: save it as 'CSV UTF-8'")
    return text


def _kind_of(path: Path, raw: bytes) -> str:
    """Describe a file that is no CSV, with the remedy; empty for a possible CSV."""
    magic = next((kind for start, kind in _MAGIC.items() if raw.startswith(start)), "")
    if magic:
        return magic
    if raw[257:262] == b"ustar":
        return "a tar: name a CSV or a folder, or pack tars again with tools/make_shards.py --source 'FOLDER/*.tar'"
    if path.suffix.lower() in Image.registered_extensions() or raw.startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return "an image: name the folder that holds the images, or a CSV with a column path"
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return "a JSON file: write its table as CSV (pandas: read_json(...).to_csv(..., index=False))"
    return ""


def _delimiter_of(header: str, needs: tuple[str, ...]) -> str:
    """Choose the separator that yields the needed columns, otherwise the most columns."""
    found = {delimiter: _cells(header, delimiter) for delimiter in _DELIMITERS}
    fitting = [delimiter for delimiter, cells in found.items() if set(needs) <= set(cells)]
    return fitting[0] if fitting else max(_DELIMITERS, key=lambda delimiter: len(found[delimiter]))


def _cells(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [cell.strip() for cell in cells]


def _check_columns(columns: list[str], needs: tuple[str, ...], where: str) -> None:
    for column in columns:
        near = [name for name in near_misses(column) if name not in columns]
        if near:
            raise ConfigError(
                f"{where} has a column {column!r}, which no command reads: write {near[0]!r}, or name it otherwise if "
                "it means something else"
            )
    name, count = Counter(columns).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{where} has {count} columns {name!r}: keep one of them")
    if "" in columns:
        raise ConfigError(f"{where}: column {columns.index('') + 1} has no name: name it, or remove it")
    missing = [name for name in needs if name not in columns]
    if missing:
        raise ConfigError(f"{where} has columns {_listed(columns)}, but needs {_listed(missing)}: rename or add it")


def near_misses(column: str) -> list[str]:
    """Return the known columns that this one almost equals: ``Label``, ``labels``, ``lable`` all give label."""
    if column in KNOWN_COLUMNS:
        return []
    plain, known = _plain(column), {name: _plain(name) for name in KNOWN_COLUMNS}
    alike = [name for name, other in known.items() if plain == other]
    long = {name: other for name, other in known.items() if len(other) >= _MIN_CHARS_FOR_TYPOS}
    return alike or [name for name, other in long.items() if _one_typo(plain, other)]


def _plain(column: str) -> str:
    letters = "".join(c for c in column.casefold() if c.isalnum())
    return letters.removesuffix("s")


def _one_typo(one: str, other: str) -> bool:
    """Whether one edit makes them equal: a letter added, removed or replaced, or two neighbours swapped.

    Both are compared behind their common beginning. Example: key and kye leave ey and ye, which are swapped neighbours.
    """
    if abs(len(one) - len(other)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
