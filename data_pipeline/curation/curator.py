"""One document at a time: what is left of it, and the rule that removes it if one does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from data_pipeline.curation import c4, gopher
from data_pipeline.curation.config import CurationConfig, LengthConfig
from data_pipeline.curation.decontamination import EvaluationNgrams
from data_pipeline.curation.language import LanguageFilter

Rule = Callable[[str], str | None]
"""Of a text, the name of what it breaks, within a rule set."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a document."""

    text: str
    """What is left of it: the line rules of C4 take text out of documents they keep."""
    rule: str | None
    """The first rule that removes it, named as its setting is (`gopher.min_words`; `decontaminate.SET` for an
    evaluation set); None: it stays."""


class Curator:
    """Judges documents by all rules of a configuration that see one document only; the same text has the same verdict.

    Raises:
        ValueError: a language is not known to the identifier, or its library is missing.
    """

    def __init__(self, config: CurationConfig, ngrams: EvaluationNgrams | None = None) -> None:
        """`ngrams` are those of `config.decontaminate`, if it is given."""
        assert (ngrams is None) == (config.decontaminate is None)
        self._c4 = config.c4
        self._rules: list[tuple[str, Rule]] = []
        if config.length is not None:
            self._rules.append(("length", partial(_broken_length, rules=config.length)))
        if config.language is not None:
            self._rules.append(("language", LanguageFilter(config.language).broken_rule))
        if config.gopher is not None:
            self._rules.append(("gopher", partial(gopher.broken_rule, rules=config.gopher)))
        if ngrams is not None:
            self._rules.append(("decontaminate", ngrams.find))

    def judge(self, text: str) -> Verdict:
        if self._c4 is not None:
            text, broken = c4.cleaned(text, self._c4)
            if broken is not None:
                return Verdict(text, f"c4.{broken}")
        for name, rule in self._rules:
            broken = rule(text)
            if broken is not None:
                return Verdict(text, f"{name}.{broken}")
        return Verdict(text, None)


def _broken_length(text: str, rules: LengthConfig) -> str | None:
    if len(text) < rules.min_characters:
        return "min_characters"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return "max_characters"
    return None
