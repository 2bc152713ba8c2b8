"""Stateless seeded random numbers and permutations: each is a function of (seed, position).

Letters: N positions.
"""

import numpy as np


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): a hash of uint64 to uint64, of any shape."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(seed: int, stream: int, positions: np.ndarray) -> np.ndarray:
    """N uint64: one random number for each of N positions, a function of (seed, stream, position)."""
    key = _mix(_mix(np.asarray([seed % 2**64], np.uint64)) + np.uint64(stream))
    return _mix(key + np.asarray(positions).astype(np.uint64))


def order(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """N sample numbers -> N indices below `length`, a new permutation of all indices in each epoch.

    A Feistel network over the fewest bits that can hold an index, with cycle walking until the result is below `length`
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It stores nothing, so epochs may have any length.
    """
    epoch, index = np.divmod(np.asarray(positions, np.int64), length)
    bits = max(1, (length - 1).bit_length())
    low = (bits + 1) // 2  # width of the lower half
    low_mask, high_mask, low = np.uint64(2**low - 1), np.uint64(2 ** (bits - low) - 1), np.uint64(low)
    keys = [draw(seed, stream, epoch) for stream in range(2, 10)]  # 8 rounds of N uint64
    out, walk = index.astype(np.uint64), np.arange(index.size)
    while walk.size:
        high, rest = out[walk] >> low, out[walk] & low_mask
        for i, key in enumerate(keys):
            if i % 2:
                rest = rest ^ (_mix(high + key[walk]) & low_mask)
            else:
                high = high ^ (_mix(rest + key[walk]) & high_mask)
        out[walk] = high << low | rest
        walk = walk[out[walk] >= length]
    return out.astype(np.int64)
