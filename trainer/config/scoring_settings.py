"""Settings of launch/evaluate.py and launch/detect.py, for their command lines and for `trainer.detection`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.checks import check_counts, check_types, require
from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What an evaluation of detectors may set."""

    models: str = ""
    """Detectors, as NAME=RUN;NAME=RUN, where RUN is an output_dir of launch/finetune.py or its detector folder."""
    test_sets: str = ""
    """Labelled shards, as NAME=SHARDS;NAME=SHARDS, where SHARDS is what --data takes."""
    output_dir: str = "results"
    """Where the three files go."""
    threshold: str = "d_eer"
    """Which of a detector's thresholds decides isMorph: d_eer, macer_0.01 ... 0.20, bscer_0.01, bscer_0.10."""
    init: str | None = None
    """Where the frozen encoder's weights are now, if not where training found them; they are checked."""
    image_size: int | None = None
    """Refuse detectors of another image size; none takes each at its own [pixels]."""
    allow_overlap: bool = False
    """Measure although people or images of a test set were trained on or chose the model; the report says so."""
    num_replicates: int = 1000
    """Replicates of the bootstrap over people, for the intervals; 0 for none."""
    seed: int = 0
    """Of the bootstrap."""
    num_hardest: int = 8
    """So many hardest morphs, and as many hardest bona fides, of each model and test set in the report [images]."""
    baselines: str | None = None
    """JSON of tools/shortcut_baselines.py, to stand beside the models."""
    markdown: str | None = None
    """Also write a table of D-EERs in Markdown into this file, for a README."""
    micro_batch: int = 64
    """Images in one forward pass [images]."""
    num_workers: int = 2
    """Loader processes; 0 loads in this one."""
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    image_member: str | None = None
    """Suffix of the image to read where samples hold several, as left.jpg; none: the only one, or the plain one."""
    num_threads: int | None = None
    """CPU threads; none leaves torch's choice."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        if self.markdown is not None:
            path = Path(self.markdown)
            will_exist = path.parent.is_dir() or path.parent == Path(self.output_dir)
            if path.is_dir() or not will_exist:
                raise ConfigError(
                    f"markdown is {self.markdown}, but must be a file in a folder that exists: create the folder"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionSettings:
    """What the scoring of photographs may set."""

    model: str = ""
    """The detector: an output_dir of launch/finetune.py, its detector folder, or an export as ONNX."""
    images: str = ""
    """A photograph, a folder of them, a CSV with a column path, or shards, as what --data takes."""
    output: str = "scores.csv"
    """The file of scores: .csv, or .jsonl for one JSON object a line."""
    threshold: str = "d_eer"
    """Which of the detector's thresholds decides isMorph: d_eer, macer_0.01 ... 0.20, bscer_0.01, bscer_0.10."""
    explain: str | None = None
    """Folder for a picture of each photograph: where blurring it changes the score, and what the detector's MAE
    reconstructs; costs 145 forward passes of each photograph. None: no pictures."""
    label: Literal["non-scanned", "scanned", "unknown"] = "unknown"
    """What is known of the photographs; copied into each row and without influence on the score."""
    init: str | None = None
    """Where the frozen encoder's weights are now, if not where training found them; they are checked."""
    micro_batch: int = 64
    """Images in one forward pass [images]."""
    num_workers: int = 2
    """Loader processes of each rank; 0 loads in this one."""
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    image_member: str | None = None
    """Suffix of the image to read where samples of shards hold several, as left.jpg; none: the only one."""
    num_threads: int | None = None
    """CPU threads of each rank; none leaves torch's choice, or divides the cores among ranks."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        suffix = Path(self.output).suffix
        require(self, "output", suffix in (".csv", ".jsonl"), "must end in .csv or .jsonl: name such a file")
        require(self, "output", not Path(self.output).is_dir(), "is a folder: name a file in it")
        is_folder = self.explain is None or self.explain.lower() not in ("", "true", "false")
        require(self, "explain", is_folder, "must name a folder for the pictures, such as explained")
