"""The batch script: what stands in #SBATCH lines and in bash is what was meant, whatever characters are in it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cluster.environment import job_environment, job_folders
from launch.cluster.profile import PROFILES, ClusterProfile, load_profile
from launch.cluster.record import JobRecord
from launch.cluster.script import check_folder, expanded, options, render, render_sweep, sbatch_quoted
from pretrain.collective_timeout import COLLECTIVE_TIMEOUT
from pretrain.run_dir import RunDir
from tests.required import lacking

EVERYTHING: dict[str, Any] = {
    "partition": "main",
    "account": "an account",
    "modules": ["a b", "$(touch x)"],
    "setup": ["export A=1", "if true; then", "  :", "fi"],
    "environment": {"NOTE": 'it\'s $(touch x) `touch y` "q" \\ ünï'},
    "staging": {"code": True, "environment_archive": "/an archive.tar"},
    "local_folder": "/tmp/a b/$SLURM_JOB_ID/$SLURM_JOB_USER",
    "cpus_per_rank": 3,
    "sbatch_options": ["--contiguous", '--comment=it\'s "here"'],
}
ENVIRONMENT = job_environment(ClusterProfile(), 1800.0)


def record(nodes: int = 2, chain: int = 1, ranks_per_node: int = 4, gpus: int = 0, **profile: Any) -> JobRecord:
    return JobRecord(
        cluster="here",
        profile=ClusterProfile.model_validate(profile),
        nodes=nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks_per_node,
        signal_lead_seconds=60,
        chain=chain,
    )


def chosen(job: JobRecord, **_: object) -> dict[str, str]:
    """{option: value} of its #SBATCH lines."""
    lines = options(job, Path("/run"), "name", "job_%j.log")
    return {name: value for name, _, value in (line.removeprefix("--").partition("=") for line in lines)}


def bash(script: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["bash", *words], input=script.encode(), capture_output=True, timeout=30, check=False)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_makes_a_script(name: str) -> None:
    profile = load_profile(name).model_dump()
    for job in (record(**profile), record(chain=3, **profile)):
        script = render(job, RunDir(Path("/a run/$(touch x)")), "name", ENVIRONMENT)
        assert bash(script, "-n").stderr == b""
        assert script.endswith('exec "$python" -P -m launch.cluster.job "$run"\n')


def test_gpus_are_asked_for_as_the_site_wants() -> None:
    assert chosen(record(gpus=4, gpu_type="h100"))["gres"] == "gpu:h100:4"
    assert chosen(record(gpus=4, gpu_request="gpus-per-node"))["gpus-per-node"] == "4"
    assert not {"gres", "gpus-per-node"} & chosen(record(gpus=4, gpu_request="none")).keys()
    assert not {"gres", "gpus-per-node"} & chosen(record()).keys()


def test_one_task_a_rank_or_one_a_node() -> None:
    srun, torchrun = chosen(record(cpus_per_rank=3)), chosen(record(cpus_per_rank=3, launcher="torchrun"))
    assert (srun["ntasks-per-node"], srun["cpus-per-task"]) == ("4", "3")
    assert (torchrun["ntasks-per-node"], torchrun["cpus-per-task"]) == ("1", "12")


def test_a_job_requeues_or_is_one_of_a_chain() -> None:
    assert "requeue" in chosen(record())
    assert "no-requeue" in chosen(record(requeue=False))
    chain = chosen(record(chain=5))
    assert chain["array"] == "1-5%1"
    assert "no-requeue" in chain
    assert "requeue" not in chain


def test_the_signal_and_the_log() -> None:
    told = chosen(record())
    assert told["signal"] == "B:USR1@60"
    assert told["open-mode"] == "append"
    assert told["output"] == "/run/logs/job_%j.log"
    percent = options(record(), Path("/100% %j"), "name", "job_%j.log")
    assert '--output="/100%% %%j/logs/job_%j.log"' in percent
    assert '--chdir="/100% %j"' in percent


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
@settings(max_examples=30)
def test_bash_sees_what_was_written(text: str) -> None:
    if not text.isprintable() or text != text.strip():
        return
    literal = text.replace("$", "€")  # what is a variable is looked at below
    assert bash(f"printf %s {expanded(literal)}").stdout.decode() == literal


def test_variables_of_the_job_are_expanded_and_nothing_else() -> None:
    said = bash(f"J=7 U='a b'; printf %s {expanded('/tmp/$(id)/`id`/$J/$U x')}").stdout.decode()
    assert said == "/tmp/$(id)/`id`/7/a b x"
    unset = bash(f"echo {expanded('/tmp/$NOWHERE')}")
    assert unset.returncode
    assert b"NOWHERE" in unset.stderr


@pytest.mark.parametrize("text", ["a\nb", "a\x00b", "a\x1bb", "a\u2028b"])
def test_no_line_leaves_its_line(text: str) -> None:
    with pytest.raises(ValueError, match="must be one line of printable characters"):
        sbatch_quoted(text)
    with pytest.raises(ValueError, match="must be one line of printable characters"):
        check_folder(Path("/runs") / text)


@pytest.mark.parametrize("character", ["\\", ":"])
def test_a_folder_that_would_not_come_through(character: str) -> None:
    with pytest.raises(ValueError, match="there must be no .* in its path, for .*; choose another"):
        check_folder(Path(f"/runs/a{character}b"))


def test_a_sweeps_script_finds_its_point() -> None:
    points = [RunDir(Path(f"/sweep/{number}_name='x'")) for number in range(3)]
    script = render_sweep(record(**EVERYTHING), Path("/sweep"), points, 2, "name", ENVIRONMENT)
    assert "#SBATCH --array=0-2%2" in script
    head = script[: script.index("exec >>")]
    said = bash(f'SLURM_ARRAY_TASK_ID=1\n{head}\nprintf %s "$run"').stdout.decode()
    assert said == "/sweep/1_name='x'"


def test_the_profile_goes_before_the_defaults() -> None:
    plain = ClusterProfile()
    assert job_environment(plain, 0.0)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert job_environment(plain, 0.0)["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    mine = ClusterProfile(
        environment={"PYTORCH_ALLOC_CONF": "", "TRITON_CACHE_DIR": "/mine"}, network_interface="ib0", cpus_per_rank=6
    )
    told = job_environment(mine, 0.0)
    assert told["PYTORCH_ALLOC_CONF"] == ""
    assert told["NCCL_SOCKET_IFNAME"] == told["GLOO_SOCKET_IFNAME"] == "ib0"
    assert told["OMP_NUM_THREADS"] == "6"
    assert "TRITON_CACHE_DIR" not in job_folders(mine)
    assert told["TRITON_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize(
    ("of_profile", "hang_seconds", "expected"),
    [(2400, 0.0, "2400"), (2400, 1800.0, "2400"), (2400, 30.0, "2400"), (2400, 7200.0, "7320"), (60, 30.0, "1920")],
)
def test_collectives_outlast_the_watchdog(of_profile: int, hang_seconds: float, expected: str) -> None:
    profile = ClusterProfile(collective_timeout_seconds=of_profile)
    assert job_environment(profile, hang_seconds)[COLLECTIVE_TIMEOUT] == expected


# What a site's files and a profile's lines do to a job, up to where its environment is set.
FAILING = {
    "site": ("false\nmodule() { :; }", {"modules": ["a"]}, 0, ""),
    "module": (
        "module() { return 3; }",
        {"modules": ["a b"]},
        3,
        "module load a b failed, and the job ends",
    ),
    "setup": (
        "",
        {"setup": [": fine", "test -d /no/such"]},
        1,
        "setup: test -d /no/such failed, and the job ends",
    ),
    "guarded": ("", {"setup": ["false || true", "if false; then :; fi"]}, 0, ""),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_job_ends_by_our_lines_and_not_by_the_sites(case: str, tmp_path: Path) -> None:
    init, profile, code, said = FAILING[case]
    (tmp_path / "modules.sh").write_text(init)
    script = render(record(**profile), RunDir(Path("/run")), "name", ENVIRONMENT).replace(
        "/etc/profile.d", str(tmp_path)
    )
    done = bash("unset -f module\nSLURM_JOB_ID=1\n" + script[: script.index("\nexport STEPPE_CODE")] + "\nexit 9")
    assert done.stderr.decode() == (f"steppe: {said}\n" if said else "")
    assert done.returncode == (code or 9), "9: it came to where the training begins"


@pytest.mark.parametrize("chain", [1, 3])
def test_shellcheck_finds_nothing(chain: int, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        lacking("shellcheck is not installed: apt-get install shellcheck")
    everything = job_environment(ClusterProfile.model_validate(EVERYTHING), 1800.0)
    container = record(container={"runtime": "pyxis", "image": "i"})
    points = [RunDir(Path("/a/b c"))]
    for name, script in {
        "one": render(record(chain=chain, **EVERYTHING), RunDir(Path("/a 'run")), "name", everything),
        "sweep": render_sweep(record(**EVERYTHING), Path("/a"), points, None, "name", everything),
        "plain": render(record(), RunDir(Path("/run")), "name", ENVIRONMENT),
        "container": render(container, RunDir(Path("/run")), "name", ENVIRONMENT),
    }.items():
        path = tmp_path / name
        path.write_text(script)
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
