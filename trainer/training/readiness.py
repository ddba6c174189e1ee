"""Checks whether a cluster is ready for a training, one finding for each; launch/doctor.py prints them."""

import functools
import json
import math
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainer.config.provenance import versions
from trainer.config.settings import DetectorRecipe, PretrainRecipe, Recipe, Runtime
from trainer.data.order.mixture import read_sources
from trainer.data.order.plan import evenly_spaced
from trainer.data.storage import reading
from trainer.distributed.devices import default_device, unusable_gpus, use_devices
from trainer.distributed.ds_config import compiled_optimizer, engine_settings
from trainer.distributed.engine import connect, disconnect
from trainer.distributed.world import World, world_from_environment
from trainer.errors import ConfigError, TrainerError, without_secrets
from trainer.fault_tolerance.checkpoint import newest_manifest
from trainer.fault_tolerance.exit_codes import EXIT_USER_ERROR
from trainer.models.encoder import PatchEncoder
from trainer.training.pretraining import build_model

START_TIMEOUT_S = 50
_MAX_READ_BYTES, _MAX_READ_S = 64_000_000, 5.0
_REDUCE_FLOATS = {"cuda": 64_000_000, "cpu": 4_000_000}
_MAX_SKEW_S = 2.0
_MIN_OPEN_FILES = 4096
_SSH_TIMEOUT_S = 10
_MIN_NCCL_BYTES = 1_000_000_000
"""The shared memory that NVIDIA recommends for its containers (--shm-size 1g)."""
_SENT_BY_DEEPSPEED = ("PYTHON", "UCX", "MV2", "MLFLOW", "NCCL")
_NEEDED_ON_HOSTS = ("DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "NO_ALBUMENTATIONS_UPDATE")

Facts = dict[str, Any]
"""The facts of one rank's host, JSON-able."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warn", "FAIL"]
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5} {self.check:13} {self.text}"


def report(findings: Iterator[Finding]) -> int:
    """Print every finding as soon as it is known."""
    failed = False
    for finding in findings:
        print(finding, flush=True)
        failed |= finding.level == "FAIL"
    return EXIT_USER_ERROR if failed else 0


def examine(recipe: Recipe, runtime: Runtime) -> int:
    """Run the checks on all ranks; rank 0 prints, and all return the same exit code."""
    world = world_from_environment()
    began = time.monotonic()
    use_devices(world, runtime, refuse_unusable=False)
    engine_settings(recipe, world, runtime.micro_batch, runtime.ds_config)  # refuses what contradicts the recipe
    patience_s = max(START_TIMEOUT_S, runtime.start_timeout_s)  # imports on a cold file system take minutes
    world = connect(world, timeout_s=patience_s, start_timeout_s=patience_s)
    rendezvous_s = time.monotonic() - began
    shards = world.on_main(lambda: _sample(runtime, 4 * world.size))
    local = [shard for place, shard in enumerate(shards) if place % world.size == world.rank] or shards[:1]
    world.wait_for_all()
    known = world.gather_over_ranks(facts_of(world, recipe, runtime, local))
    reduce_s = time_all_reduce(world)
    blind = hosts_without_output(world, Path(runtime.output_dir))

    def judge() -> int:
        return report(
            iter(
                [
                    Finding(
                        "ok", "rendezvous", f"{world.size} ranks on {_count(_by_host(known))} in {rendezvous_s:.1f} s"
                    ),
                    *judge_facts(known, shards),
                    judge_all_reduce(reduce_s, world),
                    judge_output(blind, recipe, runtime),
                ]
            )
        )

    code = world.on_main(judge)
    disconnect()
    return code


def list_shards_of(runtime: Runtime) -> list[str]:
    """List the training shards; none if the command names none."""
    sources = read_sources(runtime.data, setting="--data") if runtime.data else []
    return [shard for source in sources for shard in source.shards]


def _sample(runtime: Runtime, count: int) -> list[str]:
    shards = list_shards_of(runtime)
    return [shards[place] for place in evenly_spaced(count, len(shards))]


def facts_of(world: World, recipe: Recipe, runtime: Runtime, shards: Sequence[str]) -> Facts:
    """Collect the facts of this host."""
    now = time.time()
    device = default_device()
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "time": now,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "devices": torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0)),
        "unusable_gpus": unusable_gpus(),
        "local_size": world.local_size,
        "compiler": [name for name in ("ninja", "c++") if shutil.which(name)],
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "compiles": compiled_optimizer(engine_settings(recipe, world, runtime.micro_batch, runtime.ds_config)),
        "read": read_some(shards),
    }


def read_some(shards: Sequence[str]) -> dict[str, Any]:
    """Read the beginnings of shards for a few seconds, up to the first error."""
    read, began = 0, time.monotonic()
    for shard in shards:
        try:
            with reading(shard) as file:
                while (
                    time.monotonic() - began < _MAX_READ_S and read < _MAX_READ_BYTES and (piece := file.read(1 << 20))
                ):
                    read += len(piece)
        except (OSError, TrainerError) as error:
            return {"problem": without_secrets(f"{shard} cannot be read ({error})"), "bytes": read, "s": 0.0}
    return {"problem": "", "bytes": read, "s": time.monotonic() - began}


def judge_facts(known: Sequence[Facts], shards: Sequence[str]) -> Iterator[Finding]:
    """Compare the facts of all ranks with each other and with the needs of the training."""
    first = known[0]
    hosts = _by_host(known)
    differing = [facts for facts in known if facts["versions"] != first["versions"]]
    listed_versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    yield (
        Finding("ok", "versions", listed_versions)
        if not differing
        else Finding(
            "FAIL",
            "versions",
            f"{first['host']} has {listed_versions}, but {_differing(differing[0], first)}: use one environment on all",
        )
    )
    devices = {host: f"{facts['devices']} x {facts['device']}" for host, facts in hosts.items()}
    alike = len(set(devices.values())) == 1
    listed = devices[first["host"]] if alike else ", ".join(f"{host}: {what}" for host, what in devices.items())
    if len({facts["device"] == "CPU" for facts in hosts.values()}) == 2:  # gloo there, NCCL here: they wait for ever
        yield Finding("FAIL", "devices", f"{listed}; some hosts have no GPU that CUDA can use: leave them out")
    else:
        yield Finding("ok" if alike else "warn", "devices", f"{listed}; ranks a host: {first['local_size']}")
    skew = max(facts["time"] for facts in known) - min(facts["time"] for facts in known)
    late = min(known, key=lambda facts: facts["time"])["host"]
    yield (
        Finding("ok", "clocks", f"differ by less than {max(skew, 0.1):.1f} s")
        if skew < _MAX_SKEW_S
        else Finding(
            "warn",
            "clocks",
            f"differ by {skew:.1f} s, {late} is behind: times in logs and TensorBoard will; set up NTP",
        )
    )
    if any(facts["unusable_gpus"] for facts in hosts.values()):
        yield from _judge_each(hosts, "devices", _judge_unusable_gpus, "")
    yield from _judge_each(hosts, "compiler", _judge_compiler, "nothing is compiled at the start")
    yield from _judge_each(hosts, "shared memory", _judge_shared_memory, "enough, or not needed")
    yield from _judge_each(hosts, "open files", _judge_open_files, f"at least {_MIN_OPEN_FILES} allowed")
    yield judge_reading(known, shards)


def _judge_each(
    hosts: Mapping[str, Facts],
    check: str,
    judge: Callable[[Facts], tuple[Literal["warn", "FAIL"], str] | None],
    fine: str,
) -> Iterator[Finding]:
    """Yield one finding if all hosts are fine, else one for each problem, with the hosts that have it."""
    problems: dict[tuple[Literal["warn", "FAIL"], str], list[str]] = {}
    for host, facts in hosts.items():
        if problem := judge(facts):
            problems.setdefault(problem, []).append(host)
    if not problems:
        yield Finding("ok", check, fine)
    for (level, text), names in problems.items():
        yield Finding(level, check, f"{', '.join(names[:8])}{' and more' if len(names) > 8 else ''}: {text}")


def _judge_unusable_gpus(facts: Facts) -> tuple[Literal["warn", "FAIL"], str] | None:
    problem = facts["unusable_gpus"]
    return ("FAIL", f"{problem}; a training refuses to start unless DS_ACCELERATOR=cpu is set") if problem else None


def _judge_compiler(facts: Facts) -> tuple[Literal["warn", "FAIL"], str] | None:
    if not facts["compiles"] or {"ninja", "c++"} <= set(facts["compiler"]):
        return None
    return "FAIL", (
        f"DeepSpeed compiles the optimizer {facts['compiles']} of this ds_config, but there is no ninja or c++: "
        'install them, or write {"torch_adam": true, "fused": true} in its params'
    )


def _judge_shared_memory(facts: Facts) -> tuple[Literal["warn", "FAIL"], str] | None:
    """Check /dev/shm. Batches use anonymous memory; only NCCL uses /dev/shm, between the GPUs of one host."""
    if facts["device"] == "CPU" or facts["local_size"] == 1 or facts["shared_memory"] >= _MIN_NCCL_BYTES:
        return None
    return "warn", (
        f"/dev/shm has {_size(facts['shared_memory'])} free, and NCCL may need {_size(_MIN_NCCL_BYTES)} between GPUs: "
        "enlarge it (docker --shm-size 1g)"
    )


def _judge_open_files(facts: Facts) -> tuple[Literal["warn", "FAIL"], str] | None:
    if facts["open_files"] >= _MIN_OPEN_FILES:
        return None
    return "warn", f"only {facts['open_files']} open files are allowed: ulimit -n {_MIN_OPEN_FILES}"


def judge_reading(known: Sequence[Facts], shards: Sequence[str]) -> Finding:
    """Report the reading rate of the slowest host, or the hosts that cannot read."""
    if not shards:
        return Finding("warn", "shards", "not looked at: pass the --data of the training")
    problems = [facts for facts in known if facts["read"]["problem"]]
    if problems:
        names = ", ".join(sorted({facts["host"] for facts in problems})[:8])
        return Finding("FAIL", "shards", f"{names}: {problems[0]['read']['problem']}: every host must see the shards")
    rates: dict[str, float] = {}
    for facts in known:
        rates[facts["host"]] = rates.get(facts["host"], 0.0) + facts["read"]["bytes"] / max(facts["read"]["s"], 1e-6)
    slowest = min(rates, key=lambda host: rates[host])
    return Finding(
        "ok", "shards", f"read at {rates[slowest] / 1e6:.0f} MB/s on {slowest}, the slowest host (or its cache)"
    )


def time_all_reduce(world: World) -> float:
    """Return the median seconds of an all-reduce of `_REDUCE_FLOATS`; NaN in a world of one."""
    if world.size == 1:
        return math.nan
    device = default_device()
    payload = torch.ones(_REDUCE_FLOATS[device.type], device=device)
    seconds = []
    for _ in range(6):
        world.wait_for_all()
        began = time.monotonic()
        dist.all_reduce(payload)
        float(payload[0])  # waits for the device
        seconds.append(time.monotonic() - began)
        payload.fill_(1.0)
    return sorted(seconds[1:])[2]  # the first one opens connections


def judge_all_reduce(reduce_s: float, world: World) -> Finding:
    """Report the bus bandwidth, as NCCL's tests do: in a ring every byte crosses each link 2(n-1)/n times.

    256 MB on 8 ranks in 10 ms: 2 x 7/8 x 256 MB / 10 ms = 44.8 GB/s.
    """
    if math.isnan(reduce_s):
        return Finding("ok", "all-reduce", "there is only one rank")
    num_bytes = 4 * _REDUCE_FLOATS[default_device().type]
    bus = 2 * (world.size - 1) / world.size * num_bytes / reduce_s
    return Finding(
        "ok", "all-reduce", f"{_size(num_bytes)} in {1000 * reduce_s:.0f} ms, bus bandwidth {bus / 1e9:.2f} GB/s"
    )


def hosts_without_output(world: World, output: Path) -> list[str]:
    """Write a file on rank 0 below the output folder, look for it on all ranks, and return the hosts without it."""
    token = Path("logs", f".doctor-{uuid.uuid4().hex}")

    def write() -> str:
        try:
            (output / "logs").mkdir(parents=True, exist_ok=True)
            (output / token).write_text("seen\n")
        except OSError as error:
            raise ConfigError(
                f"output_dir {output} cannot be written ({error.strerror}): name another folder"
            ) from error
        return str((output / token).absolute())

    path = Path(world.on_main(write))
    deadline = time.monotonic() + 10  # network file systems keep old listings for some seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = sorted({host for host in world.gather_over_ranks("" if path.exists() else socket.gethostname()) if host})
    world.on_main(path.unlink)
    return blind


def judge_output(blind: Sequence[str], recipe: Recipe, runtime: Runtime) -> Finding:
    """Report whether all hosts share the output folder and whether checkpoints fit."""
    output = Path(runtime.output_dir)
    if blind:
        return Finding("FAIL", "output", f"{', '.join(blind[:8])} does not see {output.absolute()}: it must be shared")
    free = shutil.disk_usage(output).free
    one = checkpoint_bytes(recipe, runtime)
    needed = (runtime.keep_checkpoints + 1) * one
    text = f"{_size(free)} free in {output}; checkpoints of {_size(one)}, {runtime.keep_checkpoints} are kept"
    if free < needed:
        return Finding("FAIL", "output", f"{text} and one is written beside them: free space or lower keep_checkpoints")
    return Finding("ok", "output", text)


def checkpoint_bytes(recipe: Recipe, runtime: Runtime) -> int:
    """Return the size of a checkpoint: that of the newest one, else weights, master weights and two moments."""
    found = newest_manifest(Path(runtime.output_dir) / "checkpoints")
    if found:
        return sum(entry["bytes"] for entry in found[1]["files"].values())
    with torch.device("meta"):
        if isinstance(recipe, PretrainRecipe):
            model: torch.nn.Module = build_model(recipe)
        else:
            model = PatchEncoder(
                recipe.model, image_size=recipe.image_size, patch_size=recipe.patch_size, depth=recipe.encoder_depth
            )
    weights = sum(parameter.numel() for parameter in model.parameters())
    frozen = isinstance(recipe, DetectorRecipe) and recipe.backbone_is_frozen
    return 16 * weights // (100 if frozen else 1)


def check_hosts(hostfile: Path, script: Path, argv: Sequence[str]) -> Iterator[Finding]:
    """Run ``script``, which prints the facts of its host, on every host of a hostfile over ssh; compare the facts.

    Raises:
        ConfigError: the file cannot be used.
    """
    slots = read_hostfile(hostfile)
    sent = read_deepspeed_env()
    not_sent = [
        n for n in _NEEDED_ON_HOSTS if n in os.environ and n not in sent and not n.startswith(_SENT_BY_DEEPSPEED)
    ]
    yield (
        Finding("ok", "hostfile", f"{len(slots)} hosts, {sum(slots.values())} slots")
        if not not_sent
        else Finding(
            "warn",
            "hostfile",
            f"{', '.join(not_sent)} is set here, but DeepSpeed does not send it: write "
            f"{not_sent[0]}={os.environ[not_sent[0]]} into .deepspeed_env",
        )
    )
    ask = functools.partial(_ask, script=script, argv=argv, environment=sent)
    with ThreadPoolExecutor(len(slots)) as pool:
        answers = dict(zip(slots, pool.map(ask, slots), strict=True))
    known = []
    for host, answer in answers.items():
        if isinstance(answer, str):
            yield Finding("FAIL", "ssh", f"{host}: {answer}")
            continue
        known.append(answer | {"host": host})
        if answer["devices"] < slots[host]:
            text = f"{host} has slots={slots[host]}, but {answer['devices']} x {answer['device']}: lower slots"
            yield Finding("FAIL", "slots", text)
    if known:
        yield from judge_facts(known, ["--data"])
    yield Finding("ok", "next", f"deepspeed --hostfile {hostfile} launch/doctor.py ... tries rendezvous and network")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read ``host slots=N`` lines.

    Raises:
        ConfigError: the file is missing or empty, or a line has another form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read ({error.strerror}): name a file of 'host slots=8' lines"
        ) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.\-]+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) < 1 or match[1] in slots:
            raise ConfigError(f"hostfile {path} line {number} is {line!r}, but must be 'host slots=8', each host once")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"hostfile {path} names no host: write 'host slots=8' lines")
    return slots


def read_deepspeed_env() -> dict[str, str]:
    """Read the variables that DeepSpeed's launcher also sends to the hosts (its runner.py: home, then here)."""
    found: dict[str, str] = {}
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):
        if path.is_file():
            pairs = (line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#"))
            found |= {key: value for key, equals, value in pairs if equals}
    return found


def _ask(host: str, *, script: Path, argv: Sequence[str], environment: Mapping[str, str]) -> Facts | str:
    """Run the script on a host; return its facts, or the problem."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    remote = shlex.join(["env", "-C", str(Path.cwd()), *variables, sys.executable, str(script), *argv])
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_TIMEOUT_S}", "-o", "ServerAliveInterval=5"]
    try:
        done = subprocess.run(["ssh", *options, host, remote], capture_output=True, text=True, timeout=START_TIMEOUT_S)
    except FileNotFoundError:
        return "there is no ssh here: install it, or use a scheduler"
    except subprocess.TimeoutExpired:
        return f"no answer within {START_TIMEOUT_S} s: check whether the host or its storage hangs"
    if done.returncode == 0:
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
        return facts
    last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
    if done.returncode == 255:
        return f"cannot be reached by ssh ({last}): check that it is up and takes your key without a password"
    return f"{script.name} fails there ({last}): the project and its environment must be at the same path"


def _by_host(known: Sequence[Facts]) -> dict[str, Facts]:
    hosts: dict[str, Facts] = {}
    for facts in known:
        hosts.setdefault(facts["host"], facts)
    return hosts


def _differing(facts: Facts, first: Facts) -> str:
    names = [name for name, number in facts["versions"].items() if number != first["versions"].get(name)]
    return f"{facts['host']} has " + ", ".join(f"{name} {facts['versions'][name]}" for name in names)


def _count(hosts: Mapping[str, Facts]) -> str:
    return f"{len(hosts)} host{'s' if len(hosts) != 1 else ''}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
