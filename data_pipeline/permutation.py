"""Keyed permutations of [0, n) with random access: no table, no state.

A Feistel network over just enough bits (Luby and Rackoff 1988, "How to construct pseudorandom permutations") is a
permutation of the next power of two; walking its cycle until it lands below n makes it one of [0, n) (Black and Rogaway
2002, "Ciphers with arbitrary finite domains", section 3). np.random.permutation needs 8 bytes an element instead.
"""

import numpy as np
import xxhash

ROUNDS = 6
_ROUND_STEP = np.uint64(0xA24BAED4963EE407)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from what it is for, such as ("blocks", seed, name, epoch)."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 in place: the finaliser of splitmix64 (Steele, Lea and Flood 2014, figure 19)."""
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Where each index of [0, size) goes under its key: int64 `(n,)`. `size` and `key` may differ by element."""
    return _walk(index, size, key, range(ROUNDS))


def unpermute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(index, size, key, range(ROUNDS)[::-1])


def _walk(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int, rounds: range) -> np.ndarray:
    value = np.array(index, dtype=np.uint64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), value.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), value.shape)
    # Bits of the domain: frexp's exponent is the bit length, exact for every size below 2^53.
    bits = np.maximum(np.frexp((sizes - np.uint64(1)).astype(np.float64))[1], 2).astype(np.uint64)
    low_bits = bits >> np.uint64(1)
    high_bits = bits - low_bits
    todo = np.arange(len(value))
    while len(todo):
        value[todo] = _feistel(value[todo], high_bits[todo], low_bits[todo], keys[todo], rounds)
        todo = todo[value[todo] >= sizes[todo]]
    return value.astype(np.int64)


def _feistel(x: np.ndarray, high_bits: np.ndarray, low_bits: np.ndarray, key: np.ndarray, rounds: range) -> np.ndarray:
    """Even rounds change the high half by the low one, odd rounds the low half by the high one; each undoes itself."""
    one = np.uint64(1)
    high_mask, low_mask = (one << high_bits) - one, (one << low_bits) - one
    high, low = x >> low_bits, x & low_mask
    with np.errstate(over="ignore"):
        for number in rounds:
            round_key = key + np.uint64(number) * _ROUND_STEP
            if number % 2 == 0:
                high ^= mix(low + round_key) & high_mask
            else:
                low ^= mix(high + round_key) & low_mask
    return (high << low_bits) | low
