"""Arithmetic of a training run: memory under each ZeRO stage, communication, step time, and what failures cost.

Plain functions of plain numbers; sizes are bytes, times seconds. What DeepSpeed 0.19.8 allocates was read from its
source (engine.py, bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py); tests/tools/test_plan_run.py compares it
with the bytes of real runs.

Example: 100 M parameters that all train in bf16 with float32 accumulation, on 8 ranks. One rank holds

    stage 1     weights 200 MB, gradients 600 MB (float32 and bf16), moments and master copy 1,200 MB / 8
    stage 2     weights 200 MB, gradients 400 MB / 8, moments and master copy 1,200 MB / 8
    stage 3     weights 200 MB / 8, gradients 400 MB / 8, moments and master copy 1,200 MB / 8

and buckets beside that. At stage 3 the gathered weights come on top: all 200 MB with DeepSpeed's default limits.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
MOMENTS, MASTER = (
    8,
    4,
)  # bytes of AdamW's two moments; of the float32 master copy, kept even in fp32
FLATTENED = 500_000_000  # elements that DeepSpeed flattens into one tensor for an all-reduce outside ZeRO's buckets
BACKWARD_SHARE = 2 / 3  # of the computation; communication can hide behind the backward pass


def divisors(number: int) -> list[int]:
    """Return the divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Sizes of a model's parameters, in elements."""

    groups: tuple[tuple[int, ...], ...]
    """Trained parameters, by parameter group, in the optimizer's order."""
    frozen: tuple[int, ...] = ()
    largest_block: int = 0
    """Elements of the largest block that ZeRO 3 gathers at once."""

    @property
    def trained(self) -> int:
        """Number of trained elements."""
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        """Number of all elements."""
        return self.trained + sum(self.frozen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """The settings of a ds_config that decide memory and communication; the defaults are DeepSpeed's."""

    stage: int = 0
    precision: str = "fp32"
    accum: str = "fp32"
    """Type in which gradients accumulate."""
    communication: str = "fp32"
    """Type in which gradients are communicated."""
    overlap: bool = False
    contiguous: bool = True
    bucket: int = 500_000_000
    persistence: int = 100_000
    live: int = 1_000_000_000
    reuse_distance: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_param: bool = False

    @property
    def accumulates_full(self) -> bool:
        """Whether DeepSpeed picks its BF16_Optimizer, which keeps full gradients twice although the stage is 1."""
        mixed = self.precision == "bf16" and self.accum == "fp32"
        return self.stage == 1 and mixed and not self.offload_optimizer

    def at_stage(self, stage: int) -> "Zero":
        """Return the same settings at another stage; stage 0 can only accumulate in the type of the weights."""
        return dataclasses.replace(self, stage=stage, accum=self.precision if stage == 0 else self.accum)


def zero_of(config: Mapping[str, Any]) -> Zero:
    """Read a ds_config whose "auto" values are filled in."""
    block = config.get("zero_optimization", {})
    precision = next((p for p in ("bf16", "fp16") if config.get(p, {}).get("enabled")), "fp32")
    stage = int(block.get("stage", 0))
    numbers: dict[str, str] = {
        "bucket": "reduce_bucket_size",
        "persistence": "stage3_param_persistence_threshold",
        "live": "stage3_max_live_parameters",
        "reuse_distance": "stage3_max_reuse_distance",
    }
    chosen: dict[str, Any] = {name: int(block[key]) for name, key in numbers.items() if key in block}
    for name in ("offload_optimizer", "offload_param"):
        chosen[name] = (block.get(name) or {}).get("device", "none") != "none"
    overlap = block.get("overlap_comm")
    return Zero(
        stage=stage,
        precision=precision,
        accum=config.get("data_types", {}).get("grad_accum_dtype") or precision,
        communication=config.get("communication_data_type") or precision,
        overlap=stage == 3 if overlap is None else overlap,
        contiguous=block.get("contiguous_gradients", True),
        **chosen,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one GPU. The parts need not peak at the same moment, so the total is an upper bound."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    """Buckets, flattened copies and, at stage 3, parameters gathered for use."""
    activations: int = 0
    host: int = 0
    """Bytes that are offloaded to the memory of the host."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.activations


def state_memory(weights: Weights, zero: Zero, num_ranks: int) -> Memory:
    """Count what the rank with the most memory holds between the backward pass and the optimizer's step."""
    element, accum, comm = (BYTES[name] for name in (zero.precision, zero.accum, zero.communication))
    trained, has_no_master = weights.trained, zero.stage == 0 and zero.precision == "fp32"
    # ZeRO pads each group to a multiple of 2 x ranks: 9 elements on 4 ranks become 16, 4 of them for each rank.
    share = trained if zero.stage == 0 else sum(_part(sum(group), 2 * num_ranks) * 2 for group in weights.groups)
    optimizer = share * (MOMENTS if has_no_master else MOMENTS + MASTER)
    parameters, gradients, buffers = element * weights.total, 0, 0
    if zero.stage == 3:
        # Each parameter is cut by itself, and small ones (up to `persistence` elements) also stay gathered.
        sizes = [*(n for group in weights.groups for n in group), *weights.frozen]
        persistent = sum(n for n in sizes if n <= zero.persistence)
        parameters = element * (sum(_part(n, num_ranks) for n in sizes) + persistent)
        gradients = accum * sum(_part(n, num_ranks) for group in weights.groups for n in group)
        buffers = comm * zero.bucket * zero.contiguous + element * gathered(weights, zero)
    elif zero.stage == 0 or zero.accumulates_full:
        # Gradients are accumulated in full; BF16_Optimizer keeps a second, bf16 copy. The all-reduce flattens a part.
        stored = accum if zero.accumulates_full else element
        gradients = trained * (stored + element * zero.accumulates_full)
        flat = min(trained, FLATTENED)
        buffers = flat * (stored + comm * (comm != stored)) + 4 * trained * (zero.stage == 0 and not has_no_master)
    else:
        # Stages 1 and 2 reduce bucket by bucket (two buckets with overlap_comm). Stage 1 also keeps full gradients.
        bucket_type = accum if zero.stage == 1 else element
        gradients = accum * share if accum != element else element * touched(weights, num_ranks)
        gradients += accum * trained if zero.stage == 1 and accum != element else 0
        buffers = bucket_type * zero.bucket * (1 + zero.overlap) * zero.contiguous
        buffers += comm * min(zero.bucket, trained) * (comm != bucket_type)
    host = (optimizer + gradients) * zero.offload_optimizer + parameters * (zero.offload_param and zero.stage == 3)
    return Memory(
        parameters=0 if zero.offload_param and zero.stage == 3 else parameters,
        gradients=0 if zero.offload_optimizer else gradients,
        optimizer=0 if zero.offload_optimizer else optimizer,
        buffers=buffers,
        host=host,
    )


def gathered(weights: Weights, zero: Zero) -> int:
    """Count the elements that stage 3 holds gathered at the end of the forward pass, at most.

    It prefetches up to stage3_max_live_parameters and keeps what is used again within stage3_max_reuse_distance
    elements. A layer n elements before the end of the forward pass is used again after 2 n: once to the end and once
    back. So the last reuse_distance / 2 elements stay. DeepSpeed's defaults (1e9) release nothing of a ViT-L.
    """
    sizes = (n for group in (*weights.groups, weights.frozen) for n in group)
    largest = max(weights.largest_block, max(sizes, default=0))
    return min(weights.total, max(zero.live, zero.reuse_distance // 2) + largest)


def touched(weights: Weights, num_ranks: int) -> int:
    """Count the elements of all parameters that overlap one rank's part, for the rank with the most.

    Stages 1 and 2 keep the gradient of such a parameter in full, unless a change of type makes a copy of the part only.
    Sizes [6, 3] on 4 ranks are parts of 4: rank 0 needs the first parameter (6), rank 1 both (9), rank 2 the last (3).
    """
    most = np.zeros(num_ranks, dtype=np.int64)
    for group in weights.groups:
        ends = np.cumsum(group)
        part = _part(int(ends[-1]), 2 * num_ranks) * 2
        edges = np.minimum(np.arange(num_ranks + 1) * part, ends[-1])
        first = np.searchsorted(ends, edges[:-1], side="right")
        last = np.searchsorted(ends, edges[1:], side="left")
        before = np.concatenate([[0], ends])
        has_data = edges[1:] > edges[:-1]
        most[has_data] += before[last[has_data] + 1] - before[first[has_data]]
    return int(most.max())


def _part(size: int, parts: int) -> int:
    return -(-size // parts)


def traffic(weights: Weights, zero: Zero, num_ranks: int, accumulation: int) -> tuple[float, float]:
    """Count the bytes that each GPU sends in one optimizer step in a ring: for gradients, for parameters.

    In a ring of n, each GPU sends (n-1)/n of the data for a reduce-scatter or an all-gather, and twice that for an
    all-reduce. DeepSpeed all-reduces at stages 0 to 2, from stage 2 on in every micro step. At stage 3 it gathers all
    parameters for each forward pass, and those that it has released again for each backward pass.

    100 M bf16 parameters, 8 GPUs, 4 micro steps: 2 x 7/8 x 200 MB = 350 MB of gradients at stage 1, 1.4 GB at stage 2.
    """
    ring, element = (num_ranks - 1) / num_ranks, BYTES[zero.precision]
    times = accumulation if zero.stage >= 2 else 1
    gradients = ring * weights.trained * BYTES[zero.communication] * times * (1 if zero.stage == 3 else 2)
    if zero.stage == 3:
        again = weights.total - gathered(weights, zero)
        return gradients, ring * element * accumulation * (weights.total + again)
    return gradients, ring * element * weights.trained * (zero.stage > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    communication: float
    exposed: float
    """The part of the communication that the computation waits for."""
    decode: float
    storage: float

    @property
    def total(self) -> float:
        """The whole step: loading runs in parallel with the rest, so the slower of them decides."""
        return max(self.compute + self.exposed, self.decode, self.storage)

    @property
    def bottleneck(self) -> str:
        """The slowest part."""
        if self.total > self.compute + self.exposed:
            return "storage" if self.storage >= self.decode else "data (decoding on the CPU)"
        return "communication" if self.exposed > self.compute else "compute"


def step_time(
    zero: Zero,
    *,
    trained: int,
    compute_s: float,
    sent: tuple[float, float],
    link: float,
    decode_s: float,
    storage_s: float,
) -> StepTime:
    """Combine the parts of a step.

    With overlap_comm, gradients (at stage 3 also parameters) travel during the backward pass. The computation waits for
    the rest: with 300 ms of computation and 250 ms of gradients, 200 ms hide behind the backward pass and 50 ms do not.

    A bucket of gradients leaves when it is full, and the last one after the backward pass. A ViT-L trains 330 M
    elements: with a reduce_bucket_size of 5e8, DeepSpeed's default, none leaves earlier; with 5e7, at least 85 % do.
    """
    gradients_s, parameters_s = (size / link for size in sent)
    early = max(0.0, 1 - zero.bucket / trained)
    hideable = (gradients_s * early + parameters_s * (zero.stage == 3)) * zero.overlap
    exposed = gradients_s + parameters_s - min(hideable, BACKWARD_SHARE * compute_s)
    return StepTime(
        compute=compute_s,
        communication=gradients_s + parameters_s,
        exposed=exposed,
        decode=decode_s,
        storage=storage_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Bytes of a checkpoint."""

    total: int
    rank: int
    """Largest number of bytes that a rank copies to the host."""
    node: int
    """Largest number of bytes that a node writes."""


def checkpoint_of(weights: Weights, zero: Zero, nodes: int, gpus: int, *, with_frozen: bool) -> Checkpoint:
    """Count what is saved: rank 0 saves the working weights, each rank its part of master copies and moments.

    At stage 3 every rank saves its part of the frozen weights; for trained weights the master copies are enough.
    """
    frozen = weights.total - weights.trained
    model = BYTES[zero.precision] * (frozen * with_frozen + weights.trained * (zero.stage < 3))
    has_no_master = zero.stage == 0 and zero.precision == "fp32"
    states = weights.trained * (MOMENTS if has_no_master else MOMENTS + MASTER)
    if zero.stage == 0:
        return Checkpoint(total=model + states, rank=model + states, node=model + states)
    share, ranks = _part(states, nodes * gpus), nodes * gpus
    if zero.stage == 3:
        both = share + _part(model, ranks)
        return Checkpoint(total=model + states, rank=both, node=gpus * both)
    return Checkpoint(total=model + states, rank=model + share, node=model + gpus * share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failures:
    """How often a cluster fails, and the cost of a checkpoint and of a restart; all in seconds."""

    mtbf: float
    """Mean time between failures of any of the nodes in use."""
    stall: float
    """How long the training waits for each checkpoint."""
    write: float
    """How long after that the checkpoint is committed, while the training continues."""
    restart: float
    """From the failure to the next step."""

    def young(self) -> float:
        """Return the best interval to first order (Young 1974, CACM 17(9)): with a stall of 10 s and a day, 1,315 s."""
        return math.sqrt(2 * self.stall * self.mtbf)

    def daly(self) -> float:
        """Return the best interval (Daly 2006, FGCS 22, equation 37)."""
        if self.stall >= 2 * self.mtbf:
            return self.mtbf
        ratio = self.stall / (2 * self.mtbf)
        return self.young() * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall

    def goodput(self, interval: float) -> float:
        """Return the expected share of time that moves a long run forward (Daly 2006, equation 20, with `write`)."""
        lost = (self.restart + self.write) / self.mtbf
        return interval / self.mtbf / (math.exp(lost) * math.expm1((interval + self.stall) / self.mtbf))

    def simulate(self, interval: float, work: float, *, repeats: int, seed: int) -> np.ndarray:
        """Simulate whole runs of ``work`` seconds, failure by failure; return the goodput of each."""
        rng = np.random.default_rng([seed, round(interval)])
        return np.array([self._simulate_run(interval, work, rng) for _ in range(repeats)])

    def _simulate_run(self, interval: float, work: float, rng: np.random.Generator) -> float:
        clock, saved = 0.0, 0.0
        while clock < 50 * work:
            left = work - saved
            finish = left + self.stall * (math.ceil(left / interval) - 1)
            uptime = rng.exponential(self.mtbf)
            if uptime >= finish:
                return work / (clock + finish)
            # Interval 100 s, stall 10 s, write 20 s, failure after 250 s: (250 - 20) / 110, so 2 checkpoints count.
            saved += interval * max(0, math.floor((uptime - self.write) / (interval + self.stall)))
            clock += uptime
            while (wait := rng.exponential(self.mtbf)) < self.restart:  # another failure during the restart
                clock += wait
            clock += self.restart
        return saved / clock
