from pathlib import Path

import pytest

from data_pipeline.curation.decontamination import EvaluationNgrams, SetCounts, collect_ngrams

QUESTION = "Which of the seven rivers that cross the great plain is the longest of them all?"
OTHER = "A farmer has twelve cows and sells five of them on the market day in spring."
COMMON = "Answer each of the following questions with one word and explain in a sentence why."


@pytest.fixture(scope="module")
def ngrams(tmp_path_factory: pytest.TempPathFactory) -> EvaluationNgrams:
    sets = {"rivers": [QUESTION, COMMON, "too short"], "cows": [OTHER, COMMON]}
    return collect_ngrams(sets, 13, tmp_path_factory.mktemp("ngrams"))


def test_a_document_with_a_passage_is_found_whatever_its_layout(ngrams: EvaluationNgrams) -> None:
    assert ngrams.find(f"Before. {QUESTION} After.") == "rivers"
    assert ngrams.find("so: " + OTHER.upper().replace(" ", " -\n")) == "cows"


def test_thirteen_words_are_found_and_twelve_are_not(ngrams: EvaluationNgrams) -> None:
    words = QUESTION.split()
    assert ngrams.find(" ".join(["x", *words[2:15], "x"])) == "rivers"
    assert ngrams.find(" ".join(["x", *words[2:14], "x"])) is None
    assert ngrams.find(" ".join([*words[:8], "x", *words[8:]])) is None


@pytest.mark.parametrize(
    "text", ["", "too short", "Nothing of this sort has ever been asked in any set of questions " * 9]
)
def test_other_documents_are_not_found(ngrams: EvaluationNgrams, text: str) -> None:
    assert ngrams.find(text) is None


def test_the_first_of_several_sets_is_named(ngrams: EvaluationNgrams) -> None:
    assert ngrams.find(COMMON) == "rivers"
    assert ngrams.find(f"{OTHER} {QUESTION}") == "rivers"


def test_they_are_kept_on_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EvaluationNgrams(tmp_path / "new")
    collect_ngrams({"rivers": [QUESTION, "too short"]}, 5, tmp_path / "new")
    ngrams = EvaluationNgrams(tmp_path / "new")
    assert ngrams.counts == {"rivers": SetCounts(texts=2, too_short=1)}
    assert ngrams.find("of the seven rivers that") == "rivers"


@pytest.mark.parametrize("texts", [[], ["four words of text"]])
def test_a_set_that_can_find_nothing_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"evaluation set cows has no text of 13 words .* lower decontaminate.ngram"):
        collect_ngrams({"rivers": [QUESTION], "cows": texts}, 13, tmp_path)
    assert list(tmp_path.iterdir()) == []
