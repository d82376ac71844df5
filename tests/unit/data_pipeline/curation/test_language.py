import sys

import pytest

from data_pipeline.curation.config import LanguageConfig
from data_pipeline.curation.language import PIECE_CHARACTERS, LanguageFilter, _identifier

ENGLISH = "The river was wide and slow, and nobody lived on the other bank of it any more."
GERMAN = "Der Fluss war breit und langsam, und am anderen Ufer wohnte schon lange niemand mehr."
CHINESE = "这条河又宽又慢，对岸早已没有人住了。我们昨天去看了看。"


def test_languages_to_keep_are_kept() -> None:
    rules = LanguageFilter(LanguageConfig(keep=("en", "zh"), min_probability=0))
    assert [rules.broken_rule(text) for text in (ENGLISH, GERMAN, CHINESE)] == [None, "keep", None]


def test_a_doubtful_text_is_removed() -> None:
    assert LanguageFilter(LanguageConfig(keep=("en",), min_probability=0.5)).broken_rule(ENGLISH) is None
    rules = LanguageFilter(LanguageConfig(keep=("en",), min_probability=0.999))
    assert rules.broken_rule("no text") in ("keep", "min_probability")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_long_document_is_judged_by_its_beginning_middle_and_end(place: int) -> None:
    rules = LanguageFilter(LanguageConfig(keep=("de",)))
    pieces = ["0 " * 2 * PIECE_CHARACTERS] * 3
    pieces[place] = GERMAN * 20
    assert rules.broken_rule("".join(pieces)) is None
    assert rules.broken_rule("".join(pieces).replace(GERMAN, ENGLISH)) == "keep"


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'english', but known are .*en"):
        LanguageFilter(LanguageConfig(keep=("english",)))


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    _identifier.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'steppe\[data\]'"):
        LanguageFilter(LanguageConfig(keep=("en",)))
