"""A preparation as an array of tasks: the script says what was meant, and a real Slurm makes the same folder of it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus.config import corpus_of, load_corpus
from data_pipeline.preparation.job import LOGS_NAME, Request, prepare_corpus
from data_pipeline.tokenizer_training import train_tokenizer
from launch.cluster.preparation import CORPUS_FILE, SCRIPT_FILE, PreparationArray
from tests.conftest import Steppe
from tests.required import lacking
from tests.slurm.cluster import Cluster, wait_for
from tests.unit.launch.cluster.conftest import WriteProfile

NASTY = 'it\'s "a" $(touch x) `touch x` folder; touch x & é*'
TEXTS = [f"Document {i} of {i * i} words. " * (i % 40 + 1) for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        rows = TEXTS[number * 50 : (number + 1) * 50]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder


def array(profile: Path, out: Path, corpus: Path, tokenizer: str = "t.model", **changes: Any) -> PreparationArray:
    fields = {"tasks": 3, "workers": 2, **changes}
    return PreparationArray(str(profile), request=Request(corpus_of([corpus]), tokenizer, out, packs=(64,)), **fields)


def chosen(script: str) -> dict[str, str]:
    """{option: value} of its #SBATCH lines."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_array_asks_for_what_the_profile_and_the_words_say(
    write_profile: WriteProfile, corpus: Path, tmp_path: Path
) -> None:
    site = {"account": "an account", "memory_per_node": "8G", "cpus_per_rank": 3, "gpus_per_node": 4}
    profile = write_profile(**site | {"ranks_per_node": 4}, requeue=False, sbatch_options=["--nice=5"])
    told = chosen(array(profile, tmp_path / "100%" / "d", corpus).script())
    assert told["array"] == "0-2"
    assert (told["nodes"], told["ntasks"], told["cpus-per-task"], told["mem"]) == ("1", "1", "2", "8G")
    assert told["account"] == '"an account"'
    assert told["output"] == f"{tmp_path}/100%%/d/{LOGS_NAME}/task_%A_%a.log"
    assert told["nice"] == "5"
    assert told["time"] == "10"
    assert "no-requeue" in told
    assert not {"gres", "gpus-per-node", "signal"} & told.keys()
    own = chosen(array(profile, tmp_path / "d", corpus, workers=None, time_limit="2-00").script())
    assert (own["cpus-per-task"], own["time"]) == ("3", "2-00")


def test_blanks_quotes_and_commands_in_names_are_themselves(
    write_profile: WriteProfile, corpus: Path, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$NOTE" "$FROM_SETUP" "$@"\n')
    fake.chmod(0o755)
    out = tmp_path / NASTY / "d"
    profile = write_profile(python=str(fake), environment={"NOTE": NASTY}, setup=["export FROM_SETUP='two words'"])
    script = array(profile, out, corpus, tokenizer=NASTY).script()
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, cwd=tmp_path, check=True)
    words = ["data", "prepare", "--corpus", str(out / LOGS_NAME / CORPUS_FILE), "--tokenizer", NASTY, "--out", str(out)]
    expected = [NASTY, "two words", "-P", "-m", "launch.cli", *words, "--workers", "2", "--pack", "64"]
    assert done.stdout.splitlines() == expected
    assert done.stderr == ""
    assert not list(tmp_path.rglob("x"))


def test_shellcheck_has_nothing_to_say(write_profile: WriteProfile, corpus: Path, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        lacking("shellcheck is not installed")
    profile = write_profile(modules=["cuda"], setup=["export A=1"])
    script = array(profile, tmp_path / "d", corpus).script()
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_what_is_wrong_is_found_before_anything_is_written(
    write_profile: WriteProfile, corpus: Path, tmp_path: Path
) -> None:
    profile = write_profile()
    for wrong, message in [
        (array(profile, tmp_path / "d", corpus, tasks=0), "--tasks 0: give a number"),
        (array(profile, tmp_path / "d", corpus, time_limit="soon"), "'soon' is no time limit"),
        (array(profile, tmp_path / "a\nb", corpus), "must be one line of printable characters"),
        (array(tmp_path / "none.yaml", tmp_path / "d", corpus), "none.yaml"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong.submit()
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_of_a_real_slurm_share_the_work(
    steppe: Steppe, slurm_here: Cluster, write_profile: WriteProfile, corpus: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "t.model", tmp_path / "a folder" / "d"
    train_tokenizer(TEXTS, 310, model)
    words = ["data", "prepare", "--input", corpus, "--tokenizer", model, "--out", out, "--pack", 64, "--workers", 1]
    refused = steppe(*words, "--cluster", write_profile(partition="nowhere"), "--tasks", 3, code=2)
    assert "Slurm would refuse this job" in refused.stderr
    words += ["--cluster", write_profile(environment={"OMP_NUM_THREADS": "1"}), "--tasks", 3]
    dry = steppe(*words, "--dry-run")
    assert "to start at" in dry.stderr
    assert dry.stdout.startswith("#!/bin/bash")
    assert not out.exists()

    job = json.loads(steppe(*words, "--json").stdout)["job_id"]
    wait_for("the manifest", (out / "manifest.json").exists)
    wait_for("the tasks to end", lambda: not slurm_here.ask("squeue", "--noheader"))
    logs = out / LOGS_NAME
    said = {path.name: path.read_text() for path in logs.glob("task_*.log")}
    assert sorted(said) == [f"task_{job}_{task}.log" for task in range(3)]
    for log in said.values():
        assert "Traceback" not in log
        assert "fingerprint" in log, said
    assert load_corpus(logs / CORPUS_FILE) == corpus_of([corpus])
    assert (logs / SCRIPT_FILE).read_text() == dry.stdout
    assert "nothing is queued" in steppe(*words).stdout

    alone = tmp_path / "alone"
    prepare_corpus(Request(corpus_of([corpus]), str(model), alone, packs=(64,)), 1)
    shutil.rmtree(logs)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in alone.iterdir()
    }
