import pytest

from data_pipeline.curation.config import CurationConfig
from data_pipeline.curation.curator import Curator, Verdict
from data_pipeline.curation.decontamination import collect_ngrams
from tests.unit.data_pipeline.curation.test_gopher import PROSE
from tests.unit.data_pipeline.curation.test_language import GERMAN

QUESTION = "Which of the seven rivers that cross the great plain is the longest of them all?"


@pytest.fixture(scope="module")
def curator(tmp_path_factory: pytest.TempPathFactory) -> Curator:
    config = CurationConfig.model_validate(
        {
            "c4": {"require_terminal_punctuation": False},
            "length": {"min_characters": 100, "max_characters": 2000},
            "language": {"keep": ["en"]},
            "gopher": True,
            "decontaminate": {"against": ["rivers.jsonl"]},
        }
    )
    return Curator(config, collect_ngrams({"rivers.jsonl": [QUESTION]}, 13, tmp_path_factory.mktemp("ngrams")))


def test_without_rules_every_text_stays_as_it_is() -> None:
    for text in ("", PROSE, "{}"):
        assert Curator(CurationConfig()).judge(text) == Verdict(text, None)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE + "{", "c4.remove_curly_brackets"),
        ("One is here. Two is there. Three is nowhere.", "length.min_characters"),
        (PROSE * 4, "length.max_characters"),
        (f"{GERMAN} " * 3, "language.keep"),
        (" ".join(PROSE.split()[:30]) + " This is it. It was.", "gopher.min_words"),
        (PROSE + QUESTION, "decontaminate.rivers.jsonl"),
        (PROSE, None),
    ],
)
def test_the_first_rule_that_removes_a_document_is_named(curator: Curator, text: str, rule: str | None) -> None:
    assert curator.judge(text).rule == rule
    assert curator.judge(text) == curator.judge(text)


def test_lines_are_taken_out_before_the_document_is_judged(curator: Curator) -> None:
    verdict = curator.judge(PROSE + "Please enable JavaScript in your browser.\n" * 50)
    assert verdict == Verdict("\n".join(line for line in PROSE.splitlines() if line), None)
