"""`steppe data mix`, `consumed` and `show RUN` before a run has trained; tests/dist/test_data_stages.py goes on."""

import json
from pathlib import Path

import pytest

from launch.run_folder import new_run, with_absolute_paths
from pretrain.recipe import dump_config, load_config
from pretrain.run_dir import RunDir
from tests.conftest import Corpus, Steppe
from tests.small_run import RECIPE


@pytest.fixture
def run(corpus: Corpus, tmp_path: Path) -> RunDir:
    """A run of two sources that has been set up and never started."""
    sources = f"[{{name: code, path: '{corpus.train}', weight: 3}}, {{name: more, path: '{corpus.held_out}'}}]"
    settings = [word for word in corpus.settings(f"data.sources={sources}") if word != "--set"]
    run = RunDir(tmp_path / "run")
    with new_run(with_absolute_paths(load_config(RECIPE, settings)), run):
        return run


def stages(run: RunDir) -> list[tuple[int | None, dict[str, float] | None, int | None, int | None]]:
    return [
        (stage.from_step, stage.weights, stage.sequence_length, stage.global_batch_size)
        for stage in load_config(run.config_path).data.stages
    ]


def test_a_stage_is_recorded(run: RunDir, steppe: Steppe) -> None:
    told = steppe("data", "mix", run.path, "--at-step", 4, "--set", "weights.more=9", "--json")
    assert stages(run) == [(4, {"code": 3.0, "more": 9.0}, None, None)]
    listed = json.loads(told.stdout)["stages"]
    assert [(stage["step"], stage["position"]) for stage in listed] == [(0, 0), (4, 32)]
    # A second one behind it starts from its mixture; a third before it leaves both as they are.
    steppe("data", "mix", run.path, "--at-step", 8, "--set", "weights.code=null", "--set", "sequence_length=64")
    steppe("data", "mix", run.path, "--at-step", 2, "--set", "global_batch_size=16")
    assert stages(run) == [
        (2, None, None, 16),
        (4, {"code": 3.0, "more": 9.0}, None, None),
        (8, {"more": 9.0}, 64, None),
    ]
    # Said again, it adds to what it said.
    steppe("data", "mix", run.path, "--at-step", 2, "--set", "sequence_length=16")
    assert stages(run)[0] == (2, None, 16, 16)
    (changed, *_) = [event for event in map(json.loads, run.events_path.open()) if event["type"] == "resume"]
    assert list(changed["changes"]) == ["data.stages"]


def test_a_stage_can_be_taken_away(run: RunDir, steppe: Steppe) -> None:
    steppe("data", "mix", run.path, "--at-step", 4, "--set", "weights.more=9")
    told = steppe("data", "mix", run.path, "--at-step", 4000, "--set", "global_batch_size=16").stderr
    assert "after the end of the run, step 12" in told
    steppe("data", "mix", run.path, "--at-step", 4, "--drop")
    assert stages(run) == [(4000, None, None, 16)]
    assert (
        "no stage begins there (stages begin at 4000)"
        in steppe("data", "mix", run.path, "--at-step", 4, "--drop", code=2).stderr
    )


def test_other_data_than_the_run_reads_is_not_told_for_its_own(run: RunDir, corpus: Corpus, steppe: Steppe) -> None:
    swapped = load_config(run.config_path, [f"data.sources=[{{name: code, path: '{corpus.held_out}'}}]"])
    dump_config(swapped, run.config_path)
    for words in (["show", run.path, "--step", 1], ["consumed", run.path]):
        assert "data source code is not what this run has read" in steppe("data", *words, code=2).stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--at-step 4", "nothing to change"),
        ("--at-step 4 --drop", "the run has no stages"),
        ("--at-step 4 --drop --set weights.code=2", "does not go with --drop"),
        ("--at-step 99999999999999999999 --set weights.code=2", "1000000000000000"),
        ("--set weights.code=2", "when does the stage begin"),
        ("--at-step 4 --at-tokens 9 --set weights.code=2", "a stage has one beginning"),
        ("--at-step 4 --set weights.cod=2", "'cod', which is not among the sources"),
        ("--at-step 4 --set weights.code=0", "weights are positive"),
        ("--at-step 4 --set weights.code=1e-9", "smallest share is 1/4096"),
        ("--at-step 4 --set sequence_lenth=64", "did you mean sequence_length"),
        ("--at-step 4 --set sequence_length=-1", "greater than 0"),
        ("--at-step 4 --set weights=3", "dict"),
    ],
)
def test_what_is_no_stage_is_refused(run: RunDir, steppe: Steppe, words: str, expected: str) -> None:
    before = run.config_path.read_bytes()
    refused = steppe("data", "mix", run.path, *words.split(), code=2).stderr
    assert expected in refused
    assert len(refused.strip().splitlines()) == 1
    assert run.config_path.read_bytes() == before


def test_stages_have_one_unit(run: RunDir, steppe: Steppe) -> None:
    steppe("data", "mix", run.path, "--at-tokens", 1000, "--set", "weights.more=9")
    refused = steppe("data", "mix", run.path, "--at-step", 9, "--set", "weights.more=2", code=2).stderr
    assert "use --at-tokens" in refused


def test_what_will_be_read_is_known_before_anything_is(run: RunDir, steppe: Steppe) -> None:
    told = json.loads(steppe("data", "consumed", run.path, "--json").stdout)
    assert told["now"]["step"] == 0
    assert told["end"]["step"] == 12
    counts = {name: source["tokens"] for name, source in told["end"]["sources"].items()}
    assert sum(counts.values()) == pytest.approx(12 * 8 * 32, abs=64)  # a last window may be short
    assert counts["code"] > counts["more"]
    assert "at the end, step 12" in steppe("data", "consumed", run.path).stdout


def test_data_that_ends_too_early_is_found_before_the_start(corpus: Corpus, tmp_path: Path, steppe: Steppe) -> None:
    sources = f"data.sources=[{{name: more, path: '{corpus.held_out}', max_epochs: 1}}]"
    words = ["train", "58m", "--run-dir", tmp_path / "run", *corpus.settings(sources, "schedule.total_steps=1000")]
    refused = steppe(*words, code=2).stderr
    assert "raise max_epochs" in refused
    assert "8,000 samples in its 1,000 steps" in refused
    assert not (tmp_path / "run").exists()


def test_the_documents_of_a_step(run: RunDir, corpus: Corpus, steppe: Steppe) -> None:
    told = json.loads(steppe("data", "show", run.path, "--step", 3, "--json").stdout)
    assert (told["position"], told["samples"]) == (16, 8)
    assert [sample["position"] for sample in told["content"]] == list(range(16, 24))
    for sample in told["content"]:
        assert sum(part["tokens"] for part in sample["documents"]) == 32
        for part in sample["documents"]:
            text = Path(part["file"]).read_text(encoding="utf-8")
            assert part["text"] in text
            assert 0 <= part["start"] < part["start"] + part["tokens"] <= part["document_tokens"]
    halves = [
        json.loads(steppe("data", "show", run.path, "--step", 3, "--rank", r, "--ranks", 2, "--json").stdout)["content"]
        for r in range(2)
    ]
    assert halves[0] + halves[1] == told["content"]
    assert "document" in steppe("data", "show", run.path, "--step", 3).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "give --step N"),
        ("--step 0", "the first being 1"),
        ("--step 99999999999999999999", "from 1 to"),
        ("--step 1 --rank 0 --ranks 0", "1 or more"),
        ("--step 1 --rank 0", "give --ranks N"),
        ("--step 1 --rank 4 --ranks 4", "0 to 3"),
        ("--step 1 --rank 1 --ranks 3", "not a multiple"),
    ],
)
def test_what_is_no_step_is_refused(run: RunDir, steppe: Steppe, words: str, expected: str) -> None:
    refused = steppe("data", "show", run.path, *words.split(), code=2).stderr
    assert expected in refused
    assert len(refused.strip().splitlines()) == 1
