import pytest
from pydantic import ValidationError

from data_pipeline.curation.config import CurationConfig, GopherConfig


def test_everything_is_off_by_default() -> None:
    config = CurationConfig()
    assert set(config.model_dump().values()) == {None, False}
    assert not config.finds_duplicates


@pytest.mark.parametrize("rules", ["c4", "gopher", "near_duplicates"])
def test_true_asks_for_the_published_defaults_and_false_for_nothing(rules: str) -> None:
    assert getattr(CurationConfig.model_validate({rules: True}), rules) == getattr(
        CurationConfig.model_validate({rules: {}}), rules
    )
    assert CurationConfig.model_validate({rules: False}) == CurationConfig()


def test_gopher_has_the_thresholds_of_the_paper() -> None:
    """Rae et al. 2021, appendix A.1.1 and table A1."""
    rules = GopherConfig()
    assert (rules.min_words, rules.max_words) == (50, 100_000)
    assert (rules.min_mean_word_length, rules.max_mean_word_length) == (3, 10)
    assert (rules.max_hash_ratio, rules.max_ellipsis_ratio) == (0.1, 0.1)
    assert (rules.max_bullet_lines, rules.max_ellipsis_lines) == (0.9, 0.3)
    assert (rules.min_alphabetic_words, rules.min_stop_words) == (0.8, 2)
    assert (rules.max_duplicate_lines, rules.max_duplicate_paragraphs) == (0.3, 0.3)
    assert (rules.max_duplicate_line_characters, rules.max_duplicate_paragraph_characters) == (0.2, 0.2)
    assert [getattr(rules, f"max_top_{ngram}gram") for ngram in (2, 3, 4)] == [0.20, 0.18, 0.16]
    duplicates = [getattr(rules, f"max_duplicate_{ngram}grams") for ngram in range(5, 11)]
    assert duplicates == [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]


@pytest.mark.parametrize("rules", [{"exact_duplicates": True}, {"near_duplicates": True}])
def test_either_kind_of_duplicate_needs_sketches(rules: dict[str, bool]) -> None:
    assert CurationConfig.model_validate(rules).finds_duplicates


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"gofer": True}, "gofer"),
        ({"length": {"min_characters": 10, "max_characters": 9}}, "length.min_characters is 10"),
        ({"gopher": {"min_words": 10, "max_words": 9}}, "gopher.min_words is 10"),
        ({"gopher": {"min_mean_word_length": 11}}, "gopher.min_mean_word_length is 11"),
        ({"gopher": {"max_bullet_lines": 1.5}}, "max_bullet_lines"),
        ({"language": {"keep": []}}, "keep"),
        ({"decontaminate": {"against": []}}, "against"),
        ({"decontaminate": {"against": "exam.jsonl"}}, "against"),
        ({"near_duplicates": {"threshold": 0}}, "threshold"),
        ({"near_duplicates": {"permutations": 8}}, "permutations"),
    ],
)
def test_what_makes_no_sense_is_refused(rules: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CurationConfig.model_validate(rules)
