"""Images that a command looks at without training: photographs as files, or samples of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.data.labels import class_of
from trainer.data.photographs import Photographs, find_photographs, photo_stream
from trainer.data.shards.index import NO_GROUP, ShardIndex, describe_index, list_shards, open_index
from trainer.data.shards.members import GROUP_FIELDS, NO_LABEL
from trainer.data.stream import Stream, fixed_stream
from trainer.data.transforms.views import CenterView
from trainer.data.writing.source_images import names_tars
from trainer.distributed.world import World


class HasView(Protocol):
    """A model that knows how it sees whole photographs, and images that may be cropped already."""

    @property
    def view(self) -> CenterView:
        """How it sees a whole photograph."""

    def view_of(self, index: ShardIndex, *, setting: str) -> CenterView:
        """Return how it sees the images of shards."""


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a command, in their order: files, or samples of shards."""

    source: Photographs | ShardIndex

    def __len__(self) -> int:
        return len(self.source.paths) if isinstance(self.source, Photographs) else len(self.source)

    @property
    def note(self) -> str:
        """How many there are, and what was left out."""
        return self.source.note if isinstance(self.source, Photographs) else describe_index(self.source)

    @property
    def fingerprint(self) -> str:
        """Changes with the set of images and their content."""
        return self.source.fingerprint() if isinstance(self.source, Photographs) else self.source.fingerprint

    def names(self) -> Iterator[str]:
        """Yield the name of each: the path of a file, or SHARD/KEY."""
        if isinstance(self.source, Photographs):
            yield from self.source.names
        else:
            for ref in self.source.samples(np.arange(len(self.source))):
                yield f"{ref.shard}/{ref.key}"

    def facts(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """Return what is known of some of them.

        Returns:
            facts: for each its ``key``, the path of a file or the key in its ``shard``; ``label``, if it has a class;
                and those of `GROUP_FIELDS` that its json, or its row of a CSV, has.
        """
        if isinstance(self.source, Photographs):
            rows = self.source.rows or [{}] * len(self.source.paths)
            return [{"key": self.source.names[i]} | _facts_of_row(rows[i]) for i in samples]
        return _facts_of_samples(self.source, samples)

    def view(self, model: HasView) -> CenterView:
        """Return how a model sees them; raises as its `view` and `view_of`."""
        return model.view if isinstance(self.source, Photographs) else model.view_of(self.source, setting="--images")

    def stream(self, samples: list[int], view: CenterView, *, batch: int) -> Stream:
        """Build one pass over some of them; nothing is substituted for an unreadable one."""
        if isinstance(self.source, Photographs):
            return photo_stream(self.source, samples, view, batch=batch)
        return fixed_stream(self.source, samples, view, batch=batch, noise_per_sample=0, substitute=False)


def open_images(images: str, world: World, *, index_dir: str | None, image_member: str | None) -> Images:
    """List the files, or open the shards, on rank 0 first; all ranks call.

    Raises:
        ConfigError: there is no image.
    """

    def find() -> Images:
        if not names_tars(images):
            return Images(find_photographs(images))
        shards, folder = list_shards(images, setting="--images"), Path(index_dir) if index_dir else None
        return Images(open_index(shards, index_dir=folder, image_member=image_member))

    found: list[Images] = []
    world.on_main(lambda: found.append(find()))
    return world.together(lambda: found[0] if found else find())


def _facts_of_row(row: dict[str, str]) -> dict[str, Any]:
    label = class_of(row.get("label", ""))
    known = {name: row[name] for name in GROUP_FIELDS if row.get(name)}
    return ({} if label is None else {"label": label}) | known


def _facts_of_samples(index: ShardIndex, samples: Sequence[int]) -> list[dict[str, Any]]:
    sample_N = np.array(samples, dtype=np.int64)
    facts: list[dict[str, Any]] = [
        {"key": ref.key, "shard": ref.shard} | ({} if ref.label == NO_LABEL else {"label": ref.label})
        for ref in index.samples(sample_N)
    ]
    for name in index.group_fields:
        values, codes_N = index.groups(name)
        for fact, code in zip(facts, codes_N[sample_N].tolist(), strict=True):
            if code != NO_GROUP:
                fact[name] = values[code]
    return facts
