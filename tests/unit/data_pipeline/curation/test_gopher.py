import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.curation.config import GopherConfig
from data_pipeline.curation.gopher import broken_rule

PROSE = """\
Once upon a time a miller lived beside the stream with three sons and one grey cat. When he died, the eldest got
the mill, the second took his donkey, and nothing but that cat was left for the youngest of them. "What shall I be good
for now?" he asked. "Have a pair of boots made for me," said the animal, "and you will see what comes of it."

So he spent his last coin on red leather. Early next morning it put them on, threw a sack across its shoulder, and
walked out into the forest, where partridges were plenty though no hunter had ever come near any.
"""
LAX = GopherConfig(
    min_words=0,
    min_mean_word_length=0,
    max_mean_word_length=1000,
    max_hash_ratio=1000,
    max_ellipsis_ratio=1000,
    max_bullet_lines=1,
    max_ellipsis_lines=1,
    min_alphabetic_words=0,
    min_stop_words=0,
    max_duplicate_lines=1,
    max_duplicate_paragraphs=1,
    max_duplicate_line_characters=1,
    max_duplicate_paragraph_characters=1,
    max_top_2gram=1000,
    max_top_3gram=1000,
    max_top_4gram=1000,
    **{f"max_duplicate_{ngram}grams": 1 for ngram in range(5, 11)},
)
"""Nothing breaks it."""


def test_prose_breaks_no_rule() -> None:
    assert broken_rule(PROSE, GopherConfig()) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "min_words"),
        ("the cat and the dog", "min_words"),
        (PROSE * 1200, "max_words"),
        (re.sub(r"\w+", "ab", PROSE), "min_mean_word_length"),
        (re.sub(r"\w+", lambda word: word[0] * 4, PROSE), "max_mean_word_length"),
        (re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "uvw", PROSE), "min_stop_words"),
        (PROSE + " #tag" * 20, "max_hash_ratio"),
        (PROSE.replace(" t", "... t"), "max_ellipsis_ratio"),
        (PROSE.replace(" t", "… t"), "max_ellipsis_ratio"),
        ("\n".join(f"• {line}" for line in PROSE.splitlines() if line), "max_bullet_lines"),
        ("\n".join(f"{line}…" for line in PROSE.splitlines()), "max_ellipsis_lines"),
        (PROSE + "".join(f" {number}" for number in range(1000, 1050)), "min_alphabetic_words"),
        (PROSE + "Read more\n" * 10, "max_duplicate_lines"),
        ("\n\n".join([PROSE.strip()] + ["Read\nmore"] * 3 + ["Share\nthis"] * 2), "max_duplicate_lines"),
        ("\n".join([PROSE, *PROSE.splitlines()[:2]]), "max_duplicate_line_characters"),
        (PROSE + " big red" * 40, "max_top_2gram"),
        (PROSE.replace("\n", " ") + PROSE.replace("\n", " "), "max_duplicate_5grams"),
    ],
)
def test_each_kind_of_bad_text_breaks_its_rule(text: str, rule: str) -> None:
    assert broken_rule(text, GopherConfig()) == rule
    assert rule in GopherConfig.model_fields


def test_repeated_paragraphs_are_found_though_their_lines_are_allowed() -> None:
    rules = LAX.model_copy(update={"max_duplicate_paragraphs": 0.3})
    assert broken_rule("one\ntwo\n \none\ntwo\n\n\n one\ntwo\n\nthree", rules) == "max_duplicate_paragraphs"


@pytest.mark.parametrize(("kind", "end"), [("line", "\n"), ("paragraph", "\n\n")])
def test_only_what_stood_before_is_repeated(kind: str, end: str) -> None:
    """Of 4 pieces with 7, 7, 7 and 15 characters, 2 with 14 of 36 are duplicates."""
    text = end.join(["one two", " one two", "x" * 15, "one two "])
    for rule, fraction in ((f"max_duplicate_{kind}s", 2 / 4), (f"max_duplicate_{kind}_characters", 14 / 36)):
        assert broken_rule(text, LAX.model_copy(update={rule: fraction + 1e-9})) is None
        assert broken_rule(text, LAX.model_copy(update={rule: fraction - 1e-9})) == rule


def test_text_without_spaces_is_judged_by_characters() -> None:
    poem = (
        "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰馀成岁律吕调阳"
        "云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光"
    )
    assert broken_rule(poem, GopherConfig()) == "min_words"
    assert broken_rule(poem, GopherConfig(words="characters")) is None
    assert broken_rule(poem + "天地" * 20, GopherConfig(words="characters")) == "max_top_2gram"


def top_fraction(words: list[str], ngram: int) -> float:
    counts = Counter(tuple(words[place : place + ngram]) for place in range(len(words) - ngram + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    longest = max(len("".join(run)) for run, count in counts.items() if count == most)
    return most * longest / len("".join(words))


def duplicate_fraction(words: list[str], ngram: int) -> float:
    seen = set()
    covered = set()
    for place in range(len(words) - ngram + 1):
        run = tuple(words[place : place + ngram])
        if run in seen:
            covered |= set(range(place, place + ngram))
        seen.add(run)
    return sum(len(words[place]) for place in covered) / len("".join(words))


@given(
    st.one_of(
        st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=60),
        st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), min_size=1, max_size=4).map(
            lambda pieces: [word for piece in pieces * 2 for word in piece]
        ),
    ),
    st.integers(2, 10),
)
def test_repetition_is_what_a_plain_count_finds(words: list[str], ngram: int) -> None:
    top = ngram <= 4
    name = f"max_top_{ngram}gram" if top else f"max_duplicate_{ngram}grams"
    fraction = (top_fraction if top else duplicate_fraction)(words, ngram)
    text = " ".join(words)
    assert broken_rule(text, LAX.model_copy(update={name: fraction + 1e-9})) is None
    if fraction:
        assert broken_rule(text, LAX.model_copy(update={name: fraction - 1e-9})) == name
