"""job.json and attempts.jsonl."""

import json
from pathlib import Path

import pytest

from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord, append_attempt, read_attempts
from pretrain.run_dir import RunDir, write_json

RECORD = JobRecord(
    cluster="here",
    profile=ClusterProfile.model_validate({"container": {"runtime": "pyxis", "image": "x"}, "environment": {"A": "b"}}),
    nodes=3,
    ranks_per_node=4,
    signal_lead_seconds=60,
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    RECORD.write(run)
    assert JobRecord.read(run) == RECORD
    assert (RECORD.ranks, RECORD.job_id) == (12, None)


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It held a fingerprint of the config, which the config's own last line holds now."""
    run = RunDir(tmp_path)
    write_json(run.job_path, {**RECORD.model_dump(mode="json"), "config": "0123456789abcdef"})
    assert JobRecord.read(run) == RECORD


def test_a_run_without_a_job_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not submitted to a cluster: job.json is missing"):
        JobRecord.read(RunDir(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{}", '{"cluster": "x"}', "not JSON"])
def test_a_damaged_record_is_told_with_what_to_do(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.job_path.write_text(text)
    with pytest.raises(ValueError, match="job.json is damaged: restore it, or move it away and go on with `steppe res"):
        JobRecord.read(run)


def test_attempts_come_back_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_attempts(run) == []
    append_attempt(run, "submitted", job_id="7")
    append_attempt(run, "attempt", job_id="7", restart=0)
    assert [line["type"] for line in read_attempts(run)] == ["submitted", "attempt"]
    (first,) = read_attempts(run, "submitted")
    assert first["job_id"] == "7"
    assert first["time"] > 1e9


def test_a_torn_line_takes_no_other_along(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_attempt(run, "attempt", restart=0)
    with open(run.attempts_path, "a") as file:
        file.write(json.dumps({"type": "signal", "name": "USR1"})[:-5])
    append_attempt(run, "attempt", restart=1)
    assert [line["restart"] for line in read_attempts(run)] == [0, 1]
