"""Signatures of URLs stay out of what a preparation leaves behind."""

from pathlib import Path

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.preparation.job import Request, prepare_corpus
from tests.unit.data_pipeline.preparation.folders import sample_texts, write_corpus
from tests.unit.data_pipeline.servers import file_server

SECRET = "X-Signature=5e47e7"


def test_inputs_that_differ_in_their_signature_only(tokenizer_path: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_corpus(tmp_path / name, sample_texts(3), 1)
    (tmp_path / "exam.txt").write_text("one more word " * 5)
    out = tmp_path / "d"
    with file_server(tmp_path) as server:
        urls = [f"{server.url}/{name}/part_000.jsonl?{SECRET}" for name in ("one", "two")]
        urls.append(f"{urls[0]}0")
        exams = [f"{server.url}/exam.txt?{SECRET}{at}" for at in (1, 2)]
        tree = {"inputs": [{"path": url} for url in urls], "curation": {"decontaminate": {"against": exams}}}
        prepare_corpus(Request(CorpusConfig.model_validate(tree), str(tokenizer_path), out), 1)
    left = [path for path in out.rglob("*") if path.is_file()]
    assert len(left) > 5
    assert [path.name for path in left if SECRET.encode() in path.read_bytes()] == []
    assert b"/one/part_000.jsonl (2)" in (out / "report.json").read_bytes()
