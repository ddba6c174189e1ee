"""Make face morphs: photographs of two people blended along their landmarks, as attacks to train and test detectors.

There are two modes. *whole*: both photographs are warped to the average shape and blended, background and hair
included. *splice*: the second face is warped into the first photograph and blended there inside the hull of the face,
with its colours matched; everything outside stays from the first photograph. With --same_person true both photographs
are of one person: the result is bona fide, but has the traces of blending. A detector that calls those morphs has
learned the blending instead of the morph.

Partners are other people of similar face shape, as an attacker would choose. Every row of OUTPUT/morphs.csv names both
parents; join it with the bona fides' manifest for tools/splits.py and tools/make_shards.py. Landmarks are those in the
shards, or come from an .npz (arrays ``names`` and ``points`` in pixels, or ``points_64th_px``), where a photograph is
matched by its column landmark_name, else its key, else the stem of its path; or dlib finds them.

Shapes: L landmarks (x, y) [pixels]; H, W image size; images are HWC uint8 RGB.
Source: Ferrara et al. 2014, "The magic passport", IJCB; splicing: Makrushin et al. 2017, VISAPP.

Usage: python tools/make_morphs.py --source FACES.csv --landmarks POINTS.npz --output_dir FOLDER [--name value]
       python tools/make_morphs.py --source 'SHARDS/*.tar' --output_dir FOLDER [--name value]

Examples:
    python tools/make_morphs.py --source bona_fides.csv --landmarks landmarks.npz --output_dir morphs
    python tools/make_morphs.py --source bona_fides.csv --landmarks landmarks.npz --output_dir controls --same_person
    python tools/make_morphs.py --source bona_fides.csv --landmarks landmarks.npz --output_dir spliced --mode splice
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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import Delaunay

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.config.record import to_dict
from trainer.data.landmarks import DLIB, Points, dlib_finder, landmarks_of, read_landmarks
from trainer.data.shards.index import NO_GROUP, SampleRef, describe_index, list_shards, open_index
from trainer.data.shards.reader import ShardReader
from trainer.data.storage import is_url
from trainer.data.transforms.decode import decode_image
from trainer.data.transforms.selfmorph import feathered
from trainer.data.writing.image_files import DAMAGE, as_trainable, describe_damage
from trainer.data.writing.source_images import read_manifest
from trainer.errors import ConfigError, DataError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import draft_of, write_atomically
from trainer.parallel import map_with_bar

_COLUMNS = ("path", "key", "label", "identity", "identity_2", "attack", "blend", "parent_a", "parent_b", "control")
_FEATHER_SHARE = 0.04
"""Width of the soft border, as a share of the shorter side of the face."""
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    source: str = ""
    """Bona fide photographs: a CSV with columns path, identity and optional key, landmark_name; or shards."""
    landmarks: str = ""
    """An .npz with arrays names and points (N, L, 2) in pixels, or points_64th_px; or dlib; or none: the shards'."""
    image_member: str | None = None
    """Suffix of the image to read where samples of shards hold several, as left.jpg; none: the only or plain one."""
    output_dir: str = ""
    """Where morphs.csv and the pictures (PNG) go."""
    mode: Literal["whole", "splice", "both"] = "both"
    """Blend whole photographs, splice one face into the other photograph, or make one of each."""
    same_person: bool = False
    """Blend two photographs of one person instead: bona fide controls with label 0."""
    pairs_per_identity: int = 10
    """Pairs that each person begins [pairs]."""
    nearest: int = 4
    """Partners are drawn among so many people of the most similar face shape; 0 for everybody."""
    blend: str = "0.5,0.5"
    """Smallest and largest share of the second photograph; drawn uniformly for each pair."""
    seed: int = 0
    """Other seeds give other pairs."""
    num_processes: int | None = None
    """Pictures made at a time; none uses every core."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        low, high = self.blend_range
        if not 0 < low <= high < 1:
            raise ConfigError(f"blend is {self.blend!r}, but must be two shares in order, above 0 and below 1")

    @property
    def blend_range(self) -> tuple[float, float]:
        """The smallest and largest share of the second photograph."""
        try:
            low, high = (float(part) for part in self.blend.split(","))
        except ValueError:
            raise ConfigError(f"blend is {self.blend!r}, but must be two shares such as 0.3,0.7") from None
        return low, high


class Photograph(NamedTuple):
    """One photograph of the source."""

    picture: Path | SampleRef
    key: str
    identity: str
    landmark_name: str | None = None


@dataclass(frozen=True, slots=True)
class Face:
    """A photograph with its landmarks."""

    picture: Path | SampleRef
    key: str
    identity: str
    points_L2: Points


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to make."""

    first: Face
    second: Face
    blend: float
    mode: str
    output: Path


CLI = CommandLine(Settings, __doc__, required=("source", "output_dir"))


def main(settings: Settings) -> int:
    """Return the exit code."""
    make_morphs(settings)
    return 0


def make_morphs(settings: Settings) -> Path:
    """Make the missing pictures and the manifest; returns the manifest's path.

    Raises:
        ConfigError: the output belongs to other settings, or the source names no pair.
        DataError: a photograph has no landmarks or cannot be read.
    """
    import trainer.data.transforms.resize  # noqa: F401  (it imports torch, which forked workers then need not)

    output = Path(settings.output_dir)
    faces = read_faces(settings)
    pairs = draw_pairs(faces, settings)
    modes = ("whole", "splice") if settings.mode == "both" else (settings.mode,)
    jobs = [
        Job(a, b, blend, mode, output / mode / f"{number:05d}_{_plain(a.key)}_{_plain(b.key)}.png")
        for number, (a, b, blend) in enumerate(pairs)
        for mode in modes
    ]
    _claim(output, settings, faces)
    missing = [job for job in jobs if not job.output.exists()]
    for mode in modes:
        (output / mode).mkdir(parents=True, exist_ok=True)
    for _ in _each(make_one, missing, settings, "morphs"):
        pass
    manifest = output / "morphs.csv"
    write_atomically(manifest, _manifest(jobs, same_person=settings.same_person))
    people = len({face.identity for face in faces})
    print(f"{len(faces)} photographs of {people} people; {people * settings.pairs_per_identity} pairs drawn")
    print(f"{len(jobs)} pictures of {len(pairs)} distinct pairs: {manifest}")
    return manifest


def read_faces(settings: Settings) -> list[Face]:
    """Join the photographs of the source with their landmarks.

    Raises:
        ConfigError: a file, column or package is missing.
        DataError: photographs are morphs, have no landmarks, or have other points than others.
    """
    shards = _names_shards(settings.source)
    photographs = _in_shards(settings.source, settings.image_member) if shards else _in_manifest(Path(settings.source))
    if settings.landmarks == DLIB:
        dlib_finder()  # refuses here and not in a worker
        found = list(_each(_find_landmarks, [each.picture for each in photographs], settings, "landmarks"))
    elif settings.landmarks:
        points = read_landmarks(Path(settings.landmarks))
        names = [(each.landmark_name, each.key, Path(_name(each.picture))) for each in photographs]
        found = [landmarks_of(*name, points) for name in names]
    elif shards:
        found = ShardReader().read_landmarks(
            [each.picture for each in photographs if isinstance(each.picture, SampleRef)]
        )
    else:
        raise ConfigError(f"landmarks is empty, but source {settings.source} holds none: name an .npz, or {DLIB}")
    _check_landmarks(photographs, found, settings.landmarks or settings.source)
    faces = zip(photographs, found, strict=True)
    return [Face(each.picture, each.key, each.identity, mine) for each, mine in faces if mine is not None]


def _check_landmarks(photographs: Sequence[Photograph], found: Sequence[Points | None], where: str) -> None:
    lost = [_name(each.picture) for each, mine in zip(photographs, found, strict=True) if mine is None]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(found)} photographs have no landmarks ({where}), the first {lost[0]}: add a column "
            f"landmark_name with the names of an .npz, let {DLIB} find them, or leave those photographs out"
        )
    counts = sorted({len(mine) for mine in found if mine is not None})
    if len(counts) > 1:
        raise DataError(f"photographs have {counts[0]} and {counts[1]} landmarks ({where}): all need the same points")


def _names_shards(source: str) -> bool:
    return is_url(source) or ".tar" in source or any(c in source for c in "*?[{") or Path(source).is_dir()


def _in_shards(source: str, image_member: str | None) -> list[Photograph]:
    index = open_index(list_shards(source, setting="source"), image_member=image_member)
    print(f"source: {describe_index(index)}")
    refs = index.samples(np.arange(len(index)))
    values, codes_N = index.groups("identity")
    for ref, code in zip(refs, codes_N.tolist(), strict=True):
        if code == NO_GROUP:
            raise ConfigError(f"source {source}: {_name(ref)} has no identity: add a column identity to its manifest")
        _refuse_morph(ref, ref.label)
    return [Photograph(ref, ref.key, values[code]) for ref, code in zip(refs, codes_N.tolist(), strict=True)]


def _in_manifest(source: Path) -> list[Photograph]:
    if not source.is_file():
        raise ConfigError(f"source is {str(source)!r}, but no such CSV file or shards exist: check the path")
    photographs = []
    for entry in read_manifest(source).entries:
        identity = entry.metadata.get("identity")
        if not identity:
            raise ConfigError(f"source {source}: {entry.path} has no identity: add a column identity")
        _refuse_morph(entry.path, entry.label)
        photographs.append(Photograph(entry.path, entry.key, str(identity), entry.metadata.get("landmark_name")))
    return photographs


def _refuse_morph(picture: Path | SampleRef, label: int | None) -> None:
    if label == 1:
        raise DataError(f"source: {_name(picture)} is a morph (label 1), but morphs need bona fides: leave it out")


def _find_landmarks(picture: Path | SampleRef) -> Points | None:
    return dlib_finder()(_read(picture))


def _name(picture: Path | SampleRef) -> str:
    return f"{picture.shard}: {picture.key}" if isinstance(picture, SampleRef) else str(picture)


def _each(work: Callable[[_T], _R], items: Sequence[_T], settings: Settings, what: str) -> Iterator[_R]:
    """Map over the items in order, on all processes, with a progress bar."""
    options: dict[str, Any] = {"num_processes": settings.num_processes, "shown": settings.progress_bar}
    return map_with_bar(work, items, what=what, unit="image", chunksize=8, **options)


def draw_pairs(faces: Sequence[Face], settings: Settings) -> list[tuple[Face, Face, float]]:
    """Draw pairs of photographs and their blends; each unordered pair at most once.

    Raises:
        ConfigError: there is nobody to pair with.
    """
    people: dict[str, list[Face]] = defaultdict(list)
    for face in faces:
        people[face.identity].append(face)
    generator, low_high = np.random.Generator(np.random.Philox(settings.seed)), settings.blend_range
    partners = {name: [name] for name in people} if settings.same_person else _similar(people, settings.nearest)
    chosen: dict[frozenset[str], tuple[Face, Face, float]] = {}
    for name in sorted(people):
        for _ in range(settings.pairs_per_identity):
            other = partners[name][int(generator.integers(len(partners[name])))] if partners[name] else name
            first, second = (people[who][int(generator.integers(len(people[who])))] for who in (name, other))
            blend = round(float(generator.uniform(*low_high)), 4)
            # a-b and b-a are one pair: the first draw of it counts.
            if first.key != second.key:
                chosen.setdefault(frozenset((first.key, second.key)), (first, second, blend))
    pairs = [pair for pair in chosen.values() if settings.same_person or pair[0].identity != pair[1].identity]
    if not pairs:
        raise ConfigError(
            f"source names {len(people)} people and no pair to blend: morphs need two people, controls two photographs "
            "of one"
        )
    return pairs


def _similar(people: dict[str, list[Face]], nearest: int) -> dict[str, list[str]]:
    """List for each person those of the most similar mean face shape, whatever its place and size."""
    names = sorted(people)
    shapes = np.stack([np.mean([_normalised(face.points_L2) for face in people[name]], axis=0) for name in names])
    distance = np.linalg.norm((shapes[:, None] - shapes[None]).reshape(len(names), len(names), -1), axis=2)
    return {
        name: [names[j] for j in np.argsort(distance[i], kind="stable") if j != i][: nearest or None]
        for i, name in enumerate(names)
    }


def _normalised(points_L2: Points) -> Points:
    centred = points_L2 - points_L2.mean(axis=0)
    return np.asarray(centred / np.sqrt(np.square(centred).sum(axis=1).mean()))


# ---------------------------------------------------------------------------------------------- pictures


def make_one(job: Job) -> None:
    """Make one picture, atomically."""
    first, second = (_read(face.picture) for face in (job.first, job.second))
    blend_faces = whole_morph if job.mode == "whole" else spliced_morph
    morph_HWC = blend_faces(first, job.first.points_L2, second, job.second.points_L2, job.blend)
    file = io.BytesIO()
    Image.fromarray(morph_HWC).save(file, "PNG")
    draft = draft_of(job.output)
    draft.write_bytes(file.getvalue())
    draft.replace(job.output)


def whole_morph(
    first_HWC: NDArray[np.uint8], first_L2: Points, second_HWC: NDArray[np.uint8], second_L2: Points, blend: float
) -> NDArray[np.uint8]:
    """Warp both photographs to the blended shape and blend them, on the canvas of the first."""
    from trainer.data.transforms.resize import resized  # imports torch

    height, width = first_HWC.shape[:2]
    scale = np.array([width / second_HWC.shape[1], height / second_HWC.shape[0]], dtype=np.float32)
    second_HWC = resized(second_HWC, height, width)
    second_L2 = second_L2 * scale
    target_L2 = ((1 - blend) * first_L2 + blend * second_L2).astype(np.float32)
    first_warped, second_warped = warp(first_HWC, first_L2, target_L2), warp(second_HWC, second_L2, target_L2)
    return np.asarray(cv2.addWeighted(first_warped, 1 - blend, second_warped, blend, 0))


def spliced_morph(
    first_HWC: NDArray[np.uint8], first_L2: Points, second_HWC: NDArray[np.uint8], second_L2: Points, blend: float
) -> NDArray[np.uint8]:
    """Blend the second face, warped to the first one's shape and colours, into the first photograph."""
    mask_HW1 = face_mask(first_HWC.shape[:2], first_L2)[..., None]
    warped_HWC = warp(second_HWC, second_L2, first_L2, first_HWC.shape[:2]).astype(np.float32)
    # Match mean and deviation of each colour inside the face; 1 is added so that a flat colour divides by no zero.
    inside = mask_HW1[..., 0] > 0.5
    first_mean, second_mean = first_HWC[inside].mean(axis=0), warped_HWC[inside].mean(axis=0)
    first_std, second_std = first_HWC[inside].std(axis=0) + 1, warped_HWC[inside].std(axis=0) + 1
    matched = (warped_HWC - second_mean) * (first_std / second_std) + first_mean
    mixed = first_HWC + np.float32(blend) * mask_HW1 * (matched - first_HWC)
    return np.asarray(np.rint(mixed).clip(0, 255).astype(np.uint8))


def warp(
    image_HWC: NDArray[np.uint8], from_L2: Points, to_L2: Points, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Move an image's landmarks to other places, affine inside each triangle between them; the frame does not move.

    Args:
        image_HWC: the image.
        from_L2: its landmarks.
        to_L2: where they go.
        size: height and width of the result; None keeps the image's.
    """
    height, width = size or image_HWC.shape[:2]
    source = np.concatenate([from_L2, _frame(*image_HWC.shape[:2])]).astype(np.float64)
    target = np.concatenate([to_L2, _frame(height, width)]).astype(np.float64)
    mesh = Delaunay(target)
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float64)
    pixels_P2 = np.stack([x_HW.ravel(), y_HW.ravel()], axis=1)
    triangle_P = mesh.find_simplex(pixels_P2)
    transform_P = mesh.transform[triangle_P]
    # Barycentric weights of each target pixel in its triangle; the same weights of the source triangle's corners give
    # the source pixel. Example: weights 0.5, 0.25, 0.25 of corners (0, 0), (4, 0), (0, 8) give the point (1, 2).
    two_P2 = np.einsum("pij,pj->pi", transform_P[:, :2], pixels_P2 - transform_P[:, 2])
    weights_P3 = np.concatenate([two_P2, 1 - two_P2.sum(axis=1, keepdims=True)], axis=1)
    origin_P2 = np.einsum("pi,pij->pj", weights_P3, source[mesh.simplices[triangle_P]])
    flat = np.isnan(origin_P2).any(axis=1)  # triangles without area have no weights
    origin_P2[flat] = pixels_P2[flat]
    from_x, from_y = (origin_P2[:, i].reshape(height, width).astype(np.float32) for i in (0, 1))
    warped = cv2.remap(image_HWC, from_x, from_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(warped, dtype=np.uint8)


def face_mask(size: tuple[int, int], points_L2: Points) -> NDArray[np.float32]:
    """Draw the hull of the landmarks, fading to exactly 0 at its border, float32 (H, W)."""
    mask_HW = np.zeros(size, dtype=np.uint8)
    hull = cv2.convexHull(points_L2.astype(np.float32))
    cv2.fillConvexPoly(mask_HW, np.rint(hull).astype(np.int32), 1)
    return feathered(mask_HW, max(1, round(_FEATHER_SHARE * float(np.ptp(points_L2, axis=0).min()))))


def _frame(height: int, width: int) -> Points:
    """Return eight points one pixel outside the frame, which never move."""
    x, y = np.array([-1, width / 2, width]), np.array([-1, height / 2, height])
    return np.array([(a, b) for a in x for b in y if (a, b) != (x[1], y[1])], dtype=np.float32)


def _read(picture: Path | SampleRef) -> NDArray[np.uint8]:
    """Decode as training does, so that a file and its copy in a shard give the same pixels."""
    try:
        if isinstance(picture, SampleRef):
            return decode_image(ShardReader().read(picture))
        return decode_image(as_trainable(picture.read_bytes()))
    except DAMAGE as error:
        raise DataError(
            f"{_name(picture)} cannot be read ({describe_damage(error)}): leave it out of the source"
        ) from error


# ---------------------------------------------------------------------------------------------- bookkeeping


def _claim(output: Path, settings: Settings, faces: Sequence[Face]) -> None:
    """Record faces and settings of the output; refuse an output of other faces or settings."""
    digest = hashlib.sha256()
    for face in faces:
        digest.update(f"{face.key}\n{face.identity}\n".encode("utf-8", "surrogateescape") + face.points_L2.tobytes())
    record = to_dict(settings) | {"faces": digest.hexdigest()}
    for name in ("num_processes", "progress_bar", "output_dir", "source", "landmarks"):
        del record[name]
    path = output / "make_morphs.json"
    if path.exists():
        if json.loads(path.read_text()) != record:
            raise ConfigError(f"output_dir {output} holds morphs of other faces or settings: name a new folder")
        return
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output_dir {output} holds other files: name a new folder")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def _manifest(jobs: Sequence[Job], *, same_person: bool) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for job in jobs:
        key = f"{'control' if same_person else 'morph'}/{job.mode}/{job.output.stem}"
        second = "" if same_person else job.second.identity
        attack, control = ("", f"same-person-{job.mode}") if same_person else (f"landmark-{job.mode}", "")
        row: list[Any] = [job.output.absolute(), key, int(not same_person), job.first.identity, second, attack]
        writer.writerow([*row, job.blend, job.first.key, job.second.key, control])
    return file.getvalue()


def _plain(key: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in key)


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
