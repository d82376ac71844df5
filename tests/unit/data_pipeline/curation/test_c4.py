import pytest

from data_pipeline.curation.c4 import cleaned
from data_pipeline.curation.config import C4Config

PROSE = "The river was wide and slow.\nNobody lived on the other bank!\nWho would have wanted to?"


def test_prose_stays_as_it_is() -> None:
    assert cleaned(PROSE, C4Config()) == (PROSE, None)


@pytest.mark.parametrize(
    "line",
    [
        "Home | About | Contact | Imprint | Help",
        "Too short a line.",
        "This sentence goes on and on and...",
        "This sentence goes on and on and…",
        "Please enable JavaScript to see this page.",
        "By going on you accept our Privacy Policy.",
        "This site uses cookies to serve you better.",
        "A word of one thousand letters is " + "a" * 1001 + ".",
        "",
    ],
)
def test_lines_that_are_no_prose_are_taken_out(line: str) -> None:
    head, tail = PROSE.split("\n", 1)
    assert cleaned(f"{head}\n  {line}\n{tail}", C4Config()) == (PROSE, None)


@pytest.mark.parametrize("mark", ["[1]", "[]", "[edit]", "[citation needed]"])
def test_citation_marks_are_cut_out_of_lines(mark: str) -> None:
    marked = PROSE.replace("slow.", f"slow.{mark}").replace("Nobody", f"{mark}Nobody")
    assert cleaned(marked, C4Config()) == (PROSE, None)
    assert cleaned(marked, C4Config(drop_citation_marks=False, min_sentences=1))[0] != PROSE


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE + "\nif (x) { return; }", "remove_curly_brackets"),
        (PROSE + "\nLorem Ipsum dolor sit amet.", "remove_lorem_ipsum"),
        (PROSE + "\nIt was a BLASTED heath.", "blocked_words"),
        (PROSE.rsplit("\n", 1)[0], "min_sentences"),
        ("", "min_sentences"),
    ],
)
def test_pages_are_removed_by_the_rule_they_break(text: str, rule: str) -> None:
    assert cleaned(text, C4Config(blocked_words=("blasted",))) == (text, rule)
    assert rule in C4Config.model_fields


def test_a_blocked_word_is_a_whole_word() -> None:
    assert cleaned(PROSE, C4Config(blocked_words=("wan", "(river"))) == (PROSE, None)


def test_nothing_left_is_no_document_even_if_no_sentence_is_asked_for() -> None:
    assert cleaned("no prose", C4Config(min_sentences=0)) == ("no prose", "min_sentences")


def test_sentences_are_counted_at_their_marks() -> None:
    three = 'He said "no!" and left. It was 3.14 miles. Was it?'
    assert cleaned(three, C4Config(min_sentences=4)) == (three, None)
    assert cleaned(three, C4Config(min_sentences=5))[1] == "min_sentences"
    chinese = "天地玄黄。宇宙洪荒！日月盈昃？"
    assert cleaned(chinese, C4Config(min_words_per_line=0)) == (chinese, None)


@pytest.mark.timeout(20)
def test_a_line_of_dots_takes_linear_time() -> None:
    dots = "." * 500_000 + "x and four more words."
    rules = C4Config(max_word_length=1_000_000, min_sentences=2)
    assert cleaned(dots, rules) == (dots, "min_sentences")
