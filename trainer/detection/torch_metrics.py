"""Gathering of scores over ranks, and the error rates, as torchmetrics classes.

torchmetrics imports transformers where that is installed, which takes seconds. Import this module where several ranks
measure, not at the start of a command.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trainer.detection.error_rates import Floats, bscer_at_macer, d_eer, error_curve, macer_at_bscer, rates_at
from trainer.errors import DataError


class _SampleMetric(Metric):
    """Base of metrics whose states are lists with one entry a sample, concatenated over ranks in rank order."""

    is_differentiable = False
    full_state_update = False
    state_names: tuple[str, ...]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in self.state_names:
            self.add_state(name, default=[], dist_reduce_fx="cat")


class GatheredScores(_SampleMetric):
    """All scores of all ranks, each sample once.

    Samplers that pad a set to equal shares make ranks measure some samples twice, and many published figures count
    them twice. So every score has the number of its sample, and of several scores of one sample only the first rank's
    counts::

        rank 0    samples 0 2 4    scores a c e
        rank 1    samples 1 3 0    scores b d f       0 is the padding
        all       samples 0 1 2 3 4    scores a b c d e
    """

    state_names = ("scores", "samples")
    scores: list[Tensor]
    samples: list[Tensor]

    def update(self, scores: Tensor, samples: Tensor) -> None:
        """Add scores (B,) and the numbers of their samples; nothing is read from the device."""
        self.scores.append(scores.detach().double())
        self.samples.append(samples)

    def compute(self) -> tuple[NDArray[np.int64], Floats]:
        """Return the numbers of all samples, ascending, and their scores; a NaN stays one."""
        score_N, sample_N = (dim_zero_cat(x).cpu().numpy() for x in (self.scores, self.samples))
        sample_N, first_N = np.unique(sample_N, return_index=True)
        return sample_N, score_N[first_N]


class DetectionMetric(_SampleMetric):
    """Base of the error rates over all scores of all ranks, each sample once, as in `GatheredScores`."""

    state_names = ("scores", "labels", "samples")
    scores: list[Tensor]
    labels: list[Tensor]
    samples: list[Tensor]

    def update(self, scores: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Add scores (B,), their labels and the numbers of their samples; nothing is read from the device."""
        self.scores.append(scores.detach().double())
        self.labels.append(labels)
        self.samples.append(samples)

    def compute(self) -> Tensor:
        """Return the figure over all ranks, a float32 scalar.

        Raises:
            DataError: as `error_curve`, or a sample came with two labels.
        """
        if not len(self.scores):
            raise DataError("there are no scores: the test set is empty")
        score_N, label_N, sample_N = (dim_zero_cat(x).cpu().numpy() for x in (self.scores, self.labels, self.samples))
        _, first_N, place_N = np.unique(sample_N, return_index=True, return_inverse=True)
        differing = np.flatnonzero(label_N != label_N[first_N][place_N])
        if len(differing):
            raise DataError(f"sample {sample_N[differing[0]]} came with two labels: number samples uniquely")
        return torch.tensor(self.figure(score_N[first_N], label_N[first_N]), dtype=torch.float32)

    def figure(self, score_N: Floats, label_N: NDArray[np.int64]) -> float:
        """Compute from the distinct samples."""
        raise NotImplementedError


class DEER(DetectionMetric):
    """D-EER, see `d_eer`."""

    def figure(self, score_N: Floats, label_N: NDArray[np.int64]) -> float:
        """Compute from the distinct samples."""
        return d_eer(error_curve(score_N, label_N)).value


class BSCERAtMACER(DetectionMetric):
    """BSCER@MACER=limit, see `bscer_at_macer`."""

    def __init__(self, limit: float, **options: Any) -> None:
        super().__init__(**options)
        self.limit = limit

    def figure(self, score_N: Floats, label_N: NDArray[np.int64]) -> float:
        """Compute from the distinct samples."""
        return bscer_at_macer(error_curve(score_N, label_N), self.limit).bscer


class MACERAtBSCER(DetectionMetric):
    """MACER@BSCER=limit, see `macer_at_bscer`."""

    def __init__(self, limit: float, **options: Any) -> None:
        super().__init__(**options)
        self.limit = limit

    def figure(self, score_N: Floats, label_N: NDArray[np.int64]) -> float:
        """Compute from the distinct samples."""
        return macer_at_bscer(error_curve(score_N, label_N), self.limit).macer


class MACER(DetectionMetric):
    """Share of morphs below a threshold."""

    def __init__(self, threshold: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = threshold

    def figure(self, score_N: Floats, label_N: NDArray[np.int64]) -> float:
        """Compute from the distinct samples."""
        return rates_at(score_N, label_N, self.threshold).macer


class BSCER(MACER):
    """Share of bona fides at or above a threshold."""

    def figure(self, score_N: Floats, label_N: NDArray[np.int64]) -> float:
        """Compute from the distinct samples."""
        return rates_at(score_N, label_N, self.threshold).bscer


APCER, BPCER = MACER, BSCER
"""The names of ISO/IEC 30107-3."""
