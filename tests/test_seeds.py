import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from trainer.seeds import Purpose, counts_of_draws, normals, philox4x32, random_words, shuffled, uniforms

# Known answers of Random123 (kat_vectors, philox4x32-10): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, result: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, result)]
    found = philox4x32(np.array([words[0]], dtype=np.uint64), (words[1][0], words[1][1]))
    assert found[0].tolist() == words[2]


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_shuffled_is_a_permutation(size: int, seed: int, which: int) -> None:
    places = shuffled(np.arange(size), size, seed=seed, purpose=Purpose.BLOCK_ORDER, which=which)
    assert sorted(places.tolist()) == list(range(size))


def test_every_permutation_of_four_is_about_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for which in range(4800):
        places = shuffled(np.arange(4), 4, seed=1, purpose=Purpose.BLOCK_ORDER, which=which)
        counts[tuple(places.tolist())] = counts.get(tuple(places.tolist()), 0) + 1
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values()) + 200 * (24 - len(counts))
    assert chi_square < 49.7  # 23 degrees of freedom, 0.1 %


def test_purposes_seeds_and_positions_give_different_words() -> None:
    draws = [
        tuple(random_words(seed, purpose, position, 4)[0].tolist())
        for seed in (0, 1)
        for purpose in (Purpose.AUGMENT, Purpose.MASK)
        for position in (0, 1, 2**40)
    ]
    assert len(set(draws)) == len(draws)


def test_uniforms_lie_in_the_unit_interval_and_fill_it() -> None:
    draws = uniforms(3, Purpose.MASK, range(200), 100)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01


def test_normals_are_normal_and_reproducible_whatever_their_count() -> None:
    drawn = normals(7, Purpose.PRINT_GRAIN, 100_001)
    assert kstest(drawn, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
    assert (normals(7, Purpose.PRINT_GRAIN, 11) == drawn[:11]).all()


def test_draws_with_replacement_are_multinomial() -> None:
    counts = counts_of_draws(3, Purpose.BOOTSTRAP, 4000, 7)
    assert counts.shape == (4000, 7)
    assert (counts.sum(axis=1) == 7).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 * np.sqrt(6 / 7 / 4000))
    np.testing.assert_allclose(np.cov(counts.T), np.eye(7) - 1 / 7, atol=0.12)
