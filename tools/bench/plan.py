"""Measure the plan at scale: memory and time to the first batch, reads of a rank, and how well it shuffles.

Index files of 10**6 to 10**9 samples are made sparse on disk: their lengths are real, their contents are zeros or, for
shard ends, what 10,000 samples a shard give. Each size is measured in a process of its own.

Usage: python tools/bench/plan.py [--largest 1000000000] [--plot plan_scale.png]

Examples:
    python tools/bench/plan.py --largest 100000000
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.bench.common import machine, run_alone
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.data.order.plan import Plan, positions_of
from trainer.data.shards.index import INDEX_VERSION, SHARD_COLUMNS, ShardIndex
from trainer.data.shards.members import Tally
from trainer.fault_tolerance.exit_codes import run

SAMPLES_A_SHARD, SAMPLE_BYTES = 10_000, 100_000
RANKS, WORKERS, GLOBAL_BATCH, LANES = 1024, 8, 8192, 1024
PROBE_BATCHES = 64


def write_index(folder: Path, num_samples: int) -> list[str]:
    """Write an index with the lengths of a real one; returns the names of its shards."""
    num_shards = num_samples // SAMPLES_A_SHARD
    for name, dtype in SHARD_COLUMNS.items():
        with (folder / name).open("wb") as file:
            file.truncate(num_samples * np.dtype(dtype).itemsize)
    (folder / "keys.utf8").write_bytes(b"k")
    np.arange(1, num_shards + 1).astype(np.int64).__mul__(SAMPLES_A_SHARD).tofile(folder / "shard_end.i64")
    header = {"version": INDEX_VERSION, "fingerprint": "synthetic", "num_samples": num_samples}
    np.zeros(num_shards, dtype=np.uint64).tofile(folder / "shard_tag.u64")
    header |= {"num_shards": num_shards, "group_fields": [], "num_people": 0, "tally": Tally().to_dict()}
    (folder / "index.json").write_text(json.dumps(header))
    return [f"/data/train/shard-{i:06d}.tar" for i in range(num_shards)]


def measure(folder: Path, num_samples: int) -> dict[str, float]:
    """Open the index and plan batches as one of the ranks does; times in seconds, memory in MB above the imports."""
    from trainer.training.throughput import forget_peak, peak_resident_gib

    shards = write_index(folder, num_samples)
    held_gib = forget_peak()
    start = time.perf_counter()
    index = ShardIndex(folder, shards)
    plan = Plan(len(index), 0, LANES)
    positions = positions_of(0, rank=5, num_ranks=RANKS, global_batch=GLOBAL_BATCH)
    index.blocks(*plan.locate(positions))
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    step = int(np.random.default_rng(0).integers(num_samples * 300 // GLOBAL_BATCH))
    located = plan.locate(positions_of(step, rank=5, num_ranks=RANKS, global_batch=GLOBAL_BATCH))
    index.samples(located.sample_N)
    resume_s = time.perf_counter() - start
    start = time.perf_counter()
    for batch in range(PROBE_BATCHES):
        plan.locate(np.arange(batch * 512, (batch + 1) * 512))
    per_sample_us = (time.perf_counter() - start) / PROBE_BATCHES / 512 * 1e6
    return {
        "first_s": first_s,
        "resume_s": resume_s,
        "mb": (peak_resident_gib() - held_gib) * 2**30 / 1e6,
        "us": per_sample_us,
    }


def reads(num_ranks: int, *, steps: int = 400) -> str:
    """Describe what one rank reads over some steps: whole blocks where it has lanes of its own, else single images."""
    plan = Plan(100_000_000, 0, 192)
    batch = num_ranks * 32
    positions = np.concatenate([positions_of(s, rank=1, num_ranks=num_ranks, global_batch=batch) for s in range(steps)])
    located = plan.locate(positions)
    if not plan.reads_blocks(num_ranks):
        return f"  {num_ranks:5d} ranks, not dividing the lanes: {SAMPLE_BYTES / 1000:.0f} kB and 1.000 reads a sample"
    blocks = np.unique(np.stack([located.first_N, located.last_N]), axis=1)
    used = len(np.unique(located.sample_N))
    in_use = 192 // num_ranks * plan.window_blocks * plan.block_size  # blocks whose other samples come later
    overhead = max(used, (blocks[1] - blocks[0] + 1).sum() - in_use) / used
    return (
        f"  {num_ranks:5d} ranks, dividing the lanes:     {overhead * SAMPLE_BYTES / 1000:.0f} kB and "
        f"{len(blocks[0]) / used:.3f} reads a sample (less {in_use} samples in open windows)"
    )


def shuffle_quality(num_samples: int = 200_000, batch: int = 256) -> None:
    """Print how far neighbours get and how classes mix, for shards sorted by ten classes."""
    rng = np.random.default_rng(0)
    orders = {
        "full permutation": rng.permutation(num_samples),
        "this plan": Plan(num_samples, 0).samples_at(np.arange(num_samples)),
        "webdataset, shards shuffled, buffer 5000": _buffer_shuffle(num_samples, 5000, rng),
    }
    print(f"\nshuffling {num_samples} samples in shards of 1000, sorted by 10 classes (batches of {batch}):")
    for name, order in orders.items():
        place = np.empty(num_samples, dtype=np.int64)
        place[order] = np.arange(num_samples)
        apart = np.abs(np.diff(place))
        classes = (order[: num_samples // batch * batch] * 10 // num_samples).reshape(-1, batch)
        mix = np.stack([(classes == c).mean(axis=1) for c in range(10)])
        close = (apart < batch).mean()
        print(
            f"  {name:42s} neighbours apart: median {np.median(apart):7.0f}, within one batch {close:7.3%}; "
            f"share of a class in a batch: sd {mix.std():.4f}"
        )
    print(f"  (a fair draw has sd {np.sqrt(0.1 * 0.9 / batch):.4f} and {2 * batch / num_samples:.3%})")


def _buffer_shuffle(num_samples: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle as webdataset's usual pipeline: shards in random order, then a buffer from which one is drawn."""
    source = iter(np.concatenate([np.arange(s * 1000, s * 1000 + 1000) for s in rng.permutation(num_samples // 1000)]))
    buffer, order = [next(source) for _ in range(size)], []
    for sample in source:
        drawn = rng.integers(size)
        order.append(buffer[drawn])
        buffer[drawn] = sample
    return np.array([*order, *rng.permutation(buffer)])


def draw(rows: dict[int, dict[str, float]], path: str) -> None:
    """Plot growth."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    titles = {"first_s": "first batch [s]", "resume_s": "resume anywhere [s]", "mb": "memory of a rank [MB]"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot(list(rows), [row[name] for row in rows.values()], marker="o")
        axis.set(xscale="log", title=title, xlabel="samples", ylim=(0, None))
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    largest: int = 10**9
    """Largest index to make up [samples]."""
    plot: str = "plan_scale.png"
    """PNG file for the picture."""
    one: int | None = None
    """Measure this size only, in this process, and print JSON [samples]."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Print the tables."""
    if settings.one is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), settings.one)))
        return 0
    print(machine())
    print(f"rank 5 of {RANKS} (x {WORKERS} workers, which share its memory), {LANES} lanes, batch {GLOBAL_BATCH}:")
    rows = {}
    for size in (n for n in (10**6, 10**7, 10**8, 10**9) if n <= settings.largest):
        row = rows[size] = json.loads(run_alone(__file__, "--one", str(size)))
        print(
            f"  {size:13,d} samples, {size // SAMPLES_A_SHARD:7,d} shards: first batch {row['first_s']:.3f} s, "
            f"resume {row['resume_s']:.3f} s, {row['mb']:.0f} MB, {row['us']:.1f} us a position"
        )
    print(f"\nreads of one rank, 192 lanes, images of {SAMPLE_BYTES // 1000} kB, blocks of 128:")
    for num_ranks in (8, 64, 192, 5, 1024):
        print(reads(num_ranks))
    shuffle_quality()
    draw(rows, settings.plot)
    return 0


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
