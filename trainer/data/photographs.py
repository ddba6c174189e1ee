"""Photographs outside of shards: a file, a folder or a list of files, loaded with the pixels that shards of them have.

Formats that the trainer does not store, such as JPEG 2000 and TIFF, become PNG in memory, as tools/make_shards.py
writes them. A photograph that cannot be read has a reason instead of pixels.

Shapes: B photographs of a batch, S image side [pixels].
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.data.stream import Batch, ChosenRequests, Request, Stream
from trainer.data.transforms.faces import Box
from trainer.data.transforms.views import Photo, View
from trainer.data.writing.image_files import as_trainable, read_suffixes
from trainer.data.writing.manifest import read_table
from trainer.data.writing.source_images import plain_text, walk_folder
from trainer.errors import ConfigError, SampleError

MAX_FILE_BYTES = 1 << 29
NO_FILE = "no_file"
"""The reason of a photograph whose file is missing or may not be read."""


@dataclass(frozen=True, slots=True)
class Photographs:
    """Files in the order in which they are scored."""

    paths: list[Path]
    names: list[str]
    """As the user wrote them, for the output."""
    note: str
    """How many there are, and what was left out."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """Of a list, column -> text of each photograph; empty for a file or a folder."""

    def fingerprint(self) -> str:
        """Return a sha256 over names, sizes and times of change, so that another set is noticed."""
        digest = hashlib.sha256()
        for path, name in zip(self.paths, self.names, strict=True):
            try:
                status = path.stat()
                stamp = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                stamp = NO_FILE
            digest.update(f"{name}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find_photographs(images: str) -> Photographs:
    """List a photograph, the photographs of a folder sorted by path, or those of a CSV with a column path.

    Paths of a CSV are relative to it, and its order is kept.

    Raises:
        ConfigError: there is no such file or folder, or it holds no image.
    """
    path = Path(images)
    if path.is_file() and path.suffix.lower() in read_suffixes():
        return Photographs([path], [plain_text(images)], f"{images}: 1 photograph")
    if path.is_file():
        rows = read_table(path, setting="images").rows
        paths = [path.parent / row["path"] for row in rows]
        return Photographs(paths, [plain_text(row["path"]) for row in rows], f"{images}: {len(rows)} photographs", rows)
    if not path.is_dir():
        raise ConfigError(
            f"images is {images!r}, but no such file or folder exists: name a photograph, a folder, a CSV with a "
            "column path, or shards"
        )
    try:
        source = walk_folder(path, folder_labels=False)
    except ConfigError as error:
        raise ConfigError(f"images is {images!r}: {error}") from error
    paths = [entry.path for entry in source.entries]
    return Photographs(paths, [plain_text(str(path)) for path in paths], source.describe().removeprefix("source "))


def read_photograph(path: Path) -> bytes:
    """Return the bytes of a JPEG, PNG or WebP file; other images become PNG.

    Raises:
        SampleError: the file cannot be read, or is no usable image.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SampleError("too_large", f"{path} has more than {MAX_FILE_BYTES} bytes")
        payload = path.read_bytes()
    except OSError as error:
        raise SampleError(NO_FILE, f"{path} cannot be read ({error.strerror})") from error
    return as_trainable(payload) if payload else payload


class PhotoLoader:
    """Turns a request into pixels; the position of a photograph is its place in the list."""

    def __init__(self, paths: list[Path], view: View) -> None:
        self._paths, self._view = [os.fspath(path) for path in paths], view

    def __call__(self, request: Request) -> Batch:
        """Load one batch; a photograph that cannot be read is black, and its failure names the reason."""
        positions, size = request.position_B.tolist(), self._view.size
        images_BSSC = torch.zeros((len(positions), size, size, 3), dtype=torch.uint8)
        rows_BSSC, draws_BK = images_BSSC.numpy(), self._view.draw(request.position_B)
        failures = [""] * len(positions)
        boxes: list[Box | None] = [None] * len(positions)
        for i, position in enumerate(positions):
            one = slice(i, i + 1)
            try:
                photo = Photo(read_photograph(Path(self._paths[position])))
                boxes[i] = self._view(photo, draws_BK[one], rows_BSSC[one]).face_box
            except SampleError as error:
                failures[i], rows_BSSC[one] = error.reason, 0
        return Batch(
            images_BCHW=images_BSSC.permute(0, 3, 1, 2),
            noise_BN=torch.empty((len(positions), 0)),
            positions=positions,
            keys=[self._paths[position] for position in positions],
            labels=[-1] * len(positions),
            failures=failures,
            face_boxes=boxes,
        )


def photo_stream(photographs: Photographs, samples: list[int], view: View, *, batch: int) -> Stream:
    """Build one pass over chosen photographs in the given order."""
    return Stream(ChosenRequests(samples, batch), PhotoLoader(photographs.paths, view))
