"""Which samples are probed: bounded, spread over the classes, the same for any reader; sets without two classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.shards import jpeg, write_tar
from trainer.data.shards.index import ShardIndex, open_index
from trainer.errors import DataError
from trainer.probes.labelled_set import choose


@pytest.fixture
def index_of(tmp_path: Path) -> Any:
    def build(rows: list[dict[str, Any]]) -> ShardIndex:
        image = jpeg(1)
        members = []
        for number, fields in enumerate(rows):
            members += [(f"f{number:05d}.jpg", image), (f"f{number:05d}.json", json.dumps(fields).encode())]
        return open_index([write_tar(tmp_path / "s.tar", members)])

    return build


def test_few_samples_are_all_chosen_and_classes_of_one_are_left_out(index_of: Any) -> None:
    rows = [{"identity": f"p{i % 12}"} for i in range(48)] + [{"identity": "alone"}, {}]
    found = choose(index_of(rows), "identity", num_samples=2048, setting="--probe_data")
    assert found.sample_N.tolist() == list(range(48))
    assert found.num_single == 1
    assert found.people is None
    assert [found.names[i] for i in found.class_N] == [row["identity"] for row in rows[:48]]


def test_many_samples_are_bounded_and_spread_over_the_classes(index_of: Any) -> None:
    rows = [{"label": int(i >= 300), "identity": f"p{i // 3}"} for i in range(400)]
    index = index_of(rows)
    found = choose(index, "label", num_samples=60, setting="--probe_data")
    assert np.bincount(found.class_N).tolist() == [30, 30]
    assert found.sample_N[found.class_N == 0].tolist() == list(range(0, 300, 10))
    assert found.people == [(f"p{i // 3}",) for i in found.sample_N]
    people = choose(index, "identity", num_samples=60, setting="--probe_data")
    assert len(people.sample_N) == 60
    assert set(np.bincount(people.class_N)) == {3}, "a person gives all images or none, if eight fit"
    assert np.diff(people.sample_N[::3]).max() <= 30, "people from all over the set"


def test_a_small_class_is_taken_whole(index_of: Any) -> None:
    rows = [{"source": "web"}] * 200 + [{"source": "studio"}] * 5
    found = choose(index_of(rows), "source", num_samples=100, setting="--probe_data")
    assert np.bincount(found.class_N).tolist() == [50, 5]


def test_as_identity_a_morph_of_two_people_is_nobody(index_of: Any) -> None:
    rows = [{"identity": f"p{i % 6}"} for i in range(36)] + [{"identity": "p0", "identity_2": "p1"}] * 4
    index = index_of([row | {"label": int("identity_2" in row)} for row in rows])
    assert choose(index, "identity", num_samples=99, setting="--probe_data").sample_N.tolist() == list(range(36))
    assert choose(index, "label", num_samples=99, setting="--probe_data").people[-1] == ("p0", "p1")


def test_unreadable_samples_leave_and_take_a_class_of_one_with_them(index_of: Any) -> None:
    rows = [{"identity": f"p{i // 2}"} for i in range(30)]
    found = choose(index_of(rows), "identity", num_samples=99, setting="--probe_data")
    left = found.without({3, 8}, setting="--probe_data")
    assert left.sample_N.tolist() == [i for i in range(30) if i // 2 not in (1, 4)]
    assert [left.names[i] for i in left.class_N] == [f"p{i // 2}" for i in left.sample_N]
    with pytest.raises(DataError, match="20 readable samples of 10 classes"):
        found.without({0, 2, 4, 6, 8}, setting="--probe_data")


@pytest.mark.parametrize(
    ("rows", "field", "message"),
    [
        ([{"identity": f"p{i}"} for i in range(40)], "identity", "0 of 40 values occur in two samples"),
        ([{"label": 0}] * 40, "label", "1 of 1 values occur in two samples"),
        ([{"label": 0}] * 40, "source", r"no sample has that field in its json \(fields there: none\)"),
        ([{"identity": "a"}] * 40, "label", "add labels, or choose another --probe_field"),
        ([{"label": i % 2} for i in range(20)], "label", "20 readable samples of 2 classes"),
    ],
)
def test_a_set_that_cannot_be_probed_is_refused(
    rows: list[dict[str, Any]], field: str, message: str, index_of: Any
) -> None:
    with pytest.raises(DataError, match=f"--probe_data by {field}: {message}|{message}"):
        choose(index_of(rows), field, num_samples=2048, setting="--probe_data")
