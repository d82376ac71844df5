"""What `steppe eval` shows of a result: tables that nothing is cut from, a file of rows, and a page."""

import csv
import io
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launch.evaluation_csv import csv_text
from launch.evaluation_plots import BIN_WIDTH, MOST_BARS, Histogram
from launch.evaluation_report import LISTED, LISTED_BYTES, Documents, evaluation_page
from launch.evaluation_table import show
from launch.evaluation_words import number, scores_of, task_rows, verdict
from pretrain.evaluation.record import DocumentScore, read_scores
from pretrain.evaluation.result import result
from pretrain.evaluation.score import MEASURES
from tests.unit.launch.test_report import CSS, EVIL, Page
from tests.unit.pretrain.evaluation.evaluated import FACTS, scored, write_evaluation

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib's, such as of a layout that it could not make
NAME = f"{EVIL} [bold]日本[/bold]"
TASKS = {
    "results": {
        "truth": {
            "alias": "truth",
            "acc,none": 0.51,
            "acc_stderr,none": 0.02,
            "exact_match,strict": 0.25,
            "f1,none": None,
        },
        NAME: {"alias": "x", "word_perplexity,none": 12345.6, "word_perplexity_stderr,none": "N/A"},
    },
    "versions": {"truth": 1.0},
    "n-shot": {"truth": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = scored(300, domains=("books", NAME))
    documents.append(replace(documents[0], index=300, domain="one"))
    path = tmp_path_factory.mktemp("evaluated")
    write_evaluation(path / "this", documents, replace(FACTS, domains=("books", NAME, "one")))
    better = [replace(document, nats=0.9 * document.nats) for document in documents]
    write_evaluation(path / "other", better, replace(FACTS, model=NAME))
    return path


@pytest.fixture(scope="module")
def full(folder: Path) -> dict[str, Any]:
    """Everything that a result may hold."""
    return {**result(folder / "this", folder / "other"), "tasks": TASKS}


def printed(shown: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    show(shown, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_table_is_never_cut(full: dict[str, Any], width: int) -> None:
    text = printed(full, width)
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= width
    for score in (full, *full["by_domain"].values()):
        for told in (f"{score['bits_per_byte']:.4f}", number(score["word_perplexity"]), f"{score['bytes']:,}"):
            assert told in text
    low, high = full["interval"]["bits_per_byte"]
    assert f"{low:.4f} to {high:.4f}" in text
    squeezed = re.sub(r"\s", "", text)
    for sentence in full["conventions"]:
        assert re.sub(r"\s", "", sentence) in squeezed
    assert "[bold]" in text  # a name is no markup
    assert "worse" in text
    assert ("128 to 255" in text) == any(bucket["to"] == 255 for bucket in full["by_position"])


def test_a_wide_terminal_shows_one_table(full: dict[str, Any]) -> None:
    assert [text.count(" domain ") for text in (printed(full, 80), printed(full, 160))] == [4, 3]


def test_a_bare_terminal_has_no_blocks(full: dict[str, Any]) -> None:
    bare = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    show(full, Console(width=100, file=bare))
    bare.seek(0)
    assert "####" in bare.read()


def test_words() -> None:
    assert [number(value) for value in (1.0, 999.5, 12345.678, 1.5e7, None)] == [
        "1.000", "999.500", "12,345.7", "1.50e+07", "-",
    ]  # fmt: skip
    bounds = ([-2.0, -1.0], [1.0, 2.0], [-1.0, 1.0], None)
    assert [verdict({"interval": each, "documents": 30}) for each in bounds] == [
        "better", "worse", "no difference shown", "one document tells nothing",
    ]  # fmt: skip


def test_the_rounding_of_a_forward_pass_is_no_difference() -> None:
    """One model in two sizes of batch differs by 1e-7, and may do so on every document alike."""
    for bounds in ([-3e-7, -1e-7], [1e-7, 3e-7]):
        assert verdict({"interval": bounds, "documents": 1000}) == "no difference shown"
    assert verdict({"interval": [-3e-4, -1e-4], "documents": 1000}) == "better"


def test_few_documents_show_less() -> None:
    assert verdict({"interval": [-2.0, -1.0], "documents": 2}) == "better, of few documents"
    assert verdict({"interval": [1.0, 2.0], "documents": 29}) == "worse, of few documents"
    assert verdict({"interval": [-1.0, 2.0], "documents": 2}) == "no difference shown"


def test_what_it_took_and_in_which_precision(full: dict[str, Any]) -> None:
    assert "computed in fp32: 2 s on 2 ranks, 500 tokens/s, peak memory of a rank 0.00 GB" in printed(full, 100)
    alone = {**full, "precision": "bf16", "offload": "disk", "cost": {**full["cost"], "ranks": 1}}
    assert "computed in bf16, weights on disk: 2 s, 500 tokens/s, peak memory 0.00 GB" in printed(alone, 100)


def test_tasks_as_rows() -> None:
    assert list(task_rows(TASKS)) == [
        ("truth", "acc", "0.5100", "0.0200", "5", "1.0"),
        ("truth", "exact_match (strict)", "0.2500", "-", "5", "1.0"),
        ("truth", "f1", "-", "-", "5", "1.0"),  # it was no number, and must not seem to have been left out
        (NAME, "word_perplexity", "12345.6000", "-", "-", "-"),
    ]
    (row,) = task_rows({**TASKS, "results": {"t": {"perplexity,none": 6.045e19, "perplexity_stderr,none": 9e31}}})
    assert row[2:4] == ("6.0450e+19", "9.0000e+31")


def test_tasks_alone(full: dict[str, Any]) -> None:
    cost = {**full["cost"], "tokens_per_second": None}
    names = ("model", "step", "passed_over", "precision", "offload", "tasks")
    alone = {**{name: full[name] for name in names}, "conventions": ["They are lm-eval's."], "cost": cost}
    assert "truth" in printed(alone, 80)
    page = Page(evaluation_page(alone, []))
    assert "exact_match (strict)" in page.text
    assert "took2 s on 2 ranks" in page.text.replace("\n", "")
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_csv_holds_every_number(full: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(full))))
    assert [row["domain"] for row in rows] == ["books", NAME, "one", "all"]
    for row, score in zip(rows, (*full["by_domain"].values(), full), strict=True):
        assert all(float(row[name]) == score[name] for name in (*MEASURES, "tokens", "words", "bytes", "documents"))
        assert (row["model"], row["step"], row["window"], row["stride"]) == ("runs/first", "1000", "128", "64")
        for name in MEASURES:
            bounds = score["interval"] and score["interval"][name]
            told = [row[f"{name}_low"], row[f"{name}_high"]]
            assert told == ["", ""] if bounds is None else list(map(float, told)) == bounds
    differences = full["compared"]["measures"]
    assert float(rows[-1]["loss_difference"]) == differences["loss"]["difference"]
    assert float(rows[-1]["bits_per_byte_difference_high"]) == differences["bits_per_byte"]["interval"][1]
    assert {row["compared_with"] for row in rows} == {full["compared"]["with"]}


def test_a_domain_may_be_called_all(full: dict[str, Any]) -> None:
    confused = {**full, "by_domain": dict.fromkeys(("all", "b"), full["by_domain"]["one"]), "compared": None}
    assert list(scores_of(confused)) == ["all", "b", "(all)"]
    assert [row["domain"] for row in csv.DictReader(io.StringIO(csv_text(confused)))] == ["all", "b", "(all)"]


@pytest.mark.parametrize("name", ["a\rb", "a\nb", 'a"b', "a;b", "a,b", "", " a "])
def test_any_name_is_one_cell(full: dict[str, Any], name: str) -> None:
    named = {**full, "model": name, "by_domain": {name: full["by_domain"]["one"]}, "compared": None}
    rows = list(csv.DictReader(io.StringIO(csv_text(named), newline="")))
    assert [(row["model"], row["domain"]) for row in rows] == [(name, name), (name, "all")]


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x")', "+1", "-1", "@x", "\t=1", "\r=1"])
def test_no_name_is_a_formula(full: dict[str, Any], name: str) -> None:
    named = {**full, "by_domain": {name: full["by_domain"]["one"]}, "compared": None}
    first, _ = csv.DictReader(io.StringIO(csv_text(named), newline=""))
    assert first["domain"] == f"'{name}"


def test_columns_are_always_the_same(full: dict[str, Any], folder: Path) -> None:
    heading, _, *_ = csv_text(result(folder / "this")).splitlines()
    assert heading == csv_text(full).splitlines()[0]


@pytest.fixture(scope="module")
def text(full: dict[str, Any], folder: Path) -> str:
    return evaluation_page(full, read_scores(folder / "this"))


def test_a_page_has_everything(full: dict[str, Any], text: str) -> None:
    page = Page(text)
    for heading in ("Bits per byte", "Loss and perplexity", "Loss by position", "Documents", "Benchmarks"):
        assert f"<h2>{heading}</h2>" in text
    assert "<h2>Compared with " in text
    for told in (f"{full['bits_per_byte']:.4f}", "step_2000: its index is missing", "worse", *full["conventions"]):
        assert told in page.text
    rows = len(full["by_domain"]) + 1
    strips = [attributes for _, attributes in page.tags if attributes.get("class") == "strip"]
    assert len(strips) == rows * (1 + len(full["compared"]["measures"]))
    places = [float(found) for found in re.findall(r'<rect x="([^"]+)"', text)]
    assert 0 <= min(places) <= max(places) <= 100


def test_a_page_is_harmless_and_complete(text: str) -> None:
    page = Page(text)
    assert NAME in page.text
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "embed", "form"} == set()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    named = ("src", "href", "xlink:href")
    found = [attributes[name] for _, attributes in page.tags for name in named if attributes.get(name)]
    assert not [value for value in found if value is not None and not value.startswith("#")]
    light, dark = CSS.split("prefers-color-scheme: dark")
    for name in re.findall(r"var\(--([a-z0-9]+)\)", text):
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


def document(index: int, bits_per_byte: float, text_bytes: int = 1000) -> DocumentScore:
    nats = bits_per_byte * text_bytes * np.log(2)
    return DocumentScore(index, "d", nats, text_bytes // 4, text_bytes, text_bytes // 5, "0" * 16)


def test_hardest_and_easiest_documents_in_any_order() -> None:
    scores = [document(i, 1 + i / 1000) for i in range(1000)]
    scores += [document(1000, 0.0001, LISTED_BYTES - 1), document(1001, 20.0, LISTED_BYTES - 1), document(1002, 0, 0)]
    rng = np.random.default_rng(0)
    for order in (range(1003), rng.permutation(1003)):
        found = Documents(["d"], (scores[i] for i in order))
        assert [listed.index for listed in found.hardest] == list(range(999, 999 - LISTED, -1))
        assert [listed.index for listed in found.easiest] == list(range(LISTED))
        assert found.histogram.documents == 1002  # that without text has no bits per byte


def test_a_histogram_holds_every_document() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.lognormal(0, 0.5, 5000), [0.0, 500.0]])
    histogram = Histogram(["a", "b"])
    for value, domain in zip(values, itertools.cycle("ab"), strict=False):
        histogram.add(domain, float(value))
    edges, heights = histogram.bars()
    assert 1 <= len(edges) - 1 <= MOST_BARS
    assert [height.sum() for height in heights.values()] == [2501, 2501]
    bar = len(edges) // 2
    between = np.histogram(np.floor(values / BIN_WIDTH + 1e-9) * BIN_WIDTH, [edges[bar] - 1e-9, edges[bar + 1] - 1e-9])
    assert sum(height[bar] for height in heights.values()) == between[0][0]


def test_many_domains_make_a_small_page(full: dict[str, Any]) -> None:
    names = [f"domain {i}" for i in range(300)]
    many = {**full, "by_domain": dict.fromkeys(names, full["by_domain"]["books"]), "compared": None}
    scores = [replace(document(i, 1 + i / 1000), domain=names[i % 300]) for i in range(900)]
    page = evaluation_page(many, scores)
    assert len(page) < 1e6
    assert "others</span>" in page
