from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.curation.words import WORD, ngram_hashes, normalized_words, word_hashes


def test_words_are_lower_case_and_without_punctuation() -> None:
    assert normalized_words("It's 3 o'clock, said_the “Fox”… ÜBER") == [
        word.encode() for word in ["it", "s", "3", "o", "clock", "said", "the", "fox", "über"]
    ]


def test_a_chinese_character_is_a_word() -> None:
    assert normalized_words("天地玄黄,abc宇") == [word.encode() for word in ["天", "地", "玄", "黄", "abc", "宇"]]


@given(st.text(st.characters(codec="ascii")))
def test_ascii_text_has_the_same_words_by_the_fast_way(text: str) -> None:
    assert normalized_words(text) == [word.encode() for word in WORD.findall(text.lower())]


@given(st.lists(st.sampled_from(["a", "b", "ß", "天"]), max_size=30), st.integers(1, 6))
def test_ngrams_are_equal_where_their_words_are(words: list[str], ngram: int) -> None:
    hashes = ngram_hashes(word_hashes(" ".join(words)), ngram).tolist()
    runs = [tuple(words[place : place + ngram]) for place in range(len(words) - ngram + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs)) == len(set(zip(hashes, runs, strict=True)))


def test_hashes_do_not_change_between_versions() -> None:
    """Sketches of an unfinished job and n-grams of evaluation sets are kept on disk."""
    words = word_hashes("one two three")
    assert words.tolist() == [10457265594366419360, 7783733899253356939, 13915543812687782789]
    assert ngram_hashes(words, 2).tolist() == [647400078779437381, 14813726720558700050]
