"""What is found out before ranks start, and what is said when they fail."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.config import CacheConfig
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardInfo
from launch.ranks import RanksError, StoppedError, culprit, run_ranks
from launch.run import failure
from launch.run_checks import cache_shortage, check_checkpoints_are_there, check_same_data, with_checked_init
from launch.run_folder import locked, recipe_path
from pretrain.checkpoint.folder import checkpoint_path
from pretrain.checkpoint.index import read_index
from pretrain.config import RunConfig
from pretrain.hang import HANG, Report
from pretrain.outcome import Outcome, exit_code_of
from pretrain.recipe import load_config, validated
from pretrain.run_dir import RunDir, event_line, read_json, write_json
from pretrain.stop import LAUNCHER
from tests.small_run import small_config
from tests.tiny_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.logs.mkdir(parents=True)
    return made


def rank_said(run: RunDir, rank: int, kind: str, message: str, exit_code: int) -> None:
    run.rank_error(rank).write_text(json.dumps({"exit_code": exit_code, "type": kind, "message": message}))


def test_recipes_by_name_and_by_path(tmp_path: Path) -> None:
    assert recipe_path("58m").name == "58m.yaml"
    own = tmp_path / "own.yaml"
    own.touch()
    assert recipe_path(str(own)) == own
    with pytest.raises(ValueError, match="recipes are 125m, 1b, 58m, 70b, 7b, demo"):
        recipe_path("59m")


def test_one_attempt_at_a_time(run: RunDir) -> None:
    with locked(run), pytest.raises(ValueError, match="is being trained in by another process"), locked(run):
        pass
    with locked(run):
        pass


def test_the_users_mistake_leads(run: RunDir) -> None:
    rank_said(run, 0, "RuntimeError", "connection closed by peer", 1)
    rank_said(run, 1, "ValueError", "shard x is\ndamaged", 2)
    outcome = failure(run, RanksError(0, None))
    assert (outcome.exit_code, outcome.message) == (2, "shard x is damaged")


def test_a_killed_rank_leads_its_peers_complaint(run: RunDir) -> None:
    rank_said(run, 0, "RuntimeError", "connection closed by peer", 1)
    outcome = failure(run, RanksError(1, "SIGKILL"))
    assert outcome.exit_code == 1
    assert outcome.message.startswith("rank 1 was killed by SIGKILL; go on with: steppe resume")


def test_a_lost_peer_is_told_without_addresses_and_an_error_of_ours_in_its_own_words(run: RunDir) -> None:
    rank_said(run, 1, "RuntimeError", "[/src/gloo/pair.cc:537] Read error [10.0.0.3]:4711", 1)
    told = failure(run, RanksError(1, None)).message
    assert told == f"RuntimeError: rank 1 lost touch with another (traceback in {run.rank_log(1)})"
    rank_said(run, 0, "RuntimeError", "the matrix is singular", 1)
    os.utime(run.rank_error(0), ns=(0, 0))
    assert failure(run, RanksError(0, None)).message.startswith("RuntimeError: the matrix is singular")


def test_a_crash_names_its_log(run: RunDir) -> None:
    rank_said(run, 3, "ZeroDivisionError", "division by zero", 1)
    message = failure(run, RanksError(3, None)).message
    assert message == f"ZeroDivisionError: division by zero (traceback in {run.rank_log(3)})"


def hang_said(run: RunDir, rank: int, report: Report) -> None:
    """What the watchdog of a rank writes."""
    write_json(run.rank_error(rank), {"exit_code": 1, "type": HANG, "message": str(report), **asdict(report)})


def test_a_hang_is_told_by_who_is_late_and_not_by_what_ended_it(run: RunDir) -> None:
    """Every rank ends by SIGKILL then; one may have seen the others go before."""
    waits = Report("n1", 7, "step", "S", 20.0, 3, "all_reduce", "agree (pretrain/engine.py:108)")
    hang_said(run, 0, waits)
    hang_said(run, 2, replace(waits, host="n2", waiting=None, call="train_step (pretrain/engine_deepspeed.py:104)"))
    rank_said(run, 1, "RuntimeError", "connection closed by peer", 1)
    outcome = failure(run, RanksError(0, "SIGKILL"))
    assert outcome.exit_code == 1
    assert outcome.message == (
        "no step was made for 20 s: rank 2 on n2 is late, at step 7 (step), in train_step "
        "(pretrain/engine_deepspeed.py:104); the others wait for it in all_reduce; "
        f"stacks in {run.logs}/rank_*.stacks; go on with: steppe resume {run.path}"
    )


def test_an_error_leads_those_who_waited_for_its_rank(run: RunDir) -> None:
    hang_said(run, 0, Report("n1", 7, "step", "S", 20.0, 2, "all_reduce", None))
    rank_said(run, 1, "ZeroDivisionError", "division by zero", 1)
    assert failure(run, RanksError(0, "SIGKILL")).message.startswith("ZeroDivisionError: division by zero")


def test_a_rank_that_is_killed_without_a_word_may_have_run_out_of_memory(run: RunDir) -> None:
    assert "when memory runs out" in failure(run, RanksError(1, "SIGKILL")).message
    assert "memory" not in failure(run, RanksError(1, "SIGSEGV")).message


def test_ranks_that_said_nothing(run: RunDir) -> None:
    assert failure(run, StoppedError("got SIGTERM")).message.startswith("got SIGTERM")


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({0: 1, 1: -9}, "rank 1 was killed by SIGKILL"),
        ({0: -15, 1: 1}, "rank 0 failed"),  # the launcher's own SIGTERM blames nobody
        ({1: -11, 0: -15}, "rank 1 was killed by SIGSEGV"),
    ],
)
def test_culprit(codes: dict[int, int], said: str) -> None:
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    assert str(culprit(failures)) == said


def test_a_resumed_run_reads_the_same_data() -> None:
    old = {"tokenizer": "t1", "manifests": {"a": "m1", "b": "m2"}, "packs": {"a": {"64": "p1"}}}

    def now(tokenizer: str = "t1", bins: dict[str, str] | None = None, **manifests: str) -> dict[str, Any]:
        return {"tokenizer": tokenizer, "manifests": manifests, "packs": {name: bins or {} for name in manifests}}

    check_same_data(old, now(a="m1", new="m9"), [])
    check_same_data(old, now(a="m1", bins={"64": "p1", "128": "p7"}), [])
    with pytest.raises(ValueError, match="data source a was packed anew for 64 tokens"):
        check_same_data(old, now(a="m1", bins={"64": "p2"}), [])
    with pytest.raises(ValueError, match="tokenizer was t1 and would become t2.*--allow tokenizer"):
        check_same_data(old, now("t2", a="m1"), ["manifest"])
    with pytest.raises(ValueError, match="data source b is not what this run has read.*--allow manifest"):
        check_same_data(old, now(b="m3"), ["tokenizer"])
    check_same_data(old, now("t2", b="m3"), ["tokenizer", "manifest"])


def test_weights_to_start_from_are_of_this_model_and_tokenizer(tmp_path: Path) -> None:
    source = write_run(tmp_path / "source")
    config = load_config(source.config_path)
    newest = checkpoint_path(source.checkpoints, 20)
    tokenizer = read_index(newest).tokenizer_fingerprint
    assert tokenizer is not None

    def begun(init_from: Path, **model: object) -> RunConfig:
        tree = config.model_dump(mode="json")
        return validated({**tree, "init_from": str(init_from), "model": {**tree["model"], **model}})

    assert with_checked_init(config, tokenizer) == config
    # A run's newest checkpoint of today; a training matter may differ.
    assert with_checked_init(begun(source.path), tokenizer).init_from == str(newest)
    assert with_checked_init(begun(newest, document_mask=True), tokenizer).init_from == str(newest)
    with pytest.raises(ValueError, match="rope_theta=10000.0, this run's model has 500000.0: set model"):
        with_checked_init(begun(newest, rope_theta=500000.0), tokenizer)
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        with_checked_init(begun(newest), "0" * 16)
    with pytest.raises(ValueError, match="is neither a run"):
        with_checked_init(begun(tmp_path), tokenizer)


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(run: RunDir) -> None:
    check_checkpoints_are_there(run)
    run.events_path.write_text(event_line("checkpoint", {"step": 30, "path": "x"}))
    with pytest.raises(ValueError, match="holds no checkpoint, though the run has saved one at step 30: bring it back"):
        check_checkpoints_are_there(run)
    (run.checkpoints / "step_00000030").mkdir(parents=True)
    check_checkpoints_are_there(run)


def test_whose_fault_it_is(tmp_path: Path) -> None:
    """A ValueError of our own code is the user's mistake; one raised inside a library is not."""

    def code_of(act: Callable[[], object]) -> int:
        try:
            act()
        except Exception as error:
            return exit_code_of(error)
        raise AssertionError

    assert code_of(lambda: recipe_path("none")) == 2
    assert code_of(lambda: read_json(tmp_path / "none.json")) == 2
    assert code_of(lambda: json.loads("{")) == 1
    assert code_of(lambda: read_json(tmp_path)) == 2  # a folder where a file should be


def test_an_outcome_survives_its_file(run: RunDir) -> None:
    outcome = Outcome("stopped", 75, 12, "step 12: stopped on request")
    outcome.write(run)
    assert Outcome.read(run) == outcome
    run.outcome_path.write_text("{")
    with pytest.raises(ValueError, match="outcome.json is damaged"):
        Outcome.read(run)


def test_ranks_share_the_cores_and_leave_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The number of threads is that of this number of ranks, not of ranks started before."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    before = dict(os.environ)
    program = tmp_path / "threads_of_a_rank.py"
    program.write_text(
        "import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write("
        "os.environ['OMP_NUM_THREADS'] + ' ' + os.environ['GLIBC_TUNABLES'])"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cores = len(os.sched_getaffinity(0))
    for nproc in (1, 2):
        run_ranks("threads_of_a_rank", [str(tmp_path / f"{nproc}-")], nproc)
        threads, tunables = (tmp_path / f"{nproc}-0").read_text().split()
        assert threads == str(max(1, cores // nproc))
        assert tunables == "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"
        assert {name: os.environ.get(name) for name in before} == before
        assert not {"OMP_NUM_THREADS", LAUNCHER} & os.environ.keys()


def test_a_cache_that_is_too_small_is_told(tmp_path: Path) -> None:
    data = small_config("data.sources=[{name: web, path: s3://b/web}, {name: code, path: code}]").data
    shard = ShardInfo("s", 10**9, 1, 2 * 10**9, 0, "", "")
    manifests = {path: Manifest(9, 1, 2, "", "uint16", 1, 1, 1, 0, 0, (shard,)) for path in ("s3://b/web", "code")}

    def told(**cache: Any) -> str | None:
        return cache_shortage(data.model_copy(update={"cache": CacheConfig(**cache)}), manifests)

    groups = 2 * 8 * 64 * 2**20
    assert told(max_bytes=groups - 1) is None, "nothing is cached"
    assert told(folder="/scratch", max_bytes=groups) is None
    assert f"({groups} bytes)" in str(told(folder="/scratch", max_bytes=groups - 1))
    assert f"({2 * groups} bytes)" in str(told(folder="/scratch", max_bytes=groups, local_sources=True))
