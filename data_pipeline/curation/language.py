"""Which language a text is written in, by py3langid: a naive Bayes model over byte n-grams (Lui and Baldwin 2012)."""

from functools import lru_cache
from typing import Any

from data_pipeline.curation.config import LanguageConfig

PIECE_CHARACTERS = 500
"""Of a long document, its beginning, middle and end are looked at, so much of each: the model reads 3 MB/s."""


class LanguageFilter:
    """Says whether a text is in one of the languages to keep.

    Raises:
        ValueError: py3langid is not installed, or does not know a language.
    """

    def __init__(self, rules: LanguageConfig) -> None:
        try:
            self._identifier = _identifier()
        except ImportError as error:
            raise ValueError("curation.language needs py3langid: pip install 'steppe[data]'") from error
        self._rules = rules
        known = sorted(self._identifier.labels)
        for language in rules.keep:
            if language not in known:
                raise ValueError(f"language.keep names {language!r}, but known are {', '.join(known)}: use one of them")

    def broken_rule(self, text: str) -> str | None:
        language, probability = self._identifier.classify(_sample(text))
        if language not in self._rules.keep:
            return "keep"
        if probability < self._rules.min_probability:
            return "min_probability"
        return None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """Loading the model takes a good part of a second, and it never changes."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _sample(text: str) -> str:
    if len(text) <= 3 * PIECE_CHARACTERS:
        return text
    middle = (len(text) - PIECE_CHARACTERS) // 2
    return " ".join((text[:PIECE_CHARACTERS], text[middle : middle + PIECE_CHARACTERS], text[-PIECE_CHARACTERS:]))
