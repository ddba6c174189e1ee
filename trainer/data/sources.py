"""From the data settings of a command to shards, index and order, for all commands that train or evaluate."""

import logging
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from trainer.config.settings import Recipe, Runtime
from trainer.data.byte_ranges import ByteRangeReader
from trainer.data.order.mixture import Mixture, Source, groups_by_value, groups_of_sources, read_sources
from trainer.data.order.plan import Order, Plan
from trainer.data.order.sampler import WeightedOrder, class_weights
from trainer.data.shards.index import ShardIndex, describe_index, list_shards, missing_labels, open_index
from trainer.data.transforms.views import Pixels
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError
from trainer.parallel import num_cores
from trainer.progress import Progress

logger = logging.getLogger(__name__)


def pixels_of(recipe: Recipe) -> Pixels:
    """Return how images are decoded and scaled; a model needs the same in training, validation and tests."""
    return Pixels(resize=recipe.view_resize, srgb=recipe.colours == "srgb")


def find_sources(recipe: Recipe, runtime: Runtime, *, others: Mapping[str, str]) -> dict[str, list[Source]]:
    """List the shards of ``data`` and of other settings. One rank does it: a thousand would overload the storage.

    Args:
        recipe: its settings of balancing.
        runtime: its training data.
        others: setting -> patterns, such as those of ``val_data``; empty ones are left out.

    Raises:
        ConfigError: a pattern matches nothing, or shares are combined with another way of balancing.
    """
    found = {"data": read_sources(runtime.data, setting="--data")}
    balancing = {
        "shares in data": found["data"][0].share is not None,
        "balance_by": recipe.balance_by != "none",
        "use_balanced_sampler": recipe.use_balanced_sampler,
    }
    chosen = [name for name, is_chosen in balancing.items() if is_chosen]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are both set, but a batch is balanced in one way: keep one")
    for setting, patterns in others.items():
        if patterns:
            found[setting] = [Source(list_shards(patterns, setting=f"--{setting}"), None)]
    return found


def broadcast_sources(found: dict[str, list[Source]] | None, world: World) -> dict[str, list[Source]]:
    """Send the sources that rank 0 found to every rank."""

    def as_text() -> dict[str, Any]:
        assert found is not None
        return {
            name: [[source.shards, None if source.share is None else str(source.share)] for source in sources]
            for name, sources in found.items()
        }

    payload: dict[str, Any] = world.on_main(as_text)
    return {
        name: [Source(shards, None if share is None else Fraction(share)) for shards, share in sources]
        for name, sources in payload.items()
    }


def open_sets(
    sources: Mapping[str, list[Source]], recipe: Recipe, runtime: Runtime, world: World
) -> dict[str, ShardIndex]:
    """Open the index of every set on all ranks; log one line for each set."""
    if world.is_main:
        num_shards = sum(len(source.shards) for wanted in sources.values() for source in wanted)
        logger.info("reading the index of %d shards", num_shards)
    indices = {setting: _open_on_all_ranks(wanted, recipe, runtime, world) for setting, wanted in sources.items()}
    if world.is_main:
        for setting, index in indices.items():
            logger.info("--%s: %s", setting, describe_index(index))
    return indices


def _open_on_all_ranks(sources: list[Source], recipe: Recipe, runtime: Runtime, world: World) -> ShardIndex:
    """Build a missing index once, on rank 0, while the others wait."""
    shards = [shard for source in sources for shard in source.shards]
    index_dir = Path(runtime.index_dir) if runtime.index_dir else None

    def build() -> list[str]:
        with Progress(len(shards), what="indexing", unit="shard", shown=runtime.progress_bar) as bar:
            index = open_index(
                shards,
                index_dir=index_dir,
                image_member=recipe.image_member,
                num_processes=num_cores(),
                on_shard=lambda done, _: bar.update(done - bar.done),
            )
        return [str(index.folder), index.fingerprint]

    folder, fingerprint = world.on_main(build)
    return world.together(lambda: ShardIndex(Path(folder), shards, fingerprint))


def order_of(recipe: Recipe, index: ShardIndex, sources: list[Source], *, num_meeting: int = 1) -> Order:
    """Build the order in which a run visits the samples.

    Args:
        recipe: its settings of balancing and of the plan.
        index: of all samples.
        sources: the shard sets of the index, with their shares.
        num_meeting: number of samples of a batch that are mixed with each other, see `Mixture`.

    Raises:
        ConfigError: a batch cannot hold these shares.
        DataError: samples lack the label or field to balance by, or all have the same.
    """
    lanes = {
        "num_lanes": recipe.num_lanes,
        "block_samples": recipe.block_samples,
        "window_blocks": recipe.window_blocks,
    }
    _check_labels_to_balance_by(recipe, index)
    if recipe.use_balanced_sampler:
        return WeightedOrder(class_weights(index.labels), seed=recipe.seed)
    if recipe.balance_by == "label":
        classes = int(index.labels.max()) + 1
        groups = groups_by_value(index.labels, [f"class {label}" for label in range(classes)])
        shares = [Fraction(1)] * len(groups)
    elif recipe.balance_by != "none":
        names, codes_N = index.groups(recipe.balance_by)
        groups = groups_by_value(codes_N, names)
        shares = [Fraction(1)] * len(groups)
    elif sources[0].share is not None:
        groups = groups_of_sources(index, sources)
        shares = [source.share for source in sources if source.share is not None]
    else:
        return Plan(len(index), recipe.seed, **lanes)
    if len(groups) == 1 and len(sources) == 1:
        raise DataError(f"balance_by is {recipe.balance_by}, but all samples have the same: set balance_by none")
    return Mixture(groups, shares, batch=recipe.global_batch, seed=recipe.seed, num_meeting=num_meeting, **lanes)


def _check_labels_to_balance_by(recipe: Recipe, index: ShardIndex) -> None:
    """Refuse missing labels if batches are balanced by them; otherwise pre-training ignores labels."""
    setting = "use_balanced_sampler" if recipe.use_balanced_sampler else "balance_by"
    wanted = recipe.use_balanced_sampler or recipe.balance_by == "label"
    if wanted and (missing := missing_labels(index)):
        raise DataError(
            f"{setting} needs a label for every sample, but {missing}: add them, or do not balance by label"
        )


def describe_shares(index: ShardIndex, sources: list[Source]) -> str:
    """Describe the shares of a run's sources, which its fingerprint does not cover; empty without shares."""
    if sources[0].share is None:
        return ""
    sizes = (len(group) for group in groups_of_sources(index, sources))
    return ", ".join(f"{size} samples at {source.share}" for size, source in zip(sizes, sources, strict=True))


def byte_range_reader(runtime: Runtime) -> ByteRangeReader:
    """Build the reader with the runtime's cache settings."""
    return ByteRangeReader(
        cache_dir=Path(runtime.cache_dir) if runtime.cache_dir else None, cache_bytes=runtime.cache_bytes
    )
