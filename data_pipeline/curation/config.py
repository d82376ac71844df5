"""Which documents of a corpus are kept, in words. Everything is off unless asked for; numbers are those published."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from data_pipeline.corpus.input_config import InputConfig, with_names

Fraction = Annotated[float, Field(ge=0, le=1)]


def _switch(value: Any) -> Any:
    """`true` in a YAML asks for a rule set with its defaults, `false` for none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class _Rules(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LengthConfig(_Rules):
    """How long a document may be, in characters (Unicode code points)."""

    min_characters: int = Field(default=0, ge=0)
    max_characters: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        _require_order("length", "characters", self.min_characters, self.max_characters)
        return self


class LanguageConfig(_Rules):
    """Keep documents that are identified as one of some languages (py3langid's model, which travels with it)."""

    keep: tuple[str, ...] = Field(min_length=1)
    """ISO 639-1 codes: en, de, zh, ..."""
    min_probability: Fraction = 0.5
    """Of the language that was found."""


class GopherConfig(_Rules):
    """The quality and repetition rules of Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1, with their thresholds.

    They were made for English prose and call a word what stands between white space.
    """

    words: Literal["spaces", "characters"] = "spaces"
    """`characters`: every character but white space is a word, for languages written without spaces (Chinese,
    Japanese, Thai); the rules on the length of words and on stop words then do not apply."""
    min_words: int = Field(default=50, ge=0)
    max_words: int = Field(default=100_000, gt=0)
    min_mean_word_length: float = Field(default=3, ge=0)
    max_mean_word_length: float = Field(default=10, gt=0)
    max_hash_ratio: float = Field(default=0.1, ge=0)
    """`#` signs a word."""
    max_ellipsis_ratio: float = Field(default=0.1, ge=0)
    """Ellipses (`...` or `…`) a word."""
    max_bullet_lines: Fraction = 0.9
    """Of the lines, those that begin with a bullet point."""
    max_ellipsis_lines: Fraction = 0.3
    """Of the lines, those that end with an ellipsis."""
    min_alphabetic_words: Fraction = 0.8
    """Of the words, those with at least one letter."""
    min_stop_words: int = Field(default=2, ge=0, le=8)
    """How many of the, be, to, of, and, that, have, with must occur."""
    max_duplicate_lines: Fraction = 0.3
    """Of the lines, those that stood before; likewise the three below, of paragraphs or of their characters."""
    max_duplicate_paragraphs: Fraction = 0.3
    max_duplicate_line_characters: Fraction = 0.2
    max_duplicate_paragraph_characters: Fraction = 0.2
    max_top_2gram: float = Field(default=0.20, ge=0)
    """Characters of the most frequent pair of words, times how often it occurs, of the characters of all words."""
    max_top_3gram: float = Field(default=0.18, ge=0)
    max_top_4gram: float = Field(default=0.16, ge=0)
    max_duplicate_5grams: Fraction = 0.15
    """Of the characters of all words, those within runs of five words that stood before."""
    max_duplicate_6grams: Fraction = 0.14
    max_duplicate_7grams: Fraction = 0.13
    max_duplicate_8grams: Fraction = 0.12
    max_duplicate_9grams: Fraction = 0.11
    max_duplicate_10grams: Fraction = 0.10

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        _require_order("gopher", "words", self.min_words, self.max_words)
        _require_order("gopher", "mean_word_length", self.min_mean_word_length, self.max_mean_word_length)
        return self


class C4Config(_Rules):
    """The rules of Raffel et al. 2020 (JMLR 21, section 2.2), which take lines out of a document before they judge it.

    Their removal of repeated three-sentence spans is not among them: see `near_duplicates`.
    """

    require_terminal_punctuation: bool = True
    """A line is kept if it ends in a full stop, an exclamation or question mark, or an end quotation mark."""
    min_words_per_line: int = Field(default=5, ge=0)
    max_word_length: int = Field(default=1000, gt=0)
    """A line with a longer word is no prose and is taken out (so does the published program)."""
    drop_javascript_lines: bool = True
    drop_policy_lines: bool = True
    """Lines on terms of use, privacy and cookies."""
    drop_citation_marks: bool = True
    """`[1]`, `[edit]` and `[citation needed]`."""
    min_sentences: int = Field(default=3, ge=0)
    """Of what is left."""
    remove_lorem_ipsum: bool = True
    remove_curly_brackets: bool = True
    """A page with a `{` holds code."""
    blocked_words: tuple[str, ...] = ()
    """A page with one of these words is removed. The published list is not part of this program."""


class NearDuplicatesConfig(_Rules):
    """MinHash (Broder 1997) over word n-grams, matched by locality-sensitive hashing."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Estimated Jaccard similarity with an earlier document from which a document is removed."""
    permutations: int = Field(default=128, ge=16, le=1024)
    """Numbers of a signature; the standard error of the similarity s is sqrt(s (1 - s) / permutations)."""
    ngram: int = Field(default=5, gt=0)


class DecontaminationConfig(_Rules):
    """Remove documents that share a run of words with an evaluation set (Brown et al. 2020, appendix C)."""

    against: tuple[InputConfig, ...] = Field(min_length=1)
    """The evaluation sets, named as the inputs of a corpus are: PATH, or {path: PATH, text_field: FIELD, ...}."""
    ngram: int = Field(default=13, gt=0)

    @field_validator("against", mode="before")
    @classmethod
    def _from_paths(cls, against: Any) -> Any:
        if not isinstance(against, list | tuple):
            return against
        return [{"path": entry} if isinstance(entry, str) else entry for entry in against]

    @field_validator("against")
    @classmethod
    def _give_names(cls, against: tuple[InputConfig, ...]) -> tuple[InputConfig, ...]:
        against = with_names(against)
        for set_ in against:
            if set_.weight != InputConfig.model_fields["weight"].default:
                raise ValueError(
                    f"weight is for the sample of a tokenizer, but {set_.name} has weight {set_.weight:g}: take it out"
                )
        return against


class CurationConfig(_Rules):
    """What is done to the documents of a corpus before they are tokenized, in this order."""

    c4: Annotated[C4Config | None, BeforeValidator(_switch)] = None
    length: LengthConfig | None = None
    language: LanguageConfig | None = None
    gopher: Annotated[GopherConfig | None, BeforeValidator(_switch)] = None
    decontaminate: DecontaminationConfig | None = None
    exact_duplicates: bool = False
    """Of documents with the same text, keep the first."""
    near_duplicates: Annotated[NearDuplicatesConfig | None, BeforeValidator(_switch)] = None

    @property
    def evaluation_sets(self) -> tuple[InputConfig, ...]:
        """Those that documents are held against; none if they are not."""
        return () if self.decontaminate is None else self.decontaminate.against

    @property
    def finds_duplicates(self) -> bool:
        """Whether documents are compared with each other, for which each needs a sketch."""
        return self.exact_duplicates or self.near_duplicates is not None


def _require_order(rules: str, what: str, low: float, high: float | None) -> None:
    if high is not None and low > high:
        raise ValueError(
            f"{rules}.min_{what} is {low}, {rules}.max_{what} is {high}, so that no document is kept: "
            "the first must not be larger"
        )
