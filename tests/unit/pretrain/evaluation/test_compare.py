"""Paired differences of two models on the same documents."""

from pathlib import Path

import numpy as np
import pytest

from pretrain.evaluation import compare
from pretrain.evaluation.bootstrap import percentiles, resample
from pretrain.evaluation.compare import check_same_documents, comparison
from pretrain.evaluation.record import DocumentScore
from tests.unit.pretrain.evaluation.evaluated import changed, scored, write_evaluation

DOCUMENTS = scored(40)


def test_a_model_does_not_differ_from_itself() -> None:
    found = comparison(resample(DOCUMENTS), resample(DOCUMENTS[::-1]), same_tokenizer=True)
    assert list(found["measures"]) == ["bits_per_byte", "loss"]
    assert (found["documents"], list(found["by_domain"])) == (40, ["books", "code"])
    for part in (found, *found["by_domain"].values()):
        assert all(each == {"difference": 0.0, "interval": [0.0, 0.0]} for each in part["measures"].values())


def test_a_paired_interval_is_far_narrower_than_that_of_either_model() -> None:
    """A gain of 0.1 nats a token drowns in how much documents differ, but not where the same ones are compared."""
    this, other = resample(scored(400, gain=0.1)), resample(scored(400))
    found = comparison(this, other, same_tokenizer=True)["measures"]["loss"]
    low, high = found["interval"]
    assert low < found["difference"] < high < 0  # less is better
    assert found["difference"] == this.whole.score.loss - other.whole.score.loss == pytest.approx(-0.1, abs=0.02)
    unpaired = percentiles(this.whole.nats_per("tokens"))
    assert unpaired is not None
    assert high - low < 0.15 * (unpaired[1] - unpaired[0])
    turned = comparison(other, this, same_tokenizer=True)["measures"]["loss"]
    assert turned["interval"] == pytest.approx([-high, -low], abs=1e-12)


def test_the_paired_interval_is_that_of_drawing_documents_with_replacement() -> None:
    this, other = scored(200, gain=0.2), scored(200)
    times = np.random.default_rng(0).multinomial(200, np.full(200, 1 / 200), size=20_000)
    nats = np.array([a.nats - b.nats for a, b in zip(this, other, strict=True)])
    text_bytes = np.array([document.bytes for document in this])
    expected = np.quantile(times @ nats / (times @ text_bytes), [0.025, 0.975]) / np.log(2)
    found = comparison(resample(this, 20_000), resample(other, 20_000), same_tokenizer=False)
    np.testing.assert_allclose(
        found["measures"]["bits_per_byte"]["interval"], expected, atol=0.03 * (expected[1] - expected[0])
    )


def test_losses_of_two_tokenizers_are_not_compared() -> None:
    found = comparison(resample(DOCUMENTS), resample(DOCUMENTS), same_tokenizer=False)
    assert [list(part["measures"]) for part in (found, *found["by_domain"].values())] == [["bits_per_byte"]] * 3


def test_of_a_single_document_there_is_a_difference_without_interval() -> None:
    this, other = scored(3, domains=("a", "b", "b"), gain=0.5), scored(3, domains=("a", "b", "b"))
    found = comparison(resample(this), resample(other), same_tokenizer=True)["by_domain"]
    assert (found["a"]["documents"], found["a"]["measures"]["loss"]["interval"]) == (1, None)
    assert found["a"]["measures"]["loss"]["difference"] < 0
    assert found["b"]["measures"]["loss"]["interval"] is not None


@pytest.mark.parametrize("stretch", [8, compare.STRETCH_DOCUMENTS])
@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            changed(DOCUMENTS, 30, text_xxh3="f" * 16),
            f"number 30 is of code with hash {'f' * 16} there, of code .*1e here",
        ),
        (changed(DOCUMENTS, 3, domain="web"), "number 3 is of web .*03 there, of books .*03 here"),
        (DOCUMENTS[:-2], "number 38 is missing there, of code with hash 0*26 here"),
        (scored(40) + scored(42)[40:], "number 40 is of code with hash 0*28 there, missing here"),
        ([*DOCUMENTS, DOCUMENTS[0]], "holds a document twice: evaluate again"),
    ],
)
def test_other_documents_are_refused_by_the_first_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int, others: list[DocumentScore], message: str
) -> None:
    monkeypatch.setattr(compare, "STRETCH_DOCUMENTS", stretch)
    this = write_evaluation(tmp_path / "this", DOCUMENTS)
    other = write_evaluation(tmp_path / "other", others)
    with pytest.raises(ValueError, match=message) as error:
        check_same_documents(this, resample(DOCUMENTS), other, resample(others))
    assert "\n" not in str(error.value)
    check_same_documents(this, resample(DOCUMENTS), other, resample(DOCUMENTS[::-1]))
