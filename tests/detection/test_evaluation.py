"""Scores, decisions, prints and the detector's folder: laws and refusals, without a run. Runs are in test_finetune."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.shards import jpeg, write_tar
from trainer.data.shards.index import ShardIndex, open_index
from trainer.data.stream import Batch
from trainer.detection.error_rates import Calibration, threshold_for_bscer, threshold_for_macer
from trainer.detection.leakage import Fingerprints, fingerprints_of
from trainer.detection.saved_detector import load_detector, save_detector
from trainer.detection.scoring import (
    RULE,
    Decision,
    Scores,
    check_labels,
    fit_decision,
    over_ranks,
    score,
    truth_of,
    validation_figures,
)
from trainer.distributed.world import World
from trainer.errors import CheckpointError, DataError
from trainer.fault_tolerance.attempts import acquire

Row = dict[str, object]


def index_of(path: Path, rows: list[Row], first_image: int = 0) -> ShardIndex:
    members = []
    for number, row in enumerate(rows):
        members += [
            (f"{number:03d}.jpg", jpeg(first_image + number)),
            (f"{number:03d}.json", json.dumps(row).encode()),
        ]
    return open_index([write_tar(path, members)])


# ---------------------------------------------------------------------------------------------- overlap


def test_sets_share_the_people_of_either_parent_and_identical_images(tmp_path: Path) -> None:
    train = fingerprints_of(
        index_of(tmp_path / "a.tar", [{"identity": "ann", "identity_2": "bob"}, {"identity": "cid"}, {}])
    )
    second = fingerprints_of(
        index_of(tmp_path / "b.tar", [{"identity": "bob"}, {"identity": "eve", "identity_2": "cid"}], 10)
    )
    assert train.people_N.size == 3
    assert train.shared_with(second) == second.shared_with(train) == "2 people"
    same = fingerprints_of(index_of(tmp_path / "c.tar", [{"identity": "fay"}], 2))
    assert train.shared_with(same) == "1 identical images"
    assert train.shared_with(fingerprints_of(index_of(tmp_path / "d.tar", [{}], 20))) == ""
    assert train.shared_with(train) == "3 people and 3 identical images"


def test_fingerprints_are_ascending_distinct_and_survive_a_file(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a.tar", [{"identity": str(i % 7)} for i in range(20)])
    fingerprints = fingerprints_of(index)
    fingerprints.save(tmp_path / "train.npz")
    for found_N, expected_N in zip(
        *((p.images_N, p.people_N) for p in (fingerprints, Fingerprints.load(tmp_path / "train.npz"))), strict=True
    ):
        np.testing.assert_array_equal(found_N, expected_N)
        assert (np.diff(found_N.astype(object)) > 0).all()
    expected = {int(crc) << 32 | int(size) for crc, size in zip(index.image_crc32, index.image_bytes, strict=True)}
    assert set(fingerprints.images_N.tolist()) == expected


# ---------------------------------------------------------------------------------------------- evaluation


def test_a_score_is_the_morphs_logit_less_the_bona_fides_and_a_failure_is_no_score() -> None:
    logits_BC = torch.tensor([[1.0, 3.0], [0.5, -1.0], [9.0, 9.0]])
    batch = Batch(
        images_BCHW=torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
        noise_BN=torch.zeros(3, 1),
        positions=[4, 7, 9],
        keys=["a", "b", "c"],
        labels=[0, 1, 0],
        failures=["", "", "corrupt"],
    )
    found = score(lambda images_BCHW: logits_BC, [batch], torch.device("cpu"))
    np.testing.assert_array_equal(found.logit_N, [2.0, -1.5, np.nan])
    assert (found.sample_N.tolist(), found.code_N) == ([4, 7, 9], ["Success", "Success", "corrupt"])


def test_the_scores_of_one_rank_are_all_scores() -> None:
    local = Scores(np.array([2, 3]), np.array([np.nan, 0.5]), ["empty", "Success"])
    assert over_ranks(local, World()) is local


def test_truth_names_tools_of_morphs_and_the_people_in_each_image(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"label": 0, "identity": "ann", "attack": "ignored"},
        {"label": 1, "identity": "ann", "identity_2": "bob", "attack": "splice"},
        {"label": 1, "identity_2": "bob"},
        {"label": 0},
    ]
    truth = truth_of(index_of(tmp_path / "a.tar", rows), np.arange(4))
    assert truth.label_N.tolist() == [0, 1, 1, 0]
    assert truth.tool_N == ["", "splice", "unnamed", ""]
    assert truth.people_N == [("ann",), ("ann", "bob"), ("bob",), ()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"label": 0}, {"label": 1}, {}], "--data: 1 of 3 samples .* 002 in .* has no label"),
        ([{"label": 0}, {"label": 2}, {"label": 1}], "001 in .* has label 2"),
        ([{"label": 0}, {"label": 0}], r"none of 2 samples is a morph \(label 1\)"),
        ([{"label": 1}, {"label": 1}], r"none of 2 samples is a bona fide \(label 0\)"),
    ],
)
def test_sets_that_cannot_judge_are_refused(rows: list[Row], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(index_of(tmp_path / "a.tar", rows), setting="--data")


def test_one_class_is_enough_where_both_are_not_asked_for(tmp_path: Path) -> None:
    check_labels(index_of(tmp_path / "a.tar", [{"label": 1}]), setting="--data", both=False)


def test_shards_whose_folders_were_numbered_in_sorted_order_are_refused(tmp_path: Path) -> None:
    rows = [{"label": 0, "class": "attack"}, {"label": 1, "class": "bonafide"}, {"label": 1, "class": "7"}]
    with pytest.raises(DataError, match=r"2 of 3 samples .* contradicts .* such as .*'attack' has label 0"):
        check_labels(index_of(tmp_path / "a.tar", rows), setting="--data")
    rows = [{"label": 1, "class": "attack"}, {"label": 0, "class": "Bona fide"}, {"label": 1, "class": "Müller"}]
    check_labels(index_of(tmp_path / "b.tar", rows), setting="--data")


def test_an_image_that_could_not_be_read_takes_no_part_in_a_decision() -> None:
    generator = np.random.default_rng(0)
    label_N = np.arange(300) % 2
    logit_N = generator.normal(label_N * 2.0 - 1, 1.5)
    decision = fit_decision(logit_N, label_N)
    assert fit_decision(np.append(logit_N, np.nan), np.append(label_N, 1)) == decision
    assert set(decision.thresholds) == {
        *("d_eer", "macer_0.01", "macer_0.05", "macer_0.10", "macer_0.20", "bscer_0.01", "bscer_0.10")
    }
    figures = validation_figures(Scores(np.arange(301), np.append(logit_N, np.nan), []), np.append(label_N, 0))
    plain = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logit_N), torch.tensor(label_N * 1.0))
    assert figures["loss"] == pytest.approx(float(plain))
    assert figures["num_failed"] == 1


@pytest.mark.parametrize("steps", [10, 1 << 40], ids=["ties", "no ties"])
@pytest.mark.parametrize("size", [99, 100, 230])
def test_stored_thresholds_keep_their_limits_on_new_images_on_average(size: int, steps: int) -> None:
    """Scores are uniform on a grid, so that the rates on new images are known and not sampled."""
    generator = np.random.default_rng(size)
    for limit in (0.01, 0.05, 0.10):
        found = []
        for _ in range(2000):
            missed = threshold_for_macer(generator.integers(0, steps, size) / steps, limit)
            stopped = threshold_for_bscer(generator.integers(0, steps, size) / steps, limit)
            found.append([np.ceil(t * steps) / steps for t in (missed, stopped)])  # the share of scores below
        mean_2, error = np.abs([0, 1] - np.mean(found, axis=0)), 4 * np.std(found, axis=0) / np.sqrt(len(found))
        assert (mean_2 <= limit + error).all()
        expected = int(limit * (size + 1) + 1e-9) / (size + 1)
        assert steps == 10 or (mean_2 >= expected - error).all(), "stricter than it need be"


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.sampled_from([0.01, 0.05, 0.1, 0.2]))
def test_of_any_scores_at_most_the_limits_share_fails_the_threshold_that_the_others_set(
    scores: list[int], limit: float
) -> None:
    """The exact law behind the expectation: leave each out in turn; with ties."""
    rests = [(left_out, scores[:i] + scores[i + 1 :]) for i, left_out in enumerate(scores)]
    allowed = limit * len(scores) + 1e-9
    assert sum(left_out < threshold_for_macer(rest, limit) for left_out, rest in rests) <= allowed
    assert sum(left_out >= threshold_for_bscer(rest, limit) for left_out, rest in rests) <= allowed


def test_a_stored_threshold_is_as_good_as_its_limit_allows() -> None:
    scores = np.random.default_rng(0).permutation(200) / 200
    for limit, k in ((0.01, 2), (0.05, 10), (0.2, 40)):
        assert (scores < threshold_for_macer(scores, limit)).sum() == k - 1
        assert (scores >= threshold_for_bscer(scores, limit)).sum() == k - 1
    assert fit_decision(np.arange(200.0), np.arange(200) % 2).thresholds["macer_0.05"] == pytest.approx(
        fit_decision(np.arange(200.0), np.arange(200) % 2).probability(np.array([9.0]))[0]
    ), "the fifth lowest of 100 morphs"


def test_a_limit_that_the_validation_data_are_too_few_for_is_infinite_and_said() -> None:
    generator = np.random.default_rng(0)
    for num_morphs, is_enough in ((98, False), (99, True)):
        label_N = np.repeat([0, 1], [8, num_morphs])
        decision = fit_decision(generator.normal(label_N * 2.0), label_N)
        assert np.isfinite(decision.thresholds["macer_0.01"]) == is_enough
        told = [
            "bscer_0.01 is infinity: 8 bona fides cannot guarantee 1 %: need at least 99",
            "bscer_0.10 is infinity: 8 bona fides cannot guarantee 10 %: need at least 9",
        ]
        if not is_enough:
            assert decision.thresholds["macer_0.01"] == -np.inf, "calls everything a morph, so that none is missed"
            told.insert(0, "macer_0.01 is minus infinity: 98 attacks cannot guarantee 1 %: need at least 99")
        assert list(decision.notes) == told
        assert decision.thresholds["bscer_0.01"] == np.inf


# ---------------------------------------------------------------------------------------------- on disk


DESCRIPTION = {"recipe": {"model": "x"}, "preprocessing": {}, "init": {}, "selection": {}}
DECISION = Decision(
    Calibration(1.5, -0.25), {"d_eer": 0.1 + 0.2, "bscer_0.01": np.inf, "macer_0.01": -np.inf}, RULE, ("too few",)
)
PRINTS = Fingerprints(np.array([1, 2**64 - 1], dtype=np.uint64), np.array([], dtype=np.uint64))


def saved(folder: Path, value: float = 1.0) -> Path:
    weights = {"head.weight": torch.full((2, 3), value).T}
    save_detector(folder, DESCRIPTION, weights, DECISION, {"train": PRINTS}, lease=acquire(folder.parent, num_ranks=1))
    return folder


def test_a_detector_comes_back_as_it_was_saved_and_a_new_one_takes_its_place(tmp_path: Path) -> None:
    saved(tmp_path / "detector")
    found = load_detector(saved(tmp_path / "detector", value=2.0))
    assert torch.equal(found.weights["head.weight"], torch.full((3, 2), 2.0))
    assert found.decision == DECISION
    assert list(found.seen) == ["train"]
    np.testing.assert_array_equal(found.seen["train"].images_N, PRINTS.images_N)
    assert found.description["recipe"] == DESCRIPTION["recipe"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "detector"]
    assert not list(tmp_path.glob("attempts/*/drafts/*")), "drafts were left"
    assert load_detector(tmp_path).path == tmp_path / "detector"


def test_thresholds_of_an_older_detector_are_what_they_were(tmp_path: Path) -> None:
    """They met their limits on the validation data, and nothing else was promised."""
    alter(saved(tmp_path / "detector"), threshold_rule=None, threshold_notes=None)
    found = load_detector(tmp_path / "detector").decision
    assert (found.thresholds, found.rule, found.notes) == (DECISION.thresholds, "", ())


def test_a_detector_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    saved(tmp_path / "detector")

    def full(draft: Path) -> None:
        raise OSError(28, "No space left on device")

    lease = acquire(tmp_path, num_ranks=1)
    with pytest.raises(CheckpointError, match="No space left"):
        save_detector(tmp_path / "detector", DESCRIPTION, {}, DECISION, {}, lease=lease, write_more=full)
    assert not list(tmp_path.glob("attempts/*/drafts/*"))
    assert load_detector(tmp_path).weights


def alter(folder: Path, **changes: object) -> None:
    path = folder / "detector.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_damaged_detectors_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no detector"):
        load_detector(tmp_path)
    folder = saved(tmp_path / "detector")
    payload = bytearray((folder / "weights.safetensors").read_bytes())
    payload[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing or altered"):
        load_detector(folder)
    (saved(folder) / "train.npz").unlink()
    with pytest.raises(CheckpointError, match=r"train\.npz is missing or altered"):
        load_detector(folder)
    for changes, message in (({"format_version": 99}, "has format 99"), ({"init": None}, "lacks init")):
        alter(saved(folder), **changes)
        with pytest.raises(CheckpointError, match=message):
            load_detector(folder)
    (saved(folder) / "detector.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        load_detector(folder)
