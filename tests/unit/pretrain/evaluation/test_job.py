"""From the words of the command line to a result: domains, the survey of a corpus, a job in one process."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.evaluation.evaluate import Score
from pretrain.evaluation.job import EvaluationJob, parse_domains, run_job, survey
from pretrain.evaluation.progress import ProgressDisplay
from tests.tiny_hf import TEXTS, tiny_hf_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"))


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_domains_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    assert parse_domains(["web=x/news.txt", "news.txt", "a=b.txt", "folder/"]) == {
        "web": "x/news.txt",
        "news": "news.txt",
        "a=b": "a=b.txt",
        "folder": "folder/",
    }
    monkeypatch.chdir(tmp_path / "folder")
    assert parse_domains(["."]) == {"folder": "."}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/news.txt", "b/news.jsonl"], r"--data b/news.jsonl: the domain news is a/news.txt already.*NAME=PATH"),
        (["x=a", "x=b"], "the domain x is a already"),
        (["=a"], "expected PATH or NAME=PATH"),
        (["x="], "expected PATH or NAME=PATH"),
        ([], "name a corpus with --data PATH"),
    ],
)
def test_bad_domains_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_domains(arguments)


def test_a_survey_counts_the_text(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    data = {"plain": str(lines), "packed": str(tmp_path / "a.jsonl.gz")}
    assert survey(data, "text") == 2 * text_bytes


def test_a_survey_refuses_what_cannot_be_measured(tmp_path: Path) -> None:
    cases = {
        "no document": write_lines(tmp_path / "none.jsonl", []),
        "hold no text": write_lines(tmp_path / "empty.jsonl", ["", ""]),
        "no field 'text'": write_lines(tmp_path / "other.jsonl", TEXTS, field="content"),
        "does not exist": tmp_path / "missing.jsonl",
    }
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    cases["bad.txt:2: invalid UTF-8 .* leaves nothing out"] = tmp_path / "bad.txt"
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            survey({"domain": str(path)}, "text")


def test_files_passed_over_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    assert survey({"folder": str(tmp_path)}, "text") == 4


def test_a_job_says_what_it_measured(model: Path, tmp_path: Path) -> None:
    data = {"a": str(write_lines(tmp_path / "a.jsonl", TEXTS, field="body"))}
    result = run_job(EvaluationJob(str(model), data, text_field="body"))
    assert list(result) == [
        *(
            "model",
            "step",
            "passed_over",
            "loss",
            "perplexity",
            "bits_per_byte",
            "tokens",
            "bytes",
            "documents",
            "by_domain",
        ),
        *("window", "stride", "start_token", "eos_scored", "precision"),
    ]
    assert result["documents"] == len(TEXTS)
    assert list(result["by_domain"]["a"]) == ["loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"]
    assert json.loads(json.dumps(result)) == result


def test_a_job_in_another_precision_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="precision=fp16: an evaluation runs in fp32 or bf16"):
        run_job(EvaluationJob(str(model), {}, precision="fp16"))


def test_a_bf16_job(model: Path, tmp_path: Path) -> None:
    job = EvaluationJob(str(model), {"a": str(write_lines(tmp_path / "a.jsonl", TEXTS))})
    exact, rounded = run_job(job), run_job(replace(job, precision="bf16"))
    assert rounded["precision"] == "bf16"
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2)


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(total_bytes=1000, world=2, plain_seconds=0.0) as display:
        display.update(Score(tokens=100, bytes=250, documents=3))
    with ProgressDisplay(total_bytes=None, world=1, plain_seconds=0.0) as display:
        display.update(Score(tokens=100, bytes=250, documents=3))
    for hidden in (ProgressDisplay(1000, 1, shown=False, plain_seconds=0.0), ProgressDisplay(1000, 1)):
        with hidden:
            hidden.update(Score(tokens=100, bytes=250, documents=3))
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first.startswith("eval: 6 documents, ")
    assert ", 50% of the text, about " in first
    assert second.startswith("eval: 3 documents, ")
    assert "left" not in second
    assert out == ""
