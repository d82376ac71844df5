"""Is it prose, and does it repeat itself: the document rules of Gopher.

Source: Rae et al. 2021 ("Scaling language models: methods, analysis and insights from training Gopher", arXiv
2112.11446), appendix A.1.1: quality filtering, and table A1 for repetition. Where the paper leaves a choice:

- A word is what stands between white space, with its punctuation. Lines and paragraphs are compared without the white
  space around them; empty ones do not count.
- What occurs k times has k - 1 duplicates.
- Shares of n-grams are of the characters of all words, white space left out. An n-gram that occurs once is no
  repetition, so that a short document is not removed for its only sentence.
"""

import re
from collections import Counter

import numpy as np

from data_pipeline.curation.config import GopherConfig

BULLETS = ("•", "‣", "◦", "▪", "- ", "* ")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")
STOP_WORD = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
PARAGRAPH_END = re.compile(r"\n\s*\n")
TOP_NGRAMS = (2, 3, 4)
LONGEST_NGRAM = 10
RUN_MULTIPLIER = 0x5851F42D4C957F2D
"""That of Knuth's MMIX generator: any odd number without structure does."""


def broken_rule(text: str, rules: GopherConfig) -> str | None:
    """The name of the first rule that the text breaks, as it is called in GopherConfig; None if it breaks none."""
    has_spaces = rules.words == "spaces"
    words = text.split() if has_spaces else list("".join(text.split()))
    if len(words) < rules.min_words:
        return "min_words"
    if len(words) > rules.max_words:
        return "max_words"
    if not words:
        return None
    lines = _stripped(text.splitlines())
    return (
        (_broken_words(text, words, rules) if has_spaces else None)
        or _broken_signs(text, words, lines, rules)
        or _broken_pieces("line", lines, rules)
        or _broken_pieces("paragraph", _stripped(PARAGRAPH_END.split(text)), rules)
        or _broken_ngrams(words, rules)
    )


def _stripped(pieces: list[str]) -> list[str]:
    return [stripped for piece in pieces if (stripped := piece.strip())]


def _broken_words(text: str, words: list[str], rules: GopherConfig) -> str | None:
    mean_length = sum(map(len, words)) / len(words)
    if mean_length < rules.min_mean_word_length:
        return "min_mean_word_length"
    if mean_length > rules.max_mean_word_length:
        return "max_mean_word_length"
    stop_words: set[str] = set()
    for match in STOP_WORD.finditer(text):
        if len(stop_words) >= rules.min_stop_words:
            break
        stop_words.add(match[0].lower())
    return "min_stop_words" if len(stop_words) < rules.min_stop_words else None


def _broken_signs(text: str, words: list[str], lines: list[str], rules: GopherConfig) -> str | None:
    if text.count("#") > rules.max_hash_ratio * len(words):
        return "max_hash_ratio"
    if sum(map(text.count, ELLIPSES)) > rules.max_ellipsis_ratio * len(words):
        return "max_ellipsis_ratio"
    if sum(line.startswith(BULLETS) for line in lines) > rules.max_bullet_lines * len(lines):
        return "max_bullet_lines"
    if sum(line.endswith(ELLIPSES) for line in lines) > rules.max_ellipsis_lines * len(lines):
        return "max_ellipsis_lines"
    least = rules.min_alphabetic_words * len(words)
    # Nearly always there are enough words of letters alone, which are counted faster.
    if sum(map(str.isalpha, words)) < least and sum(LETTER.search(word) is not None for word in words) < least:
        return "min_alphabetic_words"
    return None


def _broken_pieces(kind: str, pieces: list[str], rules: GopherConfig) -> str | None:
    """Repeated lines or paragraphs."""
    counts = Counter(pieces)
    if len(counts) == len(pieces):
        return None
    if len(pieces) - len(counts) > getattr(rules, f"max_duplicate_{kind}s") * len(pieces):
        return f"max_duplicate_{kind}s"
    repeated = sum(len(piece) * (count - 1) for piece, count in counts.items())
    if repeated > getattr(rules, f"max_duplicate_{kind}_characters") * sum(map(len, pieces)):
        return f"max_duplicate_{kind}_characters"
    return None


def _broken_ngrams(words: list[str], rules: GopherConfig) -> str | None:
    """Repeated runs of words. A run can only recur where the run one word shorter does, so few places are left soon."""
    # Python's own hashes differ from process to process, but only their equality counts, and 64 bits of them do not
    # collide within a document.
    hashes = np.fromiter(map(hash, words), np.int64, len(words))
    ends = np.zeros(len(words) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=ends[1:])
    places = np.arange(len(words))
    runs = hashes
    for ngram in range(2, LONGEST_NGRAM + 1):
        fits = np.searchsorted(places, len(words) - ngram, side="right")
        places = places[:fits]
        runs = runs[:fits] * RUN_MULTIPLIER + hashes[places + ngram - 1]
        order = np.argsort(runs, kind="stable")
        is_first = np.ones(len(runs), bool)
        is_first[1:] = np.diff(runs[order]) != 0
        if is_first.all():
            return None
        if ngram in TOP_NGRAMS:
            name = f"max_top_{ngram}gram"
            characters = _top_characters(places[order], is_first, ngram, ends)
        else:
            name = f"max_duplicate_{ngram}grams"
            characters = _covered_characters(np.sort(places[order[~is_first]]), ngram, ends)
        if characters > getattr(rules, name) * ends[-1]:
            return name
        recurs = ~is_first
        recurs[:-1] |= recurs[1:]
        again = np.sort(order[recurs])
        places, runs = places[again], runs[again]
    return None


def _top_characters(places: np.ndarray, is_first: np.ndarray, ngram: int, ends: np.ndarray) -> int:
    """Characters of the most frequent n-gram times its number; of several, of the longest.

    `places` are in the order of the n-grams there, of each of which one `is_first`; `ends` counts the characters
    before each word.
    """
    firsts = np.flatnonzero(is_first)
    counts = np.diff(firsts, append=len(places))
    top = places[firsts[counts == counts.max()]]
    return int(counts.max() * (ends[top + ngram] - ends[top]).max())


def _covered_characters(places: np.ndarray, ngram: int, ends: np.ndarray) -> int:
    """Characters of the words in the n-grams at these places, which rise; each word counted once."""
    begins = places.copy()
    begins[1:] = np.maximum(places[1:], places[:-1] + ngram)
    return int((ends[places + ngram] - ends[begins]).sum())
