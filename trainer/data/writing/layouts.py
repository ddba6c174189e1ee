"""Published data sets of morphing attack detection, as they are on disk: which image is what, who is in it, which tool.

Each layout is a function from a folder (or a CSV) to the images to pack. It fills label, identity, identity_2, attack
and source from folders and file names, because none of these sets brings them as a table. Every file is packed or
counted as left out, with the reason.

People of one photograph collection get the same name in every set that is made of it: person 001 of the Face Research
Lab London set is ``frll/001`` in FRLL-Morphs, MAD22 and MorDIFF. So a detector that was trained on one of them is
refused on the others.

====================== ============================================ =====================================
layout                 folders                                      names of morphs
====================== ============================================ =====================================
smdd                   os25k_bf_t, m15k_t                           morphed_img000184_img282038.png
frll                   raw, morph_amsl, ..., morph_webmorph         001_002.jpg, 001_03_002_03.jpg
frgc_feret             raw, morph_facemorpher, _opencv, _stylegan   04202d345_04203d12.jpg
mad22                  BonaFide, FaceMorpher, MIPGAN_I, ...         009_08-vs-144_08.jpg
mordiff                raw, morphs_neutral, morphs_smiling          009_08-vs-144_08.jpg
folders                raw, any others: one a tool                  any of these
lma                    a CSV: image_path,label,split                04424d82-vs-04559d102.jpg
====================== ============================================ =====================================

Sources: the repositories of SMDD (arXiv 2203.06691), SYN-MAD-2022 (arXiv 2208.07337), SelfMAD (arXiv 2504.05504) and
MADation (arXiv 2501.03800), and the pages of Idiap's FRLL-, FRGC- and FERET-Morphs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data.labels import CLASSES
from trainer.data.shards.members import Tally
from trainer.data.writing.class_labels import class_numbers
from trainer.data.writing.image_files import read_suffixes, why_not_read
from trainer.data.writing.manifest import Table, read_table
from trainer.data.writing.source_images import Entry, Source, key_text, plain_text, walk_folder
from trainer.errors import ConfigError

BONA_FIDE = ""
"""The tool of a folder of bona fides."""
_RAW = ("raw", "bonafide", "bona_fide")
_IDIAP = {"facemorpher": "facemorpher", "opencv": "opencv", "stylegan": "stylegan"}
_TOOLS: dict[str, dict[str, str]] = {
    "frll": {"amsl": "amsl", **_IDIAP, "webmorph": "webmorph"},
    "frgc_feret": _IDIAP,
    "mad22": {
        "facemorpher": "facemorpher",
        "facemorph": "facemorpher",
        "mipgan_i": "mipgan_i",
        "mipgan_ii": "mipgan_ii",
        "opencv": "opencv",
        "webmorph": "webmorph",
    },
    "mordiff": {"morphs_neutral": "mordiff", "morphs_smiling": "mordiff"},
}
"""Layout -> plain name of a folder -> its morphing tool."""
_MAY_LACK_BONA_FIDES = ("mad22", "mordiff")
"""Published as morphs of the FRLL photographs, which come from elsewhere."""
_SMDD = {"os25k_bf_t": BONA_FIDE, "m15k_t": "opencv"}
_CSV_LAYOUTS = ("smdd", "lma")

# One photograph of each collection; the first group is its person.
_PHOTOGRAPHS: dict[str, str] = {
    "smdd": r"(img\d+)",
    "frgc": r"(\d{4,6})d\d+",
    "feret": r"(\d{5})(?:[a-z]{2}\d{3}[a-z]?)?_\d{6}(?:_[a-z]{2})?(?:_[a-z])?",
    "frll": r"(\d{3})(?:_\d{2})?",
}
_BETWEEN = r"(?:\.\w+)?(?:-vs-|_vs_|_and_|_morph_|-|_)"


@dataclass(frozen=True, slots=True)
class People:
    """Who is in an image, by its file name."""

    collection: str
    """Name of the photograph collection."""
    identity: str
    identity_2: str = ""
    """The other parent of a morph."""


def people_of(stem: str, collections: tuple[str, ...] = tuple(_PHOTOGRAPHS)) -> People | None:
    """Read the people from a file name without its suffix; None if no collection names photographs so.

    Examples: ``001_03`` is frll/001, ``morphed_img000184_img282038`` is smdd/img000184 and smdd/img282038, and
    ``04424d82-vs-04559d102`` is frgc/04424 and frgc/04559.
    """
    for name in collections:
        one = _PHOTOGRAPHS[name]
        if found := re.fullmatch(one, stem):
            return People(name, f"{name}/{found[1]}")
        if found := re.fullmatch(rf"(?:morphed_)?{one}{_BETWEEN}{one}", stem):
            return People(name, f"{name}/{found[1]}", f"{name}/{found[2]}")
    return None


def read_layout(layout: str, source: str, *, label_map: str | None = None, split: str | None = None) -> Source:
    """List the images of a published data set.

    Args:
        layout: its name, a key of `LAYOUTS`.
        source: the folder, or for smdd and lma a CSV.
        label_map: numbers of the CSV's labels, as 'attack=1,bonafide=0'.
        split: the part to read, where the CSV has a column ``split``.

    Raises:
        ConfigError: the folder or the CSV is not of this layout; the message names what was expected and found.
    """
    path = Path(source)
    if path.is_file():
        if layout not in _CSV_LAYOUTS:
            raise ConfigError(f"layout is {layout}, but source {source} is a file: name the folder of the data set")
        return _read_csv(layout, path, label_map, split)
    for name, value in (("label_map", label_map), ("split", split)):
        if value:
            raise ConfigError(f"{name} is {value!r}, but layout {layout} of a folder takes its labels from folders")
    if not path.is_dir():
        kinds = "folder or CSV file" if layout in _CSV_LAYOUTS else "folder"
        raise ConfigError(f"source is {source!r}, but no such {kinds} exists: check the path")
    return LAYOUTS[layout](path)


# ---------------------------------------------------------------------------------------------- folders


def _smdd(root: Path) -> Source:
    """SMDD: 25,000 bona fides and 15,000 morphs of synthetic people; the lists of boxes beside them are read too.

    The folder os25k_m_t of the same archive holds the photographs that the morphs were made from. They are not part of
    the training protocol, so they are left out.
    """
    source = _of_folders(root, "smdd", _SMDD, needed=tuple(_SMDD), collections=("smdd",))
    boxes = _boxes_beside(root)
    entries = [replace(e, metadata=e.metadata | boxes.get(_box_key(e.metadata["path"]), {})) for e in source.entries]
    num_boxes = sum("published_box" in entry.metadata for entry in entries)
    notes = (f"boxes of faces: {num_boxes} of {len(entries)} images",) if boxes else ()
    return replace(source, entries=entries, notes=source.notes + notes)


def _sets_of(name: str, root: Path, *, collections: tuple[str, ...]) -> Source:
    tools = _TOOLS[name]
    needed = () if name in _MAY_LACK_BONA_FIDES else ("raw",)
    return _of_folders(root, name, {**dict.fromkeys(_RAW, BONA_FIDE), **tools}, needed=needed, collections=collections)


def _folders(root: Path) -> Source:
    """Any set with a folder ``raw`` of bona fides and one folder for each morphing tool, as SelfMAD++ expects them."""
    found = {_plain(p.name): _plain(p.name) for p in sorted(root.iterdir()) if p.is_dir() and not _is_hidden(p)}
    # MIPGAN_I, MorphPIPE and MorCode have one folder "morphs": the tool is the name of the set.
    tools = {name: _plain(root.resolve().name) if name == "morphs" else tool for name, tool in found.items()}
    return _of_folders(
        root, "folders", tools | dict.fromkeys(_RAW, BONA_FIDE), needed=("raw",), collections=("frgc", "feret", "frll")
    )


LAYOUTS: Mapping[str, Callable[[Path], Source]] = {
    "smdd": _smdd,
    "frll": partial(_sets_of, "frll", collections=("frll",)),
    "frgc_feret": partial(_sets_of, "frgc_feret", collections=("frgc", "feret")),
    "mad22": partial(_sets_of, "mad22", collections=("frll",)),
    "mordiff": partial(_sets_of, "mordiff", collections=("frll",)),
    "lma": lambda root: _refuse_folder_for_csv(root, "lma"),
    "folders": _folders,
}
"""Layout -> the function that reads it."""


def _refuse_folder_for_csv(root: Path, layout: str) -> Source:
    tables = ", ".join(sorted(p.name for p in root.glob("*.csv"))) or "no CSV"
    raise ConfigError(
        f"layout {layout} is a CSV with columns image_path, label and split, but source {root} is a folder (with "
        f"{tables}): name the CSV"
    )


def _of_folders(
    root: Path, layout: str, tools: dict[str, str], *, needed: tuple[str, ...], collections: tuple[str, ...]
) -> Source:
    """List the images below the folders of ``tools``; all others are left out and counted."""
    below = {_plain(p.name): p.name for p in sorted(root.iterdir()) if p.is_dir() and not _is_hidden(p)}
    _check_folders(root, layout, tools, below, needed)
    walked = walk_folder(root, folder_labels=False)
    tally, entries = walked.tally, list[Entry]()
    for entry in walked.entries:
        folder = entry.path.relative_to(root).parts[0]
        tool = tools.get(_plain(folder))
        if tool is None or len(entry.path.relative_to(root).parts) == 1:
            place = f"in folder {plain_text(folder)}" if tool is None and folder in below.values() else "in no folder"
            tally.num_used -= 1
            tally.leave_out(f"images {place}, which layout {layout} does not use", entry.metadata["path"])
            continue
        entries.append(_described(entry, layout, tool, collections, tally))
    notes = _notes(layout, tools, entries)
    for label, expected in enumerate((bool(needed), True)):
        if expected and not any(entry.label == label for entry in entries):
            raise ConfigError(f"layout is {layout}, but source {root} holds no image of a {CLASSES[label]}: check it")
    return Source(str(root), entries, tally, {}, notes)


def _described(entry: Entry, layout: str, tool: str, collections: tuple[str, ...], tally: Tally) -> Entry:
    label = int(tool != BONA_FIDE)
    people = people_of(entry.path.stem, collections)
    if people is None or bool(people.identity_2) != bool(label):
        tally.cannot_use("identity", entry.metadata["path"])
        people = None
    source = people.collection if layout == "frgc_feret" and people else layout
    return replace(entry, label=label, metadata=entry.metadata | _fields(people, tool, source))


def _fields(people: People | None, tool: str, source: str) -> dict[str, Any]:
    fields = {"source": source, "attack": tool}
    if people:
        fields |= {"identity": people.identity, "identity_2": people.identity_2}
    return {name: value for name, value in fields.items() if value}


def _check_folders(
    root: Path, layout: str, tools: dict[str, str], below: dict[str, str], needed: tuple[str, ...]
) -> None:
    """Raise `ConfigError` if the folders are not those of the layout."""
    bona_fides = [name for name, tool in tools.items() if tool == BONA_FIDE and name in below]
    attacks = [name for name, tool in tools.items() if tool != BONA_FIDE and name in below]
    if attacks and (bona_fides or not needed):
        return
    expected = {
        name: " or ".join(n for n, t in tools.items() if (t == BONA_FIDE) == (name == "bona fides"))
        for name in ("bona fides", "morphs")
    }
    lacking = "bona fides" if attacks else "morphs"
    found = ", ".join(below.values()) or "no folder"
    inner = next((p for p in sorted(root.glob("*/")) if any(_plain(q.name) in tools for q in p.glob("*/"))), None)
    remedy = f"name the folder {inner}" if inner and not _is_hidden(inner) else "check the path and the layout"
    raise ConfigError(
        f"layout is {layout}, but source {root} has no folder of {lacking}: expected "
        f"{expected[lacking] or 'one for each tool'}, found {found}: {remedy}"
    )


def _notes(layout: str, tools: dict[str, str], entries: list[Entry]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for entry in entries:
        name = entry.metadata.get("attack", CLASSES[0])
        counts[name] = counts.get(name, 0) + 1
    notes = [f"layout {layout}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))]
    absent = sorted({tool for tool in tools.values() if tool != BONA_FIDE} - counts.keys())
    if absent:
        notes.append(f"no images of {', '.join(absent)}")
    if CLASSES[0] not in counts:
        notes.append("no bona fides: add those of FRLL to the test set, as in 'mad22/*.tar,frll/*.tar'")
    return tuple(notes)


def _plain(folder: str) -> str:
    """Compare folders without case, ``morph_`` and the suffix of cropped copies."""
    name = re.sub(r"[\s-]", "_", folder.casefold()).removeprefix("morph_")
    return re.sub(r"_(aligned|cropped)$", "", name)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


# ---------------------------------------------------------------------------------------------- boxes of SMDD


def _boxes_beside(root: Path) -> dict[str, dict[str, Any]]:
    """Read the published lists of boxes: all .txt files directly in the folder."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(root.glob("*.txt")):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if line.strip():
                found |= _box_of(line, f"{path}, line {number}")
    return found


def _box_of(line: str, where: str) -> dict[str, dict[str, Any]]:
    """Read ``./m15k_t/x.png x1 x2 y1 y2 ...``: the two x come before the two y, then five points as x y.

    Example: ``43 197 41 240`` is the box from (43, 41) to (197, 240). It is stored as [43, 41, 197, 240].
    """
    name, *texts = line.split()
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != 14:
        raise ConfigError(f"{where}: it is no box of SMDD (a path, x1 x2 y1 y2 and five points): move the file away")
    x1, x2, y1, y2 = numbers[:4]
    if x1 >= x2 or y1 >= y2:
        raise ConfigError(f"{where}: the box {texts[:4]} is empty, but the order must be x1 x2 y1 y2: correct it")
    points = [list(pair) for pair in zip(numbers[4::2], numbers[5::2], strict=True)]
    return {_box_key(name): {"published_box": [x1, y1, x2, y2], "published_points": points}}


def _box_key(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


# ---------------------------------------------------------------------------------------------- CSV


def _read_csv(layout: str, path: Path, label_map: str | None, split: str | None) -> Source:
    """Read ``image_path,label`` of SMDD and its followers, or ``image_path,label,split`` of LMA.

    Labels are words, because 1 is the bona fide in MADation's files and the morph in SelfMAD's. A space after the comma
    does not count.
    """
    needs = ("image_path", "label", "split") if layout == "lma" else ("image_path", "label")
    table = read_table(path, setting="source", needs=needs)
    where = f"layout is {layout}: source {path}"
    rows, tally = _rows_of_split(table, where, split)
    texts = {row["label"] for _, row in rows}
    codes = sorted(text for text in texts if not re.search("[a-z]", text, re.IGNORECASE))
    if codes and not label_map:
        raise ConfigError(
            f"{where} has the label {codes[0]!r}, and 1 is the bona fide in some published files and the morph in "
            "others: say which, with --label_map '0=0,1=1' where 1 is the morph, or '0=1,1=0' where 1 is the bona fide"
        )
    classes = class_numbers(texts, label_map, where=where, may_sort=False)
    strange = sorted(set(classes.values()) - {0, 1})
    if strange:
        raise ConfigError(f"{where} has class {strange[0]}, but only 0 (bona fide) and 1 (morph) exist: map the labels")
    entries = [_entry_of(layout, path, row, classes[row["label"]], tally) for _, row in rows]
    named = {text: number for text, number in classes.items() if text != str(number)}
    return Source(str(path), entries, tally, named)


def _rows_of_split(table: Table, where: str, split: str | None) -> tuple[list[tuple[int, dict[str, str]]], Tally]:
    parts = sorted({row["split"] for row in table.rows}) if "split" in table.columns else []
    if parts and split not in parts:
        asked = f"split is {split!r}" if split else "split is not set"
        raise ConfigError(f"{where} has the splits {', '.join(parts)}, but {asked}: name one with --split {parts[0]}")
    if split and not parts:
        raise ConfigError(f"{where} has no column split, but split is {split!r}: leave it away")
    tally, rows = Tally(num_members=len(table.rows)), []
    for line, row in table.numbered:
        if parts and row["split"] != split:
            tally.leave_out(f"rows of split {row['split']}", plain_text(row["image_path"]))
        elif (suffix := Path(row["image_path"]).suffix).lower() not in read_suffixes():
            tally.leave_out(why_not_read(suffix), plain_text(row["image_path"]))
        else:
            rows.append((line, row))
    tally.num_used = len(rows)
    if not rows:
        raise ConfigError(f"{where} names no image that can be read: check image_path")
    return rows, tally


def _entry_of(layout: str, table: Path, row: dict[str, str], label: int, tally: Tally) -> Entry:
    name = row["image_path"].replace("\\", "/")
    people = people_of(Path(name).stem)
    if people is None or bool(people.identity_2) != bool(label):
        tally.cannot_use("identity", plain_text(name))
        people = None
    # The folders of published CSVs are those of another machine, so the last two parts of a path make the key.
    short = Path(*Path(name).parts[-2:])
    tool = row.get("attack", "") or (("opencv" if layout == "smdd" else layout) if label else "")
    fields = {"path": plain_text(short.as_posix())} | _fields(people, tool if label else "", layout)
    return Entry(table.parent / name, key_text(short.with_suffix("").as_posix()), label, fields)
