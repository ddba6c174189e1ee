"""The error rates as torchmetrics classes, for sums over ranks."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trainer.detection.error_rates import Floats, bscer_at_macer, d_eer, error_curve, macer_at_bscer, rates_at
from trainer.errors import DataError


class DetectionMetric(Metric):
    """Base of the metrics that see all scores of all ranks, each sample once.

    Samplers that pad a set to equal shares make ranks measure samples twice, and published figures count them twice. So
    every score comes with the number of its sample, and of several scores of one sample the first rank's counts.
    """

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    samples: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("scores", "labels", "samples"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

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
