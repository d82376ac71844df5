"""Cluster profiles: what comes with Steppe is valid, and each mistake is one line with its remedy."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.profile import PROFILES, ClusterProfile, load_profile, time_limit_seconds

SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_that_comes_with_steppe_is_valid(name: str) -> None:
    assert load_profile(name).description


def test_profiles_show_every_way() -> None:
    profiles = [load_profile(name) for name in SHIPPED]
    assert {profile.launcher for profile in profiles} == {"srun", "torchrun"}
    assert {profile.requeue for profile in profiles} == {True, False}
    assert any(profile.container for profile in profiles)
    assert any(profile.staging for profile in profiles)
    assert any(not profile.gpus_per_node for profile in profiles)


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=f"no such file, and no profile of that name; profiles are .*{SHIPPED[0]}"):
        load_profile("nowhere")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("1-2", 93600), ("1-2:3", 93780), ("1-02:03:04", 93784)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_limit_seconds(text) == seconds


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_a_time_limit_in_full_is_its_sum(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert time_limit_seconds(f"{days}-{hours}:{minutes:02d}:{seconds:02d}") == total
    assert time_limit_seconds(f"{days * 24 + hours}:{minutes:02d}:{seconds:02d}") == total


@pytest.mark.parametrize("text", ["", "12h", "1:2:3:4", "-5", "1-", "0", "0:00", "١٢"])
def test_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        time_limit_seconds(text)


WRONG = {
    "partion: x": "unknown key partion: did you mean partition?",
    "container: {runtime: pyxis, imge: x}": "unknown key container.imge: did you mean image?",
    "container: {runtime: docker, image: x}": "container.runtime='docker'",
    "container: {runtime: pyxis, image: x, mounts: [/a]}": "'/a' is no mount: write HOST:CONTAINER",
    "container: {runtime: pyxis, image: x, mounts: ['/a:/b,/c:/d']}": "without commas",
    "time_limit: 12:00:00": "43200 is a number to YAML",
    "time_limit: soon": "'soon' is no time limit",
    'partition: "a\\nb"': "must be one line of printable characters",
    'partition: " a"': "without blanks around it",
    "gpus_per_node: -1": "gpus_per_node=-1",
    "{gpus_per_node: 4, ranks_per_node: 2}": "ranks_per_node=2 does not go with gpus_per_node=4",
    "gpu_type: 'h100:8'": "gpu_type='h100:8'",
    "memory_per_node: much": "memory_per_node='much'",
    "environment: {A-B: x}": "'A-B' is no name of a variable",
    "environment: {PYTHONPATH: x}": "PYTHONPATH is set by Slurm or by Steppe",
    "environment: {RANK: '0'}": "RANK is set by Slurm or by Steppe",
    'environment: {A: "x\\ny"}': "A='x\\\\ny' must be one line",
    "environment: {A: 1}": "environment.A=1",
    'setup: ["a\\0b"]': "NUL",
    "local_folder: scratch": "'scratch' must be an absolute path",
    "local_folder: /tmp/$(id)": "must be an absolute path, plain but for variables",
    "network_interface: 'ib0 eth0'": "network_interface='ib0 eth0'",
    "sbatch_options: [mail-user=x]": "must have the form --name or --name=value",
    "sbatch_options: ['-N4']": "must have the form --name or --name=value",
    "sbatch_options: ['--nodes=4']": "--nodes=4 is not to be set here: --nodes is set by --nodes",
    "sbatch_options: ['--part=x']": "--partition is set by `partition`",
    "sbatch_options: ['--signal=B:TERM@1']": "--signal is set by `signal_lead_seconds`",
    "sbatch_options: ['--output=x']": "--output is set by Steppe",
    "signal_lead_seconds: 0": "signal_lead_seconds=0",
    "sbatch_options: [--batch=big]": "--batch is set by Steppe, whose batch script runs on the first node",
    "launcher: mpirun": "launcher='mpirun'",
    "preflight: {seconds: -1}": "preflight.seconds=-1",
    "[]": "is not a profile: expected a mapping",
    "a: [": "is not valid YAML",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_a_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_profile(str(path))
    assert message.replace("\\\\", "\\") in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_further_options_are_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"sbatch_options": ["--mail-user=me", "--hint=nomultithread", "--contiguous"]}))
    assert len(load_profile(str(path)).sbatch_options) == 3


def test_every_field_is_explained() -> None:
    assert ClusterProfile.__doc__ is not None
    for name in ClusterProfile.model_fields:
        assert f"{name}:" in ClusterProfile.__doc__ or f"{name}," in ClusterProfile.__doc__, name
