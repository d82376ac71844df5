"""The object that an evaluation ends in, and the sentences that say what its numbers mean."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluation.bootstrap import percentiles, resample
from pretrain.evaluation.folder import Facts
from pretrain.evaluation.job import EvaluationJob, evaluate_job
from pretrain.evaluation.record import DocumentScore
from pretrain.evaluation.result import result
from pretrain.evaluation.score import MEASURES, Score
from pretrain.evaluation.texts import texts_config
from tests.tiny_hf import TEXTS, tiny_hf_folder
from tests.unit.pretrain.evaluation.evaluated import FACTS, changed, scored, write_evaluation

DOCUMENTS = scored(80)


def score_of(documents: list[DocumentScore]) -> Score:
    return Score.sum([Score(d.nats, d.tokens, d.bytes, d.words, 1) for d in documents])


def sentences(folder: Path, facts: Facts = FACTS, documents: list[DocumentScore] = DOCUMENTS) -> str:
    return " ".join(result(write_evaluation(folder, documents, facts))["conventions"])


def test_everything_is_told_as_json(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, DOCUMENTS)
    found = result(folder)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    told = {name: found[name] for name in ("model", "step", "passed_over", "precision", "offload", "window", "stride")}
    assert told == {name: json.loads(json.dumps(asdict(FACTS)))[name] for name in told}
    assert (found["start_token"], found["eos_scored"], found["cost"]) == ("bos", True, asdict(FACTS.cost))
    assert found["tasks"] is found["compared"] is None
    for name, part in found["by_domain"].items():
        own = score_of([document for document in DOCUMENTS if document.domain == name])
        assert {key: part[key] for key in own.as_dict()} == own.as_dict()
    assert list(found["by_domain"]) == ["books", "code"]
    for key, value in score_of(DOCUMENTS).as_dict().items():
        assert found[key] == pytest.approx(value, rel=1e-14)


def test_intervals_are_those_of_the_resamples(tmp_path: Path) -> None:
    found = result(write_evaluation(tmp_path, DOCUMENTS))
    resampled = resample(DOCUMENTS)
    for part, sums in ((found, resampled.whole), (found["by_domain"]["code"], resampled.by_domain["code"])):
        assert {key: part["interval"][key] for key in ("level", "replicates", "seed")} == {
            "level": 0.95,
            "replicates": 1000,
            "seed": 0,
        }
        for name, measure in MEASURES.items():
            bounds = percentiles(sums.nats_per(measure.unit))
            assert bounds is not None
            assert part["interval"][name] == [measure.of(bound) for bound in bounds]
            assert part["interval"][name][0] < part[name] < part["interval"][name][1]


def test_positions_add_up_to_the_whole(tmp_path: Path) -> None:
    found = result(write_evaluation(tmp_path, DOCUMENTS))
    ranges = found["by_position"]
    assert [(part["from"], part["to"]) for part in ranges[:4]] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert ranges[0]["tokens"] == len(DOCUMENTS)
    assert sum(part["tokens"] for part in ranges) == found["tokens"]
    nats = sum(part["tokens"] * part["loss"] for part in ranges)
    assert nats / found["tokens"] == pytest.approx(found["loss"], rel=1e-12)


def test_a_single_document_has_no_interval_and_says_so(tmp_path: Path) -> None:
    found = result(write_evaluation(tmp_path, scored(3, domains=("a", "b", "b"))))
    assert found["by_domain"]["a"]["interval"] is None
    assert found["by_domain"]["b"]["interval"] is not None
    said = " ".join(found["conventions"])
    assert "a holds a single document, of which there is no interval." in said
    assert "b holds fewer than 30 documents" in said


def test_many_domains_are_counted_rather_than_named(tmp_path: Path) -> None:
    documents = [replace(document, domain=f"domain{document.index % 5}") for document in scored(100)]
    assert "5 domains hold fewer than 30 documents" in sentences(tmp_path, documents=documents)


def test_text_without_white_space_has_no_word_perplexity(tmp_path: Path) -> None:
    documents = [replace(document, words=1, nats=2000.0 + document.index) for document in DOCUMENTS]
    found = result(write_evaluation(tmp_path, documents))
    json.dumps(found, allow_nan=False)
    assert found["word_perplexity"] is found["interval"]["word_perplexity"] is None
    assert found["interval"]["bits_per_byte"] is not None
    assert any(sentence.startswith("No perplexity per word is given") for sentence in found["conventions"])


def test_a_domain_without_text_is_refused(tmp_path: Path) -> None:
    nothing = DocumentScore(80, "empty", 0.5, 1, 0, 0, "0" * 16)  # its EOS alone
    with pytest.raises(ValueError, match="empty: nothing to measure in 1 documents, 0 bytes, 1 tokens: name texts"):
        result(write_evaluation(tmp_path, [*DOCUMENTS, nothing]))


def test_only_finished_evaluations_have_a_result(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, DOCUMENTS)
    (folder / "facts.json").unlink()
    with pytest.raises(ValueError, match="holds no evaluation"):
        result(folder)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (FACTS, "Each token of a document and the EOS that ends it is scored once"),
        (FACTS, "a document starts from BOS."),
        (FACTS, "Windows of 128 tokens begin every 64 (stride)"),
        (FACTS, "given at least 64."),
        (FACTS, "the BOS that the document starts from is none of them"),
        (FACTS, "The weights are padded."),
        (FACTS, "the middle 95 % of 1,000 resamples of the documents (Poisson bootstrap, seed 0)"),
        (replace(FACTS, start_token="eos"), "starts from EOS, since the tokenizer has no BOS."),
        (replace(FACTS, eos_scored=False), "Each token of a document is scored once"),
        (replace(FACTS, eos_scored=False), "no EOS is, since the tokenizer has none."),
        (replace(FACTS, stride=128), "lie side by side (window = stride = 128)."),
        (
            replace(FACTS, window="document", stride=None),
            "sees a whole document at once, however long; it was trained on 128 tokens.",
        ),
    ],
)
def test_conventions_are_stated(tmp_path: Path, facts: Facts, said: str) -> None:
    assert said in sentences(tmp_path, facts)


def compared(tmp_path: Path, **facts: Any) -> dict[str, Any]:
    this = write_evaluation(tmp_path / "this", scored(80, gain=0.3))
    other = write_evaluation(tmp_path / "other", DOCUMENTS, replace(FACTS, model="runs/second", **facts))
    return result(this, other)


def test_a_comparison_tells_with_whom_and_by_how_much(tmp_path: Path) -> None:
    found = compared(tmp_path)
    json.dumps(found, allow_nan=False)
    about = found["compared"]
    assert (about["with"], about["same_tokenizer"], about["documents"]) == ("runs/second at step 1,000", True, 80)
    assert list(about["by_domain"]) == ["books", "code"]
    assert about["measures"]["loss"]["difference"] == pytest.approx(-0.3, abs=0.05)
    assert about["measures"]["loss"]["interval"][1] < 0
    assert "minus that of runs/second at step 1,000, so below 0 this model is better" in found["conventions"][-1]


def test_what_keeps_models_from_being_compared_fairly_is_told(tmp_path: Path) -> None:
    found = compared(tmp_path, step=None, tokenizer="c3d4", window=64, precision="bf16")
    assert (found["compared"]["with"], found["compared"]["same_tokenizer"]) == ("runs/second", False)
    assert list(found["compared"]["measures"]) == ["bits_per_byte"]
    assert found["conventions"][-2:] == [
        "The tokenizers differ, so the losses per token are not compared.",
        "The models were not scored alike, which is part of the difference: window 128 here and 64 there, "
        "precision fp32 here and bf16 there.",
    ]


def test_two_models_compared_from_text_to_result(tmp_path: Path) -> None:
    """What the evaluations of real text leave, not only what is made up here."""
    (tmp_path / "x").mkdir()
    for at, text in enumerate(TEXTS):
        (tmp_path / "x" / f"{at}.txt").write_text(text, encoding="utf-8")
    texts = texts_config([str(tmp_path / "x")])
    folders = []
    for seed in range(2):
        model = tmp_path / f"model{seed}"
        model.mkdir()
        folders.append(tmp_path / f"scored{seed}")
        evaluate_job(EvaluationJob(str(tiny_hf_folder(model, seed)), texts, window=32), folders[-1])
    found, alone = result(*folders), result(folders[1])
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert found["by_domain"].keys() == {"x"}
    assert found["compared"]["same_tokenizer"]
    for measure, about in found["compared"]["measures"].items():
        assert about["difference"] == found[measure] - alone[measure]
        assert about["interval"][0] < about["difference"] < about["interval"][1]
    same = result(folders[0], folders[0])["compared"]["measures"]["loss"]
    assert same == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_a_comparison_of_other_documents_is_refused(tmp_path: Path) -> None:
    this = write_evaluation(tmp_path / "this", DOCUMENTS)
    other = write_evaluation(tmp_path / "other", changed(DOCUMENTS, 7, text_xxh3="e" * 16))
    with pytest.raises(
        ValueError, match=f"number 7 is of books with hash {'e' * 16} there, of books with hash 0*7 here"
    ):
        result(this, other)
