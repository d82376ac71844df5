import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus.config import CorpusConfig, corpus_of, load_corpus
from data_pipeline.corpus.input_config import ConditionConfig, InputConfig, default_name

EXAMPLE = """
inputs:
  - {path: s3://crawl/2024-10/*.warc.gz, name: web}
  - path: papers/
    text_field: body
    where: {language: en, score: {min: 0.5}, source: {in: [a, b]}, draft: false, retracted: null}
    weight: 2
  - {path: owner/name, subset: science, split: validation, revision: main}
  - {path: notes.txt, format: lines}
curation:
  gopher: true
  decontaminate: {against: [exams/*.jsonl, {path: quiz.jsonl, text_field: question, where: {split: test}}]}
  exact_duplicates: true
"""
AGAINST = "{inputs: [{path: a}], curation: {decontaminate: {against: [%s]}}}"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "corpus.yaml"
    path.write_text(text)
    return path


def test_a_corpus_in_words(tmp_path: Path) -> None:
    corpus = load_corpus(written(tmp_path, EXAMPLE))
    assert [input_.name for input_ in corpus.inputs] == ["web", "papers", "name", "notes"]
    papers = corpus.inputs[1]
    assert papers.weight == 2
    assert papers.format == "auto"
    assert papers.where["language"].one_of == ("en",)
    assert papers.where["score"].min == 0.5
    assert papers.where["source"].one_of == ("a", "b")
    assert papers.where["draft"].one_of == (False,)
    assert papers.where["retracted"].one_of == (None,)
    assert corpus.curation.gopher is not None
    exams, quiz = corpus.curation.evaluation_sets
    assert (exams.name, exams.path, exams.text_field) == ("exams", "exams/*.jsonl", "text")
    assert (quiz.name, quiz.text_field, quiz.where["split"].one_of) == ("quiz", "question", ("test",))
    assert CorpusConfig.model_validate(corpus.model_dump(mode="json")) == corpus


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputs: [{path: a, patth: b}]", "unknown key inputs.0.patth: did you mean path?"),
        ("inputs: [{path: a}]\nzzzzzz: 1", "unknown key zzzzzz: take it out"),
        ("inputs: [{path: a, where: {n: {mim: 1}}}]", "unknown key inputs.0.where.n.mim: did you mean min?"),
        ("inputs: [{name: a}]", "inputs.0.path is missing: set it"),
        ("inputs: [{path: ''}]", "inputs.0.path='': string should have at least 1 character"),
        ("inputs: [{path: a, weight: 0}]", "inputs.0.weight=0: input should be greater than 0"),
        ("inputs: [{path: a, format: csv}]", "inputs.0.format='csv': input should be 'auto', 'jsonl', 'parquet'"),
        ("inputs: []", "inputs: a corpus needs at least one input: add {path: PATH}"),
        ("curation: {}", "inputs is missing: set it"),
        ("inputs: [{path: a, where: {n: {}}}]", "inputs.0.where.n: a condition that asks nothing: give a value"),
        ("inputs: [{path: a, where: {n: {in: []}}}]", "inputs.0.where.n: no value meets {'in': []}: "),
        ("inputs: [{path: a, where: {n: {min: 3, max: 1}}}]", "no value meets {'min': 3.0, 'max': 1.0}: "),
        ("inputs: [{path: a, where: {n: {min: a, max: 1}}}]", "no value meets {'min': 'a', 'max': 1.0}: "),
        ("inputs: [{path: a, where: {n: {in: [1, b], max: a}}}]", "no value meets {'in': [1, 'b'], 'max': 'a'}: "),
        ("inputs: [{path: a, where: {n: {min: .nan}}}]", "inputs.0.where.n.min.float=nan: input should be a finite"),
        ("inputs: [{path: a, format: lines, where: {n: 1}}]", "format lines has no fields to put conditions on"),
        ("inputs: [{path: a, format: jsonl, split: test}]", "split is for hub datasets, but format is jsonl"),
        ("inputs: [{path: a, name: x}, {path: b, name: x}]", "two inputs are called 'x', but names must differ"),
        ("inputs: [{path: a}, {path: a}]", "two inputs are called 'a', but names must differ"),
        (
            "inputs: [{path: 'https://u:p@h/a?s=1'}, {path: 'https://u:p@h/a?s=1'}]",
            "two inputs are called 'https://h/a'",
        ),
        (
            AGAINST % "{path: e, text_feld: q}",
            "unknown key curation.decontaminate.against.0.text_feld: did you mean text_",
        ),
        (
            AGAINST % "{path: e, weight: 2}",
            "against: weight is for the sample of a tokenizer, but e has weight 2: take",
        ),
        (AGAINST % "e, e", "two inputs are called 'e', but names must differ"),
        ("inputs: [", "is not valid YAML"),
        ("- path: a", "is not a corpus: expected a mapping of inputs and curation"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_corpus(written(tmp_path, text))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "corpus.yaml"))
    assert "\n" not in str(error.value)


def test_a_missing_corpus_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: no such corpus file"):
        load_corpus(tmp_path / "none.yaml")


def test_plain_paths() -> None:
    corpus = corpus_of(["a/train.jsonl", Path("b/train.jsonl"), "web.jsonl"], "body")
    assert [input_.name for input_ in corpus.inputs] == ["a/train.jsonl", "b/train.jsonl", "web"]
    assert {input_.text_field for input_ in corpus.inputs} == {"body"}
    with pytest.raises(ValueError, match="a corpus needs at least one input"):
        corpus_of([])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["https://u:secret@h/a.jsonl?sig=secret"], ["a"]),
        (["https://u:secret@h?sig=secret"], ["h"]),
        (
            ["https://h/1/a.jsonl?sig=secret", "https://h/2/a.jsonl?sig=secret"],
            ["https://h/1/a.jsonl", "https://h/2/a.jsonl"],
        ),
        (["https://h/a?file=secret1", "https://h/a?file=secret2", "b"], ["https://h/a (1)", "https://h/a (2)", "b"]),
    ],
)
def test_no_name_shows_what_a_url_is_opened_with(paths: list[str], names: list[str]) -> None:
    assert [input_.name for input_ in corpus_of(paths).inputs] == names
    corpus = CorpusConfig.model_validate({"inputs": [{"path": "c"}], "curation": {"decontaminate": {"against": paths}}})
    assert [set_.name for set_ in corpus.curation.evaluation_sets] == names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("corpora/news.jsonl", "news"),
        ("news.jsonl.gz", "news"),
        ("news.txt.zst", "news"),
        ("owner/dataset", "dataset"),
        ("https://host/v1/news.parquet", "news"),
        ("https://host/v1/news.parquet?signature=a/b", "news"),
        ("s3://bucket/web/", "web"),
        ("s3://bucket/2024-10/*.warc.gz", "2024-10"),
        ("*.txt", "*.txt"),
    ],
)
def test_an_input_is_named_after_its_path(path: str, name: str) -> None:
    assert default_name(path) == name


def test_a_folder_here_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path / "books")
    assert default_name(".") == "books"


@pytest.mark.parametrize(
    ("condition", "passing", "failing"),
    [
        ("en", ["en"], ["de", None, ["en"]]),
        ({"in": [1, None]}, [1, 1.0, None], [2, "1"]),
        ({"min": 2}, [2, 3.5], [1, None, "3", [3]]),
        ({"min": 2, "max": 3}, [2, 3], [1.9, 3.1]),
        ({"min": "b"}, ["b", "c"], ["a", 5, None]),
        ({"in": ["a", "b"], "min": "b"}, ["b"], ["a", "c"]),
    ],
)
def test_conditions(condition: Any, passing: list[Any], failing: list[Any]) -> None:
    config = ConditionConfig.model_validate(condition)
    assert all(config.holds(value) for value in passing)
    assert not any(config.holds(value) for value in failing)


def test_the_readers_know_every_format() -> None:
    from typing import get_args

    from data_pipeline.corpus import formats

    assert set(formats.SUFFIXES.values()) | {"text", "lines", "hub"} == set(get_args(formats.Format))
    assert InputConfig(path="a", format="wet").format == "wet"


def test_words_need_no_numpy_and_no_datasets() -> None:
    code = (
        "import sys, data_pipeline.corpus.config\n"
        "print([m for m in ('numpy', 'datasets', 'torch', 'fsspec', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
