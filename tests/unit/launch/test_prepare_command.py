"""`steppe data prepare` as it is typed: goes on, says so, reports, and refuses what does not go together."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from data_pipeline.tokenizer_training import train_tokenizer
from launch.commands.data import app
from launch.prepare import PhaseProgress

RUNNER = CliRunner()
SECRET = "correct horse battery staple"
EXAM = " ".join([SECRET] * 4)
TEXTS = [f"Document {i} has words, and {i * i} more of them. " * (i % 9 + 1) for i in range(60)]


def run(*arguments: object) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(TEXTS, 310, path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A YAML of two inputs with broken lines, a document that is too short, one that is there twice, and an exam's."""
    inputs = []
    for name, texts in (("plain", TEXTS[:30]), ("<b>odd & ends</b>", [*TEXTS[30:], TEXTS[0], SECRET, EXAM])):
        path = tmp_path / f"{len(texts)}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + f"{SECRET}\n")
        inputs.append({"path": str(path), "name": name})
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps({"question": text}) + "\n" for text in (EXAM, SECRET)))
    curation = {
        "length": {"min_characters": 30},
        "decontaminate": {"against": [{"path": str(exam), "text_field": "question"}]},
        "exact_duplicates": True,
    }
    corpus = tmp_path / "corpus.yaml"
    corpus.write_text(yaml.safe_dump({"inputs": inputs, "curation": curation}))
    return corpus


def test_a_yaml_of_inputs_and_rules_is_prepared_and_reported(corpus: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    words = ("prepare", "--corpus", corpus, "--tokenizer", model, "--out", out, "--pack", 64, "--report")
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert re.search(r"documents +60\n", done.stdout)
    assert re.search(r"length.min_characters +│ +1 │ +1.59%", done.stdout)
    assert re.search(r"exact_duplicates +│ +1 │", done.stdout)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "exact_duplicates" in page
    assert re.search(r"exam +│ +2 │ +1 │ +1 │", done.stdout)
    assert re.search(r"<td>exam</td><td class=.number.>2</td>\s*<td class=.number.>1</td>", page)
    assert "&lt;b&gt;odd &amp; ends&lt;/b&gt;" in page
    assert "<b>odd" not in page
    assert "Bins of whole documents" in page
    for told in (done.stdout, done.stderr, page, (out / "report.json").read_text()):
        assert SECRET not in told
        assert "horse" not in told

    again = run(*words, "--json")
    assert again.exit_code == 0, again.output
    assert "was finished before" in again.stderr
    told = json.loads(again.stdout)
    assert told["documents"] == 60
    assert told["inputs"]["plain"]["kept"]["documents"] == 30
    assert told["report"] == str(out / "report.html")


def test_nothing_removed_is_said_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    done = run("prepare", "--input", tmp_path / "one.txt", "--tokenizer", model, "--out", tmp_path / "d", "--report")
    assert done.exit_code == 0, done.output
    assert "every document that could be read is there" in (tmp_path / "d" / "report.html").read_text()


def test_words_that_do_not_go_together(corpus: Path, model: Path, tmp_path: Path) -> None:
    common = ("prepare", "--tokenizer", model, "--out", tmp_path / "d")
    for words, message in [
        ((), "Give either --input PATH ... or --corpus FILE"),
        (("--input", corpus, "--corpus", corpus), "Give either --input PATH ... or --corpus FILE"),
        (("--corpus", tmp_path / "none.yaml"), "none.yaml: no such corpus file"),
        (("--corpus", corpus, "--tasks", 2), "do not go without --cluster"),
        (("--corpus", corpus, "--dry-run"), "do not go without --cluster"),
        (("--corpus", corpus, "--cluster", "cpu"), "--cluster needs --tasks"),
        (("--corpus", corpus, "--cluster", "cpu", "--tasks", 1, "--report"), "--report does not go with --cluster"),
        (("--corpus", corpus, "--cluster", "cpu", "--tasks", 0), "--tasks 0: give a number"),
        (("--corpus", corpus, "--cluster", "cpu", "--tasks", 1, "--time", "soon"), "'soon' is no time limit"),
    ]:
        result = run(*common, *words)
        assert isinstance(result.exception, ValueError), words
        assert message in str(result.exception)
    assert not (tmp_path / "d").exists()


def test_a_finished_folder_that_has_lost_a_file_is_not_called_finished(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d"
    words = ("prepare", "--corpus", corpus, "--tokenizer", model, "--out", out)
    assert run(*words).exit_code == 0
    shard = out / "shard_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    for found in (f"has {shard.stat().st_size:,} bytes", "is missing"):
        done = run(*words)
        assert isinstance(done.exception, ValueError)
        assert f"shard_00000.bin {found}" in str(done.exception)
        assert "remove the folder and prepare it again" in str(done.exception)
        shard.unlink(missing_ok=True)


def test_an_input_of_which_nothing_is_left_is_told(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "long.jsonl"
    texts.write_text(json.dumps({"text": "a text that is long enough to be kept"}) + "\n")
    short = tmp_path / "short.jsonl"
    short.write_text((json.dumps({"text": SECRET}) + "\n") * 3)
    curation = {"length": {"min_characters": len(SECRET) + 1}}
    corpus = tmp_path / "c.yaml"
    corpus.write_text(yaml.safe_dump({"inputs": [{"path": str(texts)}, {"path": str(short)}], "curation": curation}))
    done = run("prepare", "--corpus", corpus, "--tokenizer", model, "--out", tmp_path / "d")
    assert done.exit_code == 0, done.output
    assert "of input short nothing was kept: all 3 documents removed by length.min_characters 3" in done.stderr


def test_a_folder_is_not_written_into_a_store(corpus: Path, model: Path) -> None:
    done = run("prepare", "--corpus", corpus, "--tokenizer", model, "--out", "s3://bucket/d")
    assert isinstance(done.exception, ValueError)
    assert "copy it to the store once it is finished" in str(done.exception)


def test_a_folder_without_counts_has_no_report(corpus: Path, model: Path, tmp_path: Path) -> None:
    from launch.preparation_report import PreparationReport

    with pytest.raises(ValueError, match="does not exist"):
        PreparationReport.read(tmp_path / "d")
    run("prepare", "--corpus", corpus, "--tokenizer", model, "--out", tmp_path / "d")
    for damaged in ("{", "{}", "[]", '{"inputs": {"plain": {"read": {}, "kept": {}, "removed": 1}}}'):
        (tmp_path / "d" / "report.json").write_text(damaged)
        with pytest.raises(ValueError, match="report.json is damaged"):
            PreparationReport.read(tmp_path / "d")
    (tmp_path / "d" / "report.json").unlink()
    with pytest.raises(ValueError, match=r"has no report.json"):
        PreparationReport.read(tmp_path / "d")


def test_each_phase_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from data_pipeline.preparation.workers import Progress

    monkeypatch.setattr("launch.byte_progress.PLAIN_SECONDS", 0.0)
    with PhaseProgress() as line:
        for progress in (Progress("read", 1, None), Progress("read", 3_000_000, None), Progress("place", 0, 0)):
            line.tell(progress)
    said = capsys.readouterr().err.splitlines()
    assert [words.split(":")[0] for words in said] == ["read", "read", "place"]


def test_the_median_and_the_bins() -> None:
    from launch.preparation_report import median_bin

    assert median_bin([0, 0, 0]) == (0, 0)
    assert median_bin([1, 0, 1, 0]) == (1, 2)
    assert median_bin([1, 0, 2, 0]) == (4, 8)
