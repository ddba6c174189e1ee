r"""A detector of this project beside a plain CNN of timm and the shortcuts, at equal CPU seconds.

For each seed, launch/finetune.py trains a detector in a process of its own, on one thread, with the recipe and settings
of --ours. Its CPU seconds count from start to end, imports, loader and validation included. The peer then trains from
random weights on the same shards, on one thread, for as many CPU seconds of steps alone; reading and scoring are
not counted, in its favour. Its settings are those that won among the ones we tried: random crops at the images' own
resolution and mirrors, every attack tool and folder of keys equally often, AdamW, a cosine without restarts. It has no
validation set: its last weights count.

Both are measured on the same test images. An interval of the difference is paired: each replicate of the bootstrap
draws people once, and all methods are measured on these (see trainer/detection/error_rates.py). The score of several
seeds is not averaged: each replicate's D-EER is, over the seeds.

Usage: python tools/bench/detector.py --data 'train/*.tar' --val_data 'val/*.tar' --test_sets 'NAME=a/*.tar;...' \
           --output_dir FOLDER [--peer TIMM_NAME] [--ours SETTINGS] [--seeds N] [--cpu_seconds S]

Examples:
    python tools/bench/detector.py --data 'demo/detect/shards/train/*.tar' --val_data 'demo/detect/shards/val/*.tar' \
        --test_sets 'whole=demo/detect/shards/test-whole/*.tar;splice=demo/detect/shards/test-splice/*.tar' \
        --output_dir demo/bench-detector
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import json
import math
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.bench.common import machine
from tools.shortcut_baselines import FEATURES, read_set
from tools.shortcut_baselines import Settings as ShortcutSettings
from trainer.config.checks import check_types
from trainer.config.command_line import CommandLine
from trainer.config.scoring_settings import EvaluationSettings
from trainer.errors import ConfigError, DataError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import data_file, write_atomically
from trainer.startup import loading

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.shards.index import ShardIndex
    from trainer.detection.evaluation import TestSet

Floats = NDArray[np.float64]
_OURS = "ours"
_WARMUP_SHARE = 0.08
"""Share of the peer's time in which its learning rate rises."""
_MOST_KINDS = 16
"""With more of them, folders are people or batches of work and no kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    data: str = ""
    """Training shards."""
    val_data: str = ""
    """Validation shards, for our detector only: they choose the step that is kept."""
    test_sets: str = ""
    """Labelled shards, as NAME=SHARDS;NAME=SHARDS."""
    output_dir: str = ""
    """Folder for the detectors, detector.json and detector.md."""
    ours: str = "recipe=detector_demo"
    """Settings of launch/finetune.py for our detector, as NAME=VALUE;NAME=VALUE; data, seed, threads and folder are
    added."""
    peer: str = "resnet10t"
    """timm's name of the peer, a CNN that takes images of any size."""
    seeds: int = 3
    """So many runs of each, with seeds 0, 1, 2 ..."""
    cpu_seconds: float | None = None
    """CPU time of the peer's steps; none: that of our detector's whole command [seconds]."""
    learning_rate: float = 1e-3
    """The peer's peak learning rate."""
    weight_decay: float = 0.05
    """The peer's weight decay."""
    batch: int = 32
    """Images in a step of the peer [images]."""
    crop_size: int = 88
    """Side of the peer's crops; at most the images' shorter side [pixels]."""
    num_replicates: int = 1000
    """Replicates of the bootstrap over people."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("seeds", "batch", "crop_size", "num_replicates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("cpu_seconds", "learning_rate"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} is {value:g}, but must be above 0")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay:g}, but must not be negative")


CLI = CommandLine(Settings, __doc__, required=("data", "val_data", "test_sets", "output_dir"))


@dataclass(frozen=True, slots=True)
class Photographs:
    """Decoded images of a set, all of them in memory."""

    images: list[NDArray[np.uint8]]
    """RGB, each at its own size (H, W, 3)."""
    label_N: NDArray[np.int64]
    kind_N: list[str]
    """Attack tool and folder of the key, as "landmark-splice morph/splice"; the tool alone where folders are many."""


def main(settings: Settings) -> int:
    """Train, score and compare; returns the exit code."""
    with loading("torch and timm"):
        import torch

        from trainer.detection.evaluation import named_values, open_test_set
        from trainer.models.encoder import build_peer

    build_peer(settings.peer)
    torch.set_num_threads(1)
    folder = Path(settings.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output_dir is {folder}, which is not empty: name another folder")
    how = EvaluationSettings(models="ours=", test_sets=settings.test_sets, num_workers=0, progress_bar=False)
    sets = [open_test_set(name, shards, how) for name, shards in named_values(settings.test_sets, "test_sets")]
    train = read_photographs(open_labelled(settings.data, "data"), settings.crop_size, "data")
    tests = {one.name: read_photographs(one.index, settings.crop_size, f"test set {one.name}") for one in sets}
    folder.mkdir(parents=True, exist_ok=True)
    # method -> test set -> scores of each seed; the shortcuts have one fit and no seed.
    logits: dict[str, dict[str, list[Floats]]] = {
        name: {one.name: [] for one in sets} for name in (_OURS, settings.peer, *FEATURES)
    }
    seconds: dict[str, list[float]] = {_OURS: [], settings.peer: []}
    add_shortcuts(settings, logits)
    for seed in range(settings.seeds):
        seconds[_OURS].append(train_ours(settings, folder / f"ours-{seed}", seed))
        for one in sets:
            logits[_OURS][one.name].append(score_ours(folder / f"ours-{seed}", one, how))
        budget_s = settings.cpu_seconds or seconds[_OURS][-1]
        peer, spent_s = train_peer(settings, train, budget_s, seed)
        seconds[settings.peer].append(spent_s)
        for name, photographs in tests.items():
            logits[settings.peer][name].append(score_peer(peer, photographs, settings.crop_size))
        # What is measured is on disk before the next seed begins.
        results = compare(settings, sets, logits) | {"cpu_seconds": seconds, "machine": machine()}
        write_atomically(folder / "detector.json", json.dumps(results, indent=1) + "\n")
    table = markdown(results, settings)
    write_atomically(folder / "detector.md", table)
    print(table)
    return 0


def read_photographs(index: "ShardIndex", crop_size: int, setting: str) -> Photographs:
    """Decode every image of a set.

    Raises:
        DataError: an image cannot be read, or is smaller than the crop.
    """
    from trainer.data.shards.reader import ShardReader
    from trainer.data.transforms.decode import decode_image

    reader, images = ShardReader(), []
    for ref in index.samples(np.arange(len(index))):
        image = decode_image(reader.read(ref)).copy()
        if min(image.shape[:2]) < crop_size:
            raise DataError(
                f"{setting}: {ref.key} has {image.shape[1]}x{image.shape[0]} pixels, but crop_size is {crop_size}: "
                "set a smaller --crop_size"
            )
        images.append(image)
    # The index keeps no field for kinds of bona fides. Those of tools/make_morphs.py stand in folders of their own.
    names, code_N = index.groups("attack")
    tools = [names[code] if code >= 0 else "" for code in code_N.tolist()]
    folders = [ref.key.rpartition("/")[0] for ref in index.samples(np.arange(len(index)))]
    kinds = [f"{tool} {folder}" for tool, folder in zip(tools, folders, strict=True)]
    return Photographs(images, index.labels.astype(np.int64), kinds if len(set(kinds)) <= _MOST_KINDS else tools)


def crops(
    photographs: Photographs, chosen: Sequence[int], size: int, generator: np.random.Generator | None
) -> "Tensor":
    """Cut crops (B, 3, size, size), float32: random ones and mirrors with a generator, otherwise centres."""
    import torch

    out_BSSC = np.empty((len(chosen), size, size, 3), dtype=np.uint8)
    for place, number in enumerate(chosen):
        image = photographs.images[number]
        room = image.shape[0] - size, image.shape[1] - size
        if generator is None:
            top, left = room[0] // 2, room[1] // 2
        else:
            top, left = (int(generator.integers(space + 1)) for space in room)
        crop = image[top : top + size, left : left + size]
        out_BSSC[place] = crop[:, ::-1] if generator is not None and generator.random() < 0.5 else crop
    pixels_BCHW = torch.from_numpy(out_BSSC).permute(0, 3, 1, 2).float() / 255
    return (pixels_BCHW - 0.45) / 0.22


def train_peer(settings: Settings, train: Photographs, budget_s: float, seed: int) -> tuple[Any, float]:
    """Train the peer for so many CPU seconds; returns it with the seconds that it took."""
    import torch

    from trainer.models.encoder import build_peer

    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = build_peer(settings.peer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    kinds = sorted(set(zip(train.label_N.tolist(), train.kind_N, strict=True)))
    members = [
        [n for n, one in enumerate(zip(train.label_N.tolist(), train.kind_N, strict=True)) if one == kind]
        for kind in kinds
    ]
    start, steps = time.process_time(), 0
    while (share := (time.process_time() - start) / budget_s) < 1:
        rate = settings.learning_rate * min(1.0, share / _WARMUP_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Kind after kind, from a random one on: 32 images of 5 kinds are 6 or 7 of each.
        first = int(generator.integers(len(members)))
        chosen = [int(generator.choice(members[(first + j) % len(members)])) for j in range(settings.batch)]
        output_BC = model(crops(train, chosen, settings.crop_size, generator))
        loss = torch.nn.functional.cross_entropy(output_BC, torch.from_numpy(train.label_N[chosen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        steps += 1
    spent_s = time.process_time() - start
    print(f"{settings.peer} seed {seed}: {steps} steps in {spent_s:.0f} CPU seconds, loss {loss.item():.3f}")
    return model.eval(), spent_s


def score_peer(model: Any, photographs: Photographs, size: int) -> Floats:
    """Return log P(morph) - log P(bona fide) of the centre of each image."""
    import torch

    found = []
    with torch.inference_mode():
        for part in np.array_split(np.arange(len(photographs.images)), max(1, len(photographs.images) // 64)):
            output_BC = model(crops(photographs, part.tolist(), size, None)).double()
            found.append((output_BC[:, 1] - output_BC[:, 0]).numpy())
    return np.concatenate(found)


def train_ours(settings: Settings, folder: Path, seed: int) -> float:
    """Run launch/finetune.py on one thread; returns its CPU seconds, those of its loader and watchdog included.

    Raises:
        ConfigError: it failed.
    """
    from trainer.detection.evaluation import named_values

    flags = dict(named_values(settings.ours, "ours"))
    flags |= {"data": settings.data, "val_data": settings.val_data, "output_dir": str(folder), "seed": str(seed)}
    flags |= {"num_threads": "1", "progress_bar": "false"}
    argv = [sys.executable, str(data_file("launch/finetune.py"))]
    for name, value in flags.items():
        argv += [f"--{name}", value]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        code = subprocess.run(
            argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise ConfigError(f"ours is {settings.ours!r}, but launch/finetune.py ended with code {code}: see {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(f"ours seed {seed}: {spent_s:.0f} CPU seconds")
    return spent_s


def score_ours(folder: Path, test_set: "TestSet", how: EvaluationSettings) -> Floats:
    """Return log P(morph) - log P(bona fide) of each image, as launch/evaluate.py computes it."""
    from trainer.detection.evaluation import open_detector, score_set
    from trainer.distributed.world import World

    return score_set(open_detector(_OURS, str(folder), how), test_set, how, World()).logit_N


def add_shortcuts(settings: Settings, logits: dict[str, dict[str, list[Floats]]]) -> None:
    """Fit the shortcuts, and add their one score of each test image."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from trainer.detection.evaluation import named_values

    how = ShortcutSettings(data=settings.data, test_sets=settings.test_sets, output="-")
    images, truth, _ = read_set(settings.data, "--data", how)
    tests = {
        name: read_set(shards, f"--test_sets {name}", how)[0]
        for name, shards in named_values(settings.test_sets, "test_sets")
    }
    for feature, describe in FEATURES.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit([describe(image) for image in images], truth.label_N)
        for name, photographs in tests.items():
            logits[feature][name].append(model.decision_function([describe(image) for image in photographs]))


def compare(
    settings: Settings, sets: "Sequence[TestSet]", logits: Mapping[str, Mapping[str, Sequence[Floats]]]
) -> dict[str, Any]:
    """Measure every method on every test set, and our difference to each other one on the same draws of people."""
    from trainer.detection.error_rates import auc, bootstrap_weights, d_eer, d_eer_replicates, error_curve

    rows: list[dict[str, Any]] = []
    for one in sets:
        label_N = one.truth.label_N
        weights_RN = bootstrap_weights(one.truth.people_N, num_replicates=settings.num_replicates, seed=0)
        replicates_R: dict[str, Floats] = {}
        values: dict[str, list[float]] = {}
        for method, scores in logits.items():
            found = scores[one.name]
            values[method] = [d_eer(error_curve(score_N, label_N)).value for score_N in found]
            replicates_R[method] = np.mean(
                [d_eer_replicates(score_N, label_N, weights_RN) for score_N in found], axis=0
            )
            row: dict[str, Any] = {"method": method, "test_set": one.name, "d_eer": values[method]}
            row |= {"mean": float(np.mean(values[method])), "interval": _interval(replicates_R[method])}
            row["auc"] = float(np.mean([auc(score_N, label_N) for score_N in found]))
            if method != _OURS:
                # A shortcut has one value, which every seed of ours is compared with.
                row["ours_minus_it"] = float(np.mean(values[_OURS]) - np.mean(values[method]))
                row["difference_interval"] = _interval(replicates_R[_OURS] - replicates_R[method])
                its = values[method] * (1 if len(found) == len(values[_OURS]) else len(values[_OURS]))
                row["seeds_won"] = sum(a < b for a, b in zip(values[_OURS], its, strict=True))
            rows.append(row)
    return {"settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__}, "rows": rows}


def markdown(results: Mapping[str, Any], settings: Settings) -> str:
    """Write the comparison as a table of percentages."""
    lines = [
        "| method | test set | D-EER, mean of seeds | AUC | ours minus it | seeds won |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [row["method"], row["test_set"], _percent(row["mean"], row["interval"]), f"{row['auc']:.3f}"]
        if "ours_minus_it" in row:
            cells += [_percent(row["ours_minus_it"], row["difference_interval"])]
            cells += [f"{row['seeds_won']} of {settings.seeds}"]
        lines.append(f"| {' | '.join([*cells, '', ''][:6])} |")
    spent = ", ".join(f"{name} {np.mean(values):.0f}" for name, values in results["cpu_seconds"].items())
    return "\n".join([*lines, "", f"CPU seconds: {spent}. {results['machine']}.", ""])


def open_labelled(shards: str, setting: str) -> "ShardIndex":
    """Open labelled shards.

    Raises:
        DataError: they cannot be read, or labels are wrong.
    """
    from trainer.data.shards.index import list_shards, open_index
    from trainer.detection.scoring import check_labels

    index = open_index(list_shards(shards, setting=setting), index_dir=None, image_member=None)
    check_labels(index, setting=setting)
    return index


def _interval(values_R: Floats) -> list[float]:
    """Return the 95 % percentile interval."""
    return [float(value) for value in np.percentile(values_R, (2.5, 97.5))]


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def command() -> None:
    """Start the command."""
    run(main, CLI)


if __name__ == "__main__":
    command()
