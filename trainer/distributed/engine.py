"""The trainer's interface to DeepSpeed: start the ranks, build the engine, take one step, save and load its state.

DeepSpeed owns memory, communication and precision (``ds_configs/``); the recipe owns everything that changes the
mathematics. A value that both could set is "auto" in the JSON and filled in by `ds_config`; a contradiction is refused.
"""

import contextlib
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.utils.logging import logger as deepspeed_logger
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_map_only

from trainer.distributed import zero_state as zero_files
from trainer.distributed.deepspeed_changes import change_engine, gather_whole_blocks, gradients
from trainer.distributed.devices import default_device, missing_compiler, refuse_shared_gpus
from trainer.distributed.ds_config import compiled_optimizer, one_line_reason
from trainer.distributed.rendezvous import add_decision_groups, rendezvous
from trainer.distributed.world import World
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.models.parameter_groups import parameter_groups

logger = logging.getLogger(__name__)

_PRINTING = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler")
"""Settings of the JSON that ask DeepSpeed to print; without them only its warnings are shown."""


def connect(world: World, *, timeout_s: int, start_timeout_s: int = 600) -> World:
    """Start the process group of the run and return the world with its group for decisions.

    Args:
        world: this process among its ranks.
        timeout_s: how long a collective waits for a missing rank.
        start_timeout_s: how long the ranks wait for each other here.

    Raises:
        ConfigError: ranks are missing (the message names them), or the rendezvous cannot be used.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls names that torch 2.14 is about to rename; delete with the next DeepSpeed.
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    device = default_device()
    if device.type == "cuda":
        use_gpu(device)
    else:
        # DeepSpeed compiles a shared-memory all-reduce at the first start on a CPU, for minutes. gloo needs none. On a
        # GPU the line would have DeepSpeed probe all its operators, each with the compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = rendezvous(world, timeout_s=start_timeout_s)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout_s)
    )
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it, whatever it is given
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), auto_mpi_discovery=False)
    world = add_decision_groups(world)
    if device.type == "cuda":
        refuse_shared_gpus(world)
    return world


def use_gpu(device: torch.device) -> None:
    """Make a GPU the current device of this process, for torch and for DeepSpeed."""
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed computes on this index, whatever it is given

    def free_bytes(device_index: int | None = None) -> int:
        free, _ = torch.cuda.mem_get_info(device_index)
        return free

    # DeepSpeed 0.19.8 asks NVML for the memory, which knows no UUIDs in CUDA_VISIBLE_DEVICES (MIG, Kubernetes):
    # ValueError at ZeRO 2. Delete when its available_memory parses them.
    get_accelerator().available_memory = free_bytes


def disconnect() -> None:
    """End the process group, so that the interpreter can leave without complaints."""
    # Before 2.8, torch destroys a gloo group with the GIL held, and waits there for a thread that may want the GIL: a
    # finished run hung. The groups stay, and commands end with os._exit. pytorch/pytorch#154976; delete with torch 2.7.
    if dist.is_initialized() and torch.__version__ >= "2.8":  # compares as versions: 2.14 is newer
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of a step: equal on all ranks, except for `micro_losses`."""

    loss: float
    """Mean over the global batch."""
    applied: bool
    """Whether the optimizer moved. Where it did not, weights and optimizer state are bit for bit what they were."""
    stop: bool
    """Whether any rank asked to stop."""
    micro_losses: tuple[float, ...] = ()
    """This rank's loss of each micro batch; read only of a step that was not applied."""


class Engine:
    """A model under DeepSpeed. One call of `step` is one optimizer step over the global batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        ds_config: dict[str, Any],
        weight_decay: float,
        world: World,
        layer_decay: float = 1.0,
        decay_embeddings: bool = True,
        head_lr_scale: float = 1.0,
        save_frozen: bool = True,
    ) -> None:
        """Wrap the model. Only what requires a gradient reaches the optimizer; the rest is saved if ``save_frozen``.

        Raises:
            ConfigError: DeepSpeed refuses the configuration.
        """
        self.world, self._save_frozen = world, save_frozen
        self.accumulation: int = ds_config["gradient_accumulation_steps"]
        """Micro batches of this rank in one step."""
        groups = parameter_groups(
            model,
            weight_decay,
            layer_decay=layer_decay,
            decay_embeddings=decay_embeddings,
            head_lr_scale=head_lr_scale,
        )
        self._lr_scales = [group["lr_scale"] for group in groups]
        gather_whole_blocks(model, ds_config)
        self._engine = _initialize(model, groups, ds_config, is_main=world.is_main)
        self.zero_stage = int(self._engine.zero_optimization_stage())
        bf16, fp16 = self._engine.bfloat16_enabled(), self._engine.fp16_enabled()
        self.precision = "bf16" if bf16 else "fp16" if fp16 else "fp32"
        self.device = torch.device(self._engine.device)
        change_engine(self._engine, world.rank)
        self._basic_grad_norm: Tensor | None = None
        self._replays_graphs = False

    def compile(self, mode: str) -> None:
        """Have torch compile the model at its first step, which then takes minutes.

        Args:
            mode: ``default``, or ``reduce-overhead``, which replays CUDA graphs.

        Raises:
            ConfigError: there is nothing to compile with, or graphs cannot hold what this stage moves.
        """
        if self.zero_stage == 3:
            raise ConfigError(
                f"compile_mode is {mode!r}, but ZeRO stage 3 gathers weights in hooks, which compiled code does not "
                "call: use off, or a ds_config of stage 1 or 2"
            )
        if missing := missing_compiler(self.device.type):
            raise ConfigError(f"compile_mode is {mode!r}, but {missing}, or use off")
        if mode == "reduce-overhead" and self.device.type != "cuda":
            raise ConfigError(f"compile_mode is {mode!r}, which needs a GPU, but here is a CPU: use default")
        # A replayed graph writes gradients into its own memory, so they must be added up elsewhere before the next one.
        if mode == "reduce-overhead" and self.accumulation > 1 and not self._accumulates_at_once():
            raise ConfigError(
                f"compile_mode is {mode!r} with {self.accumulation} accumulated micro batches: write "
                '{"bf16": {"enabled": true, "immediate_grad_update": true}} into a ds_config of stage 1, raise '
                "micro_batch, or use default"
            )
        self._replays_graphs = mode == "reduce-overhead"
        self._engine.compile(compile_kwargs={"mode": mode})

    def _accumulates_at_once(self) -> bool:
        return bool(getattr(self._engine.optimizer, "immediate_grad_update", False))

    def step(
        self, micro_batches: Iterable[tuple[Tensor, ...]], *, learning_rate: float, seed: int, stop: bool = False
    ) -> StepResult:
        """Accumulate gradients over the micro batches and move the optimizer once, if all numbers are finite.

        Seeds: ``seed`` is given to torch's generators first. The trainer's models draw nothing from them, but what a
        library might draw must be the same in a resumed run.

        Accumulation: the loss is not divided here, because DeepSpeed divides it by the accumulation steps. Dividing
        twice is a known bug of other trainers.

        Agreement: before the optimizer moves, the ranks agree on three numbers in one all-reduce (`_agree`). The
        host waits for the device there, and again for one to three numbers of ZeRO (the gradients' norm, overflow): all
        at the end of a step, none in a micro batch (tests/distributed/test_engine_waits.py counts them).
        Whether the step is applied depends on the gradients alone: a loss that is not finite makes all gradients of
        its rank NaN (`_spread_nonfinite`), and the sum over the ranks makes them NaN everywhere. At stage 0 in fp32 the
        check is made here, otherwise it is DeepSpeed's own check of the global norm.

        Args:
            micro_batches: what the model takes, one tuple a micro batch.
            learning_rate: of this step.
            seed: see above.
            stop: whether this rank was asked to stop the run.
        """
        torch.manual_seed(seed)
        for group, scale in zip(self._engine.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = learning_rate * scale
        losses: list[Tensor] = []
        self._engine.train()
        for inputs in micro_batches:
            if self._replays_graphs:  # elsewhere the call would only import torch's compiler, seconds of every start
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with record_function("forward"):
                loss: Tensor = self._engine(*inputs)
            with record_function("backward"):
                self._engine.backward(_spread_nonfinite(loss))
            losses.append(loss.detach().clone())  # a replayed CUDA graph overwrites the tensor
            if self._engine.is_gradient_accumulation_boundary():
                with record_function("agree over ranks"):
                    mean_loss, bad, stop_votes = self._agree(losses, stop)
            with record_function("optimizer step"):
                self._engine.step()
        applied = not bad and self._engine.was_step_applied()
        return StepResult(mean_loss, applied, stop_votes > 0, () if applied else tuple(map(float, losses)))

    def _agree(self, losses: list[Tensor], stop: bool) -> list[float]:
        """Return, the same on all ranks: the mean loss, the share of ranks with bad gradients, and that of stop votes.

        One all-reduce averages all three. With 4 ranks, of which one was asked to stop, it gives for example
        [0.31, 0.0, 0.25]; any share above 0 decides for everybody.

        The second number is above 0 only at stage 0 in fp32, where DeepSpeed has no check of its own. The gradients are
        then dropped, and torch's optimizers change nothing where there are no gradients.
        """
        loss, bad = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for part in losses:
            loss.add_(part)
        if self.zero_stage == 0 and self.precision == "fp32":
            self._basic_grad_norm = nn.utils.get_total_norm(gradients(self._engine.module))
            bad = (~self._basic_grad_norm.isfinite()).float()
        payload = torch.stack([loss.div_(self.accumulation), bad, torch.full_like(bad, float(stop))])
        verdict: list[float] = self.mean_over_ranks(payload).tolist()  # waits for the device
        if verdict[1]:
            self._engine.zero_grad()
        return verdict

    @property
    def module(self) -> Any:
        """The model, for its sizes and counts. Its forward must be called through the engine, never through this."""
        return self._engine.module

    @torch.no_grad()
    def evaluate(self, *inputs: Tensor | None, **options: Any) -> Tensor:
        """Run the model forward without gradients; every rank must call, because ZeRO-3 gathers weights."""
        self._engine.eval()
        result: Tensor = self._engine(*inputs, **options)
        self._engine.train()
        return result

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Average a device tensor over the ranks."""
        if self.world.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total.div_(self.world.size)

    def concat_over_ranks(self, value: Tensor) -> Tensor:
        """Concatenate device tensors of one shape in rank order, on every rank."""
        if self.world.size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.world.size)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping; waits for the device."""
        norm = self._basic_grad_norm if self._basic_grad_norm is not None else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def check_finite(self) -> None:
        """Refuse a state that must not be saved; all ranks call, and all get the same answer.

        Raises:
            DataError: a weight or a moment of the optimizer is not finite on some rank, which the message names.
        """
        optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        tensors = [getattr(p, "ds_tensor", p).detach() for p in self._engine.module.parameters()]
        tensors += [p.detach() for group in optimizer.param_groups for p in group["params"]]
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        # The maximum norm: one number for all tensors, infinite or NaN if any element is.
        largest = nn.utils.get_total_norm([t for t in tensors if t.numel()], norm_type=math.inf)
        found = self.world.gather_over_ranks(bool(largest.isfinite()))
        if not all(found):
            raise DataError(
                f"weights or optimizer state are not finite on rank {found.index(False)}, so nothing was saved: start "
                "again from the last checkpoint; if it comes back, lower learning_rate, or look for a faulty device"
            )

    def capture(self, copy: bool) -> Callable[[Path], list[Path]]:
        """Collect the state of every rank in memory; all ranks call. Nothing is written until `write` is called.

        Args:
            copy: copy the state to the host, so that training can go on; otherwise write it before the next step.

        Returns:
            write: writes this rank's files below a folder and returns their paths.
        """
        collector = _Collector(copy=copy)
        writer, self._engine.checkpoint_engine = self._engine.checkpoint_engine, collector
        try:
            self._engine.save_checkpoint(
                zero_files.STATE,
                tag=zero_files.STATE,
                save_latest=False,
                exclude_frozen_parameters=not self._save_frozen,
            )
        finally:
            self._engine.checkpoint_engine = writer
        if copy and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies to pinned memory have only started

        def write(directory: Path) -> list[Path]:
            paths = [directory / zero_files.STATE / name for name in collector.files]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(collector.files.pop(path.name), path)  # frees one copy after the other
            return paths

        return write

    def load(self, directory: Path, *, written_by: int) -> None:
        """Restore the state that `capture` has written; all ranks call. No code from the files is executed.

        Args:
            directory: where it was written.
            written_by: the number of ranks that wrote. If the state was divided among another number of ranks than
                now, it is converted, and weights, moments and steps are compared with the files.

        Raises:
            CheckpointError: a file holds something other than tensors and plain values, or the conversion failed.
        """
        if self.zero_stage > 0 and written_by != self.world.size:
            self._load_from_other_world(directory)
            return
        self._engine.checkpoint_engine.load = zero_files.load_safely
        path, _ = self._engine.load_checkpoint(
            str(directory), tag=zero_files.STATE, load_module_strict=self._save_frozen
        )
        if path is None:
            raise CheckpointError(f"DeepSpeed found no state in {directory}: the checkpoint is damaged, remove it")

    def _load_from_other_world(self, directory: Path) -> None:
        module, world, frozen = self._engine.module, self.world, self._save_frozen
        folder, saved = world.on_main(lambda: zero_files.convert(directory, module, with_frozen=frozen))
        try:
            world.together(lambda: zero_files.load_converted(self._engine, Path(folder), saved["steps"][0]))
        finally:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        zero_files.refresh(self._engine)
        loaded = zero_files.fingerprints_in_engine(self._engine, with_frozen=frozen)
        differing = [name for name in saved if loaded[name] != saved[name]]
        if world.any_over_ranks(bool(differing)):
            raise CheckpointError(
                f"checkpoint {directory} changed in its conversion to {world.size} ranks ({', '.join(differing)}): "
                "resume it with the number of ranks that wrote it, and report this"
            )

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the parameters that train, whole and in float32, on the CPU; all ranks call, because ZeRO gathers."""
        state = {}
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                state[name] = zero_files.gather_full_param(parameter).float().cpu().clone()
        return state


def _initialize(model: nn.Module, groups: list[dict[str, Any]], ds_config: dict[str, Any], *, is_main: bool) -> Any:
    """Build DeepSpeed's engine; the log names what it compiles before it does, because that takes minutes."""
    compiled = compiled_optimizer(ds_config)
    remedy = 'write {"torch_adam": true, "fused": true} into the params of its optimizer'
    if compiled and is_main:
        logger.info(
            "DeepSpeed compiles the optimizer %s of this ds_config now, which takes minutes the first time (or %s)",
            *(compiled, remedy),
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # BF16_Optimizer prints its memory; stdout is the command's
            engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    except (deepspeed.DeepSpeedConfigError, AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"DeepSpeed refuses the ds_config: {one_line_reason(error)}; compare it with ds_configs/"
        ) from error
    except Exception as error:  # compilers, ninja, nvcc and their loaders fail in many ways
        if not compiled:
            raise
        raise ConfigError(
            f"DeepSpeed cannot compile the optimizer {compiled} of this ds_config ({error}): {remedy}, or install what "
            "is missing"
        ) from error
    if any(ds_config.get(name) for name in _PRINTING) and not ds_config.get("log_level"):
        deepspeed_logger.setLevel(logging.INFO)
    return engine


class _Collector(CheckpointEngine):  # type: ignore[misc]
    """Keeps in memory what DeepSpeed would write, by the name of the file."""

    def __init__(self, *, copy: bool) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}
        self._copy = copy

    def create(self, info: Any) -> None:
        """Nothing needs an announcement."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folders belong to `trainer.fault_tolerance.checkpoint`."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the state."""
        if self._copy:  # tree_map would turn a torch.Size into a plain tuple
            state_dict = tree_map_only(Tensor, _on_host, state_dict, is_leaf=lambda node: isinstance(node, torch.Size))
        self.files[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Nothing is loaded through this."""
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        """The commit is `trainer.fault_tolerance.checkpoint`'s."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed must copy small parts out of large tensors first: a copy on the host is small already."""
        return not self._copy


def _on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, without waiting for the device where the memory allows it."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor.detach(), non_blocking=True)


def _spread_nonfinite(loss: Tensor) -> Tensor:
    """Return a loss whose gradients are all NaN if it is not finite, and that is unchanged if it is.

    A loss of inf or NaN may leave some gradients finite, and a check of the gradients could then miss it. The factor is
    exactly 1 for a finite loss (1 + 0 * 0.31) and NaN for any other (0 * inf and 0 * NaN are NaN).
    """
    return loss * (1 + 0 * loss.detach())
