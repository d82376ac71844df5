"""Words as documents are compared by: lower-case, without punctuation, each as a 64-bit hash; and hashes of n-grams."""

import re

import numpy as np
from xxhash import xxh3_64_intdigest

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Chinese characters: each is a word, since nothing separates them."""
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
ASCII_WORDS = bytes(ord(chr(i).lower()) if chr(i).isalnum() else ord(" ") for i in range(128)) + bytes(range(128, 256))
"""The same for ASCII text as a translation of bytes, five times as fast."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, without structure: the golden ratio of 2^64 (Knuth, The Art of Computer Programming 3, section 6.4)."""


def normalized_words(text: str) -> list[bytes]:
    """The runs of letters and digits of a text in lower case, UTF-8; each kana or Chinese character by itself."""
    if text.isascii():
        return text.encode().translate(ASCII_WORDS).split()
    return " ".join(WORD.findall(text.lower())).encode().split()


def word_hashes(text: str) -> np.ndarray:
    """xxh3-64 of each normalized word, (words,) uint64."""
    words = normalized_words(text)
    return np.fromiter(map(xxh3_64_intdigest, words), np.uint64, len(words))


def ngram_hashes(words: np.ndarray, ngram: int) -> np.ndarray:
    """Hashes of all runs of `ngram` words, (max(0, words - ngram + 1),) uint64; equal runs have equal hashes."""
    count = max(0, len(words) - ngram + 1)
    hashes = words[:count].copy()
    for place in range(1, ngram):
        hashes *= MULTIPLIER
        hashes += words[place : place + count]
    return mixed(hashes)


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Spread every bit of uint64 numbers over all others, one to one; the numbers given are overwritten.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
    section 3.1, variant 13 of Stafford).
    """
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes
