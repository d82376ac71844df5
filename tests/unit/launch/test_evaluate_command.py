"""`steppe eval`, as a person types it."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from data_pipeline.tokenizer_training import train_tokenizer
from launch.cli import app
from tests.benchmark_tasks import write_tasks
from tests.conftest import STDLIB, Steppe, command, environment
from tests.tiny_hf import TEXTS, VOCAB_SIZE, tiny_hf_folder
from tests.tiny_run import write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def corpora(tmp_path: Path) -> list[Path]:
    for name, text in zip("abc", TEXTS, strict=False):
        (tmp_path / f"{name}.txt").write_text(text)
    return [tmp_path / f"{name}.txt" for name in "abc"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve documents with a field to group by."""
    lines = [
        json.dumps({"text": f"{text[i:]} {i}", "lang": "en" if i % 3 else "ja"}) for i in range(3) for text in TEXTS
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def steppe(*words: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def evaluated(*words: object) -> dict[str, Any]:
    done = steppe(*words, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def assert_refused(cases: dict[str, tuple[object, ...]]) -> None:
    """Each of these words, with what the error says of them."""
    for message, words in cases.items():
        done = steppe(*words, "--json")
        assert isinstance(done.exception, ValueError), (message, done.output, done.exception)
        assert message in str(done.exception)
        assert done.stdout == ""


def test_one_object(model: Path, corpora: list[Path]) -> None:
    result = evaluated(model, "--data", *corpora, "--window", 32, "--stride", 16)
    assert list(result["by_domain"]) == ["a", "b", "c"]
    assert (result["window"], result["stride"], result["documents"]) == (32, 16, 3)
    repeated = evaluated(model, "--data", f"a={corpora[0]}", "--data", f"x={corpora[1]}")
    assert list(repeated["by_domain"]) == ["a", "x"]
    assert evaluated(model, "--data", corpora[0], "--window", "document")["window"] == "document"


def test_a_table(model: Path, corpora: list[Path]) -> None:
    done, result = steppe(model, "--data", *corpora), evaluated(model, "--data", *corpora)
    for told in (
        f"{result['perplexity']:.3f}",
        f"{result['bits_per_byte']:.4f}",
        f"{result['tokens']:,}",
        "all",
        "BOS",
    ):
        assert told in done.stdout


def test_a_corpus_and_groups(model: Path, rows: Path, corpora: list[Path], tmp_path: Path) -> None:
    assert list(evaluated(model, "--data", rows, "--by-field", "lang")["by_domain"]) == ["ja", "en"]
    (tmp_path / "corpus.yaml").write_text(json.dumps({"inputs": [{"path": str(corpora[0]), "name": "named"}]}))
    assert list(evaluated(model, "--corpus", tmp_path / "corpus.yaml")["by_domain"]) == ["named"]
    for folder in ("x", "y"):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        (tmp_path / "texts" / folder / "a.txt").write_text(TEXTS[0])
    assert list(evaluated(model, "--data", tmp_path / "texts", "--by-folder")["by_domain"]) == ["x", "y"]


def test_a_kept_evaluation_is_compared_with(model: Path, other: Path, rows: Path, tmp_path: Path) -> None:
    kept = evaluated(model, "--data", rows, "--out", tmp_path / "kept")
    again = steppe(model, "--data", rows, "--out", tmp_path / "kept", "--json")
    assert json.loads(again.stdout) == kept
    assert "survey" not in again.stderr
    found = evaluated(other, "--data", rows, "--compare", tmp_path / "kept")["compared"]
    with_model = evaluated(other, "--data", rows, "--compare", model, "--out", tmp_path / "both")["compared"]
    assert found["measures"] == with_model["measures"]
    assert (found["documents"], found["same_tokenizer"]) == (12, True)
    least = found["measures"]["bits_per_byte"]
    assert least["interval"][0] < least["difference"] < least["interval"][1]
    same = evaluated(model, "--data", rows, "--compare", tmp_path / "kept")["compared"]
    assert same["measures"]["loss"] == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_another_model_sees_the_same_windows(model: Path, rows: Path, tmp_path: Path) -> None:
    shorter = tiny_hf_folder(tmp_path, max_positions=48)
    told = evaluated(model, "--data", rows, "--compare", shorter)["conventions"]
    assert not [sentence for sentence in told if "not scored alike" in sentence]


def test_steps_of_a_run(rows: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    assert evaluated(run, "--data", rows, "--step", 10)["step"] == 10
    found = evaluated(run, "--data", rows, "--compare", run, "--compare-step", 10)
    assert found["step"] == 20
    assert found["compared"]["with"].endswith("at step 10")


def test_files(model: Path, corpora: list[Path], tmp_path: Path) -> None:
    result = evaluated(model, "--data", *corpora, "--csv", tmp_path / "r.csv", "--html", tmp_path / "r.html")
    with open(tmp_path / "r.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in lines] == [
        *(score["loss"] for score in result["by_domain"].values()), result["loss"],
    ]  # fmt: skip
    page = (tmp_path / "r.html").read_text()
    assert "<h2>Documents</h2>" in page
    assert "grassland" not in page


def test_a_folder_whose_name_is_no_utf8(model: Path, tmp_path: Path) -> None:
    for name in (b"x", b"\xff"):
        folder = tmp_path / "texts" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(TEXTS[0])
    done = steppe(
        model, "--data", tmp_path / "texts", "--by-folder", "--csv", tmp_path / "r.csv", "--html", tmp_path / "r.html"
    )
    assert done.exit_code == 0, done.exception
    for text in (done.stdout, (tmp_path / "r.csv").read_text(), (tmp_path / "r.html").read_text()):
        assert r"\udcff" in text


def test_tasks_with_texts_and_alone(model: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = write_tasks(tmp_path / "tasks")
    asked = ("--tasks", "tiny_choice, tiny_word", "--task-folder", folder, "--limit", 3, "--num-fewshot", 1)
    both, alone = evaluated(model, "--data", rows, *asked), evaluated(model, *asked)
    assert both["tasks"]["results"] == alone["tasks"]["results"]
    assert set(alone["tasks"]["results"]) == {"tiny_choice", "tiny_word"}
    assert both["documents"] == 12
    assert "loss" not in alone
    assert set(alone["conventions"]) < set(both["conventions"])
    table = steppe(model, *asked, "--html", tmp_path / "t.html", "--task-samples", tmp_path / "samples").stdout
    assert "tiny_choice" in table
    assert len((tmp_path / "samples" / "tiny_choice.jsonl").read_text().splitlines()) == 3
    assert "acc_norm" in (tmp_path / "t.html").read_text()


def test_mistakes_show_before_anything_runs(
    model: Path, corpora: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.load_model.load_model", None)
    monkeypatch.setattr("pretrain.evaluation.job.load_model", None)
    text = corpora[0]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    run = write_run(tmp_path / "run", steps=(10,)).path
    cases: dict[str, tuple[object, ...]] = {
        "nothing to evaluate": (model,),
        "neither a run": (tmp_path, "--data", text),
        "no checkpoint of that step, it keeps 10": (run, "--data", text, "--step", 11),
        "was never validated": (run, "--data", text, "--step", "best"),
        "--step last must be a number of steps": (run, "--data", text, "--step", "last"),
        "--compare-step last must be": (run, "--data", text, "--compare", run, "--compare-step", "last"),
        "--window wide must be a number of tokens": (model, "--data", text, "--window", "wide"),
        "missing.txt does not exist": (model, "--data", "missing.txt"),
        "the domain a is": (model, "--data", text, text),
        "no document in": (model, "--data", tmp_path / "empty.txt"),
        "hold no text": (model, "--data", tmp_path / "empty.jsonl"),
        "broken.jsonl:2": (model, "--data", tmp_path / "broken.jsonl"),
        "exclude each other": (model, "--data", text, "--by-folder", "--by-field", "x"),
        "gone does not exist": (model, "--data", text, "--compare", tmp_path / "gone"),
        "--compare-step best: only a run": (model, "--data", text, "--compare", model, "--compare-step", "best"),
        "--compare-step 3 means nothing without --compare": (model, "--data", text, "--compare-step", 3),
        "--limit 3 means nothing without --tasks": (model, "--data", text, "--limit", 3),
        "--csv x.csv means nothing without --data": (model, "--tasks", "x", "--csv", "x.csv"),
        "--task-samples d means nothing without --tasks": (model, "--data", "x", "--task-samples", "d"),
        "--by-folder means nothing without --data": (model, "--tasks", "x", "--by-folder"),
        "--by-field y means nothing without --data": (model, "--tasks", "x", "--by-field", "y"),
        "--text-field y means nothing without --data": (model, "--tasks", "x", "--text-field", "y"),
        "--window document means nothing without --data": (model, "--tasks", "x", "--window", "document"),
        "--csv gone/x.csv cannot be written": (model, "--data", text, "--csv", "gone/x.csv"),
        f"--html {tmp_path} cannot be written": (model, "--data", text, "--html", tmp_path),
        "too: name two files": (model, "--data", text, "--html", tmp_path / "x", "--csv", tmp_path / "x"),
        "holds something else than an evaluation": (model, "--data", text, "--out", tmp_path),
    }  # fmt: skip
    assert_refused(cases)


def test_mistakes_that_the_model_shows(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "nan").mkdir()
    (tmp_path / "more.txt").write_text("Other words.")
    broken = tiny_hf_folder(tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer([text[::-1] for text in TEXTS], VOCAB_SIZE, tmp_path / "wrong.model")
    train_tokenizer(TEXTS, 340, tmp_path / "small.model")
    train_tokenizer([*TEXTS, STDLIB.joinpath("argparse.py").read_text()], 600, tmp_path / "large.model")
    run = write_run(tmp_path / "run").path
    evaluated(model, "--data", rows, "--out", tmp_path / "kept")
    cases: dict[str, tuple[object, ...]] = {
        "NaN or infinite": (broken, "--data", rows),
        "is not the tokenizer that": (run, "--data", rows, "--tokenizer", tmp_path / "wrong.model"),
        "has 340 tokens, but": (model, "--data", rows, "--tokenizer", tmp_path / "small.model"),
        "has 600 tokens, but": (model, "--data", rows, "--tokenizer", tmp_path / "large.model"),
        "stride=65": (model, "--data", rows, "--stride", 65),
        "holds an evaluation with window=64, and this one has 32": (
            model, "--data", rows, "--window", 32, "--out", tmp_path / "kept",
        ),
        "holds no domain renamed": (model, "--data", f"renamed={rows}", "--compare", tmp_path / "kept"),
        "also holds the domain rows": (model, "--data", f"z={rows}", "--compare", tmp_path / "kept"),
        "holds other documents": (model, "--data", f"rows={tmp_path / 'more.txt'}", "--compare", tmp_path / "kept"),
    }  # fmt: skip
    assert_refused(cases)


def test_a_stop_says_what_is_kept(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.evaluation.job.evaluate_job", stop)
    monkeypatch.setattr("pretrain.evaluation.harness_job.check_tasks", lambda job: None)
    monkeypatch.setattr("pretrain.evaluation.harness_job.run_tasks_job", stop)
    for words, code, told in (
        (("--data", rows), 1, "stopped; nothing is kept: with --out FOLDER it would be"),
        (("--data", rows, "--out", tmp_path / "out"), 75, f"stopped; what is scored is kept in {tmp_path / 'out'}"),
        (("--tasks", "x"), 1, "stopped; nothing is kept\n"),
    ):
        done = steppe(model, *words)
        assert (done.exit_code, done.stdout) == (code, "")
        assert told in done.stderr


@pytest.mark.slow  # since lm-eval's own tasks are looked through for names that are near
def test_an_unknown_task(model: Path, corpora: list[Path], tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    done = steppe(model, "--data", corpora[0], "--tasks", "tiny_chioce", "--task-folder", folder)
    assert isinstance(done.exception, ValueError)
    assert "did you mean tiny_choice" in str(done.exception)


@pytest.mark.slow
def test_a_mistake_is_one_line(model: Path, tmp_path: Path, steppe: Steppe) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = steppe("eval", model, "--data", tmp_path / "empty.txt", "--json", code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("steppe: ")
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_stop_keeps_what_is_scored(model: Path, tmp_path: Path, steppe: Steppe, ranks: int) -> None:
    """Control-C goes to the command and to its ranks."""
    lines = [json.dumps({"text": f"{text} {i}"}) for i in range(1500) for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = ("eval", model, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--json", "--nproc", ranks)
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    records = tmp_path / "out" / "records"
    while not any(path.stat().st_size for path in records.glob("*")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, ""), err
    assert f"stopped; what is scored is kept in {tmp_path / 'out'}" in err
    done = steppe(*words)
    assert "documents are scored already" in done.stderr
    assert json.loads(done.stdout)["documents"] == 6000
