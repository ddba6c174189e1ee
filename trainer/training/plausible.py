"""Warnings about sizes that are probably a mistake: batches beyond the data, a handful of steps, years on a CPU."""

from collections.abc import Iterator

from trainer.training.throughput import duration

_FEW_STEPS, _MANY_STEPS = 10, 3_000_000
_FLOPS_PER_THREAD = 3e10
"""What a core of today reaches in fp32, within a factor of three."""
_LONG_S, _LONG_STEP_S = 86400, 300
_WANTED_STEPS = 20
"""Steps of an epoch below which a smaller batch is proposed."""


def doubts(
    *,
    global_batch: int,
    num_images: int,
    total_steps: int,
    num_ranks: int,
    step_flops: float,
    cpu_threads: int | None,
    spare_workers: int = 0,
) -> Iterator[str]:
    """Name what is odd about a training, with the numbers and a command that fits better.

    Args:
        global_batch: samples in a step.
        num_images: in the training set.
        total_steps: length of the schedule.
        num_ranks: that divide the batch.
        step_flops: floating-point operations of a step.
        cpu_threads: over all ranks; None where a GPU computes.
        spare_workers: loader processes of a host beyond its cores.
    """
    if global_batch > num_images:
        fitting = fitting_batch(num_images, num_ranks)
        yield (
            f"global_batch is {global_batch}, but the training set has {num_images} images: every step sees each "
            f"{global_batch / num_images:.1f} times; try --global_batch {fitting} --micro_batch {fitting // num_ranks}"
        )
    if total_steps < _FEW_STEPS:
        epochs = _WANTED_STEPS * _FEW_STEPS * global_batch / num_images
        yield (
            f"the schedule is {total_steps} steps of {global_batch} images, which teaches a model little: try "
            f"a smaller --global_batch, or --epochs {epochs:.3g}"
        )
    if total_steps > _MANY_STEPS:
        yield (
            f"the schedule is {total_steps} steps of {global_batch} images, more than anyone trains: try a larger "
            f"--global_batch, or --epochs {_MANY_STEPS / 10 * global_batch / num_images:.3g}"
        )
    if spare_workers > 0:
        yield (
            f"the ranks of this host start {spare_workers} more loader processes than it has cores: try a smaller "
            "--num_workers"
        )
    if cpu_threads:
        step_s = step_flops / (cpu_threads * _FLOPS_PER_THREAD)
        if step_s * total_steps > _LONG_S or step_s > _LONG_STEP_S:
            yield (
                f"on this CPU a step of {step_flops:.2g} floating-point operations takes about {duration(step_s)}, and "
                f"all {total_steps} steps about {duration(step_s * total_steps)}: use a GPU, or a smaller recipe "
                "(--recipe demo, --recipe detector_demo), or see the first steps with --stop_at_step 10"
            )


def fitting_batch(num_images: int, num_ranks: int) -> int:
    """Return a batch for a small set: a power of two a rank, at least twenty steps an epoch where that is possible."""
    per_rank = 1
    while 2 * per_rank * num_ranks * _WANTED_STEPS <= num_images and per_rank < 64:
        per_rank *= 2
    return per_rank * num_ranks
