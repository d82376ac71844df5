"""The lines of a page that are prose, and whether they are enough: the rules of C4.

Source: Raffel et al. 2020 ("Exploring the limits of transfer learning with a unified text-to-text transformer", JMLR
21, section 2.2). The published program adds the two rules on overlong words and on lines that end in an ellipsis; it
counts sentences by a trained model, while here a sentence is what ends in a terminal punctuation mark before white
space. Marks of full width count, too.
"""

import re
from functools import lru_cache

from data_pipeline.curation.config import C4Config

END_MARKS = (".", "!", "?", '"', "”", "。", "！", "？", "」")
ELLIPSES = ("...", "…")
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SENTENCE_END = re.compile(r"""(?<![.!?])[.!?]++["'”’)\]]*+(?!\S)|[。！？]+""")
"""Tried at the first of several marks only and never in part, so that a megabyte of dots takes linear time."""


def cleaned(text: str, rules: C4Config) -> tuple[str, str | None]:
    """The lines of a text that are kept, and the name of the rule that removes it all, as in C4Config, or None.

    A text without a line to keep breaks `min_sentences`, whatever that is.
    """
    broken = _broken_page(text, rules)
    if broken is not None:
        return text, broken
    lines = []
    sentences = 0
    for raw in text.splitlines():
        line = raw.strip()
        if rules.drop_citation_marks and "[" in line:
            line = CITATION.sub("", line).rstrip()
        if line and _is_kept(line, rules):
            lines.append(line)
            sentences += len(SENTENCE_END.findall(line))
    if not lines or sentences < rules.min_sentences:
        return text, "min_sentences"
    return "\n".join(lines), None


def _broken_page(text: str, rules: C4Config) -> str | None:
    if rules.remove_curly_brackets and "{" in text:
        return "remove_curly_brackets"
    if rules.remove_lorem_ipsum and "lorem ipsum" in text.lower():
        return "remove_lorem_ipsum"
    if rules.blocked_words and _any_of(rules.blocked_words).search(text):
        return "blocked_words"
    return None


def _is_kept(line: str, rules: C4Config) -> bool:
    if rules.require_terminal_punctuation and (not line.endswith(END_MARKS) or line.endswith(ELLIPSES)):
        return False
    words = line.split()
    if len(words) < rules.min_words_per_line or max(map(len, words)) > rules.max_word_length:
        return False
    lowered = line.lower()
    if rules.drop_javascript_lines and "javascript" in lowered:
        return False
    return not (rules.drop_policy_lines and any(phrase in lowered for phrase in POLICY))


@lru_cache(maxsize=4)
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
