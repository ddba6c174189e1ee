"""Choose the step of a detector to keep: the latest one that is as good as the best, within the noise of validation.

The step with the lowest D-EER is often the best by chance: validation sets have few identities, and the D-EER of the
same detector on other people would differ by several points. So a later step, with a lower learning rate, is kept
unless the best one is better by more than one standard error of the difference. The standard error comes from a
bootstrap over identities that measures both steps on the same draws. Source: Breiman et al. 1984, "Classification and
Regression Trees", section 3.4.3 (the one standard error rule).

Example: step 100 has a D-EER of 20 %. Step 200 has 21 % and the difference a standard error of 1.5 points, so step 200
is kept, but later steps are still compared with the 20 % of step 100. Step 300 has 23 % and is not kept.

Measured on the ORL faces, 12 trainings over 4 splits of 40 people (LoRA, probe, all weights; 7 validations each), test
D-EER of whole morphs: lowest validation D-EER 33.7 %, lowest validation loss 32.1 %, lowest mean of three D-EERs
31.0 %, this rule 29.9 %, last step 29.7 %; 28.7 % if the test set itself had chosen.

Shapes: N validation samples, in ascending order of their numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.detection.error_rates import bootstrap_weights, d_eer, d_eer_replicates, error_curve
from trainer.errors import CheckpointError

RULE = "the latest validated step whose D-EER is at most one standard error above the lowest one before it"
FILE = "selection.npz"
_NUM_REPLICATES = 200

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Validated:
    """A step's scores of the validation data."""

    step: int
    d_eer: float
    logit_N: Floats
    """NaN where the image could not be read."""

    def save(self, path: Path) -> None:
        """Write to a file, for the resume after a kill."""
        with path.open("wb") as file:
            np.savez(file, step=self.step, d_eer=self.d_eer, logit_N=self.logit_N)

    @staticmethod
    def load(path: Path) -> "Validated":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as found:
                return Validated(int(found["step"]), float(found["d_eer"]), found["logit_N"].astype(np.float64))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): restore it, or move the detector away") from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a step is kept, and the step that later ones are compared with."""

    keep: bool
    best: Validated
    standard_error: float
    """Of the difference to the best one before it; 0 if there was none."""


def judge(
    new: Validated, best: Validated | None, label_N: NDArray[np.int64], people: Sequence[Sequence[str]]
) -> Verdict:
    """Compare a step with the best one before it.

    After a run went back to a checkpoint, it judges steps again and makes the same choice: steps after the best one are
    compared with it as before, and the best one itself is kept again when the run reaches it.
    """
    if best is None or new.d_eer <= best.d_eer:
        return Verdict(True, new, 0.0)
    error = standard_error(new.logit_N, best.logit_N, label_N, people)
    return Verdict(new.d_eer - best.d_eer <= error, best, error)


def standard_error(
    one_N: Floats, other_N: Floats, label_N: NDArray[np.int64], people: Sequence[Sequence[str]]
) -> float:
    """Return the standard deviation, over a bootstrap of identities, of the difference between two steps' D-EERs."""
    read_N = np.flatnonzero(~np.isnan(one_N) & ~np.isnan(other_N))
    names, label_N = [people[i] for i in read_N.tolist()], label_N[read_N]
    weights_RN = bootstrap_weights(names, num_replicates=_NUM_REPLICATES, seed=0)
    one_R, other_R = (d_eer_replicates(x_N[read_N], label_N, weights_RN) for x_N in (one_N, other_N))
    return float(np.std(one_R - other_R)) if len(one_R) else 0.0


def validated(step: int, logit_N: Floats, label_N: NDArray[np.int64]) -> Validated:
    """Compute the D-EER of a step; unreadable images are left out."""
    read_N = ~np.isnan(logit_N)
    return Validated(step, d_eer(error_curve(logit_N[read_N], label_N[read_N])).value, logit_N)
