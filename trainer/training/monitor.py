"""What people see of a run: progress bar, metrics.jsonl, TensorBoard, the log file, the sample ledger.

Only rank 0 writes, except for the ledger, of which every rank keeps its own file. Nothing here waits for the device:
values arrive as floats, and arrive at logging steps only.

After a resume, records of steps beyond the checkpoint are cut away, so that every file describes the weights that
exist.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.data.labels import CLASSES
from trainer.data.stream import Batch
from trainer.errors import without_secrets
from trainer.fault_tolerance.attempts import Lease
from trainer.fault_tolerance.ledger import rows_until
from trainer.progress import Progress
from trainer.training.throughput import Forecast

logger = logging.getLogger(__name__)
_CHARTS = {
    "validation": {
        "loss": ["train/loss", "val/loss"],
        "masked error": ["val/loss", "val/mean_face_loss"],
        "detection error": ["val/d_eer"],
    },
    "probe": {
        "accuracy": ["probe/knn_accuracy", "probe/linear_accuracy", "probe/chance"],
        "verification": ["probe/eer", "probe/tar_at_far_0.01", "probe/tar_at_far_0.001"],
        "effective rank": ["probe/rank_me"],
    },
}
"""TensorBoard's custom scalars: what belongs into one chart."""
_COMPARED = ("train/loss", "val/loss", "val/d_eer", "probe/knn_accuracy", "probe/linear_accuracy")
"""Numbers beside the hyperparameters."""
_COLUMNS = 4
"""Images of a row: TensorBoard shows a picture 270 pixels wide, where names below more of them cannot be read."""
_MIN_LABEL_PIXELS = 14
"""Height of the name below a drawn image."""


class Monitor:
    """Rank 0's sinks; on other ranks every method does nothing."""

    def __init__(
        self,
        output_dir: Path,
        *,
        lease: Lease,
        first_step: int,
        total_steps: int,
        is_main: bool,
        progress_bar: bool,
        epoch_at: Callable[[int], float] | None = None,
        last_step: int | None = None,
    ) -> None:
        """Open the sinks, and cut away rows beyond ``first_step`` and what an older attempt may still write.

        Args:
            output_dir: of the run.
            lease: the right of this attempt to change it.
            first_step: where this attempt begins.
            total_steps: length of the schedule.
            is_main: whether this is rank 0.
            progress_bar: whether to draw one.
            epoch_at: passes over the training set after a step; none leaves them out.
            last_step: where this attempt ends, if before the schedule does.
        """
        self._is_main = is_main
        if not is_main:
            return
        self._epoch_at = epoch_at
        self._forecast = Forecast((last_step or total_steps) - first_step)
        self._pictures = output_dir / "pictures"
        metrics = output_dir / "metrics.jsonl"
        self._metrics = lease.append_to(metrics, rows_until(metrics, first_step))
        for events in (output_dir / "tensorboard").glob("events.*"):
            lease.detach(events)
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._progress = Progress(total_steps, initial=first_step, unit="step", shown=progress_bar)

    def describe(self, step: int, tables: Mapping[str, Mapping[str, Any]], tags: Collection[str]) -> None:
        """Show in TensorBoard what runs: tables, and the one named recipe as hyperparameters, by which runs compare.

        Args:
            step: where this attempt begins.
            tables: name -> setting -> value.
            tags: of the numbers that the run will record, as far as `charts` or hyperparameters show them.
        """
        if not self._is_main:
            return
        for name, values in tables.items():
            self._board.add_text(f"run/{name}", _markdown(values), step)
        self._board.add_custom_scalars(charts(tags))
        compared = {tag: 0.0 for tag in _COMPARED if tag in tags}
        for summary in hparams(hyperparameters(tables["recipe"]), compared):  # type: ignore[no-untyped-call]
            self._board._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def step_done(self) -> None:
        """Move the bar, and log once when the run will end."""
        if self._is_main:
            self._progress.update()
            if text := self._forecast.step_done():
                logger.info("%s", text)

    def scalars(self, step: int, values: Mapping[str, float], *, group: str = "train") -> None:
        """Record numbers of one step in metrics.jsonl and TensorBoard, and the main ones in the bar."""
        if not self._is_main:
            return
        prefix = "" if group == "train" else f"{group}_"
        row = {"step": step} | {prefix + name: _plain(value) for name, value in values.items()}
        if self._epoch_at is not None:
            row["epoch"] = round(self._epoch_at(step), 6)
        row["time"] = round(time.time(), 3)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
        if group == "train":
            self._progress.note(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_s']:.0f}")

    def precision_recall(self, step: int, name: str, label_N: Any, score_N: Any) -> None:
        """Draw in TensorBoard how precision falls as more attacks are found.

        Args:
            step: when.
            name: of the curve.
            label_N: 1 for attacks, 0 otherwise.
            score_N: probability of an attack, in [0, 1].
        """
        if self._is_main:
            self._board.add_pr_curve(name, label_N, score_N, step)

    def picture(self, step: int, name: str, image_CHW: torch.Tensor, *, file: str = "step") -> None:
        """Record a uint8 picture in TensorBoard and as OUTPUT/pictures/FILE-XXXXXXXX.png, with the step's number."""
        if self._is_main:
            self._board.add_image(name, image_CHW, step)
            self._pictures.mkdir(exist_ok=True)
            Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(self._pictures / f"{file}-{step:08d}.png")

    def figure(self, step: int, name: str, draw: Callable[[], NDArray[np.uint8]], *, file: str) -> None:
        """Record a drawing (3, H, W) as `picture` does; ``draw`` is called on rank 0 only."""
        if self._is_main:
            self.picture(step, name, torch.from_numpy(draw()), file=file)

    def flush(self) -> None:
        """Sync everything recorded so far to disk; called with each checkpoint."""
        if self._is_main:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._board.flush()

    def close(self) -> None:
        """Close the sinks."""
        if self._is_main:
            self.flush()
            self._progress.close()
            self._board.close()
            self._metrics.close()


def charts(tags: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the charts all of whose numbers a run records: TensorBoard draws one without numbers as an empty frame."""
    kept = {
        name: {title: ["Multiline", shown] for title, shown in group.items() if set(shown) <= set(tags)}
        for name, group in _CHARTS.items()
    }
    return {name: group for name, group in kept.items() if group}


def hyperparameters(recipe: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return a recipe as TensorBoard takes it, without the learning rate that another one overrides."""
    overridden = "base_learning_rate" if recipe.get("learning_rate") is not None else "learning_rate"
    return {
        name: value if isinstance(value, bool | int | float | str) else _text(value)
        for name, value in recipe.items()
        if name != overridden
    }


def labelled_views(batch: Batch, num_shown: int = 16) -> torch.Tensor:
    """Draw the first images of a batch, each above the name of its class; uint8 (3, H, W)."""
    tiles = []
    for image_CHW, label in zip(batch.images_BCHW[:num_shown], batch.labels[:num_shown], strict=True):
        size = image_CHW.shape[-1]
        height = max(_MIN_LABEL_PIXELS, size // 7)
        tile = Image.new("RGB", (size, size + height), "white")
        tile.paste(Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()))
        font = ImageFont.load_default(0.75 * height)
        ImageDraw.Draw(tile).text((2, size), dict(enumerate(CLASSES)).get(label, str(label)), fill="black", font=font)
        tiles.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1))
    tiles += [torch.full_like(tiles[0], 255)] * (-len(tiles) % min(_COLUMNS, len(tiles)))
    rows = [torch.cat(tiles[i : i + _COLUMNS], dim=2) for i in range(0, len(tiles), _COLUMNS)]
    return torch.cat(rows, dim=1)


def _markdown(values: Mapping[str, Any]) -> str:
    """Write a table."""
    rows = (f"| {name} | `{without_secrets(_text(value))}` |" for name, value in values.items())
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _text(value: Any) -> str:
    """Write a value as a command line takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN; a missing number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
