"""All randomness of a run: pure functions from (seed, purpose, position) to bits.

Nothing here has a state, so nothing has to be saved: any rank, worker or restarted process that asks for the same
position gets the same bits. The bits come from Philox4x32-10, written out on numpy arrays. ``numpy.random.Generator``
will not do: numpy may change its methods between versions (NEP 19), and an upgrade must not change a resumed run.

Shapes: N positions, W 32-bit words, R rounds.
Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox); Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains" (cycle walking).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

_U32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_FEISTEL_ROUNDS = 12
_NORMAL_QUANTILES = ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)


class Purpose(IntEnum):
    """What the bits are for. The numbers are part of the plan version: never renumber, only append."""

    BLOCK_ORDER = 1
    WINDOW_ORDER = 2
    EPOCH_ROTATION = 3
    SUBSTITUTE = 4
    AUGMENT = 5
    MASK = 6
    HELD_OUT_MASK = 7
    WEIGHTED_DRAW = 8
    WEIGHTED_ORDER = 9
    GROUP_SEED = 10
    DROPOUT = 11
    PRINT_GRAIN = 12
    BOOTSTRAP = 13


def philox4x32(counter_N4: NDArray[np.uint64], key_2: tuple[int, int]) -> NDArray[np.uint64]:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter_N4: four 32-bit words a row, held in uint64.
        key_2: two 32-bit words.

    Returns:
        random_N4: four 32-bit words a row, held in uint64.

    Example: counter 0 0 0 0 and key 0 0 give 6627e8d5 e169c58d bc57ac4c 9b00dbd8, as in the authors' test vectors.
    """
    c0, c1, c2, c3 = (counter_N4[:, i] for i in range(4))
    k0, k1 = (np.uint64(word) for word in key_2)
    for _ in range(_ROUNDS):
        # 32 x 32 bits fit in 64: the high half of one product is mixed into the other pair, the low half is kept.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT32) ^ c1 ^ k0,
            product1 & _U32,
            (product0 >> _SHIFT32) ^ c3 ^ k1,
            product0 & _U32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _U32, (k1 + _WEYL[1]) & _U32
    return np.stack([c0, c1, c2, c3], axis=1)


def random_words(seed: int, purpose: Purpose, position_N: ArrayLike, num_words: int) -> NDArray[np.uint32]:
    """Draw ``num_words`` independent 32-bit words for each position.

    Args:
        seed: 0 <= seed < 2**64.
        purpose: separates streams that share positions.
        position_N: integers, 0 <= position < 2**64.
        num_words: W, words for each position.

    Returns:
        words_NW: uint32.
    """
    positions = np.atleast_1d(np.asarray(position_N, dtype=np.uint64))
    # One call gives four words, so 10 words take 3 calls. The counter of call i at position p is
    # (p mod 2**32, p >> 32, i, purpose): no two draws of one seed share a counter.
    num_calls = -(-num_words // 4)
    counter = np.empty((len(positions), num_calls, 4), dtype=np.uint64)
    counter[..., 0] = (positions & _U32)[:, None]
    counter[..., 1] = (positions >> _SHIFT32)[:, None]
    counter[..., 2] = np.arange(num_calls, dtype=np.uint64)
    counter[..., 3] = np.uint64(purpose)
    words = philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, seed >> 32))
    return words.astype(np.uint32).reshape(len(positions), -1)[:, :num_words]


def uniforms(seed: int, purpose: Purpose, position_N: ArrayLike, num_draws: int) -> NDArray[np.float32]:
    """Draw uniform numbers in [0, 1) with 24 random bits each, exact in float32; shape (N, num_draws)."""
    words = random_words(seed, purpose, position_N, num_draws)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def uniform_integers(seed: int, purpose: Purpose, position: int, count: int, bound: int) -> NDArray[np.int64]:
    """Draw ``count`` integers in [0, bound) for one position. The bias of the modulus is below bound / 2**62.

    Two words make one number of 62 bits, so that the modulus has far more values than any data set has samples.
    """
    words = random_words(seed, purpose, position, 2 * count)[0].astype(np.uint64)
    drawn: NDArray[np.uint64] = ((words[::2] << np.uint64(30)) ^ words[1::2]) % np.uint64(bound)
    return drawn.astype(np.int64)


def uniform_doubles(seed: int, purpose: Purpose, position_N: ArrayLike) -> NDArray[np.float64]:
    """Draw one uniform number in [0, 1) with 53 random bits for each position, exact in float64; shape (N,)."""
    words = random_words(seed, purpose, position_N, 2).astype(np.uint64)
    return ((words[:, 0] << np.uint64(21)) | (words[:, 1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def normals(seed: int, purpose: Purpose, count: int) -> NDArray[np.float32]:
    """Draw ``count`` standard normal numbers for position 0: 16 random bits pick one of 65536 values up to +-4.2."""
    halves = random_words(seed, purpose, 0, -(-count // 2))[0].astype("<u4").view("<u2")[:count]
    drawn: NDArray[np.float32] = _NORMAL_QUANTILES[halves]
    return drawn


def counts_of_draws(seed: int, purpose: Purpose, num_replicates: int, num_things: int) -> NDArray[np.int64]:
    """Draw ``num_things`` of ``num_things`` things with replacement; return how often each came, (replicates, things).

    The bias is below num_things / 2**32.
    """
    # (word * n) >> 32 maps a 32-bit word to 0..n-1 without a division. Adding n * replicate gives each replicate
    # its own n bins, so that one bincount serves all of them.
    words_RI = random_words(seed, purpose, np.arange(num_replicates), num_things).astype(np.uint64)
    drawn_RI = ((words_RI * np.uint64(num_things)) >> _SHIFT32).astype(np.int64)
    drawn_RI += num_things * np.arange(num_replicates)[:, None]
    counts: NDArray[np.int64] = np.bincount(drawn_RI.ravel(), minlength=num_replicates * num_things)
    return counts.reshape(num_replicates, num_things)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generators for one optimizer step of one rank, below 2**62.

    The trainer itself does not draw from them (`trainer.models.dropout` is keyed by position). A library may; its draws
    are then the same after a restart.
    """
    high, low = (int(word) for word in random_words(seed, Purpose.DROPOUT, (step << 20) | rank, 2)[0])
    return ((high << 32) | low) >> 2


def shuffled(index: ArrayLike, size: ArrayLike, *, seed: int, purpose: Purpose, which: ArrayLike) -> NDArray[np.int64]:
    """Map each index to its place under a random permutation of ``range(size)``, without storing it.

    A balanced Feistel network permutes the numbers of the next even bit length. A result outside the range goes through
    the network again until it lands inside (cycle walking), which keeps the map a permutation. It takes O(1) memory and
    random access whatever the size, so an epoch of a billion samples needs no table.

    Example: size 10. 9 has 4 bits, so each half has 2 bits and the network permutes 0..15. With seed 0, BLOCK_ORDER and
    which 0, indices 0..9 get places 3 2 6 9 5 1 0 4 7 8.

    Args:
        index: integers, 0 <= index < size, of shape (N,).
        size: number of things permuted, > 0; one for all or one for each index.
        seed: run seed.
        purpose: separates permutations that share numbers.
        which: number of the permutation, such as the epoch; one for all or one for each index.

    Returns:
        place_N: int64; indices of the same permutation get distinct places.
    """
    index_N, size_N, which_N = np.broadcast_arrays(*(np.asarray(a, dtype=np.uint64) for a in (index, size, which)))
    # Half of the bits of size - 1, rounded up: size 10 -> 4 bits -> halves of 2; size 100 -> 7 bits -> halves of 4.
    half_bits_N = np.maximum(1, (_bit_length(size_N - np.uint64(1)) + np.uint64(1)) // np.uint64(2))
    permutations, inverse = np.unique(which_N, return_inverse=True)
    words = random_words(seed, purpose, permutations, 2 * _FEISTEL_ROUNDS).astype(np.uint64)
    keys_RN = ((words[:, ::2] << _SHIFT32) | words[:, 1::2]).T[:, inverse]
    place_N = _feistel(index_N, half_bits_N, keys_RN)
    outside = np.flatnonzero(place_N >= size_N)
    while len(outside):  # the network's domain is at most four times the range, so a few passes are enough
        place_N[outside] = _feistel(place_N[outside], half_bits_N[outside], keys_RN[:, outside])
        outside = outside[place_N[outside] >= size_N[outside]]
    return place_N.astype(np.int64)


def _feistel(
    value_N: NDArray[np.uint64], half_bits_N: NDArray[np.uint64], keys_RN: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Permute numbers of 2 * half_bits bits. Each round is invertible whatever `_mix` does: it only XORs one half."""
    mask_N = (np.uint64(1) << half_bits_N) - np.uint64(1)
    left_N, right_N = value_N >> half_bits_N, value_N & mask_N
    for key_N in keys_RN:
        left_N, right_N = right_N, left_N ^ (_mix(right_N ^ key_N) & mask_N)
    return (left_N << half_bits_N) | right_N


def _mix(value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits: the finaliser of SplitMix64 (Steele et al. 2014). Products of uint64 wrap around by design."""
    mixed = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _bit_length(value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the bit length of each number, as int.bit_length: 9 -> 4, 99 -> 7. Exact below 2**53."""
    return np.frexp(value_N.astype(np.float64))[1].astype(np.uint64)
