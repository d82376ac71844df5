"""The report: one page, complete, offline, harmless whatever it tells of, and small whatever the length of the run."""

import math
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.cluster.sweep import Point, Sweep
from launch.goodput import ACCOUNTS
from launch.report import run_report, sweep_report
from launch.report_plots import COLOURS
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir, write_json
from tests.made_up_profile import made_up_profile
from tests.small_run import small_config
from tests.unit.launch.history_of_a_run import MadeUpRun

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib's, such as of a layout that it could not make
EVIL = "web <script>alert(1)</script> $x_1$ \"quoted\" & 'so'"
CSS = (Path(__file__).parents[3] / "launch" / "report.css").read_text()


class Page(HTMLParser):
    """Elements, their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(path: Path, steps: int, moe: bool = False) -> RunDir:
    """A run on a cluster with a bit of everything."""
    path.mkdir()
    run = RunDir(path)
    dump_config(small_config(f"schedule.total_steps={steps}"), run.config_path)
    write_json(run.environment_path, {"packages": {"torch": EVIL}})
    made = MadeUpRun(cluster=True)
    made.submitted(30.0)
    made.attempt(0, 5.0, checks=1.0)
    made.write("stage", step=0, position=0, weights={EVIL: 3.0, "_code": 1.0}, sequence_length=24, global_batch_size=8)
    while made.step < steps:
        number = made.step + 1
        load = {"0": 1.5, "1": 1.7} if moe else None
        loss = math.nan if number == 3 else 5 / number
        if number == 2:
            made.write("left_out", step=1, ranges=[[8, 16], [32, 40]])
        made.makes_step(1.0, waits=0.1, skipped=number == 3, loss=loss, expert_load_max_over_mean=load)
        if number == steps // 2:
            made.starts_save(0.2)
            scores = {EVIL: {"loss": 2.0, "bits_per_byte": 1.0}, "_code": {"loss": 1.0, "bits_per_byte": 0.5}}
            made.write("evaluation", step=made.step, tokens=0, by_source=scores, seconds=0.0)
            made.reports()
            made.write("straggler", step=made.step, rank=3, host=EVIL, ratio=2.0)
        if number == steps // 2 + 2 and not any(event["type"] == "rewind" for event in made.events):
            made.rewinds(steps // 2, 3.0)
            made.verdict("failed", "requeue", 2.0, "down")
            made.events[-1]["outcome"]["message"] = EVIL
            made.attempt(made.step, 5.0)
    if moe:
        made.write("expert_load", step=made.step, pairs={"0": [1, 2, 3], "1": [3, 2, 1]})
    made.ends("done", 1.0, 1.0)
    made.verdict("done", "done", 1.0, "stopping")
    made.write_to(run)
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a short run with experts."""
    return run_report(write_run(tmp_path_factory.mktemp("reported") / "run", 20, moe=True).path)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_last_profile_is_shown(on_device: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 8)
    assert "Profile of steps" not in run_report(run.path)
    for first in (4, 11):
        folder = run.profiles / f"step_{first}"
        folder.mkdir(parents=True)
        write_json(folder / "regions.json", made_up_profile(first, on_device))
        os.utime(folder / "regions.json", (first, first))
    page = Page(run_report(run.path))
    assert "Profile of steps 11 to 12" in page.text
    assert "Profile of steps 4" not in page.text
    for told in ("backward", "0.6000", "60.0 %", "MFU 25.0%", "PaLM, appendix B"):
        assert told in page.text
    assert ("of the device" in page.text) == ("0.3000" in page.text) == on_device


def test_a_page_has_everything(text: str) -> None:
    page = Page(text)
    for heading in (
        "Loss",
        "Gradient norm and learning rate",
        "Throughput",
        "Experts",
        "Goodput",
        "Timeline",
        "Attempts",
    ):
        assert f"<h2>{heading}</h2>" in text
    for told in (
        "a spike (z-score 9.0)",
        "takes 2.0 times as long",
        "samples 8 to 15, 32 to 39",
        "75.0 %",
        "config.yaml",
        "failed: web",
    ):
        assert told in page.text
    shares = [float(found) for found in re.findall(r"(\d+\.\d\d) %</td>", text)]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.06)
    assert shares[-1] == 100


def test_names_are_harmless(text: str) -> None:
    page = Page(text)
    assert EVIL in page.text
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "embed", "form"} == set()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_a_page_needs_no_network(text: str) -> None:
    named = ("src", "href", "xlink:href", "data", "srcset")
    found = [attributes[name] for _, attributes in Page(text).tags for name in named if attributes.get(name)]
    assert not [value for value in found if value is not None and not value.startswith(("#", "data:"))]
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)


def test_every_colour_is_one_of_the_pages(text: str) -> None:
    """So that plots follow the page, light or dark; and each variable has both."""
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000", "#ffffff"}
    light, dark = CSS.split("prefers-color-scheme: dark")
    for name in {*re.findall(r"var\(--([a-z0-9]+)\)", text), *COLOURS, *ACCOUNTS}:
        assert f"--{name}:" in light, name
        assert f"--{name}:" in dark, name
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_an_uneventful_run(tmp_path: Path) -> None:
    """Nothing to mark, no validation, one step; then more."""
    (tmp_path / "run").mkdir()
    run = RunDir(tmp_path / "run")
    dump_config(small_config(), run.config_path)
    made = MadeUpRun(cluster=False)
    made.attempt(0, 4.0)
    for _ in range(2):
        made.makes_step(2.0)
        made.write_to(run)
        assert run_report(run.path).count("<svg") == 4


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunDir(tmp_path / "run")
    dump_config(small_config(), run.config_path)
    assert "<h2>Configuration</h2>" in run_report(run.path)
    with pytest.raises(ValueError, match="is not a run: config.yaml is missing in it"):
        run_report(tmp_path)


@pytest.mark.slow
def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    began = time.process_time()
    run = write_run(tmp_path / "run", 100_000)
    written = time.process_time() - began
    text = run_report(run.path)
    assert len(text) < 2e6
    assert time.process_time() - began - written < 30
    assert run.events_path.stat().st_size > 2e7


def test_a_sweep(tmp_path: Path) -> None:
    points = tuple(Point(f"{i}_<b>", {"optimizer.lr": f"1e-{i}"}) for i in range(2))
    Sweep(tmp_path, "7", points).write()
    for point in points:
        write_run(tmp_path / point.name, 20)
    text = sweep_report(tmp_path)
    assert "0_<b>" in Page(text).text
    assert "<b>" not in text
    assert text.count("<svg") == 1
    assert 'class="best"' in text


def test_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 8)
    done = CliRunner().invoke(app, ["report", str(run.path)])
    assert done.exit_code == 0, done.output
    assert (run.path / "report.html").read_text().startswith("<!DOCTYPE html>")
    done = CliRunner().invoke(app, ["report", str(run.path), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file()
