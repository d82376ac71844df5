"""Which node is bad, from what ranks say and what they do not."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster import preflight_rank
from launch.cluster.container import LOCAL_FOLDER
from launch.cluster.preflight import (
    STAGES,
    Findings,
    RankReport,
    further,
    judge_preflight,
    new_folder,
    preflight_folder,
    read_reports,
    report_path,
    slowest_all_reduce,
)
from launch.cluster.profile import PreflightConfig
from pretrain.run_dir import RunDir

LIMITS = PreflightConfig(clock_skew_seconds=5.0)
NODES = ["n1", "n2", "n3", "n4"]
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def reports(**changes: dict[str, object]) -> dict[int, RankReport]:
    """Of two ranks on each of four nodes, all well but for the changes, by "r" and the rank."""
    well = {
        rank: RankReport(rank, NODES[rank // 2], "summed", clock=1000.0, all_reduce_seconds=0.1) for rank in range(8)
    }
    for rank in range(0, 8, 2):
        well[rank] = replace(well[rank], versions=VERSIONS)
    for name, change in changes.items():
        well[int(name[1:])] = replace(well[int(name[1:])], **change)  # type: ignore[arg-type]
    return well


def found(told: dict[int, RankReport]) -> Findings:
    return judge_preflight(NODES, 2, told, LIMITS)


def test_all_is_well() -> None:
    assert found(reports()) == Findings()
    assert found(reports()).words == ""
    assert slowest_all_reduce(reports(r3={"all_reduce_seconds": 2.0})) == {"all_reduce_seconds": 2.0}
    assert slowest_all_reduce({}) == {}


def test_what_a_node_says_against_itself_comes_first() -> None:
    told = reports(r3={"stage": "came", "problem": "GPU 1 is broken"}, **{f"r{r}": {"stage": "sound"} for r in (4, 5)})
    assert found(told) == Findings({"n2": "GPU 1 is broken"})
    assert found(told).words == "n2: GPU 1 is broken"


@pytest.mark.parametrize("other", [{"torch": "2.12.0"}, {"torch": None}])
def test_other_versions(other: dict[str, str | None]) -> None:
    versions = {name: value for name, value in (VERSIONS | other).items() if value is not None}
    torch = versions.get("torch", "none")
    assert found(reports(r4={"versions": versions})).bad == {"n3": f"torch is {torch}, not 2.13.0 as elsewhere"}


def test_of_two_nodes_the_first_is_right() -> None:
    told = {
        0: RankReport(0, "n1", "summed", versions={"torch": "1"}),
        1: RankReport(1, "n2", "summed", versions={"torch": "2"}),
    }
    assert list(judge_preflight(["n1", "n2"], 1, told, LIMITS).bad) == ["n2"]


def test_a_clock_that_is_off() -> None:
    assert found(reports(r2={"clock": 1004.0})) == Findings()
    assert found(reports(r2={"clock": 1007.5})).bad == {"n2": "its clock is +7.5 s off"}
    assert found(reports(r6={"clock": 900.0})).bad == {"n4": "its clock is -100.0 s off"}


def test_a_rank_that_never_came() -> None:
    told = reports(**{f"r{rank}": {"stage": "reached"} for rank in range(8)})
    del told[5]
    assert found(told) == Findings({"n3": "rank 5 did not start"})


def test_a_rank_that_stays_behind_while_others_wait_for_it() -> None:
    waiting = {f"r{rank}": {"stage": "reached"} for rank in range(8)}
    assert found(reports(**waiting | {"r7": {"stage": "came"}})).bad == {
        "n4": "rank 7 did not finish looking at itself"
    }
    assert found(reports(**waiting | {"r6": {"stage": "came", "versions": {}}})).bad == {
        "n4": "rank 6 did not finish looking at itself"
    }
    assert found(reports(**waiting | {"r6": {"stage": "sound"}})).bad == {"n4": "rank 6 did not reach the first node"}


def test_without_the_first_node_nobody_is_blamed_for_not_reaching_it() -> None:
    told = reports(**{f"r{rank}": {"stage": "sound"} for rank in range(8)} | {"r0": {"stage": "came"}})
    assert found(told).bad == {"n1": "rank 0 did not finish looking at itself"}


def test_a_meeting_that_fails_for_all_is_no_nodes_fault() -> None:
    told = reports(**{f"r{rank}": {"stage": "reached"} for rank in range(8)} | {"r1": {"stage": "reached"}})
    told[1] = replace(told[1], complaint="connection refused")
    assert found(told) == Findings(fault="the 8 ranks could not meet; rank 1 on n1: connection refused")
    assert found({}).bad == {}
    assert found({}).words


def test_what_is_wrong_on_most_nodes_is_no_nodes_fault() -> None:
    told = reports(**{f"r{rank}": {"stage": "came", "problem": "/scratch is full"} for rank in (0, 2, 4)})
    assert found(told).bad == {}
    assert "on 3 of 4 nodes something is wrong, such as on n1: /scratch is full" in found(told).fault


REPORTS = st.dictionaries(
    st.integers(0, 7),
    st.tuples(st.sampled_from(STAGES), st.sampled_from(["", "broken"]), st.none() | st.floats(0, 1e4)),
)


@given(told=REPORTS)
def test_whatever_is_told_some_nodes_are_left_and_nothing_bad_is_missed(
    told: dict[int, tuple[str, str, float | None]],
) -> None:
    all_reports = {
        rank: RankReport(rank, NODES[rank // 2], stage, problem=problem, clock=clock)
        for rank, (stage, problem, clock) in told.items()
    }
    findings = found(all_reports)
    assert len(findings.bad) <= 2
    assert set(findings.bad) <= set(NODES)
    whole = len(told) == 8 and all(stage == "summed" and not problem for stage, problem, _ in told.values())
    assert whole or findings.words


def test_reports_are_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    folder = new_folder(run)
    assert folder == preflight_folder(run)
    report = RankReport(3, "n2", "came")
    report.write(folder)
    assert further(report, "sound", folder, versions=VERSIONS).stage == "sound"
    report_path(folder, 2).write_text('{"rank": 2, "no')
    assert read_reports(folder, 8) == {3: RankReport(3, "n2", "sound", versions=VERSIONS)}
    assert list(new_folder(run).iterdir()) == []


# What a rank finds on its node.


def test_disks_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "not" / "yet" / "made"
    monkeypatch.setenv(LOCAL_FOLDER, str(local))
    assert preflight_rank.problem_of_node(tmp_path, 1.0, 0) == ""
    assert local.stat().st_mode & 0o777 == 0o700
    said = preflight_rank.problem_of_node(tmp_path, 1e18, 0)
    assert str(tmp_path) in said
    assert "1e+09 GB are asked for" in said


def test_this_machines_versions_and_processor_are_sound() -> None:
    versions = preflight_rank.versions_here()
    assert versions["torch"].startswith("2.")
    assert len(versions["Steppe's code"].split()) == 4
    assert preflight_rank.problem_of_device(0) == ""
    assert preflight_rank.problem_of_device(8) == "torch finds none of its 8 GPUs"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("00000000:3B:00.0, 0, No\n00000000:5E:00.0, [N/A], [N/A]\n", ""),
        ("00000000:3B:00.0, 0, No\n00000000:5E:00.0, 2, No\n", "GPU 00000000:5E:00.0: ecc is 2"),
        ("00000000:3B:00.0, 0, Yes\n", "GPU 00000000:3B:00.0: retired is Yes"),
        ("", ""),
    ],
)
def test_counts_of_nvidia_smi(table: str, said: str) -> None:
    assert preflight_rank.counted_errors(table, ("ecc", "retired")) == said


def test_a_gpu_that_reports_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *remapped*) echo "GPU-1, 0, Yes";; *) echo "GPU-1, 0, No";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert preflight_rank.problem_of_node(tmp_path, 0.0, 8) == "GPU GPU-1: remapped_rows.failure is Yes"
    assert preflight_rank.problem_of_node(tmp_path, 0.0, 0) == ""


def test_the_first_node_is_reached_or_not() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address, port = server.getsockname()
        with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be reached"):
            preflight_rank.reach(address, port, 0.1)
        server.listen()
        preflight_rank.reach(address, port, 5.0)
