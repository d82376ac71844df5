"""Units of work, and whether two plans are the same."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.corpus.config import CorpusConfig, corpus_of
from data_pipeline.corpus.listing import InputFile
from data_pipeline.preparation.encoding import require_storable
from data_pipeline.preparation.plan import (
    LEAST_UNIT_BYTES,
    MOST_UNIT_BYTES,
    Plan,
    PlannedFile,
    default_unit_bytes,
    make_plan,
    units_of,
)
from data_pipeline.preparation.work_folder import WorkFolder
from tests.unit.data_pipeline.preparation import folders
from tests.unit.data_pipeline.preparation.folders import sample_texts, write_corpus


@given(st.lists(st.none() | st.integers(0, 50)), st.integers(1, 60))
def test_units_are_all_files_once_and_no_larger_than_they_may_be(sizes: list[int | None], unit_bytes: int) -> None:
    units = units_of(sizes, unit_bytes)
    assert [number for first, end in units for number in range(first, end)] == list(range(len(sizes)))
    for first, end in units:
        assert end > first
        inside = sizes[first:end]
        if len(inside) > 1:
            assert None not in inside
            assert sum(size for size in inside if size is not None) <= unit_bytes
    # None could have been joined with the next one.
    for (first, middle), (_, end) in itertools.pairwise(units):
        joined = sizes[first:end]
        assert None in joined or sum(filter(None, sizes[first : middle + 1])) > unit_bytes


def test_units_grow_with_the_corpus_within_bounds() -> None:
    gib = 1 << 30
    assert default_unit_bytes([]) == default_unit_bytes([None]) == default_unit_bytes([gib]) == LEAST_UNIT_BYTES
    assert default_unit_bytes([gib] * 8) == 32 << 20
    assert default_unit_bytes([gib] * 1000) == MOST_UNIT_BYTES


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    folder = write_corpus(tmp_path / "c", sample_texts(10), 5)
    (folder / ".hidden").touch()
    sets = write_corpus(tmp_path / "sets", sample_texts(2), 2)
    tree = {
        "inputs": [{"path": str(folder), "where": {"language": "en", "score": {"min": 0.5}}}, {"path": __file__}],
        "curation": {
            "gopher": True,
            "decontaminate": {
                "against": [folders.__file__, {"path": str(sets), "text_field": "q", "where": {"n": {"in": [1]}}}]
            },
        },
    }
    return make_plan(CorpusConfig.model_validate(tree), "abc", 1000, (64, 32, 64), 2000)


def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path: Path) -> None:
    assert plan.packs == (32, 64)
    assert plan.hidden_files == (1, 0)
    files = [(Path(planned.file.path).name, planned.input) for planned in plan.evaluation_files]
    assert files == [("folders.py", 0), ("part_000.jsonl", 1), ("part_001.jsonl", 1)]
    work = WorkFolder(tmp_path / "out")
    work.make()
    work.begin(plan)
    again = work.read_plan()
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.difference(plan) is None
    work.job_path.write_text(json.dumps(plan.to_json())[:-10])
    with pytest.raises(ValueError, match="job.json is damaged"):
        work.read_plan()


def test_plans_tell_what_they_differ_in(plan: Plan) -> None:
    file = plan.files[2].file
    changed = tuple(
        replace(planned, file=replace(file, tag="later")) if planned.file is file else planned for planned in plan.files
    )
    *other_sets, last = plan.evaluation_files
    set_file = last.file
    changed_set = (*other_sets, replace(last, file=replace(set_file, size=1)))
    for other, words in [
        (replace(plan, corpus=corpus_of([__file__])), "other inputs or settings"),
        (replace(plan, tokenizer_fingerprint="def"), "another tokenizer"),
        (replace(plan, shard_bytes=7), "another size of shards"),
        (replace(plan, packs=()), "other sequence lengths"),
        (replace(plan, files=changed), "another state of the input files (" + file.path),
        (replace(plan, files=plan.files[:-1]), "another state of the input files (" + __file__),
        (replace(plan, evaluation_files=changed_set), "another state of the input files (" + set_file.path),
        (replace(plan, evaluation_files=()), "another state of the input files ("),
    ]:
        said = plan.difference(other)
        assert said is not None
        assert said.startswith(words)
        assert (other.fingerprint == plan.fingerprint) == (words == "other sequence lengths")


def test_a_size_that_nobody_knows_is_none(plan: Plan) -> None:
    assert plan.unit_bytes(0) is not None
    unknown = replace(plan.files[0], file=InputFile("owner/name", "hub", None, "1", 0, 1))
    assert replace(plan, files=(unknown,), units=((0, 1),)).unit_bytes(0) is None


def test_a_file_that_changed_is_named_without_its_signature(plan: Plan) -> None:
    signed = InputFile("https://host/a.jsonl?signature=secret", "jsonl", 7, "1")
    one, other = (replace(plan, files=(PlannedFile(replace(signed, tag=tag), 0),)) for tag in ("1", "2"))
    said = one.difference(other)
    assert said == "another state of the input files (https://host/a.jsonl is new, gone or changed)"


def test_a_text_whose_tokens_an_index_cannot_count_is_refused() -> None:
    require_storable((1 << 31) - 3, "a.jsonl", 0)
    with pytest.raises(ValueError, match=r"document 5 of a.jsonl has 2,147,483,646 bytes.*max_characters"):
        require_storable((1 << 31) - 2, "a.jsonl", 5)
