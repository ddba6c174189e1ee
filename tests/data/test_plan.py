import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order.plan import PLAN_VERSION, Plan, Repeated, positions_of

plans = st.builds(
    Plan,
    num_samples=st.integers(1, 2000),
    seed=st.integers(0, 2**63 - 1),
    num_lanes=st.integers(1, 24),
    block_samples=st.integers(1, 40),
    window_blocks=st.integers(1, 5),
)


@given(plans, st.integers(0, 1000))
@settings(max_examples=150)
def test_each_epoch_visits_every_sample_exactly_once(plan: Plan, epoch: int) -> None:
    positions = np.arange(plan.num_samples) + epoch * plan.num_samples
    assert np.array_equal(np.sort(plan.samples_at(positions)), np.arange(plan.num_samples))


@given(plans, st.integers(0, 1000))
@settings(max_examples=100)
def test_the_blocks_of_an_epoch_part_the_samples_among_them(plan: Plan, epoch: int) -> None:
    sample, first, last = plan.locate(np.arange(plan.num_samples) + epoch * plan.num_samples)
    assert ((first <= sample) & (sample <= last) & (last - first < plan.block_size)).all()
    blocks = np.unique(np.stack([first, last], axis=1), axis=0)
    assert blocks[0, 0] == 0
    assert blocks[-1, 1] == plan.num_samples - 1
    assert (blocks[1:, 0] == blocks[:-1, 1] + 1).all()


@given(plans, st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_a_position_names_the_same_sample_alone_and_among_others(plan: Plan, positions: list[int]) -> None:
    assert [plan.sample_at(p) for p in positions] == plan.samples_at(positions).tolist()


@given(st.integers(0, 10**9), st.integers(1, 16), st.integers(1, 8))
def test_the_global_batch_is_independent_of_the_world_size(step: int, num_ranks: int, share: int) -> None:
    global_batch = num_ranks * share
    parts = [positions_of(step, rank=r, num_ranks=num_ranks, global_batch=global_batch) for r in range(num_ranks)]
    assert sorted(np.concatenate(parts)) == list(range(step * global_batch, (step + 1) * global_batch))
    assert {len(part) for part in parts} == {share}


@given(plans, st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 500))
@settings(max_examples=100)
def test_a_repeated_order_is_the_order_with_each_sample_so_often_and_on_one_rank(
    plan: Plan, repeats: int, num_ranks: int, samples_of_a_rank: int, step: int
) -> None:
    batch = repeats * num_ranks * samples_of_a_rank
    once = plan.samples_at(np.arange(step * batch // repeats, (step + 1) * batch // repeats))
    order, found = Repeated(plan, repeats, batch), []
    for rank in range(num_ranks):
        positions = positions_of(step, rank=rank, num_ranks=num_ranks, global_batch=batch)
        views = order.locate(positions).sample_N.reshape(repeats, -1)
        assert (views == views[0]).all()
        found.append(views[0])
        for view, sample in zip(positions.reshape(repeats, -1), views, strict=True):
            assert (order.locate(view).sample_N == sample).all()
        first, again = positions.reshape(repeats, -1)[[0, -1], 0].tolist()
        assert order.substitutes(first, 5).tolist() == order.substitutes(again, 5).tolist()
    assert np.array_equal(np.stack(found, axis=1).ravel(), once)


def test_epochs_differ_in_order() -> None:
    plan = Plan(1000, seed=0)
    epochs = plan.samples_at(np.arange(3000)).reshape(3, 1000)
    assert (epochs[0] == epochs[1]).mean() < 0.02
    assert (epochs[1] == epochs[2]).mean() < 0.02


def test_a_rank_reads_few_and_long_ranges() -> None:
    plan = Plan(1_000_000, seed=0)
    positions = np.concatenate([positions_of(s, rank=3, num_ranks=8, global_batch=256) for s in range(768)])
    blocks = np.unique(plan.samples_at(positions) // plan.block_samples)
    assert len(positions) / len(blocks) > plan.block_samples / 3  # a random order would read about one sample a block


def test_this_version_of_the_plan_is_frozen() -> None:
    # If this fails, runs in flight would change their order: raise PLAN_VERSION and write down the new numbers.
    assert PLAN_VERSION == 2
    assert Plan(1000, seed=7).samples_at([0, 1, 2, 999, 1000, 123456]).tolist() == FROZEN


FROZEN = [799, 84, 526, 669, 241, 149]
