"""Show what is inside shards: one PNG with evenly spaced images, each with its key and label.

An image that the trainer cannot use appears as a grey tile with the reason.

Usage: python tools/contact_sheet.py --data 'shards/*.tar' --output sheet.png [--name value]

Examples:
    python tools/contact_sheet.py --data 'shards/train/*.tar' --output sheet.png
    python tools/contact_sheet.py --data 'shards/train/*.tar,shards/val/*.tar' --output both.png --num_images 9

Shapes: H, W image size; HWC uint8 RGB.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.data.shards.index import list_shards, open_index
from trainer.data.shards.members import NO_LABEL
from trainer.data.shards.reader import ShardReader
from trainer.data.transforms.decode import decode_image
from trainer.errors import ConfigError, SampleError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import atomic_draft

_SIDE_PX = 160
_LINE_PX = 16
_GAP_PX = 8
_MIN_COLUMNS = 4
_MAX_LABELS_SHOWN = 6
_GREY = (160, 160, 160)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    data: str = ""
    """Shards: paths, globs or {000..099} ranges, separated by commas."""
    output: str = "contact_sheet.png"
    """The picture; an older one is replaced."""
    num_images: int = 64
    """How many images to show, evenly spread over all [images]."""
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    image_member: str | None = None
    """Suffix of the image to read where samples hold several, as left.jpg; none: the only one, or the plain one."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        if not self.output.lower().endswith(".png"):
            raise ConfigError(f"output is {self.output!r}, but must end in .png")
        if not Path(self.output).parent.is_dir():
            raise ConfigError(f"output is {self.output!r}, but its folder does not exist: create it")


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of the sheet."""

    key: str
    label: int
    image_HWC: NDArray[np.uint8] | None
    reason: str
    """Why there is no image; empty if there is one."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Counts of the shards, and the images of the sheet."""

    num_shards: int
    num_images_by_label: dict[int, int]
    tiles: list[Tile]
    notes: tuple[str, ...] = ()
    """What is left out of the shards, and what cannot be used."""


CLI = CommandLine(Settings, __doc__, required=("data",))


def main(settings: Settings) -> int:
    """Draw the sheet; returns the exit code."""
    contents = read_images(settings.data, settings.num_images, settings.index_dir, settings.image_member)
    output = Path(settings.output)
    with atomic_draft(output) as draft:
        draw_sheet(contents).save(draft, "PNG")
    print("\n".join([f"{output}: {title_of(contents)}", *contents.notes]))
    return 0


def read_images(data: str, num_images: int, index_dir: str | None = None, image_member: str | None = None) -> Contents:
    """Read up to ``num_images`` images, evenly from the first to the last.

    Raises:
        ConfigError: no shard matches, or the index cannot be written.
        DataError: a shard breaks the rules.
    """
    shards = list_shards(data, setting="--data")
    folder = None if index_dir is None else Path(index_dir)
    index = open_index(shards, index_dir=folder, image_member=image_member)
    reader = ShardReader()
    count = min(num_images, len(index))
    tiles = []
    for sample in (index.sample(i * len(index) // count) for i in range(count)):
        try:
            tiles.append(Tile(sample.key, sample.label, decode_image(reader.read(sample)), ""))
        except SampleError as error:
            tiles.append(Tile(sample.key, sample.label, None, error.reason))
    labels, counts = np.unique(index.labels, return_counts=True)
    by_label = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    return Contents(len(shards), by_label, tiles, tuple(index.tally.notes()))


def title_of(contents: Contents) -> str:
    """Describe how many images are shown of how many, and their labels."""
    by_label = contents.num_images_by_label
    if len(by_label) > _MAX_LABELS_SHOWN:
        labels = f"{len(by_label)} labels"
    else:
        names = names_of(by_label)
        labels = ", ".join(f"{names[label]}: {count}" for label, count in by_label.items())
    num_damaged = sum(tile.image_HWC is None for tile in contents.tiles)
    damaged = f" ({num_damaged} damaged)" if num_damaged else ""
    total = sum(by_label.values())
    return f"{len(contents.tiles)}{damaged} of {total} images in {contents.num_shards} shards; {labels}"


def names_of(labels: Iterable[int]) -> dict[int, str]:
    """Name labels: as classes of detection if all labels are 0 or 1, otherwise by number."""
    known, labels = {0: "bonafide", 1: "morph"}, set(labels)
    detection = labels <= {NO_LABEL, *known}
    return {
        label: "no label" if label == NO_LABEL else f"{label} {known[label]}" if detection else f"label {label}"
        for label in labels
    }


def draw_sheet(contents: Contents) -> Image.Image:
    """Draw the tiles in a grid below a title, row by row."""
    font, names = sheet_font(), names_of(contents.num_images_by_label)
    num_columns = max(_MIN_COLUMNS, math.ceil(math.sqrt(len(contents.tiles))))
    num_rows = math.ceil(len(contents.tiles) / num_columns)
    step_x, step_y = _SIDE_PX + _GAP_PX, _SIDE_PX + 2 * _LINE_PX + _GAP_PX
    width = num_columns * step_x + _GAP_PX
    title = _wrapped(title_of(contents), width - 2 * _GAP_PX, font)
    top = len(title) * _LINE_PX + 2 * _GAP_PX
    sheet = Image.new("RGB", (width, top + num_rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title):
        draw.text((_GAP_PX, _GAP_PX + number * _LINE_PX), line, "black", font)
    for number, tile in enumerate(contents.tiles):
        row, column = divmod(number, num_columns)
        x, y = _GAP_PX + column * step_x, top + row * step_y
        sheet.paste(_picture(tile, font), (x, y))
        draw.text((x, y + _SIDE_PX), shorten(tile.key, _SIDE_PX, font), "black", font)
        draw.text((x, y + _SIDE_PX + _LINE_PX), names.get(tile.label, str(tile.label)), "dimgrey", font)
    return sheet


def _picture(tile: Tile, font: ImageFont.FreeTypeFont) -> Image.Image:
    if tile.image_HWC is not None:
        return ImageOps.pad(Image.fromarray(tile.image_HWC), (_SIDE_PX, _SIDE_PX), color="white")
    grey = Image.new("RGB", (_SIDE_PX, _SIDE_PX), _GREY)
    ImageDraw.Draw(grey).text((_SIDE_PX // 2, _SIDE_PX // 2), tile.reason, "black", font, anchor="mm")
    return grey


def sheet_font() -> ImageFont.FreeTypeFont:
    """Return the font of the sheet: DejaVu Sans of matplotlib, because Pillow's own font has ASCII only."""
    return ImageFont.truetype(_font_file(), _LINE_PX - 4)


def _font_file() -> str:
    import matplotlib as mpl  # its font, wherever this runs

    return str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def _drawable() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def readable(key: str) -> str:
    """Return a key with drawable characters; line ends, control characters and others are escaped."""
    return "".join(
        c if c.isprintable() and ord(c) in _drawable() and c != "\\" else c.encode("unicode_escape").decode()
        for c in unicodedata.normalize("NFC", key)  # macOS stores letter and accent separately
    )


def shorten(key: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Shorten a key from the left until it fits into ``width`` [pixels]."""
    text = readable(key)
    if font.getlength(text) <= width:
        return text
    start = next(start for start in range(1, len(text) + 1) if font.getlength("..." + text[start:]) <= width)
    return "..." + text[start:]


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text between words into lines that fit into ``width`` [pixels]."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
