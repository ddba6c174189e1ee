"""Measure this project on one GPU: ceilings, correctness, steps beside their peers, whole runs; one table and a JSON.

Parts, each below ten minutes:

    machine        matrix product, copies, the gradient of the decoder's table
    smoke          ZeRO 0 to 3 and offload with fused AdamW: losses against fp32 on the CPU, a state comes back
    step           ViT-B, L and H under DeepSpeed: time, images/s, MFU, peak memory
    peers          the same models beside transformers' ViTMAE and the published form, in one process
    stages         ViT-L with accumulated micro batches, at ZeRO 2 and 3, and offloaded
    compile        torch.compile, and CUDA graphs
    checkpointing, lora, cross (the recipe mae_vit_base_fast), profile (kernels and waits of a step)
    loader         launch/pretrain.py fed from shards
    save           how long training stands still for a checkpoint
    resume         is a run in two halves the whole one bit for bit, as it is and with --deterministic true

Each case runs in a process of its own. One that fails becomes a row with its error, and the rest goes on. Figures are
added to the JSON one by one: the same command continues where it was stopped, and tries again what failed. The table
goes beside the JSON as Markdown. tools/plan_run.py takes the MFU from the JSON.

Without a GPU nothing is measured. `--device cpu` rehearses: tiny models run through the same code, and the files and
the table say so.

Usage: python tools/bench/gpu.py [--parts machine,smoke] [--budget_s 540] [--output gpu.json] [--device cpu]

Examples:
    python tools/bench/gpu.py
    python tools/bench/gpu.py --budget_s 540
    python tools/bench/gpu.py --device cpu --parts smoke
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tools.bench.gpu_parts import ROOT, Bench, Case, cases, why
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.distributed.measured import Figures, Row, read_figures
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import write_atomically
from trainer.startup import loading

PARTS = tuple(dict.fromkeys(case.part for case in cases()))
REHEARSAL = "CPU (rehearsal)"
_SLOWER = 10
"""The limits are those of a GPU; a CPU that others use as well may take so many times longer."""
_LEAST_S = 20
"""A case is not started with less time than this."""
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cuda measures; cpu rehearses with tiny models, and measures nothing."""
    parts: tuple[str, ...] = ()
    """Parts to run, again where they have figures; none runs all cases that have none yet."""
    output: str = ""
    """JSON of the figures; empty takes gpu.json, or gpu-rehearsal.json with --device cpu. Table and log go beside."""
    budget_s: int = 0
    """Start no case that this time does not leave room for, and end the running one; 0 for no limit [seconds]."""
    folder: str | None = None
    """Where shards and checkpoints are written meanwhile; none takes the machine's temporary folder."""
    only: str = ""
    """Run the case PART/NAME in this process and print its figures; the bench calls itself with this."""

    def __post_init__(self) -> None:
        check_types(self)
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ConfigError(f"parts has {unknown[0]!r}, but takes only {', '.join(PARTS)}")
        check_counts(self)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"folder is {self.folder!r}, but must be a folder that exists: create it")
        if not self.path.parent.is_dir() or self.path.suffix != ".json":
            raise ConfigError(f"output is {self.output!r}, but must be a .json file in a folder that exists")

    @property
    def path(self) -> Path:
        """Where the figures go."""
        return Path(self.output or ("gpu-rehearsal.json" if self.device == "cpu" else "gpu.json")).absolute()


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code: 1 if a case failed."""
    if settings.only:
        return measure_here(settings)
    with loading("torch"):
        device = name_of_device(settings.device)
    figures = begin(settings.path, device, rehearsal=settings.device == "cpu")
    deadline = time.monotonic() + (settings.budget_s or float("inf"))
    left_out = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for case in due(figures, settings.parts):
            left_s = deadline - time.monotonic()
            if left_s < _LEAST_S:
                left_out.append(case.key)
                continue
            patience = _SLOWER if figures.rehearsal else 1
            figures.put(measure(case, settings, folder, min(patience * case.limit_s, left_s)))
            figures.write(settings.path)
            print(line(figures.rows[-1]), flush=True)
    text = table(figures)
    write_atomically(settings.path.with_suffix(".md"), text)
    print(f"\n{text}\nfigures {settings.path}, log {log_of(settings.path)}")
    if left_out:
        print(f"no time was left for {', '.join(left_out)}: the same command goes on")
    return int(any(row.error for row in figures.rows))


def name_of_device(device: str) -> str:
    """Return the name of what is measured.

    Raises:
        ConfigError: there is no GPU.
    """
    if device == "cpu":
        return REHEARSAL
    from trainer.distributed.devices import unusable_gpus

    # In a process of its own: a context of this one would take memory from those that measure.
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if name := done.stdout.strip():
        return name
    raise ConfigError(
        f"device is 'cuda', but {unusable_gpus() or 'torch sees no GPU here'}, so nothing was measured: run it on a "
        "host with a GPU, or rehearse with --device cpu, which measures nothing"
    )


def begin(path: Path, device: str, *, rehearsal: bool) -> Figures:
    """Open the figures that are there, or begin new ones.

    Raises:
        ConfigError: they belong to another GPU.
    """
    if not path.exists():
        return Figures(device, rehearsal)
    found = read_figures(path)
    if (found.device, found.rehearsal) != (device, rehearsal):
        raise ConfigError(f"output {path} has figures of {found.device}, but this is {device}: name another --output")
    return found


def due(figures: Figures, parts: tuple[str, ...]) -> list[Case]:
    """Return the cases of these parts; without parts those that have no figures yet."""
    possible = [case for case in cases() if not (figures.rehearsal and case.place == "gpu")]
    if parts:
        return [case for case in possible if case.part in parts]
    return [case for case in possible if not (row := figures.find(case.part, case.name)) or row.error]


def measure(case: Case, settings: Settings, folder: str, limit_s: float) -> Row:
    """Run a case in a process of its own, with its children; returns its figures or what ended it."""
    environment = {name: value for name, value in os.environ.items() if name not in (*_RANK, "DS_ACCELERATOR")}
    environment |= {"PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    if settings.device == "cpu" or case.place == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    words = [sys.executable, __file__, "--device", settings.device, "--output", str(settings.path)]
    words += ["--folder", folder, "--only", case.key]
    with log_of(settings.path).open("a") as log:
        log.write(f"\n=== {case.key}\n")
        log.flush()
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        was_slow = threading.Event()

        def end_slow() -> None:
            was_slow.set()
            end(process)

        timer = threading.Timer(limit_s, end_slow)
        timer.start()
        try:
            said, _ = process.communicate()
        finally:
            timer.cancel()
            end(process)
    if was_slow.is_set():
        return Row(case.part, case.name, {}, f"it was ended after {limit_s:.0f} s")
    if process.returncode or not said.strip():
        last = log_of(settings.path).read_text()[-300:].strip().replace("\n", " ")
        return Row(case.part, case.name, {}, f"its process ended with {process.returncode}: {last}")
    return Row(case.part, case.name, **json.loads(said))


def end(process: "subprocess.Popen[str]") -> None:
    """Kill what is left of a case: its process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def measure_here(settings: Settings) -> int:
    """Run one case, and print its figures as one line of JSON; all else that is printed goes to stderr."""
    figures_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = next((case for case in cases() if case.key == settings.only), None)
    if case is None or settings.folder is None:
        raise ConfigError(f"only is {settings.only!r}, but must be a case of the bench, and folder be given")
    bench = Bench(settings.device == "cpu", settings.path, Path(settings.folder))
    said: dict[str, Any]
    try:
        said = {"values": case.measure(bench), "error": ""}
    except Exception as error:  # noqa: BLE001  (the row tells it, and the other cases go on)
        traceback.print_exc()
        said = {"values": {}, "error": why(error)}
    figures_to.write(json.dumps(said))
    figures_to.flush()
    return 0


def log_of(path: Path) -> Path:
    """Return where the output of the cases goes."""
    return path.with_suffix(".log")


# ------------------------------------------------------------------------------------------- the table

_FORMATS = {
    "step_ms": "{:,.1f} ms",
    "images_per_s": "{:,.0f} images/s",
    "mfu": "MFU {:.1%}",
    "memory_gib": "{:.1f} GiB",
}
_HIDDEN = ("kind", "losses")


def table(figures: Figures) -> str:
    """Write the table of all figures as Markdown."""
    title = f"Measured on {figures.device} by `python tools/bench/gpu.py`."
    if figures.rehearsal:
        title = "**Rehearsal on a CPU with tiny models: no figure of any GPU, and none to compare with one.**"
    order = {case.key: number for number, case in enumerate(cases())}
    rows = sorted(figures.rows, key=lambda row: order.get(f"{row.part}/{row.name}", len(order)))
    lines = [f"| {row.part} | {row.name} | {described(row)} |" for row in rows]
    return "\n".join([title, "", "| part | case | figures |", "|---|---|---|", *lines, ""])


def line(row: Row) -> str:
    """Write a row for the terminal."""
    return f"{row.part:14}{row.name:44}{described(row)}"


def described(row: Row) -> str:
    """Write the figures of a row, or its error."""
    if row.error:
        return f"**failed**: {row.error.replace('|', '/')[:300]}"
    return ", ".join(_shown(name, value) for name, value in row.values.items() if name not in _HIDDEN)


def _shown(name: str, value: Any) -> str:
    if name in _FORMATS:
        return _FORMATS[name].format(value)
    if name == "flops_per_image":
        return f"{value / 1e9:.3g} GFLOP an image"
    if isinstance(value, float):
        return f"{name} {value:.4g}"
    return f"{name} {str(value).lower() if isinstance(value, bool) else value}"


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
