"""What the optimizer consumes depends on the plan alone: not on workers, micro batch or world size."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.shards import members_of, write_tar
from trainer.data.loader import Loader
from trainer.data.order.plan import Order, Plan, Repeated
from trainer.data.shards.index import ShardIndex, list_shards, open_index
from trainer.data.stream import Batch, ChosenRequests, Slice, Stream, fixed_stream, train_stream
from trainer.data.transforms import views as augment
from trainer.data.transforms.views import CenterView, PretrainView
from trainer.errors import DataError

GLOBAL_BATCH, STEPS = 12, 8


@pytest.fixture
def index(shards: Path) -> ShardIndex:
    return open_index(list_shards(str(shards), setting="--data"))


def loader(index: ShardIndex, share: Slice, *, workers: int = 0, first_step: int = 0, seed: int = 3) -> Loader:
    view = PretrainView(size=16, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=seed, fast=True)
    order: Order = Plan(len(index), seed, num_lanes=4, block_samples=4)
    if share.repeats > 1:
        order = Repeated(order, share.repeats, share.global_batch)
    return Loader(
        train_stream(index, order, share, view, first_step=first_step, noise_per_sample=4), num_workers=workers
    )


def consumed(
    index: ShardIndex, *, ranks: int, micro: int, workers: int, first_step: int = 0, repeats: int = 1
) -> dict[int, tuple]:
    """Position -> (key, label, pixels, noise) of all ranks over some steps."""
    found = {}
    for rank in range(ranks):
        share = Slice(GLOBAL_BATCH, micro, rank, ranks, repeats)
        batches = iter(loader(index, share, workers=workers, first_step=first_step))
        for _ in range((STEPS - first_step) * share.micro_batches_per_step):
            batch: Batch = next(batches)
            for i, position in enumerate(batch.positions):
                pixels = batch.images_BCHW[i].numpy().tobytes()
                found[position] = (batch.keys[i], batch.labels[i], pixels, batch.noise_BN[i].tolist())
    return found


@pytest.mark.parametrize(("ranks", "micro", "workers"), [(1, 4, 2), (2, 6, 0), (2, 3, 2), (3, 2, 1), (4, 1, 2)])
@pytest.mark.versions
def test_the_global_batch_is_the_same_for_every_layout(index: ShardIndex, ranks: int, micro: int, workers: int) -> None:
    assert consumed(index, ranks=ranks, micro=micro, workers=workers) == consumed(index, ranks=1, micro=12, workers=0)


@pytest.mark.parametrize(("ranks", "micro", "workers"), [(1, 4, 2), (2, 6, 0), (3, 2, 1)])
def test_repeated_views_are_the_same_for_every_layout_and_differ_from_each_other(
    index: ShardIndex, ranks: int, micro: int, workers: int
) -> None:
    found = consumed(index, ranks=ranks, micro=micro, workers=workers, repeats=2)
    assert found == consumed(index, ranks=1, micro=12, workers=0, repeats=2)
    for step in range(STEPS):
        views = [found[step * GLOBAL_BATCH + i] for i in range(GLOBAL_BATCH)]
        for first, second in zip(views[: GLOBAL_BATCH // 2], views[GLOBAL_BATCH // 2 :], strict=True):
            assert first[:2] == second[:2]
            assert first[2] != second[2]
            assert first[3] != second[3]


def test_repeated_views_cost_one_decoding(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = augment.decode_image
    monkeypatch.setattr(
        augment, "decode_image", lambda payload, **how: decoded.append(payload) or decode(payload, **how)
    )
    next(iter(loader(index, Slice(GLOBAL_BATCH, GLOBAL_BATCH, repeats=3))))
    assert len(decoded) == len(set(decoded)) == GLOBAL_BATCH // 3


def test_a_stream_that_starts_later_is_the_rest_of_the_stream(index: ShardIndex) -> None:
    whole = consumed(index, ranks=1, micro=12, workers=0)
    rest = consumed(index, ranks=2, micro=3, workers=2, first_step=5)
    assert rest == {position: value for position, value in whole.items() if position >= 5 * GLOBAL_BATCH}


def test_labels_and_keys_belong_together(index: ShardIndex) -> None:
    for key, label, *_ in consumed(index, ranks=1, micro=12, workers=0).values():
        assert int(key.removeprefix("face")) % 2 == label


def test_a_bad_sample_is_substituted_the_same_way_everywhere(tmp_path: Path) -> None:
    members = members_of(range(24))
    members[10] = (members[10][0], b"broken")
    index = open_index([write_tar(tmp_path / "a.tar", members)])
    whole = consumed(index, ranks=1, micro=12, workers=0)
    assert consumed(index, ranks=3, micro=2, workers=2) == whole
    assert "face0005" not in {key for key, *_ in whole.values()}
    twice = consumed(index, ranks=1, micro=12, workers=0, repeats=2)
    assert consumed(index, ranks=3, micro=2, workers=2, repeats=2) == twice
    assert "face0005" not in {key for key, *_ in twice.values()}
    share = Slice(GLOBAL_BATCH, 12)
    batches = iter(loader(index, share))
    seen = [next(batches) for _ in range(2)]
    assert sum(batch.bad.get("not_an_image", 0) for batch in seen) >= 1
    assert "face0005" in [key for batch in seen for key in batch.bad_keys]


def test_a_workers_failure_arrives_as_our_error_with_the_shards_name(index: ShardIndex, shards: Path) -> None:
    batches = loader(index, Slice(GLOBAL_BATCH, 12), workers=1)
    for path in shards.glob("*.tar"):
        path.rename(path.with_suffix(".gone"))
    with pytest.raises(DataError, match=r"s-00\d.tar"):
        next(iter(batches))


def test_the_fixed_stream_gives_the_chosen_samples_once(index: ShardIndex) -> None:
    stream = fixed_stream(index, [5, 3, 60], CenterView(size=16), batch=2, noise_per_sample=4)
    batches = list(Loader(stream))
    assert [key for batch in batches for key in batch.keys] == ["face0005", "face0003", "face0060"]
    again = list(Loader(stream))
    assert all(torch.equal(a.noise_BN, b.noise_BN) for a, b in zip(batches, again, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_delivers_the_fixed_streams_batches(index: ShardIndex, workers: int) -> None:
    """The figures of evaluation, validation and validation loss are made of these batches, with ranks' filling too."""
    chosen = [*range(0, 64, 3), 0]
    stream = fixed_stream(index, chosen, CenterView(size=16), batch=5, noise_per_sample=4)
    alone, shared = list(Loader(stream)), list(Loader(stream, num_workers=workers))
    assert [batch.positions for batch in shared] == [batch.positions for batch in alone]
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.images_BCHW, theirs.images_BCHW)
        assert torch.equal(ours.noise_BN, theirs.noise_BN)


@given(num_samples=st.integers(0, 40), batch=st.integers(1, 9), workers=st.integers(1, 12), data=st.data())
def test_workers_divide_a_finite_stream_so_that_taking_from_them_in_turn_gives_it_once(
    num_samples: int, batch: int, workers: int, data: st.DataObject
) -> None:
    samples = data.draw(st.permutations(range(num_samples)))
    requests = ChosenRequests(samples, batch)
    parts = []
    for worker in range(workers):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "trainer.data.stream.get_worker_info", lambda w=worker: SimpleNamespace(id=w, num_workers=workers)
            )
            parts.append([request.position_B.tolist() for request in requests()])
    in_turn = [part for turn in itertools.zip_longest(*parts) for part in turn if part is not None]
    assert [sample for part in in_turn for sample in part] == samples
    assert in_turn == [part.tolist() for part in requests.expected_positions()]


@pytest.mark.parametrize("fault", ["twice", "missing", "short"])
def test_the_loader_notices_a_sample_that_comes_twice_or_not_at_all(
    index: ShardIndex, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = fixed_stream(index, list(range(9)), CenterView(size=16), batch=2, noise_per_sample=1)
    whole = list(Loader(stream))
    wrong = {"twice": [whole[0], *whole], "missing": [whole[0], *whole[2:]], "short": whole[:-1]}[fault]
    monkeypatch.setattr(type(stream), "__iter__", lambda self: iter(wrong))
    with pytest.raises(RuntimeError, match=r"the loader delivered .* had to come"):
        list(Loader(stream))


def test_the_loader_compares_an_endless_stream_too(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loader(index, Slice(GLOBAL_BATCH, 4), first_step=2)
    batches = list(itertools.islice(right, 6))
    monkeypatch.setattr(Stream, "__iter__", lambda self: iter(batches[:2] + batches[1:]))
    arrived = iter(loader(index, Slice(GLOBAL_BATCH, 4), first_step=2))
    assert [next(arrived).positions for _ in range(2)] == [batch.positions for batch in batches[:2]]
    with pytest.raises(RuntimeError, match="4 samples from position 28 where 4 samples from position 32 had to come"):
        next(arrived)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 24), (2, 4), (2, 12), (3, 8), (6, 4)])
def test_samples_that_are_mixed_meet_in_one_micro_batch_and_are_the_same_for_every_layout(
    ranks: int, micro: int
) -> None:
    def groups(ranks: int, micro: int) -> list[tuple[int, ...]]:
        shares = [Slice(24, micro, rank, ranks, group=4) for rank in range(ranks)]
        rows = [
            share.positions(number).reshape(-1, 4)
            for share in shares
            for number in range(2 * share.micro_batches_per_step)
        ]
        return sorted(map(tuple, np.concatenate(rows).tolist()))

    assert groups(ranks, micro) == groups(1, 24)
    assert groups(1, 24)[1] == (1, 7, 13, 19)
