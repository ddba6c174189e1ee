"""Which step of a detector is kept: laws of the choice. Runs are in test_finetune."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.detection.error_rates import bootstrap_weights, d_eer, error_curve
from trainer.detection.selection import Validated, judge, standard_error, validated
from trainer.errors import CheckpointError

PEOPLE = [(f"p{i % 8}",) for i in range(64)] + [(f"p{i % 8}", f"p{(i + 1 + i // 32) % 8}") for i in range(64)]
LABELS = np.repeat([0, 1], 64)


def logits(quality: float, seed: int, noise: float = 1.0) -> np.ndarray:
    """A person's images are alike, and so are the scores of two steps of one detector."""
    person = np.random.default_rng(0).normal(size=8)
    own = np.array([sum(person[int(name[1:])] for name in names) / len(names) for names in PEOPLE])
    return own + quality * (LABELS - 0.5) + noise * np.random.default_rng(seed).normal(size=len(LABELS))


def choice(
    steps: list[Validated], best: Validated | None = None, kept: int | None = None
) -> tuple[int | None, Validated]:
    for new in steps:
        verdict = judge(new, best, LABELS, PEOPLE)
        best, kept = verdict.best, new.step if verdict.keep else kept
    assert best is not None
    return kept, best


def test_a_lucky_early_step_gives_way_to_a_later_one_that_is_as_good_up_to_noise() -> None:
    early, later = (validated(step, logits(1.5, seed), LABELS) for step, seed in ((10, 3), (20, 4)))
    early, later = sorted((early, later), key=lambda found: found.d_eer)
    early, later = Validated(10, early.d_eer, early.logit_N), Validated(20, later.d_eer, later.logit_N)
    assert 0 < later.d_eer - early.d_eer < standard_error(early.logit_N, later.logit_N, LABELS, PEOPLE)
    kept, best = choice([early, later])
    assert (kept, best.step) == (20, 10), "and the lowest one stays the measure"


def test_a_step_that_is_clearly_worse_is_not_kept_however_late_it_comes() -> None:
    good, bad = validated(10, logits(4.0, 1), LABELS), validated(20, logits(0.5, 2), LABELS)
    assert choice([good, bad])[0] == 10
    assert choice([bad, good])[0] == 10, "nor does a bad start matter"


def test_noise_does_not_creep_down_step_by_step() -> None:
    """Each step is a little worse than the one before it: all are compared with the best, not with the last kept."""
    steps = [validated(i, logits(3.0 - 0.25 * i, 7, noise=0.2), LABELS) for i in range(12)]
    assert steps[-1].d_eer > steps[0].d_eer + 0.1
    kept, best = choice(steps)
    assert kept is not None
    assert kept < 6
    assert steps[kept].d_eer - best.d_eer <= standard_error(steps[kept].logit_N, best.logit_N, LABELS, PEOPLE)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0]), min_size=2, max_size=7), st.integers(0, 1000), st.data())
def test_a_run_that_was_killed_and_measures_some_steps_again_ends_in_the_same_choice(
    qualities: list[float], seed: int, data: st.DataObject
) -> None:
    steps = [validated(i, logits(quality, seed + i), LABELS) for i, quality in enumerate(qualities)]
    killed = data.draw(st.integers(1, len(steps)))
    checkpoint = data.draw(st.integers(0, killed))
    kept, best = choice(steps[:killed])
    kept, best = choice(steps[checkpoint:], best, kept)
    whole = choice(steps)
    assert (kept, best.step) == (whole[0], whole[1].step)


def test_the_standard_error_is_of_the_same_people_for_both_steps() -> None:
    one, other = logits(1.0, 1), logits(1.5, 2)
    other[5] = np.nan
    read_N = ~np.isnan(other)
    names = [name for name, is_read in zip(PEOPLE, read_N, strict=True) if is_read]
    differences = []
    for weight_N in bootstrap_weights(names, num_replicates=200, seed=0).astype(int):
        drawn = [np.repeat(x[read_N], weight_N) for x in (one, other, LABELS)]
        if 0 < drawn[2].sum() < len(drawn[2]):
            differences.append(np.subtract(*(d_eer(error_curve(x, drawn[2])).value for x in drawn[:2])))
    assert standard_error(one, other, LABELS, PEOPLE) == pytest.approx(np.std(differences))
    assert standard_error(one, one, LABELS, PEOPLE) == 0


def test_what_later_steps_are_compared_with_survives_a_file_and_damage_is_named(tmp_path: Path) -> None:
    before = validated(30, np.append(logits(1.0, 1)[:-1], np.nan), LABELS)
    before.save(tmp_path / "selection.npz")
    after = Validated.load(tmp_path / "selection.npz")
    assert (after.step, after.d_eer) == (before.step, before.d_eer)
    np.testing.assert_array_equal(after.logit_N, before.logit_N)
    (tmp_path / "selection.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"selection\.npz cannot be read"):
        Validated.load(tmp_path / "selection.npz")
